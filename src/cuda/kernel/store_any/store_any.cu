// reshape_and_cache for the pairs of formats that no mode names, which are looked up at run time. Each warp stores a
// row; K and V rows are the two halves of the grid. It is compiled without contraction, so that the bytes are the
// CPU's.
#include <cstdint>

#include "cuda/format/dispatch.cuh"
#include "cuda/launch.h"
#include "cuda/stage/store.cuh"
#include "cuda/store_kernels.h"

namespace quire::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarpsOfBlock = kThreads / 32;

template <format::Format F>
__device__ __noinline__ void store_row_of(const StoreSide& side, std::uint32_t token, std::uint32_t head,
                                          const SlotAddress& slot, int lane) {
  const LaneInput<WideMap> input = load_input<WideMap>(side, token, head, lane);
  float y[WideMap::kElements];
  input.template widen<F>(side.input_dtype, lane, side.head_size, y);
  store_row<F, WideMap>(side, y, slot, head, lane, row_address<WideMap>(side, slot, head), side.access);
}

__global__ void __launch_bounds__(kThreads) store_any(const __grid_constant__ StoreParams p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::uint32_t row = blockIdx.x * kWarpsOfBlock + threadIdx.x / 32;
  const std::uint32_t token = p.num_heads.quotient(row);
  const std::uint32_t head = row - token * p.num_heads.divisor;
  if (token >= p.num_tokens) return;
  const bool is_key = blockIdx.y == 0;
  const StoreSide& side = is_key ? p.key : p.value;
  const SlotAddress slot = find_slot(p, load_slot(p, token), p.slots_fit_31_bits, is_key && head == 0 && lane == 0);
  with_format(side.format, [&]<class F>() { store_row_of<F>(side, token, head, slot, lane); });
}

}  // namespace

cudaError_t launch_store_any(const StoreParams& params, cudaStream_t stream) {
  const std::int64_t num_rows = params.num_tokens * params.num_heads.divisor;
  const dim3 grid(static_cast<unsigned>((num_rows + kWarpsOfBlock - 1) / kWarpsOfBlock), 2);
  return launch_kernel(&store_any, grid, kThreads, 0, params, stream);
}

}  // namespace quire::cuda
