// KVCacheSpec to KVCacheLayout to views. The numbers are compared with vLLM's rules, written out here, and the bytes
// with a map of their owners: no two rows or scales overlap, nothing lies outside of the buffers, and unpadded buffers
// are fully used.
#include <gtest/gtest.h>

#include <limits>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "support/attention_case.h"
#include "support/modes.h"

namespace quire::testing {
namespace {

struct Cost {
  const char* mode;
  double bytes_per_element;
  int scale_bytes;
};
constexpr Cost kCosts[] = {
    {"auto", 2, 0},
    {"bfloat16", 2, 0},
    {"float16", 2, 0},
    {"float32", 4, 0},
    {"fp8", 1, 0},
    {"fp8_e5m2", 1, 0},
    {"int8_per_token_head", 1, 4},
    {"fp8_per_token_head", 1, 4},
    {"int4_per_token_head", 0.5, 4},
    {"int2_per_token_head", 0.25, 4},
};

struct Heads {
  int k, v;
};
constexpr Heads kHeads[] = {{64, 64},   {80, 80},   {96, 96},   {112, 112}, {128, 128},
                            {192, 192}, {256, 256}, {512, 512}, {192, 128}};

KVCacheLayout layout_of(const KVCacheSpec& spec) {
  const Result<KVCacheLayout> layout = make_layout(spec);
  EXPECT_TRUE(layout.ok()) << layout.status().message();
  return *layout;
}

TEST(Layout, BytesPerTokenOfEveryModeAndHeadSize) {
  for (const Cost& cost : kCosts) {
    for (const Heads& heads : kHeads) {
      SCOPED_TRACE(std::string(cost.mode) + " " + std::to_string(heads.k) + "/" + std::to_string(heads.v));
      KVCacheSpec spec;
      spec.mode = mode_of(cost.mode);
      spec.head_size = heads.k;
      spec.head_size_v = heads.v;
      spec.num_kv_heads = 8;
      spec.num_layers = 3;
      spec.block_size = 16;
      const KVCacheLayout layout = layout_of(spec);
      const auto k = static_cast<std::int64_t>(heads.k * cost.bytes_per_element);
      const auto v = static_cast<std::int64_t>(heads.v * cost.bytes_per_element);
      EXPECT_EQ(layout.k_data_bytes, k);
      EXPECT_EQ(layout.v_data_bytes, v);
      EXPECT_EQ(layout.k_scale_bytes, cost.scale_bytes);
      EXPECT_EQ(layout.v_scale_bytes, cost.scale_bytes);
      EXPECT_EQ(layout.bytes_per_token_head, k + v + 2 * cost.scale_bytes);
      EXPECT_EQ(layout.bytes_per_token, layout.bytes_per_token_head * 8 * 3);
      EXPECT_EQ(layout.bytes_per_block, layout.bytes_per_token_head * 8 * 16);
      EXPECT_EQ(layout.tokens_per_gib, (std::int64_t{1} << 30) / (layout.bytes_per_block * 3) * 16);
      const auto element = static_cast<std::int64_t>(dtype_bytes(layout.key_cache_dtype));
      EXPECT_EQ(layout.effective_head_size, k / element);
      EXPECT_EQ(layout.effective_head_size_v, v / element);
      EXPECT_EQ(layout.padded_head_size, (k + cost.scale_bytes) / element);
      EXPECT_EQ(layout.padded_head_size_v, (v + cost.scale_bytes) / element);

      spec.scales = ScalePlacement::kInline;
      const KVCacheLayout inlined = layout_of(spec);
      EXPECT_EQ(inlined.bytes_per_token_head, layout.bytes_per_token_head);
      EXPECT_EQ(inlined.bytes_per_block, layout.bytes_per_block);
      EXPECT_EQ(inlined.k_row_bytes, k + cost.scale_bytes);
      EXPECT_EQ(inlined.effective_head_size, layout.effective_head_size);
    }
  }
}

TEST(Layout, KnownPages) {
  KVCacheSpec spec;  // head 128, 8 heads, blocks of 16
  spec.mode = mode_of("int4_per_token_head");
  EXPECT_EQ(layout_of(spec).bytes_per_block, 16 * 8 * 136);
  spec.mode = mode_of("int8_per_token_head");
  EXPECT_EQ(layout_of(spec).padded_head_size, 132);
  spec.mode = mode_of("auto");
  spec.model_dtype = DType::kFloat32;
  EXPECT_EQ(layout_of(spec).bytes_per_token_head, 1024);
  EXPECT_EQ(layout_of(spec).key_cache_dtype, DType::kFloat32);
  spec.page_alignment = 4096;
  spec.block_size = 3;
  EXPECT_EQ(layout_of(spec).bytes_per_block, 2 * 12288);  // K and V apart, each 3 * 8 * 512 = 12288
  spec.block_size = 1;
  spec.num_kv_heads = 1;
  EXPECT_EQ(layout_of(spec).bytes_per_block, 2 * 4096);
}

// Pull request 39074 to vLLM: effective_head_size is d, d, d / 2, d / 4, and its page formula adds the scales,
// 2 * block_size * num_kv_heads * 4 bytes, to block_size * num_kv_heads * (K + V) * element size.
// As vLLM 0.33.0's engine allocates them, int8, 2 heads of 128, blocks of 128 tokens: a tensor [blocks, 2, 128, 264]
// with strides (67584, 264, 528, 1) token-major, dense head-major; its Triton backend looks for the scale of K at byte
// 128 and for that of V at 132 + 128.
TEST(Layout, VllmsPages) {
  KVCacheSpec spec;
  spec.mode = mode_of("int8_per_token_head");
  spec.num_kv_heads = 2;
  spec.block_size = 128;
  spec.packing = KVPacking::kKVInRow;
  spec.scales = ScalePlacement::kInline;
  for (const auto& [order, slot_stride, head_stride] :
       {std::tuple{CacheOrder::kNHD, 528, 264}, std::tuple{CacheOrder::kHND, 264, 128 * 264}}) {
    spec.order = order;
    const KVCacheLayout layout = layout_of(spec);
    EXPECT_EQ(layout.bytes_per_block, 67584);
    for (const std::int64_t stride : {layout.k_block_stride, layout.v_block_stride}) EXPECT_EQ(stride, 67584);
    for (const std::int64_t stride : {layout.k_slot_stride, layout.v_slot_stride}) EXPECT_EQ(stride, slot_stride);
    for (const std::int64_t stride : {layout.k_head_stride, layout.v_head_stride}) EXPECT_EQ(stride, head_stride);
    EXPECT_EQ(layout.k_scale_offset, 128);
    EXPECT_EQ(layout.v_offset, 132);
    EXPECT_EQ(layout.v_offset + layout.v_scale_offset, 132 + 128);
  }
}

TEST(Layout, EffectiveHeadSizeGoesIntoVllmsPageFormula) {
  for (const auto& [mode, divisor] : {std::pair{"int8_per_token_head", 1},
                                      {"fp8_per_token_head", 1},
                                      {"int4_per_token_head", 2},
                                      {"int2_per_token_head", 4}}) {
    for (const Heads& heads : kHeads) {
      KVCacheSpec spec;
      spec.mode = mode_of(mode);
      spec.head_size = heads.k;
      spec.head_size_v = heads.v;
      const KVCacheLayout layout = layout_of(spec);
      EXPECT_EQ(layout.effective_head_size, heads.k / divisor) << mode;
      EXPECT_EQ(layout.effective_head_size_v, heads.v / divisor) << mode;
      EXPECT_EQ(layout.bytes_per_block,
                16 * 8 * (layout.effective_head_size + layout.effective_head_size_v) + 2 * 16 * 8 * 4);
    }
  }
}

// Buffers of a layout, and which row or scale owns each byte.
struct OwnedBytes {
  explicit OwnedBytes(const KVCacheLayout& layout, std::int64_t num_blocks) {
    const KVCacheBytes bytes = *cache_bytes(layout, num_blocks);
    const std::int64_t sizes[] = {bytes.base, bytes.v_base, bytes.k_scales, bytes.v_scales};
    for (int i = 0; i < 4; ++i) {
      buffers[i].resize(static_cast<std::size_t>(sizes[i]), 0xFF);
      owners[i].resize(static_cast<std::size_t>(sizes[i]), 0);
    }
    views = make_views(layout, num_blocks, pointer(0), pointer(1), pointer(2), pointer(3));
  }
  void* pointer(int i) { return buffers[i].empty() ? nullptr : buffers[i].data(); }

