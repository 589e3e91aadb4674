// The table of bad calls: each is one sentence that names the argument and what came, and leaves caches, outputs and
// LSE as they were.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "support/problem.h"

namespace quire::testing {
namespace {

// One sentence: starts with a word, no line break, long enough to help.
void expect_sentence(const Status& status) {
  const std::string& message = status.message();
  EXPECT_GT(message.size(), 20U) << message;
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  EXPECT_NE(message.back(), '.') << message;
}

// ---- reshape_and_cache
// -----------------------------------------------------------------------------------------------

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

const BadStore kBadStores[] = {
    {"int4_per_token_head", StatusCode::kNotFound, "mode id -5",
     [](StoreCall& c) { c.args.mode = static_cast<ModeId>(-5); }},
    {"int4_per_token_head", kInvalid, "key is not given", [](StoreCall& c) { c.args.key = Tensor(); }},
    {"int4_per_token_head", kInvalid, "value is not given", [](StoreCall& c) { c.args.value = Tensor(); }},
    {"int4_per_token_head", kInvalid, "slot_mapping is not given",
     [](StoreCall& c) { c.args.slot_mapping = Tensor(); }},
    {"int4_per_token_head", kInvalid, "key_cache is not given", [](StoreCall& c) { c.args.key_cache = Tensor(); }},
    {"int4_per_token_head", kInvalid, "value_cache is not given", [](StoreCall& c) { c.args.value_cache = Tensor(); }},
    {"int4_per_token_head", kInvalid, "k_scale_cache is not given",
     [](StoreCall& c) { c.args.k_scale_cache = Tensor(); }},
    {"int2_per_token_head", kInvalid, "v_scale_cache is not given",
     [](StoreCall& c) { c.args.v_scale_cache = Tensor(); }},
    {"int8_per_token_head", kInvalid, "k_scale_cache is a null pointer",
     [](StoreCall& c) { c.args.k_scale_cache.data = nullptr; }},
    {"int8_per_token_head", kInvalid, "k_scale_cache is float16",
     [](StoreCall& c) { c.args.k_scale_cache.dtype = DType::kFloat16; }},
    {"int8_per_token_head", kInvalid, "v_scale_cache is", [](StoreCall& c) { c.args.v_scale_cache.shape[2] = 3; }},
    {"int8_per_token_head", kInvalid, "k_scale_cache is not aligned",
     [](StoreCall& c) { c.args.k_scale_cache.data = c.args.k_scale_cache.ptr<std::uint8_t>() + 2; }},
    {"bfloat16", kInvalid, "k_scale_cache is given", [](StoreCall& c) { c.args.k_scale_cache = c.scale.view; }},
    {"int4_per_token_head", kInvalid, "key is int8", [](StoreCall& c) { c.args.key.dtype = DType::kInt8; }},
    {"int4_per_token_head", kInvalid, "key is float8_e4m3fn",
     [](StoreCall& c) { c.args.key.dtype = DType::kFloat8E4M3; }},
    {"fp8", kInvalid, "value is float8_e5m2", [](StoreCall& c) { c.args.value.dtype = DType::kFloat8E5M2; }},
    {"int4_per_token_head", kInvalid, "slot_mapping is float32",
     [](StoreCall& c) { c.args.slot_mapping.dtype = DType::kFloat32; }},
    {"int4_per_token_head", kInvalid, "key_cache is int8", [](StoreCall& c) { c.args.key_cache.dtype = DType::kInt8; }},
    {"fp8", kInvalid, "key_cache is float8_e5m2", [](StoreCall& c) { c.args.key_cache.dtype = DType::kFloat8E5M2; }},
    {"float16", kInvalid, "key_cache is bfloat16", [](StoreCall& c) { c.args.key_cache.dtype = DType::kBFloat16; }},
    {"auto", kInvalid, "key_cache is int8", [](StoreCall& c) { c.args.key_cache.dtype = DType::kInt8; }},
    {"int4_per_token_head", kInvalid, "3 dimensions", [](StoreCall& c) { c.args.key.ndim = 2; }},
    {"int4_per_token_head", kInvalid, "value is", [](StoreCall& c) { c.args.value.shape[0] = 5; }},
    {"int4_per_token_head", kInvalid, "value is", [](StoreCall& c) { c.args.value.shape[1] = 1; }},
    {"int4_per_token_head", kInvalid, "key_cache is", [](StoreCall& c) { c.args.key_cache.shape[3] = 64; }},
    {"int4_per_token_head", kInvalid, "value_cache is", [](StoreCall& c) { c.args.value_cache.shape[0] = 7; }},
    {"int4_per_token_head", kInvalid, "value_cache is", [](StoreCall& c) { c.args.value_cache.shape[1] = 8; }},
    {"int4_per_token_head", kInvalid, "key_cache is", [](StoreCall& c) { c.args.key_cache.shape[2] = 1; }},
    {"int4_per_token_head", kInvalid, "head_size is 16", [](StoreCall& c) { c.args.key.shape[2] = 16; }},
    {"int4_per_token_head", kInvalid, "head_size_v is 1024", [](StoreCall& c) { c.args.value.shape[2] = 1024; }},
    {"int4_per_token_head", kInvalid, "head_size must be a multiple of 2, got 63",
     [](StoreCall& c) { c.args.key.shape[2] = 63; }},
    {"int2_per_token_head", kInvalid, "head_size_v must be a multiple of 4, got 94",
     [](StoreCall& c) { c.args.value.shape[2] = 94; }},
    {"int4_per_token_head", kInvalid, "key_cache has stride 2", [](StoreCall& c) { c.args.key_cache.strides[3] = 2; }},
    {"int4_per_token_head", kInvalid, "key is a null pointer", [](StoreCall& c) { c.args.key.data = nullptr; }},
    {"int4_per_token_head", kInvalid, "key is not aligned",
     [](StoreCall& c) { c.args.key.data = c.args.key.ptr<std::uint8_t>() + 1; }},
    {"int4_per_token_head", kInvalid, "value is on cuda", [](StoreCall& c) { c.args.value.device = Device::kCuda; }},
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
    {"int4_per_token_head", kInvalid, "error_counter is given",
     [](StoreCall& c) { c.args.error_counter = Tensor::contiguous(c.slots.view.data, DType::kInt64, {1}); }},
    // The head-major layout is for formats of one element per unit without metadata.
    {"int4_per_token_head", kInvalid, "head-major layout",
     [](StoreCall& c) {
       c.args.key_cache = Tensor::contiguous(c.args.key_cache.data, DType::kUInt8, {2, 2, 8, 4, 4});
     }},
    {"bfloat16", kInvalid, "must divide head_size 64",
     [](StoreCall& c) {
       c.args.key_cache = Tensor::contiguous(c.args.key_cache.data, DType::kBFloat16, {2, 2, 12, 4, 5});
     }},
    {"bfloat16", kInvalid, "value_cache is",
     [](StoreCall& c) {
       c.args.key_cache = Tensor::contiguous(c.args.key_cache.data, DType::kBFloat16, {2, 2, 8, 16, 8});
     }},
};

TEST(Refusals, BadStores) {
  for (const BadStore& bad : kBadStores) {
    if (!modes_built({bad.mode})) continue;
    SCOPED_TRACE(std::string(bad.mode) + ": " + bad.words);
    StoreCall call(bad.mode, DType::kFloat32);
    const std::vector<std::vector<std::uint8_t>> before = call.cache.bytes();
    bad.spoil(call);
    const Status status = reshape_and_cache(call.args);
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
    const Status status = reshape_and_cache(call.args);
    EXPECT_TRUE(status.ok()) << bad.mode << ": " << status.message();
  }
}

// ---- unified_attention
// -----------------------------------------------------------------------------------------------

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

const BadRead kBadReads[] = {
    {"int4_per_token_head", StatusCode::kNotFound, "mode id 2000000",
     [](AttentionCase& c) { c.args.mode = static_cast<ModeId>(2000000); }},
    {"int4_per_token_head", kInvalid, "query is not given", [](AttentionCase& c) { c.args.query = Tensor(); }},
    {"int4_per_token_head", kInvalid, "out is not given", [](AttentionCase& c) { c.args.out = Tensor(); }},
    {"int4_per_token_head", kInvalid, "key_cache is", [](AttentionCase& c) { c.args.key_cache = Tensor(); }},
    {"int4_per_token_head", kInvalid, "k_scale_cache is not given",
     [](AttentionCase& c) { c.args.k_scale_cache = Tensor(); }},
    {"int4_per_token_head", kInvalid, "v_scale_cache is a null pointer",
     [](AttentionCase& c) { c.args.v_scale_cache.data = nullptr; }},
    {"fp8", kInvalid, "v_scale_cache is given",
     [](AttentionCase& c) { c.args.v_scale_cache = Tensor::contiguous(c.seq_lens.view.data, DType::kFloat32, {1}); }},
    {"int4_per_token_head", kInvalid, "cu_seqlens_q is not given",
     [](AttentionCase& c) { c.args.cu_seqlens_q = Tensor(); }},
    {"int4_per_token_head", kInvalid, "seq_lens is not given", [](AttentionCase& c) { c.args.seq_lens = Tensor(); }},
    {"int4_per_token_head", kInvalid, "block_table is not given",
     [](AttentionCase& c) { c.args.block_table = Tensor(); }},
    {"int4_per_token_head", kInvalid, "query is int8", [](AttentionCase& c) { c.args.query.dtype = DType::kInt8; }},
    {"int4_per_token_head", kInvalid, "out is float8_e5m2",
     [](AttentionCase& c) { c.args.out.dtype = DType::kFloat8E5M2; }},
    {"int4_per_token_head", kInvalid, "key_cache is float8_e4m3fn",
     [](AttentionCase& c) { c.args.key_cache.dtype = DType::kFloat8E4M3; }},
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
    {"int4_per_token_head", kInvalid, "value_cache is", [](AttentionCase& c) { c.args.value_cache.shape[2] = 1; }},
    {"int4_per_token_head", kInvalid, "value_cache is", [](AttentionCase& c) { c.args.value_cache.shape[1] = 8; }},
    {"int4_per_token_head", kInvalid, "seq_lens is", [](AttentionCase& c) { c.args.seq_lens.shape[0] = 2; }},
    {"int4_per_token_head", kInvalid, "block_table is", [](AttentionCase& c) { c.args.block_table.shape[0] = 2; }},
    {"int4_per_token_head", kInvalid, "cu_seqlens_q is empty",
     [](AttentionCase& c) { c.args.cu_seqlens_q.shape[0] = 0; }},
    {"int4_per_token_head", kInvalid, "query has stride 3", [](AttentionCase& c) { c.args.query.strides[2] = 3; }},
    {"int4_per_token_head", kInvalid, "out has stride 2", [](AttentionCase& c) { c.args.out.strides[2] = 2; }},
    {"int4_per_token_head", kInvalid, "query is not aligned",
     [](AttentionCase& c) { c.args.query.data = c.args.query.ptr<std::uint8_t>() + 2; }},
    {"int4_per_token_head", kInvalid, "seq_lens is on cuda",
     [](AttentionCase& c) { c.args.seq_lens.device = Device::kCuda; }},
    {"int4_per_token_head", kInvalid, "sliding_window is 0", [](AttentionCase& c) { c.args.sliding_window = 0; }},
    {"int4_per_token_head", kInvalid, "sliding_window is -2", [](AttentionCase& c) { c.args.sliding_window = -2; }},
    {"int4_per_token_head", kInvalid, "chunk_lookback is 1 with sliding_window -1",
     [](AttentionCase& c) { c.args.chunk_lookback = 1; }},
    {"int4_per_token_head", kInvalid, "chunk_lookback is 4 with sliding_window 4",
     [](AttentionCase& c) {
       c.args.chunk_lookback = 4;
       c.args.sliding_window = 4;
     }},
    {"int4_per_token_head", kInvalid, "chunk_lookback is -3", [](AttentionCase& c) { c.args.chunk_lookback = -3; }},
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
     [](AttentionCase& c) { c.args.causal_per_seq = Tensor::contiguous(c.query.view.data, DType::kUInt8, {2}); }},
    {"int4_per_token_head", kInvalid, "mm_prefix_range is",
     [](AttentionCase& c) {
       c.args.mm_prefix_range = Tensor::contiguous(c.query.view.data, DType::kInt32, {3, 2});
     }},
    {"int4_per_token_head", kInvalid, "mm_prefix_range is",
     [](AttentionCase& c) {
       c.args.mm_prefix_range = Tensor::contiguous(c.query.view.data, DType::kInt32, {3, 1, 3});
     }},
    {"int4_per_token_head", kInvalid, "qq_bias is",
     [](AttentionCase& c) {
       c.args.qq_bias = Tensor::contiguous(c.query.view.data, DType::kFloat32, {9, 8});
     }},
    {"int4_per_token_head", StatusCode::kOutOfRange, "sequence 2 has 9 query tokens",
     [](AttentionCase& c) {
       c.args.qq_bias = Tensor::contiguous(c.query.view.data, DType::kFloat32, {8, 8});
     }},
    {"int4_per_token_head", kInvalid, "k_scale is",
     [](AttentionCase& c) { c.args.k_scale = Tensor::contiguous(c.query.view.data, DType::kFloat32, {3}); }},
    {"int4_per_token_head", kInvalid, "v_scale is",
     [](AttentionCase& c) {
       c.args.v_scale = Tensor::contiguous(c.query.view.data, DType::kFloat32, {2, 2});
     }},
    {"int4_per_token_head", kInvalid, "v_scale is float16",
     [](AttentionCase& c) { c.args.v_scale = Tensor::contiguous(c.query.view.data, DType::kFloat16, {1}); }},
    {"int4_per_token_head", kInvalid, "q_scale is given",
     [](AttentionCase& c) { c.args.q_scale = Tensor::contiguous(c.query.view.data, DType::kFloat32, {1}); }},
    {"int4_per_token_head", kInvalid, "output_scale is given",
     [](AttentionCase& c) { c.args.output_scale = Tensor::contiguous(c.query.view.data, DType::kFloat32, {1}); }},
    {"int4_per_token_head", kInvalid, "output_scale is not given",
     [](AttentionCase& c) { c.args.out.dtype = DType::kFloat8E4M3; }},
    {"int4_per_token_head", kInvalid, "lse is", [](AttentionCase& c) { c.args.lse.shape[1] = 2; }},
    {"int4_per_token_head", kInvalid, "lse is float16", [](AttentionCase& c) { c.args.lse.dtype = DType::kFloat16; }},
    {"int4_per_token_head", kInvalid, "max_query_len is -1", [](AttentionCase& c) { c.args.max_query_len = -1; }},
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
    // Planning the same call says the same, where it can know.
    if (status.code() == kInvalid) {
      EXPECT_EQ(problem_of(call.args).status().message(), status.message());
    }
  }
}

