// Two codes a byte, low nibble first, to levels: what the 4-bit formats share.
#pragma once

#include "cuda/format/fragment.cuh"

namespace quire::cuda {

// Nibbles, low first: codes of a word to the bytes of two words, in element order.
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

}  // namespace quire::cuda
