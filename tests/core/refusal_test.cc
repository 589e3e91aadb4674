// The table of bad calls. Each gets one sentence that names the argument and what came, and leaves caches, outputs and
// LSE as they were.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "call/plan_data.h"
#include "cuda/device_memory.h"
#include "format/build_config.h"
#include "support/attention_case.h"
#include "support/modes.h"
#include "support/owned_tensor.h"
#include "support/paged_cache.h"
#include "support/random.h"

namespace quire::testing {
namespace {

// Whether it is one sentence: it starts with a word, has no line break, and is long enough to help.
void expect_sentence(const Status& status) {
  const std::string& message = status.message();
  EXPECT_GT(message.size(), 20U) << message;
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  EXPECT_NE(message.back(), '.') << message;
}

// ---- reshape_and_cache ----------------------------------------------------------------------------------------------

struct StoreCall {
  StoreCall(const std::string& mode, DType dtype)
      : cache({.mode = mode, .head_size_v = 96}),
        key(dtype, {6, 2, 64}),
        value(dtype, {6, 2, 96}),
        slots(DType::kInt64, {6}),
        scale(DType::kFloat32, {4}) {
    Random random(1);
    key.fill(random.normals(key.view.numel()));
    value.fill(random.normals(value.view.numel()));
    slots.fill_integers({0, 5, -1, 17, 99, 3});
    scale.fill({1, 1, 1, 1});
    cache.apply(args);
    args.key = key.view;
    args.value = value.view;
    args.slot_mapping = slots.view;
  }

