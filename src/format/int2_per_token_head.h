// 2 bits, the Lloyd-Max quantizer of a unit Gaussian, after a Hadamard transform; one fp32 per row:
//
//     y = H x       n = sqrt(sum y^2 + 1e-12)       z = y * (sqrt(d) / n)
//     code  = how many of the thresholds -0.9816, 0, 0.9816 are <= z
//     value = level(code) * scale,   level = -1.5104, -0.4528, 0.4528, 1.5104,   scale = n / (b * sqrt(d))
//
// d is the head size, b the rotation's block (b = d for powers of two, where scale = n / d^1.5). The division by b is
// part of the scale, so unrotate is 1.
//
//     byte i:   7 6 | 5 4 | 3 2 | 1 0
//               4i+3  4i+2  4i+1  4i
#pragma once

#include "format/format.h"

namespace quire::format {

struct Int2PerTokenHead : ScaleCacheDefaults {
  static constexpr std::string_view kName = "int2_per_token_head";
  static constexpr int kUnit = 4;
  static constexpr Rotation kRotation = Rotation::kHadamard;
  static constexpr StatsOf kStatsOf = StatsOf::kRotated;
  static constexpr double kMaxNmse = 0.16;
  static constexpr float kThreshold = 0.9816F;
  static constexpr float kOuter = 1.5104F;
  static constexpr float kInner = 0.4528F;

  using Stats = SquareSum;
  static QUIRE_HD Stats stat(float y) { return SquareSum::of(y); }
  static QUIRE_HD Stats merge(Stats a, Stats b) { return SquareSum::merge(a, b); }

  static QUIRE_HD Encoder finish(Stats stats, RowShape shape, const SideInputs&) {
    const float norm = exact::sqrt(stats.value + 1e-12F);
    if (!exact::is_finite(norm)) return Encoder::poisoned();
    const float root = exact::sqrt(static_cast<float>(shape.head_size));
    const float scale = exact::divide(norm, static_cast<float>(shape.block) * root);
    return {scale, exact::divide(root, norm), 0.0F};
  }
  static QUIRE_HD std::uint32_t code(const Encoder& encoder, float y) {
    const float z = y * encoder.inverse;
    return (z >= -kThreshold ? 1U : 0U) + (z >= 0.0F ? 1U : 0U) + (z >= kThreshold ? 1U : 0U);
  }
  static QUIRE_HD void pack(const Encoder& encoder, const float* y, std::uint8_t* bytes) {
    const std::uint32_t low = exact::join<2>(code(encoder, y[0]), code(encoder, y[1]));
    const std::uint32_t high = exact::join<2>(code(encoder, y[2]), code(encoder, y[3]));
    *bytes = static_cast<std::uint8_t>(exact::join<4>(low, high));
  }
  static QUIRE_HD float level(std::uint32_t code) {
    const float magnitude = code == 0 || code == 3 ? kOuter : kInner;
    return code >= 2 ? magnitude : -magnitude;
  }
  static QUIRE_HD void unpack(const std::uint8_t* bytes, float* levels) {
    const std::uint32_t byte = *bytes;
    levels[0] = level(byte & 3U);
    levels[1] = level((byte >> 2) & 3U);
    levels[2] = level((byte >> 4) & 3U);
    levels[3] = level(byte >> 6);
  }
};

}  // namespace quire::format
