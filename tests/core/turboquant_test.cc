// vLLM's TurboQuant entry points (quire/turboquant.h): the modes they name, that they do what the two ops do, what they
// refuse, and that the padding of a slot stays untouched. Mixed modes: their names, and both ops against the oracle.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <climits>
#include <cmath>
#include <string>
#include <string_view>
#include <vector>

#include "format/build_config.h"
#include "reference/attention.h"
#include "support/attention_case.h"
#include "support/modes.h"
#include "support/owned_tensor.h"
#include "support/paged_cache.h"
#include "support/random.h"
#include "support/turboquant_tables.h"

namespace quire::testing {
namespace {

constexpr int kBlockSize = 16;
constexpr int kKvHeads = 2;
constexpr int kQueryHeads = 6;
constexpr int kTokens = 20;  // of one sequence, on pages 3 and 1
constexpr std::uint8_t kPoison = 0xA5;

// A store and a decode over one slot tensor, with every optional input given.
struct SlotCalls {
  // slot_bytes 0: the format's.
  SlotCalls(const TurboQuantConfig& config, int size, std::int64_t slot_bytes = 0)
      : head_size(size),
        key(DType::kFloat32, {kTokens, kKvHeads, head_size}),
        value(DType::kFloat32, {kTokens, kKvHeads, head_size}),
        slot_mapping(DType::kInt32, {kTokens}),
        query(DType::kFloat32, {1, kQueryHeads, head_size}),
        out(DType::kFloat32, {1, kQueryHeads, head_size}),
        lse(DType::kFloat32, {1, kQueryHeads}),
        block_table(DType::kInt32, {1, 2}),
        seq_lens(DType::kInt32, {1}),
        rotation(DType::kFloat32, {head_size, head_size}),
        midpoints(DType::kFloat32, {(1 << (config.key_bits & 7)) - 1}),
        centroids(DType::kFloat32, {1 << (config.key_bits & 7)}) {
    KVCacheSpec spec;
    TurboQuantConfig stored = config;
    stored.norm_correction = true;  // no byte shows it
    spec.mode = *turboquant_mode(stored);
    spec.head_size = head_size;
    spec.num_kv_heads = kKvHeads;
    spec.block_size = kBlockSize;
    layout = *make_layout(spec);
    const std::int64_t num_blocks = 4;
    if (slot_bytes == 0) slot_bytes = layout.bytes_per_token_head;
    cache.assign(static_cast<std::size_t>(num_blocks * kBlockSize * kKvHeads * slot_bytes), kPoison);
    const Tensor kv_cache =
        Tensor::contiguous(cache.data(), DType::kUInt8, {num_blocks, kBlockSize, kKvHeads, slot_bytes});

    Random random(static_cast<std::uint64_t>(head_size));
    for (OwnedTensor* tensor : {&key, &value, &query}) tensor->fill(random.normals(tensor->view.numel()));
    std::vector<std::int64_t> slots;
    for (int t = 0; t < kTokens; ++t) slots.push_back((t < kBlockSize ? 3 : 1) * kBlockSize + t % kBlockSize);
    slot_mapping.fill_integers(slots);
    block_table.fill_integers({3, 1});
    seq_lens.fill_integers({kTokens});

    rotation.fill(rotation_table(head_size));
    if (config.key_bits != 8) {  // fp8 keys have no codebook
      centroids.fill(centroid_table(config.key_bits, head_size));
      midpoints.fill(midpoint_table(config.key_bits, head_size));
    }

    store.config = decode.config = config;
    store.key = key.view;
    store.value = value.view;
    store.kv_cache = kv_cache;
    decode.kv_cache = kv_cache;
    store.slot_mapping = slot_mapping.view;
    store.rotation = decode.rotation = rotation.view;
    store.midpoints = midpoints.view;
    decode.query = query.view;
    decode.out = out.view;
    decode.lse = lse.view;
    decode.block_table = block_table.view;
    decode.seq_lens = seq_lens.view;
    decode.softmax_scale = 0.11F;
    decode.centroids = centroids.view;
  }
  SlotCalls(const SlotCalls&) = delete;
  SlotCalls& operator=(const SlotCalls&) = delete;

