// A format's rows as 16-bit operands (kernels.h). Codes of 1, 2, 4 or 8 a word are taken out of the words of a row by
// shifts and become operands by look-ups; which operand a code is, the format's own unpack() says. So a row's elements
// come out of order: word w holds elements from w * kPerWord on, and a vector the o-th element of each of its words.
// The query and the output are put into that order once (key_order, value_order) instead.
//
//     4 bits, d = 128:   32 words  ->  [0 4 8 ... 124] [1 5 9 ... 125] [2 6 ...] [3 7 ...]
//
// 3-bit codes, 8 in 3 bytes: bytes 0 and 1 make a word with codes 0 to 3 at bits 0, 3, 6 and 9, bytes 1 and 2 one with
// codes 4 to 7 at bits 4, 7, 10 and 13; so 4 a word.
#if defined(QUIRE_CPU_OPERANDS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_CPU_OPERANDS_INL_H_
#undef QUIRE_CPU_OPERANDS_INL_H_
#else
#define QUIRE_CPU_OPERANDS_INL_H_
#endif

#include <cmath>

#include "cpu/levels-inl.h"
#include "cpu/operand.h"
#include "cpu/products-inl.h"
#include "cpu/vector-inl.h"
#include "format/float_types.h"

#if QUIRE_CPU_HAS_PAIRS
HWY_BEFORE_NAMESPACE();
namespace quire::cpu {
namespace HWY_NAMESPACE {
namespace {

template <class F>
constexpr int kCodeBits = 8 * F::kUnitBytes / F::kUnit;
template <class F>
constexpr int kPerWord = kCodeBits<F> == 3 ? 4 : 16 / kCodeBits<F>;

// The operand of every code of up to 8 bits; of those of fewer than 4 bits, whatever the bits above them. `low` and
// `high` are the bytes of the first 128.
template <class F>
struct OperandTable {
  static constexpr int kSize = kCodeBits<F> == 8 ? 256 : 16;
  alignas(64) std::uint16_t entries[kSize] = {};
  alignas(64) std::uint8_t low[128] = {}, high[128] = {};
  OperandTable() {
    if constexpr (kCodeBits<F> <= 8) {
      for (int code = 0; code < kSize; ++code) {
        // The first element of a unit has this code.
        const std::uint8_t bytes[F::kUnitBytes] = {static_cast<std::uint8_t>(code & ((1 << kCodeBits<F>)-1))};
        float levels[F::kUnit];
        F::unpack(bytes, levels);
        entries[code] = kOperandOf<F> == Operand::kBFloat16
                            ? format::float_to_bfloat16(levels[0])
                            : static_cast<std::uint16_t>(std::lrint(levels[0] / OperandOf<F>::kUnit));
      }
      for (int code = 0; code < 128; ++code) {
        low[code] = static_cast<std::uint8_t>(entries[code % kSize]);
        high[code] = static_cast<std::uint8_t>(entries[code % kSize] >> 8);
      }
    }
  }
};
template <class F>
const OperandTable<F>& operand_table() {
  static const OperandTable<F> table;
  return table;
}

// Takes the operands out of vectors of words. `kInPairs`: words of two rows take turns.
template <class F, bool kInPairs, int kCopies = 1>
struct Unpacker {
  static constexpr int kOutputs = kPerWord<F> / kCopies;

  HWY_INLINE void operator()(VU16 x, VU16 (&out)[kOutputs]) const {
    if constexpr (kCodeBits<F> == 16) {
      out[0] = x;
    } else if constexpr (kCodeBits<F> == 8 && kOperandOf<F> == Operand::kInt16) {
      const auto y = hn::BitCast(I16(), x);
      out[0] = hn::BitCast(U16(), hn::ShiftRight<8>(hn::ShiftLeft<8>(y)));
      out[1] = hn::BitCast(U16(), hn::ShiftRight<8>(y));
#ifdef QUIRE_CPU_ZEN4
    } else if constexpr (kCodeBits<F> == 8) {
      float8(x, out);
#endif
    } else {
      table4(x, out);
    }
  }

