// The storage floats against their definition, written here a second time with ldexp and a search among all values.
// Every code is decoded. Encoding is tried on every representable value, on every midpoint between two neighbours (a
// tie), on the fp32 numbers next to each of them, and on random bit patterns. e4b15 is also compared with the steps of
// Triton's conversion.
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
  kIeee,  // the largest exponent stands for infinity and NaN
  kNaN,   // only all-ones is NaN
  kNone,  // NaN saturates as well
};

struct FloatKind {
  const char* name;
  int exponent_bits, mantissa_bits, bias;
  Specials specials;
  bool saturates;  // overflow gives the largest encoded value; else infinity
  bool ties_away;  // from zero; else to the even code
  std::uint32_t (*encode)(float);
  float (*decode)(std::uint32_t);

  int bits() const { return 1 + exponent_bits + mantissa_bits; }
  std::uint32_t sign() const { return 1U << (exponent_bits + mantissa_bits); }
  std::uint32_t infinity() const { return ((1U << exponent_bits) - 1U) << mantissa_bits; }
  std::uint32_t largest() const {
    return specials == Specials::kIeee ? infinity() - 1 : sign() - (specials == Specials::kNaN ? 2 : 1);
  }

  // The largest code that encoding gives for a finite value. All-ones of e4b15 is decoded, but never written.
  std::uint32_t largest_encoded() const { return largest() - (specials == Specials::kNone ? 1 : 0); }

  // The value of a finite code without its sign.
  double value(std::uint32_t code) const {
    const int exponent = static_cast<int>(code >> mantissa_bits);
    const double fraction = code & ((1U << mantissa_bits) - 1U);
    const double significand = exponent == 0 ? fraction : fraction + std::ldexp(1.0, mantissa_bits);
    return std::ldexp(significand, std::max(exponent, 1) - bias - mantissa_bits);
  }

  // Finds the nearest code by search.
  std::uint32_t nearest(const std::vector<double>& values, float x) const {
    const std::uint32_t sign_bit = std::signbit(x) ? sign() : 0U;
    const double magnitude = std::abs(static_cast<double>(x));
    const std::uint32_t last = largest_encoded();
    const double overflow = values[last] + (values[last] - values[last - 1]) / 2;
    if (magnitude >= overflow) return sign_bit | (saturates ? last : infinity());
    if (magnitude >= values[last]) return sign_bit | last;
    const auto above = std::upper_bound(values.begin(), values.end(), magnitude);
    const auto low = static_cast<std::uint32_t>(above - values.begin()) - 1;
    const double down = magnitude - values[low];
    const double up = values[low + 1] - magnitude;
    const bool round_up = up < down || (up == down && (ties_away || low % 2 == 1));
    return sign_bit | (low + (round_up ? 1U : 0U));
  }
};

const FloatKind kKinds[] = {
    {"half", 5, 10, 15, Specials::kIeee, false, false, [](float x) { return std::uint32_t{float_to_half(x)}; },
     [](std::uint32_t c) { return half_to_float(static_cast<std::uint16_t>(c)); }},
    {"bfloat16", 8, 7, 127, Specials::kIeee, false, false, [](float x) { return std::uint32_t{float_to_bfloat16(x)}; },
     [](std::uint32_t c) { return bfloat16_to_float(static_cast<std::uint16_t>(c)); }},
    {"e4m3fn", 4, 3, 7, Specials::kNaN, true, false, [](float x) { return std::uint32_t{E4M3::encode(x)}; },
     [](std::uint32_t c) { return E4M3::decode(static_cast<std::uint8_t>(c)); }},
    {"e5m2", 5, 2, 15, Specials::kIeee, true, false, [](float x) { return std::uint32_t{E5M2::encode(x)}; },
     [](std::uint32_t c) { return E5M2::decode(static_cast<std::uint8_t>(c)); }},
    {"e4b15", 4, 3, 15, Specials::kNone, true, true, [](float x) { return std::uint32_t{E4B15::encode(x)}; },
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
    if (kind_.specials == Specials::kNone) {  // e4b15: all-ones saturates
      expected = (code & kind_.sign()) | std::min(magnitude, kind_.largest_encoded());
    }
    ASSERT_EQ(kind_.encode(kind_.decode(code)), expected) << code;
  }
}

