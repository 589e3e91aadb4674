// The kernels for AVX-512 with VNNI, BF16 and VBMI (Zen 4, Sapphire Rapids and newer).
#define QUIRE_CPU_KERNELS zen4_kernels
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define QUIRE_CPU_TARGET "AVX3_ZEN4"
#define QUIRE_CPU_VNNI 1
#define QUIRE_CPU_ZEN4 1
#endif
#include "cpu/avx512-inl.h"
