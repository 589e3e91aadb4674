// The kernels for AVX-512 without VNNI (Skylake).
#define QUIRE_CPU_KERNELS avx3_kernels
#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define QUIRE_CPU_TARGET "AVX3"
#endif
#include "cpu/avx512-inl.h"
