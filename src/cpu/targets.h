// Which targets there are kernels for: of Highway's, and of AVX-512's (avx512-inl.h) those that this processor runs.
#pragma once

// To be included before Highway's headers. A processor without any other target has SCALAR: EMU128, which Highway takes
// in its place where the compiler is able to, makes finite numbers of fp16's infinities and NaNs in Highway 1.0.3. Newer
// versions have more targets of x86, each of which would take a minute to compile. Vectors of SVE have no size that the
// compiler knows, so there are no arrays of them.
#define HWY_BROKEN_EMU128 1
#if defined(__x86_64__)
#define QUIRE_CPU_WITHOUT_TARGETS (~(HWY_AVX3 | HWY_AVX2 | HWY_SCALAR))
#else
#define QUIRE_CPU_WITHOUT_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
#endif

namespace quire::cpu {

struct Avx512 {
  bool avx3 = false;  // F, BW, DQ and VL
  bool vnni = false;  // VNNI too
  bool zen4 = false;  // VNNI, BF16 and VBMI too
  // Not so on Intel's processors, which make half as many products of bf16 a second as of fp32 (docs/kernels/cpu.md).
  bool zen4_is_best = false;
};

inline Avx512 avx512_here() {
  Avx512 here;
#if defined(__x86_64__)
  here.avx3 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  here.vnni = here.avx3 && __builtin_cpu_supports("avx512vnni");
  here.zen4 = here.vnni && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  here.zen4_is_best = here.zen4 && !__builtin_cpu_is("intel");
#endif
  return here;
}

}  // namespace quire::cpu
