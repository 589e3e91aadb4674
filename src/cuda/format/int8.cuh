// int8_per_token_head on CUDA.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/format/fragment.cuh"
#include "cuda/format/operand.cuh"
#include "cuda/format/pack.cuh"
#include "format/int8_per_token_head.h"

namespace quire::cuda {

template <>
struct Fragment<format::Int8PerTokenHead> {
  static constexpr int kElements = 32;
  static constexpr int kWords = 8;
  static __device__ __forceinline__ void convert(const std::uint32_t (&words)[kWords], std::uint32_t (&pairs)[16]) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) bytes_to_pairs(words[w] ^ 0x80808080U, 0x64806480U, pairs + 2 * w);
  }
};

template <>
struct KeyOperand<format::Int8PerTokenHead> : NoOperandTable {
  static constexpr int kPlanes = 1;
  static constexpr float kBias = 128.0F;
  static constexpr float plane(int) { return 0x1p24F; }
  static constexpr int element(int pair, int half) { return 2 * pair + half; }
  static constexpr float weight(int) { return 1.0F; }
  template <int kElements, int kWords>
  static __device__ __forceinline__ void convert(const std::uint32_t (&words)[kWords], const std::uint8_t*,
                                                 std::uint32_t, std::uint32_t (&pairs)[1][kElements / 2]) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const std::uint32_t codes = words[w] ^ 0x80808080U;
      pairs[0][2 * w] = ptx::permute(codes, 0U, 0x4140U);
      pairs[0][2 * w + 1] = ptx::permute(codes, 0U, 0x4342U);
    }
  }
};

}  // namespace quire::cuda