  // Claims `size` bytes for `owner`. Returns false where they are not in a buffer or are taken.
  bool claim(const void* start, std::int64_t size, int owner) {
    const auto* begin = static_cast<const std::uint8_t*>(start);
    for (int i = 0; i < 4; ++i) {
      if (buffers[i].empty() || begin < buffers[i].data() || begin >= buffers[i].data() + buffers[i].size()) continue;
      const std::int64_t at = begin - buffers[i].data();
      if (at + size > static_cast<std::int64_t>(buffers[i].size())) return false;
      for (std::int64_t n = at; n < at + size; ++n) {
        if (owners[i][static_cast<std::size_t>(n)] != 0) return false;
        owners[i][static_cast<std::size_t>(n)] = owner;
      }
      return true;
    }
    return false;
  }

  std::int64_t unowned() const {
    std::int64_t count = 0;
    for (const std::vector<int>& bytes : owners) count += std::count(bytes.begin(), bytes.end(), 0);
    return count;
  }

  std::vector<std::uint8_t> buffers[4];
  std::vector<int> owners[4];
  KVCacheViews views;
};

template <class Visit>
void for_each_spec(Visit&& visit) {
  for (const Cost& cost : kCosts) {
    for (CacheOrder order : {CacheOrder::kNHD, CacheOrder::kHND}) {
      for (KVPacking packing : {KVPacking::kSeparate, KVPacking::kKVInBlock, KVPacking::kKVInRow}) {
        for (ScalePlacement scales : {ScalePlacement::kSeparate, ScalePlacement::kInline}) {
          for (std::int64_t alignment : {1, 512}) {
            for (const Heads& heads : {Heads{64, 64}, Heads{80, 112}}) {
              KVCacheSpec spec;
              spec.mode = mode_of(cost.mode);
              spec.head_size = heads.k;
              spec.head_size_v = heads.v;
              spec.num_kv_heads = 3;
              spec.block_size = 5;
              spec.order = order;
              spec.packing = packing;
              spec.scales = scales;
              spec.page_alignment = alignment;
              SCOPED_TRACE(std::string(cost.mode) + " order " + std::to_string(static_cast<int>(order)) + " packing " +
                           std::to_string(static_cast<int>(packing)) + " scales " +
                           std::to_string(static_cast<int>(scales)) + " alignment " + std::to_string(alignment) +
                           " heads " + std::to_string(heads.k) + "/" + std::to_string(heads.v));
              visit(spec);
            }
          }
        }
      }
    }
  }
}

TEST(Layout, ViewsCoverTheirBytesWithoutOverlap) {
  for_each_spec([](const KVCacheSpec& spec) {
    const KVCacheLayout layout = layout_of(spec);
    constexpr std::int64_t kBlocks = 4;
    OwnedBytes memory(layout, kBlocks);
    const KVCacheViews& views = memory.views;
    int owner = 0;
    for (const auto& [tensor, bytes] :
         {std::pair{&views.key_cache, layout.k_data_bytes}, std::pair{&views.value_cache, layout.v_data_bytes},
          std::pair{&views.k_scale_cache, layout.k_scale_bytes},
          std::pair{&views.v_scale_cache, layout.v_scale_bytes}}) {
      ASSERT_EQ(tensor->defined(), bytes > 0);
      if (!tensor->defined()) continue;
      ASSERT_EQ(tensor->shape[0], kBlocks);
      ASSERT_EQ(tensor->shape[1], spec.block_size);
      ASSERT_EQ(tensor->shape[2], spec.num_kv_heads);
      const auto element = static_cast<std::int64_t>(dtype_bytes(tensor->dtype));
      if (tensor->ndim == 4) {
        ASSERT_EQ(tensor->shape[3] * element, bytes);
        ASSERT_EQ(tensor->strides[3], 1);
      }
      for (std::int64_t b = 0; b < kBlocks; ++b) {
        for (std::int64_t s = 0; s < spec.block_size; ++s) {
          for (std::int64_t h = 0; h < spec.num_kv_heads; ++h) {
            const std::uint8_t* row =
                tensor->ptr<std::uint8_t>() +
                (b * tensor->strides[0] + s * tensor->strides[1] + h * tensor->strides[2]) * element;
            ASSERT_EQ(reinterpret_cast<std::uintptr_t>(row) % static_cast<std::uintptr_t>(element), 0U);
            ASSERT_TRUE(memory.claim(row, bytes, ++owner)) << "block " << b << " slot " << s << " head " << h;
          }
        }
      }
    }
    const KVCacheBytes bytes = *cache_bytes(layout, kBlocks);
    EXPECT_EQ(bytes.base + bytes.v_base + bytes.k_scales + bytes.v_scales, layout.bytes_per_block * kBlocks);
    EXPECT_EQ(layout.bytes_per_token_head * spec.block_size * spec.num_kv_heads * kBlocks,
              layout.bytes_per_block * kBlocks - memory.unowned());
    if (spec.page_alignment == 1) {
      EXPECT_EQ(memory.unowned(), 0);
    }
    EXPECT_EQ(layout.k_block_stride % spec.page_alignment, 0);
    EXPECT_EQ(layout.v_block_stride % spec.page_alignment, 0);
  });
}

// In NHD a token's heads are neighbours, in HND a head's tokens.
TEST(Layout, OrderSaysWhatIsNextToWhat) {
  for_each_spec([](const KVCacheSpec& spec) {
    const KVCacheLayout layout = layout_of(spec);
    if (spec.order == CacheOrder::kNHD) {
      EXPECT_EQ(layout.k_slot_stride, spec.num_kv_heads * layout.k_head_stride);
      EXPECT_EQ(layout.v_slot_stride, spec.num_kv_heads * layout.v_head_stride);
    } else {
      EXPECT_EQ(layout.k_head_stride, spec.block_size * layout.k_slot_stride);
      EXPECT_EQ(layout.v_head_stride, spec.block_size * layout.v_slot_stride);
    }
  });
}

// Both ops through the views, padding and neighbours untouched.
TEST(Layout, OpsWorkThroughTheViews) {
  for_each_spec([](const KVCacheSpec& spec) {
    if (!(*mode_info(spec.mode))->compiled) return;
    AttentionCase::Options options;
    options.mode = (*mode_info(spec.mode))->name;
    options.head_size = spec.head_size;
    options.head_size_v = spec.head_size_v;
    options.num_kv_heads = spec.num_kv_heads;
    options.block_size = spec.block_size;
    options.sequences = {{1, 12}, {3, 9}};
    AttentionCase problem(options);
    ASSERT_TRUE(problem.run().ok());
    const std::vector<std::uint8_t> expected = problem.out.bytes;

    const std::int64_t num_blocks = problem.args.cache.key_cache.shape[0];
    const KVCacheLayout layout = layout_of(spec);
    OwnedBytes memory(layout, num_blocks);
    ReshapeAndCacheArgs store;
    store.mode = spec.mode;
    store.key = problem.key.view;
    store.value = problem.value.view;
    store.slot_mapping = problem.slot_mapping.view;
    store.cache = memory.views;
    problem.args.cache = memory.views;
    const Status status = reshape_and_cache(store, nullptr);
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_TRUE(problem.run().ok());
    ASSERT_EQ(problem.out.bytes, expected);
  });
}

TEST(Layout, RefusesWhatCannotBe) {
  const struct {
    const char* words;
    void (*spoil)(KVCacheSpec& spec);
  } cases[] = {
      {"head_size is 31", [](KVCacheSpec& s) { s.head_size = 31; }},
      {"head_size is 513", [](KVCacheSpec& s) { s.head_size = 513; }},
      {"head_size_v is 16", [](KVCacheSpec& s) { s.head_size_v = 16; }},
      {"head_size must be a multiple of 4, got 66", [](KVCacheSpec& s) { s.head_size = 66; }},
      {"head_size_v must be a multiple of 4, got 70", [](KVCacheSpec& s) { s.head_size_v = 70; }},
      {"num_kv_heads is 0", [](KVCacheSpec& s) { s.num_kv_heads = 0; }},
      {"num_layers is -1", [](KVCacheSpec& s) { s.num_layers = -1; }},
      {"block_size is 0", [](KVCacheSpec& s) { s.block_size = 0; }},
      {"page_alignment is 0", [](KVCacheSpec& s) { s.page_alignment = 0; }},
      {"mode id 999999", [](KVCacheSpec& s) { s.mode = static_cast<ModeId>(999999); }},
      {"model_dtype is int8",
       [](KVCacheSpec& s) {
         s.mode = mode_of("auto");
         s.model_dtype = DType::kInt8;
       }},
      {"order is outside its enum; supported: kNHD, kHND",
       [](KVCacheSpec& s) { s.order = static_cast<CacheOrder>(2); }},
      {"packing is outside its enum", [](KVCacheSpec& s) { s.packing = static_cast<KVPacking>(9); }},
      {"packing is outside its enum",
       [](KVCacheSpec& s) {
         s.mode = mode_of("turboquant_4bit_nc");
         s.packing = static_cast<KVPacking>(3);
       }},
      {"scales is outside its enum", [](KVCacheSpec& s) { s.scales = static_cast<ScalePlacement>(255); }},
      {"model_dtype is outside its enum", [](KVCacheSpec& s) { s.model_dtype = static_cast<DType>(77); }},
      // 36 / 4 = 9 bytes, then a scale that is not on a multiple of 4.
      {"4-byte element",
       [](KVCacheSpec& s) {
         s.head_size = 36;
         s.scales = ScalePlacement::kInline;
       }},
  };
  for (const auto& entry : cases) {
    KVCacheSpec spec;
    spec.mode = mode_of("int2_per_token_head");
    entry.spoil(spec);
    const Result<KVCacheLayout> layout = make_layout(spec);
    ASSERT_FALSE(layout.ok()) << entry.words;
    EXPECT_NE(layout.status().message().find(entry.words), std::string::npos) << layout.status().message();
  }
}

TEST(Layout, NumbersOfBlocksThatCannotBe) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  KVCacheSpec spec;
  spec.mode = mode_of("int8_per_token_head");
  const KVCacheLayout layout = layout_of(spec);  // 33792 bytes a page
  for (std::int64_t num_blocks :
       {std::int64_t{-1}, std::numeric_limits<std::int64_t>::min(), kMost, kMost / 33792 + 1}) {
    const Result<KVCacheBytes> bytes = cache_bytes(layout, num_blocks);
    ASSERT_FALSE(bytes.ok()) << num_blocks;
    EXPECT_EQ(bytes.status().message(), "num_blocks is " + std::to_string(num_blocks) + "; supported: 0 to " +
                                            std::to_string(kMost / 33792) + ", with pages of 33792 bytes");
    const KVCacheViews views = make_views(layout, num_blocks, nullptr);
    for (const Tensor& view : {views.key_cache, views.value_cache, views.k_scale_cache, views.v_scale_cache}) {
      EXPECT_FALSE(view.defined());
    }
  }
  const KVCacheBytes bytes = *cache_bytes(layout, kMost / 33792);
  EXPECT_EQ(bytes.base + bytes.v_base + bytes.k_scales + bytes.v_scales, kMost / 33792 * 33792);
  EXPECT_EQ(cache_bytes(layout, 0)->base, 0);
  EXPECT_TRUE(make_views(layout, 0, nullptr).key_cache.defined());
}

}  // namespace
}  // namespace quire::testing
