// The decoder and its weights. One call runs a ragged batch of tokens, whole prompts, chunks of prompts and single new
// tokens mixed, through all layers:
//
//   x = embed(token)
//   per layer:  x += W_o * attention(cache)      after  q, k, v = rope(W_qkv * norm(x)),  k, v -> cache
//               x += W_down * (silu(W_gate * h) .* W_up * h)     with h = norm(x)
//   logits = W_head * norm(x)
//
// Weights and activations are fp32, whatever the file holds; W is [out, in], row-major. Attention sees K and V only
// through the cache: they are stored first, then every key, the new ones too, is read back in the cache's mode.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "llm/config.h"
#include "llm/paged_cache.h"
#include "quire/status.h"

namespace quire::llm {

// N tokens of B sequences, in order. Filled by add().
struct Batch {
  std::vector<std::int32_t> token_ids;            // [N]
  std::vector<std::int32_t> positions;            // [N]
  std::vector<std::int64_t> slot_mapping;         // [N]
  std::vector<std::int32_t> cu_seqlens_q{0};      // [B + 1]
  std::vector<std::int32_t> seq_lens;             // [B]
  std::vector<std::vector<std::int32_t>> blocks;  // [B], each as long as its sequence needs
  std::vector<std::int32_t> logit_rows;           // [R]: the tokens whose logits are wanted, ascending

  std::int64_t num_tokens() const { return static_cast<std::int64_t>(token_ids.size()); }
  std::int64_t num_seqs() const { return static_cast<std::int64_t>(seq_lens.size()); }

  // The next `num_tokens` tokens of the sequence that are not stored yet, and the logits of the last `num_logits` of
  // them. The sequence has blocks for them; once the batch has run, the caller moves num_stored on.
  void add(const Sequence& sequence, std::int64_t num_tokens, std::int64_t num_logits, int block_size);
};

class Model {
 public:
  // A folder with config.json and model.safetensors, or the shards that model.safetensors.index.json lists.
  static Result<Model> load(const std::string& model_dir);

  const ModelConfig& config() const { return config_; }

  // The float type in which q, k and v go to the cache. fp32, the default, is what they are computed in; an engine that
  // computes in bf16 hands over bf16.
  void set_qkv_dtype(DType dtype) { qkv_dtype_ = dtype; }

  // The keys and values of one forward pass, per layer [N, k | v], before they are rounded or stored.
  using KVTape = std::vector<std::vector<float>>;
  // Until null is given, the passes to come either record their keys and values in `tape` or take those of the tape in
  // place of their own (in a pass over the same tokens). Two such passes differ in attention only.
  void record_kv(KVTape* tape) { recorded_ = tape, replayed_ = nullptr; }
  void replay_kv(const KVTape* tape) { recorded_ = nullptr, replayed_ = tape; }

  // Writes logits [R, vocab_size], where R = batch.logit_rows.size(). It is an error if one of them is NaN or infinite.
  // Two threads must not run one model at once, since it owns its scratch memory.
  Status forward(const Batch& batch, KVCache& cache, float* logits);

 private:
  struct Linear {
    std::vector<float> weight;  // [out, in]
    std::vector<float> bias;    // [out], or empty
    int out = 0, in = 0;
    void run(const float* x, std::int64_t rows, float* y) const;  // y [rows, out] = x [rows, in] * weight^T + bias
  };
  struct Layer {
    std::vector<float> input_norm, post_attention_norm;  // [hidden_size]
    std::vector<float> q_norm, k_norm;                   // [head_size], or empty
    Linear qkv;                                          // rows of q, then k, then v
    Linear output;
    Linear gate_up;  // rows of gate, then up
    Linear down;
  };
  class Loader;

  Status check(const Batch& batch) const;
  void rope(float* heads, int num_heads, std::int64_t num_tokens) const;
  Status attention_block(int layer, const Batch& batch, const Tensor& block_table, KVCache& cache);
  void mlp_block(const Layer& layer, std::int64_t num_tokens);

  ModelConfig config_;
  DType qkv_dtype_ = DType::kFloat32;
  KVTape* recorded_ = nullptr;
  const KVTape* replayed_ = nullptr;
  std::vector<float> embedding_;  // [vocab_size, hidden_size]
  std::vector<Layer> layers_;
  std::vector<float> final_norm_;
  Linear head_;                   // empty where the embeddings are tied
  std::vector<double> inv_freq_;  // [head_size / 2]

  // Scratch, [num_tokens, ...] of the largest batch so far.
  std::vector<float> hidden_, normed_, qkv_, attention_, projected_, gate_up_, gated_;
  std::vector<std::uint16_t> qkv_16_;  // qkv_ in a 16-bit qkv_dtype_
  std::vector<float> cos_sin_;         // [num_tokens, 2, head_size / 2]
};

}  // namespace quire::llm
