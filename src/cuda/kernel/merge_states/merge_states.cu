// merge_attn_states: merges two partial results over disjoint keys into one.
#include <cstdint>
#include <limits>
#include <string>

#include "cuda/attention_params.h"
#include "cuda/cuda.h"
#include "cuda/lane/bytes.cuh"
#include "cuda/launch.h"
#include "format/float_types.h"

namespace quire::cuda {
namespace {

// A part of merge_attn_states. Strides in bytes for out, in elements for lse.
struct MergePart {
  std::uint8_t* out = nullptr;  // [num_tokens, num_heads, head_size_v]
  std::int64_t token_stride = 0, head_stride = 0, element_stride = 0;
  DType dtype = DType::kFloat32;
  float* lse = nullptr;  // [num_tokens, num_heads]
  std::int64_t lse_token_stride = 0, lse_head_stride = 0;
};
struct MergeParams {
  MergePart prefix, suffix, merged;
  std::int64_t num_rows = 0;
  int num_heads = 0, head_size_v = 0;
};

// One warp per row: it has read both LSEs before it writes one, so the result may alias a part.
__global__ void __launch_bounds__(kAttentionThreads) merge_states(const __grid_constant__ MergeParams p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (index >= p.num_rows) return;
  const std::int64_t token = index / p.num_heads;
  const std::int64_t head = index - token * p.num_heads;
  const auto lse_at = [&](const MergePart& part) {
    return part.lse + token * part.lse_token_stride + head * part.lse_head_stride;
  };
  const auto out_at = [&](const MergePart& part, int i) {
    return part.out + token * part.token_stride + head * part.head_stride + i * part.element_stride;
  };
  const float a = *lse_at(p.prefix);
  const float b = *lse_at(p.suffix);
  __syncwarp();
  const float max = fmaxf(a, b);
  const float weight_a = a == -INFINITY ? 0.0F : expf(a - max);
  const float weight_b = b == -INFINITY ? 0.0F : expf(b - max);
  const float sum = weight_a + weight_b;
  const float inverse = sum == 0.0F ? 0.0F : 1.0F / sum;
  for (int i = lane; i < p.head_size_v; i += 32) {
    float x = 0.0F;
    if (a != -INFINITY) x = weight_a * inverse * load_float(out_at(p.prefix, i), p.prefix.dtype);
    if (b != -INFINITY) x += weight_b * inverse * load_float(out_at(p.suffix, i), p.suffix.dtype);
    std::uint8_t* to = out_at(p.merged, i);
    if (p.merged.dtype == DType::kFloat32) {
      *reinterpret_cast<float*>(to) = x;
    } else {
      *reinterpret_cast<std::uint16_t*>(to) =
          p.merged.dtype == DType::kFloat16 ? format::float_to_half(x) : format::float_to_bfloat16(x);
    }
  }
  if (lane == 0 && p.merged.lse != nullptr) *lse_at(p.merged) = sum == 0.0F ? -INFINITY : max + logf(sum);
}

// The part of a tensor that is read, or the result. What is read is not written through these pointers.
MergePart make_part(const ConstTensor& out, const ConstTensor& lse) {
  const auto bytes = static_cast<std::int64_t>(dtype_bytes(out.dtype));
  MergePart part;
  part.out = const_cast<std::uint8_t*>(out.ptr<const std::uint8_t>());
  part.token_stride = out.strides[0] * bytes;
  part.head_stride = out.strides[1] * bytes;
  part.element_stride = out.strides[2] * bytes;
  part.dtype = out.dtype;
  if (lse.defined()) {
    part.lse = const_cast<float*>(lse.ptr<const float>());
    part.lse_token_stride = lse.strides[0];
    part.lse_head_stride = lse.strides[1];
  }
  return part;
}

}  // namespace

Status merge_attn_states(const MergeAttnStatesArgs& args, void* stream) {
  const DeviceGuard guard(args.prefix_out.device.index);
  if (!guard.status()) return guard.status();
  MergeParams params;
  params.prefix = make_part(args.prefix_out, args.prefix_lse);
  params.suffix = make_part(args.suffix_out, args.suffix_lse);
  params.merged = make_part(args.out, args.lse);
  params.num_heads = static_cast<int>(args.out.shape[1]);
  params.num_rows = args.out.shape[0] * args.out.shape[1];
  params.head_size_v = static_cast<int>(args.out.shape[2]);
  if (params.num_rows == 0) return {};
  constexpr std::int64_t kMaxRows = std::int64_t{std::numeric_limits<std::int32_t>::max()} * kWarps;
  if (params.num_rows > kMaxRows) {
    return unsupported("prefix_out is " + to_string(args.prefix_out) + "; one CUDA call merges at most " +
                       std::to_string(kMaxRows) + " rows");
  }
  const auto blocks = static_cast<unsigned>((params.num_rows + kWarps - 1) / kWarps);
  return cuda_status(
      launch_kernel(&merge_states, dim3(blocks), kAttentionThreads, 0, params, static_cast<cudaStream_t>(stream)),
      "merge_attn_states");
}

}  // namespace quire::cuda
