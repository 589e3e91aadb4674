// Finds a format's type by its id at run time, inside a kernel that serves every pair of formats.
#pragma once

#include "cuda/format/formats.cuh"
#include "format/formats.h"

namespace quire::cuda {

// Calls visit.template operator()<F>() for the format with this id, where it is built.
template <class Visit, class... Fs>
__device__ __forceinline__ void with_format_of(format::TypeList<Fs...>, format::FormatId id, Visit&& visit) {
  const auto try_one = [&]<class F>() {
    if constexpr (format::format_enabled<F>()) {
      if (id == format::format_id<F>) visit.template operator()<F>();
    }
  };
  (try_one.template operator()<Fs>(), ...);
}
template <class Visit>
__device__ __forceinline__ void with_format(format::FormatId id, Visit&& visit) {
  with_format_of(format::AllFormats{}, id, visit);
}

}  // namespace quire::cuda