  // Outputs kFirst to kFirst + 3 of codes of fewer than 8 bits; kPlain: the codes themselves.
  template <bool kPlain, int kFirst>
  HWY_INLINE void four(VU16 x, VU16 (&out)[4]) const {
    HWY_UNROLL(4)
    for (int o = 0; o < 4; ++o) {
      VU16 code = x;
      if constexpr (kCodeBits<F> == 3) {
        code = shift_each(x, hn::Add(shift, hn::Set(U16(), static_cast<std::uint16_t>(o * kCodeBits<F>))));
      } else {
        if (kFirst + o > 0) code = shift_all(x, (kFirst + o) * kCodeBits<F>);
      }
      out[o] = kPlain ? hn::And(code, hn::Set(U16(), (1 << kCodeBits<F>)-1)) : table(code);
    }
  }

  Unpacker() : table(operand_table<F>().entries) {
    HWY_ALIGN std::uint16_t first_shift[kWords];
    for (int w = 0; w < kWords; ++w) {
      const int word = kInPairs ? w / 2 : w;
      const int by = kCodeBits<F> == 3 ? word % 2 * 4 : w / (kWords / kCopies) * kCodeBits<F>;
      first_shift[w] = static_cast<std::uint16_t>(by);
    }
    shift = hn::Load(U16(), first_shift);
#ifdef QUIRE_CPU_ZEN4
    for (int i = 0; i < 2; ++i) {
      low_bytes[i] = _mm512_load_si512(operand_table<F>().low + 64 * i);
      high_bytes[i] = _mm512_load_si512(operand_table<F>().high + 64 * i);
    }
#endif
  }

 private:
  static HWY_INLINE VU16 shift_each(VU16 x, VU16 by) {
#if QUIRE_CPU_WORDS_512
    return VU16{_mm512_srlv_epi16(x.raw, by.raw)};
#else
    return hn::Shr(x, by);
#endif
  }
  static HWY_INLINE VU16 shift_all(VU16 x, int by) {
#if QUIRE_CPU_WORDS_512
    return VU16{_mm512_srli_epi16(x.raw, static_cast<unsigned>(by))};
#else
    return hn::ShiftRightSame(x, by);
#endif
  }
  HWY_INLINE void table4(VU16 x, VU16 (&out)[kOutputs]) const {
    if constexpr (kCodeBits<F> == 3 || kCopies > 1) {
      for (int o = 0; o < kOutputs; ++o) {
        const VU16 by = hn::Add(shift, hn::Set(U16(), static_cast<std::uint16_t>(o * kCopies * kCodeBits<F>)));
        out[o] = table(shift_each(x, by));
      }
    } else {
      out[0] = table(x);
      if constexpr (kOutputs > 1) out[1] = table(hn::ShiftRight<kCodeBits<F>>(x));
      if constexpr (kOutputs > 2) {
        out[2] = table(hn::ShiftRight<2 * kCodeBits<F>>(x));
        out[3] = table(hn::ShiftRight<3 * kCodeBits<F>>(x));
      }
      if constexpr (kOutputs > 4) {
        out[4] = table(hn::ShiftRight<4 * kCodeBits<F>>(x));
        out[5] = table(hn::ShiftRight<5 * kCodeBits<F>>(x));
        out[6] = table(hn::ShiftRight<6 * kCodeBits<F>>(x));
        out[7] = table(hn::ShiftRight<7 * kCodeBits<F>>(x));
      }
    }
  }
#ifdef QUIRE_CPU_ZEN4
  // 8-bit floats: a sign and one of 128 magnitudes.
  HWY_INLINE void float8(VU16 x, VU16 (&out)[kOutputs]) const {
    const __m512i low = _mm512_permutex2var_epi8(low_bytes[0], x.raw, low_bytes[1]);
    const __m512i magnitude = _mm512_permutex2var_epi8(high_bytes[0], x.raw, high_bytes[1]);
    // 0xf8: a | (b & c)
    const __m512i high = _mm512_ternarylogic_epi32(magnitude, x.raw, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);
    const __m512i low_byte = _mm512_set1_epi16(0x00ff);
    // 0xca: a ? b : c, bit by bit
    out[0] = VU16{_mm512_ternarylogic_epi32(low_byte, low, _mm512_slli_epi16(high, 8), 0xca)};
    out[1] = VU16{_mm512_ternarylogic_epi32(low_byte, _mm512_srli_epi16(low, 8), high, 0xca)};
  }
#endif

