// How the rows of a warp leave from accumulators in the fragments of m16n8k16.
#pragma once

#include <cstdint>

#include "attention/softmax.h"
#include "cuda/attention_params.h"
#include "cuda/output/redo.cuh"
#include "cuda/output/row.cuh"
#include "cuda/softmax/softmax.cuh"
#include "cuda/work/rows.cuh"

namespace quire::cuda {

// One warp brings its rows, from first_row on, from accumulators to the output or to the split's partials, through
// `rows` in shared memory.
template <class KeyF, class ValueF, int kTiles, int kFragments>
__device__ __forceinline__ void finish_rows(const AttentionParams& p, const TileRows& tile,
                                            const float (&acc)[kTiles][kFragments][4],
                                            RunningSoftmax<RowsOnM, kTiles>& softmax, float (*rows)[8 * kFragments + 4],
                                            const RowInfo* row_infos, int first_row, int lane) {
  const float value_factor = p.v_scale.at(tile.batch, tile.kv_head);
  softmax.finish();
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float* row = rows[first_row + softmax.at.row(m, r)];
#pragma unroll
      for (int n = 0; n < kFragments; ++n) {
        *reinterpret_cast<float2*>(&row[softmax.at.key(n, 0)]) =
            make_float2(softmax.output(acc[m][n][2 * r], m, 2 * r) * value_factor,
                        softmax.output(acc[m][n][2 * r + 1], m, 2 * r + 1) * value_factor);
      }
      // The state of a row travels in the row's padding.
      if (softmax.at.leads()) {
        *reinterpret_cast<float2*>(&row[8 * kFragments]) = make_float2(softmax.max[m][r], softmax.sum[m][r]);
      }
    }
  }
  __syncwarp();
  // Several rows at a time, a group of lanes each.
  using Map = LaneMap<16, 8 * kFragments / 16, true>;
  constexpr int kRowsAtOnce = 32 / Map::kLanes;
  const int row_lane = lane % Map::kLanes;
#pragma unroll 1
  for (int r = first_row; r < first_row + 16 * kTiles; r += kRowsAtOnce) {
    if (row_infos[r].query < 0) break;
    const RowInfo& info = row_infos[r + lane / Map::kLanes];
    const bool exists = info.query >= 0;
    float* row = rows[r + lane / Map::kLanes];
    if constexpr (ValueF::kStatsOf == format::StatsOf::kNothing) {
      // Where an infinite or NaN value has met weights of 0, the row is computed again, value by value.
      bool finite = true;
      for (int c = row_lane; c < p.head_size_v; c += Map::kLanes) finite = finite && exact::is_finite(row[c]);
      const std::uint32_t odd = __ballot_sync(kFullWarp, exists && !finite);
      if (odd != 0) {
        for (int i = 0; i < kRowsAtOnce; ++i) {
          if ((odd >> (i * Map::kLanes) & (0xffffffffU >> (32 - Map::kLanes))) == 0) continue;
          const TileRows same_tile = tile;  // a copy, so that the call does not force the caller's out of registers
          const RowInfo& again = row_infos[r + i];
          const attention::SoftmaxState state =
              exact_row<KeyF, ValueF>(p, same_tile, tile.query_begin + again.query, again.head, rows[r + i], lane);
          if (lane == 0) *reinterpret_cast<float2*>(&rows[r + i][8 * kFragments]) = make_float2(state.max, state.sum);
        }
        __syncwarp();
      }
    }
    const attention::SoftmaxState state{row[8 * kFragments], row[8 * kFragments + 1]};
    write_row<Map>(p, row, state, tile.query_begin + info.query, info.head, tile.split, row_lane, exists);
  }
}

}  // namespace quire::cuda
