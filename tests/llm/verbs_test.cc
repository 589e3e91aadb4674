// quire generate and quire eval as a user calls them: what they print and what they refuse.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "cli/cli.h"
#include "llm/models.h"

namespace quire::testing {
namespace {

using test::run_cli;

void expect_refusal(const test::CliResult& outcome, const std::string& says) {
  EXPECT_EQ(outcome.exit_status, 2) << outcome.err;
  EXPECT_NE(outcome.err.find(says), std::string::npos) << outcome.err;
  EXPECT_EQ(outcome.out, "");
  EXPECT_TRUE(outcome.one_sentence()) << outcome.err;
}

class Verbs : public ::testing::Test {
 protected:
  Verbs() { TestModel("LlamaForCausalLM", {{"max_position_embeddings", 64}, {"eos_token_id", nullptr}}).save(dir_); }
  const std::string& model() const { return dir_.path(); }
  TempDir dir_;
};

TEST_F(Verbs, GeneratePrintsIdsWithoutATokenizer) {
  const auto outcome =
      run_cli({"generate", "--model", model(), "--kv-cache-dtype", "float32", "--token-ids", "3,1,4", "-n", "5"});
  ASSERT_EQ(outcome.exit_status, 0) << outcome.err;
  std::vector<std::int32_t> tokens{3, 1, 4};
  std::istringstream ids(outcome.out);
  for (std::string id; std::getline(ids, id, ',');) tokens.push_back(std::stoi(id));
  ASSERT_EQ(tokens.size(), 8U) << outcome.out;
  // Greedy decoding takes the oracle's largest logit each time.
  const auto logits = oracle_logits(TestModel("LlamaForCausalLM"), tokens);
  for (std::size_t t = 3; t < tokens.size(); ++t) {
    const auto row = logits.begin() + static_cast<std::ptrdiff_t>((t - 1) * 61);
    EXPECT_EQ(tokens[t], std::max_element(row, row + 61) - row);
  }
  // 3 layers, 2 KV heads, K and V of size 32 in fp32; 8 tokens fit one block of 16.
  EXPECT_NE(outcome.err.find("float32: 1536 bytes per token in the cache, 24.0 KiB"), std::string::npos) << outcome.err;
}

TEST_F(Verbs, GenerateRefuses) {
  const auto generate = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), {"generate", "--model", model()});
    return run_cli(arguments);
  };
  expect_refusal(generate({"-m", "int5", "--token-ids", "1"}), "int5");
  expect_refusal(generate({"--prompt", "text"}), "without a SentencePiece tokenizer, give token ids");
  expect_refusal(generate({"--token-ids", "61"}),
                 "token id 61 at position 0 of the prompt is outside the vocabulary of 61");
  expect_refusal(generate({"--token-ids", "1", "-n", "64"}), "do not fit: the model's context is 64 tokens");
  expect_refusal(generate({"--token-ids", "1", "-n", "9223372036854775807"}), "do not fit");
  expect_refusal(generate({"--token-ids", "1", "-n", "-1"}), "max_new_tokens is -1");
  expect_refusal(generate({"--token-ids", "1", "--top-p", "2"}), "top_p is 2");
  expect_refusal(generate({"--token-ids", "1", "--block-size", "0"}), "blocks of 0 tokens");
  expect_refusal(run_cli({"generate", "--model", "/nowhere", "--token-ids", "1"}), "/nowhere/config.json");
}

// Values that would run as something else are refused.
TEST_F(Verbs, GenerateTakesValuesAsWritten) {
  const auto generate = [&](std::vector<std::string> arguments, const std::string& says) {
    arguments.insert(arguments.begin(), {"generate", "--model", model()});
    expect_refusal(run_cli(arguments), says);
  };
  for (const char* ids : {"1,,2", "", ",", "1,", ",1", "1, 2", "01", "0x1", "1.0", "2147483648", "1 2"}) {
    generate({"--token-ids", ids}, "--token-ids is '");
  }
  generate({"--token-ids", "1", "-n", "9223372036854775808"},
           "--max-new-tokens is '9223372036854775808', expected a decimal integer");
  for (const char* seed : {"18446744073709551616", "-1", "010", "", "1e3"}) {
    generate({"--token-ids", "1", "--seed", seed}, std::string("--seed is '") + seed + "', expected a decimal integer");
  }
  for (const char* temperature : {"nan", "inf", "", "1e100", "0x1p0", "warm", "1.0f"}) {
    generate({"--token-ids", "1", "--temperature", temperature},
             std::string("--temperature is '") + temperature + "', expected a number");
  }
  generate({"--token-ids", "1", "--block-size", "0x10"}, "--block-size is '0x10', expected a decimal integer");
  for (const char* layers : {"0,", ",0", "0,,1", "00"}) {
    generate({"--token-ids", "1", "--kv-cache-dtype-skip-layers", layers}, "is not a layer");
  }
  const auto whole = run_cli({"generate", "--model", model(), "--token-ids", "3", "-n", "1", "--seed",
                              "18446744073709551615", "--temperature", "1e-3", "--top-p", ".5"});
  EXPECT_EQ(whole.exit_status, 0) << whole.err;
}

