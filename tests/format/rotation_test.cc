// The Walsh-Hadamard rotations against their definition: H[i][j] = (-1)^popcount(i & j) inside blocks of b, the signs
// of the first outputs of MT19937, and the golden file's signs.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "format/row.h"
#include "llm/safetensors.h"
#include "support/random.h"

namespace quire::format {
namespace {

constexpr int kHeadSizes[] = {32, 48, 64, 80, 96, 112, 128, 192, 256, 320, 512};

// Element of the block-diagonal H.
int hadamard_entry(int i, int j, int block) {
  if (i / block != j / block) return 0;
  const unsigned common = static_cast<unsigned>(i % block) & static_cast<unsigned>(j % block);
  return std::popcount(common) % 2 == 0 ? 1 : -1;
}

TEST(Rotation, BlockIsTheLargestPowerOfTwoThatDivides) {
  for (int d : kHeadSizes) {
    const int b = rotation_block(d);
    EXPECT_TRUE(std::has_single_bit(static_cast<unsigned>(b)));
    EXPECT_EQ(d % b, 0);
    EXPECT_EQ(d / b % 2, 1);
  }
  EXPECT_EQ(rotation_block(80), 16);
  EXPECT_EQ(rotation_block(96), 32);
  EXPECT_EQ(rotation_block(112), 16);
  EXPECT_EQ(rotation_block(192), 64);
}

TEST(Rotation, IsTheSylvesterMatrix) {
  for (int d : kHeadSizes) {
    const RowShape shape = row_shape(d);
    for (int j = 0; j < d; ++j) {  // column j
      std::vector<float> y(static_cast<std::size_t>(d), 0.0F);
      y[static_cast<std::size_t>(j)] = 1.0F;
      rotate(Rotation::kHadamard, y.data(), shape);
      for (int i = 0; i < d; ++i) {
        ASSERT_EQ(y[static_cast<std::size_t>(i)], hadamard_entry(i, j, shape.block)) << d << " " << i << " " << j;
      }
    }
  }
}

TEST(Rotation, TwiceIsBlockTimesIdentity) {
  testing::Random random(3);
  for (int d : kHeadSizes) {
    for (Rotation rotation : {Rotation::kHadamard, Rotation::kSignedHadamard}) {
      // Small integers: every intermediate sum is exact in fp32.
      std::vector<float> x(static_cast<std::size_t>(d));
      for (float& value : x) value = static_cast<float>(random.below(2001) - 1000);
      std::vector<float> y = x;
      rotate(rotation, y.data(), row_shape(d));
      EXPECT_NE(y, x);
      rotate_back(rotation, y.data(), row_shape(d));
      for (std::size_t i = 0; i < x.size(); ++i) ASSERT_EQ(y[i], x[i] * static_cast<float>(rotation_block(d)));
    }
  }
}

TEST(Rotation, PreservesDotProducts) {
  testing::Random random(4);
  for (int d : kHeadSizes) {
    std::vector<float> q(static_cast<std::size_t>(d)), k(static_cast<std::size_t>(d));
    double plain = 0.0;
    for (std::size_t i = 0; i < q.size(); ++i) {
      q[i] = static_cast<float>(random.below(201) - 100);
      k[i] = static_cast<float>(random.below(201) - 100);
      plain += static_cast<double>(q[i]) * k[i];
    }
    rotate(Rotation::kSignedHadamard, q.data(), row_shape(d));
    rotate(Rotation::kSignedHadamard, k.data(), row_shape(d));
    double rotated = 0.0;
    for (std::size_t i = 0; i < q.size(); ++i) rotated += static_cast<double>(q[i]) * k[i];
    EXPECT_EQ(rotated, plain * rotation_block(d)) << d;
  }
}

TEST(Rotation, SignsComeFromTheMersenneTwister) {
  std::mt19937 twister(0x9E3779B9U);
  for (int i = 0; i < kMaxHeadSize; ++i) {
    const bool negative = (twister() & 0xFFFFFFU) >= 0x800000U;
    const std::uint32_t word = rht_sign_word(i / 32, kMaxHeadSize);
    ASSERT_EQ(((word >> (i % 32)) & 1U) != 0, negative) << i;
    ASSERT_EQ(apply_sign(2.0F, word, i % 32), negative ? -2.0F : 2.0F) << i;
    ASSERT_EQ(kRhtSignMasks[static_cast<std::size_t>(i)], negative ? 0x80000000U : 0U) << i;
  }
}

// A head size of several blocks has the signs of its first block in each.
TEST(Rotation, SignsRepeatInEveryBlock) {
  for (int d : {32, 34, 36, 40, 48, 80, 96, 112, 128, 160, 192, 320, 384, 512}) {
    const RowShape shape = row_shape(d);
    std::mt19937 twister(0x9E3779B9U);
    std::vector<float> signs;
    for (int i = 0; i < shape.block; ++i) signs.push_back((twister() & 0xFFFFFFU) >= 0x800000U ? -1.0F : 1.0F);
    std::vector<float> ones(static_cast<std::size_t>(d), 1.0F);
    flip_signs(ones.data(), shape);
    for (int i = 0; i < d; ++i) {
      const float expected = signs[static_cast<std::size_t>(i % shape.block)];
      ASSERT_EQ(ones[static_cast<std::size_t>(i)], expected) << d << " " << i;
      ASSERT_EQ(apply_sign(1.0F, rht_sign_word(i / 32, shape.block), i % 32), expected) << d << " " << i;
    }
  }
}

TEST(Rotation, SignsAreThoseOfTheGoldenFile) {
  const auto file = llm::SafetensorsFile::open(QUIRE_SOURCE_DIR "/tests/golden/write.safetensors.gz");
  ASSERT_TRUE(file.ok()) << file.status().message();
  for (int d : {32, 64, 128, 256, 512}) {
    const Result<Tensor> signs = file->tensor("rht_signs/" + std::to_string(d) + "/signs");
    ASSERT_TRUE(signs.ok()) << signs.status().message();
    ASSERT_EQ(signs->shape[0], d);
    std::vector<float> ones(static_cast<std::size_t>(d), 1.0F);
    flip_signs(ones.data(), row_shape(d));
    for (int i = 0; i < d; ++i) ASSERT_EQ(ones[static_cast<std::size_t>(i)], signs->ptr<const float>()[i]) << i;
  }
}

}  // namespace
}  // namespace quire::format
