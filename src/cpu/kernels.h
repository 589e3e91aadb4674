// The inner loops of the CPU device, compiled once per SIMD target (kernels.cc) and chosen at run time. The tables have
// one entry per format, in the order of format::FormatId; a format left out of the build has null entries.
#pragma once

#include <array>
#include <cstdint>

#include "format/formats.h"

namespace quire::cpu {

// Rows of fp32 scratch start at multiples of this many floats and are padded to it with zeros.
inline constexpr int kLaneAlign = 16;
constexpr int padded(int head_size) { return (head_size + kLaneAlign - 1) / kLaneAlign * kLaneAlign; }

// Where one stored row is.
struct RowAddress {
  const std::uint8_t* data;
  const std::uint8_t* meta;  // fp32 scale, or the end of the row's codes; null where the format has no metadata
  const std::uint8_t* page;  // metadata of the page and KV head; null where there is none
};

// Keys (or values) handled together.
inline constexpr int kKeyTile = 64;

// A tile of decoded rows: value = scale[n] * levels[n][i] + offset[n].
struct LevelTile {
  float* levels;  // [kKeyTile, stride]
  int stride;     // padded(head_size)
  float scale[kKeyTile];
  float offset[kKeyTile];
  bool any_offset;  // some offset is not 0
  bool all_finite;  // no NaN or infinity anywhere: masked rows may be multiplied by 0
};

struct Kernels {
  const char* target;

  // y [head_size] is overwritten; data receives the codes, meta the metadata.
  using EncodeRow = void (*)(float* y, format::RowShape shape, const format::SideInputs& side, std::uint8_t* data,
                             std::uint8_t* meta);
  std::array<EncodeRow, format::AllFormats::kSize> encode_row;

  // Decodes num_rows <= kKeyTile rows of a KV head into the tile, padding included. head_vector [head_size] may be
  // null.
  using LoadTile = void (*)(const RowAddress* rows, int num_rows, format::RowShape shape, const float* head_vector,
                            LevelTile& tile);
  std::array<LoadTile, format::AllFormats::kSize> load_tile;

  // scores[m * kKeyTile + n] = sum_i q[m][i] * levels[n][i]; q rows have the tile's stride.
  void (*dot_tile)(const float* q, int num_q, const LevelTile& tile, int num_keys, float* scores);

  // acc[m][i] += sum_n p[m * kKeyTile + n] * levels[n][i], n ascending; acc rows have the tile's stride.
  void (*accumulate_tile)(const float* p, int num_q, const LevelTile& tile, int num_keys, float* acc);

  // p[n] = exp(p[n] - max) for n < num_keys, returns the sum. A NaN stays NaN; -inf gives 0.
  float (*exp_row)(float* p, int num_keys, float max);

  // x[i] *= factor.
  void (*scale_row)(float* x, int size, float factor);

  void (*rotate)(format::Rotation rotation, float* y, format::RowShape shape);
  void (*rotate_back)(format::Rotation rotation, float* y, format::RowShape shape);
};

// The table of the target in use.
const Kernels& kernels();

}  // namespace quire::cpu
