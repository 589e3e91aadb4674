// A row to bytes, in vectors: conversion, rotation, statistics and packing, each with the same roundings in the same
// order as the format's own words (format/row.h), so with the same bits. A format that has no vector code here goes
// through its own encode_row.
#if defined(QUIRE_CPU_STORE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_CPU_STORE_INL_H_
#undef QUIRE_CPU_STORE_INL_H_
#else
#define QUIRE_CPU_STORE_INL_H_
#endif

#include "cpu/load.h"
#include "cpu/rotate-inl.h"
#include "cpu/vector-inl.h"
#include "format/row.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu {
namespace HWY_NAMESPACE {
namespace {

void load_row(const std::uint8_t* source, DType dtype, int size, float* y) { load_floats(source, dtype, size, y); }

#if QUIRE_CPU_HAS_PAIRS

// ---- statistics of rows of whole vectors ----------------------------------------------------------------------------

#if QUIRE_CPU_WORDS_512
constexpr int kNotFinite = 0x99;  // of vfpclassps: NaNs and infinities
#endif
template <class Stats>
struct VectorStats {
  static constexpr bool kHas = false;
};
HWY_INLINE hn::Vec<U32> magnitude_bits(hn::Vec<F32> x) {
  return hn::And(hn::BitCast(U32(), x), hn::Set(U32(), 0x7fffffffU));
}
template <>
struct VectorStats<format::AbsMax> {
  static constexpr bool kHas = true;
  static format::AbsMax of(const float* y, int size) {
    // As integers: what is not finite is larger than what is.
    auto top = hn::Zero(I32());
    for (int i = 0; i < size; i += kFloats) {
      top = hn::Max(top, hn::BitCast(I32(), magnitude_bits(hn::Load(F32(), y + i))));
    }
    return {exact::from_bits(static_cast<std::uint32_t>(hn::GetLane(hn::MaxOfLanes(I32(), top))))};
  }
};
template <>
struct VectorStats<format::Range> {
  static constexpr bool kHas = true;
  static format::Range of(const float* y, int size) {
#if QUIRE_CPU_WORDS_512
    // The highest of x and of -x: from both in turns, pairs of lanes at the end.
    __m512 high = _mm512_load_ps(y), low = high;
    __mmask16 bad = _mm512_fpclass_ps_mask(high, kNotFinite);
    for (int i = 16; i < size; i += 16) {
      const __m512 x = _mm512_load_ps(y + i);
      high = _mm512_max_ps(high, x);
      low = _mm512_min_ps(low, x);
      bad = _kor_mask16(bad, _mm512_fpclass_ps_mask(x, kNotFinite));
    }
    if (bad != 0) return {exact::quiet_nan(), exact::quiet_nan()};
    low = _mm512_xor_ps(low, _mm512_set1_ps(-0.0F));
    __m512 both = _mm512_max_ps(_mm512_unpacklo_ps(high, low), _mm512_unpackhi_ps(high, low));
    both = _mm512_max_ps(both, _mm512_shuffle_f32x4(both, both, 0x4e));
    both = _mm512_max_ps(both, _mm512_shuffle_f32x4(both, both, 0xb1));
    both = _mm512_max_ps(both, _mm512_permute_ps(both, 0x4e));
    const float most = _mm512_cvtss_f32(both), least = -_mm512_cvtss_f32(_mm512_permute_ps(both, 0xb1));
    return {least, most};
#else
    const F32 d;
    auto low = hn::Load(d, y);
    auto high = low;
    auto top = hn::BitCast(I32(), magnitude_bits(low));
    for (int i = kFloats; i < size; i += kFloats) {
      const auto x = hn::Load(d, y + i);
      low = hn::Min(low, x);
      high = hn::Max(high, x);
      top = hn::Max(top, hn::BitCast(I32(), magnitude_bits(x)));
    }
    if (hn::GetLane(hn::MaxOfLanes(I32(), top)) >= 0x7f800000) return {exact::quiet_nan(), exact::quiet_nan()};
    return {hn::GetLane(hn::MinOfLanes(d, low)), hn::GetLane(hn::MaxOfLanes(d, high))};
#endif
  }
};
template <>
struct VectorStats<format::SquareSum> {
  static constexpr bool kHas = true;
  // The contract's tree: neighbours, pairs of neighbours and so on, then whole vectors in the same way.
  static format::SquareSum of(const float* y, int size) {
#if QUIRE_CPU_WORDS_512
    if (size == 128) return {of_128(y)};
#endif
    hn::Vec<F32> sums[format::kMaxHeadSize / kFloats];
    const int count = size / kFloats;
    for (int i = 0; i < count; ++i) {
      auto x = hn::Load(F32(), y + i * kFloats);
      x = hn::Mul(x, x);
      x = hn::Add(x, partner<1>(x));
      x = hn::Add(x, partner<2>(x));
      if constexpr (kFloats > 4) x = hn::Add(x, partner<4>(x));
      if constexpr (kFloats > 8) x = hn::Add(x, partner<8>(x));
      sums[i] = x;
    }
    for (int h = 1; h < count; h *= 2) {
      for (int i = 0; i + h < count; i += 2 * h) sums[i] = hn::Add(sums[i], sums[i + h]);
    }
    return {hn::GetLane(sums[0])};
  }

#if QUIRE_CPU_WORDS_512
 private:
  // The same tree, vectors two by two.
  static float of_128(const float* y) {
    __m512 v[8], pairs[4], fours[2];
    HWY_UNROLL(8)
    for (int i = 0; i < 8; ++i) {
      const __m512 x = _mm512_load_ps(y + 16 * i);
      v[i] = _mm512_mul_ps(x, x);
    }
    HWY_UNROLL(4)
    for (int i = 0; i < 4; ++i) pairs[i] = add_neighbours(v[2 * i], v[2 * i + 1]);
    HWY_UNROLL(2)
    for (int i = 0; i < 2; ++i) fours[i] = add_neighbours(pairs[2 * i], pairs[2 * i + 1]);
    __m512 sum =
        _mm512_add_ps(_mm512_shuffle_f32x4(fours[0], fours[1], 0x88), _mm512_shuffle_f32x4(fours[0], fours[1], 0xdd));
    sum =
        _mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, 0xb1));  // of 4 vectors in blocks 0 and 1, of 4 in the others
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0xb1));
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4e));
    return _mm512_cvtss_f32(_mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, 0x4e)));
  }
  static __m512 add_neighbours(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
  }
