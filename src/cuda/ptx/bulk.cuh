// Bulk copies from global into shared memory by the copy engine, and the register budget of warpgroups, on sm_90.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/memory.cuh"

namespace quire::cuda::ptx {

// Initialises a barrier that is given by its shared address, so that the barriers of a pipeline cost no pointer
// registers.
__device__ __forceinline__ void barrier_init_at(std::uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive_at(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and makes the phase wait for so many bytes of bulk copies as well.
__device__ __forceinline__ void barrier_arrive_expecting(std::uint32_t barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits until the phase of this parity has ended. In a fresh barrier the phase of parity 1 has.
__device__ __forceinline__ void barrier_wait_at(std::uint32_t barrier, std::uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again_%=;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barriers_initialised() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Copies `bytes` bytes (a multiple of 16, as both addresses are) to shared memory; the barrier counts them.
__device__ __forceinline__ void bulk_copy(std::uint32_t to, const void* from, std::uint32_t bytes,
                                          std::uint32_t barrier, std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}
// The cache policy by which what is read once leaves the L2 first.
__device__ __forceinline__ std::uint64_t evict_first_policy() {
  std::uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Brings a kernel's parameters, a line at a time, into the constant cache: kernels of microseconds wait for each line.
template <int kBytes, class Params>
__device__ __forceinline__ void touch_params(const Params& params) {
#pragma unroll
  for (int at = 0; at < kBytes; at += 64) {
    asm volatile("" ::"r"(reinterpret_cast<const int*>(&params)[at / 4]));
  }
}

// Lets the next kernel of the stream start, if it was launched to overlap this one; the other waits for the one before.
__device__ __forceinline__ void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Words of shared memory by address.
__device__ __forceinline__ std::uint32_t load_shared_16(std::uint32_t address) {
  std::uint16_t word;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(word) : "r"(address));
  return word;
}
__device__ __forceinline__ std::uint32_t load_shared_32(std::uint32_t address) {
  std::uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address));
  return word;
}
__device__ __forceinline__ void load_shared_64(std::uint32_t address, std::uint32_t* words) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(address));
}
__device__ __forceinline__ void load_shared_128(std::uint32_t address, std::uint32_t* words) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address));
}

// The transpose of an 8x8 matrix of 16-bit elements. Row l / 4 of it is in lanes l, a pair of elements in each.
__device__ __forceinline__ std::uint32_t transpose_8x8(std::uint32_t pair) {
  std::uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

}  // namespace quire::cuda::ptx
