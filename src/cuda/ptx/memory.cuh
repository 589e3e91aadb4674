// Copies from global into shared memory that run beside the program, and matrices from there into registers: sm_80 and
// newer.
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

// The place of a lane, in bytes, among rows `pitch` bytes apart of which ldmatrix_x4 reads 16 columns at a time: 16
// rows as the first operand of m16n8k16, 16 rows as its second (two matrices of 8 rows, each 8 and 8 columns), or 16
// rows that are to be transposed.
__device__ __forceinline__ int first_operand(int lane, int pitch) { return lane % 16 * pitch + lane / 16 * 16; }
__device__ __forceinline__ int second_operand(int lane, int pitch) {
  return (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 16;
}
__device__ __forceinline__ int transposed_operand(int lane, int pitch) { return first_operand(lane, pitch); }

// Loads four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
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

}  // namespace quire::cuda::ptx
