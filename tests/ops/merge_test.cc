// merge_attn_states against its equation in double precision.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "support/owned_tensor.h"
#include "support/random.h"
#include "support/tested_ops.h"

namespace quire::testing {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr std::int64_t kTokens = 7, kHeads = 3;

struct Parts {
  explicit Parts(DType dtype, int head_size)
      : prefix(dtype, {kTokens, kHeads, head_size}, 5),
        suffix(dtype, {kTokens, kHeads, head_size}, 8),
        out(dtype, {kTokens, kHeads, head_size}, 3),
        prefix_lse(DType::kFloat32, {kTokens, kHeads}, 1),
        suffix_lse(DType::kFloat32, {kTokens, kHeads}, 2),
        lse(DType::kFloat32, {kTokens, kHeads}, 4) {
    Random random(1);
    prefix.fill(random.normals(prefix.view.numel()));
    suffix.fill(random.normals(suffix.view.numel()));
    std::vector<float> a, b;
    for (std::int64_t n = 0; n < kTokens * kHeads; ++n) {
      a.push_back(static_cast<float>(random.uniform(-4, 4)));
      b.push_back(static_cast<float>(random.uniform(-4, 4)));
    }
    // One part is empty, the other, or both; the parts are far apart in both directions; the LSEs are very large and
    // very small.
    a[0] = b[1] = a[2] = b[2] = -kInfinity;
    a[3] = 90.0F;
    b[3] = -90.0F;
    a[4] = -1e5F;
    b[4] = -1e5F + 1.0F;
    a[5] = b[5] = 1e5F;
    prefix_lse.fill(a);
    suffix_lse.fill(b);
  }

  MergeAttnStatesArgs args() const {
    return {.out = out.view,
            .lse = lse.view,
            .prefix_out = prefix.view,
            .prefix_lse = prefix_lse.view,
            .suffix_out = suffix.view,
            .suffix_lse = suffix_lse.view};
  }

  OwnedTensor prefix, suffix, out, prefix_lse, suffix_lse, lse;
};

TEST(Merge, IsTheWeightedSum) {
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (int head_size : {32, 80, 512, 640}) {
      Parts parts(dtype, head_size);
      ASSERT_TRUE(ops.merge(parts.args()).ok());
      // Two products, one sum and a division in fp32, then half an ulp of the output.
      const double u = dtype == DType::kFloat32 ? 0x1p-24 : dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
      for (std::int64_t t = 0; t < kTokens; ++t) {
        for (std::int64_t h = 0; h < kHeads; ++h) {
          const double a = parts.prefix_lse.get(t, h);
          const double b = parts.suffix_lse.get(t, h);
          const double max = std::max(a, b);
          const bool empty = std::isinf(max);
          const double lse = empty ? -kInfinity : max + std::log(std::exp(a - max) + std::exp(b - max));
          const double got = parts.lse.get(t, h);
          if (empty) {
            EXPECT_EQ(got, -kInfinity);
          } else {
            EXPECT_NEAR(got, lse, 4 * 0x1p-24 * std::max(1.0, std::abs(lse)));
          }
          for (int i = 0; i < head_size; ++i) {
            const double x = parts.prefix.get(t, h, i);
            const double y = parts.suffix.get(t, h, i);
            const double wa = empty ? 0.0 : std::exp(a - lse);
            const double wb = empty ? 0.0 : std::exp(b - lse);
            const double expected = wa * x + wb * y;
            ASSERT_NEAR(parts.out.get(t, h, i), expected,
                        8 * 0x1p-24 * (wa * std::abs(x) + wb * std::abs(y)) + u * std::abs(expected) + 0x1p-25)
                << dtype_name(dtype) << " row " << t << ", " << h;
          }
        }
      }
    }
  }
}

