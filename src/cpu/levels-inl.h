// Rows as fp32 levels, and the products of fp32 levels. Decoding is the format's own code, inlined here and vectorized
// by the compiler under each target's flags; products are written with Highway.
#if defined(QUIRE_CPU_LEVELS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_CPU_LEVELS_INL_H_
#undef QUIRE_CPU_LEVELS_INL_H_
#else
#define QUIRE_CPU_LEVELS_INL_H_
#endif

#include <cstring>
#include <type_traits>

#include "cpu/vector-inl.h"
#include "format/row.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu {
namespace HWY_NAMESPACE {
namespace {

// True where every float is finite: an OR over exponent tests, which vectorizes.
bool all_finite(const float* x, int size) {
  std::uint32_t bad = 0;
  for (int i = 0; i < size; ++i) bad |= (exact::bits_of(x[i]) & 0x7f800000U) == 0x7f800000U ? 1U : 0U;
  return bad == 0;
}

template <class F>
constexpr bool kIsFloat8 = requires {
  typename OperandOf<F>::Float8;
};
// Formats whose codes are floats, in order.
template <class F>
constexpr bool kIsFloat = std::is_same_v<F, format::Float32> || std::is_same_v<F, format::Float16> ||
                          std::is_same_v<F, format::BFloat16> || kIsFloat8<F>;

// Only floats have codes that are not finite levels, and formats from outside of the tree that measure nothing may.
template <class F>
constexpr bool kLevelsMayBeNonFinite = kIsFloat<F> || F::kStatsOf == format::StatsOf::kNothing;

#if QUIRE_CPU_HAS_PAIRS
template <class F>
constexpr bool is_e4m3() {
  if constexpr (kIsFloat8<F>) return std::is_same_v<typename OperandOf<F>::Float8, format::E4M3>;
  return false;
}
// float_elements() gives levels in this unit.
template <class F>
constexpr float kFloatUnit = is_e4m3<F>() ? 256.0F : 1.0F;

// kFloats elements from element `i` of a row on. Of a NaN the payload may change.
//
// fp8 goes through fp16, whose exponent is one bit longer than that of e4m3 and as long as those of e5m2 and e4b15:
// shifted to its place, a code is the number itself, or for the other bias of e4m3 a 256th of it, subnormal or not. But
// e4m3 has a NaN where fp16 has a number.
template <class F>
HWY_INLINE hn::Vec<F32> float_elements(const std::uint8_t* row, int i) {
  const hn::Rebind<hwy::float16_t, F32> half;
  if constexpr (kIsFloat8<F>) {
    using Float8 = typename OperandOf<F>::Float8;
    const hn::Rebind<std::int8_t, F32> bytes;
    const hn::Rebind<std::int16_t, F32> words;
    auto x = hn::PromoteTo(words, hn::LoadU(bytes, reinterpret_cast<const std::int8_t*>(row) + i));
    if constexpr (std::is_same_v<Float8, format::E5M2>) {
      x = hn::ShiftLeft<8>(x);
    } else {
      x = hn::And(hn::ShiftLeft<7>(x), hn::Set(words, static_cast<std::int16_t>(0xbf80)));
    }
    if constexpr (std::is_same_v<Float8, format::E4M3>) {
      const auto most = hn::Set(words, 0x3f80);
      const auto nan = hn::VecFromMask(words, hn::Eq(hn::And(x, most), most));
      x = hn::Or(x, nan);
    }
    return hn::PromoteTo(F32(), hn::BitCast(half, x));
  } else if constexpr (std::is_same_v<F, format::Float32>) {
    return hn::LoadU(F32(), reinterpret_cast<const float*>(row) + i);
  } else {
    const hn::Rebind<std::uint16_t, F32> words;
    const auto x = hn::LoadU(words, reinterpret_cast<const std::uint16_t*>(row) + i);
    if constexpr (std::is_same_v<F, format::Float16>) return hn::PromoteTo(F32(), hn::BitCast(half, x));
    return hn::BitCast(F32(), hn::ShiftLeft<16>(hn::PromoteTo(U32(), x)));
  }
}

// 8 codes of kBits in as many bytes, spread over 8 bytes.
template <int kBits>
HWY_INLINE std::uint64_t spread_codes(const std::uint8_t* data) {
  constexpr auto mask = [](int bits, int every) {
    std::uint64_t m = 0;
    for (int i = 0; i < 64; i += every) m |= ((std::uint64_t{1} << bits) - 1) << i;
    return m;
  };
  std::uint64_t x = 0;
  std::memcpy(&x, data, kBits);
  x = (x | x << (32 - 4 * kBits)) & mask(4 * kBits, 32);
  x = (x | x << (16 - 2 * kBits)) & mask(2 * kBits, 16);
  return (x | x << (8 - kBits)) & mask(kBits, 8);
}

// Levels of 16 codes of up to 4 bits.
struct LevelTable {
  alignas(64) float levels[16];
  template <class F>
  static const LevelTable& of() {
    static const LevelTable table = [] {
      LevelTable made{};
      constexpr int kBits = 8 * F::kUnitBytes / F::kUnit;
      for (int code = 0; code < 1 << kBits; ++code) {
        const std::uint8_t bytes[F::kUnitBytes] = {static_cast<std::uint8_t>(code)};  // the first element's
        float unpacked[F::kUnit];
        F::unpack(bytes, unpacked);
        made.levels[code] = unpacked[0];
      }
      return made;
    }();
    return table;
  }
  HWY_INLINE void operator()(const std::uint8_t* codes, float* out) const {
#if QUIRE_CPU_WORDS_512
    const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    _mm512_storeu_ps(out, _mm512_permutexvar_ps(index, _mm512_load_ps(levels)));
#else
    for (int i = 0; i < 16; ++i) out[i] = levels[codes[i]];
#endif
  }
};
#endif

void collect_scales(const TileRows& rows, int num_heads, float (*scales)[kKeyTile]) {
  int h = 0;
#if QUIRE_CPU_WORDS_512
  // 16 rows of 8 heads: pairs of rows 8 apart make vectors, in whose halves 8 x 8 numbers are transposed.
  const __m512i first_heads = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
  const __m512i last_heads = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
  for (; h + 8 <= num_heads; h += 8) {
    for (int n = 0; n < rows.num_rows; n += 16) {
      const auto row = [&](int i) HWY_ATTR {
        const int at = n + i < rows.num_rows ? n + i : rows.num_rows - 1;
        return _mm256_loadu_ps(reinterpret_cast<const float*>(rows.meta(at) + 4 * h));
      };
      __m512 r[8], two[8];
      HWY_UNROLL(8)
      for (int i = 0; i < 8; ++i) r[i] = _mm512_insertf32x8(_mm512_castps256_ps512(row(i)), row(i + 8), 1);
      HWY_UNROLL(4)
      for (int i = 0; i < 8; i += 2) {
        two[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        two[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
      }
      HWY_UNROLL(4)
      for (int c = 0; c < 4; ++c) {
        const auto four = [&](int i) HWY_ATTR {
          const __m512d a = _mm512_castps_pd(two[i + c / 2]), b = _mm512_castps_pd(two[i + 2 + c / 2]);
          return c % 2 == 0 ? _mm512_unpacklo_pd(a, b) : _mm512_unpackhi_pd(a, b);
        };
        const __m512d low = four(0), high = four(4);
        _mm512_storeu_pd(scales[h + c] + n, _mm512_permutex2var_pd(low, first_heads, high));
        _mm512_storeu_pd(scales[h + c + 4] + n, _mm512_permutex2var_pd(low, last_heads, high));
      }
    }
  }
#endif
  if (h == num_heads) return;
  for (int n = 0; n < rows.num_rows; ++n) {
    const std::uint8_t* meta = rows.meta(n);
    for (int i = h; i < num_heads; ++i) std::memcpy(&scales[i][n], meta + 4 * i, 4);
  }
}

// The levels of a row, whether all of them are finite, and the affine map with any norm correction applied.
template <class F>
HWY_INLINE format::Affine load_levels(const std::uint8_t* data, const std::uint8_t* meta, format::RowShape shape,
                                      float* levels, bool& finite) {
#if QUIRE_CPU_HAS_PAIRS
  constexpr int kBits = 8 * F::kUnitBytes / F::kUnit;
  if constexpr (kIsFloat<F>) {
    const auto unit = hn::Set(F32(), kFloatUnit<F>);
    const auto zero = hn::Zero(F32());
    auto zeros = zero;  // times 0, and so NaN where some level is not finite
    int i = 0;
    for (; i + kFloats <= shape.head_size; i += kFloats) {
      const auto x = float_elements<F>(data, i);
      hn::StoreU(kFloatUnit<F> == 1.0F ? x : hn::Mul(x, unit), F32(), levels + i);
      zeros = hn::MulAdd(x, zero, zeros);
    }
    const int tail = i;
    for (; i < shape.head_size; ++i) F::unpack(data + i * F::kUnitBytes, levels + i);
    finite = hn::AllTrue(F32(), hn::Eq(zeros, zero)) && all_finite(levels + tail, shape.head_size - tail);
    if constexpr (F::kMetaPlace == format::MetaPlace::kNone) return {1.0F, 0.0F};
    return F::read_meta(meta, shape);
  } else if constexpr (kBits <= 4 && F::kCentre == format::Centre::kNone && !F::kHistory && !F::kWholeRow) {
    if (shape.head_size % 16 == 0) {
      const LevelTable& table = LevelTable::of<F>();
      auto squares = hn::Zero(F32());
      for (int i = 0; i < shape.head_size; i += 16, data += 2 * kBits) {
        const std::uint64_t words[2] = {spread_codes<kBits>(data), spread_codes<kBits>(data + kBits)};
        std::uint8_t codes[16];
        std::memcpy(codes, words, 16);
        table(codes, levels + i);
        if constexpr (!F::kLevelNorm) continue;
        for (int j = i; j < i + 16; j += kFloats) {
          const auto x = hn::LoadU(F32(), levels + j);
          squares = hn::MulAdd(x, x, squares);
        }
      }
      format::Affine affine = F::read_meta(meta, shape);
      if constexpr (F::kLevelNorm) {
        affine.scale = exact::divide(affine.scale, exact::sqrt(hn::GetLane(hn::SumOfLanes(F32(), squares))));
      }
      return affine;
    }
  }
#endif
  const format::Affine affine = format::decode_levels<F>(data, meta, shape, levels);
  if constexpr (kLevelsMayBeNonFinite<F>) finite = all_finite(levels, shape.head_size);
  return affine;
}

template <class F>
void load_tile(const TileRows& rows, format::RowShape shape, const float* head_vector, LevelTile& tile) {
  tile.any_offset = false;
  tile.all_finite = true;
  for (int n = 0; n < rows.num_rows; ++n) {
    if (rows.prefetch != nullptr) rows.prefetch->after(kProductsOfRow);
    float* levels = tile.levels + static_cast<std::int64_t>(n) * tile.stride;
    bool finite = true;
    format::Affine affine = load_levels<F>(rows.data(n), rows.meta(n), shape, levels, finite);
    format::add_centre<F>({.head_vector = head_vector, .page = rows.page(n)}, shape, levels, affine);
    for (int i = shape.head_size; i < tile.stride; ++i) levels[i] = 0.0F;
    tile.scale[n] = affine.scale;
    tile.offset[n] = affine.offset;
    tile.any_offset = tile.any_offset || affine.offset != 0.0F;
    tile.all_finite = tile.all_finite && exact::is_finite(affine.scale) && exact::is_finite(affine.offset);
    // A centre may hold anything.
    if constexpr (F::kCentre != format::Centre::kNone) finite = all_finite(levels, shape.head_size);
    tile.all_finite = tile.all_finite && finite;
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

// kQ rows by kVectors vectors of columns.
template <int kQ, int kVectors>
HWY_INLINE void accumulate_block(const float* p, std::int64_t p_stride, const float* levels, int stride, int num_keys,
                                 float* acc, int acc_stride) {
  const F32 d;
  hn::Vec<F32> sum[kQ][kVectors];
  HWY_UNROLL(8)
  for (int m = 0; m < kQ; ++m) {
    HWY_UNROLL(2)
    for (int v = 0; v < kVectors; ++v) sum[m][v] = hn::Zero(d);
  }
  for (int n = 0; n < num_keys; ++n, levels += stride) {
    hn::Vec<F32> x[kVectors];
    HWY_UNROLL(2)
    for (int v = 0; v < kVectors; ++v) x[v] = hn::LoadU(d, levels + v * kFloats);
    HWY_UNROLL(8)
    for (int m = 0; m < kQ; ++m) {
      const auto weight = hn::Set(d, p[m * p_stride + n]);
      HWY_UNROLL(2)
      for (int v = 0; v < kVectors; ++v) sum[m][v] = hn::MulAdd(weight, x[v], sum[m][v]);
    }
  }
  HWY_UNROLL(8)
  for (int m = 0; m < kQ; ++m) {
    HWY_UNROLL(2)
    for (int v = 0; v < kVectors; ++v) {
      float* to = acc + m * acc_stride + v * kFloats;
      hn::StoreU(hn::Add(hn::LoadU(d, to), sum[m][v]), d, to);
    }
  }
}

// Columns of up to kKeyTile keys, by all rows. Of many rows the columns are copied side by side first: a tile of 64 keys
// and 128 elements is as large as an L1 of 32 KB, and some columns of it fill all ways of a few of its sets.
template <int kVectors>
void accumulate_columns(const float* p, std::int64_t p_stride, int num_q, const float* levels, int stride, int num_keys,
                        float* acc, int acc_stride) {
  HWY_ALIGN float side_by_side[kKeyTile * kVectors * kFloats];
  if (num_q > kFewRows) {
    for (int n = 0; n < num_keys; ++n) {
      HWY_UNROLL(2)
      for (int v = 0; v < kVectors; ++v) {
        const auto x = hn::LoadU(F32(), levels + static_cast<std::int64_t>(n) * stride + v * kFloats);
        hn::Store(x, F32(), side_by_side + (n * kVectors + v) * kFloats);
      }
    }
    levels = side_by_side;
    stride = kVectors * kFloats;
  }
  int m = 0;
  const auto rows = [&]<int kQ>() HWY_ATTR {
    accumulate_block<kQ, kVectors>(p + m * p_stride, p_stride, levels, stride, num_keys,
                                   acc + static_cast<std::int64_t>(m) * acc_stride, acc_stride);
    m += kQ;
  };
  while (m + 2 * kRowsAtOnce <= num_q) rows.template operator()<2 * kRowsAtOnce>();
  if (m + kRowsAtOnce <= num_q) rows.template operator()<kRowsAtOnce>();
  if (kRowsAtOnce > 2 && m + 2 <= num_q) rows.template operator()<2>();
  while (m < num_q) rows.template operator()<1>();
}

void accumulate_tile(const float* p, std::int64_t p_stride, int num_q, const float* levels, int stride, int num_keys,
                     float* acc, int acc_stride) {
  for (int n = 0; n < num_keys; n += kKeyTile, p += kKeyTile, levels += static_cast<std::int64_t>(kKeyTile) * stride) {
    const int keys = num_keys - n < kKeyTile ? num_keys - n : kKeyTile;
    int i = 0;
    for (; i + 2 * kFloats <= stride; i += 2 * kFloats) {
      accumulate_columns<2>(p, p_stride, num_q, levels + i, stride, keys, acc + i, acc_stride);
    }
    for (; i < stride; i += kFloats) {
      accumulate_columns<1>(p, p_stride, num_q, levels + i, stride, keys, acc + i, acc_stride);
    }
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace quire::cpu
HWY_AFTER_NAMESPACE();

#endif  // QUIRE_CPU_LEVELS_INL_H_
