// How far an output may be from the oracle's, and whether it is no further than that.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "format/formats.h"
#include "reference/attention.h"
#include "support/attention_case.h"

namespace quire::testing {
namespace {

// Half a step of a dtype: relative to its value (floats), and near zero.
double half_ulp(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return 0x1p-11;
    case DType::kBFloat16:
      return 0x1p-8;
    default:
      return 0x1p-24;
  }
}

// The distance between neighbours of e4m3fn around |x|.
double e4m3_step(double x) {
  const int exponent = std::max(-6, std::ilogb(std::max(std::abs(x), 0x1p-9)));
  return std::ldexp(1.0, exponent - 3);
}

}  // namespace

// How far a correct fp32 implementation may be from the oracle, as a factor on the largest value row's norm V. Rounding
// errors of a sum of n terms add up like a random walk: u sqrt(n) of its partial sums, u = 2^-24.
//   A logit is a dot product of d terms of size 1 / sqrt(d): u sqrt(d); the same again for the rotation of the query.
//   Softcap, biases and exp cost u each on a logit of size L: u L. An error in the logits moves the output by as much,
//   V being its unit. The weighted sum over n keys costs u sqrt(n) V.
// A key format with a norm correction (TurboQuant) divides each row by a norm of d squares, u sqrt(d) / 2 of the logit.
// Correct code stays under a tenth of this (SIMD sums in lanes); leaving out one of a thousand keys costs 2^-10.
// A sum in one register instead of 16 lanes walks sqrt(16) times as far: serial_sums.
// Tensor-core kernels round more. A rotated query's d elements: with unit roundoff u = query_unit a logit moves by
// u / sqrt(3) times the norm of the products q_i k_i, which is about 1, or 2 with a k_scale: 6 u covers 5 sigma.
// (Codebook levels in fp16 add 2^-13 at most.) Each softmax weight: weight_unit V, were all errors alike. ex2.approx
// and the change of base add 2^-22 and 3 roundings of the logit.
double AttentionCase::lse_tolerance() const {
  int longest = 1;
  for (const Lengths& s : options.sequences) longest = std::max(longest, s.seq_len);
  const double d = std::max(options.head_size, options.head_size_v);
  const double largest_logit = (options.alibi ? 0.2 * longest : 0.0) + options.softcap + 10.0;
  const ModeInfo mode = **mode_info(mode_of(options.mode));
  const format::FormatId key_format = reference::resolve_format(mode.key_format, options.auto_dtype);
  double norm = 0.0;
  format::for_each_format([&]<class F>() {
    if (F::kLevelNorm && format::format_id<F> == key_format) norm = largest_logit * std::sqrt(d) / 2.0;
  });
  return 0x1p-24 * serial_sums * (2.0 * std::sqrt(d) + std::sqrt(static_cast<double>(longest)) + largest_logit + norm) +
         (query_unit > 0x1p-24 ? 6.0 * query_unit : 0.0) +
         (weight_unit > 0x1p-24 ? 0x1p-22 + 0x3p-24 * largest_logit : 0.0);
}

double AttentionCase::tolerance() const { return lse_tolerance() + (weight_unit > 0x1p-24 ? weight_unit : 0.0); }

