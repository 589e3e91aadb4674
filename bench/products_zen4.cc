// Compiled with AVX-512, VNNI, BF16 and VBMI like src/cpu/zen4.cc; it runs where the processor has them.
#include "products_zen4.h"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define HWY_COMPILE_ONLY_STATIC
#define QUIRE_CPU_ZEN4 1
#include "products-inl.h"

namespace quire::cpu {

bool zen4_runs_here() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
}
double zen4_multiply(Operand operand, int rounds) { return HWY_NAMESPACE::multiply(operand, rounds); }

}  // namespace quire::cpu
#else

namespace quire::cpu {
bool zen4_runs_here() { return false; }
double zen4_multiply(Operand, int) { return 0.0; }
}  // namespace quire::cpu
#endif
