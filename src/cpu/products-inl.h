// Products of 16-bit operands. Their forms are those of kernels.h.
//
// Q K' of few rows: vectors of a key and of a query row, element by element; a sum is a vector, which is added up at
// the end, for 16 keys at once. Of many rows: keys are transposed, once for all rows, and multiplied like values.
//
// P V: a vector holds some positions of two tokens in turns; a row's two weights are in every pair of its other factor.
#if defined(QUIRE_CPU_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_CPU_PRODUCTS_INL_H_
#undef QUIRE_CPU_PRODUCTS_INL_H_
#else
#define QUIRE_CPU_PRODUCTS_INL_H_
#endif

#include <algorithm>
#include <cmath>

#include "cpu/vector-inl.h"
#include "format/float_types.h"

#if QUIRE_CPU_HAS_PAIRS
HWY_BEFORE_NAMESPACE();
namespace quire::cpu {
namespace HWY_NAMESPACE {
namespace {

// The step of a row as int16, and what it is multiplied by to be in steps: 0 where the row is 0 or not finite, when the
// step is NaN.
struct QueryStep {
  float step, inverse;
};
HWY_INLINE QueryStep query_step(const float* row, int size, float largest) {
  std::uint32_t top = 0;
  for (int i = 0; i < size; ++i) top = std::max(top, exact::bits_of(row[i]) & 0x7fffffffU);
  const float most = exact::from_bits(top);
  if (!exact::is_finite(most)) return {NAN, 0.0F};
  return {most / largest, most > 1e-30F ? largest / most : 0.0F};
}

// The operands of a row in the order of its elements, padded with zeros to q_stride.
HWY_INLINE float make_codes(Operand operand, const float* row, int q_stride, float largest, std::uint16_t* codes,
                            [[maybe_unused]] std::uint16_t* second) {
  const F32 d;
  if (operand == Operand::kInt16) {
    const QueryStep steps = query_step(row, q_stride, largest);
    const hn::Rebind<std::int16_t, I32> half;
    const auto inverse = hn::Set(d, steps.inverse);
    const bool some = steps.inverse != 0.0F;
    for (int i = 0; i < q_stride; i += kFloats) {
      const auto x = some ? hn::Mul(hn::LoadU(d, row + i), inverse) : hn::Zero(d);
      hn::StoreU(hn::DemoteTo(half, hn::NearestInt(x)), half, reinterpret_cast<std::int16_t*>(codes + i));
    }
    return steps.step;
  }
#ifdef QUIRE_CPU_ZEN4
  const auto nan = hn::Set(U32(), 0x7fc0);
  for (int i = 0; i < q_stride; i += kFloats) {
    const auto x = hn::LoadU(d, row + i);
    const auto high = hn::IfThenElse(hn::RebindMask(U32(), hn::IsNaN(x)), nan, to_bfloat16(x));
    store_words(high, codes + i);
    const auto rest = hn::Sub(x, hn::BitCast(d, hn::ShiftLeft<16>(high)));
    // Of what is not finite there is no rest: the difference is a NaN.
    if (second != nullptr) store_words(to_bfloat16(hn::IfThenElseZero(hn::Eq(rest, rest), rest)), second + i);
  }
#endif
  return 1.0F;
}

void make_queries(Operand operand, const float* q, int num_rows, int q_stride, const std::int16_t* element_of,
                  float largest, QueryOperands& queries) {
  const int positions = queries.positions;
  HWY_ALIGN std::uint16_t codes[2][format::kMaxHeadSize + kLaneAlign];
  for (int m = 0; m < num_rows; ++m) {
    const float* row = q + static_cast<std::int64_t>(m) * q_stride;
    queries.step[m] = make_codes(operand, row, q_stride, largest, codes[0], queries.parts == 2 ? codes[1] : nullptr);
    for (int part = 0; part < queries.parts; ++part) {
      std::uint16_t* to = queries.data + part * queries.part_stride + static_cast<std::int64_t>(m) * positions;
      for (int p = 0; p < positions; ++p) to[p] = element_of[p] >= 0 ? codes[part][element_of[p]] : 0;
    }
  }
}

// Calls run.operator()<Products>() with what multiplies operands of a form.
template <class Run>
HWY_INLINE void with_products([[maybe_unused]] Operand operand, const Run& run) {
#ifdef QUIRE_CPU_ZEN4
  if (operand == Operand::kBFloat16) return run.template operator()<BFloat16Products>();
#endif
  run.template operator()<Int16Products>();
}

// Blocks of partial sums of four keys to one vector: block = row, element = key.
template <class Products>
HWY_INLINE hn::Vec<typename Products::Sum> reduce4(hn::Vec<typename Products::Sum> a, hn::Vec<typename Products::Sum> b,
                                                   hn::Vec<typename Products::Sum> c,
                                                   hn::Vec<typename Products::Sum> d) {
  const typename Products::Sum sum;
  const U64 wide;
  const auto ab = hn::Add(hn::InterleaveLower(sum, a, b), hn::InterleaveUpper(sum, a, b));
  const auto cd = hn::Add(hn::InterleaveLower(sum, c, d), hn::InterleaveUpper(sum, c, d));
  const auto lower = hn::InterleaveLower(wide, hn::BitCast(wide, ab), hn::BitCast(wide, cd));
  const auto upper = hn::InterleaveUpper(wide, hn::BitCast(wide, ab), hn::BitCast(wide, cd));
  return hn::Add(hn::BitCast(sum, lower), hn::BitCast(sum, upper));
}

#if QUIRE_CPU_WORDS_512
// 16-byte blocks of four vectors, transposed.
HWY_INLINE void transpose_blocks(__m512i (&r)[4]) {
  const __m512i a = _mm512_shuffle_i32x4(r[0], r[1], 0x44), b = _mm512_shuffle_i32x4(r[0], r[1], 0xee);
  const __m512i c = _mm512_shuffle_i32x4(r[2], r[3], 0x44), d = _mm512_shuffle_i32x4(r[2], r[3], 0xee);
  r[0] = _mm512_shuffle_i32x4(a, c, 0x88);
  r[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
  r[2] = _mm512_shuffle_i32x4(b, d, 0x88);
  r[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}
#endif

// scale[n] /= the norm of the levels of key n, of a group. Its rows are readable to the end.
void divide_by_norms(const std::uint16_t* keys, int num_keys, int positions, float* scale) {
  HWY_ALIGN std::int32_t norms[kKeyGroup];
  hn::Vec<I32> four[kKeyGroup / 4];
  HWY_UNROLL(4)
  for (int n = 0; n < kKeyGroup; n += 4) {
    hn::Vec<I32> squares[4] = {hn::Zero(I32()), hn::Zero(I32()), hn::Zero(I32()), hn::Zero(I32())};
    for (int i = 0; i < positions; i += kWords) {
      HWY_UNROLL(4)
      for (int k = 0; k < 4; ++k) {
        const auto x = hn::BitCast(I16(), hn::LoadU(U16(), keys + (n + k) * positions + i));
        add_dot(squares[k], x, x);
      }
    }
    four[n / 4] = reduce4<Int16Products>(squares[0], squares[1], squares[2], squares[3]);
  }
#if QUIRE_CPU_WORDS_512
  __m512i sums[4] = {four[0].raw, four[1].raw, four[2].raw, four[3].raw};
  transpose_blocks(sums);
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3]));
  _mm512_store_si512(norms, sum);
#else
  for (int n = 0; n < kKeyGroup; n += 4) {
    HWY_ALIGN std::int32_t blocks[kFloats];
    hn::Store(four[n / 4], I32(), blocks);
    for (int k = 0; k < 4; ++k) {
      norms[n + k] = 0;
      for (int b = 0; b < kBlocks; ++b) norms[n + k] += blocks[4 * b + k];
    }
  }
#endif
  if (num_keys < kKeyGroup) std::fill(norms + num_keys, norms + kKeyGroup, 1);
  for (int n = 0; n < kKeyGroup; n += kFloats) {
    const auto norm = hn::Sqrt(hn::ConvertTo(F32(), hn::Load(I32(), norms + n)));
    hn::StoreU(hn::Div(hn::LoadU(F32(), scale + n), norm), F32(), scale + n);
  }
}

// Sums of keys 0 to 15 with a row from those of fours, which are still spread over the blocks of a vector.
template <class Products>
HWY_INLINE void store_scores(hn::Vec<typename Products::Sum> (&fours)[kKeyGroup / 4], float step, float* scores) {
  const auto steps = hn::Set(F32(), step);
#if QUIRE_CPU_WORDS_512
  __m512i r[4];
  for (int i = 0; i < 4; ++i) r[i] = hn::BitCast(I32(), fours[i]).raw;
  transpose_blocks(r);
  const typename Products::Sum sum;
  const auto block = [&](int i) HWY_ATTR { return hn::BitCast(sum, hn::Vec<I32>{r[i]}); };
  const auto all = hn::Add(hn::Add(block(0), block(1)), hn::Add(block(2), block(3)));
  hn::StoreU(hn::Mul(Products::to_float(all), steps), F32(), scores);
#else
  for (int i = 0; i < kKeyGroup / 4; ++i) {
    auto four = fours[i];
    if constexpr (kBlocks == 2) four = hn::Add(four, hn::SwapAdjacentBlocks(four));
    HWY_ALIGN float blocks[kFloats];
    hn::Store(hn::Mul(Products::to_float(four), steps), F32(), blocks);
    std::memcpy(scores + 4 * i, blocks, 16);
  }
#endif
}

// kRows rows by a group of keys, whose rows are `bytes` long.
template <class Products, int kRows>
HWY_INLINE void dot_keys_of(const QueryOperands& queries, int first_row, const std::uint8_t* const* keys, int bytes,
                            float* scores, Prefetch& prefetch) {
  const typename Products::Sum sum;
  const typename Products::Factor factor;
  constexpr int kKeys = kRows > 2 ? 4 : 8;
  constexpr int kBytes = 2 * kWords;
  const std::int64_t row_stride = queries.positions;
  hn::Vec<typename Products::Sum> fours[kRows][kKeyGroup / 4];
  Prefetch ahead = prefetch;
  HWY_UNROLL(4)
  for (int first = 0; first < kKeyGroup; first += kKeys) {
    hn::Vec<typename Products::Sum> acc[kRows][kKeys];
    HWY_UNROLL(4)
    for (int r = 0; r < kRows; ++r) {
      HWY_UNROLL(8)
      for (int k = 0; k < kKeys; ++k) acc[r][k] = hn::Zero(sum);
    }
    const std::uint8_t* rows[kKeys];
    HWY_UNROLL(8)
    for (int k = 0; k < kKeys; ++k) rows[k] = keys[first + k];
    const auto multiply = [&](const std::uint16_t* q, const VU16(&key)[kKeys]) HWY_ATTR {
      HWY_UNROLL(4)
      for (int r = 0; r < kRows; ++r) {
        const auto query = hn::BitCast(factor, hn::LoadU(U16(), q + r * row_stride));
        HWY_UNROLL(8)
        for (int k = 0; k < kKeys; ++k) add_dot(acc[r][k], query, hn::BitCast(factor, key[k]));
      }
    };
    for (int part = 0; part < queries.parts; ++part) {
      const std::uint16_t* q = queries.data + part * queries.part_stride + first_row * row_stride;
      VU16 key[kKeys];
      int i = 0;
      for (; i + kBytes <= bytes; i += kBytes, q += kWords) {
        HWY_UNROLL(8)
        for (int k = 0; k < kKeys; ++k) key[k] = hn::BitCast(U16(), hn::LoadU(U8(), rows[k] + i));
        multiply(q, key);
      }
      if (i < bytes) {
        HWY_UNROLL(8)
        for (int k = 0; k < kKeys; ++k) key[k] = load_partial(rows[k] + i, bytes - i);
        multiply(q, key);
      }
    }
    HWY_UNROLL(4)
    for (int r = 0; r < kRows; ++r) {
      HWY_UNROLL(2)
      for (int k = 0; k < kKeys; k += 4) {
        fours[r][(first + k) / 4] = reduce4<Products>(acc[r][k], acc[r][k + 1], acc[r][k + 2], acc[r][k + 3]);
      }
    }
    ahead.after(kRows * kKeys * (queries.positions / kWords) * queries.parts);
  }
  prefetch = ahead;
  HWY_UNROLL(4)
  for (int r = 0; r < kRows; ++r) {
    store_scores<Products>(fours[r], queries.step[first_row + r], scores + (first_row + r) * kKeyTile);
  }
}

template <class Products>
void dot_keys_of(const QueryOperands& queries, int num_rows, const std::uint8_t* const* keys, int bytes, float* scores,
                 Prefetch& prefetch) {
  constexpr int kThree = kRowsAtOnce == 2 ? 2 : 3;
  for (int m = 0; m < num_rows;) {
    const auto run = [&]<int kRows>() {
      dot_keys_of<Products, kRows>(queries, m, keys, bytes, scores, prefetch);
      return kRows;
    };
    const int left = num_rows - m;
    if (left == 1) {
      m += run.template operator()<1>();
    } else if (kRowsAtOnce == 2 || left == 2) {
      m += run.template operator()<2>();
    } else if (left == 3) {
      m += run.template operator()<kThree>();
    } else {
      m += run.template operator()<kRowsAtOnce>();
    }
  }
}
void dot_keys(Operand operand, const QueryOperands& queries, int num_rows, const std::uint8_t* const* keys, int bytes,
              float* scores, Prefetch& prefetch) {
  with_products(operand, [&]<class Products>()
                             HWY_ATTR { dot_keys_of<Products>(queries, num_rows, keys, bytes, scores, prefetch); });
}

// columns[pair][key][2], kKeyTile keys a pair, of a group of keys; `columns` is that of its first key.
void transpose_keys(const std::uint8_t* const* keys, int bytes, std::uint16_t* columns) {
  const U32 d;
  const U64 wide;
  constexpr int kBytes = 2 * kWords;
  for (int i = 0; i < bytes; i += kBytes, columns += static_cast<std::int64_t>(kFloats) * 2 * kKeyTile) {
    // Pairs of positions as numbers of 32 bits: 4 of 4 keys are transposed in each block of 16 bytes.
    hn::Vec<U32> x[4][4];  // [pair of a block][fours of keys]
    HWY_UNROLL(4)
    for (int four = 0; four < 4; ++four) {
      const auto key = [&](int k) HWY_ATTR { return hn::BitCast(d, load_words(keys[4 * four + k] + i, bytes - i)); };
      const auto a = key(0), b = key(1), c = key(2), e = key(3);
      const auto ab_low = hn::BitCast(wide, hn::InterleaveLower(d, a, b));
      const auto ab_high = hn::BitCast(wide, hn::InterleaveUpper(d, a, b));
      const auto ce_low = hn::BitCast(wide, hn::InterleaveLower(d, c, e));
      const auto ce_high = hn::BitCast(wide, hn::InterleaveUpper(d, c, e));
      x[0][four] = hn::BitCast(d, hn::InterleaveLower(wide, ab_low, ce_low));
      x[1][four] = hn::BitCast(d, hn::InterleaveUpper(wide, ab_low, ce_low));
      x[2][four] = hn::BitCast(d, hn::InterleaveLower(wide, ab_high, ce_high));
      x[3][four] = hn::BitCast(d, hn::InterleaveUpper(wide, ab_high, ce_high));
    }
    HWY_UNROLL(4)
    for (int pair = 0; pair < 4; ++pair) {
#if QUIRE_CPU_WORDS_512
      __m512i r[4];
      for (int four = 0; four < 4; ++four) r[four] = x[pair][four].raw;
      transpose_blocks(r);
      for (int b = 0; b < 4; ++b) _mm512_storeu_si512(columns + (4 * b + pair) * 2 * kKeyTile, r[b]);
#else
      for (int four = 0; four < 4; ++four) {
        HWY_ALIGN std::uint32_t blocks[kFloats];
        hn::Store(x[pair][four], d, blocks);
        for (int b = 0; b < kBlocks; ++b) {
          std::memcpy(columns + (4 * b + pair) * 2 * kKeyTile + 8 * four, blocks + 4 * b, 16);
        }
      }
#endif
    }
  }
}

// The weights of two tokens.
HWY_INLINE std::int32_t weight_pair(const std::uint16_t* weights) {
  std::int32_t pair;
  std::memcpy(&pair, weights, sizeof(pair));
  return pair;
}

// kRows rows by kVectors vectors of positions.
template <class Products, int kRows, int kVectors, int kParts>
HWY_INLINE void accumulate_values_block(const std::uint16_t* weights, std::int64_t row_stride, std::int64_t part_stride,
                                        int num_pairs, const std::uint16_t* values, std::int64_t pair_stride,
                                        const float* unit, float* acc, int acc_stride, Prefetch& prefetch) {
  const typename Products::Sum sum;
  const typename Products::Factor factor;
  constexpr bool kInteger = std::is_same_v<Products, Int16Products>;
  hn::Vec<typename Products::Sum> a[kRows][kVectors];
  HWY_UNROLL(4)
  for (int r = 0; r < kRows; ++r) {
    HWY_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kInteger) {
        a[r][v] = hn::Zero(sum);
      } else {
        a[r][v] = hn::LoadU(sum, acc + static_cast<std::int64_t>(r) * acc_stride + v * kFloats);
      }
    }
  }
  for (int pair = 0; pair < num_pairs;) {
    prefetch.after(4 * kRows * kVectors * kParts);
    const int end = pair + 4 < num_pairs ? pair + 4 : num_pairs;
    for (; pair < end; ++pair, values += pair_stride, weights += 2) {
      hn::Vec<typename Products::Factor> x[kVectors];
      HWY_UNROLL(4)
      for (int v = 0; v < kVectors; ++v) x[v] = hn::BitCast(factor, hn::LoadU(U16(), values + v * kWords));
      HWY_UNROLL(4)
      for (int r = 0; r < kRows; ++r) {
        HWY_UNROLL(2)
        for (int part = 0; part < kParts; ++part) {
          const std::int32_t w = weight_pair(weights + part * part_stride + r * row_stride);
          const auto weight = hn::BitCast(factor, hn::Set(I32(), w));
          HWY_UNROLL(4)
          for (int v = 0; v < kVectors; ++v) add_dot(a[r][v], x[v], weight);
        }
      }
    }
  }
  HWY_UNROLL(4)
  for (int r = 0; r < kRows; ++r) {
    HWY_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) {
      float* to = acc + static_cast<std::int64_t>(r) * acc_stride + v * kFloats;
      if constexpr (kInteger) {
        hn::StoreU(hn::MulAdd(hn::ConvertTo(F32(), a[r][v]), hn::Set(F32(), unit[r]), hn::LoadU(F32(), to)), F32(), to);
      } else {
        hn::StoreU(a[r][v], F32(), to);
      }
    }
  }
}

