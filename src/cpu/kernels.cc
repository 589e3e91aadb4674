// The kernels of Highway's SIMD targets (foreach_target.h includes this file again for each), and the choice at run
// time among these and those of AVX-512.
#include "cpu/kernels.h"
#include "cpu/targets.h"

// AVX-512 has files of its own (avx512-inl.h).
#define HWY_DISABLED_TARGETS (QUIRE_CPU_WITHOUT_TARGETS | HWY_AVX3)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/kernels.cc"
// foreach_target.h must come first.
#include <hwy/foreach_target.h>

#include <hwy/highway.h>

#include "cpu/cpu.h"
#include "cpu/kernels-inl.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu {
namespace HWY_NAMESPACE {

const Kernels* target_kernels() {
  static const Kernels table = make_kernels(hwy::TargetName(HWY_TARGET), format::AllFormats{});
  return &table;
}

}  // namespace HWY_NAMESPACE
}  // namespace quire::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quire::cpu {
namespace {

HWY_EXPORT(target_kernels);

// 64 bits: the target without vectors is bit 62.
std::uint64_t compiled_targets() { return static_cast<std::uint64_t>(HWY_TARGETS); }

// Those of AVX-512, the best first, where the compiler and the processor have what they use.
std::vector<const Kernels*> runnable_avx512() {
  const Avx512 here = avx512_here();
  std::vector<const Kernels*> all;
  const auto add = [&](bool runs, const Kernels* table) {
    if (runs && table != nullptr) all.push_back(table);
  };
  add(here.zen4_is_best, zen4_kernels());
  add(here.vnni, vnni_kernels());
  add(here.zen4 && !here.zen4_is_best, zen4_kernels());
  add(here.avx3, avx3_kernels());
  return all;
}

// What use_simd_target asked for; null: the best.
const Kernels* chosen = nullptr;

std::vector<const Kernels*> runnable_kernels() {
  std::vector<const Kernels*> all = runnable_avx512();
  // Highway numbers better targets with lower bits.
  const auto runnable = static_cast<std::uint64_t>(hwy::SupportedTargets()) & compiled_targets();
  for (std::uint64_t bit = 1; bit != 0; bit <<= 1) {
    if ((runnable & bit) == 0) continue;
    hwy::SetSupportedTargetsForTest(static_cast<decltype(hwy::SupportedTargets())>(bit));
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    all.push_back(HWY_DYNAMIC_DISPATCH(target_kernels)());
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  return all;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const best = [] {
    const std::vector<const Kernels*> avx512 = runnable_avx512();
    return avx512.empty() ? HWY_DYNAMIC_DISPATCH(target_kernels)() : avx512.front();
  }();
  return chosen != nullptr ? *chosen : *best;
}

std::vector<std::string> simd_targets() {
  std::vector<std::string> names;
  for (const Kernels* table : runnable_kernels()) names.emplace_back(table->target);
  return names;
}

Status use_simd_target(const std::string& name) {
  chosen = nullptr;
  if (name.empty()) return {};
  std::string names;
  for (const Kernels* table : runnable_kernels()) {
    if (name == table->target) chosen = table;
    names += (names.empty() ? "" : ", ") + std::string(table->target);
  }
  if (chosen != nullptr) return {};
  return not_found("SIMD target '" + name + "' is not compiled in or not runnable here; targets: " + names);
}

}  // namespace quire::cpu
#endif  // HWY_ONCE
