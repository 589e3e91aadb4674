// The kernels that are compiled for each pair of formats, one line each.
#pragma once

#include <type_traits>
#include <vector>

#include "cuda/kernel/decode_pages/launch.h"
#include "cuda/kernel/decode_split/launch.h"
#include "cuda/kernel/prefill_sm90/launch.h"
#include "cuda/kernel/prefill_split/launch.h"
#include "cuda/kernels.h"
#include "format/formats.h"

namespace quire::cuda {

using PairKernels = format::TypeList<DecodePages<4>,   //
                                     DecodePages<8>,   //
                                     DecodePages<16>,  //
                                     DecodePages<32>,  //
                                     DecodeSplit,      //
                                     PrefillSplit,     //
                                     PrefillSm90>;

// The rows of a pair and a class of head sizes (up to kHead). A float32 cache has none: 16-bit products would round it.
template <class KeyF, class ValueF, int kHead, class... Kernels>
std::vector<KernelDesc> make_rows(format::TypeList<Kernels...>) {
  std::vector<KernelDesc> rows;
  const auto add = [&]<class Kernel>() {
    if constexpr (Kernel::template kCompiled<KeyF, ValueF, kHead>) {
      rows.push_back({.name = Kernel::kName,
                      .key = format::format_id<KeyF>,
                      .value = format::format_id<ValueF>,
                      .max_head_size = kHead,
                      .serves_few = Kernel::kServesFew,
                      .serves_many = Kernel::kServesMany,
                      .tensor_cores = true,
                      .shape = Kernel::template kShape<KeyF, ValueF, kHead>,
                      .refuses = &Kernel::refuses,
                      .launch = &Kernel::template launch<KeyF, ValueF, kHead>});
      if constexpr (Kernel::template kShape<KeyF, ValueF, kHead>.persistent) {
        rows.back().workspace = &Kernel::template workspace<KeyF, ValueF, kHead>;
      }
    }
  };
  if constexpr (!std::is_same_v<KeyF, format::Float32> && !std::is_same_v<ValueF, format::Float32>) {
    (add.template operator()<Kernels>(), ...);
  }
  return rows;
}

// Defined in a generated source each.
template <class KeyF, class ValueF, int kHead>
std::vector<KernelDesc> kernel_rows() {
  return make_rows<KeyF, ValueF, kHead>(PairKernels{});
}

}  // namespace quire::cuda