TEST_P(Conversion, RoundsToNearest) {
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
  const std::uint32_t top = kind_.saturates ? kind_.largest_encoded() : kind_.infinity();
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

// ---- e4b15, as Triton converts --------------------------------------------------------------------------------------

// The fp16 bits of x rounded toward zero: a finite x beyond 65504 gives 65504, an infinity stays one, and a NaN stays
// one and keeps its sign.
std::uint16_t half_toward_zero(float x) {
  const std::uint32_t sign = std::signbit(x) ? 0x8000U : 0U;
  std::uint32_t magnitude = 0x7c00U;
  if (std::isnan(x)) {
    magnitude = 0x7fffU;
  } else if (std::abs(x) < 65504.0F) {
    const int exponent = x == 0.0F ? -14 : std::max(-14, std::ilogb(x));
    const double steps = std::floor(std::ldexp(std::abs(static_cast<double>(x)), 10 - exponent));
    magnitude = static_cast<std::uint32_t>((exponent + 14) * 1024) + static_cast<std::uint32_t>(steps);
  } else if (!std::isinf(x)) {
    magnitude = 0x7bffU;
  }
  return static_cast<std::uint16_t>(sign | magnitude);
}

// What Triton 3.9 does to a register of two fp16 values, step by step. It drops the signs, and takes the smaller of
// each magnitude and 1.75 (of a NaN and a number the number). It doubles both at once and adds 0x80 to each half, so
// that the eight upper bits of a half are exponent and three mantissa bits, rounded half up. It puts the signs back,
// and keeps the upper byte of each half. The halves never exceed 0x7e80, so nothing carries from one into the other.
std::uint32_t triton_e4b15_pair(std::uint32_t halves) {
  std::uint32_t limited = 0;
  for (int shift : {0, 16}) {
    const std::uint32_t magnitude = (halves >> shift) & 0x7fffU;
    const bool nan = magnitude > 0x7c00U;
    limited |= (nan || magnitude > 0x3f00U ? 0x3f00U : magnitude) << shift;  // fp16 magnitudes order like their bits
  }
  const std::uint32_t rounded = limited * 2U + 0x00800080U;
  const std::uint32_t with_signs = (halves & 0x80008000U) | rounded;
  return ((with_signs >> 8) & 0xffU) | ((with_signs >> 16) & 0xff00U);
}

TEST(E4B15, EveryHalfBecomesTritonsByte) {
  testing::Random random(13);
  int differing = 0;
  for (std::uint32_t code = 0; code < 0x10000U; ++code) {
    const auto other = static_cast<std::uint32_t>(random.below(0x10000));
    const std::uint32_t triton = triton_e4b15_pair(code | (other << 16));
    ASSERT_EQ(triton_e4b15_pair(other | (code << 16)), (triton >> 8) | ((triton & 0xffU) << 8)) << code;
    const std::uint32_t quire = E4B15::encode(half_to_float(static_cast<std::uint16_t>(code)));
    if (quire != (triton & 0xffU) && ++differing <= 5) {
      ADD_FAILURE() << std::hex << "half " << code << " is " << quire << ", Triton's byte " << (triton & 0xffU);
    }
  }
  EXPECT_EQ(differing, 0);
}

// Triton has no conversion from bfloat16; quire takes that through fp32, exactly.
TEST(E4B15, FloatsBecomeTritonsByteByWayOfHalvesTowardZero) {
  std::vector<float> inputs;
  for (std::uint32_t code = 0; code < 0x10000U; ++code) {
    inputs.push_back(bfloat16_to_float(static_cast<std::uint16_t>(code)));
    const float half = half_to_float(static_cast<std::uint16_t>(code));
    for (float toward : {0.0F, std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()}) {
      inputs.push_back(std::nextafter(half, toward));
    }
  }
  testing::Random random(17);
  for (int i = 0; i < 1000000; ++i) {
    inputs.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(random.bits())));
    inputs.push_back(static_cast<float>(random.normal() * std::exp2(random.uniform(-20, 2))));
  }
  for (float x : inputs) {
    ASSERT_EQ(E4B15::encode(x), triton_e4b15_pair(half_toward_zero(x)) & 0xffU) << std::hexfloat << x;
  }
}

// e4b15 has neither: both become the largest value that is written, with their sign.
TEST(E4B15, NaNsAndInfinitiesBecome1_75) {
  const float infinity = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const auto& [x, value] : {std::pair{infinity, 1.75F},
                                 {-infinity, -1.75F},
                                 {nan, 1.75F},
                                 {std::copysign(nan, -1.0F), -1.75F},
                                 {1.76F, 1.75F},
                                 {-3e38F, -1.75F}}) {
    EXPECT_EQ(E4B15::decode(E4B15::encode(x)), value) << x;
  }
  EXPECT_EQ(E4B15::decode(0x7f), 1.875F);  // read as it stands, though nobody writes it
}

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