  WordTable table;
  VU16 shift;
#ifdef QUIRE_CPU_ZEN4
  __m512i low_bytes[2], high_bytes[2];
#endif
};

// Vector `chunk` of the words of a row.
template <class F>
HWY_INLINE VU16 row_words(const std::uint8_t* row, int code_bytes, int chunk) {
  if constexpr (kCodeBits<F> != 3) {
    return load_words(row + chunk * 2 * kWords, code_bytes - chunk * 2 * kWords);
  } else {
    const std::uint8_t* from = row + chunk * (3 * kWords / 2);
    const int bytes = code_bytes - chunk * (3 * kWords / 2);
#ifdef QUIRE_CPU_ZEN4
    const __m512i x = load_partial(from, bytes < 48 ? bytes : 48).raw;
    const __m512i first =
        _mm512_set_epi8(47, 46, 46, 45, 44, 43, 43, 42, 41, 40, 40, 39, 38, 37, 37, 36, 35, 34, 34, 33, 32, 31, 31, 30,
                        29, 28, 28, 27, 26, 25, 25, 24, 23, 22, 22, 21, 20, 19, 19, 18, 17, 16, 16, 15, 14, 13, 13, 12,
                        11, 10, 10, 9, 8, 7, 7, 6, 5, 4, 4, 3, 2, 1, 1, 0);
    return VU16{_mm512_permutexvar_epi8(first, x)};
#else
    // The two bytes of each word, of 12 bytes a block.
    [[maybe_unused]] alignas(16) static constexpr std::uint8_t kTwo[16] = {0, 1, 1, 2, 3, 4,  4,  5,
                                                                           6, 7, 7, 8, 9, 10, 10, 11};
#if QUIRE_CPU_WORDS_512
    const __m512i x = load_partial(from, bytes < 48 ? bytes : 48).raw;
    const __m512i twelve = _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
    const __m512i two = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kTwo)));
    return VU16{_mm512_shuffle_epi8(_mm512_permutexvar_epi32(twelve, x), two)};
#else
#if HWY_TARGET == HWY_AVX2
    if (bytes >= 24) {
      const hn::CappedTag<std::uint8_t, 16> block;
      const auto x = hn::Combine(U8(), hn::LoadU(block, from + 8), hn::LoadU(block, from));
      // The second block begins 4 bytes before its 12.
      const auto four = hn::ConcatLowerUpper(U8(), hn::Set(U8(), 4), hn::Zero(U8()));
      return hn::BitCast(U16(), hn::TableLookupBytes(x, hn::Add(hn::LoadDup128(U8(), kTwo), four)));
    }
#endif
    HWY_ALIGN std::uint16_t words[kWords] = {};
    for (int g = 0; g < kWords / 2 && 3 * g < bytes; ++g) {
      std::memcpy(words + 2 * g, from + 3 * g, 2);
      std::memcpy(words + 2 * g + 1, from + 3 * g + 1, 2);
    }
    return hn::Load(U16(), words);
#endif
#endif
  }
}

constexpr int ceil_divide(int a, int b) { return (a + b - 1) / b; }

template <class F>
int num_row_words(format::RowShape shape) {
  return ceil_divide(shape.head_size, kPerWord<F>);
}

// Short rows: this many copies of a row fill a vector, each shifted to other codes.
template <class F>
int key_copies(format::RowShape shape) {
  if (kBlocks < 4 || kCodeBits < F >> 4 || kCodeBits<F> == 3) return 1;
  const std::int64_t bytes = format::code_bytes<F>(shape.head_size);
  return bytes == 32 ? 2 : (bytes == 16 ? 4 : 1);
}

template <class F>
int key_positions(format::RowShape shape) {
  if (kCodeBits<F> == 16) return ceil_divide(shape.head_size, kWords) * kWords;
  if (key_copies<F>(shape) > 1) return kWords * kPerWord<F> / key_copies<F>(shape);
  return ceil_divide(num_row_words<F>(shape), kWords) * kWords * kPerWord<F>;
}
template <class F>
int value_positions(format::RowShape shape) {
  return ceil_divide(num_row_words<F>(shape), kWords / 2) * (kWords / 2) * kPerWord<F>;
}

