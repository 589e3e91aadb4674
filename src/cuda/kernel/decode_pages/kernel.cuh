// unified_attention for few query rows at the memory's speed: decode and verify on sm_90a.
//
//   grid    one block a multiprocessor. The slices (16 keys) of all sequences are one list; a block takes a run of it
//           (work/page_list.cuh), whatever sequences that meets.
//   block   8 or 16 consumer warps, one a KV head, and one warp that copies. With fewer KV heads the warps are groups,
//           each with every head, which take the slices in turn.
//   stage   one slice of all heads: codes and scales of K and V, as they lie in the page, by bulk copies of whole runs
//           (attention/page_slices.h). As many stages as fit, so that 170 KiB and more are on their way at any time.
//   slice   K is the first operand of m16n8k16, keys on its rows, straight from the raw words (format/operand.cuh): S^T
//           = K Q^T. Query rows stand on the columns. Then O^T = V^T P^T, dimensions on the rows.
//
//   The running maximum moves only when some weight would pass 2^12: most slices need no shuffle. Weights are relative
//   to it and, where values have scales, to `unit`, a power of two no scale has exceeded by much.
//
// Partial results go to memory in the order of the fragments; merge_pages combines them. Budget and measurements:
// docs/kernels/decode.md.
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
