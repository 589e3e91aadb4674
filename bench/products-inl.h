// Products of operands that stay in registers, issued as fast as the processor can: what `quire bench` takes shares of.
#if defined(QUIRE_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_PRODUCTS_INL_H_
#undef QUIRE_PRODUCTS_INL_H_
#else
#define QUIRE_PRODUCTS_INL_H_
#endif

#include "cpu/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu {
namespace HWY_NAMESPACE {
namespace {

// After this the compiler knows nothing about the vector: a product of it is not one that has been made before.
template <class V>
HWY_INLINE void forget(V& x) {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2
  asm volatile("" : "+x"(x.raw));
#elif HWY_ARCH_ARM && QUIRE_CPU_HAS_PAIRS
  asm volatile("" : "+w"(x.raw));
#else
  (void)x;
#endif
}

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
    for (int i = 0; i < kSums; ++i) {
      forget(a);
      add_dot(sums[i], a, a);
    }
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
  auto a = hn::Set(F32(), static_cast<float>(rounds & 1));
  for (int round = 0; round < rounds; ++round) {
    HWY_UNROLL(12)
    for (int i = 0; i < kSums; ++i) {
      forget(a);
      sums[i] = hn::MulAdd(sums[i], a, a);
    }
  }
  auto total = sums[0];
  HWY_UNROLL(12)
  for (int i = 1; i < kSums; ++i) total = hn::Add(total, sums[i]);
  volatile float sink = hn::GetLane(total);
  (void)sink;
  return static_cast<double>(rounds) * kSums * kFloats;
}

double multiply([[maybe_unused]] Operand operand, int rounds) {
#if QUIRE_CPU_HAS_PAIRS
#ifdef QUIRE_CPU_ZEN4
  if (operand == Operand::kBFloat16) return multiply_pairs<BFloat16Products>(rounds);
#endif
  if (operand == Operand::kInt16) return multiply_pairs<Int16Products>(rounds);
#endif
  return multiply_floats(rounds);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace quire::cpu
HWY_AFTER_NAMESPACE();

#endif  // QUIRE_PRODUCTS_INL_H_