  int head_size;
  KVCacheLayout layout;
  std::vector<std::uint8_t> cache;
  OwnedTensor key, value, slot_mapping, query, out, lse, block_table, seq_lens, rotation, midpoints, centroids;
  TurboQuantStoreArgs store;
  TurboQuantDecodeArgs decode;
};

constexpr TurboQuantConfig kConfigs[] = {
    {.key_bits = 8, .value_bits = 4},
    {.key_bits = 4, .value_bits = 4},
    {.key_bits = 3, .value_bits = 4},
    {.key_bits = 3, .value_bits = 3},
    {.key_bits = 4, .value_bits = 3},
    {.key_bits = 8, .value_bits = 3},
    {.key_bits = 8, .value_bits = 4, .norm_correction = false},  // fp8 keys have none
    {.key_bits = 8, .value_bits = 4, .key_e4b15 = true},
};
constexpr int kHeadSizes[] = {40, 64, 72, 96, 128, 256};

std::string name_of(const TurboQuantConfig& config) {
  return "k" + std::to_string(config.key_bits) + (config.key_e4b15 ? "_e4b15" : "") + " v" +
         std::to_string(config.value_bits);
}

// ---- modes and layers -----------------------------------------------------------------------------------------------

TEST(TurboQuant, ConfigurationsNameModes) {
  const std::pair<TurboQuantConfig, const char*> modes[] = {
      {{.key_bits = 8, .value_bits = 4}, "turboquant_k8v4"},
      {{.key_bits = 4, .value_bits = 4}, "turboquant_4bit_nc"},
      {{.key_bits = 3, .value_bits = 4}, "turboquant_k3v4_nc"},
      {{.key_bits = 3, .value_bits = 3}, "turboquant_3bit_nc"},
      {{.key_bits = 8, .value_bits = 3, .key_e4b15 = true}, "k=turboquant_k8_e4b15,v=turboquant_v3"},
  };
  for (const auto& [config, name] : modes) {
    const Result<ModeId> mode = turboquant_mode(config);
    ASSERT_TRUE(mode.ok()) << mode.status().message();
    const ModeInfo info = **mode_info(*mode);
    EXPECT_EQ(info.name, name);
    EXPECT_TRUE(info.shared_slot);
  }
}

TEST(TurboQuant, RefusesOtherConfigurations) {
  const std::pair<TurboQuantConfig, const char*> bad[] = {
      {{.key_bits = 2}, "key_bits is 2; supported: 3, 4 and 8"},
      {{.key_bits = 5}, "key_bits is 5; supported: 3, 4 and 8"},
      {{.key_bits = -4}, "key_bits is -4; supported: 3, 4 and 8"},
      {{.value_bits = 2}, "value_bits is 2; supported: 3 and 4"},
      {{.value_bits = 8}, "value_bits is 8; supported: 3 and 4"},
      {{.key_bits = 3, .norm_correction = false}, "norm_correction is off with 3-bit keys; supported: on"},
      {{.key_bits = 4, .norm_correction = false}, "norm_correction is off with 4-bit keys; supported: on"},
  };
  for (const auto& [config, words] : bad) {
    SlotCalls calls({}, 64);
    calls.store.config = calls.decode.config = config;
    const auto before = calls.cache;
    std::vector<Status> refusals = {turboquant_mode(config).status(),
                                    turboquant_decode_attention(calls.decode, nullptr)};
    if (config.norm_correction) refusals.push_back(turboquant_store(calls.store, nullptr));
    for (const Status& status : refusals) {
      EXPECT_EQ(status.code(), StatusCode::kUnsupported);
      EXPECT_NE(status.message().find(words), std::string::npos) << status.message();
    }
    EXPECT_EQ(calls.cache, before);
  }
}

// vLLM's helper is `capability < (8, 9)`.
TEST(TurboQuant, GpusBelow8_9UseE4b15) {
  const struct {
    int major, minor;
    bool uses;
  } gpus[] = {{7, 0, true}, {7, 9, true}, {8, 0, true}, {8, 6, true}, {8, 9, false}, {9, 0, false}, {10, 0, false}};
  for (const auto& [major, minor, uses] : gpus) {
    EXPECT_EQ(turboquant_uses_e4b15(major, minor), uses) << major << "." << minor;
  }
}

TEST(TurboQuant, SlotSizesAreVllms) {
  struct Expected {
    const char* mode;
    std::int64_t d64, d128, d256;
  };
  for (const Expected& expected :
       {Expected{"turboquant_k8v4", 100, 196, 388}, Expected{"turboquant_4bit_nc", 70, 134, 262},
        Expected{"turboquant_k3v4_nc", 62, 118, 230}, Expected{"turboquant_3bit_nc", 54, 102, 198}}) {
    for (const auto& [head_size, bytes] : {std::pair{64, expected.d64}, {128, expected.d128}, {256, expected.d256}}) {
      KVCacheSpec spec;
      spec.mode = mode_of(expected.mode);
      spec.head_size = head_size;
      const KVCacheLayout layout = *make_layout(spec);
      EXPECT_EQ(layout.bytes_per_token_head, bytes) << expected.mode << " " << head_size;
      EXPECT_EQ(layout.effective_head_size, bytes / 2);
      EXPECT_EQ(layout.spec.packing, KVPacking::kKVInRow);
      EXPECT_EQ(layout.v_offset, layout.k_data_bytes);
    }
  }
}

TEST(BoundarySkipLayers, FirstAndLast) {
  using Layers = std::vector<int>;
  EXPECT_EQ(boundary_skip_layers(32), (Layers{0, 1, 30, 31}));
  EXPECT_EQ(boundary_skip_layers(32, 1), (Layers{0, 31}));
  EXPECT_EQ(boundary_skip_layers(5, 2), (Layers{0, 1, 3, 4}));
  EXPECT_EQ(boundary_skip_layers(5, 9), (Layers{0, 1, 3, 4}));  // n is at most half the layers
  EXPECT_EQ(boundary_skip_layers(4, 2), (Layers{0, 1, 2, 3}));
  EXPECT_EQ(boundary_skip_layers(2), (Layers{0, 1}));
  for (int num_layers : {-1, 0, 1}) EXPECT_EQ(boundary_skip_layers(num_layers), Layers{}) << num_layers;
  for (int n : {0, -1, -100}) EXPECT_EQ(boundary_skip_layers(32, n), Layers{}) << n;
}

TEST(BoundarySkipLayers, AbsurdCountsAreHarmless) {
  using Layers = std::vector<int>;
  for (int n : {0, -1, INT_MIN}) EXPECT_EQ(boundary_skip_layers(INT_MAX, n), Layers{}) << n;
  for (int n : {2, INT_MAX, INT_MIN}) EXPECT_EQ(boundary_skip_layers(INT_MIN, n), Layers{}) << n;
  EXPECT_EQ(boundary_skip_layers(INT_MAX, 1), (Layers{0, INT_MAX - 1}));
  const Layers most = boundary_skip_layers(INT_MAX, INT_MAX);
  ASSERT_EQ(most.size(), 2U * 65536);
  EXPECT_EQ(most.front(), 0);
  EXPECT_EQ(most.back(), INT_MAX - 1);
}

// ---- the entry points -----------------------------------------------------------------------------------------------

TEST(TurboQuant, EntryPointsAreTheOps) {
  for (const TurboQuantConfig& config : kConfigs) {
    if (!(*mode_info(*turboquant_mode(config)))->compiled) continue;
    for (int head_size : kHeadSizes) {
      SCOPED_TRACE(name_of(config) + " d" + std::to_string(head_size));
      SlotCalls calls(config, head_size);
      std::vector<std::uint8_t> cache = calls.cache;
      const KVCacheViews views = make_views(calls.layout, 4, cache.data());
      Status status = turboquant_store(calls.store, nullptr);
      ASSERT_TRUE(status.ok()) << status.message();
      ReshapeAndCacheArgs store;
      store.mode = *turboquant_mode(config);
      store.key = calls.store.key;
      store.value = calls.store.value;
      store.cache.key_cache = views.key_cache;
      store.cache.value_cache = views.value_cache;
      store.slot_mapping = calls.store.slot_mapping;
      status = reshape_and_cache(store, nullptr);
      ASSERT_TRUE(status.ok()) << status.message();
      EXPECT_EQ(calls.cache, cache);

      status = turboquant_decode_attention(calls.decode, nullptr);
      ASSERT_TRUE(status.ok()) << status.message();
      OwnedTensor out(DType::kFloat32, {1, kQueryHeads, head_size});
      OwnedTensor lse(DType::kFloat32, {1, kQueryHeads});
      OwnedTensor cu_seqlens(DType::kInt32, {2});
      cu_seqlens.fill_integers({0, 1});
      UnifiedAttentionArgs read;
      read.mode = store.mode;
      read.query = calls.decode.query;
      read.out = out.view;
      read.lse = lse.view;
      read.cache.key_cache = views.key_cache;
      read.cache.value_cache = views.value_cache;
      read.cu_seqlens_q = cu_seqlens.view;
      read.seq_lens = calls.decode.seq_lens;
      read.block_table = calls.decode.block_table;
      read.softmax_scale = calls.decode.softmax_scale;
      status = unified_attention(read, nullptr);
      ASSERT_TRUE(status.ok()) << status.message();
      EXPECT_EQ(calls.out.bytes, out.bytes);
      EXPECT_EQ(calls.lse.bytes, lse.bytes);

      // The ops themselves are right: fp32 over 20 keys against double precision.
      ASSERT_TRUE(reference::unified_attention(read).ok());
      for (int h = 0; h < kQueryHeads; ++h) {
        for (int i = 0; i < head_size; ++i) ASSERT_NEAR(calls.out.get(0, h, i), out.get(0, h, i), 2e-5) << h;
      }
    }
  }
}

// A slot of odd length gets one more byte, which nobody writes. Slots that are not written keep every byte.
TEST(TurboQuant, PaddingAndUnwrittenSlotsStay) {
  bool any_padding = false;
  for (const TurboQuantConfig& config : kConfigs) {
    if (!(*mode_info(*turboquant_mode(config)))->compiled) GTEST_SKIP() << "this build leaves out " << name_of(config);
    for (int head_size : kHeadSizes) {
      SCOPED_TRACE(name_of(config) + " d" + std::to_string(head_size));
      SlotCalls calls(config, head_size);
      const std::int64_t slot_bytes = calls.layout.bytes_per_token_head;
      const std::int64_t used = calls.layout.k_data_bytes + calls.layout.v_data_bytes;
      ASSERT_EQ(slot_bytes, used + used % 2);
      any_padding = any_padding || slot_bytes > used;
      // The same store over another poison tells the bytes that were written from those that were kept.
      SlotCalls other(config, head_size);
      std::fill(other.cache.begin(), other.cache.end(), static_cast<std::uint8_t>(~kPoison));
      ASSERT_TRUE(turboquant_store(calls.store, nullptr).ok());
      ASSERT_TRUE(turboquant_store(other.store, nullptr).ok());
      for (std::int64_t n = 0; n < static_cast<std::int64_t>(calls.cache.size()); ++n) {
        const std::int64_t slot = n / (slot_bytes * kKvHeads);
        const bool stored = slot / kBlockSize == 3 || (slot / kBlockSize == 1 && slot % kBlockSize < 4);
        const bool written = calls.cache[static_cast<std::size_t>(n)] == other.cache[static_cast<std::size_t>(n)];
        ASSERT_EQ(written, stored && n % slot_bytes < used) << "byte " << n % slot_bytes << " of slot " << slot;
        if (!written) {
          ASSERT_EQ(calls.cache[static_cast<std::size_t>(n)], kPoison);
        }
      }
    }
  }
  EXPECT_TRUE(any_padding) << "no head size of the test has an odd slot";
}

// A slot may be wider than the format's, as vLLM's padded_slot is: its rows are those of an exact slot, the bytes
// behind them are not touched, and attention gives the same bits.
TEST(TurboQuant, WiderSlotsHoldTheSameRowsAndKeepTheirPadding) {
  for (const TurboQuantConfig& config : kConfigs) {
    if (!(*mode_info(*turboquant_mode(config)))->compiled) GTEST_SKIP() << "this build leaves out " << name_of(config);
    for (int head_size : kHeadSizes) {
      SlotCalls exact(config, head_size);
      ASSERT_TRUE(turboquant_store(exact.store, nullptr).ok());
      ASSERT_TRUE(turboquant_decode_attention(exact.decode, nullptr).ok());
      const std::int64_t exact_bytes = exact.layout.bytes_per_token_head;
      const std::int64_t used = exact.layout.k_data_bytes + exact.layout.v_data_bytes;
      const auto power_of_two = static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(exact_bytes) + 1));
      for (std::int64_t slot_bytes : {exact_bytes + 2, power_of_two}) {
        SCOPED_TRACE(name_of(config) + " d" + std::to_string(head_size) + " slot " + std::to_string(slot_bytes));
        SlotCalls wide(config, head_size, slot_bytes);
        const Status stored = turboquant_store(wide.store, nullptr);
        ASSERT_TRUE(stored.ok()) << stored.message();
        for (std::size_t slot = 0; slot < wide.cache.size() / static_cast<std::size_t>(slot_bytes); ++slot) {
          for (std::int64_t n = 0; n < slot_bytes; ++n) {
            const int got = wide.cache[slot * static_cast<std::size_t>(slot_bytes) + static_cast<std::size_t>(n)];
            const int expected =
                n < used ? exact.cache[slot * static_cast<std::size_t>(exact_bytes) + static_cast<std::size_t>(n)]
                         : kPoison;
            ASSERT_EQ(got, expected) << "byte " << n << " of slot " << slot;
          }
        }
        const Status read = turboquant_decode_attention(wide.decode, nullptr);
        ASSERT_TRUE(read.ok()) << read.message();
        EXPECT_EQ(wide.out.bytes, exact.out.bytes);
        EXPECT_EQ(wide.lse.bytes, exact.lse.bytes);
      }
    }
  }
}

