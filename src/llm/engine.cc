#include "llm/engine.h"

#include <algorithm>
#include <string>

namespace quire::llm {

Result<Engine> Engine::create(Model& model, const EngineOptions& options) {
  if (options.max_tokens_per_step < 1) {
    return invalid_argument("max_tokens_per_step is " + std::to_string(options.max_tokens_per_step) +
                            ", expected at least 1");
  }
  Result<KVCache> cache = KVCache::create(model.config(), options.cache);
  if (!cache.ok()) return cache.status();
  return Engine(model, std::move(*cache), options);
}

Result<int> Engine::add(const Request& request) {
  const auto prompt_tokens = static_cast<std::int64_t>(request.prompt.size());
  if (prompt_tokens == 0) return invalid_argument("the prompt has no tokens");
  if (request.max_new_tokens < 1) {
    return invalid_argument("max_new_tokens is " + std::to_string(request.max_new_tokens) + ", expected at least 1");
  }
  if (Status status = check(request.sampling); !status) return status;
  const int vocab_size = model_->config().vocab_size;
  for (std::int64_t i = 0; i < prompt_tokens; ++i) {
    const std::int32_t token = request.prompt[static_cast<std::size_t>(i)];
    if (token < 0 || token >= vocab_size) {
      return out_of_range("token id " + std::to_string(token) + " at position " + std::to_string(i) +
                          " of the prompt is outside the vocabulary of " + std::to_string(vocab_size));
    }
  }
  const std::int64_t cache_tokens = cache_.num_blocks() * cache_.block_size();
  const std::int64_t limit = std::min(cache_tokens, model_->config().max_position);
  if (prompt_tokens > limit || request.max_new_tokens > limit - prompt_tokens) {
    return out_of_range("a prompt of " + std::to_string(prompt_tokens) + " tokens and " +
                        std::to_string(request.max_new_tokens) + " new ones do not fit: " +
                        (limit < model_->config().max_position ? "the cache holds " : "the model's context is ") +
                        std::to_string(limit) + " tokens");
  }
  waiting_.push_back({++last_id_, request, {.tokens = request.prompt, .blocks = {}}, Sampler(request.sampling)});
  return last_id_;
}

Result<std::vector<Engine::Output>> Engine::step() {
  while (!waiting_.empty()) {
    Running& next = waiting_.front();
    const auto prompt_tokens = static_cast<std::int64_t>(next.request.prompt.size());
    if (!allocator_.reserve(next.sequence, prompt_tokens + next.request.max_new_tokens)) break;
    running_.push_back(std::move(next));
    waiting_.pop_front();
  }

  // Sequences that generate come first, so that a long prompt delays nobody's next token.
  Batch batch;
  struct Part {
    Running* running;
    std::int64_t num_tokens;
  };
  std::vector<Part> parts;
  for (const bool generating : {true, false}) {
    for (Running& running : running_) {
      if ((running.left_to_compute() == 1) != generating) continue;
      const std::int64_t count = std::min(running.left_to_compute(), max_tokens_per_step_ - batch.num_tokens());
      if (count < 1) continue;
      batch.add(running.sequence, count, count == running.left_to_compute() ? 1 : 0, cache_.block_size());
      parts.push_back({&running, count});
    }
  }
  const auto vocab_size = static_cast<std::size_t>(model_->config().vocab_size);
  logits_.resize(batch.logit_rows.size() * vocab_size);
  if (Status status = model_->forward(batch, cache_, logits_.data()); !status) return status;
  tokens_computed_ += batch.num_tokens();

  std::vector<Output> outputs;
  for (const Part& part : parts) {
    Running& running = *part.running;
    running.sequence.num_stored += part.num_tokens;
    allocator_.publish(running.sequence);
    if (running.left_to_compute() > 0) continue;
    const float* row = logits_.data() + outputs.size() * vocab_size;
    Output output{
        .request = running.id, .token = running.sampler.sample(row, static_cast<int>(vocab_size)), .logits = {}};
    if (keep_logits_) output.logits.assign(row, row + vocab_size);
    running.sequence.tokens.push_back(output.token);
    const auto& eos = model_->config().eos_token_ids;
    const auto new_tokens = static_cast<std::int64_t>(running.sequence.tokens.size() - running.request.prompt.size());
    output.finished = new_tokens == running.request.max_new_tokens ||
                      (running.request.stop_at_eos && std::find(eos.begin(), eos.end(), output.token) != eos.end());
    if (output.finished) allocator_.release(running.sequence);
    outputs.push_back(std::move(output));
  }
  std::erase_if(running_, [](const Running& running) { return running.sequence.blocks.empty(); });
  return outputs;
}

}  // namespace quire::llm
