// Stores on the GPU are compared with the CPU's byte by byte, gaps and pages that are not written included.
#include <algorithm>
#include <cstring>
#include <limits>
#include <set>

#include "cuda/device_problem.h"
#include "format/float_types.h"
#include "support/modes.h"
#include "support/owned_tensor.h"
#include "support/paged_cache.h"
#include "support/random.h"

namespace quire::testing {
namespace {

struct HeadSizes {
  int k, v;
};

// The head sizes reach every map of a row over lanes: 8 and 16 elements a lane, 8, 16 and 32 lanes, partly filled lanes
// and block-diagonal rotations.
constexpr HeadSizes kHeadSizes[] = {{32, 32},   {36, 36},   {64, 64},   {72, 72},   {80, 80},   {96, 96},  {100, 100},
                                    {112, 112}, {128, 128}, {192, 128}, {192, 192}, {256, 256}, {64, 320}, {512, 512}};

constexpr DType kInputs[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

// Rows that break arithmetic, one per token; the rest are Gaussian.
std::vector<float> hostile_rows(Random& random, std::int64_t tokens, std::int64_t heads, int head_size) {
  std::vector<float> values = random.normals(tokens * heads * head_size);
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t h = 0; h < heads; ++h) {
      float* row = values.data() + (t * heads + h) * head_size;
      const auto set_all = [&](float x) { std::fill(row, row + head_size, x); };
      const auto at = static_cast<std::size_t>(random.below(head_size));
      switch (t) {
        case 0:
          set_all(0.0F);
          break;
        case 1:
          set_all(-0.0F);
          break;
        case 2:
          set_all(0.7F);
          break;
        case 3:
          set_all(0.0F);
          row[at] = 1.0F;
          break;
        case 4:
          set_all(0.0F);
          row[at] = -3.5F;
          break;
        case 5:
          set_all(1e-30F);
          break;
        case 6:
          for (int i = 0; i < head_size; ++i) row[i] *= 1e-41F;
          break;
        case 7:
          for (int i = 0; i < head_size; ++i) row[i] = i % 2 == 0 ? 65504.0F : -65504.0F;
          break;
        case 8:
          row[at] = nan;
          break;
        case 9:
          row[at] = -nan;
          break;
        case 10:
          row[at] = kInf;
          break;
        case 11:
          row[at] = -kInf;
          break;
        case 12:
          set_all(3e38F);
          break;
        case 13:
          for (int i = 0; i < head_size; ++i) row[i] = static_cast<float>(i % 16) - 7.5F;
          break;
        case 14:
          for (int i = 0; i < head_size; ++i) row[i] = 5.0F + row[i] * 0.01F;
          break;
        case 15:
          set_all(nan);
          break;
        case 16:
          set_all(-kInf);
          break;
        default:
          break;
      }
    }
  }
  return values;
}

// Makes the same call on both devices, over caches that start alike.
void expect_same_bytes(const PagedCache::Options& options, ReshapeAndCacheArgs args) {
  const PagedCache on_cpu(options), on_gpu(options);
  on_cpu.apply(args);
  QUIRE_ASSERT_OK(reshape_and_cache(args, nullptr));
  on_gpu.apply(args);
  QUIRE_ASSERT_OK(store_on_device(args));
  for (std::size_t b = 0; b < on_cpu.bytes().size(); ++b) {
    const auto& cpu = on_cpu.bytes()[b];
    const auto& gpu = on_gpu.bytes()[b];
    for (std::size_t i = 0; i < cpu.size(); ++i) {
      ASSERT_EQ(static_cast<int>(gpu[i]), static_cast<int>(cpu[i])) << "buffer " << b << " byte " << i;
    }
  }
}

bool packing_divides(const std::string& mode, HeadSizes head) {
  KVCacheSpec spec;
  spec.mode = mode_of(mode);
  spec.head_size = head.k;
  spec.head_size_v = head.v;
  return make_layout(spec).ok();
}

// What a store is given.
struct InputOptions {
  std::vector<std::int64_t> slots;
  DType slot_dtype = DType::kInt64;
  DType key = DType::kBFloat16, value = DType::kBFloat16;
  bool hostile = false;           // rows of every kind, not Gaussian ones
  std::int64_t without_slot = 0;  // tokens past the end of slot_mapping
  std::int64_t gap = 0;           // elements after each row
  std::uint64_t seed = 7;
};
struct Inputs {
  Inputs(const PagedCache::Options& cache, const InputOptions& options) {
    const auto num_slots = static_cast<std::int64_t>(options.slots.size());
    const std::int64_t tokens = num_slots + options.without_slot;
    const std::int64_t heads = cache.num_kv_heads;
    Random random(options.seed);
    const auto rows = [&](DType dtype, int head_size) {
      OwnedTensor tensor(dtype, {tokens, heads, head_size}, options.gap);
      tensor.fill(options.hostile ? hostile_rows(random, tokens, heads, head_size)
                                  : random.normals(tokens * heads * head_size));
      return tensor;
    };
    key = rows(options.key, cache.head_size);
    value = rows(options.value, cache.head_size_v == 0 ? cache.head_size : cache.head_size_v);
    slot_mapping = OwnedTensor(options.slot_dtype, {num_slots});
    slot_mapping.fill_integers(options.slots);
    args.key = key.view;
    args.value = value.view;
    args.slot_mapping = slot_mapping.view;
  }

