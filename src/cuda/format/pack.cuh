// Packing by the lanes of a warp: Packer<F>::pack(encoder, y, bytes) turns the elements of a lane, which it overwrites,
// into the bytes of y's kN / kUnit packs, where kN is 8, 16, 32 or 64. Every lane of the warp calls it.
//
// The primary template calls the format's own pack. A specialization, in the format's file of this folder, restates
// what pack computes for all elements of a lane at once: it gives the same bytes in half the instructions or less, and
// its comments say why the codes are the same.
#pragma once

#include <cstdint>
#include <cstring>

#include "format/exact.h"
#include "format/format.h"

namespace quire::cuda {

template <format::Format F>
struct Packer {
  template <int kN>
  static __device__ __forceinline__ void pack(const typename F::Encoder& encoder, float (&y)[kN], std::uint8_t* bytes) {
    static_assert(kN % F::kUnit == 0, "a lane holds whole units");
#pragma unroll
    for (int u = 0; u < kN / F::kUnit; ++u) F::pack(encoder, y + u * F::kUnit, bytes + u * F::kUnitBytes);
  }
};

// first + second * 2^kShift + third * 2^(2 kShift) and so on, modulo 2^32.
template <int kShift>
__device__ __forceinline__ std::uint32_t join_all(std::uint32_t last) {
  return last;
}
template <int kShift, class... Words>
__device__ __forceinline__ std::uint32_t join_all(std::uint32_t first, Words... rest) {
  return exact::join<kShift>(first, join_all<kShift>(rest...));
}

// The bits of a where mask is set, and of b elsewhere, in one instruction.
__device__ __forceinline__ std::uint32_t select_bits(std::uint32_t mask, std::uint32_t a, std::uint32_t b) {
  return b ^ ((a ^ b) & mask);
}

}  // namespace quire::cuda
