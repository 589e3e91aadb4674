// The tensor cores of sm_90a, for a warpgroup of four warps with operands in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace quire::cuda::ptx {

// Makes this thread's writes to shared memory visible to wgmma, which reads it through another proxy.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Sets the registers that each thread of a warpgroup may use; all of its warps call it.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Describes a matrix of 16-bit elements in shared memory with the 128-byte swizzle: rows of 64 elements, 8 rows in a
// group of 1024 bytes at a multiple of 1024, and 16-byte chunk c of row r at chunk c ^ (r % 8). `leading_bytes` is the
// distance from 64 columns to the next 64, for a matrix that is read transposed.
__device__ __forceinline__ std::uint64_t wgmma_matrix(std::uint32_t address, int leading_bytes) {
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
  constexpr std::uint64_t kGroup = std::uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kGroup | static_cast<std::uint64_t>(leading_bytes >> 4) << 16 | (address >> 4 & 0x3fffU);
}

#define QUIRE_D4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define QUIRE_D64                                                                                                      \
  QUIRE_D4(0), QUIRE_D4(1), QUIRE_D4(2), QUIRE_D4(3), QUIRE_D4(4), QUIRE_D4(5), QUIRE_D4(6), QUIRE_D4(7), QUIRE_D4(8), \
      QUIRE_D4(9), QUIRE_D4(10), QUIRE_D4(11), QUIRE_D4(12), QUIRE_D4(13), QUIRE_D4(14), QUIRE_D4(15)
#define QUIRE_D64_NAMES                                                                              \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "  \
  "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "  \
  "%59, %60, %61, %62, %63}, "

// d (+)= a b^T for a warpgroup: a 64x16 and b 128x16, both with k along their rows in shared memory, d 64x128 in the
// fragments of m16n8k16, 16 rows a warp. kAdds false: d starts at 0.
#define QUIRE_WGMMA_SS(type)                                                                                   \
  asm volatile("{.reg .pred adds; setp.ne.b32 adds, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." type \
               "." type " " QUIRE_D64_NAMES "%64, %65, adds, 1, 1, 0, 0;}"                                     \
               : QUIRE_D64                                                                                     \
               : "l"(a), "l"(b), "n"(kAdds ? 1 : 0))
template <bool kBFloat16, bool kAdds>
__device__ __forceinline__ void wgmma_64x128x16(float (&d)[16][4], std::uint64_t a, std::uint64_t b) {
  if constexpr (kBFloat16) {
    QUIRE_WGMMA_SS("bf16");
  } else {
    QUIRE_WGMMA_SS("f16");
  }
}

// d += a b: a 64x16 in registers, 16 rows a warp as in m16n8k16; b 16x128 with k down its rows in shared memory.
#define QUIRE_WGMMA_RS(type)                                                                    \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " QUIRE_D64_NAMES \
               "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                         \
               : QUIRE_D64                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
template <bool kBFloat16>
__device__ __forceinline__ void wgmma_64x128x16(float (&d)[16][4], const std::uint32_t (&a)[4], std::uint64_t b) {
  if constexpr (kBFloat16) {
    QUIRE_WGMMA_RS("bf16");
  } else {
    QUIRE_WGMMA_RS("f16");
  }
}
#undef QUIRE_D4
#undef QUIRE_D64
#undef QUIRE_D64_NAMES
#undef QUIRE_WGMMA_SS
#undef QUIRE_WGMMA_RS

}  // namespace quire::cuda::ptx
