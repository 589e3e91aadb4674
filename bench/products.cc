// How fast the CPU's threads multiply and add, with the instructions of the kernels that attention uses.
#include "products.h"

#include <omp.h>

#include <algorithm>
#include <chrono>

#include "cpu/targets.h"
#include "measure.h"

#define HWY_DISABLED_TARGETS QUIRE_CPU_WITHOUT_TARGETS
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "products.cc"
// foreach_target.h must come first.
#include <hwy/foreach_target.h>

#include <hwy/highway.h>

#include "products-inl.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu {
namespace HWY_NAMESPACE {

double target_multiply(Operand operand, int rounds) { return multiply(operand, rounds); }

}  // namespace HWY_NAMESPACE
}  // namespace quire::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quire::cpu {
namespace {
HWY_EXPORT(target_multiply);
double highway_multiply(Operand operand, int rounds) { return HWY_DYNAMIC_DISPATCH(target_multiply)(operand, rounds); }
}  // namespace
}  // namespace quire::cpu

namespace quire::bench {
namespace {

Multiply best_multiply() {
  const cpu::Avx512 here = cpu::avx512_here();
  if (here.zen4_is_best && zen4_multiply() != nullptr) return zen4_multiply();
  if (here.vnni && vnni_multiply() != nullptr) return vnni_multiply();
  return &cpu::highway_multiply;
}

}  // namespace

ProductRates product_rates() {
  const Multiply multiply = best_multiply();
  const auto rate = [&](cpu::Operand operand) {
    constexpr int kRounds = 100000;
    double best = 0.0;
    for (int repeat = 0; repeat < 20; ++repeat) {
      double products = 0.0;
      const auto start = std::chrono::steady_clock::now();
#pragma omp parallel reduction(+ : products)
      products += multiply(operand, kRounds);
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      best = std::max(best, products / seconds.count());
    }
    return best;
  };
  return {rate(cpu::Operand::kFloat32), rate(cpu::Operand::kBFloat16), rate(cpu::Operand::kInt16)};
}

}  // namespace quire::bench
#endif  // HWY_ONCE
