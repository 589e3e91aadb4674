// How fast the CPU's threads multiply and add, on the best target that src/cpu has kernels for too.
#include <omp.h>

#include <algorithm>
#include <chrono>

#include "measure.h"
#include "products_zen4.h"

// Vectors of SVE have no size that the compiler knows,
// so there are no arrays of them.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "products.cc"
// foreach_target.h must come first.
#include <hwy/foreach_target.h>

#include <hwy/highway.h>

#include "products-inl.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu {
namespace HWY_NAMESPACE {

double multiply_here(Operand operand, int rounds) { return multiply(operand, rounds); }

}  // namespace HWY_NAMESPACE
}  // namespace quire::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quire {
namespace cpu {
HWY_EXPORT(multiply_here);
}  // namespace cpu

namespace bench {

ProductRates product_rates() {
  const auto rate = [](cpu::Operand operand) {
    constexpr int kRounds = 100000;
    double best = 0.0;
    for (int repeat = 0; repeat < 20; ++repeat) {
      double products = 0.0;
      const auto start = std::chrono::steady_clock::now();
#pragma omp parallel reduction(+ : products)
      {
        using namespace quire::cpu;
        products +=
            zen4_runs_here() ? zen4_multiply(operand, kRounds) : HWY_DYNAMIC_DISPATCH(multiply_here)(operand, kRounds);
      }
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      best = std::max(best, products / seconds.count());
    }
    return best;
  };
  return {rate(cpu::Operand::kFloat32), rate(cpu::Operand::kBFloat16), rate(cpu::Operand::kInt16)};
}

}  // namespace bench
}  // namespace quire
#endif  // HWY_ONCE
