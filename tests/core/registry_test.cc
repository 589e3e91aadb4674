// Backends: those of the table, those registered from outside the library, and every way a registration can be wrong.
#include <gtest/gtest.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "support/problem.h"

namespace quire::testing {
namespace {

::testing::AssertionResult refuses(const Status& status, StatusCode code, std::initializer_list<const char*> words) {
  if (status.ok()) return ::testing::AssertionFailure() << "was accepted";
  if (status.code() != code) {
    return ::testing::AssertionFailure() << "code " << static_cast<int>(status.code()) << ": " << status.message();
  }
  for (const char* word : words) {
    if (status.message().find(word) == std::string::npos) {
      return ::testing::AssertionFailure() << "no '" << word << "' in: " << status.message();
    }
  }
  return ::testing::AssertionSuccess();
}

// ---- the table's backends
// --------------------------------------------------------------------------------------------

TEST(Backend, PropertiesOfTheTablesModes) {
  struct Expected {
    const char* mode;
    KVQuantMode value;
    int packing_factor;
  };
  for (const Expected& expected : {Expected{"int8_per_token_head", KVQuantMode::kInt8PerTokenHead, 1},
                                   Expected{"fp8_per_token_head", KVQuantMode::kFp8PerTokenHead, 1},
                                   Expected{"int4_per_token_head", KVQuantMode::kInt4PerTokenHead, 2},
                                   Expected{"int2_per_token_head", KVQuantMode::kInt2PerTokenHead, 4}}) {
    if (!modes_built({expected.mode})) continue;
    const Result<const QuantKVBackend*> backend = get_backend(expected.mode);
    ASSERT_TRUE(backend.ok()) << backend.status().message();
    EXPECT_EQ((*backend)->mode(), mode_of(expected.mode));
    EXPECT_EQ((*backend)->packing_factor(), expected.packing_factor);
    EXPECT_TRUE((*backend)->needs_scale_caches());
    for (int d : {32, 64, 80, 96, 112, 128, 192, 256, 512}) {
      const Result<int> packed = (*backend)->packed_head_size(d);
      ASSERT_TRUE(packed.ok()) << packed.status().message();
      EXPECT_EQ(*packed, d / expected.packing_factor);
      EXPECT_EQ(*(*backend)->row_bytes(d, false), d / expected.packing_factor);
      EXPECT_EQ(*(*backend)->row_bytes(d, true), d / expected.packing_factor);
    }
    if (expected.packing_factor > 1) {
      EXPECT_TRUE(refuses((*backend)->packed_head_size(127).status(), StatusCode::kInvalidArgument, {"127"}));
      EXPECT_TRUE(refuses((*backend)->row_bytes(127, false).status(), StatusCode::kInvalidArgument, {"127"}));
    }
    EXPECT_FALSE((*backend)->packed_head_size(0).ok());
    EXPECT_FALSE((*backend)->packed_head_size(-8).ok());

    // One object for the life of the process, however it is asked for.
    EXPECT_EQ(*get_backend(mode_of(expected.mode)), *backend);
    EXPECT_EQ(*get_backend(expected.value), *backend);
    EXPECT_TRUE(has_backend(expected.mode));
    EXPECT_TRUE(has_backend(mode_of(expected.mode)));
    EXPECT_TRUE(has_backend(expected.value));

    const Result<ScaleCaches> caches = (*backend)->allocate_scale_caches(3, 16, 2);
    ASSERT_TRUE(caches.ok());
    for (const Tensor& scales : {caches->k_scale_cache, caches->v_scale_cache}) {
      ASSERT_EQ(scales.ndim, 3);
      EXPECT_EQ(scales.dtype, DType::kFloat32);
      EXPECT_EQ(scales.shape[0], 3);
      EXPECT_EQ(scales.shape[1], 16);
      EXPECT_EQ(scales.shape[2], 2);
    }
    EXPECT_EQ(caches->k, std::vector<float>(3 * 16 * 2, 0.0F));
    EXPECT_EQ(caches->v, std::vector<float>(3 * 16 * 2, 0.0F));
    EXPECT_EQ(caches->k_scale_cache.data, caches->k.data());
    EXPECT_EQ(caches->v_scale_cache.data, caches->v.data());
    EXPECT_FALSE((*backend)->allocate_scale_caches(3, 0, 2).ok());
    EXPECT_FALSE((*backend)->allocate_scale_caches(-1, 16, 2).ok());
  }
}

TEST(Backend, NoneAndFp8PerTensorHaveNone) {
  for (const char* mode : {"auto", "bfloat16", "float16", "float32"}) {
    EXPECT_TRUE(refuses(get_backend(mode).status(), StatusCode::kInvalidArgument, {mode, "NONE"}));
    EXPECT_FALSE(has_backend(mode));
  }
  for (const char* mode : {"fp8", "fp8_e5m2"}) {
    EXPECT_TRUE(refuses(get_backend(mode).status(), StatusCode::kInvalidArgument, {mode, "FP8_PER_TENSOR"}));
    EXPECT_FALSE(has_backend(mode));
  }
  EXPECT_TRUE(refuses(get_backend(KVQuantMode::kNone).status(), StatusCode::kInvalidArgument, {"NONE"}));
  EXPECT_FALSE(get_backend(KVQuantMode::kFp8PerTensor).ok());
  EXPECT_FALSE(has_backend(KVQuantMode::kNone));
  EXPECT_FALSE(has_backend(KVQuantMode::kFp8PerTensor));
}

TEST(Backend, UnknownModes) {
  EXPECT_TRUE(refuses(get_backend("int5_per_token_head").status(), StatusCode::kNotFound, {"int5_per_token_head"}));
  EXPECT_TRUE(refuses(get_backend(static_cast<ModeId>(12345)).status(), StatusCode::kNotFound, {"12345"}));
  EXPECT_TRUE(refuses(get_backend(static_cast<KVQuantMode>(9)).status(), StatusCode::kNotFound, {"9"}));
  EXPECT_FALSE(has_backend("int5_per_token_head"));
  EXPECT_FALSE(has_backend(static_cast<ModeId>(12345)));
  EXPECT_FALSE(has_backend(static_cast<KVQuantMode>(9)));
}

TEST(Backend, OpsOfTheBackendAreTheOps) {
  for (const char* mode : {"int8_per_token_head", "int4_per_token_head"}) {
    if (!modes_built({mode})) continue;
    AttentionCase::Options options;
    options.mode = mode;
    AttentionCase direct(options), through(options);
    ASSERT_TRUE(direct.check());
    const QuantKVBackend* backend = *get_backend(mode);
    ReshapeAndCacheArgs store;
    through.cache->apply(store);
    store.key = through.key.view;
    store.value = through.value.view;
    store.slot_mapping = through.slot_mapping.view;
    store.mode = mode_of("auto");  // the backend knows better
    ASSERT_TRUE(backend->reshape_and_cache(store, nullptr).ok());
    EXPECT_EQ(through.cache->bytes(), direct.cache->bytes());
    through.args.mode = mode_of("auto");
    ASSERT_TRUE(backend->unified_attention(through.args, nullptr).ok());
    EXPECT_EQ(through.out.bytes, direct.out.bytes);
  }
}

// ---- registration
// ----------------------------------------------------------------------------------------------------

class Plain : public QuantKVBackend {
 public:
  explicit Plain(ModeId mode) : mode_(mode) {}
  ModeId mode() const override { return mode_; }

