// int8_per_token_head on CUDA.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/format/fragment.cuh"
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

}  // namespace quire::cuda
