// The partial results of decode_pages to outputs: one block for four rows of a KV head.
#pragma once

#include <cstdint>

#include "attention/softmax.h"
#include "cuda/kernel/decode_pages/params.h"
#include "cuda/output/row.cuh"
#include "cuda/ptx/bulk.cuh"
#include "cuda/work/page_list.cuh"

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

  __device__ __forceinline__ void run(const DecodePagesParams& p, int index, int splits, int warp, int lane) {
    const int sets = p.list.tile_rows / 4;
    const int set = index % sets;
    const int head = index / sets % p.num_kv_heads;
    const int tile = index / sets / p.num_kv_heads;
    const int batch = tile / p.list.max_tiles;
    const int first_row = tile % p.list.max_tiles * p.list.tile_rows;

    const SequenceSlices work = sequence_slices(p, p.list.tile_rows, batch);
    const PageList list(p, p.list, lane);
    const PageRuns runs(p.list, list.total());
    const int grains = work.grains(p.list.grain);
    const std::int64_t begin =
        list.before(p, p.list, batch) + static_cast<std::int64_t>(tile % p.list.max_tiles) * grains;
    const auto first_run = static_cast<int>(begin / runs.length);
    const int num_runs = grains == 0 ? 0 : static_cast<int>((begin + grains - 1) / runs.length) - first_run + 1;
    const int query_begin = p.cu_seqlens_q[batch * p.cu_stride];
    const int num_rows = (p.cu_seqlens_q[(batch + 1) * p.cu_stride] - query_begin) * p.group_size;
    ptx::wait_for_previous_kernel();
    if (tile % p.list.max_tiles >= work.tiles) return;

    // Partials split, split + splits, .. of this tile: those of run r and group g are r groups + g.
    const int split = warp / kQuarters;
    const int quarter = warp % kQuarters;
    const int count = num_runs * p.groups;
    const std::int64_t first = (static_cast<std::int64_t>(first_run) + tile) * p.groups;
    attention::SoftmaxState sum;
    float4 total = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
    const int row = row_of(p, set, lane % 4);
#pragma unroll 4
    for (int i = split; i < count; i += splits) {
      const std::int64_t place = (first + i) * p.num_kv_heads + head;
      const float2 from = p.state[place * p.list.tile_rows + row];
      const float4 x = p.acc[(place * sets + set) * kHead + quarter * 32 + lane];
      add(sum, total, {from.x, from.y}, x);
    }
    acc[split][quarter][lane] = total;
    if (quarter == 0 && lane < 4) state[split][lane] = make_float2(sum.max, sum.sum);
    __syncthreads();
    if (split == 0) {
      for (int s = 1; s < splits; ++s) {
        const float2 from = state[s][lane % 4];
        add(sum, total, {from.x, from.y}, acc[s][quarter][lane]);
      }
      const float four[4] = {total.x, total.y, total.z, total.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int f = 4 * quarter + e;
        rows[lane % 4][(f / p.value_piece * 8 + lane / 4) * p.value_piece + f % p.value_piece] = four[e];
      }
      if (quarter == 0 && lane < 4) state[0][lane] = make_float2(sum.max, sum.sum);
    }
    __syncthreads();
    for (int t = warp; t < 4; t += splits * kQuarters) {
      const int index_of_row = first_row + row_of(p, set, t);
      if (index_of_row >= num_rows) continue;
      const std::int64_t token = query_begin + index_of_row / p.group_size;
      if (token >= p.num_tokens) continue;
      finish_row<WideMap>(p.output, rows[t], {state[0][t].x, state[0][t].y}, token,
                          head * p.group_size + index_of_row % p.group_size, lane);
    }
  }

 private:
  // Row of the tile that lanes t of a set have: as decode_pages' columns.
  static __device__ __forceinline__ int row_of(const DecodePagesParams& p, int set, int t) {
    return p.list.tile_rows == 4 ? t : 8 * (set / 2) + 2 * t + set % 2;
  }
  // A partial without a visible key is left out, whatever its accumulator holds.
  static __device__ __forceinline__ void add(attention::SoftmaxState& sum, float4& total,
                                             const attention::SoftmaxState& other, const float4& x) {
    if (other.sum == 0.0F) return;
    const float max = exact::max(sum.max, other.max);
    const float own = attention::rescale(sum.max, max);
    const float factor = attention::rescale(other.max, max);
    sum.max = max;
    sum.sum = sum.sum * own + other.sum * factor;
    total.x = total.x * own + x.x * factor;
    total.y = total.y * own + x.y * factor;
    total.z = total.z * own + x.z * factor;
    total.w = total.w * own + x.w * factor;
  }
};

}  // namespace quire::cuda