  OwnedTensor key, value, slot_mapping;
  ReshapeAndCacheArgs args;  // without a cache
};

TEST(CudaStore, BytesEqualTheCpusInEveryModeHeadSizeAndInput) {
  for (const std::string& mode : table_modes()) {
    for (const HeadSizes head : kHeadSizes) {
      if (!packing_divides(mode, head)) continue;
      for (const DType dtype : kInputs) {
        SCOPED_TRACE(mode + " d" + std::to_string(head.k) + "/" + std::to_string(head.v) + " from " +
                     std::string(dtype_name(dtype)));
        PagedCache::Options options;
        options.mode = mode;
        options.head_size = head.k;
        options.head_size_v = head.v;
        options.num_kv_heads = 3;
        options.num_blocks = 4;
        const auto seed = static_cast<std::uint64_t>(head.k * 1000 + head.v);
        std::vector<std::int64_t> slots(4 * 16);
        for (std::size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<std::int64_t>(i);
        Random(seed + 1).shuffle(slots);
        slots.resize(41);
        slots[17] = -1;
        slots[40] = -7;
        Inputs inputs(options, {.slots = slots, .key = dtype, .value = dtype, .hostile = true, .seed = seed});
        OwnedTensor scale(DType::kFloat32, {3});
        scale.fill({0.37F, 1.0F, 12.5F});
        if (mode.starts_with("fp8") && mode != "fp8_per_token_head") {
          inputs.args.k_scale = inputs.args.v_scale = scale.view;
        }
        expect_same_bytes(options, inputs.args);
        if (::testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

TEST(CudaStore, BytesEqualTheCpusInEveryLayout) {
  for (const std::string& mode : table_modes()) {
    for (const Layout layout : kAllLayouts) {
      for (const std::int64_t gap : {0, 1, 8}) {  // input rows at odd distances take narrower loads
        SCOPED_TRACE(mode + " " + std::string(layout_name(layout)) + " gap " + std::to_string(gap));
        PagedCache::Options options;
        options.mode = mode;
        options.head_size = 96;
        options.head_size_v = 64;
        options.num_blocks = 3;
        options.block_size = 8;
        options.layout = layout;
        const Inputs inputs(options, {.slots = {23, 1, 2, -1, 9, 8, 22, 14, 0, 3, 4, -1, 17, 6, 5},
                                      .slot_dtype = DType::kInt32,
                                      .value = DType::kFloat16,
                                      .without_slot = 5,
                                      .gap = gap});
        expect_same_bytes(options, inputs.args);
        if (::testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

// Head size 128, the size with kernels of its own, over rows of every kind.
TEST(CudaStore, BytesOfHostileRowsEqualTheCpusInEveryLayout) {
  int n = 0;
  for (const std::string& mode : table_modes()) {
    for (const Layout layout : kAllLayouts) {
      for (const DType dtype : kInputs) {
        SCOPED_TRACE(mode + " " + std::string(layout_name(layout)) + " from " + std::string(dtype_name(dtype)));
        PagedCache::Options options;
        options.mode = mode;
        options.head_size = 128;
        options.num_blocks = 3;
        options.block_size = 16 << n++ % 3;
        options.layout = layout;
        const Inputs inputs(options, {.slots = {47, 1, 2, 30, 9, 8, 22, 14, 0, 3, 4, 31, 17, 6, 5, 33, 40, 16, -1, 7},
                                      .key = dtype,
                                      .value = dtype,
                                      .hostile = true});
        expect_same_bytes(options, inputs.args);
        if (::testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

// Tokens of one call may name the same slot, although a scheduler gives each slot once. Then each byte of the slot is
// one that one of them would have stored, and no other byte changes.
TEST(CudaStore, DuplicateSlotsHoldBytesOfTheirTokens) {
  constexpr std::int64_t kTokens = 256, kSlots = 4;
  for (const std::string& mode : table_modes()) {
    SCOPED_TRACE(mode);
    PagedCache::Options options;
    options.mode = mode;
    options.head_size = 128;
    options.num_blocks = 2;
    std::vector<std::int64_t> slots;
    for (std::int64_t t = 0; t < kTokens; ++t) slots.push_back(t / 2 % kSlots);  // neighbours share a slot
    Inputs inputs(options, {.slots = slots});
    ReshapeAndCacheArgs& args = inputs.args;
    const PagedCache on_gpu(options);
    on_gpu.apply(args);
    QUIRE_ASSERT_OK(store_on_device(args));

    // candidates[buffer][byte]: the values that the tokens of that byte's slot would have given it.
    const PagedCache untouched(options);
    std::vector<std::vector<std::set<int>>> candidates(untouched.bytes().size());
    for (std::size_t b = 0; b < candidates.size(); ++b) candidates[b].resize(untouched.bytes()[b].size());
    for (std::int64_t round = 0; round < kTokens / kSlots; ++round) {
      // A token of every slot.
      std::vector<std::int64_t> only(kTokens, -1);
      for (std::int64_t s = 0; s < kSlots; ++s) {
        const std::int64_t t = round / 2 * 2 * kSlots + 2 * s + round % 2;
        only[static_cast<std::size_t>(t)] = s;
      }
      inputs.slot_mapping.fill_integers(only);
      const PagedCache alone(options);
      alone.apply(args);
      QUIRE_ASSERT_OK(reshape_and_cache(args, nullptr));
      for (std::size_t b = 0; b < candidates.size(); ++b) {
        for (std::size_t i = 0; i < candidates[b].size(); ++i) candidates[b][i].insert(alone.bytes()[b][i]);
      }
    }
    for (std::size_t b = 0; b < candidates.size(); ++b) {
      for (std::size_t i = 0; i < candidates[b].size(); ++i) {
        ASSERT_TRUE(candidates[b][i].contains(on_gpu.bytes()[b][i])) << "buffer " << b << " byte " << i;
      }
    }
  }
}

TEST(CudaStore, AnyInputStrideGivesTheSameBytes) {
  Random random(3);
  PagedCache::Options options;
  options.num_kv_heads = 2;
  // K is [d, tokens, heads] seen as [tokens, heads, d], and V has its heads reversed.
  OwnedTensor key(DType::kFloat32, {64, 9, 2}), value(DType::kFloat32, {9, 2, 64});
  key.fill(random.normals(key.view.numel()));
  value.fill(random.normals(value.view.numel()));
  OwnedTensor slot_mapping(DType::kInt64, {9});
  slot_mapping.fill_integers({5, 4, 3, 2, 1, 0, 16, 17, 18});
  ReshapeAndCacheArgs args;
  args.key = Tensor::strided(key.view.data, DType::kFloat32, {9, 2, 64}, {2, 1, 18});
  args.value = Tensor::strided(value.view.ptr<float>() + 64, DType::kFloat32, {9, 2, 64}, {128, -64, 1});
  args.slot_mapping = slot_mapping.view;
  expect_same_bytes(options, args);
}

TEST(CudaStore, HeadMajorLayout) {
  for (const char* mode : {"auto", "float32", "fp8", "fp8_e5m2"}) {
    if (!modes_built({mode})) continue;
    SCOPED_TRACE(mode);
    const DType dtype = std::string(mode) == "auto"      ? DType::kBFloat16
                        : std::string(mode) == "float32" ? DType::kFloat32
                        : std::string(mode) == "fp8"     ? DType::kFloat8E4M3
                                                         : DType::kFloat8E5M2;
    const std::int64_t x = 16 / static_cast<std::int64_t>(dtype_bytes(dtype));
    PagedCache::Options rows;
    rows.head_size_v = 80;
    rows.num_kv_heads = 3;
    const Inputs inputs(rows, {.slots = {15, 0, 3, -1, 8, 9, 10, 11, 7, 31, 30}});
    OwnedTensor k_cpu(dtype, {2, 3, 64 / x, 16, x}), v_cpu(dtype, {2, 3, 80, 16});
    OwnedTensor k_gpu(dtype, {2, 3, 64 / x, 16, x}), v_gpu(dtype, {2, 3, 80, 16});
    ReshapeAndCacheArgs args = inputs.args;
    args.mode = mode_of(mode);
    args.cache.key_cache = k_cpu.view;
    args.cache.value_cache = v_cpu.view;
    QUIRE_ASSERT_OK(reshape_and_cache(args, nullptr));
    args.cache.key_cache = k_gpu.view;
    args.cache.value_cache = v_gpu.view;
    QUIRE_ASSERT_OK(store_on_device(args));
    EXPECT_EQ(k_gpu.bytes, k_cpu.bytes);
    EXPECT_EQ(v_gpu.bytes, v_cpu.bytes);
  }
}

TEST(CudaStore, Float8InputIsCopied) {
  QUIRE_NEEDS_MODES("fp8");
  PagedCache::Options options;
  options.mode = "fp8";
  options.num_kv_heads = 4;
  OwnedTensor key(DType::kFloat8E4M3, {4, 4, 64}), value(DType::kFloat8E4M3, {4, 4, 64});
  for (std::size_t i = 0; i < key.bytes.size(); ++i) {
    key.bytes[i] = static_cast<std::uint8_t>(i);  // every code, NaNs included
    value.bytes[i] = static_cast<std::uint8_t>(255 - i);
  }
  OwnedTensor slot_mapping(DType::kInt64, {4});
  slot_mapping.fill_integers({9, 2, 33, 4});
  ReshapeAndCacheArgs args;
  args.key = key.view;
  args.value = value.view;
  args.slot_mapping = slot_mapping.view;
  expect_same_bytes(options, args);
}

TEST(CudaStore, SlotsOutsideTheCacheAreSkippedAndCounted) {
  for (const std::string& mode : table_modes()) {
    SCOPED_TRACE(mode);
    PagedCache::Options options;
    options.mode = mode;
    options.num_blocks = 2;
    const PagedCache on_cpu(options), on_gpu(options);
    const Inputs good(options, {.slots = {0, -1, 31, -1, -1, 7}});
    OwnedTensor bad(DType::kInt64, {6});
    bad.fill_integers({0, 32, 31, std::int64_t{1} << 40, -1, 7});
    std::int64_t counter = 100;
    ReshapeAndCacheArgs args = good.args;
    on_cpu.apply(args);
    QUIRE_ASSERT_OK(reshape_and_cache(args, nullptr));
    args.slot_mapping = bad.view;
    args.error_counter = Tensor::contiguous(&counter, DType::kInt64, {1});
    on_gpu.apply(args);
    QUIRE_ASSERT_OK(store_on_device(args));
    EXPECT_EQ(counter, 102);
    EXPECT_EQ(on_gpu.bytes(), on_cpu.bytes());
  }
}

TEST(CudaStore, NoTokens) {
  const PagedCache::Options options;
  expect_same_bytes(options, Inputs(options, {}).args);
}

// The pages lie gigabytes apart: an offset that lost its high bits would land inside the first 4 GiB.
TEST(CudaStore, OffsetsPastFourGiB) {
  for (const std::string& mode : table_modes()) {
    SCOPED_TRACE(mode);
    PagedCache::Options options;
    options.mode = mode;
    options.num_blocks = 3;
    const PagedCache small(options);
    std::vector<std::int64_t> slots(48);
    for (std::size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<std::int64_t>(i);
    const Inputs inputs(options, {.slots = slots});
    ReshapeAndCacheArgs args = inputs.args;
    small.apply(args);
    QUIRE_ASSERT_OK(reshape_and_cache(args, nullptr));

    constexpr std::int64_t kPageDistance = (std::int64_t{9} << 28) + 4096;  // 2.25 GiB: page 2 starts past 4.5 GiB
    Tensor* const caches[] = {&args.cache.key_cache, &args.cache.value_cache, &args.cache.k_scale_cache,
                              &args.cache.v_scale_cache};
    const Tensor* const expected[] = {&small.key_cache, &small.value_cache, &small.k_scale_cache, &small.v_scale_cache};
    Result<cuda::DeviceBuffer> pool =
        cuda::DeviceBuffer::allocate(static_cast<std::size_t>(2 * kPageDistance + (1 << 20)));
    ASSERT_TRUE(pool.ok()) << pool.status().message();
    std::int64_t offset = 0;  // of each tensor in the first page
    for (Tensor* cache : caches) {
      if (!cache->defined()) continue;
      cache->data = static_cast<std::uint8_t*>(pool->data()) + offset;
      cache->device = Device::cuda();
      offset += cache->strides[0] * static_cast<std::int64_t>(dtype_bytes(cache->dtype));
      cache->strides[0] = kPageDistance / static_cast<std::int64_t>(dtype_bytes(cache->dtype));
    }
    QUIRE_ASSERT_OK(store_on_device(args));
    for (int c = 0; c < 4; ++c) {
      if (!expected[c]->defined()) continue;
      const std::int64_t page_bytes =
          expected[c]->strides[0] * static_cast<std::int64_t>(dtype_bytes(expected[c]->dtype));
      const std::int64_t at = static_cast<std::uint8_t*>(caches[c]->data) - static_cast<std::uint8_t*>(pool->data());
      for (std::int64_t page = 0; page < 3; ++page) {
        std::vector<std::uint8_t> got(static_cast<std::size_t>(page_bytes));
        QUIRE_ASSERT_OK(pool->copy_out(got.data(), got.size(), static_cast<std::size_t>(at + page * kPageDistance)));
        EXPECT_EQ(std::memcmp(got.data(), expected[c]->ptr<std::uint8_t>() + page * page_bytes, got.size()), 0)
            << "tensor " << c << " page " << page;
      }
    }
  }
}

}  // namespace
}  // namespace quire::testing
