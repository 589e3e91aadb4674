// Decode: a tile of few query rows, no more than a vector has blocks of 16 bytes. Each operand meets so few rows that
// making it in memory and loading it again would cost as much as its products, so codes become operands in registers,
// between the load of a code and its products:
//
//   keys     int8 and int4 as bytes, unsigned, by the two bytes of a 16-bit query: half the vectors of 16-bit operands.
//            Sums are of the same integers as those of dot_keys, so they have the same bits.
//   values   as load_values makes them, for 4 vectors of positions at a time.
#if defined(QUIRE_CPU_FEW_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_CPU_FEW_ROWS_INL_H_
#undef QUIRE_CPU_FEW_ROWS_INL_H_
#else
#define QUIRE_CPU_FEW_ROWS_INL_H_
#endif

#include "cpu/operands-inl.h"

#if QUIRE_CPU_HAS_PAIRS
HWY_BEFORE_NAMESPACE();
namespace quire::cpu {
namespace HWY_NAMESPACE {
namespace {

// ---- keys as bytes

template <class F>
constexpr bool kKeysAsBytes =
    std::is_same_v<F, format::Int8PerTokenHead> || std::is_same_v<F, format::Int4PerTokenHead>;

template <class F>
bool takes_key_bytes(format::RowShape shape) {
#ifdef QUIRE_CPU_VNNI
  return kKeysAsBytes<F> && format::code_bytes<F>(shape.head_size) % 16 == 0;
#else
  (void)shape;
  return false;
#endif
}

#ifdef QUIRE_CPU_VNNI
// What is added to a level to make its byte: 2^(bits - 1).
template <class F>
constexpr int kByteCentre = 1 << (kCodeBits<F> - 1);

// Queries of a set: for 16 bytes of codes, the first (and the second) code of each, in high bytes and low bytes:
// [code_bytes / 16][codes of a byte][2][blocks][16]. queries.centre[m][4] is kByteCentre times the sum of row m.
template <class F>
void make_byte_queries(const float* q, int num_rows, int q_stride, format::RowShape shape, float largest,
                       QueryOperands& queries) {
  constexpr int kCodes = 8 / kCodeBits<F>;
  const int size = shape.head_size;
  auto* bytes = reinterpret_cast<std::int8_t*>(queries.data);
  std::fill_n(bytes, 2 * size * kBlocks, std::int8_t{0});
  std::fill_n(queries.byte_step, kBlocks * 4, 0.0F);
  std::fill_n(queries.centre, kBlocks * 4, 0);
  for (int m = 0; m < num_rows; ++m) {
    const float* row = q + static_cast<std::int64_t>(m) * q_stride;
    HWY_ALIGN std::uint16_t codes[format::kMaxHeadSize + kLaneAlign];
    const float step = make_codes(Operand::kInt16, row, q_stride, largest, codes, nullptr);
    std::int32_t sum = 0;
    for (int i = 0; i < size; ++i) {
      const std::int32_t code = static_cast<std::int16_t>(codes[i]);
      const int high = (code + 128) >> 8;
      std::int8_t* at = bytes + ((i / (16 * kCodes) * kCodes + i % kCodes) * 2 * kBlocks + m) * 16 + i / kCodes % 16;
      at[0] = static_cast<std::int8_t>(high);
      at[16 * kBlocks] = static_cast<std::int8_t>(code - 256 * high);
      sum += code;
    }
    std::fill_n(queries.byte_step + 4 * m, 4, step);
    // Beyond 32 bits it wraps around as the sums of products do; their difference fits.
    std::fill_n(queries.centre + 4 * m, 4, static_cast<std::int32_t>(static_cast<std::uint32_t>(sum) * kByteCentre<F>));
  }
}

template <class F>
void dot_key_bytes(const TileRows& rows, format::RowShape shape, const QueryOperands& queries, float* scores,
                   Prefetch& prefetch) {
  Prefetch ahead = prefetch;
  constexpr int kKeys = 8;
  const int chunks = static_cast<int>(format::code_bytes<F>(shape.head_size)) / 16;
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80)), low_half = _mm512_set1_epi8(15);
  const __m512i centre = _mm512_loadu_si512(queries.centre);
  const __m512 step = _mm512_loadu_ps(queries.byte_step);
  for (int first = 0; first < rows.num_rows; first += kKeyGroup) {
    __m512i four[kKeyGroup / 4];
    HWY_UNROLL(4)
    for (int part = 0; part < kKeyGroup; part += kKeys) {
      const std::uint8_t* key[kKeys];
      HWY_UNROLL(8)
      for (int k = 0; k < kKeys; ++k) {
        const int n = first + part + k;
        key[k] = rows.data(n < rows.num_rows ? n : rows.num_rows - 1);
      }
      __m512i high[kKeys], low[kKeys];
      HWY_UNROLL(8)
      for (int k = 0; k < kKeys; ++k) high[k] = low[k] = _mm512_setzero_si512();
      ahead.after(kKeys * 2 * (8 / kCodeBits<F>)*chunks);
      const std::uint16_t* q = queries.data;
      for (int c = 0; c < chunks; ++c) {
        const auto query = [&](int i) HWY_ATTR { return _mm512_loadu_si512(q + i * kWords); };
        if constexpr (kCodeBits<F> == 8) {
          const __m512i q_high = query(0), q_low = query(1);
          HWY_UNROLL(8)
          for (int k = 0; k < kKeys; ++k) {
            const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(key[k] + 16 * c));
            const __m512i x = _mm512_xor_si512(_mm512_broadcast_i32x4(codes), flip);
            add_dot_bytes(high[k], x, q_high);
            add_dot_bytes(low[k], x, q_low);
          }
          q += 2 * kWords;
        } else {
          const __m512i q_high = query(0), q_low = query(1), odd_high = query(2), odd_low = query(3);
          HWY_UNROLL(8)
          for (int k = 0; k < kKeys; ++k) {
            const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(key[k] + 16 * c));
            const __m512i x = _mm512_broadcast_i32x4(codes);
            const __m512i even = _mm512_and_si512(x, low_half);
            const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(x, 4), low_half);
            add_dot_bytes(high[k], even, q_high);
            add_dot_bytes(low[k], even, q_low);
            add_dot_bytes(high[k], odd, odd_high);
            add_dot_bytes(low[k], odd, odd_low);
          }
          q += 4 * kWords;
        }
      }
      HWY_UNROLL(8)
      for (int k = 0; k < kKeys; ++k) high[k] = _mm512_add_epi32(_mm512_slli_epi32(high[k], 8), low[k]);
      HWY_UNROLL(2)
      for (int k = 0; k < kKeys; k += 4) {
        const auto sum = reduce4<Int16Products>(hn::Vec<I32>{high[k]}, hn::Vec<I32>{high[k + 1]},
                                                hn::Vec<I32>{high[k + 2]}, hn::Vec<I32>{high[k + 3]});
        const __m512 score = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum.raw, centre)), step);
        four[(part + k) / 4] = _mm512_castps_si512(score);
      }
    }
    transpose_blocks(four);
    for (int m = 0; m < 4; ++m) _mm512_storeu_si512(scores + m * kKeyTile + first, four[m]);
  }
  prefetch = ahead;
}
#endif  // QUIRE_CPU_VNNI

