// docs/api.md shows common mistakes and the sentence that each gets. Each is made here, and its sentence must be there.
#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "cuda/device_memory.h"
#include "quire/quire.h"
#include "support/attention_case.h"
#include "support/modes.h"

namespace quire::testing {
namespace {

std::string api_page() {
  std::ifstream file(QUIRE_SOURCE_DIR "/docs/api.md");
  return {std::istreambuf_iterator<char>(file), {}};
}

TEST(ApiPage, ShowsTheSentenceOfEachMistake) {
  QUIRE_NEEDS_MODES("int8_per_token_head", "int4_per_token_head");
  const std::string page = api_page();
  ASSERT_FALSE(page.empty());
  AttentionCase::Options options;
  options.mode = "int8_per_token_head";
  options.head_size = 128;
  options.num_kv_heads = 8;
  options.group = 4;
  options.sequences = {{1, 40}};
  const auto mistake = [&](const char* what, const Status& status) {
    ASSERT_FALSE(status.ok()) << what;
    // The list of formats is longer in a build with more of them.
    const std::string sentence = status.message().substr(0, status.message().find("; formats:"));
    EXPECT_NE(page.find("`" + sentence + "`"), std::string::npos) << what << ":\n" << sentence;
  };
  const auto read = [&](const char* what, void (*spoil)(UnifiedAttentionArgs & args)) {
    AttentionCase problem(options);
    spoil(problem.args);
    mistake(what, unified_attention(problem.args, nullptr));
  };
  const auto store = [&](const char* what, void (*spoil)(ReshapeAndCacheArgs & args)) {
    AttentionCase problem(options);
    ReshapeAndCacheArgs args;
    problem.cache->apply(args);
    args.key = problem.key.view;
    args.value = problem.value.view;
    args.slot_mapping = problem.slot_mapping.view;
    spoil(args);
    mistake(what, reshape_and_cache(args, nullptr));
  };

  mistake("a mode's name", parse_kv_cache_dtype("k=int5,v=int4_per_token_head").status());
  KVCacheSpec spec;
  spec.mode = mode_of("int4_per_token_head");
  spec.head_size = 127;
  mistake("a head size that the packing does not divide", make_layout(spec).status());
  store("no cache", [](ReshapeAndCacheArgs& args) { args.cache = {}; });
  store("scales forgotten", [](ReshapeAndCacheArgs& args) { args.cache.k_scale_cache = {}; });
  store("a scale where none belongs", [](ReshapeAndCacheArgs& args) {
    static float one = 1.0F;
    args.k_scale = Tensor::contiguous(&one, DType::kFloat32, {1});
  });
  store("a slot past the end", [](ReshapeAndCacheArgs& args) {
    static std::int64_t slot = 99999;
    args.slot_mapping = Tensor::contiguous(&slot, DType::kInt64, {1});
  });
  store("tensors on two devices", [](ReshapeAndCacheArgs& args) { args.slot_mapping.device = Device::cuda(1); });
  read("softmax_scale forgotten", [](UnifiedAttentionArgs& args) { args.softmax_scale = 0.0F; });
  read("a window of 0", [](UnifiedAttentionArgs& args) { args.mask.sliding_window = 0; });
  read("heads", [](UnifiedAttentionArgs& args) {
    args.query.shape[1] = args.out.shape[1] = 12;
    args.lse = {};
  });
  read("another mode's cache", [](UnifiedAttentionArgs& args) { args.mode = mode_of("int4_per_token_head"); });

  AttentionCase problem(options);
  AttentionProblem bounds = *problem_of(problem.args);
  bounds.max_seq_len = 32;
  mistake("a call outside of its plan",
          run_unified_attention(*plan_unified_attention(bounds), problem.args, nullptr, 0, nullptr));
  bounds.max_seq_len = 4096;
  mistake("a workspace that was not given",
          run_unified_attention(*plan_unified_attention(bounds), problem.args, nullptr, 0, nullptr));
  mistake("an empty plan", run_unified_attention({}, problem.args, nullptr, 0, nullptr));
}

}  // namespace
}  // namespace quire::testing
