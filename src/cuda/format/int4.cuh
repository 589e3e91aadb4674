// int4_per_token_head on CUDA.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/format/fragment.cuh"
#include "cuda/format/nibbles.cuh"
#include "cuda/format/pack.cuh"
#include "format/int4_per_token_head.h"

namespace quire::cuda {

template <>
struct Fragment<format::Int4PerTokenHead> : LevelsNibble {};

template <>
struct ValueOperand<format::Int4PerTokenHead> : ValuesNibble {};

// Takes codes as they lie: a pair holds elements e and e + 4 of a word, and every second pair is 16 times as large.
template <>
struct KeyOperand<format::Int4PerTokenHead> : NoOperandTable {
  static constexpr int kPlanes = 1;
  static constexpr float kBias = 8.0F;
  static constexpr float plane(int) { return 0x1p24F; }
  static constexpr int element(int pair, int half) { return pair / 4 * 8 + pair % 4 + 4 * half; }
  static constexpr float weight(int pair) { return pair % 2 == 0 ? 1.0F : 16.0F; }
  template <int kElements, int kWords>
  static __device__ __forceinline__ void convert(const std::uint32_t (&words)[kWords], const std::uint8_t*,
                                                 std::uint32_t, std::uint32_t (&pairs)[1][kElements / 2]) {
#pragma unroll
    for (int i = 0; i < kElements / 2; i += 2) {
      const std::uint32_t word = i % 4 == 0 ? words[i / 4] : words[i / 4] >> 8;
      pairs[0][i] = word & 0x000f000fU;
      pairs[0][i + 1] = word & 0x00f000f0U;
    }
  }
};

template <>
struct Packer<format::Int4PerTokenHead> {
  using F = format::Int4PerTokenHead;

  // Without the clamp a code is floor(step + 0.5). Adding 2^22 + 0.5, rounded toward zero, leaves the code in bits 1 to
  // 4 of the sum, above one bit of fraction. In rows that need the clamp (an element is not finite, or the extremes
  // round outwards) the steps are clamped beforehand, and are then the elements of a row of scale 1.
  template <int kN>
  static __device__ __forceinline__ void pack(F::Encoder encoder, float (&y)[kN], std::uint8_t* bytes) {
    if (!encoder.in_range) {
#pragma unroll
      for (int j = 0; j < kN; ++j) y[j] = exact::clamp(F::step(encoder, y[j]), 0.0F, 15.0F);
      encoder.inverse = 1.0F;
      encoder.zero = 0.0F;
    }
#pragma unroll
    for (int first = 0; first < kN; first += 8) {
      std::uint32_t sum[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        // Four sums, shifted by a byte each, add up to their four codes. This bias of the second takes away what 2^22
        // leaves in all of them.
        const std::uint32_t bias = j / 2 == 1 ? 0x358000U : 0U;
        sum[j] = exact::bits_of(__fadd_rz(F::step(encoder, y[first + j]), exact::from_bits(0x4a800001U + bias)));
      }
      const std::uint32_t even = join_all<8>(sum[0], sum[2], sum[4], sum[6]);
      const std::uint32_t odd = join_all<8>(sum[1], sum[3], sum[5], sum[7]);
      format::store_as(bytes + first / 2, select_bits(0x0f0f0f0fU, even >> 1, odd << 3));
    }
  }
};

}  // namespace quire::cuda
