// Rows as they are stored and as fp32 levels, and the products of fp32 levels. Encoding and decoding are the format's
// own code, inlined here and vectorized by the compiler under each target's flags; products are written with Highway.
#if defined(QUIRE_CPU_LEVELS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_CPU_LEVELS_INL_H_
#undef QUIRE_CPU_LEVELS_INL_H_
#else
#define QUIRE_CPU_LEVELS_INL_H_
#endif

#include "cpu/vector-inl.h"
#include "format/row.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu {
namespace HWY_NAMESPACE {
namespace {

template <class F>
void encode_row(float* y, format::RowShape shape, const format::SideInputs& side, std::uint8_t* data,
                std::uint8_t* meta) {
  format::encode_row<F>(y, shape, side, data, meta);
}

// True where every float is finite: an OR over exponent tests, which vectorizes.
bool all_finite(const float* x, int size) {
  std::uint32_t bad = 0;
  for (int i = 0; i < size; ++i) bad |= (exact::bits_of(x[i]) & 0x7f800000U) == 0x7f800000U ? 1U : 0U;
  return bad == 0;
}

// Only the float casts and fp8 have codes that are not finite levels; a centre may hold anything.
template <class F>
constexpr bool kLevelsMayBeNonFinite = F::kStatsOf == format::StatsOf::kNothing || F::kCentre != format::Centre::kNone;

template <class F>
void load_tile(const TileRows& rows, format::RowShape shape, const float* head_vector, LevelTile& tile) {
  tile.any_offset = false;
  tile.all_finite = true;
  for (int n = 0; n < rows.num_rows; ++n) {
    float* levels = tile.levels + static_cast<std::int64_t>(n) * tile.stride;
    format::Affine affine = format::decode_levels<F>(rows.data(n), rows.meta(n), shape, levels);
    format::add_centre<F>({.head_vector = head_vector, .page = rows.page(n)}, shape, levels, affine);
    for (int i = shape.head_size; i < tile.stride; ++i) levels[i] = 0.0F;
    tile.scale[n] = affine.scale;
    tile.offset[n] = affine.offset;
    tile.any_offset = tile.any_offset || affine.offset != 0.0F;
    tile.all_finite = tile.all_finite && exact::is_finite(affine.scale) && exact::is_finite(affine.offset);
    if constexpr (kLevelsMayBeNonFinite<F>) tile.all_finite = tile.all_finite && all_finite(levels, shape.head_size);
  }
  for (int n = rows.num_rows; n < padded(rows.num_rows); ++n) tile.scale[n] = tile.offset[n] = 0.0F;
}

// kQ x kKeys dot products at once.
template <int kQ, int kKeys>
HWY_INLINE void dot_block(const float* q, const LevelTile& tile, int first_key, float* scores) {
  const F32 d;
  hn::Vec<F32> sum[kQ][kKeys];
  for (int m = 0; m < kQ; ++m) {
    for (int n = 0; n < kKeys; ++n) sum[m][n] = hn::Zero(d);
  }
  const float* levels = tile.levels + static_cast<std::int64_t>(first_key) * tile.stride;
  const int lanes = static_cast<int>(hn::Lanes(d));
  for (int i = 0; i < tile.stride; i += lanes) {
    hn::Vec<F32> key[kKeys];
    for (int n = 0; n < kKeys; ++n) key[n] = hn::Load(d, levels + n * tile.stride + i);
    for (int m = 0; m < kQ; ++m) {
      const auto query = hn::Load(d, q + m * tile.stride + i);
      for (int n = 0; n < kKeys; ++n) sum[m][n] = hn::MulAdd(query, key[n], sum[m][n]);
    }
  }
  for (int m = 0; m < kQ; ++m) {
    for (int n = 0; n < kKeys; ++n) scores[m * kKeyTile + first_key + n] = hn::GetLane(hn::SumOfLanes(d, sum[m][n]));
  }
}

void dot_tile(const float* q, int num_q, const LevelTile& tile, int num_keys, float* scores) {
  for (int n = 0; n < num_keys; n += 4) {
    const int keys = num_keys - n < 4 ? num_keys - n : 4;
    int m = 0;
    for (; m + 4 <= num_q && keys == 4; m += 4) {
      dot_block<4, 4>(q + static_cast<std::int64_t>(m) * tile.stride, tile, n, scores + m * kKeyTile);
    }
    for (; m < num_q; ++m) {
      const float* row = q + static_cast<std::int64_t>(m) * tile.stride;
      if (keys == 4) {
        dot_block<1, 4>(row, tile, n, scores + m * kKeyTile);
      } else {
        for (int k = 0; k < keys; ++k) dot_block<1, 1>(row, tile, n + k, scores + m * kKeyTile);
      }
    }
  }
}

template <int kQ>
HWY_INLINE void accumulate_block(const float* p, const LevelTile& tile, int num_keys, float* acc, int acc_stride) {
  const F32 d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  for (int i = 0; i < tile.stride; i += lanes) {
    hn::Vec<F32> sum[kQ];
    for (int m = 0; m < kQ; ++m) sum[m] = hn::Load(d, acc + m * acc_stride + i);
    const float* levels = tile.levels + i;
    for (int n = 0; n < num_keys; ++n, levels += tile.stride) {
      const auto value = hn::Load(d, levels);
      for (int m = 0; m < kQ; ++m) sum[m] = hn::MulAdd(hn::Set(d, p[m * kKeyTile + n]), value, sum[m]);
    }
    for (int m = 0; m < kQ; ++m) hn::Store(sum[m], d, acc + m * acc_stride + i);
  }
}

void accumulate_tile(const float* p, int num_q, const LevelTile& tile, int num_keys, float* acc, int acc_stride) {
  int m = 0;
  for (; m + 8 <= num_q; m += 8) {
    accumulate_block<8>(p + m * kKeyTile, tile, num_keys, acc + static_cast<std::int64_t>(m) * acc_stride, acc_stride);
  }
  for (; m < num_q; ++m) {
    accumulate_block<1>(p + m * kKeyTile, tile, num_keys, acc + static_cast<std::int64_t>(m) * acc_stride, acc_stride);
  }
}

void rotate(format::Rotation rotation, float* y, format::RowShape shape) { format::rotate(rotation, y, shape); }
void rotate_back(format::Rotation rotation, float* y, format::RowShape shape) {
  format::rotate_back(rotation, y, shape);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace quire::cpu
HWY_AFTER_NAMESPACE();

#endif  // QUIRE_CPU_LEVELS_INL_H_