// Norm correction is a matter of the reader; vLLM's store has no such argument.
TEST(TurboQuant, StoresTheSameBytesWithoutNormCorrection) {
  for (TurboQuantConfig config : kConfigs) {
    config.norm_correction = true;
    if (!(*mode_info(*turboquant_mode(config)))->compiled) GTEST_SKIP() << "this build leaves out " << name_of(config);
    SCOPED_TRACE(name_of(config));
    SlotCalls with(config, 64);
    config.norm_correction = false;
    SlotCalls without(config, 64);
    ASSERT_TRUE(turboquant_store(with.store, nullptr).ok());
    const Status stored = turboquant_store(without.store, nullptr);
    ASSERT_TRUE(stored.ok()) << stored.message();
    EXPECT_EQ(without.cache, with.cache);
    EXPECT_TRUE(turboquant_views(config, without.store.kv_cache, 64).ok());
    EXPECT_EQ(turboquant_decode_attention(without.decode, nullptr).ok(), config.key_bits == 8);
  }
}

// No tokens, and a cache without blocks, whose pointer may be null.
TEST(TurboQuant, EmptyCallsAreCalls) {
  QUIRE_NEEDS_MODES((*mode_info(*turboquant_mode({})))->name);
  SlotCalls calls({}, 64);
  edit_all({&calls.store.key, &calls.store.value, &calls.store.slot_mapping, &calls.decode.query, &calls.decode.out,
            &calls.decode.lse, &calls.decode.seq_lens, &calls.decode.block_table},
           [](Tensor& tensor) { tensor.shape[0] = 0; });
  edit_all({&calls.store.kv_cache, &calls.decode.kv_cache}, [](Tensor& kv_cache) {
    kv_cache.shape[0] = 0;
    kv_cache.data = nullptr;
  });
  for (const Status& status :
       {turboquant_store(calls.store, nullptr), turboquant_decode_attention(calls.decode, nullptr)}) {
    EXPECT_TRUE(status.ok()) << status.message();
  }
}

