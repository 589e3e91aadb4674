// The partial results of decode_pages to outputs: one block for four rows of a KV head.
#pragma once

#include <cstdint>

#include "attention/softmax.h"
#include "cuda/kernel/decode_pages/params.h"
#include "cuda/output/row.cuh"
#include "cuda/ptx/bulk.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/softmax/bias.cuh"

namespace quire::cuda {

inline constexpr int kMostMergeSplits = 8;

// `index`: of the block: (tile, KV head, set). The warps are kHead / 32 quarters of the elements times `splits` that
// share the partials.
template <int kHead>
struct PagesMerge {
  static constexpr int kQuarters = kHead / 32;  // a float4 a lane each

  float4 acc[kMostMergeSplits][kQuarters][32];
  float2 state[kMostMergeSplits][4];
  float rows[4][kHead];

  __device__ __forceinline__ void run(const MergePagesParams& p, int index, int splits, int warp, int lane) {
    const int sets = p.tile_rows / 4;
    const int set = index % sets;
    const int head = index / sets % p.num_kv_heads;
    const int tile = index / sets / p.num_kv_heads;
    const int row = row_of(p, set, lane % 4);
    const int split = warp / kQuarters;
    const int quarter = warp % kQuarters;
    ptx::let_next_kernel_start();
    ptx::wait_for_previous_kernel();
    const int4 note = p.partials.tiles[tile];
    const int num_rows = note.w < 0 ? -note.w : note.w;
    if (num_rows == 0) return;

    // Partials split, split + splits, .. of this tile: those of run r and group g are r groups + g.
    const int count = note.w < 0 ? 0 : (note.y - note.x + 1) * p.groups;
    const std::int64_t first = (static_cast<std::int64_t>(note.x) + tile) * p.groups;
    Sum sum;
#pragma unroll 4
    for (int i = split; i < count; i += splits) {
      const std::int64_t place = (first + i) * p.num_kv_heads + head;
      const float2 from = p.partials.state[place * p.tile_rows + row];
      sum.add(from.x, from.y, p.partials.acc[(place * sets + set) * kHead + quarter * 32 + lane]);
    }
    if (splits > 1) {
      acc[split][quarter][lane] = sum.total;
      if (quarter == 0 && lane < 4) state[split][lane] = make_float2(sum.max, sum.sum);
      __syncthreads();
    }
    if (split == 0) {
#pragma unroll 1
      for (int s = 1; s < splits; ++s) {
        const float2 from = state[s][lane % 4];
        sum.add(from.x, from.y, acc[s][quarter][lane]);
      }
      const float four[4] = {sum.total.x, sum.total.y, sum.total.z, sum.total.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int f = 4 * quarter + e;
        rows[lane % 4][(f / p.value_piece * 8 + lane / 4) * p.value_piece + f % p.value_piece] = four[e];
      }
      if (quarter == 0 && lane < 4) state[0][lane] = make_float2(sum.max, sum.sum);
    }
    __syncthreads();
    using Map = LaneMap<8, kHead / 8, true>;
    constexpr int kRowsAtOnce = 32 / Map::kLanes;
    const int t = warp * kRowsAtOnce + lane / Map::kLanes;
    if (warp * kRowsAtOnce >= 4) return;
    const int own_row = row_of(p, set, t);
    const int index_of_row = tile % p.max_tiles * p.tile_rows + own_row;
    const std::int64_t token = note.z + index_of_row / p.group_size;
    finish_row<Map>(p.output, rows[t], {state[0][t].x * kLn2, state[0][t].y}, token,
                    head * p.group_size + index_of_row % p.group_size, lane % Map::kLanes,
                    own_row < num_rows && token < p.num_tokens);
  }

 private:
  // Row of the tile that lanes t of a set have: as decode_pages' columns.
  static __device__ __forceinline__ int row_of(const MergePagesParams& p, int set, int t) {
    return p.tile_rows == 4 ? t : 8 * (set / 2) + 2 * t + set % 2;
  }

  struct Sum {
    float max = -INFINITY, sum = 0.0F;  // max in log2
    float4 total = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
    // A partial without a visible key is left out, whatever its accumulator holds.
    __device__ __forceinline__ void add(float other_max, float other_sum, const float4& x) {
      if (other_sum == 0.0F) return;
      const float top = fmaxf(max, other_max);
      // NaN sums have no maximum: -inf less -inf must not hide them.
      const float own = max == top ? 1.0F : ptx::ex2_approx(max - top);
      const float factor = other_max == top ? 1.0F : ptx::ex2_approx(other_max - top);
      max = top;
      sum = sum * own + other_sum * factor;
      total.x = total.x * own + x.x * factor;
      total.y = total.y * own + x.y * factor;
      total.z = total.z * own + x.z * factor;
      total.w = total.w * own + x.w * factor;
    }
  };
};

}  // namespace quire::cuda
