// How fast the CPU's threads multiply and add, with the kernels that attention uses.
#include <omp.h>

#include <algorithm>
#include <chrono>

#include "cpu/kernels.h"
#include "measure.h"

namespace quire::bench {

ProductRates product_rates() {
  const auto rate = [](cpu::Operand operand) {
    constexpr int kRounds = 100000;
    const cpu::Kernels& k = cpu::kernels();
    double best = 0.0;
    for (int repeat = 0; repeat < 20; ++repeat) {
      double products = 0.0;
      const auto start = std::chrono::steady_clock::now();
#pragma omp parallel reduction(+ : products)
      products += k.multiply(operand, kRounds);
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      best = std::max(best, products / seconds.count());
    }
    return best;
  };
  return {rate(cpu::Operand::kFloat32), rate(cpu::Operand::kBFloat16), rate(cpu::Operand::kInt16)};
}

}  // namespace quire::bench
