// Backends: those of the table, those that are registered from outside of the library, and every way to register
// wrongly.
#include <gtest/gtest.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "support/attention_case.h"
#include "support/modes.h"
#include "support/owned_tensor.h"

// AddressSanitizer ends the process where more memory is asked for than exists, unless it is told to answer like
// malloc.
extern "C" __attribute__((weak)) const char* __asan_default_options() { return "allocator_may_return_null=1"; }

namespace quire::testing {

ModeId register_backend_without_rtti(const std::string& name);  // no_rtti.cc

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

// ---- the table's backends -------------------------------------------------------------------------------------------

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
    EXPECT_EQ(*(*backend)->packing_factor(), expected.packing_factor);
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
      for (std::int64_t i = 0; i < scales.numel(); ++i) ASSERT_EQ(scales.ptr<float>()[i], 0.0F);
    }
    EXPECT_FALSE((*backend)->allocate_scale_caches(3, 0, 2).ok());
    EXPECT_FALSE((*backend)->allocate_scale_caches(-1, 16, 2).ok());
    EXPECT_TRUE((*backend)->allocate_scale_caches(0, 16, 2).ok());
  }
}

// packed_head_size is the last extent of the key cache, in elements: d for float keys, and with the metadata that
// TurboQuant keeps in its rows. packing_factor is the divisor of d, where there is such a number.
TEST(Backend, PackedHeadSizeIsTheExtentOfTheKeyCache) {
  constexpr int kNone = 0;
  struct Expected {
    const char* mode;
    int packed_128;
    int packing_factor;
  };
  for (const Expected& expected : {Expected{"int8_per_token_head", 128, 1},
                                   {"fp8_per_token_head", 128, 1},
                                   {"int4_per_token_head", 64, 2},
                                   {"int2_per_token_head", 32, 4},
                                   {"turboquant_k8v4", 128, 1},
                                   {"turboquant_4bit_nc", 66, kNone},
                                   {"turboquant_k3v4_nc", 50, kNone},
                                   {"turboquant_3bit_nc", 50, kNone},
                                   {"k=bfloat16,v=turboquant_v4", 128, 1},
                                   {"k=float16,v=int4_per_token_head", 128, 1},
                                   {"k=float32,v=int2_per_token_head", 128, 1},
                                   {"k=int4_per_token_head,v=float32", 64, 2},
                                   {"k=fp8_e5m2,v=turboquant_v3", 128, 1}}) {
    SCOPED_TRACE(expected.mode);
    const ModeId mode = mode_of(expected.mode);
    if (!(*mode_info(mode))->compiled) continue;
    const QuantKVBackend* backend = *get_backend(mode);
    const Result<int> packed = backend->packed_head_size(128);
    ASSERT_TRUE(packed.ok()) << packed.status().message();
    EXPECT_EQ(*packed, expected.packed_128);
    for (int d : {64, 96, 128, 256}) {
      KVCacheSpec spec;
      spec.mode = mode;
      spec.head_size = d;
      EXPECT_EQ(*backend->packed_head_size(d), make_views(*make_layout(spec), 1, nullptr).key_cache.shape[3]) << d;
    }
    const Result<int> factor = backend->packing_factor();
    if (expected.packing_factor == kNone) {
      EXPECT_TRUE(refuses(factor.status(), StatusCode::kInvalidArgument, {expected.mode, "packed_head_size"}));
    } else {
      ASSERT_TRUE(factor.ok()) << factor.status().message();
      EXPECT_EQ(*factor, expected.packing_factor);
    }
    for (int d : {0, -1, -8, std::numeric_limits<int>::min()}) {
      EXPECT_TRUE(refuses(backend->packed_head_size(d).status(), StatusCode::kInvalidArgument, {expected.mode}));
      EXPECT_TRUE(refuses(backend->row_bytes(d, false).status(), StatusCode::kInvalidArgument, {expected.mode}));
      EXPECT_TRUE(refuses(backend->row_bytes(d, true).status(), StatusCode::kInvalidArgument, {expected.mode}));
    }
  }
}

