#include "llm/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace quire::llm {

Status check(const SamplingParams& params) {
  if (!(params.temperature >= 0.0F) || !std::isfinite(params.temperature)) {
    return invalid_argument("temperature is " + std::to_string(params.temperature) + ", expected 0 (greedy) or more");
  }
  if (!(params.top_p > 0.0F && params.top_p <= 1.0F)) {
    return invalid_argument("top_p is " + std::to_string(params.top_p) + ", expected a value above 0, at most 1");
  }
  return {};
}

std::int32_t argmax(const float* values, int n) {
  return static_cast<std::int32_t>(std::max_element(values, values + n) - values);
}

std::int32_t Sampler::sample(const float* logits, int vocab_size) {
  if (params_.temperature == 0.0F) return argmax(logits, vocab_size);
  const auto n = static_cast<std::size_t>(vocab_size);
  order_.resize(n);
  std::iota(order_.begin(), order_.end(), 0);
  std::stable_sort(order_.begin(), order_.end(), [&](auto a, auto b) { return logits[a] > logits[b]; });
  probabilities_.resize(n);
  const double largest = logits[order_[0]];
  double sum = 0.0;
  for (std::size_t i = 0; i < n; ++i) {
    probabilities_[i] = std::exp((logits[order_[i]] - largest) / params_.temperature);
    sum += probabilities_[i];
  }
  std::size_t kept = 0;
  double kept_sum = 0.0;
  while (kept < n && (kept == 0 || kept_sum < params_.top_p * sum)) kept_sum += probabilities_[kept++];
  // 53 random bits as a fraction; std::uniform_real_distribution may differ between standard libraries.
  double left = static_cast<double>(random_() >> 11) * 0x1p-53 * kept_sum;
  for (std::size_t i = 0; i + 1 < kept; ++i) {
    left -= probabilities_[i];
    if (left < 0.0) return order_[i];
  }
  return order_[kept - 1];
}

}  // namespace quire::llm