#endif
};

template <class F>
typename F::Stats row_stats(const float* y, int head_size) {
  if constexpr (VectorStats<typename F::Stats>::kHas) {
    if (head_size % kFloats == 0) return VectorStats<typename F::Stats>::of(y, head_size);
  }
  return format::row_stats<F>(y, head_size);
}

// ---- codes of a vector of elements, one an int32 lane ---------------------------------------------------------------

// exact::round_half_away_nonnegative
HWY_INLINE hn::Vec<I32> round_half_away(hn::Vec<F32> x) {
#if QUIRE_CPU_WORDS_512
  // A sum that is rounded down: just below a half it stays below 1.
  constexpr int kDown = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
  return hn::Vec<I32>{_mm512_cvttps_epi32(_mm512_add_round_ps(x.raw, _mm512_set1_ps(0.5F), kDown))};
#endif
  const auto whole = hn::ConvertTo(I32(), x);
  const auto up = hn::Ge(hn::Sub(x, hn::ConvertTo(F32(), whole)), hn::Set(F32(), 0.5F));
  return hn::Sub(whole, hn::BitCast(I32(), hn::VecFromMask(F32(), up)));
}
// exact::clamp to [0, most]: a NaN becomes 0.
HWY_INLINE hn::Vec<F32> clamp(hn::Vec<F32> x, float most) {
#if QUIRE_CPU_WORDS_512
  // The second operand where one is a NaN.
  return hn::Vec<F32>{_mm512_min_ps(_mm512_max_ps(x.raw, _mm512_setzero_ps()), _mm512_set1_ps(most))};
#endif
  const auto number = hn::IfThenElseZero(hn::Eq(x, x), x);
  return hn::Min(hn::Max(number, hn::Zero(F32())), hn::Set(F32(), most));
}
// 1 in the lanes where x >= limit.
HWY_INLINE hn::Vec<I32> at_least(hn::Vec<F32> x, float limit) {
  return hn::BitCast(I32(),
                     hn::ShiftRight<31>(hn::BitCast(U32(), hn::VecFromMask(F32(), hn::Ge(x, hn::Set(F32(), limit))))));
}

