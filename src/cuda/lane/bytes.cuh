// Bytes and elements of rows in global memory, at any alignment.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "format/float_types.h"
#include "quire/tensor.h"

namespace quire::cuda {

// Moves `bytes` bytes from or to global memory, in pieces of `access` bytes (1, 2, 4, 8 or 16, dividing the address).
template <class Word, int kBytes>
__device__ __forceinline__ void load_words(const std::uint8_t* from, std::uint8_t (&to)[kBytes], int bytes) {
  if constexpr (sizeof(Word) <= kBytes) {
#pragma unroll
    for (int i = 0; i < kBytes / static_cast<int>(sizeof(Word)); ++i) {
      if (i * static_cast<int>(sizeof(Word)) < bytes) {
        const Word word = reinterpret_cast<const Word*>(from)[i];
        memcpy(to + i * sizeof(Word), &word, sizeof(Word));
      }
    }
  }
}
template <int kBytes>
__device__ __forceinline__ void load_bytes(const std::uint8_t* from, std::uint8_t (&to)[kBytes], int bytes,
                                           int access) {
  if (kBytes % 16 == 0 && access >= 16) return load_words<uint4>(from, to, bytes);
  if (kBytes % 8 == 0 && access >= 8) return load_words<uint2>(from, to, bytes);
  if (kBytes % 4 == 0 && access >= 4) return load_words<std::uint32_t>(from, to, bytes);
  if (kBytes % 2 == 0 && access >= 2) return load_words<std::uint16_t>(from, to, bytes);
  load_words<std::uint8_t>(from, to, bytes);
}

template <class Word, int kBytes>
__device__ __forceinline__ void store_words(const std::uint8_t (&from)[kBytes], std::uint8_t* to, int bytes) {
  if constexpr (sizeof(Word) <= kBytes) {
#pragma unroll
    for (int i = 0; i < kBytes / static_cast<int>(sizeof(Word)); ++i) {
      if (i * static_cast<int>(sizeof(Word)) < bytes) {
        Word word;
        memcpy(&word, from + i * sizeof(Word), sizeof(Word));
        reinterpret_cast<Word*>(to)[i] = word;
      }
    }
  }
}
template <int kBytes>
__device__ __forceinline__ void store_bytes(const std::uint8_t (&from)[kBytes], std::uint8_t* to, int bytes,
                                            int access) {
  if (kBytes % 16 == 0 && access >= 16) return store_words<uint4>(from, to, bytes);
  if (kBytes % 8 == 0 && access >= 8) return store_words<uint2>(from, to, bytes);
  if (kBytes % 4 == 0 && access >= 4) return store_words<std::uint32_t>(from, to, bytes);
  if (kBytes % 2 == 0 && access >= 2) return store_words<std::uint16_t>(from, to, bytes);
  store_words<std::uint8_t>(from, to, bytes);
}

// One element of a float tensor, widened to fp32. Of a float8 it is the value of its code.
__device__ __forceinline__ float load_float(const std::uint8_t* at, DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return format::half_to_float(*reinterpret_cast<const std::uint16_t*>(at));
    case DType::kBFloat16:
      return format::bfloat16_to_float(*reinterpret_cast<const std::uint16_t*>(at));
    case DType::kFloat8E4M3:
      return format::E4M3::decode(*at);
    case DType::kFloat8E5M2:
      return format::E5M2::decode(*at);
    default:
      return *reinterpret_cast<const float*>(at);
  }
}

}  // namespace quire::cuda
