// What a model folder's config.json says, checked. The runner knows one family: a decoder of pre-norm layers with
// RMSNorm, rotary positions, grouped-query attention and a SwiGLU MLP. Its members differ only in the fields below:
//
//   LlamaForCausalLM     optional biases (attention_bias, mlp_bias), optional Llama-3 rope scaling
//   MistralForCausalLM   optional sliding window
//   Qwen2ForCausalLM     bias on q, k and v
//   Qwen3ForCausalLM     RMSNorm over each head of q and k, optional attention_bias
//
// Anything else is refused by name, and so is any setting of these that would change the maths silently.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "quire/status.h"
#include "quire/tensor.h"

namespace quire::llm {

// Rotary frequencies: inv_freq[i] = theta^(-2i / head_size), then the scaling that long-context models ask for.
struct RopeConfig {
  enum class Scaling { kNone, kLinear, kLlama3 };
  double theta = 10000.0;
  Scaling scaling = Scaling::kNone;
  double factor = 1.0;  // kLinear, kLlama3: by which factor the (low) frequencies turn slower
  double low_freq_factor = 1.0, high_freq_factor = 4.0;
  std::int64_t original_max_position = 8192;
};

struct ModelConfig {
  std::string architecture;
  int vocab_size = 0;
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_layers = 0;
  int num_q_heads = 0;
  int num_kv_heads = 0;
  int head_size = 0;
  float rms_norm_eps = 1e-6F;
  RopeConfig rope;
  std::int64_t max_position = 2048;  // tokens of the longest sequence
  int sliding_window = -1;           // as UnifiedAttentionArgs::sliding_window
  bool tied_embeddings = false;
  bool qkv_bias = false;
  bool output_bias = false;  // o_proj
  bool mlp_bias = false;
  bool qk_norm = false;
  DType dtype = DType::kBFloat16;  // what kv_cache_dtype "auto" stores
  int bos_token_id = -1;           // -1: none
  std::vector<std::int32_t> eos_token_ids;

  int q_size() const { return num_q_heads * head_size; }
  int kv_size() const { return num_kv_heads * head_size; }
};

// Parses the text of a config.json. `source`, the path it came from, begins the sentence of a refusal.
Result<ModelConfig> parse_config(const std::string& json_text, const std::string& source);

// Reads DIR/config.json.
Result<ModelConfig> load_config(const std::string& model_dir);

// inv_freq[head_size / 2], with the scaling applied.
std::vector<double> rope_frequencies(const RopeConfig& rope, int head_size);

}  // namespace quire::llm