// ---- plans
// -----------------------------------------------------------------------------------------------------------

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
  };
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
      {"mode is", [](AttentionProblem& p) { p.mode = mode_of("auto"); }},
      {"num_tokens is 18", [](AttentionProblem& p) { p.max_num_tokens = 17; }},
      {"batch is 3", [](AttentionProblem& p) { p.max_batch = 2; }},
      {"query_len is 9", [](AttentionProblem& p) { p.max_query_len = 8; }},
      {"seq_len is 53", [](AttentionProblem& p) { p.max_seq_len = 52; }},
  };
  for (const auto& entry : cases) {
    AttentionCase call(AttentionCase::Options{});
    AttentionProblem problem = *problem_of(call.args);
    entry.spoil(problem);
    const Result<AttentionPlan> plan = plan_unified_attention(problem);
    ASSERT_TRUE(plan.ok()) << plan.status().message();
    std::vector<std::uint8_t> workspace(plan->workspace_bytes + 16);
    const Status status = run_unified_attention(*plan, call.args, workspace.data(), workspace.size());
    ASSERT_FALSE(status.ok()) << entry.words;
    EXPECT_EQ(status.code(), kInvalid);
    EXPECT_NE(status.message().find(entry.words), std::string::npos) << status.message();
    for (std::uint8_t byte : call.out.bytes) ASSERT_EQ(byte, 0xFF) << "a refused call wrote";
  }
}

