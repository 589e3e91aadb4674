#include <string>

#include "core/tensor_fields.h"
#include "core/validate.h"

namespace quire::core {
Status validate_merge(const MergeAttnStatesArgs& args) {
  QUIRE_RETURN_IF_ERROR(check_tensors(args));
  QUIRE_RETURN_IF_ERROR(check(args.prefix_out, {.name = "prefix_out",
                                                .dtypes = kFloats,
                                                .shape = {kAny, kAny, kAny},
                                                .shape_text = "[num_tokens, num_q_heads, head_size_v]",
                                                .dense_rows = true}));
  const std::int64_t tokens = args.prefix_out.shape[0];
  const std::int64_t heads = args.prefix_out.shape[1];
  const std::int64_t head_size = args.prefix_out.shape[2];
  const auto check_out = [&](const char* name, const ConstTensor& tensor) {
    return check(tensor, {.name = name,
                          .dtypes = kFloats,
                          .shape = {tokens, heads, head_size},
                          .shape_text = "[num_tokens, num_q_heads, head_size_v]",
                          .dense_rows = true});
  };
  const auto check_lse = [&](const char* name, const ConstTensor& tensor, bool optional) {
    return check(tensor, {.name = name,
                          .dtypes = {DType::kFloat32},
                          .shape = {tokens, heads},
                          .shape_text = "[num_tokens, num_q_heads]",
                          .optional = optional});
  };
  QUIRE_RETURN_IF_ERROR(check_out("suffix_out", args.suffix_out));
  QUIRE_RETURN_IF_ERROR(check_out("out", args.out));
  QUIRE_RETURN_IF_ERROR(check_lse("prefix_lse", args.prefix_lse, false));
  QUIRE_RETURN_IF_ERROR(check_lse("suffix_lse", args.suffix_lse, false));
  QUIRE_RETURN_IF_ERROR(check_lse("lse", args.lse, true));
  QUIRE_RETURN_IF_ERROR(check_count("prefix_out", args.prefix_out, "num_q_heads", heads, 0));
  QUIRE_RETURN_IF_ERROR(check_count("prefix_out", args.prefix_out, "head_size_v", head_size, 0));
  QUIRE_RETURN_IF_ERROR(check_apart("out", args.out));
  return check_apart("lse", args.lse);
}

}  // namespace quire::core