template <class F>
struct VectorCodes {
  static constexpr bool kHas = false;
};
template <>
struct VectorCodes<format::Int4PerTokenHead> {
  static constexpr bool kHas = true;
  static HWY_INLINE hn::Vec<I32> of(const format::Int4PerTokenHead::Encoder& e, hn::Vec<F32> y) {
    const auto step = hn::Add(hn::Mul(y, hn::Set(F32(), e.inverse)), hn::Set(F32(), e.zero));
    return round_half_away(clamp(step, 15.0F));
  }
};
template <>
struct VectorCodes<format::Int2PerTokenHead> {
  static constexpr bool kHas = true;
  static HWY_INLINE hn::Vec<I32> of(const format::ScaledEncoder& e, hn::Vec<F32> y) {
    constexpr float kThreshold = format::Int2PerTokenHead::kThreshold;
    const auto z = hn::Mul(y, hn::Set(F32(), e.inverse));
#if QUIRE_CPU_WORDS_512
    const __m512i one = _mm512_set1_epi32(1);
    const auto reached = [&](float limit)
                             HWY_ATTR { return _mm512_cmp_ps_mask(z.raw, _mm512_set1_ps(limit), _CMP_GE_OQ); };
    __m512i code = _mm512_maskz_mov_epi32(reached(-kThreshold), one);
    code = _mm512_mask_add_epi32(code, reached(0.0F), code, one);
    return hn::Vec<I32>{_mm512_mask_add_epi32(code, reached(kThreshold), code, one)};
#endif
    return hn::Add(hn::Add(at_least(z, -kThreshold), at_least(z, 0.0F)), at_least(z, kThreshold));
  }
};
template <int kBits>
struct VectorCodesOfKeys {
  static constexpr bool kHas = true;
  static HWY_INLINE hn::Vec<I32> of(const typename format::TurboQuantKey<kBits>::Encoder& e, hn::Vec<F32> y) {
    const auto z = hn::Mul(y, hn::Set(F32(), e.unit));
#if QUIRE_CPU_WORDS_512
    // How many midpoints are not above z: the midpoints rise.
    alignas(64) static constexpr auto kMidpoints = [] {
      std::array<float, 16> midpoints{};
      for (int i = 1; i < (1 << kBits); ++i) midpoints[static_cast<std::size_t>(i)] = format::lower_midpoint<kBits>(i);
      return midpoints;
    }();
    const __m512 midpoints = _mm512_load_ps(kMidpoints.data());
    __m512i found = _mm512_setzero_si512();
    HWY_UNROLL(4)
    for (int step = 1 << (kBits - 1); step > 0; step /= 2) {
      const __m512i next = _mm512_or_si512(found, _mm512_set1_epi32(step));
      const __mmask16 reached = _mm512_cmp_ps_mask(z.raw, _mm512_permutexvar_ps(next, midpoints), _CMP_GE_OQ);
      found = _mm512_mask_mov_epi32(found, reached, next);
    }
    return hn::Vec<I32>{found};
#endif
    auto code = hn::Zero(I32());
    HWY_UNROLL(16)
    for (int i = 1; i < (1 << kBits); ++i) code = hn::Add(code, at_least(z, format::lower_midpoint<kBits>(i)));
    return code;
  }
};
template <>
struct VectorCodes<format::TurboQuantK4> : VectorCodesOfKeys<4> {};
template <>
struct VectorCodes<format::TurboQuantK3> : VectorCodesOfKeys<3> {};
template <int kBits>
struct VectorCodesOfValues {
  static constexpr bool kHas = true;
  static HWY_INLINE hn::Vec<I32> of(const typename format::TurboQuantValue<kBits>::Encoder& e, hn::Vec<F32> y) {
    const auto steps = hn::Mul(hn::Sub(y, hn::Set(F32(), e.low)), hn::Set(F32(), e.inverse));
    return hn::ConvertTo(I32(), clamp(hn::Add(steps, hn::Set(F32(), 0.5F)), format::TurboQuantValue<kBits>::kMaxCode));
  }
};
template <>
struct VectorCodes<format::TurboQuantV4> : VectorCodesOfValues<4> {};
template <>
struct VectorCodes<format::TurboQuantV3> : VectorCodesOfValues<3> {};
template <>
struct VectorCodes<format::Int8PerTokenHead> {
  static constexpr bool kHas = true;
  static HWY_INLINE hn::Vec<I32> of(const format::ScaledEncoder& e, hn::Vec<F32> y) {
    const auto x = hn::Mul(y, hn::Set(F32(), e.inverse));
    const auto number = hn::IfThenElseZero(hn::Eq(x, x), x);
    return hn::NearestInt(hn::Min(hn::Max(number, hn::Set(F32(), -128.0F)), hn::Set(F32(), 127.0F)));
  }
};

