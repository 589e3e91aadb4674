// Packing by the lanes of a warp: what the pack_lane functions of several formats share. CUDA alone.
#pragma once

#include <cstdint>
#include <cstring>

#include "format/exact.h"

#ifdef __CUDACC__

namespace quire::format::lane {

// This thread's place in its warp.
__device__ __forceinline__ unsigned index() {
  unsigned lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// first + second * 2^kShift + third * 2^(2 kShift) + .., modulo 2^32.
template <int kShift>
__device__ __forceinline__ std::uint32_t join_all(std::uint32_t last) {
  return last;
}
template <int kShift, class... Words>
__device__ __forceinline__ std::uint32_t join_all(std::uint32_t first, Words... rest) {
  return exact::join<kShift>(first, join_all<kShift>(rest...));
}

// a where mask is set, else b: one instruction.
__device__ __forceinline__ std::uint32_t select_bits(std::uint32_t mask, std::uint32_t a, std::uint32_t b) {
  return b ^ ((a ^ b) & mask);
}

// fp8 codes of q; whether any of them is a NaN. A NaN's sign is not its own.
template <class Fp8, int kN>
__device__ __forceinline__ bool encode_fp8(const float (&q)[kN], std::uint8_t* bytes) {
  static_assert(kN % 4 == 0);
  std::uint32_t nans = 0;
#pragma unroll
  for (int j = 0; j < kN; j += 4) {
    const std::uint32_t word = Fp8::encode_pair(q[j], q[j + 1]) | (Fp8::encode_pair(q[j + 2], q[j + 3]) << 16);
    nans |= (word & 0x7f7f7f7fU) + 0x01010101U;  // a byte's bit 7: it was 0x7f
    memcpy(bytes + j, &word, 4);
  }
  return (nans & 0x80808080U) != 0;
}

}  // namespace quire::format::lane

#endif