TEST(TurboQuant, TablesOfTheCallerAreOptional) {
  QUIRE_NEEDS_MODES((*mode_info(*turboquant_mode({})))->name);
  SlotCalls with({}, 64);
  SlotCalls without({}, 64);
  without.store.rotation = without.store.midpoints = without.decode.rotation = without.decode.centroids = Tensor();
  for (SlotCalls* calls : {&with, &without}) {
    ASSERT_TRUE(turboquant_store(calls->store, nullptr).ok());
    ASSERT_TRUE(turboquant_decode_attention(calls->decode, nullptr).ok());
  }
  EXPECT_EQ(with.cache, without.cache);
  EXPECT_EQ(with.out.bytes, without.out.bytes);
  // The matrix is symmetric: its transposed view is the same one.
  for (ConstTensor* rotation : {&with.store.rotation, &with.decode.rotation}) {
    std::swap(rotation->strides[0], rotation->strides[1]);
  }
  EXPECT_TRUE(turboquant_store(with.store, nullptr).ok());
  EXPECT_TRUE(turboquant_decode_attention(with.decode, nullptr).ok());
}

struct Bad {
  const char* words;
  void (*spoil)(SlotCalls& calls);
  bool of_store, of_decode;
};

float& element(OwnedTensor& tensor, int i) { return tensor.view.ptr<float>()[i]; }

