// unified_attention against the oracle: every mode x head size x query heads per KV head x block size. Features,
// layouts, dtypes and splits take turns over the grid; feature_test.cc combines them at one shape.
#include <gtest/gtest.h>

#include <iterator>
#include <string>
#include <tuple>

#include "support/attention_case.h"
#include "support/modes.h"
#include "support/paged_cache.h"

namespace quire::testing {
namespace {

struct HeadSizes {
  int k, v;
};
constexpr HeadSizes kHeadSizes[] = {{64, 64},   {80, 80},   {96, 96},   {112, 112}, {128, 128},
                                    {192, 192}, {256, 256}, {512, 512}, {192, 128}};

class Grid : public ::testing::TestWithParam<std::tuple<std::string, HeadSizes>> {};

TEST_P(Grid, MatchesTheOracle) {
  const auto& [mode, head] = GetParam();
  int n = 0;
  for (int group : {1, 4, 5, 7, 8, 16}) {
    for (int block_size : {1, 8, 16, 32, 256}) {
      ++n;
      AttentionCase::Options options;
      options.mode = mode;
      options.head_size = head.k;
      options.head_size_v = head.v;
      options.group = group;
      options.num_kv_heads = group < 5 ? 2 : 1;
      options.block_size = block_size;
      // A decode over many pages, a continued prefill that crosses a page, a fresh one.
      options.sequences = {{1, block_size < 256 ? 37 + 3 * block_size : 517}, {4, 30}, {3, 3}};
      options.layout = kAllLayouts[n % std::ssize(kAllLayouts)];
      options.dtype = n % 4 == 1 ? DType::kBFloat16 : n % 4 == 3 ? DType::kFloat16 : DType::kFloat32;
      options.window = n % 5 == 2 ? block_size + 1 : -1;
      options.softcap = n % 7 == 3 ? 20.0F : 0.0F;
      options.sinks = n % 3 == 1;
      options.alibi = n % 6 == 5;
      options.alibi_sqrt = n % 12 == 5;
      options.causal = n % 11 != 4;
      options.k_scale = static_cast<ScaleShape>(n % 4);
      options.v_scale = static_cast<ScaleShape>(n / 2 % 4);
      options.seed = static_cast<std::uint64_t>(n);
      AttentionCase problem(options);
      ASSERT_TRUE(problem.check(n % 4));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(ModesAndHeads, Grid,
                         ::testing::Combine(::testing::ValuesIn(table_modes()), ::testing::ValuesIn(kHeadSizes)),
                         [](const auto& param) {
                           const HeadSizes head = std::get<1>(param.param);
                           std::string name = test_name(std::get<0>(param.param));
                           name.append("_d").append(std::to_string(head.k));
                           if (head.v != head.k) name.append("v").append(std::to_string(head.v));
                           return name;
                         });

}  // namespace
}  // namespace quire::testing
