// What the host sides of the kernels share: driver errors as Status, access widths, and the table of the pairs of
// formats that were compiled (generated from core/modes.def into cuda/pairs.def).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "format/formats.h"
#include "quire/status.h"

namespace quire::cuda {

inline Status cuda_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  return internal_error(std::string(what) + ": CUDA reports " + cudaGetErrorName(error) + " (" +
                        cudaGetErrorString(error) + ")");
}

// The widest access, up to 16 bytes, that divides an address and every distance added to it.
inline int access_bytes(const void* address, std::initializer_list<std::int64_t> distances) {
  auto bits = reinterpret_cast<std::uintptr_t>(address) | 16U;
  for (const std::int64_t distance : distances) bits |= static_cast<std::uintptr_t>(distance);
  return static_cast<int>(bits & -bits);
}

// Whether the current device runs the kernels that are compiled for sm_90a alone, and they were compiled. False where
// there is no device.
inline bool runs_sm90_kernels() {
#ifdef QUIRE_CUDA_SM90A
  int device = 0;
  int major = 0;
  int minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
         minor == 0;
#else
  return false;
#endif
}

template <class Launch>
struct PairEntry {
  format::FormatId key, value;
  Launch* launch;
};

template <class Launch, std::size_t kSize>
Launch* find_pair(const PairEntry<Launch> (&table)[kSize], format::FormatId key, format::FormatId value) {
  for (const auto& entry : table) {
    if (entry.key == key && entry.value == value) return entry.launch;
  }
  return nullptr;
}

inline Status pair_not_built(format::FormatId key, format::FormatId value) {
  const auto name = [](format::FormatId id) {
    return id == format::FormatId::kNone ? std::string("rows of a registered backend")
                                         : std::string(format::format_info(id).name);
  };
  return unsupported("no CUDA kernels for keys in " + name(key) + " with values in " + name(value) +
                     "; this build has the pairs of its modes: add a QUIRE_MODE line to src/core/modes.def, or build "
                     "with that mode in QUIRE_MODES");
}

}  // namespace quire::cuda