TEST_F(Verbs, OutputThatCannotBeWrittenIsAnError) {
  dir_.write("p.jsonl", "{\"prompt\": [1, 2, 3], \"answer\": [4]}\n");
  for (const std::vector<std::string>& call :
       {std::vector<std::string>{"generate", "--model", model(), "-m", "auto", "--token-ids", "1", "-n", "3"},
        {"eval", "--model", model(), "-m", "auto", "--recall", model() + "/p.jsonl", "--json"},
        {"eval", "--model", model(), "-m", "auto", "--recall", model() + "/p.jsonl"}}) {
    const auto outcome = test::run_cli_into("/dev/full", call);
    EXPECT_EQ(outcome.exit_status, 2);
    EXPECT_NE(outcome.err.find("quire: cannot write to standard output"), std::string::npos) << outcome.err;
  }
}

// Logits that are not finite give neither text nor a measure.
TEST_F(Verbs, WeightsOfNaNAreAnError) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  TestModel broken("LlamaForCausalLM", {{"max_position_embeddings", 64}, {"eos_token_id", nullptr}});
  for (auto& [name, tensor] : broken.tensors) std::fill(tensor.values.begin(), tensor.values.end(), nan);
  broken.save(dir_);
  dir_.write("p.jsonl", "{\"prompt\": [1, 2, 3], \"answer\": [4]}\n");
  for (const char* temperature : {"0", "1"}) {
    expect_refusal(
        run_cli({"generate", "--model", model(), "--token-ids", "3", "-n", "5", "--temperature", temperature}),
        "the logits at position 0 are not finite");
  }
  expect_refusal(run_cli({"eval", "--model", model(), "-m", "auto", "--recall", model() + "/p.jsonl"}),
                 "the logits at position 2 are not finite");
}

// The file is opened before anything is computed. A run that fails leaves no file behind, and an older one as it was.
TEST_F(Verbs, DemoOpensItsOutputFirst) {
  expect_refusal(run_cli({"demo", "--model", "/nowhere", "--json-out", "/nowhere/x.json"}),
                 "/nowhere/x.json: cannot open the file for writing: No such file or directory");
  expect_refusal(run_cli({"demo", "--model", model(), "--json-out", model()}),
                 model() + ": cannot open the file for writing: Is a directory");
  const std::string path = model() + "/out.json";
  EXPECT_EQ(run_cli({"demo", "--model", model(), "--json-out", path}).exit_status, 2) << "nothing to evaluate";
  EXPECT_FALSE(std::filesystem::exists(path));
  dir_.write("out.json", "from before");
  EXPECT_EQ(run_cli({"demo", "--model", model(), "--json-out", path}).exit_status, 2);
  std::ostringstream kept;
  kept << std::ifstream(path).rdbuf();
  EXPECT_EQ(kept.str(), "from before");
}

// Where a folder lies in the place of a file, the sentence names it.
TEST_F(Verbs, FoldersAreNamed) {
  expect_refusal(run_cli({"eval", "--model", model(), "--tokens", model()}), model() + ": cannot read the file: Is a ");
  expect_refusal(run_cli({"eval", "--model", model(), "--recall", model()}), model() + ": cannot read the file: Is a ");
  std::filesystem::remove(model() + "/config.json");
  std::filesystem::create_directory(model() + "/config.json");
  expect_refusal(run_cli({"generate", "--model", model(), "--token-ids", "1"}),
                 model() + "/config.json: cannot read the file: Is a directory");
}