 private:
  ModeId mode_;
};
class OtherPlain : public Plain {
 public:
  using Plain::Plain;
};

ModeId new_mode(const std::string& name) {
  const Result<ModeId> mode = register_mode({.name = name, .aliases = {}});
  EXPECT_TRUE(mode.ok()) << mode.status().message();
  return *mode;
}

TEST(Registry, ConstructsOnFirstUse) {
  const ModeId mode = new_mode("registry_lazy");
  EXPECT_TRUE(refuses(get_backend(mode).status(), StatusCode::kNotFound, {"registry_lazy", "register_backend"}));
  EXPECT_FALSE(has_backend(mode));
  int constructed = 0;
  ASSERT_TRUE(register_backend(mode, typeid(Plain), [&] {
                ++constructed;
                return std::make_unique<Plain>(mode);
              }).ok());
  EXPECT_EQ(constructed, 0);
  EXPECT_TRUE(has_backend(mode));
  const Result<const QuantKVBackend*> backend = get_backend("registry_lazy");
  ASSERT_TRUE(backend.ok());
  EXPECT_EQ(constructed, 1);
  EXPECT_EQ(*get_backend(mode), *backend);
  EXPECT_EQ(constructed, 1);
}

TEST(Registry, TheSameClassAgainIsAcceptedAnotherIsNot) {
  const ModeId mode = new_mode("registry_twice");
  const auto make = [mode] { return std::make_unique<Plain>(mode); };
  ASSERT_TRUE(register_backend(mode, typeid(Plain), make).ok());
  EXPECT_TRUE(register_backend(mode, typeid(Plain), make).ok());
  EXPECT_TRUE(refuses(register_backend(mode, typeid(OtherPlain), [mode] { return std::make_unique<OtherPlain>(mode); }),
                      StatusCode::kAlreadyExists, {"registry_twice", "another class"}));
  EXPECT_TRUE(get_backend(mode).ok());
}

TEST(Registry, WrongRegistrations) {
  const auto make = [] { return std::make_unique<Plain>(ModeId{}); };
  EXPECT_TRUE(
      refuses(register_backend(static_cast<ModeId>(4711), typeid(Plain), make), StatusCode::kNotFound, {"4711"}));
  EXPECT_TRUE(
      refuses(register_backend(mode_of("auto"), typeid(Plain), make), StatusCode::kInvalidArgument, {"auto", "NONE"}));
  EXPECT_TRUE(refuses(register_backend(mode_of("fp8"), typeid(Plain), make), StatusCode::kInvalidArgument,
                      {"fp8", "FP8_PER_TENSOR"}));
  EXPECT_TRUE(refuses(register_backend(mode_of("int4_per_token_head"), typeid(Plain), make), StatusCode::kAlreadyExists,
                      {"int4_per_token_head"}));

  const ModeId no_factory = new_mode("registry_no_factory");
  EXPECT_TRUE(refuses(register_backend(no_factory, typeid(Plain), BackendFactory()), StatusCode::kInvalidArgument,
                      {"registry_no_factory", "factory"}));

  const ModeId nothing = new_mode("registry_nothing");
  ASSERT_TRUE(register_backend(nothing, typeid(Plain), [] { return std::unique_ptr<QuantKVBackend>(); }).ok());
  EXPECT_TRUE(refuses(get_backend(nothing).status(), StatusCode::kInvalidArgument, {"registry_nothing", "nothing"}));
  EXPECT_FALSE(has_backend(nothing));

  const ModeId other = new_mode("registry_other_mode");
  ASSERT_TRUE(register_backend(other, typeid(Plain), [nothing] { return std::make_unique<Plain>(nothing); }).ok());
  EXPECT_TRUE(
      refuses(get_backend(other).status(), StatusCode::kInvalidArgument, {"registry_other_mode", "registry_nothing"}));
  EXPECT_FALSE(has_backend(other));
}

TEST(Registry, IsThreadSafe) {
  const ModeId mode = new_mode("registry_threads");
  std::atomic<int> constructed = 0;
  std::atomic<int> failures = 0;
  std::vector<const QuantKVBackend*> seen(8);
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < seen.size(); ++t) {
    threads.emplace_back([&, t] {
      const auto make = [&] {
        ++constructed;
        return std::make_unique<Plain>(mode);
      };
      if (!register_backend(mode, typeid(Plain), make).ok()) ++failures;
      for (int n = 0; n < 50; ++n) {
        const Result<const QuantKVBackend*> backend = get_backend(mode);
        if (!backend.ok() || (seen[t] != nullptr && seen[t] != *backend)) ++failures;
        if (backend.ok()) seen[t] = *backend;
        const std::string name = "registry_thread_" + std::to_string(t) + "_" + std::to_string(n);
        const Result<ModeId> made = register_mode({.name = name, .aliases = {}});
        if (!made.ok() || *parse_kv_cache_dtype(name) != *made) ++failures;
        if (list_modes().size() < 11) ++failures;
        if (!get_backend("int4_per_token_head").ok()) ++failures;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(constructed, 1);
  EXPECT_EQ(failures, 0);
  for (const QuantKVBackend* backend : seen) EXPECT_EQ(backend, seen[0]);
}

// ---- modes from outside: both ops
// ------------------------------------------------------------------------------------

// Writes int8_per_token_head's bytes in its own way: every row with twice the scale it needs.
class CoarseInt8 : public QuantKVBackend {
 public:
  explicit CoarseInt8(ModeId mode) : mode_(mode) {}
  ModeId mode() const override { return mode_; }
  bool needs_scale_caches() const override { return true; }
  std::string_view read_format() const override { return "int8_per_token_head"; }
  Status reshape_and_cache(const ReshapeAndCacheArgs& args, void*) const override {
    store(args.key, args.key_cache, args.k_scale_cache, args.slot_mapping);
    store(args.value, args.value_cache, args.v_scale_cache, args.slot_mapping);
    return {};
  }

 private:
  static void store(const Tensor& input, const Tensor& cache, const Tensor& scales, const Tensor& slots) {
    for (std::int64_t t = 0; t < slots.shape[0]; ++t) {
      const std::int64_t slot = slots.ptr<const std::int64_t>()[t];
      for (std::int64_t h = 0; h < input.shape[1]; ++h) {
        const float* x = input.ptr<const float>() + t * input.strides[0] + h * input.strides[1];
        float largest = 1e-6F;
        for (std::int64_t i = 0; i < input.shape[2]; ++i) largest = std::max(largest, std::abs(x[i]));
        const float scale = largest / 63.0F;
        const std::int64_t block = slot / cache.shape[1], within = slot % cache.shape[1];
        scales.ptr<float>()[block * scales.strides[0] + within * scales.strides[1] + h * scales.strides[2]] = scale;
        std::int8_t* to =
            cache.ptr<std::int8_t>() + block * cache.strides[0] + within * cache.strides[1] + h * cache.strides[2];
        for (std::int64_t i = 0; i < input.shape[2]; ++i) to[i] = static_cast<std::int8_t>(std::round(x[i] / scale));
      }
    }
  }

  ModeId mode_;
};

TEST(ExternalMode, WritesDifferentlyReadsAnExistingFormat) {
  QUIRE_NEEDS_MODES("int8_per_token_head");
  const ModeId mode = new_mode("external_coarse_int8");
  ASSERT_TRUE(register_backend(mode, typeid(CoarseInt8), [mode] { return std::make_unique<CoarseInt8>(mode); }).ok());
  AttentionCase::Options options;
  options.mode = "int8_per_token_head";
  options.window = 20;
  options.sinks = true;
  AttentionCase problem(options);
  ReshapeAndCacheArgs store;
  problem.cache->apply(store);
  store.mode = mode;
  store.key = problem.key.view;
  store.value = problem.value.view;
  store.slot_mapping = problem.slot_mapping.view;
  const std::vector<std::vector<std::uint8_t>> before = problem.cache->bytes();
  ASSERT_TRUE(reshape_and_cache(store).ok());
  ASSERT_NE(problem.cache->bytes(), before);

  // The oracle reads the new bytes as int8.
  ASSERT_TRUE(problem.check());
  const std::vector<std::uint8_t> expected = problem.out.bytes;
  problem.args.mode = mode;
  ASSERT_TRUE(problem.run().ok());
  EXPECT_EQ(problem.out.bytes, expected);
  ASSERT_TRUE(problem.run(3).ok());
  EXPECT_TRUE(problem.matches());
}

// New bytes: sixteenths as int8, most significant bit flipped, each row reversed, and the row's sign in its scale.
class Sixteenths : public QuantKVBackend {
 public:
  explicit Sixteenths(ModeId mode) : mode_(mode) {}
  ModeId mode() const override { return mode_; }
  bool needs_scale_caches() const override { return true; }
  bool has_decode_row() const override { return true; }
  bool decode_row(const CacheRow& row, float* out) const override {
    for (int i = 0; i < row.head_size; ++i) {
      const auto code = static_cast<std::int8_t>(row.data[row.head_size - 1 - i] ^ 0x80);
      out[i] = static_cast<float>(code) / 16.0F * *row.scale * (row.is_value ? 1.0F : 2.0F);
    }
    return true;
  }
  // `sign` differs from row to row; keys are halved, so that K and V cannot be mistaken for each other.
  static void encode(const float* x, int head_size, bool is_value, float sign, std::uint8_t* data, float* scale) {
    *scale = sign;
    for (int i = 0; i < head_size; ++i) {
      const float code = x[i] * 16.0F * sign / (is_value ? 1.0F : 2.0F);
      data[head_size - 1 - i] = static_cast<std::uint8_t>(static_cast<int>(code)) ^ 0x80;
    }
  }

 private:
  ModeId mode_;
};

TEST(ExternalMode, BringsItsOwnBytes) {
  const ModeId mode = new_mode("external_sixteenths");
  ASSERT_TRUE(register_backend(mode, typeid(Sixteenths), [mode] { return std::make_unique<Sixteenths>(mode); }).ok());

  // The truth: the same values in a float32 cache. Eighths (K) and sixteenths (V) survive both.
  AttentionCase::Options options;
  options.mode = "float32";
  options.head_size_v = 96;
  options.sinks = true;
  options.window = 30;
  options.softcap = 8.0F;
  options.k_scale = ScaleShape::kPerHead;
  AttentionCase problem(options);
  const std::int64_t tokens = problem.key.view.shape[0];
  for (std::int64_t n = 0; n < problem.key.view.numel(); ++n) {
    float& x = problem.key.view.ptr<float>()[n];
    x = std::round(std::clamp(x, -7.5F, 7.5F) * 8.0F) / 8.0F;
  }
  for (std::int64_t n = 0; n < problem.value.view.numel(); ++n) {
    float& x = problem.value.view.ptr<float>()[n];
    x = std::round(std::clamp(x, -7.5F, 7.5F) * 16.0F) / 16.0F;
  }
  ReshapeAndCacheArgs store;
  problem.cache->apply(store);
  store.key = problem.key.view;
  store.value = problem.value.view;
  store.slot_mapping = problem.slot_mapping.view;
  ASSERT_TRUE(reshape_and_cache(store).ok());
  ASSERT_TRUE(problem.check());

  // Its own cache; never-written rows stay poison.
  const std::int64_t blocks = problem.cache->options().num_blocks;
  OwnedTensor k(DType::kUInt8, {blocks, 16, 2, 64}), v(DType::kUInt8, {blocks, 16, 2, 96});
  OwnedTensor ks(DType::kFloat32, {blocks, 16, 2}), vs(DType::kFloat32, {blocks, 16, 2});
  for (std::int64_t t = 0; t < tokens; ++t) {
    const std::int64_t slot = problem.slot_mapping.view.ptr<std::int64_t>()[t];
    for (std::int64_t h = 0; h < 2; ++h) {
      const float sign = (t + h) % 3 == 0 ? -1.0F : 1.0F;
      Sixteenths::encode(problem.key.view.ptr<float>() + (t * 2 + h) * 64, 64, false, sign,
                         k.view.ptr<std::uint8_t>() + (slot * 2 + h) * 64, ks.view.ptr<float>() + slot * 2 + h);
      Sixteenths::encode(problem.value.view.ptr<float>() + (t * 2 + h) * 96, 96, true, sign,
                         v.view.ptr<std::uint8_t>() + (slot * 2 + h) * 96, vs.view.ptr<float>() + slot * 2 + h);
    }
  }
  problem.args.mode = mode;
  problem.args.key_cache = k.view;
  problem.args.value_cache = v.view;
  problem.args.k_scale_cache = ks.view;
  problem.args.v_scale_cache = vs.view;
  const Status status = problem.run();
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_TRUE(problem.matches());
  EXPECT_TRUE(problem.run(2).ok());
  EXPECT_TRUE(problem.matches());

  // It does not write, and says so.
  store.mode = mode;
  EXPECT_TRUE(refuses(reshape_and_cache(store), StatusCode::kUnsupported, {"Sixteenths", "reshape_and_cache"}));
}

class Constant : public QuantKVBackend {
 public:
  explicit Constant(ModeId mode) : mode_(mode) {}
  ModeId mode() const override { return mode_; }
  Status unified_attention(const UnifiedAttentionArgs& args, void*) const override {
    args.out.ptr<float>()[0] = 42.0F;
    return {};
  }

 private:
  ModeId mode_;
};

TEST(ExternalMode, OverridesTheReadSide) {
  const ModeId mode = new_mode("external_constant");
  ASSERT_TRUE(register_backend(mode, typeid(Constant), [mode] { return std::make_unique<Constant>(mode); }).ok());
  AttentionCase problem(AttentionCase::Options{});
  problem.args.mode = mode;
  ASSERT_TRUE(problem.run().ok());
  EXPECT_EQ(problem.out.get(0, 0, 0), 42.0F);
}

class Mute : public Plain {
 public:
  using Plain::Plain;
};
class Forgetful : public Plain {
 public:
  using Plain::Plain;
  std::string_view read_format() const override { return "int3_per_token_head"; }
};

TEST(ExternalMode, TheBaseRefusesWithTheClassName) {
  const ModeId mode = new_mode("external_mute");
  ASSERT_TRUE(register_backend(mode, typeid(Mute), [mode] { return std::make_unique<Mute>(mode); }).ok());
  AttentionCase problem(AttentionCase::Options{});
  problem.args.mode = mode;
  EXPECT_TRUE(refuses(problem.run(), StatusCode::kUnsupported, {"Mute", "unified_attention", "no readable format"}));
  for (std::uint8_t byte : problem.out.bytes) ASSERT_EQ(byte, 0xFF);
  ReshapeAndCacheArgs store;
  problem.cache->apply(store);
  store.mode = mode;
  store.key = problem.key.view;
  store.value = problem.value.view;
  store.slot_mapping = problem.slot_mapping.view;
  EXPECT_TRUE(refuses(reshape_and_cache(store), StatusCode::kUnsupported, {"Mute", "reshape_and_cache"}));

  const ModeId forgetful = new_mode("external_forgetful");
  ASSERT_TRUE(register_backend(forgetful, typeid(Forgetful), [forgetful] {
                return std::make_unique<Forgetful>(forgetful);
              }).ok());
  problem.args.mode = forgetful;
  EXPECT_TRUE(refuses(problem.run(), StatusCode::kNotFound, {"int3_per_token_head"}));

  // A mode nobody serves.
  problem.args.mode = new_mode("external_unserved");
  EXPECT_TRUE(refuses(problem.run(), StatusCode::kNotFound, {"external_unserved"}));
}

TEST(ExternalMode, HasALayout) {
  const ModeId mode = new_mode("external_layout");
  ASSERT_TRUE(register_backend(mode, typeid(Sixteenths), [mode] { return std::make_unique<Sixteenths>(mode); }).ok());
  KVCacheSpec spec;
  spec.mode = mode;
  spec.head_size = 96;
  spec.head_size_v = 64;
  const Result<KVCacheLayout> layout = make_layout(spec);
  ASSERT_TRUE(layout.ok()) << layout.status().message();
  EXPECT_EQ(layout->bytes_per_token_head, 96 + 4 + 64 + 4);
}

}  // namespace
}  // namespace quire::testing
