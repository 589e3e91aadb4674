// What avx3.cc, vnni.cc and zen4.cc have in common: the kernels of Highway's AVX3, compiled with the instructions that
// the file is named for too (src/CMakeLists.txt), for which Highway 1.0.3 has no targets. A file each, so that they
// compile side by side. Only what lies in this namespace, which is nobody else's, may come out of such a file as code:
// it includes no header with functions that others could be given.
//
// The file defines QUIRE_CPU_KERNELS, the function's name, and, where the compiler has the instructions,
// QUIRE_CPU_TARGET, the target's.
#include "cpu/kernels.h"

#ifdef QUIRE_CPU_TARGET
#define HWY_COMPILE_ONLY_STATIC
#include "cpu/kernels-inl.h"

namespace quire::cpu {

const Kernels* QUIRE_CPU_KERNELS() {
  static const Kernels table = HWY_NAMESPACE::make_kernels(QUIRE_CPU_TARGET, format::AllFormats{});
  return &table;
}

}  // namespace quire::cpu
#else

namespace quire::cpu {
const Kernels* QUIRE_CPU_KERNELS() { return nullptr; }
}  // namespace quire::cpu
#endif