::testing::AssertionResult AttentionCase::matches() const {
  // Norm of the largest value row: quantizing moves a row by less than half its norm in every format.
  double largest_value = 0.0;
  const float* row = value.view.ptr<float>();
  for (std::int64_t n = value.view.shape[0] * value.view.shape[1]; n > 0; --n, row += options.head_size_v) {
    double squares = 0.0;
    for (int i = 0; i < options.head_size_v; ++i) squares += static_cast<double>(row[i]) * static_cast<double>(row[i]);
    largest_value = std::max(largest_value, std::sqrt(squares));
  }
  const double v_factor = options.v_scale == ScaleShape::kNone ? 1.0 : 0.4;
  const double bound = tolerance() * 1.5 * largest_value * v_factor;
  const std::int64_t heads = options.num_kv_heads * options.group;
  const bool fp8_out = dtype_bytes(options.out_dtype) == 1;

  for (std::int64_t t = 0; t < num_tokens; ++t) {
    for (std::int64_t h = 0; h < heads; ++h) {
      double error = 0.0;
      double norm = 0.0;
      const float* oracle = expected_out.view.ptr<float>() + (t * heads + h) * options.head_size_v;
      for (int i = 0; i < options.head_size_v; ++i) {
        const double expected = oracle[i];
        double got = out.get(t, h, i);
        if (std::isnan(expected) || std::isnan(got)) {
          if (std::isnan(expected) != std::isnan(got)) {
            return ::testing::AssertionFailure() << options.describe() << ": token " << t << " head " << h
                                                 << " element " << i << " is " << got << ", oracle " << expected;
          }
          continue;
        }
        if (fp8_out) {
          const double s = options.output_scale;
          const double limited = std::clamp(expected / s, -448.0, 448.0);
          const double slack = bound / s;
          if (std::abs(got - limited) > 0.5 * e4m3_step(std::abs(limited) + slack) + slack) {
            return ::testing::AssertionFailure()
                   << options.describe() << ": token " << t << " head " << h << " element " << i << " is code value "
                   << got << ", oracle " << limited;
          }
          continue;
        }
        error += (got - expected) * (got - expected);
        norm += expected * expected;
      }
      error = std::sqrt(error);
      // Rounding to the output's dtype: half an ulp of each element, and 2^-25 where fp16 has gone subnormal.
      const double allowed = bound + half_ulp(options.out_dtype) * std::sqrt(norm) +
                             (options.out_dtype == DType::kFloat16 ? 0x1p-25 * std::sqrt(options.head_size_v) : 0.0);
      if (!(error <= allowed)) {
        return ::testing::AssertionFailure() << options.describe() << ": token " << t << " head " << h << " is off by "
                                             << error << " (norm " << std::sqrt(norm) << "), allowed " << allowed;
      }
      if (options.lse) {
        const double expected = expected_lse.get(t, h);
        const double got = lse.get(t, h);
        const bool both_special = (std::isnan(expected) && std::isnan(got)) || expected == got;
        if (!both_special && !(std::abs(got - expected) <= lse_tolerance() + 0x1p-23 * std::abs(expected))) {
          return ::testing::AssertionFailure() << options.describe() << ": lse of token " << t << " head " << h
                                               << " is " << got << ", oracle " << expected;
        }
      }
    }
  }

  // What is not output is as it was: the rows past the last query, and the gaps between rows.
  const auto untouched = [](const OwnedTensor& tensor, std::int64_t used_rows) {
    std::vector<char> written(tensor.bytes.size(), 0);
    const std::int64_t size = static_cast<std::int64_t>(dtype_bytes(tensor.view.dtype));
    const std::int64_t row_elements = tensor.view.ndim == 3 ? tensor.view.shape[2] : 1;
    for (std::int64_t t = 0; t < used_rows; ++t) {
      for (std::int64_t h = 0; h < tensor.view.shape[1]; ++h) {
        const std::int64_t at = (t * tensor.view.strides[0] + h * tensor.view.strides[1]) * size;
        std::fill_n(written.begin() + at, row_elements * size, char{1});
      }
    }
    for (std::size_t i = 0; i < written.size(); ++i) {
      if (written[i] == 0 && tensor.bytes[i] != 0xFF) return false;
    }
    return true;
  };
  if (!untouched(out, num_tokens))
    return ::testing::AssertionFailure() << options.describe() << ": wrote between rows of out";
  if (!untouched(lse, options.lse ? num_tokens : 0)) {
    return ::testing::AssertionFailure() << options.describe() << ": wrote between rows of lse";
  }
  return ::testing::AssertionSuccess();
}

}  // namespace quire::testing
