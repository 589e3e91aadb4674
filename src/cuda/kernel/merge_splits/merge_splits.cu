// Folds the splits of each (token, head) in key order and finishes the row. One block a row.
#include "cuda/kernel/merge_splits/merge_splits.h"

#include "attention/softmax.h"
#include "cuda/launch.h"
#include "cuda/output/row.cuh"

namespace quire::cuda {
namespace {

__global__ void __launch_bounds__(kAttentionThreads) merge_splits(const __grid_constant__ AttentionParams p) {
  constexpr int kColumns = format::kMaxHeadSize / kAttentionThreads;
  const int thread = static_cast<int>(threadIdx.x);
  __shared__ float row[format::kMaxHeadSize];
  const std::int64_t index = blockIdx.x;
  const std::int64_t token = index / p.num_q_heads;
  const int head = static_cast<int>(index - token * p.num_q_heads);
  if (token >= p.cu_seqlens_q[p.batch * p.cu_stride]) return;
  if (p.min_rows > 0) {  // sequences of fewer rows are another kernel's
    int low = 0;
    for (int high = p.batch - 1; low < high;) {
      const int middle = (low + high + 1) / 2;
      if (p.cu_seqlens_q[middle * p.cu_stride] <= token) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    const int query_len = p.cu_seqlens_q[(low + 1) * p.cu_stride] - p.cu_seqlens_q[low * p.cu_stride];
    if (query_len * p.group_size < p.min_rows) return;
  }
  const float2* states = p.partials.state + index * p.max_splits;
  const float* partial = p.partials.acc + index * p.max_splits * p.head_size_v;

  attention::SoftmaxState state;
  for (int s = 0; s < p.max_splits; ++s) state.max = exact::max(state.max, states[s].x);
  float acc[kColumns] = {};
  for (int s = 0; s < p.max_splits; ++s) {
    if (states[s].y == 0.0F) continue;  // no visible key: its accumulator is not looked at
    const float factor = attention::rescale(states[s].x, state.max);
    state.sum = fmaf(states[s].y, factor, state.sum);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int column = thread + i * kAttentionThreads;
      if (column < p.head_size_v) acc[i] = fmaf(partial[s * p.head_size_v + column], factor, acc[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int column = thread + i * kAttentionThreads;
    if (column < p.head_size_v) row[column] = acc[i];
  }
  __syncthreads();
  if (thread < 32) finish_row<WideMap>(p.output, row, state, token, head, thread);
}

}  // namespace

cudaError_t launch_merge_splits(const AttentionParams& params, std::int64_t num_rows, cudaStream_t stream) {
  return launch_kernel(&merge_splits, dim3(static_cast<unsigned>(num_rows)), kAttentionThreads, 0, params, stream);
}

}  // namespace quire::cuda
