// The measurement against its definitions, and the files that it reads.
#include "llm/evaluate.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "llm/models.h"
#include "llm/npy.h"
#include "llm/safetensors_writer.h"

namespace quire::testing {
namespace {

using llm::Model;

// Perplexity and divergence against their definitions, from the oracle's logits in double.
TEST(Evaluate, MatchesTheDefinitions) {
  QUIRE_NEEDS_MODES("float32", "int2_per_token_head");
  const TestModel test_model("LlamaForCausalLM", {{"max_position_embeddings", 24}});
  const TempDir dir;
  test_model.save(dir);
  auto model = Model::load(dir.path());
  ASSERT_TRUE(model.ok()) << model.status().message();
  Random random(5);
  llm::EvalSets sets;
  for (int i = 0; i < 24 * 2 + 5; ++i) sets.tokens.push_back(static_cast<std::int32_t>(random.below(61)));
  // The answer that the oracle would give, and one that it would not.
  const std::vector<std::int32_t> prompt(sets.tokens.begin(), sets.tokens.begin() + 9);
  llm::EvalPrompt right{.prompt = prompt, .answer = {}, .context = 0};
  for (int i = 0; i < 3; ++i) {
    std::vector<std::int32_t> tokens = prompt;
    tokens.insert(tokens.end(), right.answer.begin(), right.answer.end());
    const auto logits = oracle_logits(test_model, tokens);
    right.answer.push_back(
        static_cast<std::int32_t>(std::max_element(logits.end() - 61, logits.end()) - (logits.end() - 61)));
  }
  llm::EvalPrompt wrong = right;
  wrong.answer[1] = (wrong.answer[1] + 1) % 61;
  sets.recall = {right, wrong, wrong, right, wrong};
  sets.arithmetic = {right, wrong};

  const auto scores = llm::evaluate(
      *model, sets,
      {.modes = modes_of({"float32", "int2_per_token_head"}), .qkv_dtype = DType::kFloat32, .progress = {}});
  ASSERT_TRUE(scores.ok()) << scores.status().message();
  double nll = 0.0, kl = 0.0;
  for (std::size_t window = 0; window < 2; ++window) {
    const std::vector<std::int32_t> tokens(sets.tokens.begin() + static_cast<long>(window * 24),
                                           sets.tokens.begin() + static_cast<long>(window * 24 + 24));
    const auto exact = oracle_logits(test_model, tokens);
    const auto coarse = run_logits(*model, tokens, "int2_per_token_head");
    for (std::size_t t = 0; t < 24; ++t) {
      double exact_sum = 0.0, coarse_sum = 0.0;
      for (std::size_t v = t * 61; v < t * 61 + 61; ++v) {
        exact_sum += std::exp(exact[v]);
        coarse_sum += std::exp(static_cast<double>(coarse[v]));
      }
      if (t + 1 < 24) nll += std::log(exact_sum) - exact[t * 61 + static_cast<std::size_t>(tokens[t + 1])];
      for (std::size_t v = t * 61; v < t * 61 + 61; ++v) {
        const double log_p = exact[v] - std::log(exact_sum), log_q = coarse[v] - std::log(coarse_sum);
        kl += std::exp(log_p) * (log_p - log_q);
      }
    }
  }
  // fp32 logits are off by less than 2e-4 of the largest (model_test.cc), and the means below move by less than twice
  // that.
  EXPECT_NEAR(std::log(*(*scores)[0].perplexity), nll / 46.0, 4e-3);
  EXPECT_NEAR(*(*scores)[1].kl_divergence, kl / 48.0, 4e-3);
  EXPECT_GT(kl / 48.0, 0.05) << "too small a divergence to show anything";
  EXPECT_EQ((*scores)[0].recall.at(0), 0.4);
  EXPECT_EQ((*scores)[0].arithmetic, 0.5);

  const auto limited = llm::evaluate(*model, sets, {.modes = modes_of({"float32"}), .max_prompts = 1, .progress = {}});
  ASSERT_TRUE(limited.ok());
  EXPECT_EQ((*limited)[0].recall.at(0), 1.0);
  EXPECT_FALSE(llm::evaluate(*model, {}, {.modes = modes_of({"float32"}), .progress = {}}).ok())
      << "nothing to measure";
}

TEST(Evaluate, SkippedLayersStayInTheModelsDtype) {
  QUIRE_NEEDS_MODES("float32", "int2_per_token_head", "turboquant_4bit_nc", "k=int8_per_token_head,v=turboquant_v3");
  const TestModel test_model("LlamaForCausalLM", {{"max_position_embeddings", 24}});
  const TempDir dir;
  test_model.save(dir);
  auto model = Model::load(dir.path());
  ASSERT_TRUE(model.ok()) << model.status().message();
  Random random(6);
  llm::EvalSets sets;
  for (int i = 0; i < 24; ++i) sets.tokens.push_back(static_cast<std::int32_t>(random.below(61)));
  const auto score = [&](const char* mode, const std::vector<int>& skip_layers) {
    const auto scores =
        llm::evaluate(*model, sets, {.modes = modes_of({mode}), .skip_layers = skip_layers, .progress = {}});
    EXPECT_TRUE(scores.ok()) << scores.status().message();
    return scores->at(0);
  };
  // 3 layers of 2 KV heads of size 32: 128 bytes for K and V in bf16, 24 in int2 with its scales.
  const char* mode = "int2_per_token_head";
  const llm::EvalScore none = score(mode, {}), some = score(mode, {0, 2}), all = score(mode, {0, 1, 2});
  EXPECT_EQ(none.bytes_per_token, 3 * 2 * 24);
  EXPECT_EQ(some.bytes_per_token, 2 * 2 * 128 + 2 * 24);
  EXPECT_EQ(all.bytes_per_token, 3 * 2 * 128);
  for (const llm::EvalScore* each : {&none, &some}) EXPECT_EQ(each->bytes_per_token_head, 24);
  EXPECT_DOUBLE_EQ(*all.kl_divergence, *score("auto", {}).kl_divergence);
  EXPECT_GT(*some.kl_divergence, *all.kl_divergence);
  EXPECT_GT(*none.kl_divergence, *some.kl_divergence);
  const auto json = nlohmann::json::parse(llm::to_json({some}, "test", Device::cpu()));
  EXPECT_EQ(json["modes"][mode]["skip_layers"], nlohmann::json::array({0, 2}));

  // Mixed and TurboQuant modes run through the same caches.
  EXPECT_EQ(score("k=int8_per_token_head,v=turboquant_v3", {}).bytes_per_token, 3 * 2 * (32 + 4 + 12 + 4));
  EXPECT_EQ(score("turboquant_4bit_nc", {1}).bytes_per_token, 2 * 2 * (16 + 2 + 16 + 4) + 2 * 128);

  // The second cache beside each has the same keys and values: on one device, that is the same computation.
  const auto paired = llm::evaluate(
      *model, sets,
      {.modes = modes_of({mode, "turboquant_4bit_nc"}), .against_cpu = true, .skip_layers = {}, .progress = {}});
  ASSERT_TRUE(paired.ok()) << paired.status().message();
  EXPECT_EQ(none.cpu_perplexity, std::nullopt);
  EXPECT_EQ(*paired->at(0).perplexity, *none.perplexity);
  for (const auto& each : *paired) EXPECT_EQ(each.cpu_perplexity, each.perplexity) << each.mode;

  for (int layer : {-1, 3}) {
    const auto refused =
        llm::evaluate(*model, sets, {.modes = modes_of({mode}), .skip_layers = {layer}, .progress = {}});
    ASSERT_FALSE(refused.ok());
    EXPECT_NE(refused.status().message().find("layer " + std::to_string(layer)), std::string::npos);
  }
}

TEST(ParseLayers, NumbersAndLast) {
  using Layers = std::vector<int>;
  EXPECT_EQ(*llm::parse_layers("", 4), Layers{});
  EXPECT_EQ(*llm::parse_layers("0,1,last", 32), (Layers{0, 1, 31}));
  EXPECT_EQ(*llm::parse_layers("last,3,1,3", 4), (Layers{1, 3}));
  for (const char* list : {"4", "-1", "0,,1", "a", "0, 1", "1x", "99999999999", "first"}) {
    const auto layers = llm::parse_layers(list, 4);
    ASSERT_FALSE(layers.ok()) << list;
    EXPECT_NE(layers.status().message().find("supported: 0 to 3 and last"), std::string::npos)
        << layers.status().message();
  }
}

TEST(Npy, ReadsTokensAndRefusesTheRest) {
  const TempDir dir;
  const auto read = [&](const std::string& bytes) {
    dir.write("t.npy", bytes);
    return llm::read_npy_tokens(dir.path() + "/t.npy", 100);
  };
  const std::string u2("\x05\x00\x63\x00", 4), i8("\x07\x00\x00\x00\x00\x00\x00\x00", 8);
  const auto tokens = read(npy_bytes("<u2", "(2,)", u2));
  ASSERT_TRUE(tokens.ok()) << tokens.status().message();
  EXPECT_EQ(*tokens, (std::vector<std::int32_t>{5, 99}));
  EXPECT_EQ(*read(npy_bytes("<i8", "(1,)", i8)), (std::vector<std::int32_t>{7}));
  EXPECT_EQ(*read(npy_bytes("<i4", "(0,)", "")), std::vector<std::int32_t>{});

  struct Case {
    std::string bytes;
    const char* says;
  };
  const std::string large("\x64\x00\x00\x00", 4), negative("\xff\xff\xff\xff", 4);
  const auto version = [&](int major, int minor = 0) {
    std::string bytes = npy_bytes("<u2", "(2,)", u2);
    bytes[6] = static_cast<char>(major);
    bytes[7] = static_cast<char>(minor);
    return bytes;
  };
  const Case cases[] = {
      {"", "not a .npy file"},
      {npy_bytes("<u2", "(2,)", u2).substr(0, 20), "the header is longer than the file"},
      {version(0), "version 0.0 is not supported; supported are 1.0, 2.0 and 3.0"},
      {version(4), "version 4.0 is not supported"},
      {version(255), "version 255.0 is not supported"},
      {version(1, 1), "version 1.1 is not supported"},
      {npy_bytes("<u2", "(3,)", u2), "the header describes 6 bytes of data, the file holds 4"},
      {npy_bytes("<u2", "(99999999999999999999,)", u2), "the shape is not a count"},
      {npy_bytes("<u2", "(1, 2)", u2), "expected an array of one dimension"},
      {npy_bytes("<u2", "()", u2), "expected an array of one dimension"},
      {npy_bytes("<f4", "(1,)", u2), "expected little-endian"},
      {npy_bytes(">u2", "(2,)", u2), "expected little-endian"},
      {npy_bytes("<i4", "(1,)", large), "token id 100 at position 0 is outside the vocabulary of 100"},
      {npy_bytes("<i4", "(1,)", negative), "token id -1 at position 0"},
  };
  for (const Case& bad : cases) {
    const auto result = read(bad.bytes);
    ASSERT_FALSE(result.ok()) << bad.says;
    EXPECT_NE(result.status().message().find(bad.says), std::string::npos) << result.status().message();
  }
  EXPECT_FALSE(llm::read_npy_tokens(dir.path() + "/missing.npy", 100).ok());
}

TEST(Prompts, RefusesBadLines) {
  const TempDir dir;
  llm::ModelConfig config;
  config.vocab_size = 10;
  config.max_position = 6;
  const auto read = [&](const std::string& text) {
    dir.write("p.jsonl", text);
    return llm::read_prompts(dir.path() + "/p.jsonl", config);
  };
  const auto good = read("{\"prompt\": [1, 2], \"answer\": [3], \"context\": 250}\n\n{\"prompt\":[9],\"answer\":[0]}");
  ASSERT_TRUE(good.ok()) << good.status().message();
  ASSERT_EQ(good->size(), 2U);
  EXPECT_EQ((*good)[0].context, 250);
  EXPECT_EQ((*good)[1].prompt, (std::vector<std::int32_t>{9}));
  struct Case {
    const char* text;
    const char* says;
  };
  const Case cases[] = {
      {"[1]", ":1: not a JSON object"},
      {"\n{\"prompt\": [1]}", ":2: \"answer\" must be a list"},
      {"{\"prompt\": [], \"answer\": [1]}", "\"prompt\" must be a list"},
      {"{\"prompt\": [10], \"answer\": [1]}", "\"prompt\" holds 10, which is no token id of the vocabulary of 10"},
      {"{\"prompt\": [1], \"answer\": [-1]}", "\"answer\" holds -1"},
      {"{\"prompt\": [\"a\"], \"answer\": [1]}", "\"prompt\" holds \"a\""},
      {"{\"prompt\": [1], \"answer\": [1], \"context\": \"250\"}", "\"context\" is \"250\", expected an integer of at"},
      {"{\"prompt\": [1], \"answer\": [1], \"context\": 2.5}", "\"context\" is 2.5, expected an integer of at least 0"},
      {"{\"prompt\": [1], \"answer\": [1], \"context\": [250]}", "\"context\" is [250], expected an integer"},
      {"{\"prompt\": [1], \"answer\": [1], \"context\": null}", "\"context\" is null, expected an integer"},
      {"{\"prompt\": [1], \"answer\": [1], \"context\": -1}", "\"context\" is -1, expected an integer"},
      {"{\"prompt\": [1], \"answer\": [1], \"context\": 18446744073709551615}", "\"context\" is 1844674407"},
      {"{\"prompt\": [1, 2, 3, 4, 5], \"answer\": [1, 2]}", "7 tokens exceed the model's context of 6"},
  };
  for (const Case& bad : cases) {
    const auto result = read(bad.text);
    ASSERT_FALSE(result.ok()) << bad.text;
    EXPECT_NE(result.status().message().find(bad.says), std::string::npos) << result.status().message();
  }
}

TEST(Prompts, AreUnpackedWhereTheNameEndsInGz) {
  llm::ModelConfig config;
  config.vocab_size = 10;
  config.max_position = 6;
  const std::string path = test::write_gzip("p.jsonl.gz", "{\"prompt\": [1, 2], \"answer\": [3]}\n");
  const auto good = llm::read_prompts(path, config);
  ASSERT_TRUE(good.ok()) << good.status().message();
  ASSERT_EQ(good->size(), 1U);
  EXPECT_EQ((*good)[0].prompt, (std::vector<std::int32_t>{1, 2}));

  std::ifstream file(path, std::ios::binary);
  const std::string packed{std::istreambuf_iterator<char>(file), {}};
  std::string damaged = packed;
  damaged[packed.size() - 8] ^= 1;  // the checksum
  const std::pair<std::string, std::string> cases[] = {
      {"", "truncated"},
      {packed.substr(0, packed.size() - 1), "truncated"},
      {damaged, "damaged"},
      {"{\"prompt\": [1], \"answer\": [1]}", "not a gzip file, though its name ends in .gz"},
  };
  for (const auto& [bytes, says] : cases) {
    const auto refused = llm::read_prompts(test::write_file("bad.jsonl.gz", bytes), config);
    ASSERT_FALSE(refused.ok()) << says;
    EXPECT_NE(refused.status().message().find("bad.jsonl.gz: "), std::string::npos) << refused.status().message();
    EXPECT_NE(refused.status().message().find(says), std::string::npos) << refused.status().message();
  }
}

}  // namespace
}  // namespace quire::testing
