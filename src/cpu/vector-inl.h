// What the kernels of src/cpu use besides Highway: products of pairs of 16-bit operands, look-ups in tables of 16
// words, and bytes at the end of a row. Where a target has an instruction that Highway 1.0.3 lacks, it is here.
//
// Included once per target. QUIRE_CPU_VNNI is defined in vnni.cc, which is AVX3 with VNNI, and with QUIRE_CPU_ZEN4 in
// zen4.cc, which has BF16 and VBMI too.
#if defined(QUIRE_CPU_VECTOR_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_CPU_VECTOR_INL_H_
#undef QUIRE_CPU_VECTOR_INL_H_
#else
#define QUIRE_CPU_VECTOR_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using U8 = hn::CappedTag<std::uint8_t, 4 * kLaneAlign>;
using U16 = hn::CappedTag<std::uint16_t, 2 * kLaneAlign>;
using I16 = hn::CappedTag<std::int16_t, 2 * kLaneAlign>;
using U32 = hn::CappedTag<std::uint32_t, kLaneAlign>;
using I32 = hn::CappedTag<std::int32_t, kLaneAlign>;
using U64 = hn::CappedTag<std::uint64_t, kLaneAlign / 2>;
using F32 = hn::CappedTag<float, kLaneAlign>;
using VU16 = hn::Vec<U16>;

constexpr int kFloats = HWY_LANES(float) < kLaneAlign ? HWY_LANES(float) : kLaneAlign;  // in a vector
constexpr int kBlocks = kFloats / 4;                                                    // of 16 bytes
constexpr int kWords = 2 * kFloats;
// Rows that meet the vectors of a loop's turn together: what 32 registers hold, or 16.
constexpr int kRowsAtOnce = kBlocks == 4 || HWY_ARCH_ARM ? 4 : 2;

// Whether the target has vectors, and so 16-bit operands.
#undef QUIRE_CPU_HAS_PAIRS
#define QUIRE_CPU_HAS_PAIRS (HWY_TARGET != HWY_SCALAR)
#undef QUIRE_CPU_WORDS_512
#if HWY_TARGET == HWY_AVX3
#define QUIRE_CPU_WORDS_512 1
#else
#define QUIRE_CPU_WORDS_512 0
#endif

// The nearest bf16 to a number, ties to even.
HWY_INLINE hn::Vec<U32> to_bfloat16(hn::Vec<F32> x) {
  const U32 u;
  const auto bits = hn::BitCast(u, x);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(u, 1));
  return hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(u, 0x7fff))));
}
HWY_INLINE void store_words(hn::Vec<U32> x, std::uint16_t* to) {
  const hn::Rebind<std::uint16_t, I32> half;
  hn::StoreU(hn::DemoteTo(half, hn::BitCast(I32(), x)), half, to);
}

#if QUIRE_CPU_HAS_PAIRS
// On AVX-512 an instruction by name: around its intrinsics GCC 12 copies every accumulator, in and out, in each turn of
// a loop.
//
// acc[i] += a[2i] b[2i] + a[2i + 1] b[2i + 1], int16 or bf16.
HWY_INLINE void add_dot(hn::Vec<I32>& acc, hn::Vec<I16> a, hn::Vec<I16> b) {
#ifdef QUIRE_CPU_VNNI
  __m512i sum = acc.raw;
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a.raw), "v"(b.raw));
  acc.raw = sum;
#elif HWY_ARCH_ARM
  const int32x4_t low = vmull_s16(vget_low_s16(a.raw), vget_low_s16(b.raw));
  const int32x4_t high = vmull_s16(vget_high_s16(a.raw), vget_high_s16(b.raw));
  acc = hn::Add(acc, hn::Vec<I32>(vcombine_s32(vpadd_s32(vget_low_s32(low), vget_high_s32(low)),
                                               vpadd_s32(vget_low_s32(high), vget_high_s32(high)))));
#else
  hn::Vec<I32> unused = hn::Zero(I32());
  acc = hn::ReorderWidenMulAccumulate(I32(), a, b, acc, unused);
#endif
}

#ifdef QUIRE_CPU_ZEN4
HWY_INLINE void add_dot(hn::Vec<F32>& acc, hn::Vec<U16> a, hn::Vec<U16> b) {
  __m512 sum = acc.raw;
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a.raw), "v"(b.raw));
  acc.raw = sum;
}
#endif

#ifdef QUIRE_CPU_VNNI
// acc[i] += the sum of a[4i + j] b[4i + j] over j from 0 to 3, a of unsigned bytes, b of signed ones.
HWY_INLINE void add_dot_bytes(__m512i& acc, __m512i a, __m512i b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}
#endif

