#include <string>
#include <tuple>
#include <utility>

#include "core/tensor_fields.h"
#include "core/validate.h"

namespace quire::core {
namespace {

// Every tensor of a call. The first one given says where the call runs.
constexpr TensorField<MergeAttnStatesArgs> kTensors[] = {{"prefix_out", &MergeAttnStatesArgs::prefix_out},
                                                         {"prefix_lse", &MergeAttnStatesArgs::prefix_lse},
                                                         {"suffix_out", &MergeAttnStatesArgs::suffix_out},
                                                         {"suffix_lse", &MergeAttnStatesArgs::suffix_lse},
                                                         {"out", &MergeAttnStatesArgs::out},
                                                         {"lse", &MergeAttnStatesArgs::lse}};

}  // namespace

MergeAttnStatesArgs drop_idle_strides(const MergeAttnStatesArgs& args) { return drop_idle_strides(args, kTensors); }

Status validate_merge(const MergeAttnStatesArgs& args) {
  QUIRE_RETURN_IF_ERROR(check_tensors(args, kTensors));
  QUIRE_RETURN_IF_ERROR(check(args.prefix_out, {.name = "prefix_out",
                                                .dtypes = kFloats,
                                                .shape = {kAny, kAny, kAny},
                                                .shape_text = "[num_tokens, num_q_heads, head_size_v]",
                                                .dense_rows = true}));
  const std::int64_t tokens = args.prefix_out.shape[0];
  const std::int64_t heads = args.prefix_out.shape[1];
  const std::int64_t head_size = args.prefix_out.shape[2];
  for (const auto& [name, tensor] : {std::pair{"suffix_out", &args.suffix_out}, std::pair{"out", &args.out}}) {
    QUIRE_RETURN_IF_ERROR(check(*tensor, {.name = name,
                                          .dtypes = kFloats,
                                          .shape = {tokens, heads, head_size},
                                          .shape_text = "[num_tokens, num_q_heads, head_size_v]",
                                          .dense_rows = true}));
  }
  for (const auto& [name, tensor, optional] :
       {std::tuple{"prefix_lse", &args.prefix_lse, false}, std::tuple{"suffix_lse", &args.suffix_lse, false},
        std::tuple{"lse", &args.lse, true}}) {
    QUIRE_RETURN_IF_ERROR(check(*tensor, {.name = name,
                                          .dtypes = {DType::kFloat32},
                                          .shape = {tokens, heads},
                                          .shape_text = "[num_tokens, num_q_heads]",
                                          .optional = optional}));
  }
  QUIRE_RETURN_IF_ERROR(check_count("prefix_out", args.prefix_out, "num_q_heads", heads, 0));
  QUIRE_RETURN_IF_ERROR(check_count("prefix_out", args.prefix_out, "head_size_v", head_size, 0));
  QUIRE_RETURN_IF_ERROR(check_apart("out", args.out));
  return check_apart("lse", args.lse);
}

}  // namespace quire::core
