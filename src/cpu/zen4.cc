// The kernels for AVX-512 with VNNI, BF16 and VBMI (Zen 4, Sapphire Rapids and newer), which Highway 1.0.3 has no
// target for: its AVX3, compiled with these instructions too (src/CMakeLists.txt). Only what lies in this namespace,
// which is nobody else's, may come out of this file as code: it includes no header with functions that others could be
// given.
#include "cpu/kernels.h"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define HWY_COMPILE_ONLY_STATIC
#define QUIRE_CPU_VNNI 1
#define QUIRE_CPU_ZEN4 1
#include "cpu/kernels-inl.h"

namespace quire::cpu {

const Kernels* zen4_kernels() {
  static const Kernels table = HWY_NAMESPACE::make_kernels("AVX3_ZEN4", format::AllFormats{});
  return &table;
}

}  // namespace quire::cpu
#else

namespace quire::cpu {
const Kernels* zen4_kernels() { return nullptr; }
}  // namespace quire::cpu
#endif
