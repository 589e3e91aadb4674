// Random problems for the two ops, built to be hostile: caches start as 0xFF (NaN in every float type and in every
// scale), only the rows of a sequence are ever written, block-table entries that must not be read are garbage, tensors
// sit at odd strides and offsets with NaN or canary bytes in the gaps, and every buffer is exactly as long as it needs
// to be, so that AddressSanitizer sees one byte too many.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "quire/quire.h"
#include "support/modes.h"
#include "support/random.h"

namespace quire::testing {

class AttentionCase;

// The ops as tests call them, with arguments on the host: the CPU's, until a test program puts another device behind
// them (tests/cuda/main.cc). Tests of tests/ops that go through these run on every device.
struct TestedOps {
  Device device;
  std::vector<DType> query_dtypes;  // those that kernels of their own may serve
  Status (*store)(const ReshapeAndCacheArgs& args);
  // The one-call form or, where num_splits or batch_invariant asks for it, plan and run with a poisoned workspace.
  Status (*attend)(const UnifiedAttentionArgs& args, int num_splits, bool batch_invariant);
  Status (*merge)(const MergeAttnStatesArgs& args);
  void (*prepare)(AttentionCase& problem);  // sets the tolerances of a case that is about to run
};
extern TestedOps ops;

// Every mode of the table with every query dtype of `ops`: the parameters of a test suite, and the suffix of its tests.
struct ModeAndQuery {
  std::string mode;
  DType query_dtype;
};
std::vector<ModeAndQuery> modes_and_queries();
std::string test_name(const ModeAndQuery& parameter);

// How rows lie in memory. "row" is a format's row in bytes.
enum class Layout {
  kNhd,           // [blocks, slots, heads, row], K and V apart, scale caches apart
  kHnd,           // [blocks, heads, slots, row], scale caches likewise
  kPadded,        // kNhd with gaps after every row and every page, everything at an offset
  kPackedRow,     // [blocks, slots, heads, K row | V row]
  kInlineScale,   // [blocks, slots, heads, row | scale], K and V apart
  kPackedInline,  // [blocks, heads, slots, K row | scale | V row | scale]
  kKVInBlock,     // [blocks, 2, slots, heads, row]
  kLayerInBlock,  // [blocks, slots, 3 layers, heads, row]: the tensors are the middle layer
};
inline constexpr Layout kAllLayouts[] = {Layout::kNhd,       Layout::kHnd,         Layout::kPadded,
                                         Layout::kPackedRow, Layout::kInlineScale, Layout::kPackedInline,
                                         Layout::kKVInBlock, Layout::kLayerInBlock};
std::string_view layout_name(Layout layout);

// The caches of one layer over memory that starts as `poison`.
class PagedCache {
 public:
  struct Options {
    std::string mode = "int4_per_token_head";
    int head_size = 64;
    int head_size_v = 0;  // 0: head_size
    int num_kv_heads = 2;
    int block_size = 16;
    std::int64_t num_blocks = 8;
    DType auto_dtype = DType::kBFloat16;  // what "auto" stores
    Layout layout = Layout::kNhd;
    std::uint8_t poison = 0xFF;
  };

  explicit PagedCache(const Options& options);
  PagedCache(const PagedCache&) = delete;
  PagedCache& operator=(const PagedCache&) = delete;

  const Options& options() const { return options_; }

  // Sets mode and caches of either op's arguments.
  template <class Args>
  void apply(Args& args) const {
    args.mode = mode_of(options_.mode);
    args.key_cache = key_cache;
    args.value_cache = value_cache;
    args.k_scale_cache = k_scale_cache;
    args.v_scale_cache = v_scale_cache;
  }

  // Every byte, gaps included: two caches of equal options hold the same exactly when these are equal.
  const std::vector<std::vector<std::uint8_t>>& bytes() const { return buffers_; }

  Tensor key_cache, value_cache, k_scale_cache, v_scale_cache;

 private:
  Options options_;
  std::vector<std::vector<std::uint8_t>> buffers_;
};

// A tensor that owns its memory: rows of the last dimension are dense, the other strides have gaps.
class OwnedTensor {
 public:
  OwnedTensor() = default;
  OwnedTensor(OwnedTensor&&) = default;  // a move keeps the memory, and so the view, where it is
  OwnedTensor& operator=(OwnedTensor&&) = default;
  // Gaps and elements start as 0xFF bytes. `gap` elements follow each row of the last dimension.
  OwnedTensor(DType dtype, std::vector<std::int64_t> shape, std::int64_t gap = 0);