const Bad kBad[] = {
    {"rotation[1, 1] is 0.125000; only the Walsh-Hadamard matrix over sqrt(64) is supported, which has -0.125000",
     [](SlotCalls& c) { element(c.rotation, 65) = 0.125F; }, true, true},
    {"rotation[0, 0] is 1.000000",  // the identity
     [](SlotCalls& c) {
       for (int i = 0; i < 64 * 64; ++i) element(c.rotation, i) = i % 65 == 0 ? 1.0F : 0.0F;
     },
     true, true},
    {"rotation[63, 63] is nan", [](SlotCalls& c) { element(c.rotation, 64 * 64 - 1) = std::nanf(""); }, true, true},
    {"rotation is", [](SlotCalls& c) { c.store.rotation.shape[1] = c.decode.rotation.shape[1] = 63; }, true, true},
    {"rotation is", [](SlotCalls& c) { c.store.rotation.dtype = c.decode.rotation.dtype = DType::kBFloat16; }, true,
     true},
    {"midpoints[7] is 0.001000; only the Lloyd-Max codebook", [](SlotCalls& c) { element(c.midpoints, 7) = 0.001F; },
     true, false},
    {"midpoints is [16] float32; expected [15], that is [2^key_bits - 1]",
     [](SlotCalls& c) { c.store.midpoints.shape[0] = 16; }, true, false},
    {"centroids[0] is", [](SlotCalls& c) { element(c.centroids, 0) *= 1.001F; }, false, true},
    {"centroids is [8] float32; expected [16], that is [2^key_bits]",
     [](SlotCalls& c) { c.decode.centroids.shape[0] = 8; }, false, true},
    {"a slot of head_size 64 has 70 bytes (34 of key, 36 of value, rounded up to even)",
     [](SlotCalls& c) { c.store.kv_cache.shape[3] = c.decode.kv_cache.shape[3] = 69; }, true, true},
    {"a slot of head_size 64 has 70 bytes",
     [](SlotCalls& c) { c.store.kv_cache.shape[3] = c.decode.kv_cache.shape[3] = 62; }, true, true},
    {"kv_cache is int8; supported: uint8",
     [](SlotCalls& c) { c.store.kv_cache.dtype = c.decode.kv_cache.dtype = DType::kInt8; }, true, true},
    {"it must have 4 dimensions, [num_blocks, block_size, num_kv_heads, slot bytes]",
     [](SlotCalls& c) { c.store.kv_cache.ndim = c.decode.kv_cache.ndim = 3; }, true, true},
    {"key is", [](SlotCalls& c) { c.store.key.ndim = 2; }, true, false},
    {"value is", [](SlotCalls& c) { c.store.value.shape[1] = 1; }, true, false},
    {"query is", [](SlotCalls& c) { c.decode.query.ndim = 2; }, false, true},
    {"rotation is a null pointer", [](SlotCalls& c) { c.store.rotation.data = c.decode.rotation.data = nullptr; }, true,
     true},
    {"rotation is on cuda:0, but the call's other tensors are on cpu",
     [](SlotCalls& c) { c.store.rotation.device = c.decode.rotation.device = Device::cuda(); }, true, true},
    {"rotation is not aligned to its element size of 4 bytes",
     [](SlotCalls& c) { c.store.rotation.data = c.decode.rotation.data = c.rotation.bytes.data() + 2; }, true, true},
    {"rotation has stride 1 in its last dimension and 128 in its first",
     [](SlotCalls& c) { c.store.rotation.strides[0] = c.decode.rotation.strides[0] = 128; }, true, true},
    {"stride 9223372036854775807",
     [](SlotCalls& c) { c.store.rotation.strides[1] = c.decode.rotation.strides[1] = INT64_MAX; }, true, true},
    {"rotation has 1000 dimensions", [](SlotCalls& c) { c.store.rotation.ndim = c.decode.rotation.ndim = 1000; }, true,
     true},
    {"rotation has -1 dimensions", [](SlotCalls& c) { c.store.rotation.ndim = c.decode.rotation.ndim = -1; }, true,
     true},
    {"rotation is [64, -64]", [](SlotCalls& c) { c.store.rotation.shape[1] = c.decode.rotation.shape[1] = -64; }, true,
     true},
    {"midpoints has 7 dimensions", [](SlotCalls& c) { c.store.midpoints.ndim = 7; }, true, false},
    {"midpoints is int32; supported: float32", [](SlotCalls& c) { c.store.midpoints.dtype = DType::kInt32; }, true,
     false},
    {"midpoints is [15, 1] float32",
     [](SlotCalls& c) {
       c.store.midpoints.ndim = 2;
       c.store.midpoints.shape[1] = 1;
     },
     true, false},
    {"midpoints is not aligned", [](SlotCalls& c) { c.store.midpoints.data = c.midpoints.bytes.data() + 1; }, true,
     false},
    {"midpoints has stride 2 in its last dimension", [](SlotCalls& c) { c.store.midpoints.strides[0] = 2; }, true,
     false},
    {"centroids has 2147483647 dimensions", [](SlotCalls& c) { c.decode.centroids.ndim = INT_MAX; }, false, true},
    {"centroids is bfloat16; supported: float32", [](SlotCalls& c) { c.decode.centroids.dtype = DType::kBFloat16; },
     false, true},
    {"centroids is not aligned", [](SlotCalls& c) { c.decode.centroids.data = c.centroids.bytes.data() + 3; }, false,
     true},
    {"centroids is on cuda:0, but the call's other tensors are on cpu",
     [](SlotCalls& c) { c.decode.centroids.device = Device::cuda(); }, false, true},
    {"kv_cache has 1000 dimensions", [](SlotCalls& c) { c.store.kv_cache.ndim = c.decode.kv_cache.ndim = 1000; }, true,
     true},
    {"kv_cache has -1 dimensions", [](SlotCalls& c) { c.store.kv_cache.ndim = c.decode.kv_cache.ndim = -1; }, true,
     true},
    {"stride 9223372036854775807",
     [](SlotCalls& c) { c.store.kv_cache.strides[3] = c.decode.kv_cache.strides[3] = INT64_MAX; }, true, true},
    {"kv_cache is a null pointer",
     [](SlotCalls& c) { c.store.kv_cache.data = nullptr, c.decode.kv_cache.data = nullptr; }, true, true},
    {"kv_cache is [4611686018427387904, 16, 2, 70]",
     [](SlotCalls& c) { c.store.kv_cache.shape[0] = c.decode.kv_cache.shape[0] = std::int64_t{1} << 62; }, true, true},
    {"key has 7 dimensions", [](SlotCalls& c) { c.store.key.ndim = 7; }, true, false},
    {"query has 7 dimensions", [](SlotCalls& c) { c.decode.query.ndim = 7; }, false, true},
    {"query is [-2, 6, 64]", [](SlotCalls& c) { c.decode.query.shape[0] = -2; }, false, true},
    {"seq_lens is [1] int32; expected [1073741824], that is [batch]",
     [](SlotCalls& c) { c.decode.query.shape[0] = 1 << 30; }, false, true},
    {"seq_lens has -3 dimensions", [](SlotCalls& c) { c.decode.seq_lens.ndim = -3; }, false, true},
    {"seq_lens is not given", [](SlotCalls& c) { c.decode.seq_lens = Tensor(); }, false, true},
    // A head size that its low 32 bits would make 64.
    {"head_size is 4294967360; supported: 32 to 512",
     [](SlotCalls& c) { c.store.key.shape[2] = c.decode.query.shape[2] = (std::int64_t{1} << 32) + 64; }, true, true},
    {"seq_lens[0] is 33", [](SlotCalls& c) { c.seq_lens.fill_integers({33}); }, false, true},
    {"slot_mapping[2] is 64", [](SlotCalls& c) { c.slot_mapping.view.ptr<std::int32_t>()[2] = 64; }, true, false},
};

