// One row by one thread: the loop driver of the contract in format.h. The CPU's store compiles it once per SIMD target
// (the loops vectorize); the reference, the tests and the tools call it as it stands.
#pragma once

#include <array>
#include <cstdint>

#include "format/format.h"

namespace quire::format {

// Sign bits of the RHT of one block as masks to XOR into an fp32.
inline constexpr auto kRhtSignMasks = [] {
  std::array<std::uint32_t, kMaxHeadSize> masks{};
  for (int i = 0; i < kMaxHeadSize; ++i) masks[i] = ((rht_sign_word(i / 32, kMaxHeadSize) >> (i % 32)) & 1U) << 31;
  return masks;
}();

QUIRE_HD void flip_signs(float* y, RowShape shape) {
  for (int first = 0; first < shape.head_size; first += shape.block) {
    for (int i = 0; i < shape.block; ++i) {
      y[first + i] = exact::from_bits(exact::bits_of(y[first + i]) ^ kRhtSignMasks[i]);
    }
  }
}

QUIRE_HD void hadamard(float* y, RowShape shape) {
  for (int h = 1; h < shape.block; h *= 2) {
    for (int j = 0; j < shape.head_size; j += 2 * h) {
      for (int i = j; i < j + h; ++i) {
        const float a = y[i];
        const float b = y[i + h];
        y[i] = a + b;
        y[i + h] = a - b;
      }
    }
  }
}

// y = H y or H (s .* y): what a format stores, and what attention does to a query once.
QUIRE_HD void rotate(Rotation rotation, float* y, RowShape shape) {
  if (rotation == Rotation::kSignedHadamard) flip_signs(y, shape);
  if (rotation != Rotation::kNone) hadamard(y, shape);
}

// y = H y or s .* (H y): the way back, up to unrotate().
QUIRE_HD void rotate_back(Rotation rotation, float* y, RowShape shape) {
  if (rotation != Rotation::kNone) hadamard(y, shape);
  if (rotation == Rotation::kSignedHadamard) flip_signs(y, shape);
}

// Merges stat() of every element by the tree that the contract prescribes.
template <Format F>
QUIRE_HD typename F::Stats row_stats(const float* y, int head_size) {
  typename F::Stats stats[kMaxHeadSize];
  stats[0] = F::stat(y[0]);
  for (int i = 1; i < head_size; ++i) stats[i] = F::stat(y[i]);
  for (int h = 1; h < head_size; h *= 2) {
    for (int i = 0; i + h < head_size; i += 2 * h) stats[i] = F::merge(stats[i], stats[i + h]);
  }
  return stats[0];
}

// Subtracts the row's centre from y.
template <Format F>
QUIRE_HD void subtract_centre(const SideInputs& side, float* y, RowShape shape) {
  if constexpr (F::kCentre != Centre::kNone) {
    if (!has_centre<F>(side)) return;
    for (int i = 0; i < shape.head_size; ++i) y[i] -= F::centre(side, shape, i);
  }
}

// Encodes y[head_size], which is overwritten. `data` receives code_bytes, `meta` kMetaBytes.
template <Format F>
QUIRE_HD void encode_row(float* y, RowShape shape, const SideInputs& side, std::uint8_t* data, std::uint8_t* meta) {
  typename F::Stats stats{};
  if constexpr (F::kStatsOf == StatsOf::kInput) stats = row_stats<F>(y, shape.head_size);
  if constexpr (F::kStatsOf != StatsOf::kInput) {
    rotate(F::kRotation, y, shape);
    subtract_centre<F>(side, y, shape);
    if constexpr (F::kStatsOf == StatsOf::kRotated) stats = row_stats<F>(y, shape.head_size);
  }
  const typename F::Encoder encoder = F::finish(stats, shape, side);
  if constexpr (F::kStatsOf == StatsOf::kInput) {
    for (int i = 0; i < shape.head_size; ++i) y[i] = F::normalize(encoder, y[i]);
    rotate(F::kRotation, y, shape);
  }
  if constexpr (F::kWholeRow) {
    F::encode_row(encoder, y, shape, data);
  } else {
    const int num_units = shape.head_size / F::kUnit;
    for (int u = 0; u < num_units; ++u) F::pack(encoder, y + u * F::kUnit, data + u * F::kUnitBytes);
  }
  F::write_meta(encoder, meta);
}

// Levels of a row, and its affine map with any norm correction applied.
template <Format F>
QUIRE_HD Affine decode_levels(const std::uint8_t* data, const std::uint8_t* meta, RowShape shape, float* levels) {
  const int num_units = shape.head_size / F::kUnit;
  int u = 0;
  if constexpr (F::kHistory) {  // the first unit sees a 0 before it, whatever lies there
    std::uint8_t first[1 + F::kUnitBytes] = {};
    memcpy(first + 1, data, F::kUnitBytes);
    F::unpack(first + 1, levels);
    u = 1;
  }
  for (; u < num_units; ++u) F::unpack(data + u * F::kUnitBytes, levels + u * F::kUnit);
  Affine affine = F::read_meta(meta, shape);
  if constexpr (F::kLevelNorm) {
    float squares = 0.0F;
    for (int i = 0; i < shape.head_size; ++i) squares += levels[i] * levels[i];
    affine.scale = exact::divide(affine.scale, exact::sqrt(squares));
  }
  return affine;
}

// Levels of a row to values, in place, where the format has a centre in this call: the affine map is then (1, 0).
template <Format F>
QUIRE_HD void add_centre(const SideInputs& side, RowShape shape, float* levels, Affine& affine) {
  if constexpr (F::kCentre != Centre::kNone) {
    if (!has_centre<F>(side)) return;
    for (int i = 0; i < shape.head_size; ++i) {
      levels[i] = affine.scale * levels[i] + affine.offset + F::centre(side, shape, i);
    }
    affine = {1.0F, 0.0F};
  }
}

}  // namespace quire::format