  // Row-major values, converted to the dtype.
  void fill(const std::vector<float>& values);
  void fill_integers(const std::vector<std::int64_t>& values);

  float get(std::int64_t i, std::int64_t j = 0, std::int64_t k = 0) const;

  Tensor view;
  std::vector<std::uint8_t> bytes;

 private:
  std::uint8_t* at(std::int64_t n);
};

enum class ScaleShape { kNone, kOne, kPerHead, kPerSequence };

// One call of unified_attention and the oracle's answer to it.
class AttentionCase {
 public:
  struct Lengths {
    int query_len;
    int seq_len;
  };
  struct Options {
    std::string mode = "int4_per_token_head";
    int head_size = 64;
    int head_size_v = 0;
    int num_kv_heads = 2;
    int group = 2;  // query heads per KV head
    int block_size = 16;
    std::vector<Lengths> sequences = {{1, 53}, {6, 41}, {9, 9}};
    DType dtype = DType::kFloat32;  // of the query; float8 too
    DType out_dtype = DType::kFloat32;
    DType auto_dtype = DType::kBFloat16;
    Layout layout = Layout::kNhd;

    bool causal = true;
    bool causal_per_seq = false;  // alternates
    int window = -1;
    int chunk_lookback = -1;
    bool mm_prefix = false;
    bool clamp_mm_prefix = false;
    float softcap = 0.0F;
    bool sinks = false;
    bool alibi = false;
    bool alibi_sqrt = false;
    bool qq_bias = false;
    ScaleShape q_scale = ScaleShape::kNone;
    ScaleShape k_scale = ScaleShape::kNone;
    ScaleShape v_scale = ScaleShape::kNone;
    float output_scale = 0.0F;  // 0: not given
    bool lse = true;
    bool garbage_out_of_window = true;  // garbage in the block table where no query can look
    std::uint64_t seed = 1;
    std::uint64_t page_seed = 0;  // not 0: places pages differently, all values stay the same

    std::string describe() const;
  };

  explicit AttentionCase(const Options& options);

  // Stores key and value, changed by the test, again: by the tested op, into the case's cache.
  Status store() const;

  // Runs the tested op (see TestedOps::attend); poisons the output first.
  Status run(int num_splits = 0, bool batch_invariant = false);

  // Fills expected_out and expected_lse.
  void run_oracle();

  // The kernel that the tested device plans for the one-call form.
  std::string kernel() const;

  // run, run_oracle and matches().
  ::testing::AssertionResult check(int num_splits = 0, bool batch_invariant = false);

  // out and lse against the oracle, within a tolerance derived in problem.cc; gaps and padding rows untouched.
  ::testing::AssertionResult matches() const;

  // The factor on the largest value row's norm that bounds ||out - oracle||_2 of a row, and the bound on |lse -
  // oracle|.
  double tolerance() const;
  double lse_tolerance() const;

  // Unit roundoff of the operands a kernel multiplies: 2^-24, or that of 16-bit tensor-core products. The query is
  // rounded to them only after a rotation; softmax weights always are.
  double query_unit = 0x1p-24;
  double weight_unit = 0x1p-24;
  double serial_sums = 1.0;  // 4 where a kernel sums without SIMD lanes

  Options options;
  std::int64_t num_tokens = 0;  // queries in use; the tensors have two rows more
  UnifiedAttentionArgs args;
  std::unique_ptr<PagedCache> cache;
  OwnedTensor query, out, lse;
  OwnedTensor cu_seqlens_q, seq_lens, block_table, causal_per_seq, mm_prefix_range, sinks, alibi_slopes, qq_bias;
  OwnedTensor q_scale, k_scale, v_scale, output_scale;
  OwnedTensor expected_out, expected_lse;
  OwnedTensor key, value, slot_mapping;  // what was stored, [sum of seq_lens, Hk, d]

 private:
  void build_cache(Random& random);
  void build_inputs(Random& random);
};

}  // namespace quire::testing
