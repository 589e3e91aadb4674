// reshape_and_cache against the scalar store of the oracle, byte for byte over the whole memory: codes, scales, and
// everything that must not change (gaps, other layers, other slots), on every SIMD target the processor runs.
#include <gtest/gtest.h>
#include <omp.h>

#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cpu/cpu.h"
#include "format/float_types.h"
#include "reference/attention.h"
#include "support/modes.h"
#include "support/owned_tensor.h"
#include "support/paged_cache.h"
#include "support/random.h"

namespace quire::testing {
namespace {

// Restores the best target and the thread count at the end of a test.
class Store : public ::testing::TestWithParam<std::string> {
 protected:
  void TearDown() override {
    ASSERT_TRUE(cpu::use_simd_target("").ok());
    omp_set_num_threads(threads_);
  }

 private:
  int threads_ = omp_get_max_threads();
};

struct StoreInputs {
  StoreInputs(const PagedCache::Options& options, DType dtype, std::uint64_t seed)
      : key(dtype, {kTokens, options.num_kv_heads, options.head_size}, 8),
        value(dtype,
              {kTokens, options.num_kv_heads, options.head_size_v == 0 ? options.head_size : options.head_size_v}, 24),
        slots(DType::kInt64, {kTokens}) {
    Random random(seed);
    std::vector<float> k = random.normals(key.view.numel());
    std::vector<float> v = random.normals(value.view.numel());
    // The hostile rows are zeros of both signs, a constant, one-hot, tiny, large and non-finite.
    const auto row = [](std::vector<float>& x, int n, std::int64_t d) { return x.data() + n * d; };
    for (auto [x, d] : {std::pair{&k, key.view.shape[2]}, std::pair{&v, value.view.shape[2]}}) {
      std::fill_n(row(*x, 1, d), d, 0.0F);
      for (std::int64_t i = 0; i < d; i += 2) row(*x, 1, d)[i] = -0.0F;
      std::fill_n(row(*x, 2, d), d, -2.5F);
      std::fill_n(row(*x, 3, d), d, 0.0F);
      row(*x, 3, d)[d - 1] = 7.0F;
      for (std::int64_t i = 0; i < d; ++i) row(*x, 4, d)[i] *= 1e-30F;
      for (std::int64_t i = 0; i < d; ++i) row(*x, 5, d)[i] *= 1e-41F;
      for (std::int64_t i = 0; i < d; ++i) row(*x, 6, d)[i] *= 20000.0F;
      row(*x, 7, d)[d / 2] = std::numeric_limits<float>::infinity();
      row(*x, 8, d)[0] = std::numeric_limits<float>::quiet_NaN();
      row(*x, 9, d)[d - 1] = -std::numeric_limits<float>::infinity();
    }
    key.fill(k);
    value.fill(v);
    // The slots are in random order, and some are skipped: -1 first, last and in the middle, and other negative
    // numbers.
    std::vector<std::int64_t> order;
    for (std::int64_t slot = 0; slot < options.num_blocks * options.block_size; ++slot) order.push_back(slot);
    random.shuffle(order);
    order.resize(kTokens);
    order[0] = order[11] = order[kTokens - 1] = -1;
    order[12] = std::numeric_limits<std::int64_t>::min();
    slots.fill_integers(order);
  }

  void apply(ReshapeAndCacheArgs& args) const {
    args.key = key.view;
    args.value = value.view;
    args.slot_mapping = slots.view;
  }

