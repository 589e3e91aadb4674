// The checks that validation is made of. Each gives ok, or one sentence: argument, what came, what is supported.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "core/mode_table.h"
#include "format/formats.h"
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

Status check(const Tensor& tensor, Device device, const Expect& expect);

Status check_head_size(const char* name, std::int64_t head_size);

// Head sizes are multiples of what the format packs together.
Status check_packing(const char* name, const format::FormatInfo& info, std::int64_t head_size);

// A scale given as one element, [Hk], or (batch >= 0) [B, Hk].
Status check_scale(const char* name, const Tensor& scale, Device device, std::int64_t num_kv_heads, std::int64_t batch);

// The mode's formats for these caches.
Result<FormatPair> resolve(ModeId id, const Tensor& key_cache, const Tensor& value_cache);

// One cache tensor [num_blocks, block_size, Hk, row], and its scale cache.
Status check_cache(const char* name, const Tensor& cache, const char* scale_name, const Tensor& scale_cache,
                   Device device, const format::FormatInfo& info, std::int64_t num_kv_heads, std::int64_t head_size,
                   std::int64_t num_blocks, std::int64_t block_size);

// error_counter, int64 [1], on CUDA only.
Status check_counter(const Tensor& counter, Device device);

// Element i of an int64 or int32 vector on the CPU.
inline std::int64_t int_at(const Tensor& t, std::int64_t i) {
  const std::int64_t at = i * t.strides[0];
  return t.dtype == DType::kInt64 ? t.ptr<const std::int64_t>()[at] : t.ptr<const std::int32_t>()[at];
}

}  // namespace quire::core
