// decode_pages and merge_pages in the stream, the second launched so that it can start while the first ends.
#include <algorithm>
#include <cstdint>

#include "cuda/kernel/decode_pages/merge.cuh"
#include "cuda/kernel/decode_pages/params.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "format/formats.h"

namespace quire::cuda {
namespace {

template <int kHead>
__global__ void __launch_bounds__(std::min(1024, kHead* kMostMergeSplits))
    merge_pages(const __grid_constant__ MergePagesParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  __shared__ PagesMerge<kHead> merge;
  merge.run(p, static_cast<int>(blockIdx.x), static_cast<int>(blockDim.x) / kHead, static_cast<int>(threadIdx.x) / 32,
            static_cast<int>(threadIdx.x) % 32);
#endif
}

// Launches a kernel that may start while the one before it in the stream ends; it waits for that itself.
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

cudaError_t launch_merge(const MergePagesParams& params, std::int64_t tiles, int head_class, int splits,
                         cudaStream_t stream) {
  const std::int64_t blocks = tiles * params.num_kv_heads * (params.tile_rows / 4);
  void (*kernel)(MergePagesParams) = head_class == 64    ? &merge_pages<64>
                                     : head_class == 128 ? &merge_pages<128>
                                                         : &merge_pages<256>;
  return launch_overlapped(kernel, blocks, head_class * splits, 0, params, stream);
}

// How the list is shared out, and the slots of its partial results.
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
  // Loads reach past the last row where rows are smaller than their class, or unaligned: not into the next stage.
  const bool full = params.head_size == kernel.head_class && params.head_size_v == kernel.head_class;
  p.stage_bytes = p.slice.bytes + (!full ? kernel.slack : (kernel.access < 16 ? 16 : 0));
  const int fit = (kernel.shared_bytes - kernel.header_bytes - kernel.slack) / p.stage_bytes;
  while (p.groups > 1 && fit < 2 * p.groups) --p.groups;
  p.num_stages = std::min(fit, kernel.max_stages) / p.groups * p.groups;
  if (p.num_stages < 1) return cudaErrorInvalidValue;
  p.key_access = access_of(p.slice.key);
  p.value_access = access_of(p.slice.value);
  p.aligned = std::min(p.key_access, p.value_access) >= kernel.access;
  PagePartials& partials = p.partials_of_pages;
  partials.tiles = static_cast<int4*>(static_cast<void*>(params.partials.state));
  partials.state = static_cast<float2*>(static_cast<void*>(partials.tiles + tiles));
  partials.acc =
      reinterpret_cast<float4*>(partials.state + sharing.slots * p.groups * p.num_kv_heads * kernel.tile_rows);
  const cudaError_t error = launch_overlapped(function, static_cast<std::int64_t>(sharing.blocks) * sharing.parts,
                                              kernel.threads, static_cast<std::size_t>(kernel.shared_bytes), p, stream);
  if (error != cudaSuccess) return error;
  // Partials of a row: about as many as blocks a tile.
  const std::int64_t count = (sharing.blocks / std::max<std::int64_t>(1, tiles) + 2) * p.groups;
  int splits = 1;
  while (splits < kMostMergeSplits && 4 * splits < count && splits * kernel.head_class < 1024) splits *= 2;
  const MergePagesParams merge{partials, kernel.tile_rows,   p.list.max_tiles, p.num_kv_heads, p.group_size,
                               p.groups, kernel.value_piece, p.num_tokens,     p.output};
  return launch_merge(merge, tiles, kernel.head_class, splits, stream);
}

}  // namespace quire::cuda
