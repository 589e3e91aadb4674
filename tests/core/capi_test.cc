// The C ABI gives the bits and the sentences of the C++ ops, and takes structs of other sizes than the library's.
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "quire/quire_c.h"
#include "support/attention_case.h"
#include "support/modes.h"

namespace quire::testing {
namespace {

quire_tensor c_tensor(const ConstTensor& tensor) {
  quire_tensor c = quire_no_tensor();
  c.data = const_cast<void*>(tensor.data);
  c.dtype = static_cast<std::int32_t>(tensor.dtype);
  c.ndim = tensor.ndim;
  c.device = {static_cast<std::int32_t>(tensor.device.type), tensor.device.index};
  std::copy_n(tensor.shape, QUIRE_MAX_DIMS, c.shape);
  std::copy_n(tensor.strides, QUIRE_MAX_DIMS, c.strides);
  return c;
}

// The calls of a case, through C.
struct CCalls {
  explicit CCalls(const AttentionCase& problem) {
    const UnifiedAttentionArgs& args = problem.args;
    views.key_cache = c_tensor(args.cache.key_cache);
    views.value_cache = c_tensor(args.cache.value_cache);
    views.k_scale_cache = c_tensor(args.cache.k_scale_cache);
    views.v_scale_cache = c_tensor(args.cache.v_scale_cache);
    store.mode = read.mode = static_cast<quire_mode>(args.mode);
    store.cache = read.cache = &views;
    store.key = c_tensor(problem.key.view);
    store.value = c_tensor(problem.value.view);
    store.slot_mapping = c_tensor(problem.slot_mapping.view);
    mask.sliding_window = args.mask.sliding_window;
    mask.rswa_window = args.mask.rswa_window;
    mask.rswa_prefix_lens = c_tensor(args.mask.rswa_prefix_lens);
    read.mask = &mask;
    read.query = c_tensor(args.query);
    read.out = c_tensor(args.out);
    read.lse = c_tensor(args.lse);
    read.cu_seqlens_q = c_tensor(args.cu_seqlens_q);
    read.seq_lens = c_tensor(args.seq_lens);
    read.block_table = c_tensor(args.block_table);
    read.sinks = c_tensor(args.sinks);
    read.k_descale = c_tensor(args.k_descale);
    read.softmax_scale = args.softmax_scale;
    read.softcap = args.softcap;
  }
  CCalls(const CCalls&) = delete;

