// A guest of the format contract, in tests alone: symmetric 6 bits with one fp32 scale a row, around an optional vector
// of the KV head.
//
//     scale = max(absmax(x - c) * r(31), 1e-6)      code = clamp(round((x - c) / scale), -32, 31)
//     value = code * scale + c                      c = head_vector[i], or 0
//
//     3 bytes hold 4 codes, code i (of 6 bits, two's complement) at bit 6 i.
//
// What it asks of the contract: units of 3 bytes, a centre that all rows of a KV head share and, on CUDA, a table in
// shared memory to look its levels up in.
#pragma once

#include "format/format.h"

namespace quire::format {

struct GuestInt6 : ScaleCacheDefaults {
  static constexpr std::string_view kName = "guest_int6";
  static constexpr int kUnit = 4;
  static constexpr int kUnitBytes = 3;
  static constexpr StatsOf kStatsOf = StatsOf::kRotated;
  static constexpr Centre kCentre = Centre::kHead;
  static constexpr double kMaxNmse = 3e-3;

  using Stats = AbsMax;
  static QUIRE_HD Stats stat(float y) { return AbsMax::of(y); }
  static QUIRE_HD Stats merge(Stats a, Stats b) { return AbsMax::merge(a, b); }

  static QUIRE_HD Encoder finish(Stats stats, RowShape, const SideInputs&) {
    if (!stats.finite()) return Encoder::poisoned();
    const float scale = exact::max(stats.value * (1.0F / 31.0F), 1e-6F);
    return {scale, exact::reciprocal(scale), 0.0F};
  }
  static QUIRE_HD void pack(const Encoder& encoder, const float* y, std::uint8_t* bytes) {
    std::uint32_t word = 0;
    for (int i = 0; i < kUnit; ++i) {
      const float step = y[i] * encoder.inverse;
      const float code = exact::round_half_even(exact::clamp(step == step ? step : 0.0F, -32.0F, 31.0F));
      word |= (static_cast<std::uint32_t>(static_cast<std::int32_t>(code)) & 63U) << (6 * i);
    }
    for (int i = 0; i < kUnitBytes; ++i) bytes[i] = static_cast<std::uint8_t>(word >> (8 * i));
  }
  static QUIRE_HD void unpack(const std::uint8_t* bytes, float* level) {
    const std::uint32_t word =
        bytes[0] | static_cast<std::uint32_t>(bytes[1]) << 8 | static_cast<std::uint32_t>(bytes[2]) << 16;
    for (int i = 0; i < kUnit; ++i) {
      const auto code = static_cast<std::int32_t>(word >> (6 * i) & 63U);
      level[i] = static_cast<float>(code >= 32 ? code - 64 : code);
    }
  }
  static QUIRE_HD float centre(const SideInputs& side, RowShape, int i) { return side.head_vector[i]; }
};

}  // namespace quire::format

#ifdef __CUDACC__
#include "cuda/format/fragment.cuh"

namespace quire::cuda {

template <>
struct Fragment<format::GuestInt6> {
  static constexpr int kElements = 32;
  static constexpr int kWords = 6;
  struct Tables {
    std::uint16_t level[64];  // of each code, fp16
  };
  static __device__ __forceinline__ void fill(Tables& tables, int thread, int num_threads) {
    for (int code = thread; code < 64; code += num_threads) {
      tables.level[code] = __half_as_ushort(__int2half_rn(code >= 32 ? code - 64 : code));
    }
  }
  static __device__ __forceinline__ void convert(const std::uint32_t (&words)[kWords], std::uint32_t,
                                                 const Tables& tables, std::uint32_t (&pairs)[16]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {  // the 12 bits of a pair
      const int first = 12 * i;
      const int next = first / 32 + 1 < kWords ? first / 32 + 1 : kWords - 1;
      const std::uint32_t bits = __funnelshift_r(words[first / 32], words[next], first % 32);
      pairs[i] = tables.level[bits & 63U] | static_cast<std::uint32_t>(tables.level[bits >> 6 & 63U]) << 16;
    }
  }
};

}  // namespace quire::cuda
#endif
