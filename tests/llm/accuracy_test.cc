// The accuracy of the modes on a subset of docs/results/accuracy.md that takes seconds.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "llm/evaluate.h"
#include "llm/models.h"

namespace quire::testing {
namespace {

using llm::EvalScore;
using llm::Model;

llm::EvalSets tiny_lm_sets(const llm::ModelConfig& config) {
  const std::string dir = tiny_lm_dir();
  const auto sets = llm::load_eval_sets(
      {dir + "/heldout_tokens.npy", dir + "/recall.jsonl.gz", dir + "/arithmetic.jsonl.gz"}, config);
  EXPECT_TRUE(sets.ok()) << sets.status().message();
  return *sets;
}

// One window of 32 and a prompt of each kind. docs/results/accuracy.md has the full table, a mean over all windows; one
// window may lie half as high again, so the bounds here are 1.5 times vLLM's KL (int8: half of vLLM's, which
// truncates), and the order of the modes, which the table fixes with gaps of two and more.
TEST(Accuracy, ModesRankAsTheirBitsSay) {
  QUIRE_NEEDS_MODES("float32", "bfloat16", "int8_per_token_head", "fp8_per_token_head", "int4_per_token_head",
                    "int2_per_token_head");
  auto model = Model::load(tiny_lm_dir());
  ASSERT_TRUE(model.ok()) << model.status().message();
  const auto sets = tiny_lm_sets(model->config());
  EXPECT_EQ(sets.tokens.size(), 65536U);
  EXPECT_EQ(sets.recall.size(), 400U);
  EXPECT_EQ(sets.arithmetic.size(), 300U);
  const auto result =
      llm::evaluate(*model, sets,
                    {.modes = modes_of({"float32", "bfloat16", "int8_per_token_head", "fp8_per_token_head",
                                        "int4_per_token_head", "int2_per_token_head"}),
                     .max_windows = 1,
                     .max_prompts = 1,
                     .progress = {}});
  ASSERT_TRUE(result.ok()) << result.status().message();
  const auto& scores = *result;
  const EvalScore &fp32 = scores[0], &bf16 = scores[1], &int8 = scores[2], &fp8 = scores[3], &int4 = scores[4],
                  &int2 = scores[5];
  EXPECT_EQ(fp32.kl_divergence, 0.0) << "the reference and the mode are the same computation";
  EXPECT_EQ(fp32.same_top_token, 1.0);
  // A bf16 cache holds what a bf16 model hands over; what is left is attention's rounding of softmax weights, two parts
  // of bf16: 2^-17. That makes one in 2^9 of the model's next bf16 numbers round the other way, by 2^-8: a mean square
  // of 2^-25. int8 moves each value by up to half a step of its row's largest / 127, which is 3 to 4 times the rms: a
  // mean square of 2^-14, of which attention's mean over some 2^3 keys leaves 2^-17. KL goes with the mean square of
  // small errors, so 2^8 apart; one window may differ from that by a factor of 2.5.
  EXPECT_LT(100.0 * *bf16.kl_divergence, *int8.kl_divergence);
  EXPECT_LT(*int8.kl_divergence, 0.0017 / 2.0 * 1.5);
  EXPECT_LT(*fp8.kl_divergence, 0.0035 * 1.5);
  EXPECT_LT(*int4.kl_divergence, 0.0241 * 1.5);
  EXPECT_LT(*int2.kl_divergence, 0.3751 * 1.5);
  EXPECT_LT(2.0 * *int8.kl_divergence, *fp8.kl_divergence);
  EXPECT_LT(2.0 * *fp8.kl_divergence, *int4.kl_divergence);
  EXPECT_LT(2.0 * *int4.kl_divergence, *int2.kl_divergence);
  for (const EvalScore* eight_bit : {&int8, &fp8}) EXPECT_NEAR(*eight_bit->perplexity / *bf16.perplexity, 1.0, 0.003);
  EXPECT_LT(*int4.perplexity / *bf16.perplexity, 11.0155 / 10.8102 * 1.02);
  for (const EvalScore* score : {&fp32, &bf16, &int8, &fp8, &int4}) {
    EXPECT_EQ(score->recall.size(), 4U);
    for (const auto& [context, share] : score->recall) EXPECT_EQ(share, 1.0) << score->mode << " " << context;
    EXPECT_EQ(score->arithmetic, 1.0) << score->mode;
  }
  EXPECT_EQ(bf16.bytes_per_token_head, 512);
  EXPECT_EQ(int8.bytes_per_token_head, 264);
  EXPECT_EQ(int4.bytes_per_token_head, 136);
  EXPECT_EQ(int2.bytes_per_token_head, 72);

  const auto parsed = nlohmann::json::parse(llm::to_json(scores, "models/tiny-lm", Device::cpu()));
  EXPECT_EQ(parsed["device"], "cpu");
  EXPECT_EQ(parsed["modes"]["int4_per_token_head"]["bytes_per_token_head"], 136);
  EXPECT_EQ(parsed["modes"]["int4_per_token_head"]["recall"]["1900"], 1.0);
  EXPECT_EQ(parsed["modes"]["float32"]["kl_divergence"], 0.0);
}

}  // namespace
}  // namespace quire::testing
