// Random problems for the two ops, built to be hostile. Caches start as 0xFF (NaN in every float type and in every
// scale), and only the rows of a sequence are ever written. Block-table entries that must not be read are garbage.
// Tensors sit at odd strides and offsets, with NaN or canary bytes in the gaps. Every buffer is exactly as long as it
// needs to be, so that AddressSanitizer notices one byte too many.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "quire/quire.h"
#include "support/owned_tensor.h"
#include "support/paged_cache.h"
#include "support/random.h"

namespace quire::testing {

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
    int rswa_window = -1;
    std::vector<std::int64_t> rswa_prefix_lens = {21, 0, 7};  // sequences take turns; not given without the window
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
    bool centre = false;                // see PagedCache
    bool garbage_out_of_window = true;  // garbage in the block table where no query can look
    std::uint64_t seed = 1;
    std::uint64_t page_seed = 0;  // not 0: places pages differently, all values stay the same

    std::string describe() const;
  };

  explicit AttentionCase(const Options& options);

  // Stores key and value once more, as the test has changed them, by the tested op into the case's cache.
  Status store() const;

  // Runs the tested op (see TestedOps::attend), after it has poisoned the output.
  Status run(int num_splits = 0, bool batch_invariant = false);

  // Fills expected_out and expected_lse.
  void run_oracle();

  // What the tested device plans for the one-call form.
  Result<AttentionPlan> plan() const;

  // run(), run_oracle() and matches() in one.
  ::testing::AssertionResult check(int num_splits = 0, bool batch_invariant = false);

  // Compares out and lse with the oracle, within a tolerance that attention_tolerance.cc derives, and gaps and padding
  // rows with what they were.
  ::testing::AssertionResult matches() const;

  // tolerance() times the norm of the largest value row bounds ||out - oracle||_2 of a row; lse_tolerance() bounds
  // lse - oracle|.
  double tolerance() const;
  double lse_tolerance() const;

  // The unit roundoff of the operands that a kernel multiplies: 2^-24, or that of 16-bit tensor-core products. The
  // query is rounded to them only after a rotation, softmax weights always.
  double query_unit = 0x1p-24;
  double weight_unit = 0x1p-24;
  double serial_sums = 1.0;  // 4 where a kernel sums without SIMD lanes

  Options options;
  std::int64_t num_tokens = 0;  // queries in use; the tensors have two rows more
  UnifiedAttentionArgs args;
  std::unique_ptr<PagedCache> cache;
  OwnedTensor query, out, lse;
  OwnedTensor cu_seqlens_q, seq_lens, block_table, causal_per_seq, mm_prefix_range, rswa_prefix_lens;
  OwnedTensor sinks, alibi_slopes, qq_bias;
  OwnedTensor q_scale, k_scale, v_scale, output_scale;
  OwnedTensor expected_out, expected_lse;
  OwnedTensor key, value, slot_mapping;  // what was stored, [sum of seq_lens, Hk, d]

 private:
  std::int64_t rswa_prefix_len(std::int64_t sequence) const;
  void build_cache(Random& random);
  void build_inputs(Random& random);
};

}  // namespace quire::testing
