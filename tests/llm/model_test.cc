// The decoder against an oracle, and its loader against bad folders.
#include "llm/model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "llm/models.h"
#include "llm/safetensors.h"

namespace quire::testing {
namespace {

using llm::Model;
using nlohmann::json;

std::vector<std::int32_t> some_tokens(std::int64_t n, std::int64_t vocab_size) {
  Random random(11);
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(n));
  for (auto& token : tokens) token = static_cast<std::int32_t>(random.below(vocab_size));
  return tokens;
}

std::string refusal(const std::string& dir) {
  const auto model = Model::load(dir);
  return model.ok() ? "accepted" : model.status().message();
}

TEST(Model, TinyLmLogitsMatchTheReferenceImplementation) {
  auto model = Model::load(tiny_lm_dir());
  ASSERT_TRUE(model.ok()) << model.status().message();
  const auto file = llm::SafetensorsFile::open(tiny_lm_dir() + "/logits_16.safetensors");
  ASSERT_TRUE(file.ok()) << file.status().message();
  const auto ids = file->tensor("token_ids"), expected = file->tensor("logits");
  ASSERT_TRUE(ids.ok() && expected.ok());
  const std::vector<std::int32_t> tokens(ids->ptr<std::int32_t>(), ids->ptr<std::int32_t>() + ids->numel());
  const std::vector<float> logits = run_logits(*model, tokens, "float32");
  ASSERT_EQ(static_cast<std::int64_t>(logits.size()), expected->numel());
  double worst = 0.0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    worst = std::max(worst, std::abs(static_cast<double>(logits[i]) - expected->ptr<float>()[i]));
  }
  EXPECT_LE(worst, 1e-3);
}

struct Variant {
  const char* name;
  const char* architecture;
  json changes;
};

class ModelVariant : public ::testing::TestWithParam<Variant> {};

// fp32 against double. A product of length k <= 128 is off by at most k * 2^-24 of the sum of its terms' magnitudes,
// 8e-6; each of the 3 layers has 7 products in a row and the head one more, 22 in all, and the norms keep the scale:
// 2e-4 of the largest logit. A wrong rope, norm, bias or head mapping moves logits by far more than 1 %.
TEST_P(ModelVariant, MatchesTheOracle) {
  const Variant& variant = GetParam();
  const TestModel test_model(variant.architecture, variant.changes);
  const TempDir dir;
  test_model.save(dir);
  auto model = Model::load(dir.path());
  ASSERT_TRUE(model.ok()) << model.status().message();
  const auto tokens = some_tokens(70, test_model.config["vocab_size"].get<int>());
  const std::vector<double> expected = oracle_logits(test_model, tokens);
  const std::vector<float> logits = run_logits(*model, tokens, "float32", /*chunk=*/23);
  ASSERT_EQ(logits.size(), expected.size());
  double worst = 0.0, largest = 0.0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    worst = std::max(worst, std::abs(static_cast<double>(logits[i]) - expected[i]));
    largest = std::max(largest, std::abs(expected[i]));
  }
  EXPECT_LE(worst, 2e-4 * largest);
}

const json kLlama3Rope = {{"rope_type", "llama3"},
                          {"factor", 8.0},
                          {"low_freq_factor", 1.0},
                          {"high_freq_factor", 4.0},
                          {"original_max_position_embeddings", 64}};

INSTANTIATE_TEST_SUITE_P(
    Family, ModelVariant,
    ::testing::Values(
        Variant{"llama", "LlamaForCausalLM", json::object()},
        Variant{"llama_untied", "LlamaForCausalLM", {{"tie_word_embeddings", false}}},
        Variant{"llama_biases", "LlamaForCausalLM", {{"attention_bias", true}, {"mlp_bias", true}}},
        Variant{"llama3_rope", "LlamaForCausalLM", {{"rope_theta", 500.0}, {"rope_scaling", kLlama3Rope}}},
        Variant{"linear_rope", "LlamaForCausalLM", {{"rope_scaling", {{"rope_type", "linear"}, {"factor", 4.0}}}}},
        Variant{"multi_head", "LlamaForCausalLM", {{"num_key_value_heads", 4}}},
        Variant{"one_kv_head", "LlamaForCausalLM", {{"num_attention_heads", 5}, {"num_key_value_heads", 1}}},
        Variant{"mistral_window", "MistralForCausalLM", {{"sliding_window", 20}}},
        Variant{"qwen2", "Qwen2ForCausalLM", json::object()}, Variant{"qwen3", "Qwen3ForCausalLM", json::object()}),
    [](const auto& param_info) { return std::string(param_info.param.name); });

TEST(Model, FileDtypesAndShardsGiveTheSameLogits) {
  const TestModel test_model("Qwen3ForCausalLM");
  const auto tokens = some_tokens(20, 61);
  std::vector<std::vector<float>> results;
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    const TempDir dir;
    test_model.save(dir, dtype);
    auto model = Model::load(dir.path());
    ASSERT_TRUE(model.ok()) << model.status().message();
    results.push_back(run_logits(*model, tokens, "float32"));
  }
  const TempDir dir;
  dir.write("config.json", test_model.config.dump());
  TestTensors shards[2];
  json weight_map = json::object();
  for (const auto& [name, tensor] : test_model.tensors) {
    const int shard = static_cast<int>(weight_map.size() % 2);
    shards[shard][name] = tensor;
    weight_map[name] = "model-" + std::to_string(shard) + ".safetensors";
  }
  for (int i = 0; i < 2; ++i) {
    dir.write("model-" + std::to_string(i) + ".safetensors", safetensors_bytes(shards[i], DType::kFloat32));
  }
  dir.write("model.safetensors.index.json", json{{"weight_map", weight_map}}.dump());
  auto model = Model::load(dir.path());
  ASSERT_TRUE(model.ok()) << model.status().message();
  results.push_back(run_logits(*model, tokens, "float32"));
  for (const auto& result : results) EXPECT_EQ(result, results[0]);
}