TEST(Backend, SentencesNameTheMode) {
  QUIRE_NEEDS_MODES("int4_per_token_head", "turboquant_3bit_nc");
  EXPECT_EQ((*get_backend("int4_per_token_head"))->packed_head_size(127).status().message(),
            "head_size is 127; mode int4_per_token_head packs multiples of 2");
  EXPECT_EQ((*get_backend("turboquant_3bit_nc"))->row_bytes(100, true).status().message(),
            "head_size is 100; mode turboquant_3bit_nc packs multiples of 8");
  EXPECT_EQ(get_backend(KVQuantMode::kFp8PerTensor).status().message(),
            "KVQuantMode FP8_PER_TENSOR has no backend; call the ops directly with k_scale and v_scale");
}

// ---- scale caches ---------------------------------------------------------------------------------------------------

TEST(ScaleCaches, LiveAsLongAsACopyOfThem) {
  QUIRE_NEEDS_MODES("int8_per_token_head");
  const QuantKVBackend* backend = *get_backend("int8_per_token_head");
  ScaleCaches outer;
  {
    auto caches = *backend->allocate_scale_caches(8, 16, 2);  // the Result is gone after this line
    caches.k_scale_cache.ptr<float>()[255] = 7.0F;
    ScaleCaches copy = caches;
    copy.v_scale_cache.ptr<float>()[255] = 8.0F;
    outer = copy;
  }
  EXPECT_EQ(outer.k_scale_cache.ptr<float>()[255], 7.0F);
  EXPECT_EQ(outer.v_scale_cache.ptr<float>()[255], 8.0F);
}

TEST(ScaleCaches, OfAPairBelongToTheSideThatNeedsThem) {
  QUIRE_NEEDS_MODES("int8_per_token_head", "int4_per_token_head", "bfloat16", "float16");
  for (const auto& [mode, k, v] : {std::tuple{"k=int8_per_token_head,v=bfloat16", true, false},
                                   {"k=bfloat16,v=int8_per_token_head", false, true},
                                   {"k=int8_per_token_head,v=int4_per_token_head", true, true},
                                   {"k=bfloat16,v=float16", false, false}}) {
    const ScaleCaches caches = *(*get_backend(mode))->allocate_scale_caches(1, 16, 2);
    EXPECT_EQ(caches.k_scale_cache.defined(), k) << mode;
    EXPECT_EQ(caches.v_scale_cache.defined(), v) << mode;
  }
}

TEST(ScaleCaches, SizesThatCannotBe) {
  QUIRE_NEEDS_MODES("int8_per_token_head");
  const QuantKVBackend* backend = *get_backend("int8_per_token_head");
  constexpr int kInt = std::numeric_limits<int>::max();
  struct Shape {
    std::int64_t num_blocks;
    int block_size, num_kv_heads;
  };
  for (const Shape& shape : {Shape{std::int64_t{1} << 60, 16, 1}, Shape{std::int64_t{1} << 58, 4, 4},
                             Shape{std::numeric_limits<std::int64_t>::max(), 1, 1}, Shape{4, kInt, kInt},
                             Shape{std::int64_t{1} << 60, 1, 1}}) {
    const Status status =
        backend->allocate_scale_caches(shape.num_blocks, shape.block_size, shape.num_kv_heads).status();
    EXPECT_TRUE(refuses(status, StatusCode::kInvalidArgument, {std::to_string(shape.num_blocks).c_str(), "63 bits"}));
  }
  // Fits in 63 bits, but not in a machine.
  EXPECT_TRUE(refuses(backend->allocate_scale_caches(std::int64_t{1} << 45, 16, 8).status(), StatusCode::kInternal,
                      {"35184372088832, 16, 8", "no memory"}));
}

TEST(Result, OfATemporaryIsMovedOut) {
  const auto make = [] { return Result<std::vector<int>>(std::vector<int>(1000, 7)); };
  const std::vector<int>& value = make().value();  // lives as long as the reference
  const std::vector<int>& star = *make();
  int sum = 0;
  for (int x : *make()) sum += x;
  EXPECT_EQ(value.back() + star.back(), 14);
  EXPECT_EQ(sum, 7000);
}