// Code `o` of word `word`.
template <class F>
std::int16_t element(format::RowShape shape, int word, int o) {
  const int at = kCodeBits<F> == 3 ? word / 2 * 8 + word % 2 * 4 + o : word * kPerWord<F> + o;
  return static_cast<std::int16_t>(word < num_row_words<F>(shape) && at < shape.head_size ? at : -1);
}
template <class F>
void key_order(format::RowShape shape, std::int16_t* element_of) {
  const int positions = key_positions<F>(shape);
  const int copies = key_copies<F>(shape);
  const int outputs = kPerWord<F> / copies;
  for (int p = 0; p < positions; ++p) {
    const int o = p / kWords % outputs, lane = p % kWords, lanes = kWords / copies;
    const int word = p / (kWords * outputs) * kWords + lane % lanes;
    element_of[p] = kCodeBits<F> == 16 ? static_cast<std::int16_t>(p < shape.head_size ? p : -1)
                                       : element<F>(shape, word, o * copies + lane / lanes);
  }
}
// Values of two rows take turns word by word. Of whole vectors of words, the first words of each block make one vector,
// the last ones the other (interleave); where a row ends with half of a vector, its words are in order.
template <class F>
void value_order(format::RowShape shape, std::int16_t* element_of) {
  const int positions = value_positions<F>(shape);
  constexpr int kLanes = kWords / 2;
  const int whole_halves = num_row_words<F>(shape) / kWords * 2;
  for (int p = 0; p < positions; ++p) {
    const int half = p / (kLanes * kPerWord<F>), lane = p % kLanes;
    const int word =
        half < whole_halves ? half / 2 * kWords + lane / 4 * 8 + half % 2 * 4 + lane % 4 : half * kLanes + lane;
    element_of[p] = element<F>(shape, word, p / kLanes % kPerWord<F>);
  }
}

template <class F, int kCopies>
HWY_INLINE void load_keys_of(const TileRows& rows, format::RowShape shape, std::uint16_t* keys) {
  const Unpacker<F, false, kCopies> unpack;
  constexpr int kOutputs = kPerWord<F> / kCopies;
  const int code_bytes = static_cast<int>(format::code_bytes<F>(shape.head_size));
  const int words = num_row_words<F>(shape);
  const int chunks = kCopies > 1 ? 1 : ceil_divide(words, kWords);
  for (int n = 0; n < rows.num_rows; ++n) {
    const std::uint8_t* row = rows.data(n);
    for (int c = 0; c < chunks; ++c) {
      VU16 x;
#if QUIRE_CPU_WORDS_512
      if constexpr (kCopies == 4) x = hn::BitCast(U16(), hn::LoadDup128(U8(), row));
      if constexpr (kCopies == 2) {
        x = VU16{_mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)))};
      }
#endif
      if constexpr (kCopies == 1) x = row_words<F>(row, code_bytes, c);
      VU16 out[kOutputs];
      unpack(x, out);
      if (F::kLevelNorm && kCopies == 1 && (c + 1) * kWords > words) {  // padding is no part of the norm
        const auto valid = hn::FirstN(U16(), static_cast<std::size_t>(words - c * kWords));
        for (int o = 0; o < kOutputs; ++o) out[o] = hn::IfThenElseZero(valid, out[o]);
      }
      for (int o = 0; o < kOutputs; ++o) hn::StoreU(out[o], U16(), keys + o * kWords);
      keys += kOutputs * kWords;
    }
  }
}
template <class F>
void load_keys(const TileRows& rows, format::RowShape shape, std::uint16_t* keys) {
  if constexpr (kCodeBits<F> <= 4 && kCodeBits<F> != 3 && kBlocks == 4) {
    if (key_copies<F>(shape) == 2) return load_keys_of<F, 2>(rows, shape, keys);
    if (key_copies<F>(shape) == 4) return load_keys_of<F, 4>(rows, shape, keys);
  }
  load_keys_of<F, 1>(rows, shape, keys);
}

