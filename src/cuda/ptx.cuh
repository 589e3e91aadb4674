// The instructions that C++ has no name for, one wrapper each: sm_80 and newer, and from `wgmma` on sm_90a alone.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace quire::cuda::ptx {

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies `bytes` (0 to 16) from global memory and fills the rest of 16 bytes with zeros; both addresses are 16-byte
// aligned. Nothing past `bytes` is read.
__device__ __forceinline__ void cp_async_16(std::uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
// Copies 16 bytes, or writes zeros and reads nothing where `skips`.
__device__ __forceinline__ void cp_async_16_unless(std::uint32_t to, const void* from, bool skips) {
  asm volatile(
      "{.reg .pred skips; setp.ne.b32 skips, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, skips;}" ::"r"(to),
      "l"(from), "r"(static_cast<int>(skips))
      : "memory");
}
// cp_async_16 for 4 bytes.
__device__ __forceinline__ void cp_async_4(std::uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
__device__ __forceinline__ void ldmatrix_x4_trans(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// d += a b for a 16x16 (row major), b 16x8 (column major), d 16x8 fp32; a and b in fp16 or bf16.
template <bool kBFloat16>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                            std::uint32_t b1) {
  if constexpr (kBFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// 2^x, 2 ulp; 0 for -inf, NaN for NaN.
__device__ __forceinline__ float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// sqrt, 1 ulp.
__device__ __forceinline__ float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Four bytes chosen from the eight of (a, b), by the low nibbles of `selector`.
__device__ __forceinline__ std::uint32_t permute(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
  return __byte_perm(a, b, selector);
}

// Barriers of `threads` threads of a block, by number; 0 is __syncthreads.
__device__ __forceinline__ void barrier_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
// Arrives at such a barrier without waiting there.
__device__ __forceinline__ void barrier_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Barriers in shared memory that count arrivals. A phase ends with the last arrival; phases have parities 0, 1, 0, ..
__device__ __forceinline__ void mbarrier_init(std::uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(std::uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives once this thread's copies under way have landed.
__device__ __forceinline__ void mbarrier_arrive_after_copies(std::uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Waits until the phase of this parity has ended; a fresh barrier's phase of parity 1 has.
__device__ __forceinline__ void mbarrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Makes this thread's writes to shared memory visible to wgmma, which reads it through another proxy.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A warpgroup's registers a thread; all of its warps call it.
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

// A matrix of 16-bit elements in shared memory with the 128-byte swizzle: rows of 64 elements, 8 rows a group of 1024
// bytes at a multiple of 1024, 16-byte chunk c of row r at chunk c ^ (r % 8). `leading_bytes`: from 64 columns to the
// next 64, for a matrix that is read transposed.
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
