// A call of decode_pages and of the merge after it, as the host describes it to the kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "attention/page_slices.h"
#include "cuda/attention_params.h"
#include "cuda/work/page_list.cuh"
#include "quire/ops.h"

namespace quire::cuda {

// What the blocks leave to the merge. A slot belongs to the part of a row tile that lies in one run
// (work/page_list.cuh).
struct PagePartials {
  int4* tiles;    // [tiles], written by note_tiles
  float2* state;  // [slots, groups, num_kv_heads, tile_rows] (max in log2, sum)
  float4* acc;    // [slots, groups, num_kv_heads, tile_rows, head class / 32, 8 lanes]: a lane's elements of a fragment
};

struct DecodePagesParams : AttentionParams {
  int num_kv_heads;
  PageListShape list;
  int parts;   // sets of KV heads: block i works on set i % parts
  int groups;  // groups of warps; each has every head of the part and takes every groups-th slice
  int num_stages, stage_bytes;
  // Whether PagesKernel::access divides the address of every row of a slice in shared memory, as the plain loop needs.
  bool aligned;
  attention::PageSlice slice;
  PagePartials partials_of_pages;
};

// The parameters of the merge. They are few, since a kernel of a few microseconds waits for each line of its
// parameters.
struct MergePagesParams {
  PagePartials partials;
  int tile_rows, max_tiles, num_kv_heads, group_size, groups;
  int warps, log2_warps;  // warps that share the partials of a row
  int value_piece;        // the elements of ValueOperand's pieces, which decide the order of elements in a partial
  int tiles;
  std::int64_t num_tokens;
  OutputRule output;
};

// What the host needs to know of a compiled kernel.
struct PagesKernel {
  int tile_rows, head_class, warps, threads;
  int header_bytes, shared_bytes, slack, max_stages;
  int value_piece, access;
};

// The bytes of workspace for the calls within a problem's bounds. row_bytes is a row of K and one of V together.
std::size_t pages_workspace(const PagesKernel& kernel, std::int64_t row_bytes, const AttentionProblem& problem);

// Launches `function`, the compiled kernel, and then the merge. `workspace` holds pages_workspace bytes.
cudaError_t launch_pages(const PagesKernel& kernel, void (*function)(DecodePagesParams), const AttentionParams& params,
                         cudaStream_t stream);

}  // namespace quire::cuda
