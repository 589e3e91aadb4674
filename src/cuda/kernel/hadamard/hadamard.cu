// hadamard on CUDA: each warp takes a row through the rotations that the store and the queries use (lane/rotate.cuh).
#include <cstdint>
#include <limits>
#include <string>

#include "attention/row_list.h"
#include "cuda/attention_params.h"
#include "cuda/cuda.h"
#include "cuda/lane/bytes.cuh"
#include "cuda/lane/rotate.cuh"
#include "cuda/launch.h"
#include "format/float_types.h"

namespace quire::cuda {
namespace {

struct HadamardParams {
  const std::uint8_t* x = nullptr;
  std::uint8_t* out = nullptr;
  attention::RowList from, to;
  std::int64_t num_rows = 0;
  int head_size = 0, block = 1;
  format::Rotation rotation = format::Rotation::kHadamard;
  bool inverse = false;
};

__global__ void __launch_bounds__(kAttentionThreads) rotate_rows(const __grid_constant__ HadamardParams p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= p.num_rows) return;
  float y[WideMap::kElements];
  const std::uint8_t* x = p.x + p.from.offset(row);
#pragma unroll
  for (int j = 0; j < WideMap::kElements; ++j) {
    const int i = WideMap::element(lane, j);
    y[j] = i < p.head_size ? load_float(x + i * p.from.element_stride, p.from.dtype) : 0.0F;
  }
  if (p.inverse) {
    rotate_back<WideMap>(p.rotation, y, lane, p.block);
  } else {
    rotate<WideMap>(p.rotation, y, lane, p.block);
  }
  std::uint8_t* out = p.out + p.to.offset(row);
#pragma unroll
  for (int j = 0; j < WideMap::kElements; ++j) {
    const int i = WideMap::element(lane, j);
    if (i >= p.head_size) continue;
    std::uint8_t* to = out + i * p.to.element_stride;
    if (p.to.dtype == DType::kFloat32) {
      *reinterpret_cast<float*>(to) = y[j];
    } else {
      *reinterpret_cast<std::uint16_t*>(to) =
          p.to.dtype == DType::kFloat16 ? format::float_to_half(y[j]) : format::float_to_bfloat16(y[j]);
    }
  }
}

}  // namespace

Status hadamard(const HadamardArgs& args, void* stream) {
  const DeviceGuard guard(args.x.device.index);
  if (!guard.status()) return guard.status();
  const std::int64_t elements = args.x.numel();
  if (elements == 0) return {};
  HadamardParams params;
  params.x = args.x.ptr<const std::uint8_t>();
  params.out = args.out.ptr<std::uint8_t>();
  params.from = attention::row_list(args.x);
  params.to = attention::row_list(args.out);
  params.head_size = static_cast<int>(args.x.shape[args.x.ndim - 1]);
  params.block = format::rotation_block(params.head_size);
  params.num_rows = elements / params.head_size;
  params.rotation = args.signs ? format::Rotation::kSignedHadamard : format::Rotation::kHadamard;
  params.inverse = args.inverse;
  constexpr std::int64_t kMaxRows = std::int64_t{std::numeric_limits<std::int32_t>::max()} * kWarps;
  if (params.num_rows > kMaxRows) {
    return unsupported("x is " + to_string(args.x) + "; one CUDA call rotates at most " + std::to_string(kMaxRows) +
                       " rows");
  }
  const auto blocks = static_cast<unsigned>((params.num_rows + kWarps - 1) / kWarps);
  return cuda_status(
      launch_kernel(&rotate_rows, dim3(blocks), kAttentionThreads, 0, params, static_cast<cudaStream_t>(stream)),
      "hadamard");
}

}  // namespace quire::cuda
