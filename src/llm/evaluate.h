// What a cache mode costs a model, measured. For every mode the same tokens go through the same weights, and every key
// and value that attention sees has gone through the cache in that mode (fp8 per tensor with scale 1):
//
//   perplexity     exp of the mean of -log p(next token), over windows of the model's context, each alone
//   KL divergence  mean over all positions of  sum_v p_ref(v) log(p_ref(v) / p_mode(v)),  in nats, where p_ref is the
//                  same model over an fp32 cache
//   recall, arithmetic   share of prompts whose greedy continuation is the answer, token for token
//
// q, k and v are handed to the cache in the model's own dtype, in the reference too, as an engine would: so the
// divergence is the cost of the cache alone, and a bf16 cache of a bf16 model has none. (With qkv_dtype = float32 the
// cost of that rounding counts too.)
//
// Two devices round differently, and a difference in the last bit of a hidden state moves some keys and values across a
// rounding boundary of a quantized format; from there on the two caches hold other noise of the same size, and their
// perplexities differ by it. against_cpu takes that noise out: each window also goes through a cache on the CPU, and the
// device's cache is given the very keys and values that the CPU's was, so that only the ops differ.
//
// A greedy continuation equals the answer exactly where each answer token is the largest logit after the prompt and the
// answer tokens before it: prompt and answer run as one prefill, and nothing is decoded step by step.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "llm/model.h"
#include "quire/mode.h"
#include "quire/status.h"

namespace quire::llm {

struct EvalPrompt {
  std::vector<std::int32_t> prompt, answer;
  std::int64_t context = 0;  // the nominal length that recall is reported under; 0 where the file has none
};

// Reads one JSON object {"prompt": [ids], "answer": [ids], "context": n} per line; "context" may be missing.
Result<std::vector<EvalPrompt>> read_prompts(const std::string& path, const ModelConfig& config);

struct EvalSets {
  std::vector<std::int32_t> tokens;  // cut into windows
  std::vector<EvalPrompt> recall, arithmetic;
};

// Reads the files that are named; an empty path is a set that is not measured.
struct EvalPaths {
  std::string tokens, recall, arithmetic;
};
Result<EvalSets> load_eval_sets(const EvalPaths& paths, const ModelConfig& config);

struct EvalOptions {
  std::vector<ModeInfo> modes;
  Device device = Device::cpu();        // where the caches live and the ops run, those of the reference too
  bool against_cpu = false;             // also measures cpu_perplexity; windows only
  std::vector<int> skip_layers = {};    // kept in the model's own dtype, whatever the mode
  std::int64_t max_windows = -1;        // -1: all
  std::int64_t max_prompts = -1;        // of each set and context length; -1: all
  std::optional<DType> qkv_dtype = {};  // of q, k and v on their way to the cache; none: the model's own
  std::function<void(double, const std::string&)> progress;  // fraction done, mode; may be empty
};

struct EvalScore {
  std::string mode;
  std::int64_t bytes_per_token_head = 0;  // K + V + scales, of a layer in the mode
  std::int64_t bytes_per_token = 0;       // all heads of all layers, skipped ones too
  std::optional<double> perplexity, kl_divergence, same_top_token;
  std::optional<double> cpu_perplexity;   // of a cache on the CPU that holds the same keys and values
  std::map<std::int64_t, double> recall;  // by context length
  std::optional<double> arithmetic;
  double tokens_per_second = 0.0;  // of the model's forward passes, prefill
  std::vector<int> skip_layers;
};

Result<std::vector<EvalScore>> evaluate(Model& model, const EvalSets& sets, const EvalOptions& options);

// {"model", "device", "modes": {name: scores}}; what was not measured is null.
std::string to_json(const std::vector<EvalScore>& scores, const std::string& model_name, Device device);

}  // namespace quire::llm