// Weights [kParts][num_rows][row_stride], of which 2 * num_pairs are used.
struct WeightRows {
  const std::uint16_t* data;
  std::int64_t row_stride, part_stride;
  int num_rows, num_pairs;
};

template <class Products, int kVectors, int kParts>
void accumulate_columns(const WeightRows& weights, const std::uint16_t* values, std::int64_t pair_stride,
                        const float* unit, float* acc, int acc_stride, Prefetch& prefetch) {
  for (int m = 0; m < weights.num_rows;) {
    const auto rows = [&]<int kRows>() {
      accumulate_values_block<Products, kRows, kVectors, kParts>(
          weights.data + m * weights.row_stride, weights.row_stride, weights.part_stride, weights.num_pairs, values,
          pair_stride, unit + m, acc + static_cast<std::int64_t>(m) * acc_stride, acc_stride, prefetch);
      m += kRows;
    };
    switch (weights.num_rows - m) {
      case 1:
        rows.template operator()<1>();
        break;
      case 2:
        rows.template operator()<2>();
        break;
      case 3:
        rows.template operator()<3>();
        break;
      default:
        rows.template operator()<4>();
    }
  }
}

template <class Products, int kParts>
void accumulate_pairs(const WeightRows& weights, const std::uint16_t* values, int positions, std::int64_t pair_stride,
                      const float* unit, float* acc, int acc_stride, Prefetch& prefetch) {
  const int vectors = positions / kFloats;
  int v = 0;
  const auto columns = [&]<int kVectors>() {
    accumulate_columns<Products, kVectors, kParts>(weights, values + v * kWords, pair_stride, unit, acc + v * kFloats,
                                                   acc_stride, prefetch);
    v += kVectors;
  };
  while (v + 4 <= vectors) columns.template operator()<4>();
  while (v < vectors) columns.template operator()<1>();
}
void accumulate_values(Operand operand, const std::uint16_t* weights, int num_rows, int num_keys,
                       const std::uint16_t* values, int positions, const float* unit, float* acc, int acc_stride,
                       Prefetch& prefetch) {
  const WeightRows rows{weights, kKeyTile, static_cast<std::int64_t>(num_rows) * kKeyTile, num_rows,
                        (num_keys + 1) / 2};
  with_products(operand, [&]<class Products>() HWY_ATTR {
    constexpr int kParts = std::is_same_v<Products, Int16Products> ? 1 : 2;
    accumulate_pairs<Products, kParts>(rows, values, positions, std::int64_t{2} * positions, unit, acc, acc_stride,
                                       prefetch);
  });
}

void dot_columns(Operand operand, const QueryOperands& queries, int num_rows, const std::uint16_t* columns,
                 float* scores, Prefetch& prefetch) {
  std::fill_n(scores, static_cast<std::int64_t>(num_rows) * kKeyTile, 0.0F);
  const WeightRows rows{queries.data, queries.positions, queries.part_stride, num_rows, queries.positions / 2};
  with_products(operand, [&]<class Products>() HWY_ATTR {
    const auto run = [&]<int kParts>() HWY_ATTR {
      accumulate_pairs<Products, kParts>(rows, columns, kKeyTile, std::int64_t{2} * kKeyTile, queries.step, scores,
                                         kKeyTile, prefetch);
    };
    if constexpr (!std::is_same_v<Products, Int16Products>) {
      if (queries.parts == 2) return run.template operator()<2>();
    }
    run.template operator()<1>();
  });
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace quire::cpu
HWY_AFTER_NAMESPACE();
#endif  // QUIRE_CPU_HAS_PAIRS

#endif  // QUIRE_CPU_PRODUCTS_INL_H_
