#include <bit>
#include <string>

#include "core/validate.h"

namespace quire::core {

Result<FormatPair> validate_problem(const AttentionProblem& problem) {
  const Result<const ModeRow*> known = known_mode(problem.mode);
  if (!known) return known.status();
  const ModeRow& mode = **known;
  if (!mode.compiled) return mode_not_built(mode);
  QUIRE_RETURN_IF_ERROR(check_device("device", " is ", problem.device));
  // Lengths are int32 in every call, so a larger bound on them says nothing.
  const struct {
    const char* name;
    std::int64_t value, least, most;
  } fields[] = {
      {"num_q_heads", problem.num_q_heads, 1, INT32_MAX}, {"num_kv_heads", problem.num_kv_heads, 1, INT32_MAX},
      {"block_size", problem.block_size, 1, INT32_MAX},   {"max_num_tokens", problem.max_num_tokens, 0, INT64_MAX},
      {"max_batch", problem.max_batch, 0, INT32_MAX},     {"max_query_len", problem.max_query_len, 0, INT32_MAX},
      {"max_seq_len", problem.max_seq_len, 0, INT32_MAX}, {"num_splits", problem.num_splits, 0, INT32_MAX}};
  for (const auto& field : fields) {
    if (field.value < field.least || field.value > field.most) {
      return invalid_argument(std::string(field.name) + " is " + str(field.value) + "; supported: " + str(field.least) +
                              " to " + str(field.most));
    }
  }
  if (problem.row_alignment < 1 || problem.row_alignment > 16 ||
      !std::has_single_bit(static_cast<unsigned>(problem.row_alignment))) {
    return invalid_argument("row_alignment is " + str(problem.row_alignment) + "; supported: 1, 2, 4, 8 and 16");
  }
  QUIRE_RETURN_IF_ERROR(check_dtype("query_dtype", problem.query_dtype, kFloatsAndFloat8));
  QUIRE_RETURN_IF_ERROR(check_dtype("key_cache_dtype", problem.key_cache_dtype, kAllDTypes));
  QUIRE_RETURN_IF_ERROR(check_dtype("value_cache_dtype", problem.value_cache_dtype, kAllDTypes));
  if (problem.num_q_heads % problem.num_kv_heads != 0) {
    return invalid_argument("num_q_heads is " + str(problem.num_q_heads) + "; it must be a multiple of num_kv_heads, " +
                            str(problem.num_kv_heads));
  }
  QUIRE_RETURN_IF_ERROR(check_head_size("head_size", problem.head_size));
  QUIRE_RETURN_IF_ERROR(check_head_size("head_size_v", problem.head_size_v));
  const FormatPair pair = formats_of(mode, problem.key_cache_dtype, problem.value_cache_dtype);
  if (!pair.known()) {
    if (mode.registered) return FormatPair{};  // its backend knows what it packs
    const bool is_key = pair.key == format::FormatId::kNone;
    const DType dtype = is_key ? problem.key_cache_dtype : problem.value_cache_dtype;
    return invalid_argument(std::string(is_key ? "key" : "value") + "_cache_dtype is " +
                            std::string(dtype_name(dtype)) + "; mode " + mode.name +
                            " stores float32, float16 or bfloat16");
  }
  QUIRE_RETURN_IF_ERROR(check_packing("head_size", format::format_info(pair.key), problem.head_size));
  QUIRE_RETURN_IF_ERROR(check_packing("head_size_v", format::format_info(pair.value), problem.head_size_v));
  return pair;
}

}  // namespace quire::core