// ---- values in registers

// Codes of levels that are the code and a number: no table is needed, and the number times the sum of the weights comes
// in once.
template <class F>
constexpr bool kLinearCodes = std::is_same_v<F, format::Int4PerTokenHead> || std::is_same_v<F, format::TurboQuantV4> ||
                              std::is_same_v<F, format::TurboQuantV3>;

template <class F>
bool takes_few_rows(format::RowShape shape) {
  const int words = num_row_words<F>(shape);
  const int step = kCodeBits<F> == 16 ? 2 * kWords : (kPerWord<F> > 2 && kCodeBits<F> != 3 ? kWords / 2 : kWords);
  return words % step == 0 && value_positions<F>(shape) % (4 * kFloats) == 0;
}

// Operands of positions 4 * kFloats * pass on, of two rows in turns.
template <class F>
struct ValuePair {
  static constexpr int kPer = kPerWord<F>;
  Unpacker<F, true> unpack;
  int code_bytes, whole_halves;

  explicit ValuePair(format::RowShape shape)
      : code_bytes(static_cast<int>(format::code_bytes<F>(shape.head_size))),
        whole_halves(num_row_words<F>(shape) / kWords * 2) {}

  template <bool kUpper>
  HWY_INLINE VU16 half_of(const std::uint8_t* a, const std::uint8_t* b, int half) const {
    if constexpr (kCodeBits<F> != 3) {
      if (half >= whole_halves) return interleave_halves(a + half * kWords, b + half * kWords);
    }
    const VU16 x = row_words<F>(a, code_bytes, half / 2), y = row_words<F>(b, code_bytes, half / 2);
    return kUpper ? hn::InterleaveUpper(U16(), x, y) : hn::InterleaveLower(U16(), x, y);
  }
  // kOdd: what a pass of an odd number does differently.
  template <bool kOdd>
  HWY_INLINE void operator()(const std::uint8_t* a, const std::uint8_t* b, int pass, VU16 (&x)[4]) const {
    if constexpr (kPer == 1) {
      for (int i = 0; i < 2; ++i) {
        const int at = (2 * pass + i) * 2 * kWords;
        interleave(load_words(a + at, 2 * kWords), load_words(b + at, 2 * kWords), x[2 * i], x[2 * i + 1]);
      }
    } else if constexpr (kPer == 2) {
      VU16 words[2], out[2];
      interleave(row_words<F>(a, code_bytes, pass), row_words<F>(b, code_bytes, pass), words[0], words[1]);
      for (int i = 0; i < 2; ++i) {
        unpack(words[i], out);
        x[2 * i] = out[0];
        x[2 * i + 1] = out[1];
      }
    } else if constexpr (kPer == 4) {
      unpack.template four<kLinearCodes<F>, 0>(half_of<kOdd>(a, b, pass), x);
    } else {
      // A pass takes half of the codes of each word: the first ones, or where it is odd the others.
      const VU16 words = pass & 2 ? half_of<true>(a, b, pass / 2) : half_of<false>(a, b, pass / 2);
      unpack.template four<kLinearCodes<F>, (kOdd ? 4 : 0)>(words, x);
    }
  }
};