  quire_kv_cache_views views = quire_kv_cache_views_default();
  quire_attention_mask mask = quire_attention_mask_default();
  quire_reshape_and_cache_args store = quire_reshape_and_cache_args_default();
  quire_attention_args read = quire_attention_args_default();
};

AttentionCase::Options with_features() {
  AttentionCase::Options options;
  options.mode = "int4_per_token_head";
  options.sequences = {{1, 1500}, {6, 41}, {9, 9}};
  options.softcap = 20.0F;
  options.sinks = true;
  options.k_scale = ScaleShape::kPerHead;
  return options;
}

TEST(CApi, GivesTheBitsOfCpp) {
  QUIRE_NEEDS_MODES("int4_per_token_head");
  for (const bool prefixes : {false, true}) {
    AttentionCase::Options options = with_features();
    (prefixes ? options.rswa_window : options.window) = 30;
    AttentionCase problem(options);
    ASSERT_TRUE(problem.store().ok());
    const auto stored = problem.cache->bytes();
    ASSERT_TRUE(problem.run().ok());
    const std::vector<std::uint8_t> out = problem.out.bytes, lse = problem.lse.bytes;

    CCalls calls(problem);
    ASSERT_EQ(quire_reshape_and_cache(&calls.store, nullptr), QUIRE_OK) << quire_last_error();
    EXPECT_EQ(problem.cache->bytes(), stored);
    std::fill(problem.out.bytes.begin(), problem.out.bytes.end(), std::uint8_t{0xFF});
    ASSERT_EQ(quire_unified_attention(&calls.read, nullptr), QUIRE_OK) << quire_last_error();
    EXPECT_EQ(problem.out.bytes, out);

    quire_attention_problem bounds = quire_attention_problem_default();
    ASSERT_EQ(quire_problem_of(&calls.read, &bounds), QUIRE_OK) << quire_last_error();
    std::size_t bytes = 1;
    std::int32_t tensor_cores = -1;
    ASSERT_EQ(quire_supports(&bounds, &tensor_cores, &bytes), QUIRE_OK) << quire_last_error();
    EXPECT_EQ(tensor_cores, 0);
    quire_plan* plan = nullptr;
    ASSERT_EQ(quire_plan_create(&bounds, &plan), QUIRE_OK) << quire_last_error();
    EXPECT_EQ(quire_plan_workspace_bytes(plan), bytes);
    EXPECT_EQ(std::string(quire_plan_describe(plan)), problem.plan()->describe());
    std::vector<std::uint8_t> workspace(bytes + 16);
    std::fill(problem.out.bytes.begin(), problem.out.bytes.end(), std::uint8_t{0xFF});
    ASSERT_EQ(quire_run_unified_attention(plan, &calls.read, workspace.data(), bytes, nullptr), QUIRE_OK)
        << quire_last_error();
    EXPECT_EQ(problem.out.bytes, out);
    EXPECT_EQ(problem.lse.bytes, lse);
    quire_plan_destroy(plan);
  }
  quire_plan_destroy(nullptr);
}

TEST(CApi, SaysTheSentencesOfCpp) {
  QUIRE_NEEDS_MODES("int4_per_token_head");
  AttentionCase problem(with_features());
  const std::vector<std::uint8_t> out = problem.out.bytes;
  const struct {
    const char* words;
    void (*spoil)(CCalls& calls);
  } cases[] = {
      {"softmax_scale is 0.000000; it is required", [](CCalls& c) { c.read.softmax_scale = 0.0F; }},
      {"mode id -1 is not a mode's", [](CCalls& c) { c.read.mode = -1; }},
      {"query is on an unknown device", [](CCalls& c) { c.read.query.device.type = 300; }},
      {"query is unknown; supported", [](CCalls& c) { c.read.query.dtype = -4; }},
      {"query has 1000 dimensions", [](CCalls& c) { c.read.query.ndim = 1000; }},
      {"cache is a null pointer", [](CCalls& c) { c.read.cache = nullptr; }},
      {"key_cache is", [](CCalls& c) { c.views.key_cache = quire_no_tensor(); }},
      {"k_channel_scales is given, but no format", [](CCalls& c) { c.views.k_channel_scales = c.views.k_scale_cache; }},
      {"args.struct_size is 0; it must be sizeof", [](CCalls& c) { c.read.struct_size = 0; }},
      {"mask.struct_size is 3", [](CCalls& c) { c.mask.struct_size = 3; }},
      {"sliding_window is 0", [](CCalls& c) { c.mask.sliding_window = 0; }},
  };
  for (const auto& entry : cases) {
    CCalls calls(problem);
    entry.spoil(calls);
    EXPECT_NE(quire_unified_attention(&calls.read, nullptr), QUIRE_OK) << entry.words;
    EXPECT_NE(std::string(quire_last_error()).find(entry.words), std::string::npos) << quire_last_error();
    EXPECT_EQ(problem.out.bytes, out) << "a refused call wrote";
  }
  CCalls calls(problem);
  EXPECT_EQ(quire_run_unified_attention(nullptr, &calls.read, nullptr, 0, nullptr), QUIRE_INVALID_ARGUMENT);
  EXPECT_STREQ(quire_last_error(), "plan is empty; take it from plan_unified_attention");
  EXPECT_EQ(quire_unified_attention(nullptr, nullptr), QUIRE_INVALID_ARGUMENT);
  quire_mode mode = 0;
  EXPECT_EQ(quire_parse_kv_cache_dtype("int5", &mode), QUIRE_NOT_FOUND);
  EXPECT_EQ(std::string(quire_last_error()), parse_kv_cache_dtype("int5").status().message());
  EXPECT_EQ(quire_mode_name(-1), nullptr);
}

// A caller's struct of another version.
TEST(CApi, StructsMayGrow) {
  QUIRE_NEEDS_MODES("int8_per_token_head");
  quire_kv_cache_spec spec = quire_kv_cache_spec_default();
  ASSERT_EQ(quire_parse_kv_cache_dtype("int8_per_token_head", &spec.mode), QUIRE_OK);
  EXPECT_STREQ(quire_mode_name(spec.mode), "int8_per_token_head");
  // An older caller's struct ends before page_alignment, which is then 1 whatever lies there.
  quire_kv_cache_spec older = spec;
  older.struct_size = offsetof(quire_kv_cache_spec, page_alignment);
  older.page_alignment = -99;
  quire_kv_cache_layout layout = quire_kv_cache_layout_default();
  ASSERT_EQ(quire_make_layout(&older, &layout), QUIRE_OK) << quire_last_error();
  EXPECT_EQ(layout.bytes_per_token, 2112);
  // A newer caller's struct must be zero where this library does not know it.
  struct {
    quire_kv_cache_spec spec;
    std::int64_t more;
  } newer = {spec, 0};
  newer.spec.struct_size = sizeof newer;
  EXPECT_EQ(quire_make_layout(&newer.spec, &layout), QUIRE_OK) << quire_last_error();
  newer.more = 1;
  EXPECT_EQ(quire_make_layout(&newer.spec, &layout), QUIRE_UNSUPPORTED);
  EXPECT_NE(std::string(quire_last_error()).find("of a newer quire"), std::string::npos) << quire_last_error();
  // An answer stops where the struct of an older caller ends.
  quire_kv_cache_layout small = quire_kv_cache_layout_default();
  small.struct_size = offsetof(quire_kv_cache_layout, bytes_per_block);
  small.bytes_per_block = -7;
  ASSERT_EQ(quire_make_layout(&spec, &small), QUIRE_OK);
  EXPECT_EQ(small.bytes_per_token, 2112);
  EXPECT_EQ(small.bytes_per_block, -7);
}

TEST(CApi, RotatesAndCounts) {
  std::vector<float> x = {1, 0, 0, 0};
  const std::int64_t shape[] = {4};
  const quire_tensor row = quire_dense_tensor(x.data(), QUIRE_FLOAT32, {QUIRE_CPU, 0}, 1, shape);
  ASSERT_EQ(quire_hadamard(&row, &row, 0, 0, nullptr), QUIRE_OK) << quire_last_error();
  EXPECT_EQ(x, (std::vector<float>{1, 1, 1, 1}));
  EXPECT_EQ(quire_hadamard(nullptr, &row, 0, 0, nullptr), QUIRE_INVALID_ARGUMENT);
  std::int32_t count = 0;
  EXPECT_EQ(quire_device_count(QUIRE_CPU, &count), QUIRE_OK);
  EXPECT_EQ(count, 1);
  EXPECT_EQ(quire_device_count(77, &count), QUIRE_INVALID_ARGUMENT);
  EXPECT_EQ(quire_version_number(), version_number());
  EXPECT_STREQ(quire_version(), version());
}

TEST(CApi, AsksABackend) {
  QUIRE_NEEDS_MODES("int4_per_token_head");
  quire_mode mode = 0;
  ASSERT_EQ(quire_parse_kv_cache_dtype("int4_per_token_head", &mode), QUIRE_OK);
  const quire_backend* backend = nullptr;
  ASSERT_EQ(quire_get_backend(mode, &backend), QUIRE_OK);
  std::int64_t bytes = 0;
  ASSERT_EQ(quire_backend_row_bytes(backend, 128, 0, &bytes), QUIRE_OK);
  EXPECT_EQ(bytes, 64);
  std::int32_t packed = 0;
  ASSERT_EQ(quire_backend_packed_head_size(backend, 128, &packed), QUIRE_OK);
  EXPECT_EQ(packed, 64);
  EXPECT_EQ(quire_backend_needs_scale_caches(backend), 1);
  EXPECT_EQ(quire_backend_row_bytes(backend, 33, 0, &bytes), QUIRE_INVALID_ARGUMENT);
  EXPECT_EQ(quire_backend_row_bytes(nullptr, 64, 0, &bytes), QUIRE_INVALID_ARGUMENT);
}

}  // namespace
}  // namespace quire::testing
