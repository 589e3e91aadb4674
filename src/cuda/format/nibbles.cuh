// Two codes a byte, low nibble first, become levels: what the 4-bit formats share.
#pragma once

#include "cuda/format/fragment.cuh"
#include "cuda/format/operand.cuh"

namespace quire::cuda {

// Spreads the nibbles of a word, low first, to the bytes of two words in the order of elements, and converts those.
__device__ __forceinline__ void nibbles_to_pairs(std::uint32_t word, std::uint32_t bias, std::uint32_t* pairs) {
  const std::uint32_t even = word & 0x0f0f0f0fU;
  const std::uint32_t odd = (word >> 4) & 0x0f0f0f0fU;
  bytes_to_pairs(ptx::permute(even, odd, 0x5140U), bias, pairs);
  bytes_to_pairs(ptx::permute(even, odd, 0x7362U), bias, pairs + 2);
}

struct LevelsNibble {
  static constexpr int kElements = 32;
  static constexpr int kWords = 4;
  static __device__ __forceinline__ void convert(const std::uint32_t (&words)[kWords], std::uint32_t (&pairs)[16]) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) nibbles_to_pairs(words[w], 0x64086408U, pairs + 4 * w);  // level = code - 8
  }
};

// Values, whose level is code - 8: eight codes of each of two tokens, four at a time, as they lie. In every second pair
// they are 16 times as large.
struct ValuesNibble {
  static constexpr int kPlanes = 1;
  static constexpr float kBias = 0.0F, kScale = 0x1p24F;
  static constexpr float plane(int) { return 1.0F; }
  static constexpr float weight(int n) { return n % 2 == 0 ? 1.0F : 16.0F; }
  static constexpr int kCenter = 8;
  template <int kElements, int kWords>
  static __device__ __forceinline__ void convert(const std::uint32_t (&a)[kWords], const std::uint32_t (&b)[kWords],
                                                 std::uint32_t (&values)[1][kElements]) {
#pragma unroll
    for (int n = 0; n < kElements; n += 2) {
      std::uint32_t both = ptx::permute(a[n / 8], b[n / 8], n % 8 < 4 ? 0x5410U : 0x7632U);
      if (n % 4 == 2) both >>= 8;
      values[0][n] = both & 0x000f000fU;
      values[0][n + 1] = both & 0x00f000f0U;
    }
  }
};

}  // namespace quire::cuda
