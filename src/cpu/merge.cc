// merge_attn_states on the CPU.
#include <cmath>
#include <cstdint>

#include "attention/softmax.h"
#include "cpu/cpu.h"
#include "cpu/load.h"
#include "cpu/threads.h"
#include "format/rotation.h"

namespace quire::cpu {

void merge_attn_states(const MergeAttnStatesArgs& args) {
  const std::int64_t tokens = args.prefix_out.shape[0];
  const std::int64_t heads = args.prefix_out.shape[1];
  const std::int64_t size = args.prefix_out.shape[2];
  const auto lse_at = [](const ConstTensor& t, std::int64_t token, std::int64_t head) {
    return t.ptr<const float>()[token * t.strides[0] + head * t.strides[1]];
  };
  const auto offset = [](const ConstTensor& t, std::int64_t token, std::int64_t head, std::int64_t i) {
    return (token * t.strides[0] + head * t.strides[1] + i) * static_cast<std::int64_t>(dtype_bytes(t.dtype));
  };
  const auto merge_token = [&](std::int64_t token) {
    for (std::int64_t head = 0; head < heads; ++head) {
      const float a = lse_at(args.prefix_lse, token, head);
      const float b = lse_at(args.suffix_lse, token, head);
      const float max = exact::max(a, b);
      const bool empty = a == -INFINITY && b == -INFINITY;  // a NaN is not: it must show, next to an empty part too
      const float weight_a = empty ? 0.0F : std::exp(a - max);
      const float weight_b = empty ? 0.0F : std::exp(b - max);
      const float sum = weight_a + weight_b;
      const float factor = sum == 0.0F ? 0.0F : 1.0F / sum;
      constexpr int kChunk = format::kMaxHeadSize;
      for (std::int64_t first = 0; first < size; first += kChunk) {
        const int count = static_cast<int>(size - first < kChunk ? size - first : kChunk);
        const auto at = [&](const ConstTensor& t) {
          return t.ptr<const std::uint8_t>() + offset(t, token, head, first);
        };
        float x[kChunk];
        float y[kChunk];
        load_floats(at(args.prefix_out), args.prefix_out.dtype, count, x);
        load_floats(at(args.suffix_out), args.suffix_out.dtype, count, y);
        // A part without weight is left out rather than multiplied by 0: it may be unwritten memory.
        for (int i = 0; i < count; ++i) {
          x[i] = ((weight_a == 0.0F ? 0.0F : x[i] * weight_a) + (weight_b == 0.0F ? 0.0F : y[i] * weight_b)) * factor;
        }
        store_floats(x, count, args.out.dtype, args.out.ptr<std::uint8_t>() + offset(args.out, token, head, first));
      }
      if (args.lse.defined()) {
        args.lse.ptr<float>()[token * args.lse.strides[0] + head * args.lse.strides[1]] =
            sum == 0.0F ? -INFINITY : max + std::log(sum);
      }
    }
  };
  constexpr std::int64_t kTokensOfATask = 16;
  run_items(tokens, kTokensOfATask, merge_token);
}

}  // namespace quire::cpu
