// Compiled with the options of src/cpu/zen4.cc.
#include "products.h"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define HWY_COMPILE_ONLY_STATIC
#define QUIRE_CPU_VNNI 1
#define QUIRE_CPU_ZEN4 1
#include "products-inl.h"

namespace quire::bench {
Multiply zen4_multiply() { return &cpu::HWY_NAMESPACE::multiply; }
}  // namespace quire::bench
#else

namespace quire::bench {
Multiply zen4_multiply() { return nullptr; }
}  // namespace quire::bench
#endif
