// Decode and verification over numbers of KV heads, group sizes, query lengths, block sizes and head sizes. Each value
// has its own place in decode_pages (parts and groups of warps, columns of the products, runs of a page) or goes to
// another kernel.
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/device_problem.h"
#include "support/attention_case.h"
#include "support/modes.h"

namespace quire::testing {
namespace {

using Options = AttentionCase::Options;

struct Shape {
  int num_kv_heads, group, query_len, block_size, head_size;
  Layout layout;
};
constexpr Shape kShapes[] = {
    {1, 1, 1, 16, 128, Layout::kNhd},          {1, 16, 1, 32, 128, Layout::kHnd},
    {2, 4, 1, 16, 128, Layout::kHnd},          {2, 4, 3, 64, 128, Layout::kHnd},
    {3, 5, 1, 16, 128, Layout::kPackedInline}, {4, 8, 1, 16, 128, Layout::kPackedInlineNhd},
    {4, 2, 8, 32, 128, Layout::kNhd},          {5, 3, 1, 48, 128, Layout::kPaddedPages},
    {7, 1, 2, 16, 128, Layout::kLayerPages},   {8, 4, 4, 16, 128, Layout::kNhd},
    {8, 4, 8, 64, 128, Layout::kHnd},          {10, 1, 1, 32, 128, Layout::kNhd},
    {11, 2, 1, 16, 128, Layout::kHnd},         {16, 2, 1, 16, 128, Layout::kNhd},
    {16, 1, 4, 64, 128, Layout::kHnd},         {2, 3, 1, 24, 128, Layout::kNhd},  // no multiple of 16
    {8, 1, 1, 16, 64, Layout::kHnd},           {8, 5, 1, 32, 64, Layout::kNhd},
    {2, 16, 2, 16, 64, Layout::kHnd},          {4, 4, 1, 16, 80, Layout::kHnd},
    {4, 4, 2, 16, 96, Layout::kNhd},           {2, 8, 1, 16, 112, Layout::kPackedInline},
    {4, 4, 1, 16, 192, Layout::kHnd},          {4, 2, 1, 16, 256, Layout::kNhd},
    {2, 8, 2, 32, 256, Layout::kHnd},          {8, 1, 1, 16, 256, Layout::kHnd},
};

class CudaDecode : public ::testing::TestWithParam<std::string> {};

TEST_P(CudaDecode, HeadsRowsBlocksAndLayouts) {
  std::uint64_t seed = 100;
  for (const Shape& shape : kShapes) {
    Options options;
    options.mode = GetParam();
    if (!packs(options.mode, shape.head_size)) continue;
    options.num_kv_heads = shape.num_kv_heads;
    options.group = shape.group;
    options.block_size = shape.block_size;
    options.head_size = shape.head_size;
    options.layout = shape.layout;
    const int q = shape.query_len;
    // From nothing but the new tokens to many runs of slices, whole and partly filled ones, and an empty sequence.
    options.sequences = {{q, 333}, {q, q}, {0, 40}, {q, 64}, {q, 17 + q}, {1, 1}};
    options.dtype = DType::kBFloat16;
    options.seed = ++seed;
    AttentionCase problem(options);
    EXPECT_TRUE(problem.check());
    options.softcap = 15.0F;
    options.sinks = options.alibi = options.qq_bias = true;
    options.window = 50;
    AttentionCase biased(options);
    EXPECT_TRUE(biased.check(0, true));
  }
}

INSTANTIATE_TEST_SUITE_P(Modes, CudaDecode, ::testing::ValuesIn(table_modes()),
                         [](const auto& param) { return test_name(param.param); });

// The list of all slices is cut into long runs, runs that cross many sequences, and many runs of one sequence.
TEST(CudaDecodePages, RunsOfManySequences) {
  for (const char* mode : {"bfloat16", "int4_per_token_head", "turboquant_3bit_nc"}) {
    if (!modes_built({mode})) continue;
    Options options;
    options.mode = mode;
    options.head_size = 128;
    options.num_kv_heads = 2;
    options.dtype = DType::kBFloat16;
    options.sequences.clear();
    for (int b = 0; b < 70; ++b) options.sequences.push_back({1, 1 + 37 * b % 301});
    options.sequences.push_back({1, 9000});
    AttentionCase problem(options);
    EXPECT_TRUE(problem.check());
    EXPECT_TRUE(problem.check(0, true));
  }
}

}  // namespace
}  // namespace quire::testing