template <class F>
void load_values(const TileRows& rows, format::RowShape shape, std::uint16_t* values) {
  // Stands in for the second row of a pair that has none: its weight is 0.
  alignas(64) static constexpr std::uint8_t kZeros[format::kMaxHeadSize * 2] = {};
  const Unpacker<F, true> unpack;
  const int code_bytes = static_cast<int>(format::code_bytes<F>(shape.head_size));
  const int halves = ceil_divide(num_row_words<F>(shape), kWords / 2);
  const int whole_halves = num_row_words<F>(shape) / kWords * 2;
  for (int n = 0; n < rows.num_rows; n += 2) {
    const std::uint8_t* a = rows.data(n);
    const std::uint8_t* b = n + 1 < rows.num_rows ? rows.data(n + 1) : kZeros;
    for (int h = 0; h < halves; h += 2) {
      VU16 x[2];
      const VU16 from_a = row_words<F>(a, code_bytes, h / 2);
      const VU16 from_b = row_words<F>(b, code_bytes, h / 2);
      if (h < whole_halves) {
        interleave(from_a, from_b, x[0], x[1]);
      } else {
        HWY_ALIGN std::uint8_t bytes[2][2 * kWords];
        hn::Store(hn::BitCast(U8(), from_a), U8(), bytes[0]);
        hn::Store(hn::BitCast(U8(), from_b), U8(), bytes[1]);
        x[0] = interleave_halves(bytes[0], bytes[1]);
        x[1] = interleave_halves(bytes[0] + kWords, bytes[1] + kWords);
      }
      for (int i = 0; i < 2 && h + i < halves; ++i) {
        VU16 out[kPerWord<F>];
        unpack(x[i], out);
        for (int o = 0; o < kPerWord<F>; ++o) hn::StoreU(out[o], U16(), values + o * kWords);
        values += kPerWord<F> * kWords;
      }
    }
  }
}

// What a row's scale is multiplied by, where it has no norm correction: the unit of its operands, or that of fp8 in
// registers.
template <class F>
constexpr float kAffineUnit = kOperandOf<F> == Operand::kFloat32 ? kFloatUnit<F> : OperandOf<F>::kUnit;

template <class F>
bool load_affines(const TileRows& rows, format::RowShape shape, float* scale, float* offset) {
  const int n = rows.num_rows;
  int bad = 0;
  if constexpr (F::kMetaPlace == format::MetaPlace::kNone) {
    for (int i = 0; i < n; ++i) {
      scale[i] = kAffineUnit<F>;
      offset[i] = 0.0F;
    }
  } else {
    std::uint8_t copies[kKeyTile * F::kMetaBytes];
    const std::uint8_t* meta = copies;
    if (F::kMetaBytes == 4 && rows.scales != nullptr) {
      meta = reinterpret_cast<const std::uint8_t*>(rows.scales);
    } else {
      for (int i = 0; i < n; ++i) {
        std::memcpy(copies + i * F::kMetaBytes, rows.rows[i].meta + rows.meta_step, F::kMetaBytes);
      }
    }
    const float unit = F::kLevelNorm ? 1.0F : kAffineUnit<F>;
    for (int i = 0; i < n; ++i) {
      const format::Affine affine = F::read_meta(meta + i * F::kMetaBytes, shape);
      scale[i] = affine.scale * unit;
      offset[i] = affine.offset;
    }
    for (int i = 0; i < n; ++i) bad |= exact::is_finite(scale[i]) && exact::is_finite(offset[i]) ? 0 : 1;
  }
  for (int i = n; i < padded(n); ++i) scale[i] = offset[i] = 0.0F;
  return bad == 0;
}

#ifdef QUIRE_CPU_ZEN4
bool values_finite(const std::uint16_t* values, int num_pairs, int positions) {
  const VU16 exponent = hn::Set(U16(), 0x7f80);
  auto bad = hn::Zero(U16());
  for (int i = 0; i < 2 * num_pairs * positions; i += kWords) {
    const VU16 x = hn::And(hn::LoadU(U16(), values + i), exponent);
    bad = hn::Or(bad, hn::VecFromMask(U16(), hn::Eq(x, exponent)));
  }
  return hn::AllTrue(U16(), hn::Eq(bad, hn::Zero(U16())));
}
#endif

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace quire::cpu
HWY_AFTER_NAMESPACE();
#endif  // QUIRE_CPU_HAS_PAIRS

#endif  // QUIRE_CPU_OPERANDS_INL_H_