// Both caches then hold the same numbers. Attention reads them by products of different types, whose rounding (softmax
// weights in two bf16 parts, 2^-17) is small beside that of K and V by the model, 2^-9.
TEST(Model, QkvInBf16FitABf16Cache) {
  const TempDir dir;
  TestModel("Qwen3ForCausalLM").save(dir);
  auto model = Model::load(dir.path());
  ASSERT_TRUE(model.ok()) << model.status().message();
  const auto tokens = some_tokens(40, 61);
  const auto unrounded = run_logits(*model, tokens, "float32");
  EXPECT_NE(run_logits(*model, tokens, "bfloat16"), unrounded);
  model->set_qkv_dtype(DType::kBFloat16);
  const auto rounded = run_logits(*model, tokens, "float32");
  EXPECT_NE(rounded, unrounded);
  const auto from_bf16 = run_logits(*model, tokens, "bfloat16");
  const auto distance = [&](const std::vector<float>& logits) {
    double worst = 0.0;
    for (std::size_t i = 0; i < logits.size(); ++i) {
      worst = std::max(worst, std::abs(static_cast<double>(logits[i]) - static_cast<double>(rounded[i])));
    }
    return worst;
  };
  EXPECT_LT(20 * distance(from_bf16), distance(unrounded));
}

TEST(Model, RefusesBadFolders) {
  TestModel good("LlamaForCausalLM");
  {
    const TempDir dir;
    EXPECT_NE(refusal(dir.path()).find("config.json: cannot open"), std::string::npos) << refusal(dir.path());
    dir.write("config.json", good.config.dump());
    EXPECT_NE(refusal(dir.path()).find("model.safetensors: cannot open"), std::string::npos) << refusal(dir.path());
  }
  {
    const TempDir dir;
    TestModel model = good;
    model.tensors.erase("model.layers.1.mlp.up_proj.weight");
    model.save(dir);
    EXPECT_NE(refusal(dir.path()).find("no tensor 'model.layers.1.mlp.up_proj.weight'"), std::string::npos)
        << refusal(dir.path());
  }
  {
    const TempDir dir;
    TestModel model = good;
    std::swap(model.tensors["model.layers.2.mlp.down_proj.weight"].shape[0],
              model.tensors["model.layers.2.mlp.down_proj.weight"].shape[1]);
    model.save(dir);
    EXPECT_NE(refusal(dir.path()).find("has shape [80, 48], config.json asks for [48, 80]"), std::string::npos)
        << refusal(dir.path());
  }
  {
    const TempDir dir;
    good.save(dir);
    const std::string bytes = safetensors_bytes(good.tensors, DType::kFloat32);
    for (std::size_t kept : {std::size_t{0}, std::size_t{7}, std::size_t{200}, bytes.size() - 4}) {
      dir.write("model.safetensors", bytes.substr(0, kept));
      EXPECT_NE(refusal(dir.path()), "accepted") << kept << " bytes";
    }
    std::string lying = bytes;
    lying[0] = static_cast<char>(lying[0] + 8);
    dir.write("model.safetensors", lying);
    EXPECT_NE(refusal(dir.path()), "accepted");
  }
  {
    const TempDir dir;
    dir.write("config.json", good.config.dump());
    dir.write("model.safetensors.index.json", R"({"weight_map": {"a": "../secret.safetensors"}})");
    EXPECT_NE(refusal(dir.path()).find("not a file name"), std::string::npos) << refusal(dir.path());
    dir.write("model.safetensors.index.json", R"({"weight_map": [)");
    EXPECT_NE(refusal(dir.path()).find("not JSON"), std::string::npos) << refusal(dir.path());
    dir.write("model.safetensors.index.json", R"({"weight_map": {"a": "missing.safetensors"}})");
    EXPECT_NE(refusal(dir.path()).find("missing.safetensors: cannot open"), std::string::npos) << refusal(dir.path());
  }
}

TEST(Model, RefusesATokenOutsideTheVocabulary) {
  const TempDir dir;
  TestModel("LlamaForCausalLM").save(dir);
  auto model = Model::load(dir.path());
  ASSERT_TRUE(model.ok());
  const auto mode = parse_kv_cache_dtype("float32");
  auto cache = llm::KVCache::create(model->config(), {.layer_modes = {*mode}, .num_blocks = 1});
  ASSERT_TRUE(cache.ok());
  for (std::int32_t bad : {-1, 61}) {
    llm::Batch batch;
    batch.add({.tokens = {3, bad}, .blocks = {0}}, 2, 1, 16);
    std::vector<float> logits(61);
    const Status status = model->forward(batch, *cache, logits.data());
    EXPECT_NE(status.message().find("token id " + std::to_string(bad) + " at position 1"), std::string::npos)
        << status.message();
  }
}

}  // namespace
}  // namespace quire::testing