TEST(TurboQuant, BadCallsAreRefusedAndWriteNothing) {
  QUIRE_NEEDS_MODES((*mode_info(*turboquant_mode({})))->name);
  for (const Bad& bad : kBad) {
    SCOPED_TRACE(bad.words);
    SlotCalls calls({}, 64);
    bad.spoil(calls);
    const auto cache = calls.cache;
    const auto out = calls.out.bytes;
    std::vector<Status> refusals;
    if (bad.of_store) refusals.push_back(turboquant_store(calls.store, nullptr));
    if (bad.of_decode) refusals.push_back(turboquant_decode_attention(calls.decode, nullptr));
    for (const Status& status : refusals) {
      EXPECT_FALSE(status.ok());
      EXPECT_NE(status.message().find(bad.words), std::string::npos) << status.message();
      EXPECT_EQ(status.message().find('\n'), std::string::npos);
    }
    EXPECT_EQ(calls.cache, cache);
    EXPECT_EQ(calls.out.bytes, out);
    EXPECT_EQ(calls.lse.bytes, std::vector<std::uint8_t>(calls.lse.bytes.size(), 0xFF));
  }
}

// cu_seqlens_q has one entry a sequence. A query that lies about the number of sequences is refused before those
// entries are allocated. (2^40 entries are 4 TiB, and filling 2^32 takes a minute.)
TEST(TurboQuant, RefusesBatchesThatCannotBeBeforeItAllocatesForThem) {
  QUIRE_NEEDS_MODES((*mode_info(*turboquant_mode({})))->name);
  for (const bool seq_lens_too : {false, true}) {
    for (const std::int64_t batch :
         {std::int64_t{1} << 31, std::int64_t{1} << 32, std::int64_t{1} << 40, std::int64_t{1} << 50}) {
      SCOPED_TRACE(batch);
      SlotCalls calls({}, 64);
      const auto out = calls.out.bytes;
      calls.decode.query.shape[0] = calls.decode.out.shape[0] = calls.decode.lse.shape[0] = batch;
      if (seq_lens_too) calls.decode.seq_lens.shape[0] = calls.decode.block_table.shape[0] = batch;
      const Status status = turboquant_decode_attention(calls.decode, nullptr);
      EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
      EXPECT_NE(status.message().find("query is [" + std::to_string(batch) + ", 6, 64]"), std::string::npos)
          << status.message();
      EXPECT_EQ(calls.out.bytes, out);
    }
  }
}

