// The rotations of format/rotation.h in vectors, with the same sums in the same order, so with the same bits.
#if defined(QUIRE_CPU_ROTATE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_CPU_ROTATE_INL_H_
#undef QUIRE_CPU_ROTATE_INL_H_
#else
#define QUIRE_CPU_ROTATE_INL_H_
#endif

#include "cpu/vector-inl.h"
#include "format/row.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu {
namespace HWY_NAMESPACE {
namespace {

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

// 128 elements of one block, in registers where there are 16. kSigned: signs are flipped first.
template <bool kSigned>
HWY_INLINE void hadamard128(float* y) {
  constexpr int kVectors = 128 / kFloats;
  hn::Vec<F32> v[kVectors];
  HWY_UNROLL(32)
  for (int i = 0; i < kVectors; ++i) {
    auto x = hn::Load(F32(), y + i * kFloats);
    if (kSigned) x = hn::Xor(x, hn::BitCast(F32(), hn::LoadU(U32(), &format::kRhtSignMasks[i * kFloats])));
    v[i] = butterflies(x, kFloats);
  }
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
    for (int first = 0; first < shape.head_size; first += 128) hadamard128<false>(y + first);
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
  if (rotation == format::Rotation::kSignedHadamard && kFloats >= 8 && shape.block == 128) {
    for (int first = 0; first < shape.head_size; first += 128) hadamard128<true>(y + first);
    return;
  }
  if (rotation == format::Rotation::kSignedHadamard) format::flip_signs(y, shape);
  if (rotation != format::Rotation::kNone) rotate_blocks(y, shape);
}
void rotate_row_back(format::Rotation rotation, float* y, format::RowShape shape) {
  if (rotation != format::Rotation::kNone) rotate_blocks(y, shape);
  if (rotation == format::Rotation::kSignedHadamard) format::flip_signs(y, shape);
}

#else  // without vectors the format's own words

void rotate_row(format::Rotation rotation, float* y, format::RowShape shape) { format::rotate(rotation, y, shape); }
void rotate_row_back(format::Rotation rotation, float* y, format::RowShape shape) {
  format::rotate_back(rotation, y, shape);
}

#endif  // QUIRE_CPU_HAS_PAIRS

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace quire::cpu
HWY_AFTER_NAMESPACE();

#endif  // QUIRE_CPU_ROTATE_INL_H_
