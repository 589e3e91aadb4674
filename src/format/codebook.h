// Lloyd-Max codebooks of a unit Gaussian: 2^bits centroids, symmetric about 0, listed for the positive half. A format
// for N(0, sigma^2) scales them by sigma. docs/formats/turboquant.md says how they were solved;
// tests/format/codebook_test.cc solves them again.
#pragma once

#include <cstdint>

#include "format/exact.h"

namespace quire::format {

template <int kBits>
struct Codebook;

template <>
struct Codebook<3> {
  static constexpr int kHalf = 4;
  static QUIRE_HD constexpr float positive(int i) {
    constexpr float table[kHalf] = {0.244983592F, 0.755645499F, 1.34318F, 2.15034954F};
    return table[i];
  }
};

template <>
struct Codebook<4> {
  static constexpr int kHalf = 8;
  static QUIRE_HD constexpr float positive(int i) {
    constexpr float table[kHalf] = {0.128427661F, 0.388137791F, 0.656879919F, 0.942448243F,
                                    1.25625757F,  1.61788176F,  2.06844712F,  2.73092222F};
    return table[i];
  }
};

// Codes ascend with the centroid: 0 is the most negative, kHalf the smallest positive one.
template <int kBits>
QUIRE_HD constexpr float centroid(int code) {
  using Book = Codebook<kBits>;
  return code >= Book::kHalf ? Book::positive(code - Book::kHalf) : -Book::positive(Book::kHalf - 1 - code);
}

#ifdef __CUDA_ARCH__
// How many of the bounds -b[n-1] .. -b[0], 0, b[0] .. b[n-1] are <= y, 2^-6 <= b[i] ascending; NaN gives 0. With q the
// number of b[i] beyond |y|, that is q for a negative y and 2 n + 1 - q, its bitwise complement, for others.
template <int kCount, class Bound>
__device__ __forceinline__ std::uint32_t count_symmetric_bounds(float y, Bound bound) {
  static_assert((kCount & (kCount + 1)) == 0);
  const bool negative = !(y >= 0.0F);
  // -b <= y includes -b == y: one step towards 0 makes both comparisons strict.
  const float magnitude = exact::from_bits((exact::bits_of(y) & 0x7fffffffU) - (negative ? 1U : 0U));
  float code = 8388608.0F;  // 2^23 + q has q in its low bits
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    // 2^30 (b - magnitude) limited to [0, 1]: neighbouring floats at b lie 2^-30 apart or more, so it is 0 or 1. Two
    // instructions of the multiplier's pipe for a comparison and a conditional add of the integer pipe, half as fast.
    constexpr float kScale = 1073741824.0F;
    float beyond;
    asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(beyond) : "f"(-magnitude), "f"(kScale), "f"(bound(i) * kScale));
    code += beyond;
  }
  return (exact::bits_of(code) & (2 * kCount + 1)) ^ (negative ? 0U : 2 * kCount + 1);
}
#endif

// How many midpoints of neighbouring centroids are <= y. NaN gives 0.
template <int kBits>
QUIRE_HD std::uint32_t nearest_centroid(float y) {
#ifdef __CUDA_ARCH__
  using Book = Codebook<kBits>;
  return count_symmetric_bounds<Book::kHalf - 1>(
      y, [](int i) { return 0.5F * (Book::positive(i) + Book::positive(i + 1)); });
#else
  std::uint32_t code = 0;
  for (int i = 0; i + 1 < 2 * Codebook<kBits>::kHalf; ++i) {
    code += y >= 0.5F * (centroid<kBits>(i) + centroid<kBits>(i + 1)) ? 1U : 0U;
  }
  return code;
#endif
}

}  // namespace quire::format
