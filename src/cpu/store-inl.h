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
#include "cpu/vector-inl.h"
#include "format/row.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu {
namespace HWY_NAMESPACE {
namespace {

void load_row(const std::uint8_t* source, DType dtype, int size, float* y) { load_floats(source, dtype, size, y); }

#if QUIRE_CPU_HAS_PAIRS

// Lane i of x gets x[i ^ kDistance].
template <int kDistance>
HWY_INLINE hn::Vec<F32> partner(hn::Vec<F32> x) {
  const F32 d;
  if constexpr (kDistance == 1) return hn::Shuffle2301(x);
  if constexpr (kDistance == 2) return hn::Shuffle1032(x);
  if constexpr (kDistance == 4 && kFloats == 16) return hn::SwapAdjacentBlocks(x);
  if constexpr (2 * kDistance == kFloats && kDistance >= 4) return hn::ConcatLowerUpper(d, x, x);
  return x;
}

// One stage inside of a vector: lanes with kDistance in their number become partner - x, the others partner + x.
template <int kDistance>
HWY_INLINE hn::Vec<F32> butterfly(hn::Vec<F32> x) {
  alignas(64) static constexpr auto kSigns = [] {
    std::array<std::uint32_t, kFloats> signs{};
    for (int i = 0; i < kFloats; ++i) signs[static_cast<std::size_t>(i)] = i & kDistance ? 0x80000000U : 0U;
    return signs;
  }();
  const auto signs = hn::BitCast(F32(), hn::Load(U32(), kSigns.data()));
  return hn::Add(partner<kDistance>(x), hn::Xor(x, signs));
}
// The stages h < block of a vector.
HWY_INLINE hn::Vec<F32> butterflies(hn::Vec<F32> x, int block) {
  if (block > 1) x = butterfly<1>(x);
  if (block > 2) x = butterfly<2>(x);
  if constexpr (kFloats > 4) {
    if (block > 4) x = butterfly<4>(x);
  }
  if constexpr (kFloats > 8) {
    if (block > 8) x = butterfly<8>(x);
  }
  return x;
}

// 128 elements of one block, in registers where there are 16.
HWY_INLINE void hadamard128(float* y) {
  constexpr int kVectors = 128 / kFloats;
  hn::Vec<F32> v[kVectors];
  HWY_UNROLL(32)
  for (int i = 0; i < kVectors; ++i) v[i] = butterflies(hn::Load(F32(), y + i * kFloats), kFloats);
  HWY_UNROLL(5)
  for (int h = 1; h < kVectors; h *= 2) {
    HWY_UNROLL(32)
    for (int i = 0; i < kVectors; ++i) {
      if (i & h) continue;
      const auto a = v[i];
      const auto b = v[i + h];
      v[i] = hn::Add(a, b);
      v[i + h] = hn::Sub(a, b);
    }
  }
  HWY_UNROLL(32)
  for (int i = 0; i < kVectors; ++i) hn::Store(v[i], F32(), y + i * kFloats);
}

// y [padded(head_size)], aligned.
void rotate_blocks(float* y, format::RowShape shape) {
  const F32 d;
  if (kFloats >= 8 && shape.block == 128) {
    for (int first = 0; first < shape.head_size; first += 128) hadamard128(y + first);
    return;
  }
  for (int i = 0; i < shape.head_size; i += kFloats) {
    hn::Store(butterflies(hn::Load(d, y + i), shape.block), d, y + i);
  }
  for (int h = kFloats; h < shape.block; h *= 2) {
    for (int j = 0; j < shape.head_size; j += 2 * h) {
      for (int i = j; i < j + h; i += kFloats) {
        const auto a = hn::Load(d, y + i);
        const auto b = hn::Load(d, y + i + h);
        hn::Store(hn::Add(a, b), d, y + i);
        hn::Store(hn::Sub(a, b), d, y + i + h);
      }
    }
  }
}

void rotate_row(format::Rotation rotation, float* y, format::RowShape shape) {
  if (rotation == format::Rotation::kSignedHadamard) format::flip_signs(y, shape);
  if (rotation != format::Rotation::kNone) rotate_blocks(y, shape);
}
void rotate_row_back(format::Rotation rotation, float* y, format::RowShape shape) {
  if (rotation != format::Rotation::kNone) rotate_blocks(y, shape);
  if (rotation == format::Rotation::kSignedHadamard) format::flip_signs(y, shape);
}

// ---- statistics of rows of whole vectors ----------------------------------------------------------------------------

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
  }
};
template <>
struct VectorStats<format::SquareSum> {
  static constexpr bool kHas = true;
  // The contract's tree: neighbours, pairs of neighbours and so on, then whole vectors in the same way.
  static format::SquareSum of(const float* y, int size) {
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
  const auto whole = hn::ConvertTo(I32(), x);
  const auto up = hn::Ge(hn::Sub(x, hn::ConvertTo(F32(), whole)), hn::Set(F32(), 0.5F));
  return hn::Sub(whole, hn::BitCast(I32(), hn::VecFromMask(F32(), up)));
}
// exact::clamp to [0, most]: a NaN becomes 0.
HWY_INLINE hn::Vec<F32> clamp(hn::Vec<F32> x, float most) {
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
    return hn::Add(hn::Add(at_least(z, -kThreshold), at_least(z, 0.0F)), at_least(z, kThreshold));
  }
};
template <int kBits>
struct VectorCodesOfKeys {
  static constexpr bool kHas = true;
  static HWY_INLINE hn::Vec<I32> of(const typename format::TurboQuantKey<kBits>::Encoder& e, hn::Vec<F32> y) {
    const auto z = hn::Mul(y, hn::Set(F32(), e.unit));
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

template <class F>
HWY_INLINE void pack_codes(const typename F::Encoder& encoder, const float* y, int size, std::uint8_t* data) {
  constexpr int kBits = 8 * F::kUnitBytes / F::kUnit;
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

// format::encode_row, with vectors.
template <class F>
void encode_row(float* y, format::RowShape shape, const format::SideInputs& side, std::uint8_t* data,
                std::uint8_t* meta) {
  constexpr bool kVectors = F::kStatsOf != format::StatsOf::kNothing && F::kCentre == format::Centre::kNone &&
                            !F::kWholeRow && VectorStats<typename F::Stats>::kHas;
  if constexpr (!kVectors) {
    format::encode_row<F>(y, shape, side, data, meta);
  } else {
    constexpr bool kOfInput = F::kStatsOf == format::StatsOf::kInput;
    for (int i = shape.head_size; i < padded(shape.head_size); ++i) y[i] = 0.0F;
    typename F::Stats stats{};
    if constexpr (kOfInput) stats = row_stats<F>(y, shape.head_size);
    if constexpr (!kOfInput) {
      rotate_row(F::kRotation, y, shape);
      stats = row_stats<F>(y, shape.head_size);
    }
    const typename F::Encoder encoder = F::finish(stats, shape, side);
    if constexpr (kOfInput) {
      for (int i = 0; i < shape.head_size; ++i) y[i] = F::normalize(encoder, y[i]);
      rotate_row(F::kRotation, y, shape);
    }
    if constexpr (VectorCodes<F>::kHas) {
      pack_codes<F>(encoder, y, shape.head_size, data);
    } else {
      for (int u = 0; u < shape.head_size / F::kUnit; ++u) F::pack(encoder, y + u * F::kUnit, data + u * F::kUnitBytes);
    }
    F::write_meta(encoder, meta);
  }
}

#else  // without vectors the format's own words

void rotate_row(format::Rotation rotation, float* y, format::RowShape shape) { format::rotate(rotation, y, shape); }
void rotate_row_back(format::Rotation rotation, float* y, format::RowShape shape) {
  format::rotate_back(rotation, y, shape);
}
template <class F>
void encode_row(float* y, format::RowShape shape, const format::SideInputs& side, std::uint8_t* data,
                std::uint8_t* meta) {
  format::encode_row<F>(y, shape, side, data, meta);
}

#endif  // QUIRE_CPU_HAS_PAIRS

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace quire::cpu
HWY_AFTER_NAMESPACE();

#endif  // QUIRE_CPU_STORE_INL_H_
