// What the store kernels receive: a call as plain data, strides in bytes.
#pragma once

#include <cstdint>

#include "attention/paged_rows.h"
#include "attention/problem.h"
#include "format/formats.h"
#include "quire/ops.h"
#include "quire/tensor.h"

namespace quire::cuda {

// One of key and value: its rows in the cache, and in the input.
struct StoreSide : attention::WritablePagedRows {
  format::FormatId format = format::FormatId::kNone;
  int access = 1;  // bytes per store

  const std::uint8_t* input = nullptr;  // [num_tokens, num_heads, head_size]
  std::int64_t input_token_stride = 0, input_head_stride = 0, input_element_stride = 0;
  DType input_dtype = DType::kFloat32;
  int input_access = 0;  // bytes per load; 0: elements are not neighbours, or not aligned to their size

  const float* tensor_scale = nullptr;  // [1] or [num_heads], may be null: 1
  std::int64_t tensor_scale_stride = 0;

  int head_size = 0;

  // store_elements: element i lies at (i / group) * group_stride + (i % group) * element_stride in its row.
  int group = 1;
  std::int64_t group_stride = 0, element_stride = 0;
  bool copy_codes = false;  // the input holds codes of the cache's float8
};

// n / divisor for 0 <= n < 2^31 by a multiplication: multiplier = ceil(2^(31 + shift) / divisor), shift = ceil(log2
// divisor), is too large by less than 2^-31 of itself.
struct Divider {
  std::uint32_t divisor = 1, multiplier = 0, shift = 0;

  static Divider by(std::uint32_t divisor) {
    std::uint32_t shift = 0;
    while ((std::uint64_t{1} << shift) < divisor) ++shift;
    return {divisor, static_cast<std::uint32_t>(((std::uint64_t{1} << (31 + shift)) + divisor - 1) / divisor), shift};
  }
  QUIRE_HD std::uint32_t quotient(std::uint32_t n) const {
    return static_cast<std::uint32_t>((std::uint64_t{2 * n} * multiplier) >> 32) >> shift;
  }
};

struct StoreParams {
  StoreSide key, value;

  // Staged rows. Whether a V row starts where its K row ends; how many neighbouring heads' slots adjoin, as a divisor
  // of the rows of a warp; bytes per access to the stage and to the cache.
  bool slots_adjoin = false;
  int run_rows = 1, stage_access = 1, run_access = 1;

  const std::uint8_t* slot_mapping = nullptr;  // [num_tokens] int32 or int64
  std::int64_t slot_mapping_stride = 0;
  bool slots_are_int64 = false;
  std::int64_t num_tokens = 0;
  Divider num_heads;
  std::int64_t num_slots = 0, block_size = 0;
  Divider block;  // of block_size, where slots fit 31 bits
  bool slots_fit_31_bits = false;
  unsigned long long* error_counter = nullptr;  // [1], may be null
};

StoreParams make_store_params(const ReshapeAndCacheArgs& args, const StoreProblem& problem);

}  // namespace quire::cuda