// Tensors on cuda get the sentence of the ops in a build without it.
TEST(TurboQuant, ABuildWithoutCudaSaysSo) {
  QUIRE_NEEDS_MODES("turboquant_4bit_nc");
  if (quire_with_cuda) GTEST_SKIP() << "this build has CUDA; tests/cuda runs the entry points there";
  for (const bool with_tables : {false, true}) {
    SlotCalls calls({}, 64);
    edit_all({&calls.store.key, &calls.store.value, &calls.store.kv_cache, &calls.store.slot_mapping,
              &calls.store.rotation, &calls.store.midpoints, &calls.decode.query, &calls.decode.out,
              &calls.decode.kv_cache, &calls.decode.block_table, &calls.decode.seq_lens, &calls.decode.rotation,
              &calls.decode.centroids, &calls.decode.lse},
             [](Tensor& tensor) { tensor.device = Device::cuda(); });
    if (!with_tables) {
      calls.store.rotation = calls.store.midpoints = calls.decode.rotation = calls.decode.centroids = Tensor();
    }
    for (const Status& status :
         {turboquant_store(calls.store, nullptr), turboquant_decode_attention(calls.decode, nullptr)}) {
      EXPECT_EQ(status.code(), StatusCode::kUnsupported);
      EXPECT_NE(status.message().find("device is cuda, but this build has no CUDA"), std::string::npos)
          << status.message();
    }
  }
}

// vLLM's kernels silently drop the tail of such a row.
TEST(TurboQuant, RefusesHeadSizesThatItsPackingDoesNotDivide) {
  const struct {
    TurboQuantConfig config;
    int head_size;
    const char* words;
  } bad[] = {
      {{.key_bits = 3, .value_bits = 4}, 36, "head_size must be a multiple of 8, got 36"},
      {{.key_bits = 4, .value_bits = 3}, 60, "head_size_v must be a multiple of 8, got 60"},
      {{.key_bits = 4, .value_bits = 4}, 33, "head_size must be a multiple of 2, got 33"},
      {{.key_bits = 4, .value_bits = 4}, 16, "head_size is 16; supported: 32 to 512"},
      {{.key_bits = 4, .value_bits = 4}, 1024, "head_size is 1024; supported: 32 to 512"},
  };
  for (const auto& [config, head_size, words] : bad) {
    SlotCalls calls(config, 64);
    calls.store.key.shape[2] = calls.store.value.shape[2] = calls.decode.query.shape[2] = head_size;
    const auto cache = calls.cache;
    for (const Status& status :
         {turboquant_store(calls.store, nullptr), turboquant_decode_attention(calls.decode, nullptr),
          turboquant_views(config, calls.store.kv_cache, head_size).status()}) {
      EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
      EXPECT_NE(status.message().find(words), std::string::npos) << status.message();
    }
    EXPECT_EQ(calls.cache, cache);
  }
}

// ---- mixed modes ----------------------------------------------------------------------------------------------------

