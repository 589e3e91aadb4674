// The kernels of one target as a table.
#if defined(QUIRE_CPU_KERNELS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_CPU_KERNELS_INL_H_
#undef QUIRE_CPU_KERNELS_INL_H_
#else
#define QUIRE_CPU_KERNELS_INL_H_
#endif

#include "cpu/few_rows-inl.h"
#include "cpu/float_rows-inl.h"
#include "cpu/levels-inl.h"
#include "cpu/operands-inl.h"
#include "cpu/products-inl.h"
#include "cpu/softmax-inl.h"
#include "cpu/store-inl.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu {
namespace HWY_NAMESPACE {
namespace {

template <class F>
constexpr Kernels::EncodeRows encode_rows_if_enabled() {
  if constexpr (format::format_enabled<F>()) return &encode_rows<F>;
  return nullptr;
}
template <class F>
constexpr Kernels::LoadTile load_tile_if_enabled() {
  if constexpr (format::format_enabled<F>()) return &load_tile<F>;
  return nullptr;
}

template <class... Fs>
Kernels make_kernels(const char* target, format::TypeList<Fs...>) {
  Kernels k{.target = target,
            .load_row = &load_row,
            .encode_rows = {encode_rows_if_enabled<Fs>()...},
            .collect_scales = &collect_scales,
            .load_tile = {load_tile_if_enabled<Fs>()...},
            .float_rows = {float_rows_if_enabled<Fs>()...},
            .dot_tile = &dot_tile,
            .accumulate_tile = &accumulate_tile,
            .make_logits = &make_logits,
            .softmax_tile = &softmax_tile,
            .make_weights = &make_weights,
            .rotate = &rotate_row,
            .rotate_back = &rotate_row_back};
#if QUIRE_CPU_HAS_PAIRS
  k.blocks = kBlocks;
  k.operands = {operand_format<Fs>()...};
  k.make_queries = &make_queries;
  k.dot_keys = &dot_keys;
  k.transpose_keys = &transpose_keys;
  k.dot_columns = &dot_columns;
  k.accumulate_values = &accumulate_values;
#endif
  return k;
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace quire::cpu
HWY_AFTER_NAMESPACE();

#endif  // QUIRE_CPU_KERNELS_INL_H_
