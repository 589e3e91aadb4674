// reshape_and_cache element by element: each thread stores one, K and V are the two halves of the grid, and formats are
// looked up at run time. It is compiled without contraction, so that the bytes are the CPU's.
#include <algorithm>
#include <cstdint>

#include "cuda/format/dispatch.cuh"
#include "cuda/lane/bytes.cuh"
#include "cuda/launch.h"
#include "cuda/store_kernels.h"
#include "cuda/work/slots.cuh"

namespace quire::cuda {
namespace {

constexpr int kThreads = 128;

// Formats whose elements do not depend on each other.
template <format::Format F>
constexpr bool kElementwise =
    F::kStatsOf == format::StatsOf::kNothing&& F::kRotation == format::Rotation::kNone&& F::kUnit == 1 &&
    !F::kHistory && !F::kWholeRow && F::kCentre == format::Centre::kNone;

__device__ __forceinline__ void store_element(const StoreParams& p, const StoreSide& side, std::int64_t index,
                                              bool counts_errors) {
  const int i = static_cast<int>(index % side.head_size);
  const std::int64_t row = index / side.head_size;
  const std::int64_t token = row / p.num_heads.divisor;
  const int head = static_cast<int>(row - token * p.num_heads.divisor);
  if (token >= p.num_tokens) return;
  const SlotAddress slot = find_slot(p, load_slot(p, token), p.slots_fit_31_bits, counts_errors && head == 0 && i == 0);
  if (!slot.stored) return;
  const std::uint8_t* input =
      side.input + token * side.input_token_stride + head * side.input_head_stride + i * side.input_element_stride;
  std::uint8_t* to = side.row(slot.block, slot.offset, head) + (i / side.group) * side.group_stride +
                     (i % side.group) * side.element_stride;
  if (side.copy_codes) {
    *to = *input;
    return;
  }
  format::SideInputs inputs;
  if (side.tensor_scale != nullptr) inputs.tensor_scale = side.tensor_scale[head * side.tensor_scale_stride];
  const float y = load_float(input, side.input_dtype);
  with_format(side.format, [&]<class F>() {
    if constexpr (kElementwise<F>) {
      alignas(16) std::uint8_t code[F::kUnitBytes];
      F::pack(F::finish({}, format::row_shape(side.head_size), inputs), &y, code);
      store_bytes(code, to, F::kUnitBytes, F::kUnitBytes);
    }
  });
}

__global__ void __launch_bounds__(kThreads) store_elements(const __grid_constant__ StoreParams p) {
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool is_key = blockIdx.y == 0;
  store_element(p, is_key ? p.key : p.value, index, is_key);
}

}  // namespace

cudaError_t launch_store_elements(const StoreParams& params, cudaStream_t stream) {
  const std::int64_t elements =
      params.num_tokens * params.num_heads.divisor * std::max(params.key.head_size, params.value.head_size);
  const dim3 grid(static_cast<unsigned>((elements + kThreads - 1) / kThreads), 2);
  return launch_kernel(&store_elements, grid, kThreads, 0, params, stream);
}

}  // namespace quire::cuda