// Two codes of kBits in 16 bits each to one of 2 * kBits: `count` bytes, a multiple of kWords, become half of them.
template <int kBits>
HWY_INLINE void join_neighbours(const std::uint8_t* from, int count, std::uint8_t* to) {
  const hn::Rebind<std::uint8_t, I16> bytes;
  const VU16 mask = hn::Set(U16(), static_cast<std::uint16_t>((1 << (2 * kBits)) - 1));
  for (int i = 0; i < count; i += 2 * kWords) {
    const VU16 x = hn::BitCast(U16(), hn::LoadU(U8(), from + i));
    const VU16 joined = hn::And(hn::Or(x, hn::ShiftRight<8 - kBits>(x)), mask);
    hn::StoreU(hn::DemoteTo(bytes, hn::BitCast(I16(), joined)), bytes, to + i / 2);
  }
}

#if QUIRE_CPU_WORDS_512
// 64 codes from four vectors of 16, in bytes.
HWY_INLINE __m512i to_bytes(const __m512i (&codes)[4], bool is_signed) {
  const __m512i low = _mm512_packs_epi32(codes[0], codes[1]), high = _mm512_packs_epi32(codes[2], codes[3]);
  const __m512i bytes = is_signed ? _mm512_packs_epi16(low, high) : _mm512_packus_epi16(low, high);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, bytes);
}

// 64 codes of kBits, one a byte, to 8 * kBits bytes.
template <int kBits>
HWY_INLINE void put_bytes(__m512i bytes, std::uint8_t* to) {
  // Neighbours joined: two codes to 2 * kBits bits of 16, four to 4 * kBits of 32.
  constexpr short kOfPair = kBits < 8 ? 1 | 1 << (8 + kBits % 8) : 0;
  constexpr int kOfFour = kBits < 4 ? 1 | 1 << (16 + 2 * kBits % 8) : 0;
  const auto pairs = [&]() HWY_ATTR {
    return _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(kOfPair));
  };
  const auto fours = [&]() HWY_ATTR { return _mm512_madd_epi16(pairs(), _mm512_set1_epi32(kOfFour)); };
  if constexpr (kBits == 8) {
    _mm512_storeu_si512(to, bytes);
  } else if constexpr (kBits == 4) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi16_epi8(pairs()));
  } else if constexpr (kBits == 2) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(fours()));
  } else {
    static_assert(kBits == 3);
    const __m512i x = fours();
    alignas(64) std::uint64_t eights[8];  // codes in the low 24 bits
    _mm512_store_si512(eights, _mm512_or_si512(x, _mm512_srli_epi64(x, 20)));
    for (int i = 0; i < 8; ++i) std::memcpy(to + 3 * i, &eights[i], 3);
  }
}
#endif

