// The storage floats against their definition, written here a second time with ldexp and a search among all values:
// every code is decoded, and encoding is tried on every representable value, on every midpoint between two neighbours
// (a tie), on the fp32 numbers next to each of them, and on random bit patterns.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "format/float_types.h"
#include "support/random.h"

namespace quire::format {
namespace {

enum class Specials {
  kIeee,  // the largest exponent holds infinity and NaN
  kNaN,   // only all-ones is NaN
  kNone,  // NaN saturates too
};

struct FloatKind {
  const char* name;
  int exponent_bits, mantissa_bits, bias;
  Specials specials;
  bool saturates;  // overflow gives the largest finite value; else infinity
  std::uint32_t (*encode)(float);
  float (*decode)(std::uint32_t);

  int bits() const { return 1 + exponent_bits + mantissa_bits; }
  std::uint32_t sign() const { return 1U << (exponent_bits + mantissa_bits); }
  std::uint32_t infinity() const { return ((1U << exponent_bits) - 1U) << mantissa_bits; }
  std::uint32_t largest() const {
    return specials == Specials::kIeee ? infinity() - 1 : sign() - (specials == Specials::kNaN ? 2 : 1);
  }

  // The value of a finite code without its sign.
  double value(std::uint32_t code) const {
    const int exponent = static_cast<int>(code >> mantissa_bits);
    const double fraction = code & ((1U << mantissa_bits) - 1U);
    const double significand = exponent == 0 ? fraction : fraction + std::ldexp(1.0, mantissa_bits);
    return std::ldexp(significand, std::max(exponent, 1) - bias - mantissa_bits);
  }

