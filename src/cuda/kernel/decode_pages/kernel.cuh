// decode_pages is unified_attention for few query rows (decode and verification) at the speed of memory, on sm_90a.
//
//   grid    One block a multiprocessor. The slices (16 keys) of all sequences form one list, and every block takes a
//           run of it (work/page_list.cuh), whichever sequences the run meets.
//   block   8 or 16 consumer warps, one a KV head, and one warp that copies. Where there are fewer KV heads than
//           warps, the warps form groups that each have every head and take the slices in turn.
//   stage   One slice of all heads: codes and scales of K and V as they lie in the page, fetched by bulk copies of
//           whole runs (attention/page_slices.h). There are as many stages as fit: 170 KiB and more are always on
//           their way.
//   slice   S^T = K Q^T: K is the first operand of m16n8k16 with keys on its rows, made straight from the raw words
//           (format/operand.cuh), and the query rows stand on the columns. Then O^T = V^T P^T, with dimensions on
//           the rows.
//
//   The running maximum moves only when some weight would pass 2^12, so most slices need no shuffle. Weights are
//   relative to it and, where values have scales, to `unit`, a power of two that no scale has exceeded by much.
//
// Partial results go to memory in the order of the fragments, and merge_pages combines them. The budget and the
// measurements are in docs/kernels/decode.md.
#pragma once

#include <cstdint>

#include "cuda/kernel/decode_pages/config.h"
#include "cuda/kernel/decode_pages/consumer.cuh"
#include "cuda/kernel/decode_pages/producer.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace quire::cuda {

template <format::Format KeyF, format::Format ValueF, int kHead, int kRows>
__global__ void __launch_bounds__((DecodePagesConfig<KeyF, ValueF, kHead, kRows>::kThreads), 1)
    decode_pages(const __grid_constant__ DecodePagesParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Config = DecodePagesConfig<KeyF, ValueF, kHead, kRows>;
  extern __shared__ float4 shared_bytes[];
  auto& shared = *reinterpret_cast<typename Config::Storage*>(shared_bytes);
  const std::uint32_t stages = ptx::shared_address(shared_bytes) + Config::kHeaderBytes;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int part = static_cast<int>(blockIdx.x) % p.parts;
  const int place = static_cast<int>(blockIdx.x) / p.parts;
  if (thread == 0) {
    for (int i = 0; i < p.num_stages; ++i) {
      ptx::mbarrier_init(&shared.full[i], 1);
      ptx::mbarrier_init(&shared.empty[i], p.slice.num_heads);
    }
    for (int i = 0; i < Config::kSegments; ++i) {
      ptx::mbarrier_init(&shared.segment_full[i], 1);
      ptx::mbarrier_init(&shared.segment_empty[i], p.slice.num_heads * p.groups);
    }
    ptx::barriers_initialised();
  }
  KeyOperand<KeyF>::fill(shared.table, thread, Config::kThreads);
  __syncthreads();
  ptx::let_next_kernel_start();
  if (warp >= Config::kWarps) {
    ptx::give_registers<Config::kProducerRegisters>();
    if (warp == Config::kWarps) PageProducer<Config>(p, shared, stages, part, place, lane).run();
  } else {
    ptx::take_registers<Config::kConsumerRegisters>();
    if (warp < p.slice.num_heads * p.groups) {
      PageConsumer<KeyF, ValueF, kHead, kRows>(p, shared, stages, part, warp, lane).run();
    }
  }
#endif
}

}  // namespace quire::cuda
