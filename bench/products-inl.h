// Products of operands that stay in registers, issued as fast as the processor can.
#if defined(QUIRE_BENCH_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_BENCH_PRODUCTS_INL_H_
#undef QUIRE_BENCH_PRODUCTS_INL_H_
#else
#define QUIRE_BENCH_PRODUCTS_INL_H_
#endif

#include "cpu/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu {
namespace HWY_NAMESPACE {
namespace {

#if QUIRE_CPU_HAS_PAIRS
template <class Products>
double multiply_pairs(int rounds) {
  constexpr int kSums = 12;  // independent sums: more than twice the cycles of an instruction
  const typename Products::Factor factor;
  hn::Vec<typename Products::Sum> sums[kSums];
  HWY_UNROLL(12)
  for (int i = 0; i < kSums; ++i) sums[i] = hn::Zero(typename Products::Sum());
  auto a = hn::BitCast(factor, hn::Set(U16(), static_cast<std::uint16_t>(rounds & 1)));
  for (int round = 0; round < rounds; ++round) {
    HWY_UNROLL(12)
    for (int i = 0; i < kSums; ++i) add_dot(sums[i], a, a);
#if HWY_COMPILER_GCC || HWY_COMPILER_CLANG
    asm volatile("" ::: "memory");
#endif
  }
  auto total = sums[0];
  HWY_UNROLL(12)
  for (int i = 1; i < kSums; ++i) total = hn::Add(total, sums[i]);
  volatile float sink = hn::GetLane(Products::to_float(total));
  (void)sink;
  return static_cast<double>(rounds) * kSums * kWords;
}
#endif

double multiply_floats(int rounds) {
  constexpr int kSums = 12;
  hn::Vec<F32> sums[kSums];
  HWY_UNROLL(12)
  for (int i = 0; i < kSums; ++i) sums[i] = hn::Set(F32(), static_cast<float>(i));
  const auto a = hn::Set(F32(), static_cast<float>(rounds & 1));
  for (int round = 0; round < rounds; ++round) {
    HWY_UNROLL(12)
    for (int i = 0; i < kSums; ++i) sums[i] = hn::MulAdd(sums[i], a, a);
  }
  auto total = sums[0];
  HWY_UNROLL(12)
  for (int i = 1; i < kSums; ++i) total = hn::Add(total, sums[i]);
  volatile float sink = hn::GetLane(total);
  (void)sink;
  return static_cast<double>(rounds) * kSums * kFloats;
}

// Does `rounds` rounds and returns how many multiply-adds those were. A target without 16-bit operands multiplies fp32.
double multiply([[maybe_unused]] Operand operand, int rounds) {
#if QUIRE_CPU_HAS_PAIRS
  if (operand == Operand::kBFloat16) return multiply_pairs<BFloat16Products>(rounds);
  if (operand == Operand::kInt16) return multiply_pairs<Int16Products>(rounds);
#endif
  return multiply_floats(rounds);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace quire::cpu
HWY_AFTER_NAMESPACE();

#endif  // QUIRE_BENCH_PRODUCTS_INL_H_