TEST_F(Verbs, EvalWritesJson) {
  QUIRE_NEEDS_MODES("int8_per_token_head");
  dir_.write("p.jsonl", "{\"prompt\": [1, 2, 3], \"answer\": [4], \"context\": 250}\n");
  const auto outcome = run_cli({"eval", "--model", model(), "-m", "float32,int8_per_token_head", "--recall",
                                model() + "/p.jsonl", "--arithmetic", model() + "/p.jsonl", "--limit", "1", "--json"});
  ASSERT_EQ(outcome.exit_status, 0) << outcome.err;
  const auto result = outcome.json();
  EXPECT_EQ(result["model"], model());
  EXPECT_EQ(result["device"], "cpu");
  ASSERT_EQ(result["modes"].size(), 2U);
  const auto& int8 = result["modes"]["int8_per_token_head"];
  EXPECT_EQ(int8["bytes_per_token_head"], 72);
  EXPECT_TRUE(int8["recall"].contains("250"));
  EXPECT_TRUE(int8["arithmetic"].is_number());
  EXPECT_TRUE(int8["perplexity"].is_null()) << "no tokens were given";
  EXPECT_GT(int8["tokens_per_second"], 0.0);
}

TEST_F(Verbs, EvalRefuses) {
  expect_refusal(run_cli({"eval", "--model", model()}), "nothing to evaluate");
  expect_refusal(run_cli({"eval", "--model", model(), "-m", "fp8,int5"}), "int5");
  expect_refusal(run_cli({"eval", "--model", model(), "--tokens", model() + "/config.json"}), "not a .npy file");
  expect_refusal(run_cli({"eval", "--model", model(), "--recall", "/nowhere"}), "/nowhere: cannot open");
  expect_refusal(run_cli({"eval", "--model", model(), "--windows", "-3"}),
                 "--windows is '-3', expected a decimal integer from 0 to 2147483647");
  expect_refusal(run_cli({"eval", "--model", model(), "--limit", "99999999999999999999"}),
                 "--limit is '99999999999999999999', expected a decimal integer from 0 to 2147483647");
  expect_refusal(run_cli({"eval", "--model", model(), "--qkv-dtype", "int8"}),
                 "--qkv-dtype is 'int8', supported are model, float32, float16, bfloat16");
  expect_refusal(run_cli({"eval", "--model", model(), "-m", "auto,"}), "'' is not a mode");
}

// Without CUDA there is a sentence; with it, the answer is the CPU's: greedy tokens of an fp32 cache.
TEST_F(Verbs, OnCudaOrRefused) {
  QUIRE_NEEDS_MODES("float32", "int4_per_token_head");
  const std::vector<std::vector<std::string>> calls = {
      {"generate", "--model", model(), "-m", "float32", "--token-ids", "3,1,4", "-n", "5"},
      {"eval", "--model", model(), "-m", "int4_per_token_head", "--tokens", model() + "/tokens.npy", "--json"}};
  std::string ids;
  for (int i = 0; i < 64; ++i) ids += {static_cast<char>(i * 7 % 61), '\0'};
  dir_.write("tokens.npy", npy_bytes("<u2", "(64,)", ids));
  for (const auto& call : calls) {
    const auto on_cpu = run_cli(call);
    ASSERT_EQ(on_cpu.exit_status, 0) << on_cpu.err;
    auto with_device = call;
    with_device.insert(with_device.end(), {"--device", "cuda:4096"});
    const std::string there_is_none = run_cli(with_device).err;
    with_device.back() = "cuda";
    const auto on_cuda = run_cli(with_device);
    const char* words = on_cuda.exit_status == 0 ? "device is cuda:4096; this process sees" : "CUDA";
    EXPECT_NE(there_is_none.find(words), std::string::npos) << there_is_none;
    if (on_cuda.exit_status != 0) {
      expect_refusal(on_cuda, "CUDA");
      continue;
    }
    if (call[0] == "generate") {
      EXPECT_EQ(on_cuda.out, on_cpu.out);
    } else {
      EXPECT_EQ(on_cuda.json()["device"], "cuda");
      const auto perplexity = [](const auto& outcome) {
        return outcome.json()["modes"]["int4_per_token_head"]["perplexity"].template get<double>();
      };
      EXPECT_NEAR(perplexity(on_cuda), perplexity(on_cpu), 1e-3 * perplexity(on_cpu));
    }
  }
}

}  // namespace
}  // namespace quire::testing
