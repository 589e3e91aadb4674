// unified_attention, and plan_unified_attention with run_unified_attention, over the problems of tests/support.
#include <algorithm>
#include <cstdlib>
#include <string>

#include "hostile/probe.h"
#include "reference/attention.h"
#include "support/attention_case.h"
#include "support/modes.h"
#include "support/owned_tensor.h"
#include "support/paged_cache.h"

namespace quire::testing {
namespace {

// Every extent is a different number, so that an argument in the place of another is noticed.
AttentionCase::Options small(const std::string& mode) {
  AttentionCase::Options options;
  options.mode = mode;
  options.head_size = 64;
  options.head_size_v = 32;
  options.num_kv_heads = 3;
  options.block_size = 4;
  options.sequences = {{3, 14}, {1, 9}};
  options.garbage_out_of_window = false;  // a probe may widen the window
  return options;
}

AttentionCase::Options with_everything(const std::string& mode) {
  AttentionCase::Options options = small(mode);
  options.window = 6;
  options.causal_per_seq = true;
  options.mm_prefix = true;
  options.softcap = 20.0F;
  options.sinks = true;
  options.alibi = true;
  options.qq_bias = true;
  options.k_scale = ScaleShape::kPerSequence;
  options.v_scale = ScaleShape::kPerHead;
  return options;
}

AttentionCase::Options with_prefixes(const std::string& mode) {
  AttentionCase::Options options = small(mode);
  options.rswa_window = 4;
  options.rswa_prefix_lens = {5, 2};
  options.mm_prefix = true;
  return options;
}

AttentionCase::Options float8_in_and_out(const std::string& mode) {
  AttentionCase::Options options = small(mode);
  options.dtype = DType::kFloat8E4M3;
  options.out_dtype = DType::kFloat8E4M3;
  options.q_scale = ScaleShape::kPerSequence;
  options.k_scale = ScaleShape::kOne;
  options.output_scale = 0.25F;
  options.window = 8;
  options.chunk_lookback = 1;
  return options;
}

AttentionCase::Options ones(const std::string& mode) {
  AttentionCase::Options options = small(mode);
  options.num_kv_heads = 1;
  options.group = 1;
  options.block_size = 1;
  options.sequences = {{1, 1}};
  options.k_scale = ScaleShape::kOne;
  return options;
}

// The tensors of a case: the call without its op.
Call call_of(const std::shared_ptr<AttentionCase>& problem) {
  AttentionCase& c = *problem;
  UnifiedAttentionArgs& args = c.args;
  Call call;
  call.memory = problem;
  for (const auto& buffer : c.cache->bytes()) {
    if (!buffer.empty()) call.buffers.push_back(const_cast<std::vector<std::uint8_t>*>(&buffer));
  }
  for (OwnedTensor* tensor : {&c.query,
                              &c.out,
                              &c.lse,
                              &c.cu_seqlens_q,
                              &c.seq_lens,
                              &c.block_table,
                              &c.causal_per_seq,
                              &c.mm_prefix_range,
                              &c.sinks,
                              &c.alibi_slopes,
                              &c.qq_bias,
                              &c.q_scale,
                              &c.k_scale,
                              &c.v_scale,
                              &c.output_scale,
                              &c.cache->k_page_meta,
                              &c.cache->v_page_meta,
                              &c.cache->k_head_vector,
                              &c.cache->v_head_vector,
                              &c.rswa_prefix_lens}) {
    if (!tensor->bytes.empty()) call.buffers.push_back(&tensor->bytes);
  }
  // "auto" reads any float: only the caller knows that the cache holds bfloat16.
  const std::vector<DType> wider = c.options.mode == "auto" ? std::vector{DType::kFloat32} : std::vector<DType>{};
  const auto scale = [](ScaleShape shape) {
    return shape == ScaleShape::kPerSequence ? "batch num_kv_heads" : "=elements";
  };
  call.tensors = {
      {"query", &args.query, "num_tokens num_q_heads =head_size"},
      {"out", &args.out, "num_tokens num_q_heads =head_size_v", Role::kClose},
      {"key_cache", &args.cache.key_cache, "num_blocks block_size num_kv_heads =row", Role::kInput, wider},
      {"value_cache", &args.cache.value_cache, "num_blocks block_size num_kv_heads =row", Role::kInput, wider},
      {"k_scale_cache", &args.cache.k_scale_cache, "num_blocks block_size num_kv_heads"},
      {"v_scale_cache", &args.cache.v_scale_cache, "num_blocks block_size num_kv_heads"},
      {"k_page_meta", &args.cache.k_page_meta, "num_blocks num_kv_heads =page_bytes"},
      {"v_page_meta", &args.cache.v_page_meta, "num_blocks num_kv_heads =page_bytes_v"},
      {"k_head_vector", &args.cache.k_head_vector, "num_kv_heads =head_size"},
      {"v_head_vector", &args.cache.v_head_vector, "num_kv_heads =head_size_v"},
      {"cu_seqlens_q", &args.cu_seqlens_q, "=batch+1"},
      {"seq_lens", &args.seq_lens, "batch"},
      {"block_table", &args.block_table, "batch ~max_blocks"},
      {"causal_per_seq", &args.mask.causal_per_seq, "batch"},
      {"mm_prefix_range", &args.mask.mm_prefix_range, "batch !num_ranges =2"},
      {"rswa_prefix_lens", &args.mask.rswa_prefix_lens, "batch"},
      {"sinks", &args.sinks, "num_q_heads"},
      {"alibi_slopes", &args.alibi_slopes, "num_q_heads"},
      {"qq_bias", &args.qq_bias, "=max_query_len =max_query_len"},
      {"q_descale", &args.q_descale, scale(c.options.q_scale), Role::kInput, {}, true},
      {"k_descale", &args.k_descale, scale(c.options.k_scale), Role::kInput, {}, true},
      {"v_descale", &args.v_descale, scale(c.options.v_scale), Role::kInput, {}, true},
      {"output_scale", &args.output_scale, "=1", Role::kInput, {}, true},
      {"lse", &args.lse, "num_tokens num_q_heads", Role::kClose}};
  call.words = {"mode", "head_size", "block_size", "error_counter"};
  call.oracle = [&args] { return reference::unified_attention(args); };
  return call;
}

struct AttentionProbes {
  const char* tensors = "";  // of those with this in their names
  bool swaps = false;
};

Call make_attention(const AttentionCase::Options& options, const AttentionProbes& wanted) {
  const auto problem = std::make_shared<AttentionCase>(options);
  Call call = call_of(problem);
  UnifiedAttentionArgs& args = problem->args;
  call.run = [&args] { return unified_attention(args, nullptr); };
  plain_probes(call);

  all_tensor_probes(call, wanted.tensors);
  if (wanted.swaps) swap_probes(call);
  call.probes.push_back({"error_counter given", Expect::kRefused, [&args] {
                           cuda::TensorRef(&args.error_counter).set(args.seq_lens);
                           args.error_counter.dtype = DType::kInt64;
                           args.error_counter.shape[0] = 1;
                         }});

  for (const char* name : {"cu_seqlens_q", "seq_lens", "block_table"}) index_probes(call, name);
  if (options.causal_per_seq) index_probes(call, "causal_per_seq", Expect::kAccepted);
  if (options.mm_prefix) index_probes(call, "mm_prefix_range", Expect::kAccepted);
  const bool prefixes = options.rswa_window != -1;
  if (prefixes) index_probes(call, "rswa_prefix_lens", Expect::kAccepted);
  // NaN and infinity show in the output, make no difference, or are refused. What is certain is which rows they reach.
  for (const char* name : {"alibi_slopes", "qq_bias", "k_descale", "v_descale"}) {
    float_probes(call, name, Expect::kConfined, Expect::kConfined, Expect::kConfined);
  }
  float_probes(call, "sinks", Expect::kRefused, Expect::kRefused, Expect::kConfined);
  if (options.dtype == DType::kFloat32) {
    float_probes(call, "query", Expect::kConfined, Expect::kConfined, Expect::kConfined);
  } else {
    float_probes(call, "q_descale", Expect::kConfined, Expect::kConfined, Expect::kConfined);
    float_probes(call, "output_scale", Expect::kConfined, Expect::kConfined, Expect::kConfined);
  }

  scalar_probes<ModeId, std::int64_t>(call, "mode", &args.mode, {.refused = {-1, -5, kInt32Min, kInt32Max, 1000}});
  for (const char* name : {"auto", "float16", "fp8", "fp8_e5m2", "int8_per_token_head", "fp8_per_token_head",
                           "int4_per_token_head", "int2_per_token_head", "turboquant_k8v4", "turboquant_4bit_nc"}) {
    if (!modes_built({name}) || name == options.mode) continue;
    call.probes.push_back({std::string("mode=") + name, Expect::kRight, [&args, name] { args.mode = mode_of(name); }});
  }
  // The oracle has no answer for logits beyond fp32.
  scalar_probes<float>(
      call, "softmax_scale", &args.softmax_scale,
      {.refused = {kNaN, kInf, -kInf}, .right = {0.0F, -0.0F, -0.1F, 0.5F}, .confined = {kHuge, -kHuge, kTiny}});
  scalar_probes<float>(call, "softcap", &args.softcap,
                       {.refused = {kNaN, kInf, -kInf, -1.0F, -kTiny},
                        .right = {0.5F, 100.0F},
                        .accepted = {0.0F, -0.0F, 30.0F},
                        .confined = {kTiny, kHuge}});
  const bool chunks = options.chunk_lookback >= 0;
  scalar_probes<int>(
      call, "sliding_window", &args.mask.sliding_window,
      prefixes
          ? Values<int>{.refused = {0, -2, kInt32Min, 1, 5, kInt32Max}, .accepted = {-1}}
          : Values<int>{.refused = {0, -2, kInt32Min}, .right = {-1, 1}, .accepted = {2, 5, kInt32Max - 1, kInt32Max}});
  scalar_probes<int>(
      call, "rswa_window", &args.mask.rswa_window,
      prefixes ? Values<int>{.refused = {0, -2, kInt32Min, -1}, .accepted = {1, 2, 5, 1000, kInt32Max - 1, kInt32Max}}
               : Values<int>{.refused = {0, -2, kInt32Min, 1, 5, kInt32Max}, .accepted = {-1}});
  scalar_probes<int>(
      call, "chunk_lookback", &args.mask.chunk_lookback,
      {.refused = {-2, kInt32Min, kInt32Max, kInt32Max - 1}, .right = {0, 1, 2, 5, 1000}, .accepted = {-1}});
  scalar_probes<bool>(call, "causal", &args.mask.causal, {.accepted = {false, true}});
  scalar_probes<bool>(call, "mm_prefix_clamp_window", &args.mask.mm_prefix_clamp_window, {.right = {true}});
  scalar_probes<bool>(call, "use_alibi_sqrt", &args.use_alibi_sqrt, {.right = {true}});
  // The CPU reads the lengths themselves; bounds are for the devices.
  scalar_probes<std::int64_t>(call, "max_query_len", &args.max_query_len,
                              {.refused = {-1, kInt64Min}, .right = {1, kInt32Max, kInt64Max, std::int64_t{1} << 32}});
  scalar_probes<std::int64_t>(call, "max_seq_len", &args.max_seq_len,
                              {.refused = {-1, kInt64Min}, .right = {1, kInt32Max, kInt64Max, std::int64_t{1} << 32}});
  if (chunks) {
    call.probes.push_back({"window and lookback INT32_MAX", Expect::kRight,
                           [&args] { args.mask.sliding_window = args.mask.chunk_lookback = kInt32Max; }});
    call.probes.push_back({"window INT32_MAX, lookback one less", Expect::kRight, [&args] {
                             args.mask.sliding_window = kInt32Max;
                             args.mask.chunk_lookback = kInt32Max - 1;
                           }});
  }
  return call;
}

// ---- plans -------------------------------------------------------------------------------------------------------

// A call whose keys are split, with what the caller passes besides the arguments.
struct Planned {
  explicit Planned(const AttentionCase::Options& options) : problem_case(options) {}