TEST(MixedModes, APairOfTheTableIsThatMode) {
  for (const ModeInfo& mode : list_modes()) {
    if (mode.registered || mode.key_format == "auto") continue;
    const Result<ModeId> pair = parse_kv_cache_dtype("k=" + mode.key_format + ",v=" + mode.value_format);
    ASSERT_TRUE(pair.ok()) << pair.status().message();
    EXPECT_EQ(*pair, mode.id) << mode.name;
  }
}

TEST(MixedModes, AnyOtherPairIsComposedOnceAndNotListed) {
  const std::size_t num_listed = list_modes().size();
  const std::string name = "k=int2_per_token_head,v=float16";
  const Result<ModeId> first = parse_kv_cache_dtype(name);
  ASSERT_TRUE(first.ok()) << first.status().message();
  EXPECT_EQ(*parse_kv_cache_dtype(name), *first);
  const ModeInfo info = **mode_info(*first);
  EXPECT_EQ(info.name, name);
  EXPECT_EQ(info.key_format, "int2_per_token_head");
  EXPECT_EQ(info.value_format, "float16");
  EXPECT_TRUE(info.composed);
  EXPECT_EQ(info.compiled, modes_built({"k=int2_per_token_head,v=int2_per_token_head", "float16"}));
  EXPECT_FALSE(info.shared_slot);
  EXPECT_FALSE(info.kv_quant_mode.has_value());
  EXPECT_EQ(list_modes().size(), num_listed);
  for (const ModeInfo& mode : list_modes()) EXPECT_FALSE(mode.composed) << mode.name;
}

// K and V share a slot where V keeps its metadata in its row and K needs no scale cache.
TEST(MixedModes, WhoSharesASlot) {
  for (const auto& [name, shared] : {std::pair{"k=turboquant_k4,v=turboquant_v3", true},
                                     {"k=bfloat16,v=turboquant_v4", true},
                                     {"k=int8_per_token_head,v=turboquant_v3", false},
                                     {"k=turboquant_k4,v=int4_per_token_head", false},
                                     {"k=turboquant_k4,v=bfloat16", false}}) {
    EXPECT_EQ((*mode_info(mode_of(name)))->shared_slot, shared) << name;
  }
}

TEST(MixedModes, RefusesWhatIsNoPairOfFormats) {
  for (const char* name :
       {"k=int3,v=int4_per_token_head", "k=int4_per_token_head,v=", "k=,v=", "k=int4_per_token_head",
        "k=int4_per_token_head v=int4_per_token_head", "k=auto,v=int4_per_token_head",
        "k=int8_per_token_head,v=int4_per_token_head,", "k= int8_per_token_head,v=int4_per_token_head"}) {
    const Result<ModeId> mode = parse_kv_cache_dtype(name);
    ASSERT_FALSE(mode.ok()) << name;
    EXPECT_EQ(mode.status().code(), StatusCode::kNotFound);
    const std::string message = mode.status().message();
    EXPECT_NE(message.find("kv_cache_dtype '" + std::string(name) + "' is not k=<format>,v=<format>"),
              std::string::npos)
        << message;
    for (const char* format : {"int4_per_token_head", "turboquant_k8_e4b15", "turboquant_v3"}) {
      EXPECT_NE(message.find(format), std::string::npos) << message;
    }
  }
  // The sentence for an unknown mode says that pairs exist.
  EXPECT_NE(parse_kv_cache_dtype("int3").status().message().find("k=<format>,v=<format>"), std::string::npos);
}

// Both ops; the case stores through reshape_and_cache and holds unified_attention against the oracle.
TEST(MixedModes, BothOpsMatchTheOracle) {
  std::uint64_t seed = 0;
  for (const char* mode :
       {"k=int8_per_token_head,v=turboquant_v3", "k=bfloat16,v=int4_per_token_head", "k=bfloat16,v=turboquant_v4",
        "k=turboquant_k3,v=int2_per_token_head", "k=fp8_per_token_head,v=turboquant_v3",
        "k=turboquant_k8_e4b15,v=turboquant_v4", "k=int4_per_token_head,v=fp8", "k=int2_per_token_head,v=float32"}) {
    if (!modes_built({mode})) continue;
    for (int head_size : {64, 96}) {
      for (Layout layout : kAllLayouts) {
        // A key row that ends with an fp16 leaves no place for an fp32 scale behind it.
        const bool one_row =
            layout == Layout::kPackedInline || layout == Layout::kPackedInlineNhd || layout == Layout::kLayerPages;
        if (std::string_view(mode).starts_with("k=turboquant_k3,v=int2") && one_row) continue;
        AttentionCase::Options options;
        options.mode = mode;
        options.head_size = head_size;
        options.layout = layout;
        options.sinks = seed % 2 == 1;
        options.alibi = seed % 3 == 1;
        options.window = seed % 4 == 1 ? 20 : -1;
        options.softcap = seed % 5 == 1 ? 15.0F : 0.0F;
        options.seed = ++seed;
        AttentionCase problem(options);
        ASSERT_TRUE(problem.check(static_cast<int>(seed % 3)));
      }
    }
  }
}

}  // namespace
}  // namespace quire::testing
