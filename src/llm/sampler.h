// Picks the next token from a row of logits: the largest, or a draw from softmax(logits / temperature) cut to the
// smallest set of tokens that holds top_p of the probability. The same seed and logits give the same tokens everywhere.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "quire/status.h"

namespace quire::llm {

struct SamplingParams {
  float temperature = 0.0F;  // 0: greedy
  float top_p = 1.0F;        // in (0, 1]
  std::uint64_t seed = 0;
};

Status check(const SamplingParams& params);

class Sampler {
 public:
  explicit Sampler(const SamplingParams& params) : params_(params), random_(params.seed) {}
  std::int32_t sample(const float* logits, int vocab_size);

 private:
  SamplingParams params_;
  std::mt19937_64 random_;
  std::vector<std::int32_t> order_;    // scratch
  std::vector<double> probabilities_;  // scratch
};

// The index of the largest of n values, and of equal ones the first.
std::int32_t argmax(const float* values, int n);

}  // namespace quire::llm