// ---- modes without a backend ----------------------------------------------------------------------------------------

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
  EXPECT_TRUE(
      refuses(get_backend(KVQuantMode::kFp8PerTensor).status(), StatusCode::kInvalidArgument, {"FP8_PER_TENSOR"}));
  EXPECT_FALSE(has_backend(KVQuantMode::kNone));
  EXPECT_FALSE(has_backend(KVQuantMode::kFp8PerTensor));
}

TEST(Backend, UnknownModes) {
  EXPECT_TRUE(refuses(get_backend("int5_per_token_head").status(), StatusCode::kNotFound, {"int5_per_token_head"}));
  EXPECT_TRUE(refuses(get_backend(static_cast<ModeId>(12345)).status(), StatusCode::kNotFound, {"12345"}));
  EXPECT_TRUE(refuses(get_backend(static_cast<KVQuantMode>(9)).status(), StatusCode::kNotFound,
                      {"outside the enum", "INT2_PER_TOKEN_HEAD"}));
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
    store.mode = mode_of("auto");  // the backend's own mode wins
    ASSERT_TRUE(backend->reshape_and_cache(store, nullptr).ok());
    EXPECT_EQ(through.cache->bytes(), direct.cache->bytes());
    through.args.mode = mode_of("auto");
    ASSERT_TRUE(backend->unified_attention(through.args, nullptr).ok());
    EXPECT_EQ(through.out.bytes, direct.out.bytes);
  }
}

// ---- registration ---------------------------------------------------------------------------------------------------

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
  ASSERT_TRUE(register_backend(mode, backend_class<Plain>(), [&] {
                ++constructed;
                return std::make_unique<Plain>(mode);
              }).ok());
  EXPECT_TRUE(has_backend(mode));
  EXPECT_TRUE(has_backend("registry_lazy"));
  EXPECT_EQ(constructed, 0);
  const Result<const QuantKVBackend*> backend = get_backend("registry_lazy");
  ASSERT_TRUE(backend.ok());
  EXPECT_EQ(constructed, 1);
  EXPECT_EQ(*get_backend(mode), *backend);
  EXPECT_EQ(constructed, 1);
}

TEST(Registry, TheSameClassAgainIsAcceptedAnotherIsNot) {
  const ModeId mode = new_mode("registry_twice");
  const auto make = [mode] { return std::make_unique<Plain>(mode); };
  ASSERT_TRUE(register_backend(mode, backend_class<Plain>(), make).ok());
  EXPECT_TRUE(register_backend(mode, backend_class<Plain>(), make).ok());
  EXPECT_TRUE(refuses(
      register_backend(mode, backend_class<OtherPlain>(), [mode] { return std::make_unique<OtherPlain>(mode); }),
      StatusCode::kAlreadyExists, {"registry_twice", "another class"}));
  EXPECT_TRUE(get_backend(mode).ok());
}

TEST(Registry, WrongRegistrations) {
  const auto make = [] { return std::make_unique<Plain>(ModeId{}); };
  EXPECT_TRUE(refuses(register_backend(static_cast<ModeId>(4711), backend_class<Plain>(), make), StatusCode::kNotFound,
                      {"4711"}));
  EXPECT_TRUE(refuses(register_backend(mode_of("auto"), backend_class<Plain>(), make), StatusCode::kInvalidArgument,
                      {"auto", "NONE"}));
  EXPECT_TRUE(refuses(register_backend(mode_of("fp8"), backend_class<Plain>(), make), StatusCode::kInvalidArgument,
                      {"fp8", "FP8_PER_TENSOR"}));
  EXPECT_TRUE(refuses(register_backend(mode_of("int4_per_token_head"), backend_class<Plain>(), make),
                      StatusCode::kAlreadyExists, {"int4_per_token_head"}));

  const ModeId no_factory = new_mode("registry_no_factory");
  EXPECT_TRUE(refuses(register_backend(no_factory, backend_class<Plain>(), BackendFactory()),
                      StatusCode::kInvalidArgument, {"registry_no_factory", "factory"}));

  const ModeId nothing = new_mode("registry_nothing");
  ASSERT_TRUE(register_backend(nothing, backend_class<Plain>(), [] { return std::unique_ptr<QuantKVBackend>(); }).ok());
  EXPECT_TRUE(refuses(get_backend(nothing).status(), StatusCode::kInvalidArgument, {"registry_nothing", "nothing"}));
  EXPECT_TRUE(has_backend(nothing)) << "it is registered; that it fails shows where it is made";

  const ModeId other = new_mode("registry_other_mode");
  ASSERT_TRUE(
      register_backend(other, backend_class<Plain>(), [nothing] { return std::make_unique<Plain>(nothing); }).ok());
  EXPECT_TRUE(
      refuses(get_backend(other).status(), StatusCode::kInvalidArgument, {"registry_other_mode", "registry_nothing"}));
  EXPECT_TRUE(has_backend(other));
}

