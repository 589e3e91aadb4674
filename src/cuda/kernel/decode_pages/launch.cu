// Puts decode_pages and merge_pages into the stream. The merge is launched so that it can start while decode_pages
// ends.
#include <algorithm>
#include <cstdint>

#include "cuda/kernel/decode_pages/merge.cuh"
#include "cuda/kernel/decode_pages/params.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "format/formats.h"

namespace quire::cuda {
namespace {

constexpr int kLine = 128;  // bytes of a line of shared memory, where stages begin

template <int kHead>
__global__ void __launch_bounds__(32 * PagesMerge<kHead>::kMostWarps)
    merge_pages(const __grid_constant__ MergePagesParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Merge = PagesMerge<kHead>;
  extern __shared__ float4 shared_bytes[];
  __shared__ float rows[kMergeWarps][kHead];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int row = warp / p.warps;
  const int rows_of_block = static_cast<int>(blockDim.x) / 32 / p.warps;
  Merge::run(p, static_cast<int>(blockIdx.x) * rows_of_block + row,
             reinterpret_cast<typename Merge::Sum*>(shared_bytes) + row * p.warps * Merge::kLanes, rows[row],
             warp % p.warps, static_cast<int>(threadIdx.x) % 32);
#endif
}

// Launches a kernel that may start while the one before it in the stream ends. The kernel itself waits for that end.
template <class Params>
cudaError_t launch_overlapped(void (*kernel)(Params), std::int64_t blocks, int threads, std::size_t shared_bytes,
                              const Params& params, cudaStream_t stream) {
  const cudaError_t error = allow_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  const cudaLaunchConfig_t config{
      static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared_bytes, stream, &overlap, 1};
  return cudaLaunchKernelEx(&config, kernel, params);
}

template <int kHead>
cudaError_t launch_merge(const MergePagesParams& params, cudaStream_t stream) {
  using Merge = PagesMerge<kHead>;
  const std::int64_t rows = std::int64_t{params.tiles} * params.num_kv_heads * params.tile_rows;
  const int rows_of_block = std::max(1, kMergeWarps / params.warps);
  const int warps = rows_of_block * params.warps;
  const std::size_t shared_bytes =
      params.warps > 1 ? static_cast<std::size_t>(warps) * Merge::kLanes * sizeof(typename Merge::Sum) : 0;
  return launch_overlapped(&merge_pages<kHead>, (rows + rows_of_block - 1) / rows_of_block, 32 * warps, shared_bytes,
                           params, stream);
}

// The log2 of the warps that merge a row of about `count` partials: enough that one load of each warp fetches them all.
int merge_warps(std::int64_t count) {
  constexpr int kMost = 4;
  int log2 = 0;
  while (log2 < kMost && (8 << log2) < count) ++log2;
  return log2;
}

// How the list is divided among the blocks, and how many slots their partial results take.
struct Sharing {
  int heads, parts, groups, blocks;
  std::int64_t slots;
};
Sharing share(const PagesKernel& kernel, int heads, int num_kv_heads, int num_multiprocessors, std::int64_t tiles,
              bool batch_invariant, std::int64_t max_keys) {
  Sharing sharing;
  sharing.heads = heads;
  sharing.parts = num_kv_heads / sharing.heads;
  sharing.groups = kernel.warps / sharing.heads;
  sharing.blocks = std::max(1, num_multiprocessors / sharing.parts);
  const std::int64_t slices = (max_keys + kSliceKeys - 1) / kSliceKeys;
  sharing.slots = tiles + (batch_invariant ? tiles * ((slices >> kInvariantGrain) + 1) : sharing.blocks);
  return sharing;
}

std::size_t bytes_of(const PagesKernel& kernel, const Sharing& sharing, std::int64_t tiles, int num_kv_heads) {
  return static_cast<std::size_t>(tiles) * sizeof(int4) +
         static_cast<std::size_t>(sharing.slots) * static_cast<std::size_t>(sharing.groups) *
             static_cast<std::size_t>(num_kv_heads) * static_cast<std::size_t>(kernel.tile_rows) *
             (sizeof(float2) + sizeof(float) * static_cast<std::size_t>(kernel.head_class));
}

int access_of(const attention::SliceRows& rows) {
  const int bits = rows.at | rows.slot_stride | rows.head_stride | 16;
  return bits & -bits;
}

}  // namespace

std::size_t pages_workspace(const PagesKernel& kernel, std::int64_t row_bytes, const AttentionProblem& problem) {
  const std::int64_t rows =
      std::min<std::int64_t>(kFewRows, problem.max_query_len * (problem.num_q_heads / problem.num_kv_heads));
  const std::int64_t tiles =
      problem.max_batch * std::max<std::int64_t>(1, (rows + kernel.tile_rows - 1) / kernel.tile_rows);
  return bytes_of(kernel,
                  share(kernel, attention::heads_of_slice(problem.num_kv_heads, row_bytes), problem.num_kv_heads,
                        problem.arch.num_multiprocessors, tiles, problem.batch_invariant, problem.max_seq_len),
                  tiles, problem.num_kv_heads);
}

cudaError_t launch_pages(const PagesKernel& kernel, void (*function)(DecodePagesParams), const AttentionParams& params,
                         cudaStream_t stream) {
  DecodePagesParams p{params};
  p.max_splits = 1;
  p.num_kv_heads = params.num_q_heads / params.group_size;
  if (params.page_slice == nullptr) return cudaErrorInvalidValue;  // the plan's problem says that it has one
  p.slice = *params.page_slice;
  const std::int64_t tiles = static_cast<std::int64_t>(params.batch) * params.sequence_tiles;
  const std::int64_t max_keys = params.max_blocks * params.block_size;
  const Sharing sharing = share(kernel, p.slice.num_heads, p.num_kv_heads, params.num_multiprocessors, tiles,
                                params.batch_invariant, max_keys);
  p.list = {params.sequence_tiles, params.batch_invariant ? kInvariantGrain : 0, sharing.blocks};
  p.parts = sharing.parts;
  p.groups = sharing.groups;
  // Where rows are smaller than their class or unaligned, loads reach past the last row; these bytes keep them out of
  // the next stage.
  const bool full = params.head_size == kernel.head_class && params.head_size_v == kernel.head_class;
  const int past = !full ? kernel.slack : (kernel.access < 16 ? 16 : 0);
  p.stage_bytes = (p.slice.bytes + past + kLine - 1) / kLine * kLine;
  const int fit = (kernel.shared_bytes - kernel.header_bytes - kernel.slack) / p.stage_bytes;
  while (p.groups > 1 && fit < 2 * p.groups) --p.groups;
  p.num_stages = std::min(fit, kernel.max_stages) / p.groups * p.groups;
  if (p.num_stages < 1) return cudaErrorInvalidValue;
  p.aligned = std::min(access_of(p.slice.key), access_of(p.slice.value)) >= kernel.access;
  PagePartials& partials = p.partials_of_pages;
  partials.tiles = static_cast<int4*>(static_cast<void*>(params.partials.state));
  partials.state = static_cast<float2*>(static_cast<void*>(partials.tiles + tiles));
  partials.acc =
      reinterpret_cast<float4*>(partials.state + sharing.slots * p.groups * p.num_kv_heads * kernel.tile_rows);
  const cudaError_t error = launch_overlapped(function, static_cast<std::int64_t>(sharing.blocks) * sharing.parts,
                                              kernel.threads, static_cast<std::size_t>(kernel.shared_bytes), p, stream);
  if (error != cudaSuccess) return error;
  MergePagesParams merge{};
  merge.partials = partials;
  merge.tile_rows = kernel.tile_rows;
  merge.max_tiles = p.list.max_tiles;
  merge.num_kv_heads = p.num_kv_heads;
  merge.group_size = p.group_size;
  merge.groups = p.groups;
  merge.value_piece = kernel.value_piece;
  merge.tiles = static_cast<int>(tiles);
  merge.num_tokens = p.num_tokens;
  merge.output = p.output;
  // Where results are batch-invariant, the order in which a row's partials are summed must not depend on the batch.
  const std::int64_t count = (sharing.blocks / std::max<std::int64_t>(1, tiles) + 2) * p.groups;
  merge.log2_warps = params.batch_invariant ? 3 : merge_warps(count);
  merge.warps = 1 << merge.log2_warps;
  return kernel.head_class == 64    ? launch_merge<64>(merge, stream)
         : kernel.head_class == 128 ? launch_merge<128>(merge, stream)
                                    : launch_merge<256>(merge, stream);
}

}  // namespace quire::cuda
