// What config.json may say, and the sentence that it gets for anything else.
#include "llm/config.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace quire::testing {
namespace {

using llm::ModelConfig;
using llm::parse_config;
using nlohmann::json;

const json kLlama = {{"architectures", {"LlamaForCausalLM"}},
                     {"vocab_size", 100},
                     {"hidden_size", 64},
                     {"intermediate_size", 128},
                     {"num_hidden_layers", 2},
                     {"num_attention_heads", 4},
                     {"num_key_value_heads", 2},
                     {"eos_token_id", {2, 9}}};

Result<ModelConfig> parse(const json& changes) {
  json config = kLlama;
  config.update(changes);
  return parse_config(config.dump(), "config.json");
}

TEST(Config, FillsInDefaults) {
  const auto config = parse(json::object());
  ASSERT_TRUE(config.ok()) << config.status().message();
  EXPECT_EQ(config->head_size, 16);
  EXPECT_EQ(config->num_kv_heads, 2);
  EXPECT_EQ(config->rope.theta, 10000.0);
  EXPECT_EQ(config->sliding_window, -1);
  EXPECT_EQ(config->eos_token_ids, (std::vector<std::int32_t>{2, 9}));
  EXPECT_FALSE(config->qkv_bias || config->output_bias || config->mlp_bias || config->qk_norm ||
               config->tied_embeddings);
  EXPECT_EQ(parse({{"num_key_value_heads", nullptr}})->num_kv_heads, 4);
}

TEST(Config, KnowsTheFamily) {
  const auto qwen2 = parse({{"architectures", {"Qwen2ForCausalLM"}}, {"sliding_window", 4096}});
  ASSERT_TRUE(qwen2.ok()) << qwen2.status().message();
  EXPECT_TRUE(qwen2->qkv_bias);
  EXPECT_FALSE(qwen2->output_bias);
  EXPECT_EQ(qwen2->sliding_window, -1) << "Qwen2 names a window but uses it only with use_sliding_window";
  const auto qwen3 = parse({{"architectures", {"Qwen3ForCausalLM"}}});
  ASSERT_TRUE(qwen3.ok());
  EXPECT_TRUE(qwen3->qk_norm && !qwen3->qkv_bias);
  EXPECT_EQ(parse({{"architectures", {"MistralForCausalLM"}}, {"sliding_window", 32}})->sliding_window, 32);
  EXPECT_TRUE(parse({{"attention_bias", true}})->output_bias);
  // The rope settings as newer folders write them.
  const auto newer = parse({{"rope_parameters", {{"rope_theta", 5e5}, {"rope_type", "linear"}, {"factor", 2.0}}}});
  ASSERT_TRUE(newer.ok());
  EXPECT_EQ(newer->rope.theta, 5e5);
  EXPECT_DOUBLE_EQ(llm::rope_frequencies(newer->rope, 16)[0], 0.5);
}

TEST(Config, RefusesInASentence) {
  struct Case {
    json changes;
    const char* says;
  };
  const Case cases[] = {
      {{{"architectures", {"GPT2LMHeadModel"}}},
       "architecture \"GPT2LMHeadModel\" is not supported; supported are Llama"},
      {{{"architectures", json::array()}}, "\"architectures\" must be a list of one name"},
      {{{"architectures", {1}}}, "\"architectures\" must be a list of one name"},
      {{{"hidden_size", nullptr}}, "\"hidden_size\" is missing"},
      {{{"hidden_size", -1}}, "\"hidden_size\" is -1, expected an integer from 1"},
      {{{"hidden_size", 1.5}}, "\"hidden_size\" is 1.5, expected an integer"},
      {{{"hidden_size", 18446744073709551615ULL}}, "\"hidden_size\" is 18446744073709551615"},
      {{{"hidden_size", 66}}, "\"hidden_size\" 66 is not a multiple of \"num_attention_heads\" 4"},
      {{{"num_key_value_heads", 3}}, "is not a multiple of \"num_key_value_heads\" 3"},
      {{{"head_dim", 15}}, "head size 15 is odd"},
      {{{"rms_norm_eps", 0}}, "\"rms_norm_eps\" is 0, expected a number above 0"},
      {{{"tie_word_embeddings", "yes"}}, "\"tie_word_embeddings\" is \"yes\", expected true or false"},
      {{{"hidden_act", "gelu"}}, "\"hidden_act\" \"gelu\" is not supported; supported is silu"},
      {{{"torch_dtype", "float64"}}, "dtype \"float64\" is not supported"},
      {{{"rope_scaling", {{"rope_type", "yarn"}}}}, "rope scaling \"yarn\" is not supported; supported are default"},
      {{{"rope_scaling", 3}}, "the rope settings are 3, expected an object"},
      {{{"rope_scaling", {{"rope_type", "llama3"}, {"low_freq_factor", 4.0}}}}, "must be above \"low_freq_factor\""},
      {{{"quantization_config", {{"bits", 4}}}}, "quantized weights"},
      {{{"use_sliding_window", true}, {"sliding_window", 8}}, "\"use_sliding_window\" is not supported"},
      {{{"layer_types", {"linear_attention"}}}, "layer type \"linear_attention\" is not supported"},
      {{{"partial_rotary_factor", 0.5}}, "\"partial_rotary_factor\" is not supported"},
      {{{"eos_token_id", 100}}, "\"eos_token_id\" is 100, expected token ids below 100"},
      {{{"bos_token_id", 100}}, "\"bos_token_id\" is 100"},
  };
  for (const Case& bad : cases) {
    const auto config = parse(bad.changes);
    ASSERT_FALSE(config.ok()) << bad.changes;
    EXPECT_EQ(config.status().message().find("config.json: "), 0U) << config.status().message();
    EXPECT_NE(config.status().message().find(bad.says), std::string::npos) << config.status().message();
  }
  for (const char* text : {"", "{", "[]", "3", "{\"architectures\": [\"LlamaForCausalLM\"", "\xff\xfe"}) {
    EXPECT_FALSE(parse_config(text, "config.json").ok()) << text;
  }
}

}  // namespace
}  // namespace quire::testing