// A backend that asks for itself while it is being made.
ModeId selfish_mode;
class Selfish : public QuantKVBackend {
 public:
  Selfish() : self(get_backend(selfish_mode).status()) {}
  ModeId mode() const override { return selfish_mode; }
  Status self;
};

TEST(Registry, AConstructorThatLooksUpItsOwnMode) {
  selfish_mode = new_mode("registry_selfish");
  ASSERT_TRUE(register_backend<Selfish>(selfish_mode).ok());
  const Result<const QuantKVBackend*> backend = get_backend(selfish_mode);
  ASSERT_TRUE(backend.ok()) << backend.status().message();
  EXPECT_TRUE(refuses(static_cast<const Selfish*>(*backend)->self, StatusCode::kInvalidArgument,
                      {"registry_selfish", "is being made"}));
  EXPECT_EQ(*get_backend(selfish_mode), *backend);

  // Two that ask for each other.
  const ModeId a = new_mode("registry_a"), b = new_mode("registry_b");
  Status inner;
  ASSERT_TRUE(register_backend(a, backend_class<Plain>(), [a, b] {
                EXPECT_TRUE(get_backend(b).ok());
                return std::make_unique<Plain>(a);
              }).ok());
  ASSERT_TRUE(register_backend(b, backend_class<Plain>(), [a, b, &inner] {
                inner = get_backend(a).status();
                return std::make_unique<Plain>(b);
              }).ok());
  EXPECT_TRUE(get_backend(a).ok());
  EXPECT_TRUE(refuses(inner, StatusCode::kInvalidArgument, {"registry_a", "is being made"}));
}

TEST(Registry, AFactoryThatThrows) {
  const ModeId mode = new_mode("registry_throws");
  int calls = 0;
  ASSERT_TRUE(register_backend(mode, backend_class<Plain>(), [&]() -> std::unique_ptr<QuantKVBackend> {
                if (++calls == 1) throw std::runtime_error("no licence\n");
                if (calls == 2) throw 42;
                return std::make_unique<Plain>(mode);
              }).ok());
  EXPECT_TRUE(refuses(get_backend(mode).status(), StatusCode::kInternal,
                      {"factory", "registry_throws", "threw an exception: 'no licence\\x0a'"}));
  EXPECT_TRUE(refuses(get_backend(mode).status(), StatusCode::kInternal, {"registry_throws", "threw an exception"}));
  EXPECT_TRUE(get_backend(mode).ok()) << "the next call tries again";
}

TEST(Registry, ABackendCompiledWithoutRtti) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "UBSan's check of virtual calls needs RTTI";
#endif
  const ModeId mode = register_backend_without_rtti("registry_no_rtti");
  const Result<const QuantKVBackend*> backend = get_backend(mode);
  ASSERT_TRUE(backend.ok()) << backend.status().message();
  EXPECT_EQ(*(*backend)->packed_head_size(64), 64);
  ReshapeAndCacheArgs store;
  store.mode = mode;
  EXPECT_TRUE(
      refuses(reshape_and_cache(store, nullptr), StatusCode::kUnsupported, {"registry_no_rtti", "reshape_and_cache"}));
}

