// The Lloyd-Max codebooks, solved a second time in double precision; how a value finds its centroid; and where the bits
// of a packed code are.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "format/codebook.h"
#include "format/turboquant.h"
#include "support/random.h"

namespace quire::format {
namespace {

// The ratio of the integrals of x * pdf and of pdf over a cell, by the trapezoid rule; the density needs no
// normalization.
double cell_mean(double from, double to) {
  constexpr int kSteps = 200;
  double weighted = 0.0;
  double mass = 0.0;
  for (int i = 0; i <= kSteps; ++i) {
    const double x = from + (to - from) * i / kSteps;
    const double density = std::exp(-x * x / 2) * (i == 0 || i == kSteps ? 0.5 : 1.0);
    weighted += x * density;
    mass += density;
  }
  return weighted / mass;
}

// Lloyd's iteration for a unit Gaussian, as docs/formats/turboquant.md describes it.
std::vector<double> solve(int bits) {
  constexpr double kEdge = 3.5;
  const int n = 1 << bits;
  std::vector<double> centroids;
  for (int i = 0; i < n; ++i) centroids.push_back(-kEdge + 2 * kEdge * (i + 0.5) / n);
  for (int iteration = 0; iteration < 200; ++iteration) {
    std::vector<double> edges{-3 * kEdge};
    for (std::size_t i = 0; i + 1 < centroids.size(); ++i) edges.push_back((centroids[i] + centroids[i + 1]) / 2);
    edges.push_back(3 * kEdge);
    double largest_move = 0.0;
    for (std::size_t i = 0; i < centroids.size(); ++i) {
      const double mean = cell_mean(edges[i], edges[i + 1]);
      largest_move = std::max(largest_move, std::abs(mean - centroids[i]));
      centroids[i] = mean;
    }
    if (largest_move < 1e-10) break;
  }
  return centroids;
}

// One test body for both widths.
template <int kWidth>
struct Bits {
  static constexpr int kBits = kWidth;
  static constexpr int kCodes = 1 << kWidth;
};
template <class B>
class CodebookOf : public ::testing::Test {};
using Widths = ::testing::Types<Bits<3>, Bits<4>>;
TYPED_TEST_SUITE(CodebookOf, Widths);

TYPED_TEST(CodebookOf, IsTheSolution) {
  const std::vector<double> solution = solve(TypeParam::kBits);
  for (int code = 0; code < TypeParam::kCodes; ++code) {
    const double exact = solution[static_cast<std::size_t>(code)];
    EXPECT_NEAR(centroid<TypeParam::kBits>(code), exact, 1e-6 * std::abs(exact)) << code;
  }
}

TYPED_TEST(CodebookOf, AscendsAndIsOddSymmetric) {
  constexpr int kBits = TypeParam::kBits;
  for (int code = 0; code < TypeParam::kCodes; ++code) {
    EXPECT_EQ(centroid<kBits>(code), -centroid<kBits>(TypeParam::kCodes - 1 - code));
    if (code > 0) {
      EXPECT_LT(centroid<kBits>(code - 1), centroid<kBits>(code));
    }
  }
}

TYPED_TEST(CodebookOf, EveryCentroidIsItsOwnNearest) {
  for (int code = 0; code < TypeParam::kCodes; ++code) {
    EXPECT_EQ(nearest_centroid<TypeParam::kBits>(centroid<TypeParam::kBits>(code)), static_cast<std::uint32_t>(code));
  }
}

TYPED_TEST(CodebookOf, MidpointsGoUp) {
  constexpr int kBits = TypeParam::kBits;
  for (int code = 0; code + 1 < TypeParam::kCodes; ++code) {
    const float middle = 0.5F * (centroid<kBits>(code) + centroid<kBits>(code + 1));
    const auto low = static_cast<std::uint32_t>(code);
    EXPECT_EQ(nearest_centroid<kBits>(middle), low + 1) << code;
    EXPECT_EQ(nearest_centroid<kBits>(std::nextafter(middle, -10.0F)), low) << code;
    EXPECT_EQ(nearest_centroid<kBits>(std::nextafter(middle, 10.0F)), low + 1) << code;
  }
  EXPECT_EQ(nearest_centroid<kBits>(-0.0F), static_cast<std::uint32_t>(TypeParam::kCodes / 2));
}

TYPED_TEST(CodebookOf, FarAwayAndNaN) {
  constexpr int kBits = TypeParam::kBits;
  const float infinity = std::numeric_limits<float>::infinity();
  const auto last = static_cast<std::uint32_t>(TypeParam::kCodes - 1);
  for (float x : {5.0F, 1e30F, infinity}) {
    EXPECT_EQ(nearest_centroid<kBits>(x), last);
    EXPECT_EQ(nearest_centroid<kBits>(-x), 0U);
  }
  EXPECT_EQ(nearest_centroid<kBits>(std::numeric_limits<float>::quiet_NaN()), 0U);
}

TYPED_TEST(CodebookOf, NearestIsTheNearest) {
  constexpr int kBits = TypeParam::kBits;
  testing::Random random(3);
  for (int n = 0; n < 20000; ++n) {
    const auto x = static_cast<float>(random.normal());
    const auto code = static_cast<int>(nearest_centroid<kBits>(x));
    for (int other = 0; other < TypeParam::kCodes; ++other) {
      const double mine = std::abs(static_cast<double>(x) - centroid<kBits>(code));
      // The midpoint is rounded to fp32: 2^-23 of at most 4 on either side.
      ASSERT_LE(mine, std::abs(static_cast<double>(x) - centroid<kBits>(other)) + 0x1p-20) << x;
    }
  }
}

// ---- packing -------------------------------------------------------------------------------------------------------

// Code i of a packed unit is the number in bits [bits * i, bits * (i + 1)) of the bytes read as one little-endian word.
TYPED_TEST(CodebookOf, CodesLieAtTheirBits) {
  using Packing = turboquant::Packing<TypeParam::kBits>;
  constexpr int kUnit = Packing::kUnit;
  ASSERT_EQ(kUnit * TypeParam::kBits, 8 * Packing::kUnitBytes);
  for (int i = 0; i < kUnit; ++i) {
    for (std::uint32_t code = 0; code < TypeParam::kCodes; ++code) {
      std::uint32_t codes[kUnit] = {};
      codes[i] = code;
      std::uint8_t bytes[Packing::kUnitBytes];
      Packing::pack(codes, bytes);
      std::uint32_t word = 0;
      for (int b = 0; b < Packing::kUnitBytes; ++b) word |= static_cast<std::uint32_t>(bytes[b]) << (8 * b);
      EXPECT_EQ(word, code << (TypeParam::kBits * i)) << "code " << i;
    }
  }
}

TYPED_TEST(CodebookOf, PackingIsUndone) {
  using Packing = turboquant::Packing<TypeParam::kBits>;
  testing::Random random(4);
  for (int n = 0; n < 2000; ++n) {
    std::uint32_t codes[Packing::kUnit];
    std::uint32_t again[Packing::kUnit];
    for (std::uint32_t& code : codes) code = static_cast<std::uint32_t>(random.below(TypeParam::kCodes));
    std::uint8_t bytes[Packing::kUnitBytes];
    Packing::pack(codes, bytes);
    Packing::unpack(bytes, again);
    ASSERT_TRUE(std::equal(std::begin(codes), std::end(codes), again));
  }
}

// Eight codes whose bits can be told apart lie as the drawing at the top of turboquant.h shows.
TEST(Packing3, IsTheDrawing) {
  const std::uint32_t codes[8] = {1, 2, 3, 4, 5, 6, 7, 0};
  std::uint8_t bytes[3];
  turboquant::Packing<3>::pack(codes, bytes);
  EXPECT_EQ(bytes[0], 0b11'010'001);   // c2[1:0] c1 c0
  EXPECT_EQ(bytes[1], 0b0'101'100'0);  // c5[0] c4 c3 c2[2]
  EXPECT_EQ(bytes[2], 0b000'111'11);   // c7 c6 c5[2:1]
}

TEST(SaturatedHalf, StopsAtTheLargestFinite) {
  using turboquant::saturated_half;
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(saturated_half(65504.0F), 0x7bff);
  EXPECT_EQ(saturated_half(65519.0F), 0x7bff);
  EXPECT_EQ(saturated_half(65520.0F), 0x7bff);  // rounds to infinity without the limit
  EXPECT_EQ(saturated_half(1e30F), 0x7bff);
  EXPECT_EQ(saturated_half(infinity), 0x7bff);
  EXPECT_EQ(saturated_half(-1e30F), 0xfbff);
  EXPECT_EQ(saturated_half(1.0F), 0x3c00);
  EXPECT_EQ(saturated_half(std::numeric_limits<float>::quiet_NaN()) & 0x7c00, 0x7c00);
  EXPECT_NE(saturated_half(std::numeric_limits<float>::quiet_NaN()) & 0x3ff, 0);
}

}  // namespace
}  // namespace quire::format