template <class F>
HWY_INLINE void pack_codes(const typename F::Encoder& encoder, const float* y, int size, std::uint8_t* data) {
  constexpr int kBits = 8 * F::kUnitBytes / F::kUnit;
#if QUIRE_CPU_WORDS_512
  if (size % 64 == 0) {
    for (int i = 0; i < size; i += 64, data += 8 * kBits) {
      __m512i four[4];
      HWY_UNROLL(4)
      for (int j = 0; j < 4; ++j) four[j] = VectorCodes<F>::of(encoder, hn::Load(F32(), y + i + 16 * j)).raw;
      put_bytes<kBits>(to_bytes(four, kBits == 8), data);
    }
    return;
  }
#endif
  // Room for a whole vector past the last code.
  HWY_ALIGN std::uint8_t codes[format::kMaxHeadSize + 2 * kWords];
  HWY_ALIGN std::uint8_t pairs[format::kMaxHeadSize + 2 * kWords];
  const hn::Rebind<std::uint8_t, I32> bytes;
  const hn::Rebind<std::int8_t, I32> signed_bytes;
  for (int i = 0; i < size; i += kFloats) {
    const auto code = VectorCodes<F>::of(encoder, hn::Load(F32(), y + i));
    if constexpr (kBits == 8) {
      hn::StoreU(hn::DemoteTo(signed_bytes, code), signed_bytes, reinterpret_cast<std::int8_t*>(codes + i));
    } else {
      hn::StoreU(hn::DemoteTo(bytes, code), bytes, codes + i);
    }
  }
  const std::uint8_t* packed = codes;
  if constexpr (kBits == 4) {
    join_neighbours<4>(codes, size, pairs);
    packed = pairs;
  } else if constexpr (kBits == 2) {
    join_neighbours<2>(codes, size, pairs);
    join_neighbours<4>(pairs, size / 2, codes);
  } else if constexpr (kBits == 3) {
    for (int i = 0; i < size; i += 8) {
      std::uint64_t x;
      std::memcpy(&x, codes + i, 8);
      x = (x | x >> 5) & 0x003f003f003f003fU;
      x = (x | x >> 10) & 0x00000fff00000fffU;
      x |= x >> 20;
      std::memcpy(pairs + i / 8 * 3, &x, 3);
    }
    packed = pairs;
  }
  std::memcpy(data, packed, static_cast<std::size_t>(format::code_bytes<F>(size)));
}

// Where a row is rotated, measured and packed in vectors.
template <class F>
constexpr bool kEncodesInVectors = F::kStatsOf != format::StatsOf::kNothing&& F::kCentre == format::Centre::kNone &&
                                   !F::kWholeRow && VectorStats<typename F::Stats>::kHas;

// format::encode_row, with vectors, of kRows rows at once: each step of one waits for the step before, so a processor
// works on the next row meanwhile if it comes soon enough.
template <class F, int kRows>
HWY_INLINE void encode_together(const EncodeJob* jobs, format::RowShape shape) {
  const int size = shape.head_size;
  constexpr bool kOfInput = F::kStatsOf == format::StatsOf::kInput;
  typename F::Stats stats[kRows]{};
  for (int r = 0; r < kRows; ++r) {
    for (int i = size; i < padded(size); ++i) jobs[r].y[i] = 0.0F;
    if constexpr (!kOfInput) rotate_row(F::kRotation, jobs[r].y, shape);
  }
  for (int r = 0; r < kRows; ++r) stats[r] = row_stats<F>(jobs[r].y, size);
  typename F::Encoder encoders[kRows];
  for (int r = 0; r < kRows; ++r) encoders[r] = F::finish(stats[r], shape, jobs[r].side);
  if constexpr (kOfInput) {
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < size; ++i) jobs[r].y[i] = F::normalize(encoders[r], jobs[r].y[i]);
      rotate_row(F::kRotation, jobs[r].y, shape);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const float* y = jobs[r].y;
    if constexpr (VectorCodes<F>::kHas) {
      pack_codes<F>(encoders[r], y, size, jobs[r].data);
    } else {
      for (int u = 0; u < size / F::kUnit; ++u) {
        F::pack(encoders[r], y + u * F::kUnit, jobs[r].data + u * F::kUnitBytes);
      }
    }
    F::write_meta(encoders[r], jobs[r].meta);
  }
}

template <class F>
void encode_rows(const EncodeJob* jobs, int num_jobs, format::RowShape shape) {
  int done = 0;
  if constexpr (kEncodesInVectors<F>) {
    for (; done + 2 <= num_jobs; done += 2) encode_together<F, 2>(jobs + done, shape);
    if (done < num_jobs) encode_together<F, 1>(jobs + done, shape);
  } else {
    for (const EncodeJob* job = jobs; job < jobs + num_jobs; ++job) {
      format::encode_row<F>(job->y, shape, job->side, job->data, job->meta);
    }
  }
}

#else  // without vectors the format's own words

template <class F>
void encode_rows(const EncodeJob* jobs, int num_jobs, format::RowShape shape) {
  for (const EncodeJob* job = jobs; job < jobs + num_jobs; ++job) {
    format::encode_row<F>(job->y, shape, job->side, job->data, job->meta);
  }
}

#endif  // QUIRE_CPU_HAS_PAIRS

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace quire::cpu
HWY_AFTER_NAMESPACE();

#endif  // QUIRE_CPU_STORE_INL_H_