// An empty part is left out and not multiplied by zero, since its memory may never have been written.
TEST(Merge, AnEmptyPartMayHoldAnything) {
  Parts parts(DType::kFloat32, 64);
  const float expected_other = parts.suffix.get(0, 0, 0);
  for (int i = 0; i < 64; ++i) {
    parts.prefix.view.ptr<float>()[i] = kNaN;                                      // row (0, 0): prefix empty
    parts.suffix.view.ptr<float>()[parts.suffix.view.strides[1] + i] = kInfinity;  // row (0, 1): suffix empty
    parts.prefix.view.ptr<float>()[2 * parts.prefix.view.strides[1] + i] = kNaN;   // row (0, 2): both
  }
  ASSERT_TRUE(ops.merge(parts.args()).ok());
  EXPECT_EQ(parts.out.get(0, 0, 0), expected_other);
  EXPECT_EQ(parts.out.get(0, 1, 7), parts.prefix.get(0, 1, 7));
  EXPECT_EQ(parts.lse.get(0, 0), parts.suffix_lse.get(0, 0));
  EXPECT_EQ(parts.lse.get(0, 1), parts.prefix_lse.get(0, 1));
  for (int i = 0; i < 64; ++i) EXPECT_EQ(parts.out.get(0, 2, i), 0.0F);
}

// A part that saw a poisoned row has a NaN LSE, and then so has the whole, also beside an empty part.
TEST(Merge, NaNStaysVisible) {
  for (float other : {1.0F, -kInfinity}) {
    for (bool in_prefix : {true, false}) {
      Parts parts(DType::kFloat32, 64);
      (in_prefix ? parts.prefix_lse : parts.suffix_lse).view.ptr<float>()[0] = kNaN;
      (in_prefix ? parts.suffix_lse : parts.prefix_lse).view.ptr<float>()[0] = other;
      ASSERT_TRUE(ops.merge(parts.args()).ok());
      EXPECT_TRUE(std::isnan(parts.lse.get(0, 0))) << other << (in_prefix ? " prefix" : " suffix");
      EXPECT_TRUE(std::isnan(parts.out.get(0, 0, 3))) << other << (in_prefix ? " prefix" : " suffix");
    }
  }
}

TEST(Merge, OutMayAliasAPart) {
  Parts apart(DType::kFloat32, 64);
  ASSERT_TRUE(ops.merge(apart.args()).ok());
  for (bool in_prefix : {true, false}) {
    Parts parts(DType::kFloat32, 64);
    MergeAttnStatesArgs args = parts.args();
    args.out = in_prefix ? parts.prefix.view : parts.suffix.view;
    args.lse = in_prefix ? parts.prefix_lse.view : parts.suffix_lse.view;
    ASSERT_TRUE(ops.merge(args).ok());
    const OwnedTensor& out = in_prefix ? parts.prefix : parts.suffix;
    for (std::int64_t t = 0; t < kTokens; ++t) {
      for (std::int64_t h = 0; h < kHeads; ++h) {
        for (int i = 0; i < 64; ++i) ASSERT_EQ(out.get(t, h, i), apart.out.get(t, h, i));
      }
    }
  }
}

TEST(Merge, WithoutLse) {
  Parts parts(DType::kFloat32, 64);
  MergeAttnStatesArgs args = parts.args();
  args.lse = Tensor();
  ASSERT_TRUE(ops.merge(args).ok());
  for (std::uint8_t byte : parts.lse.bytes) ASSERT_EQ(byte, 0xFF);
}

TEST(Merge, NoTokens) {
  OwnedTensor none(DType::kFloat32, {0, kHeads, 64}), lse(DType::kFloat32, {0, kHeads});
  EXPECT_TRUE(ops.merge({.out = none.view,
                         .lse = lse.view,
                         .prefix_out = none.view,
                         .prefix_lse = lse.view,
                         .suffix_out = none.view,
                         .suffix_lse = lse.view})
                  .ok());
}

}  // namespace
}  // namespace quire::testing