  static constexpr std::int64_t kTokens = 24;
  OwnedTensor key, value, slots;
};

TEST_P(Store, BytesAreTheScalarStoresOnEveryTarget) {
  constexpr int kBlockSizes[] = {16, 5, 32, 64};
  int n = 0;
  for (int head_size : {32, 64, 80, 96, 112, 128, 192, 256, 512}) {
    for (Layout layout : kAllLayouts) {
      PagedCache::Options options;
      options.mode = GetParam();
      options.head_size = head_size;
      options.head_size_v = n % 3 == 0 ? 96 : 0;
      options.num_kv_heads = 1 + n % 3;
      options.block_size = kBlockSizes[n % 4];
      options.layout = layout;
      const DType dtypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
      const DType dtype = dtypes[n % 3];
      ++n;
      const StoreInputs inputs(options, dtype, static_cast<std::uint64_t>(n));
      PagedCache expected(options);
      ReshapeAndCacheArgs args;
      inputs.apply(args);
      expected.apply(args);
      ASSERT_TRUE(reference::reshape_and_cache(args).ok());
      for (const std::string& target : cpu::simd_targets()) {
        ASSERT_TRUE(cpu::use_simd_target(target).ok());
        PagedCache cache(options);
        cache.apply(args);
        const Status status = reshape_and_cache(args, nullptr);
        ASSERT_TRUE(status.ok()) << status.message();
        ASSERT_EQ(cache.bytes(), expected.bytes())
            << target << " d" << head_size << " " << layout_name(layout) << " " << dtype_name(dtype);
      }
    }
  }
}

TEST_P(Store, TargetsAreThoseOfTheProcessor) {
  EXPECT_GE(cpu::simd_targets().size(), 1U);
  const Status status = cpu::use_simd_target("SX-9");
  EXPECT_EQ(status.code(), StatusCode::kNotFound);
  EXPECT_NE(status.message().find("SX-9"), std::string::npos) << status.message();
}

TEST_P(Store, ShortInt32AndEmptySlotMappings) {
  PagedCache::Options options;
  options.mode = GetParam();
  const StoreInputs inputs(options, DType::kFloat32, 3);
  for (int used : {0, 1, 13, 24}) {
    for (DType slot_dtype : {DType::kInt32, DType::kInt64}) {
      OwnedTensor slots(slot_dtype, {used});
      std::vector<std::int64_t> ids;
      for (int i = 0; i < used; ++i) ids.push_back(i % 7 == 4 ? -1 : 5 * i);
      slots.fill_integers(ids);
      ReshapeAndCacheArgs args;
      inputs.apply(args);
      args.slot_mapping = slots.view;
      PagedCache expected(options);
      expected.apply(args);
      ASSERT_TRUE(reference::reshape_and_cache(args).ok());
      PagedCache cache(options);
      cache.apply(args);
      const Status status = reshape_and_cache(args, nullptr);
      ASSERT_TRUE(status.ok()) << status.message();
      EXPECT_EQ(cache.bytes(), expected.bytes()) << used << " " << dtype_name(slot_dtype);
    }
  }
}

// Inputs are read through their strides, the last one included: rows of every second element, and heads in the last
// place.
TEST_P(Store, InputsOfAnyStrides) {
  PagedCache::Options options;
  options.mode = GetParam();
  ReshapeAndCacheArgs args;
  const std::int64_t tokens = StoreInputs::kTokens, heads = options.num_kv_heads, d = options.head_size;
  for (DType dtype : {DType::kFloat32, DType::kFloat16}) {
    const StoreInputs source(options, dtype, 12);
    source.apply(args);
    PagedCache dense(options);
    dense.apply(args);
    ASSERT_TRUE(reference::reshape_and_cache(args).ok());
    const std::size_t size = dtype_bytes(dtype);
    // [d, 2, T, Hk] with NaN in the second plane.
    std::vector<std::uint8_t> memory(static_cast<std::size_t>(d * 2 * tokens * heads) * size, 0xFF);
    const Tensor strided = Tensor::strided(memory.data(), dtype, {tokens, heads, d}, {heads, 1, 2 * tokens * heads});
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (std::int64_t h = 0; h < heads; ++h) {
        for (std::int64_t i = 0; i < d; ++i) {
          const std::int64_t from = t * source.key.view.strides[0] + h * source.key.view.strides[1] + i;
          const std::int64_t to = t * heads + h + i * 2 * tokens * heads;
          std::memcpy(memory.data() + static_cast<std::size_t>(to) * size,
                      source.key.view.ptr<std::uint8_t>() + static_cast<std::size_t>(from) * size, size);
        }
      }
    }
    args.key = strided;
    PagedCache cache(options);
    cache.apply(args);
    const Status status = reshape_and_cache(args, nullptr);
    ASSERT_TRUE(status.ok()) << status.message();
    EXPECT_EQ(cache.bytes(), dense.bytes()) << dtype_name(dtype);
  }
}

TEST_P(Store, EverySlotSkippedWritesNothing) {
  PagedCache::Options options;
  options.mode = GetParam();
  const StoreInputs inputs(options, DType::kFloat32, 4);
  OwnedTensor slots(DType::kInt64, {StoreInputs::kTokens});
  slots.fill_integers(std::vector<std::int64_t>(StoreInputs::kTokens, -1));
  ReshapeAndCacheArgs args;
  inputs.apply(args);
  args.slot_mapping = slots.view;
  const PagedCache untouched(options);
  PagedCache cache(options);
  cache.apply(args);
  ASSERT_TRUE(reshape_and_cache(args, nullptr).ok());
  EXPECT_EQ(cache.bytes(), untouched.bytes());
}

TEST_P(Store, ThreadsDoNotChangeBytes) {
  PagedCache::Options options;
  options.mode = GetParam();
  options.num_blocks = 8;
  const StoreInputs inputs(options, DType::kFloat32, 5);
  ReshapeAndCacheArgs args;
  inputs.apply(args);
  PagedCache expected(options);
  expected.apply(args);
  ASSERT_TRUE(reference::reshape_and_cache(args).ok());
  for (int threads : {1, 2, 3, 7}) {
    omp_set_num_threads(threads);
    PagedCache cache(options);
    cache.apply(args);
    ASSERT_TRUE(reshape_and_cache(args, nullptr).ok());
    EXPECT_EQ(cache.bytes(), expected.bytes()) << threads;
  }
}

// Tokens of one call may name the same slot. The contract leaves open which one wins, but not whether a row may be
// torn. On the CPU a slot belongs to one thread, so the last token wins every time.
TEST_P(Store, DuplicateSlotsAreOneTokensRow) {
  PagedCache::Options options;
  options.mode = GetParam();
  options.num_blocks = 1;
  options.block_size = 4;
  options.num_kv_heads = 1;
  constexpr int kTokens = 400;  // long enough for the threads to meet
  OwnedTensor key(DType::kFloat32, {kTokens, 1, options.head_size});
  OwnedTensor value(DType::kFloat32, {kTokens, 1, options.head_size});
  OwnedTensor slots(DType::kInt64, {kTokens});
  Random random(6);
  key.fill(random.normals(key.view.numel()));
  value.fill(random.normals(value.view.numel()));
  std::vector<std::int64_t> ids;
  for (int t = 0; t < kTokens; ++t) ids.push_back(t / 3 % 4);  // neighbours share a slot
  slots.fill_integers(ids);
  ReshapeAndCacheArgs args;
  args.key = key.view;
  args.value = value.view;
  args.slot_mapping = slots.view;
  PagedCache expected(options);
  expected.apply(args);
  ASSERT_TRUE(reference::reshape_and_cache(args).ok());
  for (int threads : {2, 3}) {
    omp_set_num_threads(threads);
    for (int repeat = 0; repeat < 50; ++repeat) {
      PagedCache cache(options);
      cache.apply(args);
      ASSERT_TRUE(reshape_and_cache(args, nullptr).ok());
      ASSERT_EQ(cache.bytes(), expected.bytes()) << threads << " threads";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Modes, Store, ::testing::ValuesIn(table_modes()),
                         [](const auto& param) { return test_name(param.param); });

// ---- what only some modes have --------------------------------------------------------------------------------------

TEST(StoreFp8PerTensor, ScalesByHeadAndCopiesFp8) {
  for (const char* mode : {"fp8", "fp8_e5m2"}) {
    if (!modes_built({mode})) continue;
    PagedCache::Options options;
    options.mode = mode;
    options.num_kv_heads = 3;
    OwnedTensor per_head(DType::kFloat32, {3}), one(DType::kFloat32, {1});
    per_head.fill({0.5F, 0.03F, 7.3F});
    one.fill({0.37F});
    const DType fp8 = mode == std::string("fp8") ? DType::kFloat8E4M3 : DType::kFloat8E5M2;
    for (DType dtype : {DType::kFloat32, DType::kBFloat16, fp8}) {
      StoreInputs inputs(options, dtype, 8);
      if (dtype == fp8) {  // every code, NaNs included
        for (std::size_t i = 0; i < inputs.key.bytes.size(); ++i) {
          inputs.key.bytes[i] = static_cast<std::uint8_t>(i);
          inputs.value.bytes[i] = static_cast<std::uint8_t>(i * 7);
        }
      }
      for (const auto& [k_scale, v_scale] :
           {std::pair{per_head.view, one.view}, std::pair{one.view, per_head.view}, std::pair{Tensor(), Tensor()}}) {
        ReshapeAndCacheArgs args;
        inputs.apply(args);
        args.k_scale = k_scale;
        args.v_scale = v_scale;
        PagedCache expected(options), cache(options);
        expected.apply(args);
        ASSERT_TRUE(reference::reshape_and_cache(args).ok());
        cache.apply(args);
        const Status status = reshape_and_cache(args, nullptr);
        ASSERT_TRUE(status.ok()) << status.message();
        EXPECT_EQ(cache.bytes(), expected.bytes()) << mode << " " << dtype_name(dtype);
      }
    }
  }
}

// Storing a float type in itself copies every bit pattern, the payloads of NaNs included.
TEST(StoreAuto, CopiesEveryPattern) {
  for (DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    constexpr int kHeadSize = 512;
    constexpr int kTokens = 65536 / kHeadSize;
    PagedCache::Options options;
    options.mode = "auto";
    options.auto_dtype = dtype;
    options.head_size = kHeadSize;
    options.num_kv_heads = 1;
    options.num_blocks = kTokens / 16;
    PagedCache cache(options);
    OwnedTensor key(dtype, {kTokens, 1, kHeadSize}), slots(DType::kInt64, {kTokens});
    for (int code = 0; code < 65536; ++code) key.view.ptr<std::uint16_t>()[code] = static_cast<std::uint16_t>(code);
    std::vector<std::int64_t> ids;
    for (int t = 0; t < kTokens; ++t) ids.push_back(t);
    slots.fill_integers(ids);
    ReshapeAndCacheArgs args;
    cache.apply(args);
    args.key = args.value = key.view;
    args.slot_mapping = slots.view;
    ASSERT_TRUE(reshape_and_cache(args, nullptr).ok());
    EXPECT_EQ(cache.bytes()[0], key.bytes) << dtype_name(dtype);
    EXPECT_EQ(cache.bytes()[1], key.bytes) << dtype_name(dtype);
  }
}

// Key [num_blocks, Hk, d/x, block_size, x], value [num_blocks, Hk, dv, block_size].
TEST(StoreHeadMajor, PutsElementsWhereTheOldPathReadsThem) {
  for (const char* mode : {"auto", "float32", "float16", "bfloat16", "fp8", "fp8_e5m2"}) {
    if (!modes_built({mode})) continue;
    for (int x : {1, 8, 16}) {
      constexpr int kBlocks = 5, kHeads = 2, kHead = 64, kHeadV = 96, kSlots = 6;
      PagedCache::Options options;
      options.mode = mode;
      options.head_size = kHead;
      options.head_size_v = kHeadV;
      options.num_kv_heads = kHeads;
      options.block_size = kSlots;
      options.num_blocks = kBlocks;
      const PagedCache paged(options);
      const StoreInputs inputs(options, DType::kFloat32, 9);
      ReshapeAndCacheArgs args;
      inputs.apply(args);
      paged.apply(args);
      if (std::string(mode).starts_with("fp8")) args.k_scale = args.v_scale = Tensor();
      ASSERT_TRUE(reshape_and_cache(args, nullptr).ok());

      OwnedTensor k(paged.key_cache.dtype, {kBlocks, kHeads, kHead / x, kSlots, x}, 3);
      OwnedTensor v(paged.value_cache.dtype, {kBlocks, kHeads, kHeadV, kSlots}, 2);
      args.cache.key_cache = k.view;
      args.cache.value_cache = v.view;
      const Status status = reshape_and_cache(args, nullptr);
      ASSERT_TRUE(status.ok()) << status.message();

      const std::size_t size = dtype_bytes(k.view.dtype);
      const auto at = [&](const Tensor& t, std::initializer_list<std::int64_t> index) {
        std::int64_t offset = 0;
        int dim = 0;
        for (std::int64_t i : index) offset += i * t.strides[dim++];
        return t.ptr<std::uint8_t>() + static_cast<std::size_t>(offset) * size;
      };
      for (int block = 0; block < kBlocks; ++block) {
        for (int slot = 0; slot < kSlots; ++slot) {
          for (int head = 0; head < kHeads; ++head) {
            for (int i = 0; i < kHead; ++i) {
              ASSERT_EQ(std::memcmp(at(k.view, {block, head, i / x, slot, i % x}),
                                    at(paged.key_cache, {block, slot, head, i}), size),
                        0)
                  << mode << " x " << x << " block " << block << " slot " << slot << " element " << i;
            }
            for (int i = 0; i < kHeadV; ++i) {
              ASSERT_EQ(
                  std::memcmp(at(v.view, {block, head, i, slot}), at(paged.value_cache, {block, slot, head, i}), size),
                  0);
            }
          }
        }
      }
      // Gaps after the last dimension stay.
      std::size_t poisoned = 0;
      for (std::uint8_t byte : v.bytes) poisoned += byte == 0xFF ? 1 : 0;
      EXPECT_GE(poisoned, static_cast<std::size_t>(2 * (kBlocks * kHeads * kHeadV - 1)) * size);
    }
  }
}

// The entry point from before modes were explicit.
std::vector<std::string>* log_lines = nullptr;

TEST(StoreInferMode, TakesTheModeFromTheDtype) {
  QUIRE_NEEDS_MODES("int8_per_token_head", "fp8_per_token_head");
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  std::vector<std::string> lines;
  log_lines = &lines;
  set_log_hook([](const char* message) { log_lines->emplace_back(message); });
  for (const char* mode : {"int8_per_token_head", "fp8_per_token_head"}) {
    PagedCache::Options options;
    options.mode = mode;
    const StoreInputs inputs(options, DType::kFloat32, 10);
    ReshapeAndCacheArgs args;
    inputs.apply(args);
    PagedCache expected(options), cache(options);
    expected.apply(args);
    ASSERT_TRUE(reference::reshape_and_cache(args).ok());
    cache.apply(args);
    args.mode = ModeId{};
    const Status status = reshape_and_cache_infer_mode(args, nullptr);
    ASSERT_TRUE(status.ok()) << status.message();
    EXPECT_EQ(cache.bytes(), expected.bytes()) << mode;
  }
  EXPECT_EQ(lines.size(), 2U);
  EXPECT_NE(lines.at(0).find("deprecated"), std::string::npos) << lines.at(0);

  for (const char* mode : {"int4_per_token_head", "int2_per_token_head", "bfloat16"}) {
    PagedCache::Options options;
    options.mode = mode;
    const StoreInputs inputs(options, DType::kFloat32, 10);
    ReshapeAndCacheArgs args;
    inputs.apply(args);
    PagedCache cache(options);
    const PagedCache untouched(options);
    cache.apply(args);
    const Status status = reshape_and_cache_infer_mode(args, nullptr);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << mode;
    EXPECT_NE(status.message().find("key_cache is"), std::string::npos) << status.message();
    EXPECT_EQ(cache.bytes(), untouched.bytes());
  }
  set_log_hook(nullptr);
#pragma GCC diagnostic pop
}

}  // namespace
}  // namespace quire::testing