  PagedCache cache;
  OwnedTensor key, value, slots, scale;
  ReshapeAndCacheArgs args;
};

struct BadStore {
  const char* mode;
  StatusCode code;
  const char* words;
  void (*spoil)(StoreCall& call);
};

constexpr StatusCode kInvalid = StatusCode::kInvalidArgument;
constexpr std::int64_t kHuge = std::int64_t{1} << 62;
constexpr std::int64_t kMostInt64 = std::numeric_limits<std::int64_t>::max();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

const BadStore kBadStores[] = {
    {"int4_per_token_head", StatusCode::kNotFound, "mode id -5",
     [](StoreCall& c) { c.args.mode = static_cast<ModeId>(-5); }},
    {"int4_per_token_head", kInvalid, "key is not given", [](StoreCall& c) { c.args.key = Tensor(); }},
    {"int4_per_token_head", kInvalid, "value is not given", [](StoreCall& c) { c.args.value = Tensor(); }},
    {"int4_per_token_head", kInvalid, "slot_mapping is not given",
     [](StoreCall& c) { c.args.slot_mapping = Tensor(); }},
    {"int4_per_token_head", kInvalid, "key_cache is not given",
     [](StoreCall& c) { c.args.cache.key_cache = Tensor(); }},
    {"int4_per_token_head", kInvalid, "value_cache is not given",
     [](StoreCall& c) { c.args.cache.value_cache = Tensor(); }},
    {"int4_per_token_head", kInvalid, "k_scale_cache is not given",
     [](StoreCall& c) { c.args.cache.k_scale_cache = Tensor(); }},
    {"int2_per_token_head", kInvalid, "v_scale_cache is not given",
     [](StoreCall& c) { c.args.cache.v_scale_cache = Tensor(); }},
    {"int8_per_token_head", kInvalid, "k_scale_cache is a null pointer",
     [](StoreCall& c) { c.args.cache.k_scale_cache.data = nullptr; }},
    {"int8_per_token_head", kInvalid, "k_scale_cache is float16",
     [](StoreCall& c) { c.args.cache.k_scale_cache.dtype = DType::kFloat16; }},
    {"int8_per_token_head", kInvalid, "v_scale_cache is",
     [](StoreCall& c) { c.args.cache.v_scale_cache.shape[2] = 3; }},
    {"int8_per_token_head", kInvalid, "k_scale_cache is not aligned",
     [](StoreCall& c) { c.args.cache.k_scale_cache.data = c.args.cache.k_scale_cache.ptr<std::uint8_t>() + 2; }},
    {"bfloat16", kInvalid, "k_scale_cache is given", [](StoreCall& c) { c.args.cache.k_scale_cache = c.scale.view; }},
    {"int4_per_token_head", kInvalid, "key is int8", [](StoreCall& c) { c.args.key.dtype = DType::kInt8; }},
    {"int4_per_token_head", kInvalid, "key is float8_e4m3fn",
     [](StoreCall& c) { c.args.key.dtype = DType::kFloat8E4M3; }},
    {"fp8", kInvalid, "value is float8_e5m2", [](StoreCall& c) { c.args.value.dtype = DType::kFloat8E5M2; }},
    {"int4_per_token_head", kInvalid, "slot_mapping is float32",
     [](StoreCall& c) { c.args.slot_mapping.dtype = DType::kFloat32; }},
    {"int4_per_token_head", kInvalid, "key_cache is int8",
     [](StoreCall& c) { c.args.cache.key_cache.dtype = DType::kInt8; }},
    {"fp8", kInvalid, "key_cache is float8_e5m2",
     [](StoreCall& c) { c.args.cache.key_cache.dtype = DType::kFloat8E5M2; }},
    {"float16", kInvalid, "key_cache is bfloat16",
     [](StoreCall& c) { c.args.cache.key_cache.dtype = DType::kBFloat16; }},
    {"auto", kInvalid, "key_cache is int8", [](StoreCall& c) { c.args.cache.key_cache.dtype = DType::kInt8; }},
    {"int4_per_token_head", kInvalid, "3 dimensions", [](StoreCall& c) { c.args.key.ndim = 2; }},
    {"int4_per_token_head", kInvalid, "value is", [](StoreCall& c) { c.args.value.shape[0] = 5; }},
    {"int4_per_token_head", kInvalid, "value is", [](StoreCall& c) { c.args.value.shape[1] = 1; }},
    {"int4_per_token_head", kInvalid, "key_cache is", [](StoreCall& c) { c.args.cache.key_cache.shape[3] = 64; }},
    {"int4_per_token_head", kInvalid, "value_cache is", [](StoreCall& c) { c.args.cache.value_cache.shape[0] = 7; }},
    {"int4_per_token_head", kInvalid, "value_cache is", [](StoreCall& c) { c.args.cache.value_cache.shape[1] = 8; }},
    {"int4_per_token_head", kInvalid, "key_cache is", [](StoreCall& c) { c.args.cache.key_cache.shape[2] = 1; }},
    {"int4_per_token_head", kInvalid, "head_size is 16", [](StoreCall& c) { c.args.key.shape[2] = 16; }},
    {"int4_per_token_head", kInvalid, "head_size_v is 1024", [](StoreCall& c) { c.args.value.shape[2] = 1024; }},
    {"int4_per_token_head", kInvalid, "head_size must be a multiple of 2, got 63",
     [](StoreCall& c) { c.args.key.shape[2] = 63; }},
    {"int2_per_token_head", kInvalid, "head_size_v must be a multiple of 4, got 94",
     [](StoreCall& c) { c.args.value.shape[2] = 94; }},
    {"int4_per_token_head", kInvalid, "key_cache has stride 2",
     [](StoreCall& c) { c.args.cache.key_cache.strides[3] = 2; }},
    {"int4_per_token_head", kInvalid, "key is a null pointer", [](StoreCall& c) { c.args.key.data = nullptr; }},
    {"int4_per_token_head", kInvalid, "key is not aligned",
     [](StoreCall& c) { c.args.key.data = c.args.key.ptr<const std::uint8_t>() + 1; }},
    {"int4_per_token_head", kInvalid, "value is on cuda:0, but key is on cpu",
     [](StoreCall& c) { c.args.value.device = Device::cuda(); }},
    {"int4_per_token_head", kInvalid, "value is on cpu, but key is on cuda:0",
     [](StoreCall& c) { c.args.key.device = Device::cuda(); }},
    {"int4_per_token_head", kInvalid, "key is on cpu:3", [](StoreCall& c) { c.args.key.device.index = 3; }},
    {"int4_per_token_head", kInvalid, "value is on cuda:1, but key is on cuda:0",
     [](StoreCall& c) {
       c.args.key.device = Device::cuda(0);
       c.args.value.device = Device::cuda(1);
     }},
    {"int4_per_token_head", kInvalid, "key is on an unknown device",
     [](StoreCall& c) { c.args.key.device.type = static_cast<DeviceType>(7); }},
    {"int4_per_token_head", kInvalid, "key is unknown; supported",
     [](StoreCall& c) { c.args.key.dtype = static_cast<DType>(77); }},
    // Extents whose product wraps to 0 do not make a tensor empty.
    {"int4_per_token_head", kInvalid, "key is [4611686018427387904, 2, 64] float32; the product of its extents",
     [](StoreCall& c) {
       c.args.key.shape[0] = c.args.value.shape[0] = kHuge;
       c.args.key.data = c.args.value.data = nullptr;
     }},
    {"int4_per_token_head", kInvalid, "key_cache is [4611686018427387904",
     [](StoreCall& c) {
       for (Tensor* cache : {&c.args.cache.key_cache, &c.args.cache.value_cache, &c.args.cache.k_scale_cache,
                             &c.args.cache.v_scale_cache}) {
         cache->shape[0] = kHuge;
         cache->data = nullptr;
       }
     }},
    {"int4_per_token_head", kInvalid, "stride 9223372036854775807 in dimension 0",
     [](StoreCall& c) { c.args.key.strides[0] = kMostInt64; }},
    {"int4_per_token_head", kInvalid, "with stride -9223372036854775808 in dimension 1",
     [](StoreCall& c) { c.args.cache.value_cache.strides[1] = std::numeric_limits<std::int64_t>::min(); }},
    {"int4_per_token_head", kInvalid, "num_kv_heads must be between 0 and 2147483647",
     [](StoreCall& c) {
       c.args.key.shape[1] = c.args.value.shape[1] = std::int64_t{1} << 32;
       c.args.key.strides[1] = c.args.value.strides[1] = 0;
     }},
    {"int4_per_token_head", kInvalid, "key_cache is [8, 0, 2, 32] uint8; block_size must be between 1 and 2147483647",
     [](StoreCall& c) {
       for (Tensor* cache : {&c.args.cache.key_cache, &c.args.cache.value_cache, &c.args.cache.k_scale_cache,
                             &c.args.cache.v_scale_cache})
         cache->shape[1] = 0;
       c.slots.fill_integers({-1, -1, -1, -1, -1, -1});
     }},
    {"int4_per_token_head", StatusCode::kOutOfRange, "the cache has 0 blocks of 16, no slots",
     [](StoreCall& c) {
       for (Tensor* cache : {&c.args.cache.key_cache, &c.args.cache.value_cache, &c.args.cache.k_scale_cache,
                             &c.args.cache.v_scale_cache})
         cache->shape[0] = 0;
     }},
    // What is written must not overlap itself.
    {"int4_per_token_head", kInvalid, "key_cache is [8, 16, 2, 32] uint8 with strides [0, 64, 32, 1]",
     [](StoreCall& c) { c.args.cache.key_cache.strides[0] = 0; }},
    {"int4_per_token_head", kInvalid, "value_cache is", [](StoreCall& c) { c.args.cache.value_cache.strides[1] = 95; }},
    {"int4_per_token_head", kInvalid, "k_scale_cache is",
     [](StoreCall& c) { c.args.cache.k_scale_cache.strides[2] = 0; }},
    {"int4_per_token_head", kInvalid, "v_scale_cache is",
     [](StoreCall& c) { c.args.cache.v_scale_cache.strides[1] = 1; }},
    {"int4_per_token_head", kInvalid, "slot_mapping has 7 entries",
     [](StoreCall& c) { c.args.slot_mapping.shape[0] = 7; }},
    {"int4_per_token_head", StatusCode::kOutOfRange, "slot_mapping[4] is 128",
     [](StoreCall& c) { c.slots.view.ptr<std::int64_t>()[4] = 128; }},
    {"int4_per_token_head", StatusCode::kOutOfRange, "slot_mapping[5] is 9223372036854775807",
     [](StoreCall& c) { c.slots.view.ptr<std::int64_t>()[5] = std::numeric_limits<std::int64_t>::max(); }},
    {"int4_per_token_head", kInvalid, "k_scale is given", [](StoreCall& c) { c.args.k_scale = c.scale.view; }},
    {"fp8", kInvalid, "k_scale is", [](StoreCall& c) { c.args.k_scale = c.scale.view; }},
    {"fp8", kInvalid, "v_scale is",
     [](StoreCall& c) {
       c.args.v_scale = Tensor::contiguous(c.scale.view.data, DType::kFloat32, {2, 2});
     }},
    {"fp8", kInvalid, "v_scale is float16",
     [](StoreCall& c) { c.args.v_scale = Tensor::contiguous(c.scale.view.data, DType::kFloat16, {1}); }},
    {"fp8", kInvalid, "k_scale is not aligned",
     [](StoreCall& c) {
       c.args.k_scale = Tensor::contiguous(c.scale.view.ptr<std::uint8_t>() + 2, DType::kFloat32, {1});
     }},
    {"fp8", kInvalid, "k_scale has -1 dimensions",
     [](StoreCall& c) {
       c.args.k_scale = c.scale.view;
       c.args.k_scale.ndim = -1;
     }},
    {"int4_per_token_head", kInvalid, "error_counter is given",
     [](StoreCall& c) { c.args.error_counter = Tensor::contiguous(c.slots.view.data, DType::kInt64, {1}); }},
    // The head-major layout is for formats of one element per unit without metadata.
    {"int4_per_token_head", kInvalid, "head-major layout",
     [](StoreCall& c) {
       c.args.cache.key_cache = Tensor::contiguous(c.args.cache.key_cache.data, DType::kUInt8, {2, 2, 8, 4, 4});
     }},
    {"bfloat16", kInvalid, "must divide head_size 64",
     [](StoreCall& c) {
       c.args.cache.key_cache = Tensor::contiguous(c.args.cache.key_cache.data, DType::kBFloat16, {2, 2, 12, 4, 5});
     }},
    {"bfloat16", kInvalid, "value_cache is",
     [](StoreCall& c) {
       c.args.cache.key_cache = Tensor::contiguous(c.args.cache.key_cache.data, DType::kBFloat16, {2, 2, 8, 16, 8});
     }},
};

TEST(Refusals, BadStores) {
  for (const BadStore& bad : kBadStores) {
    if (!modes_built({bad.mode})) continue;
    SCOPED_TRACE(std::string(bad.mode) + ": " + bad.words);
    StoreCall call(bad.mode, DType::kFloat32);
    const std::vector<std::vector<std::uint8_t>> before = call.cache.bytes();
    bad.spoil(call);
    const Status status = reshape_and_cache(call.args, nullptr);
    ASSERT_FALSE(status.ok());
    EXPECT_EQ(status.code(), bad.code) << status.message();
    EXPECT_NE(status.message().find(bad.words), std::string::npos) << status.message();
    expect_sentence(status);
    EXPECT_EQ(call.cache.bytes(), before) << "a refused call wrote";
  }
}

TEST(Refusals, TheUnspoiledStoreIsAccepted) {
  for (const BadStore& bad : kBadStores) {
    if (!modes_built({bad.mode})) continue;
    StoreCall call(bad.mode, DType::kFloat32);
    const Status status = reshape_and_cache(call.args, nullptr);
    EXPECT_TRUE(status.ok()) << bad.mode << ": " << status.message();
  }
}

// ---- unified_attention ----------------------------------------------------------------------------------------------

struct BadRead {
  const char* mode;
  StatusCode code;
  const char* words;
  void (*spoil)(AttentionCase& call);
};

template <class T>
T& first(OwnedTensor& tensor) {
  return tensor.view.ptr<T>()[0];
}

// Prefix lengths and a window of R-SWA that are accepted.
void give_prefixes(AttentionCase& c) {
  c.args.mask.rswa_prefix_lens = c.seq_lens.view;
  c.args.mask.rswa_window = 8;
}

const BadRead kBadReads[] = {
    {"int4_per_token_head", StatusCode::kNotFound, "mode id 2000000",
     [](AttentionCase& c) { c.args.mode = static_cast<ModeId>(2000000); }},
    {"int4_per_token_head", kInvalid, "query is not given", [](AttentionCase& c) { c.args.query = Tensor(); }},
    {"int4_per_token_head", kInvalid, "out is not given", [](AttentionCase& c) { c.args.out = Tensor(); }},
    {"int4_per_token_head", kInvalid, "key_cache is", [](AttentionCase& c) { c.args.cache.key_cache = Tensor(); }},
    {"int4_per_token_head", kInvalid, "k_scale_cache is not given",
     [](AttentionCase& c) { c.args.cache.k_scale_cache = Tensor(); }},
    {"int4_per_token_head", kInvalid, "v_scale_cache is a null pointer",
     [](AttentionCase& c) { c.args.cache.v_scale_cache.data = nullptr; }},
    {"fp8", kInvalid, "v_scale_cache is given",
     [](AttentionCase& c) {
       c.args.cache.v_scale_cache = Tensor::contiguous(c.seq_lens.view.data, DType::kFloat32, {1});
     }},
    {"int4_per_token_head", kInvalid, "cu_seqlens_q is not given",
     [](AttentionCase& c) { c.args.cu_seqlens_q = Tensor(); }},
    {"int4_per_token_head", kInvalid, "seq_lens is not given", [](AttentionCase& c) { c.args.seq_lens = Tensor(); }},
    {"int4_per_token_head", kInvalid, "block_table is not given",
     [](AttentionCase& c) { c.args.block_table = Tensor(); }},
    {"int4_per_token_head", kInvalid, "query is int8", [](AttentionCase& c) { c.args.query.dtype = DType::kInt8; }},
    {"int4_per_token_head", kInvalid, "out is float8_e5m2",
     [](AttentionCase& c) { c.args.out.dtype = DType::kFloat8E5M2; }},
    {"int4_per_token_head", kInvalid, "key_cache is float8_e4m3fn",
     [](AttentionCase& c) { c.args.cache.key_cache.dtype = DType::kFloat8E4M3; }},
    {"int4_per_token_head", kInvalid, "cu_seqlens_q is int64",
     [](AttentionCase& c) { c.args.cu_seqlens_q.dtype = DType::kInt64; }},
    {"int4_per_token_head", kInvalid, "block_table is uint8",
     [](AttentionCase& c) { c.args.block_table.dtype = DType::kUInt8; }},
    {"int4_per_token_head", kInvalid, "out is", [](AttentionCase& c) { c.args.out.shape[0] -= 1; }},
    {"int4_per_token_head", kInvalid, "out is", [](AttentionCase& c) { c.args.out.shape[1] = 2; }},
    {"int4_per_token_head", kInvalid, "head_size is 20", [](AttentionCase& c) { c.args.query.shape[2] = 20; }},
    {"int2_per_token_head", kInvalid, "head_size must be a multiple of 4, got 62",
     [](AttentionCase& c) { c.args.query.shape[2] = 62; }},
    {"int4_per_token_head", kInvalid, "value_cache is", [](AttentionCase& c) { c.args.out.shape[2] = 62; }},
    {"int4_per_token_head", kInvalid, "multiple of KV heads",
     [](AttentionCase& c) { c.args.query.shape[1] = c.args.out.shape[1] = 3; }},
    {"int4_per_token_head", kInvalid, "value_cache is",
     [](AttentionCase& c) { c.args.cache.value_cache.shape[2] = 1; }},
    {"int4_per_token_head", kInvalid, "value_cache is",
     [](AttentionCase& c) { c.args.cache.value_cache.shape[1] = 8; }},
    {"int4_per_token_head", kInvalid, "seq_lens is", [](AttentionCase& c) { c.args.seq_lens.shape[0] = 2; }},
    {"int4_per_token_head", kInvalid, "block_table is", [](AttentionCase& c) { c.args.block_table.shape[0] = 2; }},
    {"int4_per_token_head", kInvalid, "cu_seqlens_q is empty",
     [](AttentionCase& c) { c.args.cu_seqlens_q.shape[0] = 0; }},
    {"int4_per_token_head", kInvalid, "query has stride 3", [](AttentionCase& c) { c.args.query.strides[2] = 3; }},
    {"int4_per_token_head", kInvalid, "out has stride 2", [](AttentionCase& c) { c.args.out.strides[2] = 2; }},
    {"int4_per_token_head", kInvalid, "query is not aligned",
     [](AttentionCase& c) { c.args.query.data = c.args.query.ptr<const std::uint8_t>() + 2; }},
    {"int4_per_token_head", kInvalid, "seq_lens is on cuda:0",
     [](AttentionCase& c) { c.args.seq_lens.device = Device::cuda(); }},
    {"int4_per_token_head", kInvalid, "out is on cpu, but query is on cuda:0",
     [](AttentionCase& c) { c.args.query.device = Device::cuda(); }},
    {"int4_per_token_head", kInvalid, "query is [4611686018427387904, 4, 64] float32; the product of its extents",
     [](AttentionCase& c) {
       c.args.query.shape[0] = c.args.out.shape[0] = kHuge;
       c.args.query.data = c.args.out.data = nullptr;
     }},
    {"int4_per_token_head", kInvalid, "key_cache is [4611686018427387904",
     [](AttentionCase& c) {
       for (ConstTensor* cache : {&c.args.cache.key_cache, &c.args.cache.value_cache, &c.args.cache.k_scale_cache,
                                  &c.args.cache.v_scale_cache}) {
         cache->shape[0] = kHuge;
         cache->data = nullptr;
       }
     }},
    {"int4_per_token_head", kInvalid, "out is", [](AttentionCase& c) { c.args.out.strides[0] = kMostInt64; }},
    {"int4_per_token_head", kInvalid, "num_q_heads must be between 0 and 2147483647",
     [](AttentionCase& c) {
       c.args.query.shape[1] = c.args.out.shape[1] = (std::int64_t{1} << 32) + 4;
       c.args.query.strides[1] = 0;
       c.args.out.strides[0] = std::int64_t{1} << 40;
     }},
    {"int4_per_token_head", kInvalid, "batch must be between 0 and 2147483647",
     [](AttentionCase& c) {
       c.args.cu_seqlens_q.shape[0] = (std::int64_t{1} << 32) + 1;
       c.args.seq_lens.shape[0] = c.args.block_table.shape[0] = std::int64_t{1} << 32;
     }},
    {"int4_per_token_head", kInvalid, "block_size must be between 1 and 2147483647",
     [](AttentionCase& c) {
       for (ConstTensor* cache : {&c.args.cache.key_cache, &c.args.cache.value_cache, &c.args.cache.k_scale_cache,
                                  &c.args.cache.v_scale_cache})
         cache->shape[1] = std::int64_t{1} << 31;
     }},
    {"int4_per_token_head", kInvalid, "num_kv_heads must be between 1 and 2147483647",
     [](AttentionCase& c) { c.args.cache.key_cache.shape[2] = (std::int64_t{1} << 32) + 2; }},
    {"int4_per_token_head", kInvalid, "num_ranges must be between 0 and 2147483647",
     [](AttentionCase& c) {
       c.args.mask.mm_prefix_range =
           Tensor::contiguous(c.query.view.data, DType::kInt32, {3, std::int64_t{1} << 32, 2});
     }},
    {"int4_per_token_head", StatusCode::kOutOfRange, "the cache has no blocks",
     [](AttentionCase& c) {
       for (ConstTensor* cache : {&c.args.cache.key_cache, &c.args.cache.value_cache, &c.args.cache.k_scale_cache,
                                  &c.args.cache.v_scale_cache})
         cache->shape[0] = 0;
     }},
    {"int4_per_token_head", StatusCode::kOutOfRange,
     "block_table holds 9223372036854775807 blocks of 16 per sequence, 0 to 2147483647 keys",
     [](AttentionCase& c) {
       c.args.cu_seqlens_q.shape[0] = 2;
       c.args.seq_lens.shape[0] = 1;
       c.args.block_table.shape[0] = 1;
       c.args.block_table.shape[1] = kMostInt64;
       c.args.block_table.strides[1] = 0;
       first<std::int32_t>(c.seq_lens) = -1;
     }},
    {"int4_per_token_head", kInvalid, "out is [18, 4, 64] float32 with strides [0, 68, 1]",
     [](AttentionCase& c) { c.args.out.strides[0] = 0; }},
    {"int4_per_token_head", kInvalid, "where elements overlap", [](AttentionCase& c) { c.args.out.strides[1] = 63; }},
    {"int4_per_token_head", kInvalid, "lse is", [](AttentionCase& c) { c.args.lse.strides[1] = 0; }},
    {"int4_per_token_head", kInvalid, "softmax_scale is 0.000000; it is required",
     [](AttentionCase& c) { c.args.softmax_scale = UnifiedAttentionArgs().softmax_scale; }},
    {"int4_per_token_head", kInvalid, "softmax_scale is -0.000000",
     [](AttentionCase& c) { c.args.softmax_scale = -0.0F; }},
    {"int4_per_token_head", kInvalid, "softmax_scale is nan", [](AttentionCase& c) { c.args.softmax_scale = kNan; }},
    {"int4_per_token_head", kInvalid, "softmax_scale is -inf", [](AttentionCase& c) { c.args.softmax_scale = -kInf; }},
    {"int4_per_token_head", kInvalid, "softcap is inf", [](AttentionCase& c) { c.args.softcap = kInf; }},
    {"int4_per_token_head", kInvalid, "sinks[2] is inf",
     [](AttentionCase& c) {
       c.sinks = OwnedTensor(DType::kFloat32, {4});
       c.sinks.fill({-kInf, 0, kInf, 0});
       c.args.sinks = c.sinks.view;
     }},
    {"int4_per_token_head", kInvalid, "sinks[3] is nan",
     [](AttentionCase& c) {
       c.sinks = OwnedTensor(DType::kFloat32, {4});
       c.sinks.fill({0, 0, 0, kNan});
       c.args.sinks = c.sinks.view;
     }},
    {"int4_per_token_head", kInvalid, "chunk_lookback is 2147483647 with sliding_window 2147483647",
     [](AttentionCase& c) {
       c.args.mask.chunk_lookback = c.args.mask.sliding_window = std::numeric_limits<int>::max();
     }},
    {"int4_per_token_head", kInvalid, "v_descale is not aligned",
     [](AttentionCase& c) {
       c.args.v_descale = Tensor::contiguous(c.seq_lens.view.ptr<std::uint8_t>() + 2, DType::kFloat32, {1});
     }},
    {"int4_per_token_head", kInvalid, "k_descale has -1 dimensions",
     [](AttentionCase& c) {
       c.args.k_descale = Tensor::contiguous(c.seq_lens.view.data, DType::kFloat32, {1});
       c.args.k_descale.ndim = -1;
     }},
    {"int4_per_token_head", kInvalid, "output_scale is not aligned",
     [](AttentionCase& c) {
       c.args.out.dtype = DType::kFloat8E4M3;
       c.args.output_scale = Tensor::contiguous(c.seq_lens.view.ptr<std::uint8_t>() + 1, DType::kFloat32, {1});
     }},
    {"int4_per_token_head", kInvalid, "sliding_window is 0", [](AttentionCase& c) { c.args.mask.sliding_window = 0; }},
    {"int4_per_token_head", kInvalid, "sliding_window is -2",
     [](AttentionCase& c) { c.args.mask.sliding_window = -2; }},
    {"int4_per_token_head", kInvalid, "chunk_lookback is 1 with sliding_window -1",
     [](AttentionCase& c) { c.args.mask.chunk_lookback = 1; }},
    {"int4_per_token_head", kInvalid, "chunk_lookback is 4 with sliding_window 4",
     [](AttentionCase& c) {
       c.args.mask.chunk_lookback = 4;
       c.args.mask.sliding_window = 4;
     }},
    {"int4_per_token_head", kInvalid, "chunk_lookback is -3",
     [](AttentionCase& c) { c.args.mask.chunk_lookback = -3; }},
    {"int4_per_token_head", kInvalid, "rswa_window is 0; supported: 1 and more, or -1 for none",
     [](AttentionCase& c) { c.args.mask.rswa_window = 0; }},
    {"int4_per_token_head", kInvalid, "rswa_window is -2",
     [](AttentionCase& c) {
       give_prefixes(c);
       c.args.mask.rswa_window = -2;
     }},
    {"int4_per_token_head", kInvalid, "rswa_prefix_lens is not given with rswa_window 8; the two go together",
     [](AttentionCase& c) { c.args.mask.rswa_window = 8; }},
    {"int4_per_token_head", kInvalid, "rswa_prefix_lens is [3] int32 with rswa_window -1; the two go together",
     [](AttentionCase& c) {
       give_prefixes(c);
       c.args.mask.rswa_window = -1;
     }},
    {"int4_per_token_head", kInvalid, "rswa_window is 8 with sliding_window 4",
     [](AttentionCase& c) {
       give_prefixes(c);
       c.args.mask.sliding_window = 4;
     }},
    {"int4_per_token_head", kInvalid, "rswa_window is 8 with sliding_window 4",
     [](AttentionCase& c) {
       give_prefixes(c);
       c.args.mask.sliding_window = 4;
       c.args.mask.chunk_lookback = 1;
     }},
    {"int4_per_token_head", kInvalid, "rswa_prefix_lens is",
     [](AttentionCase& c) {
       give_prefixes(c);
       c.args.mask.rswa_prefix_lens.shape[0] = 2;
     }},
    {"int4_per_token_head", kInvalid, "rswa_prefix_lens is [3, 1] int32",
     [](AttentionCase& c) {
       give_prefixes(c);
       c.args.mask.rswa_prefix_lens = Tensor::contiguous(c.query.view.data, DType::kInt32, {3, 1});
     }},
    {"int4_per_token_head", kInvalid, "rswa_prefix_lens is int64",
     [](AttentionCase& c) {
       give_prefixes(c);
       c.args.mask.rswa_prefix_lens.dtype = DType::kInt64;
     }},
    {"int4_per_token_head", kInvalid, "rswa_prefix_lens is on cuda:0",
     [](AttentionCase& c) {
       give_prefixes(c);
       c.args.mask.rswa_prefix_lens.device = Device::cuda();
     }},
    {"int4_per_token_head", kInvalid, "rswa_prefix_lens is not aligned",
     [](AttentionCase& c) {
       give_prefixes(c);
       c.args.mask.rswa_prefix_lens.data = c.query.view.ptr<std::uint8_t>() + 2;
     }},
    {"int4_per_token_head", kInvalid, "softcap is -1", [](AttentionCase& c) { c.args.softcap = -1.0F; }},
    {"int4_per_token_head", kInvalid, "softcap is",
     [](AttentionCase& c) { c.args.softcap = std::numeric_limits<float>::quiet_NaN(); }},
    {"int4_per_token_head", kInvalid, "use_alibi_sqrt is set", [](AttentionCase& c) { c.args.use_alibi_sqrt = true; }},
    {"int4_per_token_head", kInvalid, "sinks is",
     [](AttentionCase& c) { c.args.sinks = Tensor::contiguous(c.query.view.data, DType::kFloat32, {3}); }},
    {"int4_per_token_head", kInvalid, "sinks is bfloat16",
     [](AttentionCase& c) { c.args.sinks = Tensor::contiguous(c.query.view.data, DType::kBFloat16, {4}); }},
    {"int4_per_token_head", kInvalid, "alibi_slopes is",
     [](AttentionCase& c) { c.args.alibi_slopes = Tensor::contiguous(c.query.view.data, DType::kFloat32, {2}); }},
    {"int4_per_token_head", kInvalid, "causal_per_seq is",
     [](AttentionCase& c) { c.args.mask.causal_per_seq = Tensor::contiguous(c.query.view.data, DType::kUInt8, {2}); }},
    {"int4_per_token_head", kInvalid, "mm_prefix_range is",
     [](AttentionCase& c) {
       c.args.mask.mm_prefix_range = Tensor::contiguous(c.query.view.data, DType::kInt32, {3, 2});
     }},
    {"int4_per_token_head", kInvalid, "mm_prefix_range is",
     [](AttentionCase& c) {
       c.args.mask.mm_prefix_range = Tensor::contiguous(c.query.view.data, DType::kInt32, {3, 1, 3});
     }},
    {"int4_per_token_head", kInvalid, "qq_bias is",
     [](AttentionCase& c) {
       c.args.qq_bias = Tensor::contiguous(c.query.view.data, DType::kFloat32, {9, 8});
     }},
    {"int4_per_token_head", StatusCode::kOutOfRange, "sequence 2 has 9 query tokens",
     [](AttentionCase& c) {
       c.args.qq_bias = Tensor::contiguous(c.query.view.data, DType::kFloat32, {8, 8});
     }},
    {"int4_per_token_head", kInvalid, "k_descale is",
     [](AttentionCase& c) { c.args.k_descale = Tensor::contiguous(c.query.view.data, DType::kFloat32, {3}); }},
    {"int4_per_token_head", kInvalid, "v_descale is",
     [](AttentionCase& c) {
       c.args.v_descale = Tensor::contiguous(c.query.view.data, DType::kFloat32, {2, 2});
     }},
    {"int4_per_token_head", kInvalid, "v_descale is float16",
     [](AttentionCase& c) { c.args.v_descale = Tensor::contiguous(c.query.view.data, DType::kFloat16, {1}); }},
    {"int4_per_token_head", kInvalid, "q_descale is given",
     [](AttentionCase& c) { c.args.q_descale = Tensor::contiguous(c.query.view.data, DType::kFloat32, {1}); }},
    {"int4_per_token_head", kInvalid, "output_scale is given",
     [](AttentionCase& c) { c.args.output_scale = Tensor::contiguous(c.query.view.data, DType::kFloat32, {1}); }},
    {"int4_per_token_head", kInvalid, "output_scale is not given",
     [](AttentionCase& c) { c.args.out.dtype = DType::kFloat8E4M3; }},
    {"int4_per_token_head", kInvalid, "lse is", [](AttentionCase& c) { c.args.lse.shape[1] = 2; }},
    {"int4_per_token_head", kInvalid, "lse is float16", [](AttentionCase& c) { c.args.lse.dtype = DType::kFloat16; }},
    {"int4_per_token_head", kInvalid, "max_query_len is -1", [](AttentionCase& c) { c.args.max_query_len = -1; }},
    {"int4_per_token_head", kInvalid, "max_seq_len is -5", [](AttentionCase& c) { c.args.max_seq_len = -5; }},
    {"int4_per_token_head", kInvalid, "query is on cpu:1; supported: cpu, and cuda:0 and up",
     [](AttentionCase& c) { c.args.query.device.index = 1; }},
    {"int4_per_token_head", kInvalid, "query is on cuda:-1; supported",
     [](AttentionCase& c) { c.args.query.device = Device::cuda(-1); }},
    {"int4_per_token_head", kInvalid, "query is on an unknown device",
     [](AttentionCase& c) { c.args.query.device.type = static_cast<DeviceType>(9); }},
    {"int4_per_token_head", kInvalid, "seq_lens is on cuda:1, but out is on cuda:0",
     [](AttentionCase& c) {
       for (const cuda::TensorRef& ref : cuda::tensors_of(c.args)) {
         ref.edit([](Tensor& tensor) { tensor.device = Device::cuda(); });
       }
       c.args.query = {};
       c.args.seq_lens.device.index = 1;
     }},
    {"int4_per_token_head", kInvalid, "error_counter is given",
     [](AttentionCase& c) { c.args.error_counter = Tensor::contiguous(c.out.view.data, DType::kInt64, {1}); }},
    {"int4_per_token_head", StatusCode::kOutOfRange, "cu_seqlens_q[0] is 1",
     [](AttentionCase& c) { first<std::int32_t>(c.cu_seqlens_q) = 1; }},
    {"int4_per_token_head", StatusCode::kOutOfRange, "cu_seqlens_q[2] is 0",
     [](AttentionCase& c) { c.cu_seqlens_q.view.ptr<std::int32_t>()[2] = 0; }},
    {"int4_per_token_head", StatusCode::kOutOfRange, "cu_seqlens_q[3] is 1000",
     [](AttentionCase& c) { c.cu_seqlens_q.view.ptr<std::int32_t>()[3] = 1000; }},
    {"int4_per_token_head", StatusCode::kOutOfRange, "seq_lens[0] is -1",
     [](AttentionCase& c) { first<std::int32_t>(c.seq_lens) = -1; }},
    {"int4_per_token_head", StatusCode::kOutOfRange, "seq_lens[1] is 81",
     [](AttentionCase& c) { c.seq_lens.view.ptr<std::int32_t>()[1] = 81; }},
    {"int4_per_token_head", StatusCode::kOutOfRange, "block_table[0, 2] is -1",
     [](AttentionCase& c) { c.block_table.view.ptr<std::int32_t>()[2] = -1; }},
    {"int4_per_token_head", StatusCode::kOutOfRange, "block_table[0, 0] is 10",
     [](AttentionCase& c) { c.block_table.view.ptr<std::int32_t>()[0] = 10; }},
};

TEST(Refusals, BadReads) {
  for (const BadRead& bad : kBadReads) {
    if (!modes_built({bad.mode})) continue;
    SCOPED_TRACE(std::string(bad.mode) + ": " + bad.words);
    AttentionCase::Options options;
    options.mode = bad.mode;
    AttentionCase call(options);
    bad.spoil(call);
    const Status status = call.run();
    ASSERT_FALSE(status.ok());
    EXPECT_EQ(status.code(), bad.code) << status.message();
    EXPECT_NE(status.message().find(bad.words), std::string::npos) << status.message();
    expect_sentence(status);
    for (std::uint8_t byte : call.out.bytes) ASSERT_EQ(byte, 0xFF) << "a refused call wrote";
    for (std::uint8_t byte : call.lse.bytes) ASSERT_EQ(byte, 0xFF) << "a refused call wrote";
    // Planning the same call gives the same sentence, where the plan can know.
    if (status.code() == kInvalid) {
      EXPECT_EQ(problem_of(call.args).status().message(), status.message());
    }
  }
}

// ---- plans ----------------------------------------------------------------------------------------------------------

TEST(Refusals, BadProblems) {
  const struct {
    const char* words;
    void (*spoil)(AttentionProblem& problem);
  } cases[] = {
      {"mode id 31337", [](AttentionProblem& p) { p.mode = static_cast<ModeId>(31337); }},
      {"num_q_heads is 0", [](AttentionProblem& p) { p.num_q_heads = 0; }},
      {"num_kv_heads is -1", [](AttentionProblem& p) { p.num_kv_heads = -1; }},
      {"num_q_heads is 3", [](AttentionProblem& p) { p.num_q_heads = 3; }},
      {"block_size is 0", [](AttentionProblem& p) { p.block_size = 0; }},
      {"head_size is 8", [](AttentionProblem& p) { p.head_size = 8; }},
      {"head_size_v is 1000", [](AttentionProblem& p) { p.head_size_v = 1000; }},
      {"max_num_tokens is -1", [](AttentionProblem& p) { p.max_num_tokens = -1; }},
      {"max_batch is -1", [](AttentionProblem& p) { p.max_batch = -1; }},
      {"max_query_len is -4", [](AttentionProblem& p) { p.max_query_len = -4; }},
      {"max_seq_len is -1", [](AttentionProblem& p) { p.max_seq_len = -1; }},
      {"num_splits is -1", [](AttentionProblem& p) { p.num_splits = -1; }},
      {"max_seq_len is 9223372036854775807; supported: 0 to 2147483647",
       [](AttentionProblem& p) { p.max_seq_len = kMostInt64; }},
      {"max_query_len is 2147483648", [](AttentionProblem& p) { p.max_query_len = std::int64_t{1} << 31; }},
      {"max_batch is 1152921504606846976", [](AttentionProblem& p) { p.max_batch = std::int64_t{1} << 60; }},
      {"workspace of 2^63 bytes",
       [](AttentionProblem& p) {
         p.num_q_heads = std::numeric_limits<int>::max();
         p.num_kv_heads = 1;
         p.max_num_tokens = kMostInt64;
         p.max_batch = p.max_seq_len = std::numeric_limits<int>::max();
       }},
      {"row_alignment is 0; supported: 1, 2, 4, 8 and 16", [](AttentionProblem& p) { p.row_alignment = 0; }},
      {"row_alignment is 3", [](AttentionProblem& p) { p.row_alignment = 3; }},
      {"row_alignment is 24", [](AttentionProblem& p) { p.row_alignment = 24; }},
      {"row_alignment is 1024", [](AttentionProblem& p) { p.row_alignment = 1024; }},
      {"row_alignment is -2147483648", [](AttentionProblem& p) { p.row_alignment = std::numeric_limits<int>::min(); }},
      {"query_dtype is int64", [](AttentionProblem& p) { p.query_dtype = DType::kInt64; }},
      {"query_dtype is unknown", [](AttentionProblem& p) { p.query_dtype = static_cast<DType>(77); }},
      {"key_cache_dtype is unknown", [](AttentionProblem& p) { p.key_cache_dtype = static_cast<DType>(77); }},
      {"value_cache_dtype is unknown", [](AttentionProblem& p) { p.value_cache_dtype = static_cast<DType>(77); }},
      {"key_cache_dtype is int8; mode auto stores",
       [](AttentionProblem& p) {
         p.mode = mode_of("auto");
         p.key_cache_dtype = DType::kInt8;
       }},
      {"device is an unknown device", [](AttentionProblem& p) { p.device.type = static_cast<DeviceType>(2); }},
      {"head_size must be a multiple of 2, got 33", [](AttentionProblem& p) { p.head_size = 33; }},
      {"head_size_v must be a multiple of 2, got 63", [](AttentionProblem& p) { p.head_size_v = 63; }},
  };
  QUIRE_NEEDS_MODES("int4_per_token_head", "auto");
  AttentionCase call(AttentionCase::Options{});
  const Result<AttentionProblem> good = problem_of(call.args);
  ASSERT_TRUE(good.ok());
  ASSERT_TRUE(plan_unified_attention(*good).ok());
  for (const auto& entry : cases) {
    AttentionProblem problem = *good;
    entry.spoil(problem);
    const Result<AttentionPlan> plan = plan_unified_attention(problem);
    ASSERT_FALSE(plan.ok()) << entry.words;
    EXPECT_NE(plan.status().message().find(entry.words), std::string::npos) << plan.status().message();
    expect_sentence(plan.status());
  }
}

// The plan of a device is made by host code, so it is refused without a device too.
TEST(Refusals, CudaProblemsThatFitNoGrid) {
#if !quire_with_cuda
  GTEST_SKIP() << "this build has no CUDA";
#endif
  QUIRE_NEEDS_MODES("int4_per_token_head");
  const struct {
    const char* words;
    void (*bound)(AttentionProblem& problem);
  } cases[] = {
      {"max_seq_len is 9223372036854775807; supported: 0 to 2147483647",
       [](AttentionProblem& p) { p.max_seq_len = kMostInt64; }},
      {"max_num_tokens 576460752303423552 times num_q_heads 4",
       [](AttentionProblem& p) { p.max_num_tokens = (std::int64_t{1} << 59) + 64; }},
      {"max_num_tokens 9223372036854775807 times", [](AttentionProblem& p) { p.max_num_tokens = kMostInt64; }},
      {"max_num_tokens 536870912 times num_q_heads 4 is the number of rows; one CUDA grid takes at most 2147483647",
       [](AttentionProblem& p) { p.max_num_tokens = std::int64_t{1} << 29; }},
      {"num_kv_heads is 65536; one CUDA grid takes at most 65535",
       [](AttentionProblem& p) { p.num_q_heads = p.num_kv_heads = 65536; }},
      {"max_batch 2147483647 makes",
       [](AttentionProblem& p) {
         p.max_batch = std::numeric_limits<std::int32_t>::max();
         p.max_query_len = 1000;
       }},
      {"max_seq_len 2147483647 in splits of 2048 keys makes 1048576 splits; one CUDA grid takes at most 65535",
       [](AttentionProblem& p) {
         p.max_seq_len = std::numeric_limits<std::int32_t>::max();
         p.batch_invariant = true;
       }},
  };
  AttentionCase call(AttentionCase::Options{});
  for (DType query_dtype : {DType::kFloat32, DType::kBFloat16}) {  // with tensor cores and without
    AttentionProblem good = *problem_of(call.args);
    good.device = Device::cuda();
    good.arch = {9, 0, 132, 227 * 1024};
    good.whole_pages = false;  // decode_pages has no splits
    if (const Result<AttentionPlan> plan = plan_unified_attention(good); !plan.ok()) {
      GTEST_SKIP() << plan.status().message();  // a build for other GPUs
    }
    good.query_dtype = query_dtype;
    ASSERT_TRUE(plan_unified_attention(good).ok());
    for (const auto& entry : cases) {
      AttentionProblem problem = good;
      entry.bound(problem);
      const Result<AttentionPlan> plan = plan_unified_attention(problem);
      ASSERT_FALSE(plan.ok()) << entry.words << ": workspace " << plan->workspace_bytes() << ", max_splits "
                              << plan->data()->max_splits << ", split_size " << plan->data()->split_size;
      EXPECT_NE(plan.status().message().find(entry.words), std::string::npos) << plan.status().message();
      expect_sentence(plan.status());
    }
    // The largest bounds that fit have their true size.
    AttentionProblem large = good;
    large.max_num_tokens = (std::int64_t{1} << 29) - 1;
    large.max_seq_len = std::numeric_limits<std::int32_t>::max();
    large.num_splits = 1024;
    const Result<AttentionPlan> plan = plan_unified_attention(large);
    ASSERT_TRUE(plan.ok()) << plan.status().message();
    EXPECT_EQ(plan->data()->max_splits, 1024);
    EXPECT_EQ(plan->data()->split_size, std::int64_t{1} << 21);
    EXPECT_EQ(plan->workspace_bytes(), static_cast<std::size_t>(large.max_num_tokens) * 4 * 1024 * (64 + 2) * 4);
  }
}

TEST(Refusals, CallsOutsideTheirPlan) {
  const struct {
    const char* words;
    void (*spoil)(AttentionProblem& problem);
  } cases[] = {
    {"num_q_heads is 4", [](AttentionProblem& p) { p.num_q_heads = 8; }},
    {"num_kv_heads is 2", [](AttentionProblem& p) { p.num_kv_heads = 4; }},
    {"head_size is 64", [](AttentionProblem& p) { p.head_size = 128; }},
    {"head_size_v is 64", [](AttentionProblem& p) { p.head_size_v = 128; }},
    {"block_size is 16", [](AttentionProblem& p) { p.block_size = 32; }},
    {"num_tokens is 18", [](AttentionProblem& p) { p.max_num_tokens = 17; }},
    {"batch is 3", [](AttentionProblem& p) { p.max_batch = 2; }},
    {"query_len is 9", [](AttentionProblem& p) { p.max_query_len = 8; }},
    {"seq_len is 53", [](AttentionProblem& p) { p.max_seq_len = 52; }},
    {"mode is int4_per_token_head, but the plan was made for int8_per_token_head",
     [](AttentionProblem& p) { p.mode = mode_of("int8_per_token_head"); }},
    {"query_dtype is float32, but the plan was made for bfloat16",
     [](AttentionProblem& p) { p.query_dtype = DType::kBFloat16; }},
#if quire_with_cuda
    {"device is cpu, but the plan was made for cuda:1; make a plan",
     [](AttentionProblem& p) {
       p.device = Device::cuda(1);
       p.arch = {9, 0, 132, 227 * 1024};
     }},
#endif
  };
  QUIRE_NEEDS_MODES("int4_per_token_head", "int8_per_token_head", "auto");
  for (const auto& entry : cases) {
    AttentionCase call(AttentionCase::Options{});
    AttentionProblem problem = *problem_of(call.args);
    entry.spoil(problem);
    const Result<AttentionPlan> plan = plan_unified_attention(problem);
    ASSERT_TRUE(plan.ok()) << plan.status().message();
    std::vector<std::uint8_t> workspace(plan->workspace_bytes() + 16);
    const Status status = run_unified_attention(*plan, call.args, workspace.data(), workspace.size(), nullptr);
    ASSERT_FALSE(status.ok()) << entry.words;
    EXPECT_EQ(status.code(), kInvalid);
    EXPECT_NE(status.message().find(entry.words), std::string::npos) << status.message();
    for (std::uint8_t byte : call.out.bytes) ASSERT_EQ(byte, 0xFF) << "a refused call wrote";
  }
}

// "auto" stores what its caches hold, so that is part of its plan.
TEST(Refusals, AnAutoPlanIsForOneCacheDtype) {
  QUIRE_NEEDS_MODES("auto");
  AttentionCase::Options options;
  options.mode = "auto";
  AttentionCase call(options);
  AttentionProblem problem = *problem_of(call.args);
  problem.key_cache_dtype = DType::kFloat16;
  const Result<AttentionPlan> plan = plan_unified_attention(problem);
  ASSERT_TRUE(plan.ok()) << plan.status().message();
  const Status status = run_unified_attention(*plan, call.args, nullptr, 0, nullptr);
  ASSERT_FALSE(status.ok());
  EXPECT_NE(status.message().find("key_cache_dtype is bfloat16, but the plan was made for float16"), std::string::npos)
      << status.message();
  problem = *problem_of(call.args);
  problem.value_cache_dtype = DType::kFloat32;
  const Status of_values = run_unified_attention(*plan_unified_attention(problem), call.args, nullptr, 0, nullptr);
  EXPECT_NE(of_values.message().find("value_cache_dtype is bfloat16, but the plan was made for float32"),
            std::string::npos)
      << of_values.message();
}

// supports() gives the plan's answer without making one.
TEST(Plan, SupportsWhatCanBePlanned) {
  QUIRE_NEEDS_MODES("int4_per_token_head");
  AttentionCase::Options options;
  options.sequences = {{1, 2000}};
  AttentionCase call(options);
  AttentionProblem problem = *problem_of(call.args);
  const Result<AttentionSupport> support = supports(problem);
  ASSERT_TRUE(support.ok()) << support.status().message();
  EXPECT_FALSE(support->tensor_cores);
  EXPECT_EQ(support->workspace_bytes, plan_unified_attention(problem)->workspace_bytes());
  problem.head_size = 33;
  EXPECT_EQ(supports(problem).status().message(), plan_unified_attention(problem).status().message());
}

// The host cannot read lengths that live on the device, and the extents of a tensor say nothing about them.
TEST(Refusals, CudaNeedsBoundsOnTheLengths) {
  QUIRE_NEEDS_MODES("int4_per_token_head");
  if (!device_available(Device::cuda()).ok()) GTEST_SKIP() << "no CUDA device";
  AttentionCase call(AttentionCase::Options{});
  const auto refusal = [&](std::int64_t max_query_len, std::int64_t max_seq_len) {
    UnifiedAttentionArgs args = call.args;
    for (const cuda::TensorRef& ref : cuda::tensors_of(args)) {
      ref.edit([](Tensor& tensor) { tensor.device = Device::cuda(); });
    }
    args.max_query_len = max_query_len;
    args.max_seq_len = max_seq_len;
    return problem_of(args).status().message();
  };
  EXPECT_EQ(refusal(9, 53), "");
  EXPECT_NE(refusal(0, 53).find("max_query_len is 0; on cuda it is required"), std::string::npos) << refusal(0, 53);
  EXPECT_NE(refusal(9, 0).find("max_seq_len is 0; on cuda it is required"), std::string::npos) << refusal(9, 0);
}

// A device that this machine does not have is refused, with the number of those that it has.
TEST(Refusals, DevicesThatAreNotThere) {
  QUIRE_NEEDS_MODES("int4_per_token_head");
  const Result<int> count = device_count(DeviceType::kCuda);
  if (!count.ok()) {
    EXPECT_EQ(device_arch(Device::cuda(1)).status().code(), count.status().code());
    GTEST_SKIP() << count.status().message();
  }
  const Device absent = Device::cuda(*count);
  const std::string words = "device is " + to_string(absent) + "; this process sees " + std::to_string(*count);
  EXPECT_NE(device_arch(absent).status().message().find(words), std::string::npos)
      << device_arch(absent).status().message();
  StoreCall store("int4_per_token_head", DType::kFloat32);
  for (const cuda::TensorRef& ref : cuda::tensors_of(store.args)) {
    ref.edit([&](Tensor& tensor) { tensor.device = absent; });
  }
  EXPECT_NE(reshape_and_cache(store.args, nullptr).message().find(words), std::string::npos);
  AttentionCase read(AttentionCase::Options{});
  for (const cuda::TensorRef& ref : cuda::tensors_of(read.args)) {
    ref.edit([&](Tensor& tensor) { tensor.device = absent; });
  }
  read.args.max_query_len = read.args.max_seq_len = 100;
  EXPECT_NE(unified_attention(read.args, nullptr).message().find(words), std::string::npos);
}

TEST(Refusals, AnEmptyPlan) {
  QUIRE_NEEDS_MODES("int4_per_token_head");
  AttentionCase call(AttentionCase::Options{});
  const Status status = run_unified_attention(AttentionPlan(), call.args, nullptr, 0, nullptr);
  EXPECT_EQ(status.message(), "plan is empty; take it from plan_unified_attention");
  EXPECT_EQ(AttentionPlan().describe(), "an empty plan");
  EXPECT_EQ(AttentionPlan().workspace_bytes(), 0U);
  EXPECT_EQ(AttentionPlan().problem().num_q_heads, 0);
}

TEST(Refusals, BadWorkspaces) {
  QUIRE_NEEDS_MODES("int4_per_token_head");
  AttentionCase::Options options;
  options.sequences = {{1, 2000}};
  AttentionCase call(options);
  AttentionProblem problem = *problem_of(call.args);
  problem.num_splits = 4;
  const AttentionPlan plan = *plan_unified_attention(problem);
  ASSERT_GT(plan.workspace_bytes(), 0U);
  std::vector<std::uint8_t> workspace(plan.workspace_bytes() + 16);
  const struct {
    const char* words;
    void* data;
    std::size_t size;
  } cases[] = {{"workspace has 0 bytes", nullptr, plan.workspace_bytes()},
               {"the plan needs", workspace.data(), plan.workspace_bytes() - 1},
               {"aligned to 16", workspace.data() + 4, plan.workspace_bytes()}};
  for (const auto& entry : cases) {
    const Status status = run_unified_attention(plan, call.args, entry.data, entry.size, nullptr);
    ASSERT_FALSE(status.ok()) << entry.words;
    EXPECT_NE(status.message().find(entry.words), std::string::npos) << status.message();
    for (std::uint8_t byte : call.out.bytes) ASSERT_EQ(byte, 0xFF) << "a refused call wrote";
  }
}

// The workspace grows with the bounds and with nothing else, and a plan for larger bounds serves smaller calls.
TEST(Plan, BoundsOnlyGrow) {
  QUIRE_NEEDS_MODES("int4_per_token_head");
  AttentionProblem problem;
  problem.mode = mode_of("int4_per_token_head");
  problem.num_q_heads = 8;
  problem.num_kv_heads = 2;
  problem.head_size = problem.head_size_v = 128;
  problem.block_size = 16;
  std::size_t last = 0;
  for (std::int64_t bound : {0, 1, 7, 64, 1000, 5000, 100000}) {
    problem.max_num_tokens = problem.max_batch = bound;
    problem.max_query_len = std::min<std::int64_t>(bound, 1);
    problem.max_seq_len = bound * 3;
    const Result<AttentionPlan> plan = plan_unified_attention(problem);
    ASSERT_TRUE(plan.ok());
    EXPECT_GE(plan->workspace_bytes(), last);
    last = plan->workspace_bytes();
  }
  AttentionCase::Options options;
  options.sequences = {{1, 1500}, {1, 40}};
  options.num_kv_heads = 1;
  AttentionCase call(options);
  AttentionProblem larger = *problem_of(call.args);
  larger.max_batch += 5;
  larger.max_num_tokens += 100;
  larger.max_seq_len = 9000;
  larger.max_query_len = 16;
  const AttentionPlan plan = *plan_unified_attention(larger);
  std::vector<std::uint8_t> workspace(plan.workspace_bytes() + 16, 0xFF);
  ASSERT_TRUE(run_unified_attention(plan, call.args, workspace.data(), plan.workspace_bytes(), nullptr).ok());
  call.run_oracle();
  EXPECT_TRUE(call.matches());
}

// ---- merge_attn_states ----------------------------------------------------------------------------------------------

TEST(Refusals, BadMerges) {
  const struct {
    const char* words;
    void (*spoil)(MergeAttnStatesArgs& args);
  } cases[] = {
      {"prefix_out is not given", [](MergeAttnStatesArgs& a) { a.prefix_out = Tensor(); }},
      {"suffix_out is not given", [](MergeAttnStatesArgs& a) { a.suffix_out = Tensor(); }},
      {"out is not given", [](MergeAttnStatesArgs& a) { a.out = Tensor(); }},
      {"prefix_lse is not given", [](MergeAttnStatesArgs& a) { a.prefix_lse = Tensor(); }},
      {"suffix_lse is not given", [](MergeAttnStatesArgs& a) { a.suffix_lse = Tensor(); }},
      {"suffix_out is", [](MergeAttnStatesArgs& a) { a.suffix_out.shape[2] = 32; }},
      {"suffix_lse is", [](MergeAttnStatesArgs& a) { a.suffix_lse.shape[0] = 1; }},
      {"lse is float16", [](MergeAttnStatesArgs& a) { a.lse.dtype = DType::kFloat16; }},
      {"out is int8", [](MergeAttnStatesArgs& a) { a.out.dtype = DType::kInt8; }},
      {"suffix_out is on cuda:0", [](MergeAttnStatesArgs& a) { a.suffix_out.device = Device::cuda(); }},
      {"lse is on cpu, but prefix_out is on cuda:0",
       [](MergeAttnStatesArgs& a) {
         edit_all({&a.prefix_out, &a.prefix_lse, &a.suffix_out, &a.suffix_lse, &a.out},
                  [](Tensor& t) { t.device = Device::cuda(); });
       }},
      {"out is [2, 3, 64] float32 with strides [0, 64, 1]", [](MergeAttnStatesArgs& a) { a.out.strides[0] = 0; }},
      {"lse is [2, 3] float32 with strides [1, 1]", [](MergeAttnStatesArgs& a) { a.lse.strides[0] = 1; }},
      {"the product of its extents",
       [](MergeAttnStatesArgs& a) {
         edit_all({&a.prefix_out, &a.prefix_lse, &a.suffix_out, &a.suffix_lse, &a.out, &a.lse}, [](Tensor& t) {
           t.shape[0] = kHuge;
           t.data = nullptr;
         });
       }},
      {"num_q_heads must be between 0 and 2147483647",
       [](MergeAttnStatesArgs& a) {
         edit_all({&a.prefix_out, &a.prefix_lse, &a.suffix_out, &a.suffix_lse, &a.out, &a.lse}, [](Tensor& t) {
           t.shape[0] = 0;
           t.shape[1] = std::int64_t{1} << 32;
         });
       }},
      {"prefix_out has stride 2", [](MergeAttnStatesArgs& a) { a.prefix_out.strides[2] = 2; }},
      {"out is a null pointer", [](MergeAttnStatesArgs& a) { a.out.data = nullptr; }},
  };
  for (const auto& entry : cases) {
    OwnedTensor a(DType::kFloat32, {2, 3, 64}), b(DType::kFloat32, {2, 3, 64}), out(DType::kFloat32, {2, 3, 64});
    OwnedTensor a_lse(DType::kFloat32, {2, 3}), b_lse(DType::kFloat32, {2, 3}), lse(DType::kFloat32, {2, 3});
    MergeAttnStatesArgs args{.out = out.view,
                             .lse = lse.view,
                             .prefix_out = a.view,
                             .prefix_lse = a_lse.view,
                             .suffix_out = b.view,
                             .suffix_lse = b_lse.view};
    entry.spoil(args);
    const Status status = merge_attn_states(args, nullptr);
    ASSERT_FALSE(status.ok()) << entry.words;
    EXPECT_NE(status.message().find(entry.words), std::string::npos) << status.message();
    expect_sentence(status);
    for (std::uint8_t byte : out.bytes) ASSERT_EQ(byte, 0xFF) << "a refused call wrote";
    for (std::uint8_t byte : lse.bytes) ASSERT_EQ(byte, 0xFF) << "a refused call wrote";
  }
}

// ---- every tensor of every op ---------------------------------------------------------------------------------------

// Shapes that lie, in each tensor of a call, are refused by the tensor's name, and nothing is computed from them.
template <class Args>
void expect_lying_shapes_are_refused(const Args& good, Status (*op)(const Args&)) {
  const struct {
    const char* words;
    void (*spoil)(Tensor& tensor);
  } lies[] = {
      {"has 7 dimensions; supported: 0 to 6", [](Tensor& t) { t.ndim = 7; }},
      {"has 1000 dimensions", [](Tensor& t) { t.ndim = 1000; }},
      {"has 2147483647 dimensions", [](Tensor& t) { t.ndim = std::numeric_limits<int>::max(); }},
      {"has -1 dimensions", [](Tensor& t) { t.ndim = -1; }},
      {"has -2147483648 dimensions", [](Tensor& t) { t.ndim = std::numeric_limits<int>::min(); }},
      {"an extent must not be negative",
       [](Tensor& t) {
         t.ndim = 2;
         t.shape[0] = 4;
         t.shape[1] = -3;
       }},
      {"the product of its extents must be below 2^63",
       [](Tensor& t) {
         t.ndim = 2;
         t.shape[0] = kHuge;
         t.shape[1] = 4;
         t.strides[0] = t.strides[1] = 0;
         t.data = nullptr;
       }},
      {"the product of its extents must be below 2^63",
       [](Tensor& t) {
         t.ndim = 3;
         t.shape[0] = 0;
         t.shape[1] = t.shape[2] = kMostInt64;
         t.strides[1] = t.strides[2] = 0;
       }},
      {"its elements must lie within 2^63 bytes",
       [](Tensor& t) {
         t.ndim = 2;
         t.shape[0] = t.shape[1] = 2;
         t.strides[0] = t.strides[1] = kHuge;
       }},
  };
  Args copy = good;
  const std::size_t num_tensors = cuda::tensors_of(copy).size();
  for (std::size_t i = 0; i < num_tensors; ++i) {
    for (const auto& lie : lies) {
      Args args = good;
      cuda::tensors_of(args)[i].edit(lie.spoil);
      const Status status = op(args);
      ASSERT_FALSE(status.ok()) << "tensor " << i << ": " << lie.words;
      EXPECT_EQ(status.code(), kInvalid);
      EXPECT_NE(status.message().find(lie.words), std::string::npos) << "tensor " << i << ": " << status.message();
      expect_sentence(status);
    }
  }
}

TEST(Refusals, ShapesThatLie) {
  QUIRE_NEEDS_MODES("int4_per_token_head");
  const StoreCall store("int4_per_token_head", DType::kFloat32);
  const std::vector<std::vector<std::uint8_t>> before = store.cache.bytes();
  expect_lying_shapes_are_refused<ReshapeAndCacheArgs>(store.args,
                                                       [](const auto& a) { return reshape_and_cache(a, nullptr); });
  EXPECT_EQ(store.cache.bytes(), before);

  AttentionCase read(AttentionCase::Options{});
  const std::vector<std::uint8_t> out = read.out.bytes;
  expect_lying_shapes_are_refused<UnifiedAttentionArgs>(read.args,
                                                        [](const auto& a) { return unified_attention(a, nullptr); });
  EXPECT_EQ(read.out.bytes, out);

  OwnedTensor outs(DType::kFloat32, {2, 3, 64}), lses(DType::kFloat32, {2, 3});
  const MergeAttnStatesArgs merge{.out = outs.view,
                                  .lse = lses.view,
                                  .prefix_out = outs.view,
                                  .prefix_lse = lses.view,
                                  .suffix_out = outs.view,
                                  .suffix_lse = lses.view};
  expect_lying_shapes_are_refused<MergeAttnStatesArgs>(merge,
                                                       [](const auto& a) { return merge_attn_states(a, nullptr); });
}

// The stride of an extent of 1 enters no address: it may hold anything, and changes no bit and no plan.
TEST(Refusals, StridesOverOneElementAreNotLookedAt) {
  QUIRE_NEEDS_MODES("int4_per_token_head", "bfloat16");
  for (const char* mode : {"int4_per_token_head", "bfloat16"}) {
    AttentionCase::Options options;
    options.mode = mode;
    options.num_kv_heads = 1;
    options.group = 1;
    options.block_size = 64;
    options.sequences = {{1, 40}};
    AttentionCase call(options);
    ASSERT_TRUE(call.run().ok());
    const std::vector<std::uint8_t> out = call.out.bytes;
    const int alignment = problem_of(call.args)->row_alignment;
    EXPECT_EQ(alignment, 16);
    for (const std::int64_t stride : {std::int64_t{1}, kMostInt64, std::numeric_limits<std::int64_t>::min()}) {
      UnifiedAttentionArgs args = call.args;
      for (const cuda::TensorRef& ref : cuda::tensors_of(args)) {
        ref.edit([stride](Tensor& tensor) {
          for (int dim = 0; dim < tensor.ndim; ++dim) {
            if (tensor.shape[dim] == 1) tensor.strides[dim] = stride;
          }
        });
      }
      EXPECT_EQ(problem_of(args)->row_alignment, alignment);
      std::fill(call.out.bytes.begin(), call.out.bytes.end(), std::uint8_t{0xFF});
      const Status status = unified_attention(args, nullptr);
      ASSERT_TRUE(status.ok()) << status.message();
      EXPECT_EQ(call.out.bytes, out);
    }
  }
}

// A sink of -inf is as none.
TEST(Refusals, ASinkOfMinusInfinityIsNoSink) {
  QUIRE_NEEDS_MODES("int4_per_token_head");
  AttentionCase call(AttentionCase::Options{});
  ASSERT_TRUE(call.run().ok());
  const std::vector<std::uint8_t> out = call.out.bytes;
  call.sinks = OwnedTensor(DType::kFloat32, {4});
  call.sinks.fill({-kInf, -kInf, -kInf, -kInf});
  call.args.sinks = call.sinks.view;
  ASSERT_TRUE(call.run().ok());
  EXPECT_EQ(call.out.bytes, out);
}

// ---- Tensor ---------------------------------------------------------------------------------------------------------

TEST(Tensors, WhatDoesNotFitIsKeptOutAndRefused) {
  float data[8] = {};
  const Tensor seven = Tensor::contiguous(data, DType::kFloat32, {1, 2, 3, 4, 5, 6, 7});
  EXPECT_EQ(seven.ndim, 7);
  EXPECT_EQ(seven.shape[5], 6);
  EXPECT_EQ(seven.strides[5], 1);
  EXPECT_EQ(seven.strides[0], 2 * 3 * 4 * 5 * 6);
  EXPECT_EQ(to_string(seven), "float32 of 7 dimensions");
  EXPECT_EQ(seven.slice_last(0, 1).shape[5], 6);

  const Tensor strided = Tensor::strided(data, DType::kFloat32, {2, 2}, {1, 2, 3, 4, 5, 6, 7, 8});
  EXPECT_EQ(strided.ndim, -1);
  EXPECT_EQ(strided.shape[0], 2);
  EXPECT_EQ(to_string(strided), "float32 of -1 dimensions");
  EXPECT_EQ(Tensor::strided(data, DType::kFloat32, {2, 2}, {1}).ndim, -1);

  Tensor lying = Tensor::contiguous(data, DType::kInt8, {2});
  lying.ndim = std::numeric_limits<int>::max();
  EXPECT_EQ(to_string(lying), "int8 of 2147483647 dimensions");
  EXPECT_EQ(lying.numel(), 0);  // six extents were looked at, the last four of which are 0
}

}  // namespace
}  // namespace quire::testing
