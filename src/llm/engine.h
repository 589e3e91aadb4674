// A small continuous-batching engine over Model, KVCache and BlockAllocator. Each step runs one ragged batch of at most
// max_tokens_per_step tokens: the next token of every sequence that is generating, then chunks of waiting prompts.
//
//   auto engine = Engine::create(model, {.cache = {.layer_modes = {mode}, .num_blocks = 1024}});
//   auto id = engine->add({.prompt = tokens, .max_new_tokens = 64});
//   while (engine->busy()) for (const Engine::Output& output : *engine->step()) ...
//
// A sequence gets all blocks it can ever need when it is admitted, so that nothing is preempted; until enough are free
// it waits, first come first served.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "llm/model.h"
#include "llm/paged_cache.h"
#include "llm/sampler.h"

namespace quire::llm {

struct EngineOptions {
  KVCacheOptions cache;
  std::int64_t max_tokens_per_step = 512;
  bool share_prefixes = true;
};

struct Request {
  std::vector<std::int32_t> prompt;
  std::int64_t max_new_tokens = 16;
  SamplingParams sampling;
  bool stop_at_eos = true;
};

class Engine {
 public:
  // `model` outlives the engine.
  static Result<Engine> create(Model& model, const EngineOptions& options);

  // Adds a request and returns its id. It is refused where the prompt is empty, holds an id outside of the vocabulary,
  // or can never fit.
  Result<int> add(const Request& request);

  bool busy() const { return !waiting_.empty() || !running_.empty(); }

  struct Output {
    int request = 0;
    std::int32_t token = 0;
    bool finished = false;
    std::vector<float> logits;  // [vocab_size], those that the token was picked from; empty without keep_logits
  };
  // Runs one batch. There is one output for each sequence that got a new token.
  Result<std::vector<Output>> step();

  void keep_logits(bool keep) { keep_logits_ = keep; }
  const KVCache& cache() const { return cache_; }
  const BlockAllocator& allocator() const { return allocator_; }
  // Tokens of prompts and new ones; shared ones are not computed.
  std::int64_t tokens_computed() const { return tokens_computed_; }

 private:
  struct Running {
    int id = 0;
    Request request;
    Sequence sequence;
    Sampler sampler;
    std::int64_t left_to_compute() const {
      return static_cast<std::int64_t>(sequence.tokens.size()) - sequence.num_stored;
    }
  };

  Engine(Model& model, KVCache cache, const EngineOptions& options)
      : model_(&model),
        cache_(std::move(cache)),
        allocator_(options.cache.num_blocks, options.cache.block_size, options.share_prefixes),
        max_tokens_per_step_(options.max_tokens_per_step) {}

  Model* model_;
  KVCache cache_;
  BlockAllocator allocator_;
  std::int64_t max_tokens_per_step_;
  bool keep_logits_ = false;
  int last_id_ = -1;
  std::int64_t tokens_computed_ = 0;
  std::deque<Running> waiting_;
  std::deque<Running> running_;  // in the order of admission
  std::vector<float> logits_;
};

}  // namespace quire::llm
