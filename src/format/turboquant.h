// The TurboQuant formats. K and V of a token head share one slot, each row followed by its own fp16 metadata:
//
//     | key codes | |x| fp16 |  value codes | scale fp16 | min fp16 | (0 or 1 byte to an even slot)
//     | key fp8 codes        |  value codes | scale fp16 | min fp16 |                              (k8)
//
// Keys, MSE, b = 3 or 4 bits:
//     y    = H (x * inv) / sqrt(block),   inv = 1 / (|x| + 1e-8)           a unit vector
//     code = how many midpoints of neighbouring centroids are <= y         centroids: Lloyd-Max of N(0, 1 / head_size)
//     K    = |x| * c / |c|    in the rotated domain                        the norm correction, by the reader
//   The codebook is kept for unit variance: the comparison uses y * sqrt(head_size), and |c| cancels the factor.
// Keys, fp8: e4m3fn (or e4b15, whose bytes are Triton's) of x as it stands, saturating, not rotated.
// Values, b = 3 or 4 bits:
//     scale = max((max - min) * r(2^b - 1), 1e-8)      code = clamp(int((v - min) * inv + 0.5), 0, 2^b - 1)
//     value = code * fp16(scale) + fp16(min)
//
// Packing: 4 bits, low nibble first; 3 bits, 8 codes in 24 bits little-endian, code i at bit 3 i.
//     byte 0: c2[1:0] c1[2:0] c0[2:0]     byte 1: c5[0] c4[2:0] c3[2:0] c2[2]     byte 2: c7[2:0] c6[2:0] c5[2:1]
// fp16 metadata saturates at 65504.
#pragma once

#include "format/codebook.h"
#include "format/float_types.h"
#include "format/format.h"

namespace quire::format {

namespace turboquant {

// Codes of kBits, packed kUnit at a time.
template <int kBits>
struct Packing;

template <>
struct Packing<4> {
  static constexpr int kUnit = 2;
  static constexpr int kUnitBytes = 1;
  static QUIRE_HD void pack(const std::uint32_t* codes, std::uint8_t* bytes) {
    bytes[0] = static_cast<std::uint8_t>(exact::join<4>(codes[0], codes[1]));
  }
  static QUIRE_HD void unpack(const std::uint8_t* bytes, std::uint32_t* codes) {
    codes[0] = bytes[0] & 15U;
    codes[1] = static_cast<std::uint32_t>(bytes[0]) >> 4;
  }
};

template <>
struct Packing<3> {
  static constexpr int kUnit = 8;
  static constexpr int kUnitBytes = 3;
  static QUIRE_HD void pack(const std::uint32_t* codes, std::uint8_t* bytes) {
    std::uint32_t word = 0;
    for (int i = 7; i >= 0; --i) word = exact::join<3>(codes[i], word);
    for (int i = 0; i < 3; ++i) bytes[i] = static_cast<std::uint8_t>(word >> (8 * i));
  }
  static QUIRE_HD void unpack(const std::uint8_t* bytes, std::uint32_t* codes) {
    const std::uint32_t word =
        bytes[0] | (static_cast<std::uint32_t>(bytes[1]) << 8) | (static_cast<std::uint32_t>(bytes[2]) << 16);
    for (int i = 0; i < 8; ++i) codes[i] = (word >> (3 * i)) & 7U;
  }
};

QUIRE_HD std::uint16_t saturated_half(float x) {
  const float limited = x > 65504.0F ? 65504.0F : (x < -65504.0F ? -65504.0F : x);
  return x == x ? float_to_half(limited) : std::uint16_t{0x7e00};  // one NaN on every device
}

}  // namespace turboquant

// ---- keys -----------------------------------------------------------------------------------------------------------

template <int kBits>
struct TurboQuantKey : FormatDefaults {
  using Pack = turboquant::Packing<kBits>;
  static constexpr int kUnit = Pack::kUnit;
  static constexpr int kUnitBytes = Pack::kUnitBytes;
  static constexpr MetaPlace kMetaPlace = MetaPlace::kInRow;
  static constexpr int kMetaBytes = 2;
  static constexpr Rotation kRotation = Rotation::kHadamard;
  static constexpr StatsOf kStatsOf = StatsOf::kInput;
  static constexpr bool kLevelNorm = true;
  static constexpr bool kLogitsMayBeInfinite = false;