template <class F, int kRows, bool kOdd>
HWY_INLINE void accumulate_pass(const TileRows& rows, const ValuePair<F>& pair, int pass, const std::uint16_t* weights,
                                const float* unit, const std::int32_t* start, float* acc, int acc_stride,
                                Prefetch& prefetch) {
  using Products = ProductsOf<kOperandOf<F>>;
  constexpr bool kInteger = std::is_same_v<Products, Int16Products>;
  constexpr int kParts = weight_parts(kOperandOf<F>);
  const typename Products::Sum sum;
  const typename Products::Factor factor;
  hn::Vec<typename Products::Sum> a[kRows][4];
  HWY_UNROLL(4)
  for (int r = 0; r < kRows; ++r) {
    HWY_UNROLL(4)
    for (int v = 0; v < 4; ++v) {
      if constexpr (kInteger) {
        a[r][v] = hn::Set(sum, start[r]);
      } else {
        a[r][v] = hn::LoadU(sum, acc + static_cast<std::int64_t>(r) * acc_stride + v * kFloats);
      }
    }
  }
  // Stands in for the second row of a pair that has none: its weight is 0.
  alignas(64) static constexpr std::uint8_t kZeros[format::kMaxHeadSize * 2] = {};
  const int num_keys = rows.num_rows;
  Prefetch ahead = prefetch;
  for (int n = 0; n < num_keys; n += 2) {
    if (n % 8 == 0) ahead.after(4 * kRows * 4 * kParts);
    VU16 x[4];
    pair.template operator()<kOdd>(rows.data(n), n + 1 < num_keys ? rows.data(n + 1) : kZeros, pass, x);
    HWY_UNROLL(4)
    for (int r = 0; r < kRows; ++r) {
      HWY_UNROLL(2)
      for (int part = 0; part < kParts; ++part) {
        const std::int32_t w = weight_pair(weights + (part * kRows + r) * kKeyTile + n);
        const auto weight = hn::BitCast(factor, hn::Set(I32(), w));
        HWY_UNROLL(4)
        for (int v = 0; v < 4; ++v) add_dot(a[r][v], hn::BitCast(factor, x[v]), weight);
      }
    }
  }
  prefetch = ahead;
  HWY_UNROLL(4)
  for (int r = 0; r < kRows; ++r) {
    HWY_UNROLL(4)
    for (int v = 0; v < 4; ++v) {
      float* to = acc + static_cast<std::int64_t>(r) * acc_stride + v * kFloats;
      if constexpr (kInteger) {
        hn::StoreU(hn::MulAdd(hn::ConvertTo(F32(), a[r][v]), hn::Set(F32(), unit[r]), hn::LoadU(F32(), to)), F32(), to);
      } else {
        hn::StoreU(a[r][v], F32(), to);
      }
    }
  }
}