TEST(Registry, IsThreadSafe) {
  QUIRE_NEEDS_MODES("int4_per_token_head");
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
      if (!register_backend(mode, backend_class<Plain>(), make).ok()) ++failures;
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

// ---- modes from outside: both ops -----------------------------------------------------------------------------------

// Writes int8_per_token_head's bytes in its own way: every row has twice the scale that it needs.
class CoarseInt8 : public QuantKVBackend {
 public:
  explicit CoarseInt8(ModeId mode) : mode_(mode) {}
  ModeId mode() const override { return mode_; }
  bool needs_scale_caches() const override { return true; }
  std::string_view read_format() const override { return "int8_per_token_head"; }
  Status reshape_and_cache(const ReshapeAndCacheArgs& args, void*) const override {
    store(args.key, args.cache.key_cache, args.cache.k_scale_cache, args.slot_mapping);
    store(args.value, args.cache.value_cache, args.cache.v_scale_cache, args.slot_mapping);
    return {};
  }

 private:
  static void store(const ConstTensor& input, const Tensor& cache, const Tensor& scales, const ConstTensor& slots) {
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
  ASSERT_TRUE(
      register_backend(mode, backend_class<CoarseInt8>(), [mode] { return std::make_unique<CoarseInt8>(mode); }).ok());
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
  ASSERT_TRUE(reshape_and_cache(store, nullptr).ok());
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

// Bytes of a new kind: sixteenths as int8 with the most significant bit flipped, each row reversed, and the row's sign
// in its scale.
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
  ASSERT_TRUE(
      register_backend(mode, backend_class<Sixteenths>(), [mode] { return std::make_unique<Sixteenths>(mode); }).ok());

  // The truth is a float32 cache of the same values. Eighths (K) and sixteenths (V) survive both ways of storing.
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
  ASSERT_TRUE(reshape_and_cache(store, nullptr).ok());
  ASSERT_TRUE(problem.check());

  // The mode has a cache of its own, and rows that were never written stay poison.
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
  problem.args.cache.key_cache = k.view;
  problem.args.cache.value_cache = v.view;
  problem.args.cache.k_scale_cache = ks.view;
  problem.args.cache.v_scale_cache = vs.view;
  const Status status = problem.run();
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_TRUE(problem.matches());
  EXPECT_TRUE(problem.run(2).ok());
  EXPECT_TRUE(problem.matches());

  // It does not write, and says so.
  store.mode = mode;
  EXPECT_TRUE(refuses(reshape_and_cache(store, nullptr), StatusCode::kUnsupported,
                      {"external_sixteenths", "reshape_and_cache"}));
}

// Has one byte an element and no scale; throws on a row that starts with 0xEE, and cannot decode one that starts with
// 0xDD.
class Picky : public Plain {
 public:
  using Plain::Plain;
  bool has_decode_row() const override { return true; }
  bool decode_row(const CacheRow& row, float* out) const override {
    if (row.data[0] == 0xEE) throw std::runtime_error("a row it throws on");
    if (row.data[0] == 0xDD) return false;
    for (int i = 0; i < row.head_size; ++i) out[i] = static_cast<float>(row.data[i]);
    return true;
  }
};

// Two sequences of 16 keys, one page each, one query token each.
struct OwnRows {
  explicit OwnRows(ModeId mode) {
    args.mode = mode;
    args.softmax_scale = 0.1F;
    args.query = query.view;
    args.out = out.view;
    args.cache.key_cache = k.view;
    args.cache.value_cache = v.view;
    args.cu_seqlens_q = Tensor::contiguous(cu_seqlens_q, DType::kInt32, {3});
    args.seq_lens = Tensor::contiguous(seq_lens, DType::kInt32, {2});
    args.block_table = Tensor::contiguous(block_table, DType::kInt32, {2, 1});
    query.fill(std::vector<float>(2 * 32, 0.5F));
    for (OwnedTensor* cache : {&k, &v}) std::fill(cache->bytes.begin(), cache->bytes.end(), std::uint8_t{3});
  }
  bool untouched() const {
    return std::all_of(out.bytes.begin(), out.bytes.end(), [](std::uint8_t byte) { return byte == 0xFF; });
  }

  OwnedTensor query{DType::kFloat32, {2, 1, 32}}, out{DType::kFloat32, {2, 1, 32}};
  OwnedTensor k{DType::kUInt8, {2, 16, 1, 32}}, v{DType::kUInt8, {2, 16, 1, 32}};
  OwnedTensor scales{DType::kFloat32, {2, 16, 1}};
  std::int32_t cu_seqlens_q[3] = {0, 1, 2}, seq_lens[2] = {16, 16}, block_table[2] = {0, 1};
  UnifiedAttentionArgs args;
};

TEST(ExternalMode, RowsAndScaleCachesAreWhatTheBackendSays) {
  const ModeId scaled = new_mode("external_scaled");
  ASSERT_TRUE(register_backend(scaled, backend_class<Sixteenths>(), [scaled] {
                return std::make_unique<Sixteenths>(scaled);
              }).ok());
  const ModeId unscaled = new_mode("external_unscaled");
  ASSERT_TRUE(register_backend(unscaled, backend_class<Picky>(), [unscaled] {
                return std::make_unique<Picky>(unscaled);
              }).ok());
  const struct {
    const char* words;
    void (*spoil)(OwnRows& problem);
  } cases[] = {
      {"k_scale_cache is not given", [](OwnRows& p) { p.args.cache.k_scale_cache = {}; }},
      {"v_scale_cache is not given", [](OwnRows& p) { p.args.cache.v_scale_cache = {}; }},
      {"k_scale_cache is [1, 16, 1] float32", [](OwnRows& p) { p.args.cache.k_scale_cache.shape[0] = 1; }},
      {"v_scale_cache is [2, 16] float32", [](OwnRows& p) { p.args.cache.v_scale_cache.ndim = 2; }},
      {"k_scale_cache is int8", [](OwnRows& p) { p.args.cache.k_scale_cache.dtype = DType::kInt8; }},
      {"v_scale_cache is on cuda:0", [](OwnRows& p) { p.args.cache.v_scale_cache.device = Device::cuda(); }},
      {"k_scale_cache is a null pointer", [](OwnRows& p) { p.args.cache.k_scale_cache.data = nullptr; }},
      {"k_scale_cache is not aligned",
       [](OwnRows& p) { p.args.cache.k_scale_cache.data = p.args.cache.k_scale_cache.ptr<const std::uint8_t>() + 1; }},
      {"a row of mode external_scaled has 32 bytes at head_size 32",
       [](OwnRows& p) { p.args.cache.key_cache.shape[3] = 8; }},
      {"a row of mode external_scaled has 32 bytes at head_size_v 32",
       [](OwnRows& p) { p.args.cache.value_cache = p.args.cache.value_cache.slice_last(0, 31); }},
      {"a row of mode external_scaled has 32 bytes at head_size 32",
       [](OwnRows& p) { p.args.cache.key_cache.dtype = DType::kFloat16; }},
      {"k_scale_cache is given, but mode external_unscaled has no scale caches",
       [](OwnRows& p) {
         p.args.mode = mode_of("external_unscaled");
         p.args.cache.v_scale_cache = {};
       }},
      {"v_scale_cache is given, but mode external_unscaled has no scale caches",
       [](OwnRows& p) {
         p.args.mode = mode_of("external_unscaled");
         p.args.cache.k_scale_cache = {};
       }},
  };
  for (const auto& entry : cases) {
    OwnRows problem(scaled);
    problem.scales.fill(std::vector<float>(2 * 16, 1.0F));
    problem.args.cache.k_scale_cache = problem.args.cache.v_scale_cache = problem.scales.view;
    entry.spoil(problem);
    EXPECT_TRUE(refuses(unified_attention(problem.args, nullptr), StatusCode::kInvalidArgument, {entry.words}));
    EXPECT_TRUE(problem.untouched()) << entry.words;
    EXPECT_TRUE(refuses(problem_of(problem.args).status(), StatusCode::kInvalidArgument, {entry.words}));
  }
  OwnRows good(scaled);
  good.scales.fill(std::vector<float>(2 * 16, 1.0F));
  good.args.cache.k_scale_cache = good.args.cache.v_scale_cache = good.scales.view;
  EXPECT_TRUE(unified_attention(good.args, nullptr).ok());
  OwnRows without(unscaled);
  EXPECT_TRUE(unified_attention(without.args, nullptr).ok());
  EXPECT_EQ(without.out.get(0, 0, 0), 3.0F);
}

TEST(ExternalMode, ARowThatCannotBeDecodedIsNaNWhereItIsSeen) {
  const ModeId mode = new_mode("external_picky");
  ASSERT_TRUE(register_backend(mode, backend_class<Picky>(), [mode] { return std::make_unique<Picky>(mode); }).ok());
  for (const bool is_value : {false, true}) {
    for (const std::uint8_t mark : {0xDD, 0xEE}) {
      OwnRows problem(mode);
      OwnedTensor& cache = is_value ? problem.v : problem.k;
      cache.view.ptr<std::uint8_t>()[5 * 32] = mark;  // key 5 of the first sequence
      const Status status = unified_attention(problem.args, nullptr);
      if (mark == 0xEE) {
        EXPECT_TRUE(refuses(status, StatusCode::kInternal, {"decode_row", "external_picky", "threw an exception"}));
      } else {
        EXPECT_TRUE(status.ok()) << status.message();
      }
      for (int i = 0; i < 32; ++i) {
        EXPECT_TRUE(std::isnan(problem.out.get(0, 0, i)));
        EXPECT_EQ(problem.out.get(1, 0, i), 3.0F);
      }
    }
  }
}

// Throws, whatever it is asked for.
class Thrower : public Plain {
 public:
  using Plain::Plain;
  bool needs_scale_caches() const override { throw std::runtime_error("needs_scale_caches"); }
  Result<std::int64_t> row_bytes(int, bool) const override { throw std::runtime_error("row_bytes"); }
  Status reshape_and_cache(const ReshapeAndCacheArgs&, void*) const override { throw std::runtime_error("write"); }
  bool has_decode_row() const override { return true; }
};
class ThrowingReader : public Plain {
 public:
  using Plain::Plain;
  Status unified_attention(const UnifiedAttentionArgs&, void*) const override { throw 42; }
};

TEST(ExternalMode, ExceptionsBecomeStatuses) {
  const ModeId mode = new_mode("external_thrower");
  ASSERT_TRUE(
      register_backend(mode, backend_class<Thrower>(), [mode] { return std::make_unique<Thrower>(mode); }).ok());
  const auto threw = [](const Status& status, const char* what) {
    return refuses(status, StatusCode::kInternal, {"external_thrower", "threw an exception: '", what});
  };
  OwnRows problem(mode);
  ReshapeAndCacheArgs store;
  store.mode = mode;
  EXPECT_TRUE(threw(reshape_and_cache(store, nullptr), "write"));
  EXPECT_TRUE(threw(unified_attention(problem.args, nullptr), "row_bytes"));
  AttentionProblem planned;
  planned.mode = mode;
  planned.num_q_heads = planned.num_kv_heads = planned.block_size = 1;
  planned.head_size = planned.head_size_v = 32;
  const AttentionPlan plan = *plan_unified_attention(planned);
  EXPECT_TRUE(threw(run_unified_attention(plan, problem.args, nullptr, 0, nullptr), "row_bytes"));
  EXPECT_TRUE(threw(problem_of(problem.args).status(), "row_bytes"));
  EXPECT_TRUE(problem.untouched());
  KVCacheSpec spec;
  spec.mode = mode;
  EXPECT_TRUE(threw(make_layout(spec).status(), "row_bytes"));

  const ModeId reader = new_mode("external_throwing_reader");
  ASSERT_TRUE(register_backend(reader, backend_class<ThrowingReader>(), [reader] {
                return std::make_unique<ThrowingReader>(reader);
              }).ok());
  problem.args.mode = reader;
  EXPECT_TRUE(refuses(unified_attention(problem.args, nullptr), StatusCode::kInternal,
                      {"unified_attention", "external_throwing_reader", "threw an exception"}));
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
  ASSERT_TRUE(
      register_backend(mode, backend_class<Constant>(), [mode] { return std::make_unique<Constant>(mode); }).ok());
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

TEST(ExternalMode, TheBaseRefusesWithTheMode) {
  const ModeId mode = new_mode("external_mute");
  ASSERT_TRUE(register_backend(mode, backend_class<Mute>(), [mode] { return std::make_unique<Mute>(mode); }).ok());
  AttentionCase problem(AttentionCase::Options{});
  problem.args.mode = mode;
  EXPECT_TRUE(
      refuses(problem.run(), StatusCode::kUnsupported, {"external_mute", "unified_attention", "no readable format"}));
  for (std::uint8_t byte : problem.out.bytes) ASSERT_EQ(byte, 0xFF);
  ReshapeAndCacheArgs store;
  problem.cache->apply(store);
  store.mode = mode;
  store.key = problem.key.view;
  store.value = problem.value.view;
  store.slot_mapping = problem.slot_mapping.view;
  EXPECT_TRUE(
      refuses(reshape_and_cache(store, nullptr), StatusCode::kUnsupported, {"external_mute", "reshape_and_cache"}));

  const ModeId forgetful = new_mode("external_forgetful");
  ASSERT_TRUE(register_backend(forgetful, backend_class<Forgetful>(), [forgetful] {
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
  ASSERT_TRUE(
      register_backend(mode, backend_class<Sixteenths>(), [mode] { return std::make_unique<Sixteenths>(mode); }).ok());
  KVCacheSpec spec;
  spec.mode = mode;
  spec.head_size = 96;
  spec.head_size_v = 64;
  const Result<KVCacheLayout> layout = make_layout(spec);
  ASSERT_TRUE(layout.ok()) << layout.status().message();
  EXPECT_EQ(layout->bytes_per_token_head, 96 + 4 + 64 + 4);
}

// Scales of two bytes are something that a layout cannot describe.
class HalfScales : public Sixteenths {
 public:
  using Sixteenths::Sixteenths;
  Result<ScaleCaches> allocate_scale_caches(std::int64_t num_blocks, int block_size, int num_kv_heads) const override {
    ScaleCaches caches = *Sixteenths::allocate_scale_caches(num_blocks, block_size, num_kv_heads);
    caches.k_scale_cache.dtype = caches.v_scale_cache.dtype = DType::kFloat16;
    return caches;
  }
};
class LongRows : public Plain {
 public:
  using Plain::Plain;
  Result<std::int64_t> row_bytes(int head_size, bool) const override {
    return head_size == 32 ? 0 : std::numeric_limits<std::int64_t>::max();
  }
};

TEST(ExternalMode, LayoutsThatCannotBe) {
  KVCacheSpec spec;
  spec.mode = new_mode("external_half_scales");
  ASSERT_TRUE(register_backend(spec.mode, backend_class<HalfScales>(), [mode = spec.mode] {
                return std::make_unique<HalfScales>(mode);
              }).ok());
  EXPECT_TRUE(refuses(make_layout(spec).status(), StatusCode::kUnsupported,
                      {"allocate_scale_caches", "external_half_scales", "[2, 3, 5] float16"}));

  spec.mode = new_mode("external_long_rows");
  ASSERT_TRUE(register_backend(spec.mode, backend_class<LongRows>(), [mode = spec.mode] {
                return std::make_unique<LongRows>(mode);
              }).ok());
  for (int head_size : {32, 64}) {
    spec.head_size = head_size;
    EXPECT_TRUE(refuses(make_layout(spec).status(), StatusCode::kInvalidArgument,
                        {"row_bytes of mode external_long_rows", "supported: 1 to 32768"}));
  }
}

}  // namespace
}  // namespace quire::testing
