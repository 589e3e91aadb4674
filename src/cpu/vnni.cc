// The kernels for AVX-512 with VNNI (Cascade Lake and newer, where zen4.cc does not run).
#define QUIRE_CPU_KERNELS vnni_kernels
#if defined(__AVX512VNNI__)
#define QUIRE_CPU_TARGET "AVX3_VNNI"
#define QUIRE_CPU_VNNI 1
#endif
#include "cpu/avx512-inl.h"