TEST(Refusals, BadWorkspaces) {
  AttentionCase::Options options;
  options.sequences = {{1, 2000}};
  AttentionCase call(options);
  AttentionProblem problem = *problem_of(call.args);
  problem.num_splits = 4;
  const AttentionPlan plan = *plan_unified_attention(problem);
  ASSERT_GT(plan.workspace_bytes, 0U);
  std::vector<std::uint8_t> workspace(plan.workspace_bytes + 16);
  const struct {
    const char* words;
    void* data;
    std::size_t size;
  } cases[] = {{"workspace has 0 bytes", nullptr, plan.workspace_bytes},
               {"the plan needs", workspace.data(), plan.workspace_bytes - 1},
               {"aligned to 16", workspace.data() + 4, plan.workspace_bytes}};
  for (const auto& entry : cases) {
    const Status status = run_unified_attention(plan, call.args, entry.data, entry.size);
    ASSERT_FALSE(status.ok()) << entry.words;
    EXPECT_NE(status.message().find(entry.words), std::string::npos) << status.message();
    for (std::uint8_t byte : call.out.bytes) ASSERT_EQ(byte, 0xFF) << "a refused call wrote";
  }
}

// The workspace grows with the bounds and with nothing else; a plan for larger bounds serves smaller calls.
TEST(Plan, BoundsOnlyGrow) {
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
    EXPECT_GE(plan->workspace_bytes, last);
    last = plan->workspace_bytes;
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
  std::vector<std::uint8_t> workspace(plan.workspace_bytes + 16, 0xFF);
  ASSERT_TRUE(run_unified_attention(plan, call.args, workspace.data(), plan.workspace_bytes).ok());
  call.run_oracle();
  EXPECT_TRUE(call.matches());
}

// ---- merge_attn_states
// -----------------------------------------------------------------------------------------------

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
      {"suffix_out is on cuda", [](MergeAttnStatesArgs& a) { a.suffix_out.device = Device::kCuda; }},
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
    const Status status = merge_attn_states(args);
    ASSERT_FALSE(status.ok()) << entry.words;
    EXPECT_NE(status.message().find(entry.words), std::string::npos) << status.message();
    expect_sentence(status);
    for (std::uint8_t byte : out.bytes) ASSERT_EQ(byte, 0xFF) << "a refused call wrote";
    for (std::uint8_t byte : lse.bytes) ASSERT_EQ(byte, 0xFF) << "a refused call wrote";
  }
}

}  // namespace
}  // namespace quire::testing