  AttentionCase problem_case;
  AttentionProblem problem;
  std::function<void(AttentionPlan&)> change_plan = [](AttentionPlan&) {};
  std::int64_t workspace_missing = 0;  // bytes less than the plan asks for
  std::size_t workspace_offset = 0;
  bool workspace_null = false;
};

// Makes a plan, takes a workspace of exactly its size, and runs.
Status plan_and_run(const Planned& planned) {
  Result<AttentionPlan> plan = plan_unified_attention(planned.problem);
  if (!plan.ok()) return plan.status();
  planned.change_plan(*plan);
  // A plan for absurd bounds may ask for more than there is: then there is no workspace to give.
  constexpr std::size_t kMostBytes = std::size_t{64} << 20;
  const std::size_t bytes = plan->workspace_bytes() - static_cast<std::size_t>(planned.workspace_missing);
  const bool given = bytes <= kMostBytes && !planned.workspace_null;
  void* const workspace = given && bytes > 0 ? std::malloc(bytes) : nullptr;
  Status status = run_unified_attention(*plan, planned.problem_case.args,
                                        static_cast<std::uint8_t*>(workspace) + planned.workspace_offset,
                                        workspace == nullptr ? 0 : bytes, nullptr);
  std::free(workspace);
  return status;
}

Call make_plan(const AttentionCase::Options& options) {
  const auto planned = std::make_shared<Planned>(options);
  const auto problem_case = std::shared_ptr<AttentionCase>(planned, &planned->problem_case);
  Planned& p = *planned;
  UnifiedAttentionArgs& args = p.problem_case.args;
  p.problem = *problem_of(args);
  p.problem.num_splits = 3;
  Call call = call_of(problem_case);
  call.run = [&p] { return plan_and_run(p); };
  call.words.insert(call.words.end(),
                    {"workspace", "device", "plan", "split", "num_tokens", "batch", "query_len", "seq_len"});
  plain_probes(call);

  AttentionProblem& problem = p.problem;
  const auto dimension = [&](const char* name, int* field) {
    scalar_probes<int>(call, name, field,
                       {.refused = {kInt32Min, -1, 0, *field - 1, *field + 1, 2 * *field, kInt32Max - 1, kInt32Max}});
  };
  dimension("num_q_heads", &problem.num_q_heads);
  dimension("num_kv_heads", &problem.num_kv_heads);
  dimension("head_size", &problem.head_size);
  dimension("head_size_v", &problem.head_size_v);
  dimension("block_size", &problem.block_size);
  const auto bound = [&](const char* name, std::int64_t* field) {
    Values<std::int64_t> values{
        .refused = {kInt64Min, -1, 0, *field - 1}, .right = {}, .accepted = {*field + 1}, .confined = {}};
    for (int bits : {20, 30, 31, 32, 33, 34, 40, 50, 59, 60, 61, 62}) values.right.push_back(std::int64_t{1} << bits);
    values.right.insert(values.right.end(), {kInt32Max, kInt64Max - 1, kInt64Max, (std::int64_t{1} << 59) + 64});
    scalar_probes<std::int64_t>(call, name, field, values);
  };
  bound("max_num_tokens", &problem.max_num_tokens);
  bound("max_batch", &problem.max_batch);
  bound("max_query_len", &problem.max_query_len);
  bound("max_seq_len", &problem.max_seq_len);
  for (int bits : {20, 31, 34, 47, 62}) {
    call.probes.push_back({"every bound=" + to_text(std::int64_t{1} << bits), Expect::kRight, [&problem, bits] {
                             for (std::int64_t* field : {&problem.max_num_tokens, &problem.max_batch,
                                                         &problem.max_query_len, &problem.max_seq_len}) {
                               *field = std::int64_t{1} << bits;
                             }
                           }});
  }
  // The value 0 sets no limit, and the plan then chooses the splits.
  for (std::int64_t value : {kInt64Max, std::int64_t{1} << 60, std::int64_t{1} << 35}) {
    call.probes.push_back({"max_seq_len=" + to_text(value) + ", num_splits=0", Expect::kRight, [&problem, value] {
                             problem.max_seq_len = value;
                             problem.num_splits = 0;
                           }});
  }
  scalar_probes<int>(call, "num_splits", &problem.num_splits,
                     {.refused = {-1, kInt32Min}, .right = {100, kInt32Max - 1, kInt32Max}, .accepted = {0, 1, 2}});
  scalar_probes<int>(
      call, "row_alignment", &problem.row_alignment,
      {.refused = {kInt32Min, -1, 0, 3, 5, 6, 12, 15, 24, 32, 1024, kInt32Max}, .right = {16}, .accepted = {1, 2, 4}});
  scalar_probes<bool>(call, "batch_invariant", &problem.batch_invariant, {.accepted = {true}});
  scalar_probes<bool>(call, "has_centre", &problem.has_centre, {.refused = {true}});
  scalar_probes<int>(call, "arch.major", &problem.arch.major, {.refused = {kInt32Min, -1, 9, kInt32Max}});
  scalar_probes<ModeId, std::int64_t>(call, "mode", &problem.mode, {.refused = {-1, kInt32Min, kInt32Max, 1000, 2}});
  scalar_probes<DeviceType, std::int64_t>(call, "device", &problem.device.type, {.refused = {1, 2, 99, 255}});
  scalar_probes<int>(call, "device.index", &problem.device.index, {.refused = {kInt32Min, -1, 1, kInt32Max}});
  scalar_probes<DType, std::int64_t>(call, "query_dtype", &problem.query_dtype,
                                     {.refused = {1, 2, 3, 4, 5, 6, 7, 8, 9, 77, 255}});

  // A plan cannot be changed, but it may be empty.
  const auto spoil = [&](const std::string& name, Expect expect, const std::function<void(AttentionPlan&)>& change) {
    call.probes.push_back({"plan." + name, expect, [&p, change] { p.change_plan = change; }});
  };
  spoil("default", Expect::kRefused, [](AttentionPlan& plan) { plan = AttentionPlan(); });

  call.probes.push_back({"workspace null", Expect::kRefused, [&p] { p.workspace_null = true; }});
  for (int bytes : {1, 4, 16}) {
    call.probes.push_back({"workspace " + std::to_string(bytes) + " bytes short", Expect::kRefused,
                           [&p, bytes] { p.workspace_missing = bytes; }});
  }
  for (std::size_t bytes : {1, 4, 8}) {
    call.probes.push_back(
        {"workspace+" + std::to_string(bytes), Expect::kRefused, [&p, bytes] { p.workspace_offset = bytes; }});
  }
  // The same bad arguments as in the one-call form, now with a plan that is good.
  for (const char* name : {"cu_seqlens_q", "seq_lens", "block_table"}) index_probes(call, name);
  return call;
}

}  // namespace

std::vector<Group> attention_groups() {
  const auto group = [](const std::string& name, const AttentionCase::Options& options, const AttentionProbes& wanted,
                        int refused) {
    return Group{"attention/" + name, {options.mode}, [=] { return make_attention(options, wanted); }, refused, 90};
  };
  AttentionCase::Options gaps = small("int8_per_token_head");
  gaps.layout = Layout::kPadded;
  std::vector<Group> groups;
  if (parse_kv_cache_dtype("k=guest_pair5,v=guest_int6").ok()) {  // tests/format/guests
    AttentionCase::Options centred = small("k=guest_pair5,v=guest_int6");
    centred.centre = true;
    groups.push_back(group("guests", centred, {.tensors = "_"}, 220));
  }
  const std::vector<Group> of_every_build = {
      group("auto", small("auto"), {.tensors = "cache", .swaps = true}, 220),
      group("fp8", small("fp8"), {.tensors = "cache"}, 220),
      group("int8", gaps, {.tensors = "cache"}, 220),
      group("int4", small("int4_per_token_head"), {.tensors = "cache"}, 220),
      group("turboquant", small("turboquant_k8v4"), {.tensors = "cache"}, 220),
      group("pair", small("k=int8_per_token_head,v=int4_per_token_head"), {.tensors = "cache"}, 220),
      group("everything", with_everything("int4_per_token_head"), {.swaps = true}, 1100),
      group("prefixes", with_prefixes("int8_per_token_head"), {}, 600),
      group("float8", float8_in_and_out("int8_per_token_head"), {.tensors = "scale"}, 220),
      group("ones", ones("int4_per_token_head"), {}, 500)};
  groups.insert(groups.end(), of_every_build.begin(), of_every_build.end());
  return groups;
}

std::vector<Group> plan_groups() {
  const auto group = [](const std::string& name, const AttentionCase::Options& options) {
    return Group{"plan/" + name, {options.mode}, [=] { return make_plan(options); }, 180, 60};
  };
  AttentionCase::Options splits = small("int8_per_token_head");
  splits.sequences = {{3, 200}, {1, 150}};
  splits.block_size = 16;
  AttentionCase::Options floats = small("auto");
  floats.sequences = splits.sequences;
  return {group("int8", splits), group("auto", floats)};
}

}  // namespace quire::testing
