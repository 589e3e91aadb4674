// Which of the kernels for AVX-512 (avx512-inl.h) this processor has the instructions for.
#pragma once

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
