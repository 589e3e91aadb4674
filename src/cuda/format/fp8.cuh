// The fp8 formats on CUDA: per tensor, per token and head, and TurboQuant's keys.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>
#include <cstring>

#include "cuda/format/fragment.cuh"
#include "cuda/format/pack.cuh"
#include "format/fp8_per_tensor.h"
#include "format/fp8_per_token_head.h"
#include "format/turboquant.h"

namespace quire::cuda {

struct LevelsE4M3 {
  static constexpr int kElements = 32;
  static constexpr int kWords = 8;
  static __device__ __forceinline__ void convert(const std::uint32_t (&words)[kWords], std::uint32_t (&pairs)[16]) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      pairs[2 * w] = pair_bits(
          __half2(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(words[w] & 0xffffU), __NV_E4M3)));
      pairs[2 * w + 1] =
          pair_bits(__half2(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(words[w] >> 16), __NV_E4M3)));
    }
  }
};
template <>
struct Fragment<format::Fp8PerTensor> : LevelsE4M3 {};
template <>
struct Fragment<format::Fp8PerTokenHead> : LevelsE4M3 {};
template <>
struct Fragment<format::TurboQuantK8> : LevelsE4M3 {};

// The code is the high byte of an fp16 number.
template <>
struct Fragment<format::Fp8E5M2PerTensor> {
  static constexpr int kElements = 32;
  static constexpr int kWords = 8;
  static __device__ __forceinline__ void convert(const std::uint32_t (&words)[kWords], std::uint32_t (&pairs)[16]) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      pairs[2 * w] = ptx::permute(words[w], 0U, 0x1404U);
      pairs[2 * w + 1] = ptx::permute(words[w], 0U, 0x3424U);
    }
  }
};

// e4b15 is fp16 with three mantissa bits and no exponents above 1: a sign, then 7 bits that begin below the top
// exponent bit.
template <>
struct Fragment<format::TurboQuantK8E4B15> {
  static constexpr int kElements = 32;
  static constexpr int kWords = 8;
  static __device__ __forceinline__ void convert(const std::uint32_t (&words)[kWords], std::uint32_t (&pairs)[16]) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::uint32_t codes = ptx::permute(words[w], 0U, half == 0 ? 0x1404U : 0x3424U);  // code << 8
        pairs[2 * w + half] = (codes & 0x80008000U) | ((codes & 0x7f007f00U) >> 1);
      }
    }
  }
};

// Writes the fp8 codes of q. Returns whether any of them is a NaN, whose sign is then not that of q.
template <class Fp8, int kN>
__device__ __forceinline__ bool encode_fp8(const float (&q)[kN], std::uint8_t* bytes) {
  static_assert(kN % 4 == 0);
  std::uint32_t nans = 0;
#pragma unroll
  for (int j = 0; j < kN; j += 4) {
    const std::uint32_t word = Fp8::encode_pair(q[j], q[j + 1]) | (Fp8::encode_pair(q[j + 2], q[j + 3]) << 16);
    nans |= (word & 0x7f7f7f7fU) + 0x01010101U;  // bit 7 of a byte is set where the byte was 0x7f
    memcpy(bytes + j, &word, 4);
  }
  return (nans & 0x80808080U) != 0;
}

template <class F, class Fp8>
struct TensorScalePacker {
  // Every element is divided by the same divisor. With r = 1 / scale, correctly rounded, x r misses the quotient by
  // less than 2 ulp and one step of Newton's by less than 1 ulp; from there a second step rounds correctly (Markstein,
  // IBM Journal of R&D 34, 1990), as long as no remainder underflows. With 2^-64 <= scale <= 2^64 a remainder
  // underflows only for quotients below 2^-38, whose code is a signed zero however they are rounded. The signs of the
  // remainders are such that a zero keeps its own. A NaN code says that an element was not finite or that its quotient
  // is NaN; then all elements are divided.
  template <int kN>
  static __device__ __forceinline__ void pack(const typename F::Encoder& encoder, float (&y)[kN], std::uint8_t* bytes) {
    const float scale = encoder.tensor_scale;
    const float r = exact::reciprocal(scale);
    bool divides = !(scale >= 0x1p-64F && scale <= 0x1p64F);
    if (!divides) {
      float quotient[kN];
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        float q = y[j] * r;
        q = __fmaf_rn(-__fmaf_rn(q, scale, -y[j]), r, q);
        quotient[j] = __fmaf_rn(-__fmaf_rn(q, scale, -y[j]), r, q);
      }
      divides = encode_fp8<Fp8>(quotient, bytes);
    }
    if (divides) {
#pragma unroll
      for (int j = 0; j < kN; ++j) F::pack(encoder, y + j, bytes + j);
    }
  }
};
template <>
struct Packer<format::Fp8PerTensor> : TensorScalePacker<format::Fp8PerTensor, format::E4M3> {};
template <>
struct Packer<format::Fp8E5M2PerTensor> : TensorScalePacker<format::Fp8E5M2PerTensor, format::E5M2> {};

template <>
struct Packer<format::Fp8PerTokenHead> {
  using F = format::Fp8PerTokenHead;

  template <int kN>
  static __device__ __forceinline__ void pack(const F::Encoder& encoder, float (&y)[kN], std::uint8_t* bytes) {
#pragma unroll
    for (int j = 0; j < kN; ++j) y[j] *= encoder.inverse;
    if (encoder.is_poisoned()) {
#pragma unroll
      for (int j = 0; j < kN; ++j) y[j] = 0.0F;
    }
    encode_fp8<format::E4M3>(y, bytes);
  }
};

template <>
struct Packer<format::TurboQuantK8> {
  using F = format::TurboQuantK8;

  template <int kN>
  static __device__ __forceinline__ void pack(F::Encoder encoder, float (&y)[kN], std::uint8_t* bytes) {
    if (encode_fp8<format::E4M3>(y, bytes)) {  // a NaN keeps its sign
#pragma unroll
      for (int j = 0; j < kN; ++j) F::pack(encoder, y + j, bytes + j);
    }
  }
};

}  // namespace quire::cuda
