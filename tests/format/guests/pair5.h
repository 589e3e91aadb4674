// A guest of the format contract, in tests alone: 5 bits for each pair of elements, whose codes walk along the row,
// around an optional centre of the page.
//
//     row      | head_size / 2 symbols of 5 bits, one little-endian bit stream | scale, bfloat16 |
//     page     | step in 1/256, 1 byte | head_size codes, int8 |         c[i] = step * code[i], in the rotated domain
//
//     index    the 8 stream bits that end with symbol t: its 5 bits above 3 of the symbol before (0 before the row)
//     level    (2 a - 7 + (h & 1), 4 b - 6 + (h >> 1))    a, b: low 3, high 2 bits of the symbol; h: the 3 bits before
//     value    scale * level + c                           after a signed Hadamard rotation
//
// The encoder takes symbol after symbol the level nearest to the pair, given the symbol before.
//
// What it asks of the contract: a unit (16 elements, 5 bytes) that sees the byte before it, 64 elements until codes
// fill whole words, an encoder of the whole row, metadata of the page.
#pragma once

#include "format/float_types.h"
#include "format/format.h"

namespace quire::format {

struct GuestPair5 : FormatDefaults {
  static constexpr std::string_view kName = "guest_pair5";
  static constexpr int kUnit = 16;
  static constexpr int kUnitBytes = 5;
  static constexpr MetaPlace kMetaPlace = MetaPlace::kInRow;
  static constexpr int kMetaBytes = 2;
  static constexpr Rotation kRotation = Rotation::kSignedHadamard;
  static constexpr StatsOf kStatsOf = StatsOf::kRotated;
  static constexpr bool kHistory = true;
  static constexpr bool kWholeRow = true;
  static constexpr Centre kCentre = Centre::kPage;
  static constexpr double kMaxNmse = 0.25;

  using Stats = AbsMax;
  struct Encoder {
    std::uint16_t scale;  // bfloat16
    float inverse;        // NaN for a poisoned row
  };
  static QUIRE_HD Stats stat(float y) { return AbsMax::of(y); }
  static QUIRE_HD Stats merge(Stats a, Stats b) { return AbsMax::merge(a, b); }

  static QUIRE_HD Encoder finish(Stats stats, RowShape, const SideInputs&) {
    if (!stats.finite()) return {0x7fc0, exact::quiet_nan()};
    const std::uint16_t scale = float_to_bfloat16(exact::max(stats.value * (1.0F / 7.0F), 0x1p-22F));
    return {scale, exact::reciprocal(bfloat16_to_float(scale))};
  }
  // The nearest of low, low + step and on to low + count - 1 steps, as its number; 0 for a NaN.
  static QUIRE_HD std::uint32_t nearest(float x, float low, float step, float count) {
    return static_cast<std::uint32_t>(exact::round_half_even(exact::clamp((x - low) / step, 0.0F, count - 1.0F)));
  }
  static QUIRE_HD void encode_row(const Encoder& encoder, const float* y, RowShape shape, std::uint8_t* bytes) {
    std::uint32_t stream = 0;  // bits not yet written
    int held = 0;
    std::uint32_t before = 0;  // the top 3 bits of the last symbol
    for (int t = 0; t < shape.head_size / 2; ++t) {
      const std::uint32_t a = nearest(y[2 * t] * encoder.inverse, -7.0F + static_cast<float>(before & 1U), 2.0F, 8.0F);
      const std::uint32_t b =
          nearest(y[2 * t + 1] * encoder.inverse, -6.0F + static_cast<float>(before >> 1), 4.0F, 4.0F);
      const std::uint32_t symbol = a | b << 3;
      before = symbol >> 2;
      stream |= symbol << held;
      held += 5;
      for (; held >= 8; held -= 8, stream >>= 8) *bytes++ = static_cast<std::uint8_t>(stream);
    }
  }
  static QUIRE_HD void write_meta(const Encoder& encoder, std::uint8_t* meta) { store_as(meta, encoder.scale); }

  // bytes[-1] holds the symbol before the unit in its top 5 bits.
  static QUIRE_HD void unpack(const std::uint8_t* bytes, float* level) {
    std::uint64_t window = static_cast<std::uint64_t>(*(bytes - 1)) >> 5;
    for (int i = 0; i < kUnitBytes; ++i) window |= static_cast<std::uint64_t>(bytes[i]) << (3 + 8 * i);
    for (int t = 0; t < kUnit / 2; ++t) {
      const auto index = static_cast<std::uint32_t>(window >> (5 * t)) & 255U;
      const std::uint32_t h = index & 7U;
      const std::uint32_t symbol = index >> 3;
      level[2 * t] = static_cast<float>(static_cast<std::int32_t>(2 * (symbol & 7U) + (h & 1U)) - 7);
      level[2 * t + 1] = static_cast<float>(static_cast<std::int32_t>(4 * (symbol >> 3) + (h >> 1)) - 6);
    }
  }
  static QUIRE_HD Affine read_meta(const std::uint8_t* meta, RowShape) {
    return {bfloat16_to_float(load_as<std::uint16_t>(meta)), 0.0F};
  }
  static QUIRE_HD constexpr float unrotate(RowShape shape) { return 1.0F / static_cast<float>(shape.block); }
  static QUIRE_HD constexpr int page_bytes(int head_size) { return 1 + head_size; }
  static QUIRE_HD float centre(const SideInputs& side, RowShape, int i) {
    return static_cast<float>(side.page[0]) * (1.0F / 256.0F) *
           static_cast<float>(static_cast<std::int8_t>(side.page[1 + i]));
  }
};

}  // namespace quire::format