  using Stats = SquareSum;
  struct Encoder {
    float norm;
    float inverse;  // NaN for a poisoned row
    float unit;     // from H x to unit variance: sqrt(head_size / block)
  };
  static QUIRE_HD Stats stat(float x) { return SquareSum::of(x); }
  static QUIRE_HD Stats merge(Stats a, Stats b) { return SquareSum::merge(a, b); }
  static QUIRE_HD Encoder finish(Stats stats, RowShape shape, const SideInputs&) {
    const float norm = exact::sqrt(stats.value);
    if (!exact::is_finite(norm)) return {exact::quiet_nan(), exact::quiet_nan(), 1.0F};
    // A power of two is one block: 1, known when the size is.
    const float unit =
        shape.head_size == shape.block ? 1.0F : exact::sqrt(static_cast<float>(shape.head_size / shape.block));
    return {norm, exact::reciprocal(norm + 1e-8F), unit};
  }
  static QUIRE_HD float normalize(const Encoder& encoder, float x) { return x * encoder.inverse; }
  static QUIRE_HD void pack(const Encoder& encoder, const float* y, std::uint8_t* bytes) {
    std::uint32_t codes[kUnit];
    for (int i = 0; i < kUnit; ++i) codes[i] = nearest_centroid<kBits>(y[i] * encoder.unit);
    Pack::pack(codes, bytes);
  }
  static QUIRE_HD void write_meta(const Encoder& encoder, std::uint8_t* meta) {
    store_as(meta, turboquant::saturated_half(encoder.norm));
  }
  static QUIRE_HD void unpack(const std::uint8_t* bytes, float* level) {
    std::uint32_t codes[kUnit];
    Pack::unpack(bytes, codes);
    for (int i = 0; i < kUnit; ++i) level[i] = centroid<kBits>(static_cast<int>(codes[i]));
  }
  static QUIRE_HD Affine read_meta(const std::uint8_t* meta, RowShape) {
    return {half_to_float_any_nan(load_as<std::uint16_t>(meta)), 0.0F};
  }
  static QUIRE_HD float unrotate(RowShape shape) {
    return exact::reciprocal(exact::sqrt(static_cast<float>(shape.block)));
  }
};

struct TurboQuantK4 : TurboQuantKey<4> {
  static constexpr std::string_view kName = "turboquant_k4";
  static constexpr double kMaxNmse = 1.4e-2;
};
struct TurboQuantK3 : TurboQuantKey<3> {
  static constexpr std::string_view kName = "turboquant_k3";
  static constexpr double kMaxNmse = 4.5e-2;
};

template <class Fp8>
struct TurboQuantKeyFp8 : FormatDefaults {
  struct Encoder {};
  static constexpr double kMaxNmse = 1.5e-3;
  static constexpr bool kLogitsMayBeInfinite = false;
  static QUIRE_HD Encoder finish(NoStats, RowShape, const SideInputs&) { return {}; }
  static QUIRE_HD void pack(Encoder, const float* y, std::uint8_t* bytes) { *bytes = Fp8::encode(*y); }
  static QUIRE_HD void unpack(const std::uint8_t* bytes, float* level) { *level = Fp8::decode(*bytes); }
};

struct TurboQuantK8 : TurboQuantKeyFp8<E4M3> {
  static constexpr std::string_view kName = "turboquant_k8";
};
// For caches written on GPUs older than sm_89, where Triton's fp8 is e4b15.
struct TurboQuantK8E4B15 : TurboQuantKeyFp8<E4B15> {
  static constexpr std::string_view kName = "turboquant_k8_e4b15";
  // Values beyond 1.75 clamp, so Gaussian rows lose their tails: 2.35e-2 of their energy.
  static constexpr double kMaxNmse = 3e-2;
};

// ---- values ---------------------------------------------------------------------------------------------------------

template <int kBits>
struct TurboQuantValue : FormatDefaults {
  using Pack = turboquant::Packing<kBits>;
  static constexpr int kUnit = Pack::kUnit;
  static constexpr int kUnitBytes = Pack::kUnitBytes;
  static constexpr MetaPlace kMetaPlace = MetaPlace::kInRow;
  static constexpr int kMetaBytes = 4;
  static constexpr bool kHasOffset = true;
  static constexpr bool kLogitsMayBeInfinite = false;
  static constexpr StatsOf kStatsOf = StatsOf::kRotated;
  static constexpr float kMaxCode = static_cast<float>((1 << kBits) - 1);
  // Levels are codes - kCenter: attention adds up levels and offsets separately, and centred levels leave little to
  // cancel.
  static constexpr std::int32_t kCenter = 1 << (kBits - 1);

  using Stats = Range;
  struct Encoder {
    float scale;
    float low;
    float inverse;  // NaN for a poisoned row
  };
  static QUIRE_HD Stats stat(float y) { return Range::of(y); }
  static QUIRE_HD Stats merge(Stats a, Stats b) { return Range::merge(a, b); }
  static QUIRE_HD Encoder finish(Stats stats, RowShape, const SideInputs&) {
    if (!stats.finite()) return {exact::quiet_nan(), exact::quiet_nan(), exact::quiet_nan()};
    const float scale = exact::max((stats.high - stats.low) * (1.0F / kMaxCode), 1e-8F);
    return {scale, stats.low + 0.0F, exact::reciprocal(scale)};  // + 0: a minimum of -0 is stored as 0
  }
  static QUIRE_HD void pack(const Encoder& encoder, const float* y, std::uint8_t* bytes) {
    std::uint32_t codes[kUnit];
    for (int i = 0; i < kUnit; ++i) {
      const float steps = (y[i] - encoder.low) * encoder.inverse;
      codes[i] = exact::truncate_nonnegative(exact::clamp(steps + 0.5F, 0.0F, kMaxCode));
    }
    Pack::pack(codes, bytes);
  }
  static QUIRE_HD void write_meta(const Encoder& encoder, std::uint8_t* meta) {
    store_as(meta, turboquant::saturated_half(encoder.scale));
    store_as(meta + 2, turboquant::saturated_half(encoder.low));
  }
  static QUIRE_HD void unpack(const std::uint8_t* bytes, float* level) {
    std::uint32_t codes[kUnit];
    Pack::unpack(bytes, codes);
    for (int i = 0; i < kUnit; ++i) level[i] = static_cast<float>(static_cast<std::int32_t>(codes[i]) - kCenter);
  }
  static QUIRE_HD Affine read_meta(const std::uint8_t* meta, RowShape) {
    const float scale = half_to_float_any_nan(load_as<std::uint16_t>(meta));
    const float low = half_to_float_any_nan(load_as<std::uint16_t>(meta + 2));
    return {scale, low + static_cast<float>(kCenter) * scale};
  }
};

struct TurboQuantV4 : TurboQuantValue<4> {
  static constexpr std::string_view kName = "turboquant_v4";
  static constexpr double kMaxNmse = 2e-2;
};
struct TurboQuantV3 : TurboQuantValue<3> {
  static constexpr std::string_view kName = "turboquant_v3";
  static constexpr double kMaxNmse = 9e-2;
};

}  // namespace quire::format