// What the accumulators of a row begin with: the number of kLinearCodes times the sum of the row's weights.
template <class F>
HWY_INLINE std::int32_t start_of(const std::uint16_t* weights, int num_keys) {
  if constexpr (!kLinearCodes<F>) return 0;
  auto total = hn::Zero(I32());
  for (int n = 0; n < padded(num_keys); n += kLaneAlign) {
    for (int i = n; i < n + kLaneAlign; i += kFloats) {
      const hn::Rebind<std::int16_t, I32> half;
      total = hn::Add(total, hn::PromoteTo(I32(), hn::LoadU(half, reinterpret_cast<const std::int16_t*>(weights + i))));
    }
  }
  const auto first = static_cast<std::int16_t>(operand_table<F>().entries[0]);
  return hn::GetLane(hn::SumOfLanes(I32(), total)) * first;
}

template <class F, int kRows>
void accumulate_few_of(const TileRows& rows, format::RowShape shape, const std::uint16_t* weights, const float* unit,
                       float* acc, int acc_stride, Prefetch& prefetch) {
  const ValuePair<F> pair(shape);
  const int passes = value_positions<F>(shape) / (4 * kFloats);
  std::int32_t start[kRows];
  for (int r = 0; r < kRows; ++r) start[r] = start_of<F>(weights + r * kKeyTile, rows.num_rows);
  for (int pass = 0; pass < passes; ++pass) {
    float* to = acc + pass * 4 * kFloats;
    if (pass % 2 == 0) {
      accumulate_pass<F, kRows, false>(rows, pair, pass, weights, unit, start, to, acc_stride, prefetch);
    } else {
      accumulate_pass<F, kRows, true>(rows, pair, pass, weights, unit, start, to, acc_stride, prefetch);
    }
  }
}

template <class F>
void accumulate_few(const TileRows& rows, format::RowShape shape, const std::uint16_t* weights, int num_rows,
                    const float* unit, float* acc, int acc_stride, Prefetch& prefetch) {
  static_assert(kBlocks <= 4);
  if (num_rows == 1) return accumulate_few_of<F, 1>(rows, shape, weights, unit, acc, acc_stride, prefetch);
  if constexpr (kBlocks > 1) {
    if (num_rows == 2) return accumulate_few_of<F, 2>(rows, shape, weights, unit, acc, acc_stride, prefetch);
  }
  if constexpr (kBlocks > 2) {
    if (num_rows == 3) return accumulate_few_of<F, 3>(rows, shape, weights, unit, acc, acc_stride, prefetch);
    accumulate_few_of<F, 4>(rows, shape, weights, unit, acc, acc_stride, prefetch);
  }
}

template <class F>
OperandFormat operand_format() {
  OperandFormat format;
  if constexpr (format::format_enabled<F>() && kOperandOf<F> != Operand::kFloat32) {
    format.operand = kOperandOf<F>;
    format.max_level = OperandOf<F>::kMaxLevel;
    format.keys_in_place = kCodeBits<F> == 16;
    format.per_word = kPerWord<F>;
    format.has_offset = F::kHasOffset;
    format.key_positions = &key_positions<F>;
    format.value_positions = &value_positions<F>;
    format.key_order = &key_order<F>;
    format.value_order = &value_order<F>;
    format.load_keys = &load_keys<F>;
    format.load_affines = &load_affines<F>;
    format.load_values = &load_values<F>;
    format.takes_key_bytes = &takes_key_bytes<F>;
#ifdef QUIRE_CPU_VNNI
    if constexpr (kKeysAsBytes<F>) {
      format.make_byte_queries = &make_byte_queries<F>;
      format.dot_key_bytes = &dot_key_bytes<F>;
    }
#endif
    format.takes_few_rows = &takes_few_rows<F>;
    format.accumulate_few = &accumulate_few<F>;
    if constexpr (F::kLevelNorm) format.divide_by_norms = &divide_by_norms;
#ifdef QUIRE_CPU_ZEN4
    if constexpr (kOperandOf<F> == Operand::kBFloat16) format.values_finite = &values_finite;
#endif
  }
  return format;
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace quire::cpu
HWY_AFTER_NAMESPACE();
#endif  // QUIRE_CPU_HAS_PAIRS

#endif  // QUIRE_CPU_FEW_ROWS_INL_H_
