// The attention kernels as a table: the plan filters it and takes the cheapest, the run launches what the plan chose.
//
// A kernel is a folder of cuda/kernel. Its launch.h describes it (name, what it refuses, its grid, what it costs), and
// its line in cuda/kernel/kernels.cuh puts it into this table, once for each pair of formats and class of head sizes it
// is compiled for. attend_any, which looks formats up at run time, is one row.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/attention_params.h"
#include "format/formats.h"
#include "quire/ops.h"

namespace quire::cuda {

// Sequences of at most this many rows (query tokens times heads of a group) are few-row sequences: decode and verify.
// Each class of a batch has a kernel of its own: with batch_invariant a sequence's bits do not depend on the others.
inline constexpr int kFewRows = 32;
enum class RowClass { kFew, kMany };

// What decides a kernel's share of time: its grid, and how long its blocks take.
struct KernelShape {
  int tile_rows;                  // of a row tile
  bool grid_by_sequence;          // every sequence has the same number of row tiles; else as many as its rows need
  int blocks_per_multiprocessor;  // that run at a time
  double overhead_keys;           // a block's prologue, epilogue and partial result take as long as so many keys
  double ns_per_key;              // of a block, when all multiprocessors are full
  // Its blocks, one a multiprocessor, share out the keys of all sequences and KV heads among themselves; ns_per_key is
  // then for a key of one KV head.
  bool persistent = false;
};

struct KernelDesc {
  std::string_view name;
  format::FormatId key, value;  // kNone: every pair
  int max_head_size;
  bool serves_few, serves_many;  // classes of rows
  bool tensor_cores;             // 16-bit products; else fp32
  KernelShape shape;
  // Why the kernel does not serve a problem of its formats and head sizes; null where it does.
  const char* (*refuses)(const KernelDesc& kernel, const AttentionProblem& problem);
  // `tiles`: row tiles of the grid. Launches for as many KV heads and splits as the params say.
  cudaError_t (*launch)(const AttentionParams& params, std::int64_t tiles, cudaStream_t stream);
  // Of a persistent kernel: what its own partial results take, in bytes, for calls within a problem's bounds.
  std::size_t (*workspace)(const AttentionProblem& problem) = nullptr;

  bool serves(RowClass rows) const { return rows == RowClass::kFew ? serves_few : serves_many; }
  bool takes(format::FormatId its_key, format::FormatId its_value) const {
    return key == format::FormatId::kNone || (key == its_key && value == its_value);
  }
};

// Every row, in an order that does not change while the program runs: an index is a kernel's id in a plan.
const std::vector<KernelDesc>& kernel_table();

// The estimated time of a problem by its bounds, and the number of splits that takes the least.
struct KernelCost {
  double ns;
  std::int64_t splits;
};
KernelCost kernel_cost(const KernelDesc& kernel, const AttentionProblem& problem);

// Row tiles in the grid of a call within the problem's bounds: in all, and of each sequence of few rows.
std::int64_t count_tiles(const KernelDesc& kernel, const AttentionProblem& problem, std::int64_t num_tokens,
                         std::int64_t batch);
int tiles_of_sequence(const KernelDesc& kernel, const AttentionProblem& problem);

inline dim3 attention_grid(const AttentionParams& params, std::int64_t tiles) {
  return {static_cast<unsigned>(tiles), static_cast<unsigned>(params.num_q_heads / params.group_size),
          static_cast<unsigned>(params.max_splits)};
}

// Whether a plan can be made for a device: its facts are given, and this build has code for it.
Status check_arch(const Arch& arch);
// Whether this build has what is compiled for sm_90a alone, and the device runs it.
bool runs_sm90a(const Arch& arch);

// What no kernel on tensor cores serves; null otherwise.
const char* refused_by_tensor_cores(const KernelDesc& kernel, const AttentionProblem& problem);

// Defined in kernel/kernels.cuh, instantiated in a generated source for each pair of formats.
template <class KeyF, class ValueF, int kHead>
std::vector<KernelDesc> kernel_rows();

}  // namespace quire::cuda
