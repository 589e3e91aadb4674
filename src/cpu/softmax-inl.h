// What happens between the two products, for all rows of a tile at once: scores to logits, logits to weights under a
// running maximum, weights to operands. Masks and biases come in between (attention_tile.cc), row by row.
#if defined(QUIRE_CPU_SOFTMAX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_CPU_SOFTMAX_INL_H_
#undef QUIRE_CPU_SOFTMAX_INL_H_
#else
#define QUIRE_CPU_SOFTMAX_INL_H_
#endif

#include <hwy/contrib/math/math-inl.h>

#include <cmath>

#include "cpu/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu {
namespace HWY_NAMESPACE {
namespace {

void make_logits(float* scores, int num_rows, int num_keys, const float* scale, const float* offset, float factor,
                 const float* q_sum) {
  const F32 d;
  const auto factors = hn::Set(d, factor);
  const auto zero = hn::Zero(d);
  for (int m = 0; m < num_rows; ++m, scores += kKeyTile) {
    const auto sum = hn::Set(d, factor * q_sum[m]);
    for (int n = 0; n < num_keys; n += kFloats) {
      auto x = hn::Mul(factors, hn::Mul(hn::LoadU(d, scale + n), hn::LoadU(d, scores + n)));
      if (offset != nullptr) x = hn::MulAdd(hn::LoadU(d, offset + n), sum, x);
      // From here on -inf means "not seen": an infinite product must not pass for that.
      hn::StoreU(hn::MulAdd(x, zero, x), d, scores + n);
    }
    for (int n = num_keys; n < padded(num_keys); ++n) scores[n] = -INFINITY;
  }
}

#if QUIRE_CPU_WORDS_512
constexpr float kExp2Terms[7] = {
    0x1.4258d8p-13F, 0x1.5f44dcp-10F, 0x1.3b2cc4p-7F, 0x1.c6aed6p-5F, 0x1.ebfbdcp-3F, 0x1.62e43p-1F, 1.0F};
#endif

// exp(x) for x <= 0; a NaN stays one, -infinity gives 0.
HWY_INLINE hn::Vec<F32> exp_of_nonpositive(hn::Vec<F32> x) {
#if QUIRE_CPU_WORDS_512
  // 2^whole * 2^part: |part| <= 1/2, x log2(e) in two terms, and a polynomial found by least squares at Chebyshev's
  // points, whose relative error is below 2^-25; all in all it is below 2^-23.
  const __m512 least = _mm512_max_ps(_mm512_set1_ps(-200.0F), x.raw);  // the second operand where it is a NaN
  const __m512 log2e = _mm512_set1_ps(0x1.715476p+0F);
  const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(least, log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 part = _mm512_fmsub_ps(least, log2e, whole);
  part = _mm512_fmadd_ps(least, _mm512_set1_ps(0x1.4ae0cp-26F), part);
  __m512 power = _mm512_set1_ps(kExp2Terms[0]);
  HWY_UNROLL(6)
  for (int i = 1; i < 7; ++i) power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(kExp2Terms[i]));
  return hn::Vec<F32>{_mm512_scalef_ps(power, whole)};
#else
  return hn::IfThenElse(hn::IsNaN(x), x, hn::Exp(F32(), x));
#endif
}

void softmax_tile(float* scores, int num_rows, int num_keys, attention::SoftmaxState* state, float* acc, int acc_stride,
                  float* offset_sum) {
  const F32 d;
  const auto none = hn::Set(d, -INFINITY);
  // Some rows at a time, so that their maxima and sums do not wait for each other.
  constexpr int kRows = 8;
  for (int first = 0; first < num_rows; first += kRows) {
    const int rows = num_rows - first < kRows ? num_rows - first : kRows;
    float* tile = scores + static_cast<std::int64_t>(first) * kKeyTile;
    float max[kRows], sum[kRows];
    for (int m = 0; m < rows; ++m) {
      auto top = none;
      for (int n = 0; n < num_keys; n += kFloats) {
        const auto x = hn::LoadU(d, tile + m * kKeyTile + n);
        top = hn::Max(hn::IfThenElse(hn::IsNaN(x), none, x), top);
      }
      max[m] = hn::GetLane(hn::MaxOfLanes(d, top));
    }
    for (int m = 0; m < rows; ++m) max[m] = exact::max(max[m], state[first + m].max);
    for (int m = 0; m < rows; ++m) {
      const auto maximum = hn::Set(d, max[m] == -INFINITY ? 0.0F : max[m]);
      auto total = hn::Zero(d);
      for (int n = 0; n < num_keys; n += kFloats) {
        const auto x = hn::Sub(hn::LoadU(d, tile + m * kKeyTile + n), maximum);
        const auto e = exp_of_nonpositive(x);
        hn::StoreU(e, d, tile + m * kKeyTile + n);
        total = hn::Add(total, e);
      }
      sum[m] = hn::GetLane(hn::SumOfLanes(d, total));
    }
    for (int m = 0; m < rows; ++m) {
      attention::SoftmaxState& own = state[first + m];
      if (max[m] != own.max) {
        const float factor = attention::rescale(own.max, max[m]);
        float* row = acc + static_cast<std::int64_t>(first + m) * acc_stride;
        for (int i = 0; i < acc_stride; ++i) row[i] *= factor;
        offset_sum[first + m] *= factor;
        own.sum *= factor;
        own.max = max[m];
      }
      own.sum += sum[m];
    }
  }
}

#ifdef QUIRE_CPU_ZEN4
// x as the sum of two bf16.
HWY_INLINE void store_parts(hn::Vec<F32> x, std::uint16_t* first, std::uint16_t* second) {
  const auto high = (__m256i)_mm512_cvtneps_pbh(x.raw);
  const __m512 back = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  const auto low = (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(x.raw, back));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(first), high);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(second), low);
}
#endif

