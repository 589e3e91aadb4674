// The two guest formats of tests/format/guests, in a build that has them (QUIRE_EXTRA_MODES), with a centre: the tests
// over the table of modes give none, and cover everything else about the guests.
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "reference/attention.h"
#include "support/attention_case.h"
#include "support/modes.h"
#include "support/tested_ops.h"

namespace quire::testing {
namespace {

using Options = AttentionCase::Options;

const std::vector<std::string> kGuestModes = {"guest_int6",
                                              "guest_pair5",
                                              "k=guest_pair5,v=guest_int6",
                                              "k=guest_int6,v=guest_pair5",
                                              "k=guest_pair5,v=int4_per_token_head",
                                              "k=turboquant_k4,v=guest_pair5"};

class Guests : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    if (!parse_kv_cache_dtype(GetParam()).ok()) GTEST_SKIP() << "a build without QUIRE_EXTRA_MODES";
  }
  Options options() const {
    Options options;
    options.mode = GetParam();
    options.dtype = DType::kBFloat16;
    options.centre = true;
    return options;
  }
};

// q . centre is added to everything else that meets a logit.
TEST_P(Guests, ACentreIsPartOfEveryKey) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    Options base = options();
    base.dtype = dtype;
    EXPECT_TRUE(AttentionCase(base).check());
    Options with = base;
    with.sinks = true;
    EXPECT_TRUE(AttentionCase(with).check()) << "sinks";
    with = base;
    with.softcap = 5.0F;
    with.alibi = true;
    EXPECT_TRUE(AttentionCase(with).check()) << "softcap and ALiBi";
    with = base;
    with.window = 11;
    EXPECT_TRUE(AttentionCase(with).check()) << "window";
    with = base;
    with.k_scale = with.v_scale = ScaleShape::kPerHead;
    EXPECT_TRUE(AttentionCase(with).check()) << "scales";
    EXPECT_TRUE(AttentionCase(base).check(3)) << "splits";
  }
}

TEST_P(Guests, ACentreAtOtherSizes) {
  for (const int head_size : {32, 80, 96, 128, 256}) {
    for (const int block_size : {1, 8, 16, 48}) {
      Options at = options();
      at.head_size = at.head_size_v = head_size;
      at.block_size = block_size;
      at.sequences = {{1, 53}, {40, 70}};
      EXPECT_TRUE(AttentionCase(at).check()) << head_size << " " << block_size;
    }
  }
}

// Without a centre the guests are formats like any other, and tensor cores serve them too.
TEST_P(Guests, WithoutACentre) {
  for (const int head_size : {64, 128, 256}) {
    Options at = options();
    at.centre = false;
    at.head_size = at.head_size_v = head_size;
    at.sequences = {{1, 300}, {40, 170}, {3, 20}};
    EXPECT_TRUE(AttentionCase(at).check()) << head_size;
  }
}

TEST_P(Guests, StoredAsByTheReference) {
  for (const bool centre : {false, true}) {
    for (const int head_size : {32, 64, 80, 128, 512}) {
      PagedCache::Options cache_options;
      cache_options.mode = GetParam();
      cache_options.head_size = head_size;
      cache_options.centre = centre;
      const PagedCache expected(cache_options), got(cache_options);
      Random random(3);
      OwnedTensor key(DType::kBFloat16, {40, 2, head_size}), value(DType::kBFloat16, {40, 2, head_size});
      std::vector<float> rows = random.normals(key.view.numel());
      rows[5] = std::numeric_limits<float>::infinity();
      key.fill(rows);
      value.fill(random.normals(value.view.numel()));
      std::vector<std::int64_t> slots;
      for (int i = 0; i < 40; ++i) slots.push_back(3 * i % 128);
      OwnedTensor slot_mapping(DType::kInt64, {40});
      slot_mapping.fill_integers(slots);
      ReshapeAndCacheArgs args;
      args.key = key.view;
      args.value = value.view;
      args.slot_mapping = slot_mapping.view;
      expected.apply(args);
      ASSERT_TRUE(reference::reshape_and_cache(args).ok());
      got.apply(args);
      const Status status = ops.store(args);
      ASSERT_TRUE(status.ok()) << status.message();
      EXPECT_TRUE(got.bytes() == expected.bytes()) << head_size << (centre ? " with" : " without") << " a centre";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Modes, Guests, ::testing::ValuesIn(kGuestModes),
                         [](const auto& param) { return test_name(param.param); });

// The bytes are as the header says: 5 bits a pair and 2 bytes a row, and 6 bits and a scale.
TEST(GuestFormats, Sizes) {
  if (!parse_kv_cache_dtype("guest_pair5").ok()) GTEST_SKIP() << "a build without QUIRE_EXTRA_MODES";
  EXPECT_EQ(format::format_info(format::find_format("guest_pair5")).row_bytes(128), 42);
  EXPECT_EQ(format::format_info(format::find_format("guest_int6")).row_bytes(128), 96);
}

// A format without a centre does not take one.
TEST(Centre, RefusedWhereThereIsNone) {
  QUIRE_NEEDS_MODES("int4_per_token_head");
  AttentionCase problem(Options{});
  OwnedTensor vector(DType::kFloat32, {2, 64});
  UnifiedAttentionArgs args = problem.args;
  args.cache.k_head_vector = vector.view;
  EXPECT_EQ(unified_attention(args, nullptr).message(),
            "k_head_vector is given, but rows of format int4_per_token_head have no vector per head; leave it out");
  args = problem.args;
  args.cache.v_page_meta = vector.view;
  EXPECT_EQ(unified_attention(args, nullptr).message(),
            "v_page_meta is given, but rows of format int4_per_token_head have no metadata per page; leave it out");
}

}  // namespace
}  // namespace quire::testing
