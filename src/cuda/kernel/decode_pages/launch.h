// decode_pages in the table of kernels: one row for each number of query rows that a tile can have.
#pragma once

#include <algorithm>

#include "cuda/kernel/decode_pages/kernel.cuh"
#include "cuda/kernels.h"

namespace quire::cuda {

// The tiles that are compiled for a class of head sizes: those that are worth their device code.
constexpr bool has_tile(int head_class, int rows) {
  return head_class == 128 || (head_class == 64 && (rows == 4 || rows == 16)) || (head_class == 256 && rows == 8);
}
// Whether batch_invariant takes this tile. It takes the smallest class of head sizes that fits, and in it the smallest
// tile that holds the query heads of one token.
constexpr bool is_invariant_tile(int head_class, int rows, int head_size, int group_size) {
  const int own_class = head_size <= 64 ? 64 : (head_size <= 128 ? 128 : 256);
  if (head_class != own_class || group_size > rows) return false;
  for (int smaller = 4; smaller < rows; smaller *= 2) {
    if (has_tile(head_class, smaller) && group_size <= smaller) return false;
  }
  return true;
}

template <int kRows>
struct DecodePages {
  static constexpr std::string_view kName = "decode_pages";
  static constexpr bool kServesFew = true;
  static constexpr bool kServesMany = false;
  static const char* refuses(const KernelDesc& kernel, const AttentionProblem& problem) {
    if (!runs_sm90a(problem.arch)) return "it is compiled for sm_90a";
    if (problem.batch_invariant &&
        !is_invariant_tile(kernel.max_head_size, kRows, std::max(problem.head_size, problem.head_size_v),
                           problem.num_q_heads / problem.num_kv_heads)) {
      return "batch_invariant takes one tile, whatever the batch";
    }
    if (!problem.whole_pages) return "16 slots of a page are no runs of whole 16-byte vectors";
    if (problem.block_size % kSliceKeys != 0) return "block_size is no multiple of 16";
    const std::int64_t slices = (problem.max_seq_len + kSliceKeys - 1) / kSliceKeys;
    if (checked_product({problem.max_batch, tiles_of_sequence(kernel, problem), slices}).value_or(INT64_MAX) >
        INT32_MAX) {
      return "all sequences have 2^31 slices of 16 keys or more";
    }
    if (checked_product({problem.max_batch, tiles_of_sequence(kernel, problem), problem.num_kv_heads, kRows})
            .value_or(INT64_MAX) > INT32_MAX) {
      return "the tiles of all sequences have 2^31 rows or more";
    }
    const int least = problem.row_alignment;
    if (least < 2 || (least < 4 && !(unaligned(kernel.key) && unaligned(kernel.value)))) {
      return "rows are not aligned to 4 bytes, or slots of both sides to 2";
    }
    return refused_by_tensor_cores(kernel, problem);
  }

  template <class KeyF, class ValueF, int kHead>
  static constexpr bool kCompiled = has_pieces<KeyF>() && has_pieces<ValueF>() && !ValueF::kLevelNorm &&
                                    !std::is_same_v<KeyF, format::Float32> && has_tile(kHead, kRows);
  template <class KeyF, class ValueF, int kHead>
  static constexpr KernelShape kShape = {.tile_rows = kRows,
                                         .grid_by_sequence = true,
                                         .blocks_per_multiprocessor = 1,
                                         .overhead_keys = 128,
                                         .ns_per_key = (4 + 0.1 * kRows) * (0.2 + 0.8 * kHead / 128),
                                         .persistent = true};

  template <class KeyF, class ValueF, int kHead>
  static cudaError_t launch(const AttentionParams& params, std::int64_t, cudaStream_t stream) {
    return launch_pages(kKernel<KeyF, ValueF, kHead>, &decode_pages<KeyF, ValueF, kHead, kRows>, params, stream);
  }
  template <class KeyF, class ValueF, int kHead>
  static std::size_t workspace(const AttentionProblem& problem) {
    const std::int64_t row_bytes =
        format::row_bytes<KeyF>(problem.head_size) + format::row_bytes<ValueF>(problem.head_size_v);
    return pages_workspace(kKernel<KeyF, ValueF, kHead>, row_bytes, problem);
  }

 private:
  static bool unaligned(format::FormatId id) { return format::format_info(id).meta_place == format::MetaPlace::kInRow; }

  template <class KeyF, class ValueF, int kHead>
  static constexpr PagesKernel kKernel = {
      kRows,
      kHead,
      DecodePagesConfig<KeyF, ValueF, kHead, kRows>::kWarps,
      DecodePagesConfig<KeyF, ValueF, kHead, kRows>::kThreads,
      DecodePagesConfig<KeyF, ValueF, kHead, kRows>::kHeaderBytes,
      DecodePagesConfig<KeyF, ValueF, kHead, kRows>::kSharedBytes,
      DecodePagesConfig<KeyF, ValueF, kHead, kRows>::kSlack,
      DecodePagesConfig<KeyF, ValueF, kHead, kRows>::kMaxStages,
      DecodePagesConfig<KeyF, ValueF, kHead, kRows>::ValuePieces::kElements,
      DecodePagesConfig<KeyF, ValueF, kHead, kRows>::kAccess,
  };
};

}  // namespace quire::cuda
