// The checks that validation is made of. Each gives ok, or one sentence: argument, what came, what is supported.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "core/mode_table.h"
#include "format/formats.h"
#include "quire/layout.h"
#include "quire/mode.h"
#include "quire/status.h"
#include "quire/tensor.h"

#define QUIRE_RETURN_IF_ERROR(expression)          \
  do {                                             \
    if (Status status_ = (expression); !status_) { \
      return status_;                              \
    }                                              \
  } while (false)

namespace quire::core {

inline std::string str(std::int64_t value) { return std::to_string(value); }

inline bool is_float8(DType dtype) { return dtype == DType::kFloat8E4M3 || dtype == DType::kFloat8E5M2; }

constexpr std::initializer_list<DType> kFloats = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
constexpr std::initializer_list<DType> kFloatsAndFloat8 = {DType::kFloat32, DType::kFloat16, DType::kBFloat16,
                                                           DType::kFloat8E4M3, DType::kFloat8E5M2};
constexpr std::initializer_list<DType> kAllDTypes = {DType::kFloat32,    DType::kFloat16,    DType::kBFloat16,
                                                     DType::kFloat8E4M3, DType::kFloat8E5M2, DType::kInt8,
                                                     DType::kUInt8,      DType::kInt32,      DType::kInt64};

// What an argument must look like. An extent of kAny is not checked.
constexpr std::int64_t kAny = -1;
struct Expect {
  const char* name;
  std::initializer_list<DType> dtypes;
  std::initializer_list<std::int64_t> shape;
  const char* shape_text;  // "[num_tokens, num_kv_heads, head_size]"
  bool optional = false;
  bool dense_rows = false;  // last stride 1
};

Status check_dtype(const char* name, DType dtype, std::initializer_list<DType> supported);

// A tensor that has passed check_extents.
Status check(const ConstTensor& tensor, const Expect& expect);

// The elements are there and aligned.
Status check_memory(const char* name, const ConstTensor& tensor);

// What every tensor must be before anything is computed from it, given or not: 0 to kMaxDims dimensions, no negative
// extent, extents whose product fits 63 bits (where one of them is 0: the product of the others), and strides that
// reach no element further than 63 bits of bytes. After it neither numel() nor an element's offset overflows.
Status check_extents(const char* name, const ConstTensor& tensor);

// A device that there may be (`name` "key", `verb` " is on "): of a known type, with an index that its type can have.
// Whether the machine has it is for the device to say.
Status check_device(const char* name, const char* verb, const Device& device);

// An output's elements must lie apart: two of them at one address would be written in any order. A sufficient test,
// which every slice, transposition and page of a dense array passes: sorted by stride, each dimension steps over all
// that lies inside it.
Status check_apart(const char* name, const ConstTensor& tensor);

// A count that is computed with as an int: `value`, `what` of the tensor `name`.
Status check_count(const char* name, const ConstTensor& tensor, const char* what, std::int64_t value,
                   std::int64_t least);

Status check_head_size(const char* name, std::int64_t head_size);

// Head sizes are multiples of what the format packs together.
Status check_packing(const char* name, const format::FormatInfo& info, std::int64_t head_size);

// A scale is one element, [Hk] or, where batch >= 0, [B, Hk].
Status check_scale(const char* name, const ConstTensor& scale, std::int64_t num_kv_heads, std::int64_t batch);

// Finds the mode's formats for caches of these dtypes.
Result<FormatPair> resolve(const ModeRow& mode, const ConstTensor& key_cache, const ConstTensor& value_cache);

// Finds the row of a mode, and refuses an id that is none.
Result<const ModeRow*> known_mode(ModeId id);

Status mode_not_built(const ModeInfo& mode);

// Checks one cache tensor [num_blocks, block_size, Hk, row] and its scale cache.
Status check_cache(const char* name, const ConstTensor& cache, const char* scale_name, const ConstTensor& scale_cache,
                   const format::FormatInfo& info, std::int64_t num_kv_heads, std::int64_t head_size,
                   std::int64_t num_blocks, std::int64_t block_size);

// What a side's rows may be stored less of: only a format with a centre takes one. Both tensors are optional.
Status check_centre(const char* page_name, const ConstTensor& page_meta, const char* vector_name,
                    const ConstTensor& head_vector, const format::FormatInfo& info, std::int64_t num_blocks,
                    std::int64_t num_kv_heads, int head_size);

// Whether a cache comes with something that its rows are stored less of.
template <class Data>
bool has_centre(const BasicKVCacheViews<Data>& cache) {
  return cache.k_page_meta.defined() || cache.v_page_meta.defined() || cache.k_head_vector.defined() ||
         cache.v_head_vector.defined();
}

// error_counter is int64 [1], and only CUDA has one.
Status check_counter(const ConstTensor& counter, Device device);

// Reads element i of an int64 or int32 vector on the CPU.
inline std::int64_t int_at(const ConstTensor& t, std::int64_t i) {
  const std::int64_t at = i * t.strides[0];
  return t.dtype == DType::kInt64 ? t.ptr<const std::int64_t>()[at] : t.ptr<const std::int32_t>()[at];
}

}  // namespace quire::core
