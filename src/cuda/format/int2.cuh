// int2_per_token_head on CUDA.
#pragma once

#include <bit>

#include <cstdint>
#include <cstring>

#include "cuda/format/fragment.cuh"
#include "cuda/format/operand.cuh"
#include "cuda/format/pack.cuh"
#include "format/int2_per_token_head.h"

namespace quire::cuda {

// The largest relative error is 6e-8. This unit, as the other formats', was found by trying two million in [1, 2).
template <>
inline constexpr float level_unit<format::Int2PerTokenHead> = 1.525879F;

// The primary tables look up nibbles, so four 2-bit codes become four nibbles first.
template <>
struct Fragment<format::Int2PerTokenHead> {
  static constexpr int kElements = 32;
  static constexpr int kWords = 2;
  static __device__ __forceinline__ void convert(const std::uint32_t (&words)[kWords], std::uint32_t (&pairs)[16]) {
    using F = format::Int2PerTokenHead;
    constexpr ByteTables kTables = ByteTables::make(
        [](int code) {
          const float magnitude = code == 0 || code == 3 ? F::kOuter : F::kInner;
          return constant_half((code >= 2 ? magnitude : -magnitude) * level_unit<F>);
        },
        4);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        std::uint32_t x = half == 0 ? words[w] & 0xffffU : words[w] >> 16;
        x = (x | (x << 8)) & 0x00ff00ffU;
        x = (x | (x << 4)) & 0x0f0f0f0fU;
        x = (x | (x << 2)) & 0x33333333U;
        kTables.look_up(x, pairs + 8 * w + 4 * half);
        kTables.look_up(x >> 16, pairs + 8 * w + 4 * half + 2);
      }
    }
  }
};

// A level is linear in the bits of its code: (b1 b0) stands for -outer + (outer - inner) b0 + (outer + inner) b1. So
// each bit is a plane of its own, taken as it lies: a pair holds codes e and e + 8 of a word, and each of four
// neighbouring pairs is 4 times as large as the one before.
struct Int2Planes {
  using F = format::Int2PerTokenHead;
  static constexpr int kPlanes = 2;
  static constexpr float kBias = F::kOuter;
  static constexpr float bit(int p) { return p == 0 ? F::kOuter - F::kInner : (F::kOuter + F::kInner) / 2.0F; }
};

template <>
struct KeyOperand<format::Int2PerTokenHead> : NoOperandTable, Int2Planes {
  static constexpr float plane(int p) { return bit(p) * 0x1p24F; }
  static constexpr int element(int pair, int half) { return pair / 8 * 16 + pair % 8 + 8 * half; }
  static constexpr float weight(int pair) { return static_cast<float>(1 << (2 * (pair % 4))); }
  template <int kElements, int kWords>
  static __device__ __forceinline__ void convert(const std::uint32_t (&words)[kWords], const std::uint8_t*,
                                                 std::uint32_t, std::uint32_t (&pairs)[2][kElements / 2]) {
#pragma unroll
    for (int i = 0; i < kElements / 2; ++i) {
      const std::uint32_t word = i % 8 < 4 ? words[i / 8] : words[i / 8] >> 8;
      pairs[0][i] = word & (0x00010001U << (2 * (i % 4)));
      pairs[1][i] = word & (0x00020002U << (2 * (i % 4)));
    }
  }
};

template <>
struct ValueOperand<format::Int2PerTokenHead> : Int2Planes {
  static constexpr float kScale = 0x1p24F;
  static constexpr int kCenter = 0;
  static constexpr float plane(int p) { return bit(p); }
  static constexpr float weight(int n) { return static_cast<float>(1 << (2 * (n % 4))); }
  template <int kElements, int kWords>
  static __device__ __forceinline__ void convert(const std::uint32_t (&a)[kWords], const std::uint32_t (&b)[kWords],
                                                 std::uint32_t (&values)[2][kElements]) {
#pragma unroll
    for (int n = 0; n < kElements; ++n) {
      std::uint32_t both = ptx::permute(a[n / 16], b[n / 16], n % 16 < 8 ? 0x5410U : 0x7632U);
      if (n % 8 >= 4) both >>= 8;
      values[0][n] = both & (0x00010001U << (2 * (n % 4)));
      values[1][n] = both & (0x00020002U << (2 * (n % 4)));
    }
  }
};

template <>
struct Packer<format::Int2PerTokenHead> {
  using F = format::Int2PerTokenHead;

  // A code is the sign of z and whether |z| reaches the threshold; a negative z has to exceed it. Multiplied by 1 -
  // 2^-24 and rounded up, a negative z moves to the next float nearer to zero, while a positive z stays (but for powers
  // of two); the + 0 takes the sign from a zero. Adding the difference between the bits of 2 and those of the threshold
  // then makes bit 30 say whether |z| reaches the threshold. The two top bits of 16 elements are shifted into one word
  // and become codes together.
  template <int kN>
  static __device__ __forceinline__ void pack(F::Encoder encoder, float (&y)[kN], std::uint8_t* bytes) {
    if (encoder.is_poisoned()) {  // below the lowest threshold, so that every code is 0
#pragma unroll
      for (int j = 0; j < kN; ++j) y[j] = -2.0F;
      encoder.inverse = 1.0F;
    }
    constexpr std::uint32_t kRaise = 0x40000000U - std::bit_cast<std::uint32_t>(F::kThreshold);
    constexpr int kWord = kN < 16 ? kN : 16;
#pragma unroll
    for (int first = 0; first < kN; first += kWord) {
      std::uint32_t tops = 0;
#pragma unroll
      for (int j = kWord - 1; j >= 0; --j) {
        const float z = y[first + j] * encoder.inverse;
        const float nearer = ptx::fma_up(z, 1.0F - 0x1p-24F, 0.0F);
        tops = __funnelshift_l(exact::bits_of(nearer) + kRaise, tops, 2);
      }
      constexpr std::uint32_t kSigns = 0xaaaaaaaaU;
      const std::uint32_t codes = select_bits(kSigns, ~tops, tops ^ (tops >> 1));
      memcpy(bytes + first / F::kUnit, &codes, kWord / F::kUnit);
    }
  }
};

}  // namespace quire::cuda
