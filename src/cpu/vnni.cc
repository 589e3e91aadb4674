// The kernels for AVX-512 with VNNI (Cascade Lake and newer, where zen4.cc does not run), which Highway 1.0.3 has no
// target for: its AVX3, compiled with these instructions too (src/CMakeLists.txt). As in zen4.cc, only what lies in this
// namespace may come out of this file as code.
#include "cpu/kernels.h"

#ifdef __AVX512VNNI__
#define HWY_COMPILE_ONLY_STATIC
#define QUIRE_CPU_VNNI 1
#include "cpu/kernels-inl.h"

namespace quire::cpu {

const Kernels* vnni_kernels() {
  static const Kernels table = HWY_NAMESPACE::make_kernels("AVX3_VNNI", format::AllFormats{});
  return &table;
}

}  // namespace quire::cpu
#else

namespace quire::cpu {
const Kernels* vnni_kernels() { return nullptr; }
}  // namespace quire::cpu
#endif