  // Nearest code by search, ties to the even code.
  std::uint32_t nearest(const std::vector<double>& values, float x) const {
    const std::uint32_t sign_bit = std::signbit(x) ? sign() : 0U;
    const double magnitude = std::abs(static_cast<double>(x));
    const std::uint32_t last = largest();
    const double overflow = values[last] + (values[last] - values[last - 1]) / 2;
    if (magnitude >= overflow) return sign_bit | (saturates ? last : infinity());
    if (magnitude >= values[last]) return sign_bit | last;
    const auto above = std::upper_bound(values.begin(), values.end(), magnitude);
    const auto low = static_cast<std::uint32_t>(above - values.begin()) - 1;
    const double down = magnitude - values[low];
    const double up = values[low + 1] - magnitude;
    const bool round_up = up < down || (up == down && low % 2 == 1);
    return sign_bit | (low + (round_up ? 1U : 0U));
  }
};

const FloatKind kKinds[] = {
    {"half", 5, 10, 15, Specials::kIeee, false, [](float x) { return std::uint32_t{float_to_half(x)}; },
     [](std::uint32_t c) { return half_to_float(static_cast<std::uint16_t>(c)); }},
    {"bfloat16", 8, 7, 127, Specials::kIeee, false, [](float x) { return std::uint32_t{float_to_bfloat16(x)}; },
     [](std::uint32_t c) { return bfloat16_to_float(static_cast<std::uint16_t>(c)); }},
    {"e4m3fn", 4, 3, 7, Specials::kNaN, true, [](float x) { return std::uint32_t{E4M3::encode(x)}; },
     [](std::uint32_t c) { return E4M3::decode(static_cast<std::uint8_t>(c)); }},
    {"e5m2", 5, 2, 15, Specials::kIeee, true, [](float x) { return std::uint32_t{E5M2::encode(x)}; },
     [](std::uint32_t c) { return E5M2::decode(static_cast<std::uint8_t>(c)); }},
    {"e4b15", 4, 3, 15, Specials::kNone, true, [](float x) { return std::uint32_t{E4B15::encode(x)}; },
     [](std::uint32_t c) { return E4B15::decode(static_cast<std::uint8_t>(c)); }},
};

class Conversion : public ::testing::TestWithParam<FloatKind> {
 protected:
  void SetUp() override {
    for (std::uint32_t code = 0; code <= kind_.largest(); ++code) values_.push_back(kind_.value(code));
  }
  const FloatKind& kind_ = GetParam();
  std::vector<double> values_;  // of the finite codes without sign, ascending
};

TEST_P(Conversion, DecodesEveryCode) {
  for (std::uint32_t code = 0; code < (1U << kind_.bits()); ++code) {
    const std::uint32_t magnitude = code & (kind_.sign() - 1U);
    const float got = kind_.decode(code);
    ASSERT_EQ(std::signbit(got), (code & kind_.sign()) != 0) << code;
    if (magnitude <= kind_.largest()) {
      ASSERT_EQ(std::abs(static_cast<double>(got)), values_[magnitude]) << code;
    } else if (kind_.specials == Specials::kIeee && magnitude == kind_.infinity()) {
      ASSERT_TRUE(std::isinf(got)) << code;
    } else {
      ASSERT_TRUE(std::isnan(got)) << code;
    }
  }
}

TEST_P(Conversion, EveryCodeSurvivesARoundTrip) {
  for (std::uint32_t code = 0; code < (1U << kind_.bits()); ++code) {
    const std::uint32_t magnitude = code & (kind_.sign() - 1U);
    std::uint32_t expected = code;
    if (kind_.saturates && kind_.specials == Specials::kIeee) {  // e5m2: infinity saturates, one NaN stands for all
      if (magnitude == kind_.infinity()) expected = (code & kind_.sign()) | kind_.largest();
      if (magnitude > kind_.infinity()) expected = code | (kind_.sign() - 1U);
    }
    ASSERT_EQ(kind_.encode(kind_.decode(code)), expected) << code;
  }
}

TEST_P(Conversion, RoundsToNearestTiesToEven) {
  std::vector<float> inputs{0.0F, std::numeric_limits<float>::denorm_min(), std::numeric_limits<float>::max()};
  for (std::size_t i = 0; i < values_.size(); ++i) {
    const double next = i + 1 < values_.size() ? values_[i + 1] : 2 * values_[i] - values_[i - 1];
    for (double center : {values_[i], (values_[i] + next) / 2}) {
      const float x = static_cast<float>(center);
      for (float y : {x, std::nextafter(x, 0.0F), std::nextafter(x, std::numeric_limits<float>::max())}) {
        inputs.push_back(y);
      }
    }
  }
  testing::Random random(7);
  for (int i = 0; i < 300000; ++i) {
    const float any = std::bit_cast<float>(static_cast<std::uint32_t>(random.bits()));
    if (std::isfinite(any)) inputs.push_back(any);
    inputs.push_back(static_cast<float>(random.normal() * std::exp2(random.uniform(-12, 12))));
  }
  for (float x : inputs) {
    ASSERT_EQ(kind_.encode(x), kind_.nearest(values_, x)) << std::hexfloat << x;
    ASSERT_EQ(kind_.encode(-x), kind_.nearest(values_, -x)) << std::hexfloat << -x;
  }
}

TEST_P(Conversion, SpecialValues) {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::uint32_t top = kind_.saturates ? kind_.largest() : kind_.infinity();
  EXPECT_EQ(kind_.encode(infinity), top);
  EXPECT_EQ(kind_.encode(-infinity), top | kind_.sign());
  EXPECT_EQ(kind_.encode(std::numeric_limits<float>::max()), top);
  EXPECT_EQ(kind_.encode(0.0F), 0U);
  EXPECT_EQ(kind_.encode(-0.0F), kind_.sign());
  for (std::uint32_t payload : {0x1U, 0x1000U, 0x2000U, 0x200000U, 0x400000U, 0x7fffffU}) {
    for (std::uint32_t sign : {0U, 0x80000000U}) {
      const std::uint32_t code = kind_.encode(std::bit_cast<float>(sign | 0x7f800000U | payload));
      EXPECT_TRUE(kind_.specials == Specials::kNone ? code == (top | (sign != 0 ? kind_.sign() : 0U))
                                                    : std::isnan(kind_.decode(code)))
          << "a NaN with payload " << payload << " became code " << code;
      EXPECT_EQ((code & kind_.sign()) != 0, sign != 0);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Floats, Conversion, ::testing::ValuesIn(kKinds),
                         [](const auto& param) { return std::string(param.param.name); });

TEST(Exact, RoundHalfEven) {
  testing::Random random(11);
  for (int i = 0; i < 100000; ++i) {
    const float x = static_cast<float>(random.uniform(-300, 300));
    ASSERT_EQ(exact::round_half_even(x), std::nearbyint(x)) << x;
  }
  for (int n = -300; n < 300; ++n) {
    const float tie = static_cast<float>(n) + 0.5F;
    ASSERT_EQ(exact::round_half_even(tie), std::nearbyint(tie)) << tie;
  }
}

TEST(Exact, RoundHalfAway) {
  testing::Random random(12);
  for (int i = 0; i < 100000; ++i) {
    const float x = static_cast<float>(random.uniform(-300, 300));
    ASSERT_EQ(exact::round_half_away(x), std::round(x)) << x;
  }
  for (int n = -300; n < 300; ++n) {
    const float tie = static_cast<float>(n) + 0.5F;
    ASSERT_EQ(exact::round_half_away(tie), std::round(tie)) << tie;
    ASSERT_EQ(exact::round_half_away(std::nextafter(tie, 0.0F)), std::round(std::nextafter(tie, 0.0F))) << tie;
  }
}

TEST(Exact, ClampMapsNaNToTheLowerEnd) {
  EXPECT_EQ(exact::clamp(exact::quiet_nan(), -3.0F, 5.0F), -3.0F);
  EXPECT_EQ(exact::clamp(-7.0F, -3.0F, 5.0F), -3.0F);
  EXPECT_EQ(exact::clamp(7.0F, -3.0F, 5.0F), 5.0F);
}

}  // namespace
}  // namespace quire::format