// The two operand types as template arguments.
struct Int16Products {
  using Sum = I32;
  using Factor = I16;
  static HWY_INLINE hn::Vec<F32> to_float(hn::Vec<I32> sum) { return hn::ConvertTo(F32(), sum); }
};
#ifdef QUIRE_CPU_ZEN4
struct BFloat16Products {
  using Sum = F32;
  using Factor = U16;
  static HWY_INLINE hn::Vec<F32> to_float(hn::Vec<F32> sum) { return sum; }
};
constexpr bool kMultipliesBFloat16 = true;
template <Operand kForm>
using ProductsOf = std::conditional_t<kForm == Operand::kInt16, Int16Products, BFloat16Products>;
#else
constexpr bool kMultipliesBFloat16 = false;
template <Operand kForm>
using ProductsOf = std::enable_if_t<kForm == Operand::kInt16, Int16Products>;
#endif

// What a format's rows are multiplied as on this target.
template <class F>
constexpr Operand kOperandOf =
    OperandOf<F>::kOperand == Operand::kBFloat16 && !kMultipliesBFloat16 ? Operand::kFloat32 : OperandOf<F>::kOperand;

// A table of 16 words, looked up by the low 4 bits of each word; the other bits may be anything.
struct WordTable {
#if QUIRE_CPU_WORDS_512
  VU16 words;
  explicit WordTable(const std::uint16_t* entries) {
    const auto half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(entries));
    words = VU16{_mm512_broadcast_i64x4(half)};
  }
  HWY_INLINE VU16 operator()(VU16 x) const { return VU16{_mm512_permutexvar_epi16(x.raw, words.raw)}; }
#else
  hn::Vec<U8> low, high;
  explicit WordTable(const std::uint16_t* entries) {
    HWY_ALIGN std::uint8_t bytes[2][16];
    for (int i = 0; i < 16; ++i) {
      bytes[0][i] = static_cast<std::uint8_t>(entries[i]);
      bytes[1][i] = static_cast<std::uint8_t>(entries[i] >> 8);
    }
    low = hn::LoadDup128(U8(), bytes[0]);
    high = hn::LoadDup128(U8(), bytes[1]);
  }
  HWY_INLINE VU16 operator()(VU16 x) const {
    const VU16 index = hn::And(x, hn::Set(U16(), 15));
    const auto twice = hn::BitCast(U8(), hn::Or(index, hn::ShiftLeft<8>(index)));
    const VU16 from_low = hn::BitCast(U16(), hn::TableLookupBytes(low, twice));
    const VU16 from_high = hn::BitCast(U16(), hn::TableLookupBytes(high, twice));
    const VU16 low_byte = hn::Set(U16(), 0x00ff);
    return hn::Or(hn::And(from_low, low_byte), hn::AndNot(low_byte, from_high));
  }
#endif
};

// The first `bytes` < 2 * kWords bytes at p, then zeros; nothing after them is read.
HWY_INLINE VU16 load_partial(const std::uint8_t* p, int bytes) {
#if QUIRE_CPU_WORDS_512
  return VU16{_mm512_maskz_loadu_epi8((std::uint64_t{1} << bytes) - 1, p)};
#else
  HWY_ALIGN std::uint8_t copy[2 * kWords] = {};
  std::memcpy(copy, p, static_cast<std::size_t>(bytes));
  return hn::BitCast(U16(), hn::Load(U8(), copy));
#endif
}
HWY_INLINE VU16 load_words(const std::uint8_t* p, int bytes) {
  if (bytes >= 2 * kWords) return hn::BitCast(U16(), hn::LoadU(U8(), p));
  return load_partial(p, bytes);
}

// Words of a and b in turns, in each block of 16 bytes: the first 4 of each, and the last 4.
HWY_INLINE void interleave(VU16 a, VU16 b, VU16& first, VU16& second) {
  first = hn::InterleaveLower(U16(), a, b);
  second = hn::InterleaveUpper(U16(), a, b);
}

// a[0] b[0] a[1] b[1] and so on, of as many words as fill a vector together.
HWY_INLINE VU16 interleave_halves(const std::uint8_t* a, const std::uint8_t* b) {
#if QUIRE_CPU_WORDS_512
  alignas(64) static constexpr std::uint16_t kTurns[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
  const __m512i both = _mm512_inserti64x4(first, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)), 1);
  return VU16{_mm512_permutexvar_epi16(_mm512_load_si512(kTurns), both)};
#else
  HWY_ALIGN std::uint16_t words[2][kWords / 2], turns[kWords];
  std::memcpy(words[0], a, kWords);
  std::memcpy(words[1], b, kWords);
  for (int i = 0; i < kWords; ++i) turns[i] = words[i % 2][i / 2];
  return hn::Load(U16(), turns);
#endif
}
#endif  // QUIRE_CPU_HAS_PAIRS

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace quire::cpu
HWY_AFTER_NAMESPACE();

#endif  // QUIRE_CPU_VECTOR_INL_H_
