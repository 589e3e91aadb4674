// The running softmax of one row and the merge of two, for host and device. Logarithms are natural.
//
//   max = largest logit so far (-inf: none)     sum = sum exp(s - max)     acc = sum exp(s - max) * v
//
// Partial results over disjoint keys merge by folding left to right in key order; a partial over no visible key is
// neutral. A NaN logit makes sum NaN and so the output NaN; it never enters max.
#pragma once

#include <cmath>

#include "format/exact.h"

namespace quire::attention {

struct SoftmaxState {
  float max = -INFINITY;
  float sum = 0.0F;
};

// exp(from - to), where a maximum of -inf means that nothing was summed under it.
QUIRE_HD float rescale(float from, float to) {
  return from == -INFINITY ? (to == -INFINITY ? 1.0F : 0.0F) : expf(from - to);
}

// One sink logit more in the denominator; the accumulator is multiplied by the returned factor.
QUIRE_HD float add_sink(SoftmaxState& state, float sink) {
  const float max = exact::max(state.max, sink);
  const float factor = rescale(state.max, max);
  state.sum = state.sum * factor + (max == -INFINITY ? 0.0F : expf(sink - max));
  state.max = max;
  return factor;
}

// 1 / sum, or 0 for an empty row, whose output is 0.
QUIRE_HD float output_factor(const SoftmaxState& state) { return state.sum == 0.0F ? 0.0F : 1.0F / state.sum; }

QUIRE_HD float log_sum_exp(const SoftmaxState& state) {
  return state.sum == 0.0F ? -INFINITY : state.max + logf(state.sum);
}

}  // namespace quire::attention
