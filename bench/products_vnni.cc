// Compiled with the options of src/cpu/vnni.cc.
#include "products.h"

#if defined(__AVX512VNNI__)
#define HWY_COMPILE_ONLY_STATIC
#define QUIRE_CPU_VNNI 1
#include "products-inl.h"

namespace quire::bench {
Multiply vnni_multiply() { return &cpu::HWY_NAMESPACE::multiply; }
}  // namespace quire::bench
#else

namespace quire::bench {
Multiply vnni_multiply() { return nullptr; }
}  // namespace quire::bench
#endif