void make_weights(Operand operand, float* scores, int num_rows, int num_keys, const float* scale, const float* offset,
                  std::uint16_t* weights, float* unit, float* offset_sum) {
  const F32 d;
  for (int m = 0; m < num_rows; ++m, scores += kKeyTile, weights += kKeyTile) {
    if (offset != nullptr) {
      auto sum = hn::Zero(d);
      for (int n = 0; n < num_keys; n += kFloats) {
        sum = hn::MulAdd(hn::LoadU(d, scores + n), hn::LoadU(d, offset + n), sum);
      }
      offset_sum[m] += hn::GetLane(hn::SumOfLanes(d, sum));
    }
    auto top = hn::Zero(d);
    for (int n = 0; n < num_keys; n += kFloats) {
      const auto w = hn::Mul(hn::LoadU(d, scores + n), hn::LoadU(d, scale + n));
      hn::StoreU(w, d, scores + n);
      top = hn::Max(hn::Abs(w), top);  // a NaN is in the row's sum already
    }
    if (operand == Operand::kFloat32) continue;
    if (operand == Operand::kInt16) {
      const float most = hn::GetLane(hn::MaxOfLanes(d, top));
      const bool some = most > 1e-30F;
      unit[m] = some ? most * (1.0F / 32767.0F) : 0.0F;
      const auto inverse = hn::Set(d, some ? 32767.0F / most : 0.0F);
      const hn::Rebind<std::int16_t, I32> half;
      for (int n = 0; n < num_keys; n += kFloats) {
        const auto code = hn::NearestInt(hn::Mul(hn::LoadU(d, scores + n), inverse));
        hn::StoreU(hn::DemoteTo(half, code), half, reinterpret_cast<std::int16_t*>(weights + n));
      }
    }
#ifdef QUIRE_CPU_ZEN4
    if (operand == Operand::kBFloat16) {
      for (int n = 0; n < num_keys; n += kFloats) {
        store_parts(hn::LoadU(d, scores + n), weights + n,
                    weights + static_cast<std::int64_t>(num_rows) * kKeyTile + n);
      }
    }
#endif
    for (int n = num_keys; n < padded(num_keys); ++n) {
      for (int part = 0; part < weight_parts(operand); ++part)
        weights[static_cast<std::int64_t>(part) * num_rows * kKeyTile + n] = 0;
    }
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace quire::cpu
HWY_AFTER_NAMESPACE();

#endif  // QUIRE_CPU_SOFTMAX_INL_H_
