// The rows of a block whose warps have divided the keys. Their running softmaxes and accumulators meet in shared
// memory, and each warp finishes some rows.
//
// Merge is a struct with acc [kWarps][rows][head_size + 4] and with max and sum [kWarps][rows].
#pragma once

#include <cstdint>

#include "attention/softmax.h"
#include "cuda/attention_params.h"
#include "cuda/lane/map.cuh"
#include "cuda/output/redo.cuh"
#include "cuda/output/row.cuh"
#include "cuda/softmax/softmax.cuh"
#include "cuda/work/rows.cuh"

namespace quire::cuda {

// Writes one warp's accumulators of 16 rows; `state` is finished.
template <class Merge, int kFragments>
__device__ __forceinline__ void put_partial(Merge& merge, int warp, const RunningSoftmax<RowsOnM, 1>& state,
                                            const float (&acc)[1][kFragments][4]) {
#pragma unroll
  for (int n = 0; n < kFragments; ++n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      *reinterpret_cast<float2*>(&merge.acc[warp][state.at.row(0, r)][state.at.key(n, 0)]) =
          make_float2(state.output(acc[0][n][2 * r], 0, 2 * r), state.output(acc[0][n][2 * r + 1], 0, 2 * r + 1));
    }
  }
  if (state.at.leads()) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      merge.max[warp][state.at.row(0, r)] = state.max[0][r];
      merge.sum[warp][state.at.row(0, r)] = state.sum[0][r];
    }
  }
}

// Finishes the rows of a warp: row `warp` and every kWarps-th after it.
template <class KeyF, class ValueF, int kNumRows, class Merge>
__device__ __forceinline__ void merge_warps(const AttentionParams& p, const TileRows& tile, Merge& merge,
                                            const RowInfo* rows, int warp, int lane) {
  const float value_factor = p.v_scale.at(tile.batch, tile.kv_head);
  for (int row = warp; row < kNumRows; row += kWarps) {
    const RowInfo& info = rows[row];
    if (info.query < 0) break;
    const std::int64_t token = tile.query_begin + info.query;
    const int query_head = info.head;
    attention::SoftmaxState state;
    float weight[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) state.max = fmaxf(state.max, merge.max[w][row]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      // A warp without a visible key is left out, whatever its accumulator holds.
      weight[w] = merge.sum[w][row] == 0.0F ? 0.0F : attention::rescale(merge.max[w][row], state.max);
      state.sum = fmaf(merge.sum[w][row], weight[w], state.sum);
    }
    float* merged = merge.acc[0][row];
    bool finite = true;
    for (int c = lane; c < p.head_size_v; c += 32) {
      float x = 0.0F;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (merge.sum[w][row] != 0.0F) x = fmaf(merge.acc[w][row][c], weight[w], x);
      }
      finite = finite && exact::is_finite(x);
      merged[c] = x * value_factor;
    }
    if constexpr (ValueF::kStatsOf == format::StatsOf::kNothing) {
      // Where an infinite or NaN value has met weights of 0, the row is computed again, value by value.
      if (!__all_sync(kFullWarp, finite)) {
        const TileRows same_tile = tile;  // a copy, so that the call does not force the caller's out of registers
        state = exact_row<KeyF, ValueF>(p, same_tile, token, query_head, merged, lane);
      }
    }
    __syncwarp();
    write_row<LaneMap<8, 32, true>>(p, merged, state, token, query_head, tile.split, lane);
  }
}

}  // namespace quire::cuda
