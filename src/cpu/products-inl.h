// Products of 16-bit operands. Their forms are those of kernels.h; B is the number of 16-byte blocks of a vector.
//
// Q K': 8 elements of a key are loaded once into every block of a vector and multiplied by those of B query rows, one a
// block. The sum of a key is a vector: 4 partial sums for each row. Four keys reduce to one vector by 6 shuffles.
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
                            std::uint16_t* second) {
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
  const auto nan = hn::Set(U32(), 0x7fc0);
  for (int i = 0; i < q_stride; i += kFloats) {
    const auto x = hn::LoadU(d, row + i);
    const auto high = hn::IfThenElse(hn::RebindMask(U32(), hn::IsNaN(x)), nan, to_bfloat16(x));
    store_words(high, codes + i);
    const auto rest = hn::Sub(x, hn::BitCast(d, hn::ShiftLeft<16>(high)));
    // Of what is not finite there is no rest: the difference is a NaN.
    if (second != nullptr) store_words(to_bfloat16(hn::IfThenElseZero(hn::Eq(rest, rest), rest)), second + i);
  }
  return 1.0F;
}

void make_queries(Operand operand, const float* q, int num_rows, int q_stride, const std::int16_t* element_of,
                  float largest, QueryOperands& queries) {
  const int positions = queries.positions;
  std::fill_n(queries.data, static_cast<std::int64_t>(queries.num_sets) * queries.parts * positions * kBlocks, 0);
  std::fill_n(queries.step, queries.num_sets * kBlocks * 4, 0.0F);
  HWY_ALIGN std::uint16_t codes[2][format::kMaxHeadSize + kLaneAlign];
  for (int m = 0; m < num_rows; ++m) {
    const float* row = q + static_cast<std::int64_t>(m) * q_stride;
    const float step = make_codes(operand, row, q_stride, largest, codes[0], queries.parts == 2 ? codes[1] : nullptr);
    std::uint16_t* set =
        queries.data + static_cast<std::int64_t>(m / kBlocks) * queries.parts * positions * kBlocks + m % kBlocks * 8;
    for (int part = 0; part < queries.parts; ++part) {
      for (int p = 0; p < positions; p += 8, set += 8 * kBlocks) {
        for (int i = 0; i < 8; ++i) {
          const int element = element_of[p + i];
          if (element >= 0) set[i] = codes[part][element];
        }
      }
    }
    std::fill_n(queries.step + 4 * m, 4, step);
  }
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

// Block b of x to row b of scores.
HWY_INLINE void store_blocks(hn::Vec<F32> x, float* scores) {
#if QUIRE_CPU_WORDS_512
  _mm_storeu_ps(scores, _mm512_castps512_ps128(x.raw));
  _mm_storeu_ps(scores + kKeyTile, _mm512_extractf32x4_ps(x.raw, 1));
  _mm_storeu_ps(scores + 2 * kKeyTile, _mm512_extractf32x4_ps(x.raw, 2));
  _mm_storeu_ps(scores + 3 * kKeyTile, _mm512_extractf32x4_ps(x.raw, 3));
#else
  HWY_ALIGN float blocks[kFloats];
  hn::Store(x, F32(), blocks);
  for (int b = 0; b < kBlocks; ++b) std::memcpy(scores + b * kKeyTile, blocks + 4 * b, 16);
#endif
}

// kSets sets of rows by kKeys keys.
template <class Products, int kSets, int kKeys>
HWY_INLINE void dot_keys_block(const QueryOperands& queries, int first_set, const std::uint8_t* const* keys,
                               float* scores, Prefetch& prefetch) {
  const typename Products::Sum sum;
  const typename Products::Factor factor;
  // Two sums of each where there are few, which wait for each other less.
  constexpr int kChains = kSets == 1 ? 2 : 1;
  hn::Vec<typename Products::Sum> acc[kChains][kSets][kKeys];
  HWY_UNROLL(2)
  for (int c = 0; c < kChains; ++c) {
    HWY_UNROLL(4)
    for (int s = 0; s < kSets; ++s) {
      HWY_UNROLL(8)
      for (int k = 0; k < kKeys; ++k) acc[c][s][k] = hn::Zero(sum);
    }
  }
  const std::uint8_t* rows[kKeys];
  HWY_UNROLL(8)
  for (int k = 0; k < kKeys; ++k) rows[k] = keys[k];
  const int part_words = queries.positions * kBlocks;
  const std::int64_t set_words = static_cast<std::int64_t>(queries.parts) * part_words;
  const std::uint16_t* q = queries.data + first_set * set_words;
  const int bytes = queries.positions * 2;
  const auto eight = [&]<int kChain>(const std::uint16_t* at, int i) HWY_ATTR {
    hn::Vec<typename Products::Factor> query[kSets];
    HWY_UNROLL(4)
    for (int s = 0; s < kSets; ++s) query[s] = hn::BitCast(factor, hn::LoadU(U16(), at + s * set_words));
    HWY_UNROLL(8)
    for (int k = 0; k < kKeys; ++k) {
      const auto key = hn::BitCast(factor, hn::LoadDup128(U8(), rows[k] + i));
      HWY_UNROLL(4)
      for (int s = 0; s < kSets; ++s) add_dot(acc[kChain][s][k], query[s], key);
    }
  };
  for (int part = 0; part < queries.parts; ++part, q += part_words) {
    constexpr int kStep = 128;  // in the inner loop its branches would cost registers
    for (int i = 0; i < bytes;) {
      prefetch.after(kSets * kKeys * kStep / 16);
      const int end = i + kStep < bytes ? i + kStep : bytes;
      for (; i + 32 <= end; i += 32) {
        eight.template operator()<0>(q + i / 2 * kBlocks, i);
        eight.template operator()<kChains - 1>(q + (i / 2 + 8) * kBlocks, i + 16);
      }
      if (i < end) {
        eight.template operator()<0>(q + i / 2 * kBlocks, i);
        i += 16;
      }
    }
  }
  if constexpr (kChains == 2) {
    HWY_UNROLL(8)
    for (int k = 0; k < kKeys; ++k) acc[0][0][k] = hn::Add(acc[0][0][k], acc[1][0][k]);
  }
  HWY_UNROLL(4)
  for (int s = 0; s < kSets; ++s) {
    const auto step = hn::LoadU(F32(), queries.step + (first_set + s) * kBlocks * 4);
    float* out = scores + static_cast<std::int64_t>(first_set + s) * kBlocks * kKeyTile;
    HWY_UNROLL(8)
    for (int k = 0; k < kKeys; k += 4) {
      const auto four = reduce4<Products>(acc[0][s][k], acc[0][s][k + 1], acc[0][s][k + 2], acc[0][s][k + 3]);
      store_blocks(hn::Mul(Products::to_float(four), step), out + k);
    }
  }
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

template <class Products>
void dot_keys_of(const QueryOperands& queries, const std::uint8_t* const* keys, int num_keys, float* scores,
                 Prefetch& prefetch) {
  int set = 0;
  for (; set + 4 <= queries.num_sets; set += 4) {
    for (int k = 0; k < num_keys; k += 4) {
      dot_keys_block<Products, 4, 4>(queries, set, keys + k, scores + k, prefetch);
    }
  }
  for (; set + 2 <= queries.num_sets; set += 2) {
    for (int k = 0; k < num_keys; k += 4) {
      dot_keys_block<Products, 2, 4>(queries, set, keys + k, scores + k, prefetch);
    }
  }
  for (; set < queries.num_sets; ++set) {
    for (int k = 0; k < num_keys; k += 8) {
      dot_keys_block<Products, 1, 8>(queries, set, keys + k, scores + k, prefetch);
    }
  }
}
void dot_keys(Operand operand, const QueryOperands& queries, const std::uint8_t* const* keys, int num_keys,
              float* scores, Prefetch& prefetch) {
  if (operand == Operand::kBFloat16) return dot_keys_of<BFloat16Products>(queries, keys, num_keys, scores, prefetch);
  dot_keys_of<Int16Products>(queries, keys, num_keys, scores, prefetch);
}

// The weights of two tokens.
HWY_INLINE std::int32_t weight_pair(const std::uint16_t* weights) {
  std::int32_t pair;
  std::memcpy(&pair, weights, sizeof(pair));
  return pair;
}

// kRows rows by kVectors vectors of positions.
template <class Products, int kRows, int kVectors, int kParts>
HWY_INLINE void accumulate_values_block(const std::uint16_t* weights, std::int64_t part_stride, int num_pairs,
                                        const std::uint16_t* values, std::int64_t pair_stride, const float* unit,
                                        float* acc, int acc_stride, Prefetch& prefetch) {
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
          const std::int32_t w = weight_pair(weights + part * part_stride + r * kKeyTile);
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

template <class Products, int kVectors, int kParts>
void accumulate_columns(const std::uint16_t* weights, int num_rows, int num_pairs, const std::uint16_t* values,
                        std::int64_t pair_stride, const float* unit, float* acc, int acc_stride, Prefetch& prefetch) {
  const std::int64_t part_stride = static_cast<std::int64_t>(num_rows) * kKeyTile;
  for (int m = 0; m < num_rows;) {
    const std::uint16_t* w = weights + static_cast<std::int64_t>(m) * kKeyTile;
    float* to = acc + static_cast<std::int64_t>(m) * acc_stride;
    const auto rows = [&]<int kRows>() {
      accumulate_values_block<Products, kRows, kVectors, kParts>(w, part_stride, num_pairs, values, pair_stride,
                                                                 unit + m, to, acc_stride, prefetch);
      m += kRows;
    };
    switch (num_rows - m) {
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
void accumulate_values_of(const std::uint16_t* weights, int num_rows, int num_keys, const std::uint16_t* values,
                          int positions, const float* unit, float* acc, int acc_stride, Prefetch& prefetch) {
  const int vectors = positions / kFloats;
  const int num_pairs = (num_keys + 1) / 2;
  const std::int64_t pair_stride = static_cast<std::int64_t>(positions) * 2;
  int v = 0;
  const auto columns = [&]<int kVectors>() {
    accumulate_columns<Products, kVectors, kParts>(weights, num_rows, num_pairs, values + v * kWords, pair_stride, unit,
                                                   acc + v * kFloats, acc_stride, prefetch);
    v += kVectors;
  };
  while (v + 4 <= vectors) columns.template operator()<4>();
  while (v < vectors) columns.template operator()<1>();
}
void accumulate_values(Operand operand, const std::uint16_t* weights, int num_rows, int num_keys,
                       const std::uint16_t* values, int positions, const float* unit, float* acc, int acc_stride,
                       Prefetch& prefetch) {
  const auto run =
      operand == Operand::kInt16 ? &accumulate_values_of<Int16Products, 1> : &accumulate_values_of<BFloat16Products, 2>;
  run(weights, num_rows, num_keys, values, positions, unit, acc, acc_stride, prefetch);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace quire::cpu
HWY_AFTER_NAMESPACE();
#endif  // QUIRE_CPU_HAS_PAIRS

#endif  // QUIRE_CPU_PRODUCTS_INL_H_
