// Merges the partial results of decode_pages into rows of the output.
#pragma once

#include <cstdint>

#include "attention/softmax.h"
#include "cuda/kernel/decode_pages/params.h"
#include "cuda/output/row.cuh"
#include "cuda/ptx/bulk.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/softmax/bias.cuh"

namespace quire::cuda {

inline constexpr int kMergeWarps = 4;  // warps of a block whose rows have one warp each

// The partials of a row are divided among `p.warps` warps. In each, a lane has kHead / 32 elements of the row.
template <int kHead>
struct PagesMerge {
  static constexpr int kMostWarps = 16;                            // the most warps that share a row
  static constexpr int kVectors = kHead <= 128 ? 1 : kHead / 128;  // float4 vectors of a lane
  static constexpr int kLanes = kHead / 4 / kVectors;              // lanes that have elements
  static constexpr int kAtOnce = 8 / kVectors;                     // partials that are loaded together

  struct alignas(16) Sum {
    float max = -INFINITY, sum = 0.0F;  // max is in log2
    float4 total[kVectors] = {};

    // Adds `count` partials to this sum. `state_step` and `vector_step` are the bytes from one partial to the next, of
    // its state and of this lane's elements; the vectors of a lane are `vector_stride` float4 apart. All lanes call.
    __device__ __forceinline__ void add(const char* states, std::int64_t state_step, const char* vectors,
                                        std::int64_t vector_step, int vector_stride, int count, int lane) {
      states += lane % kAtOnce * state_step;
#pragma unroll 1
      for (; count > 0; count -= kAtOnce) {
        float4 x[kAtOnce][kVectors];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            if (j < count && lane < kLanes) x[j][v] = reinterpret_cast<const float4*>(vectors)[v * vector_stride];
          }
          vectors += vector_step;
        }
        // Lane j holds the state of partial j, and so do lanes j + kAtOnce, j + 2 kAtOnce and so on. A partial without
        // a visible key is left out, whatever it holds.
        const float2 from = lane % kAtOnce < count ? *reinterpret_cast<const float2*>(states) : float2{};
        states += kAtOnce * state_step;
        const bool exists = from.y != 0.0F;
        float top = exists ? from.x : -INFINITY;
#pragma unroll
        for (int reach = 1; reach < kAtOnce; reach *= 2) top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, reach));
        top = fmaxf(top, max);
        // Where both maxima are -inf, their difference would be NaN and would hide a sum that is NaN; the factor is 1
        // then.
        const float factor = from.x == top ? 1.0F : ptx::ex2_approx(from.x - top);
        float part = exists ? from.y * factor : 0.0F;
#pragma unroll
        for (int reach = 1; reach < kAtOnce; reach *= 2) part += __shfl_xor_sync(kFullWarp, part, reach);
        const float before = max == top ? 1.0F : ptx::ex2_approx(max - top);
        max = top;
        sum = fmaf(sum, before, part);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) total[v] = scaled_sum({}, total[v], before);
        const std::uint32_t there = __ballot_sync(kFullWarp, exists);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const float by = __shfl_sync(kFullWarp, factor, j);
          if ((there >> j & 1U) == 0) continue;
#pragma unroll
          for (int v = 0; v < kVectors; ++v) total[v] = scaled_sum(total[v], x[j][v], by);
        }
      }
    }
    static __device__ __forceinline__ float4 scaled_sum(float4 a, float4 b, float by) {
      return {fmaf(b.x, by, a.x), fmaf(b.y, by, a.y), fmaf(b.z, by, a.z), fmaf(b.w, by, a.w)};
    }
  };

  // Merges one row and writes it. `unit` numbers the rows as (tile, KV head, row of the tile). `sums` is shared memory
  // for p.warps times kLanes sums, and `own` is shared memory for the kHead floats of this row.
  static __device__ __forceinline__ void run(const MergePagesParams& p, int unit, Sum* sums, float* own, int warp,
                                             int lane) {
    const int row = unit % p.tile_rows;
    const int head = unit / p.tile_rows % p.num_kv_heads;
    const int tile = unit / p.tile_rows / p.num_kv_heads;
    const int index = tile % p.max_tiles * p.tile_rows + row;  // the row's index within its sequence
    const int query = index / p.group_size;
    const int query_head = head * p.group_size + index - query * p.group_size;
    // The rows between two partials of one row.
    const std::int64_t stride = static_cast<std::int64_t>(p.num_kv_heads) * p.tile_rows;
    const std::int64_t state_stride = stride * static_cast<int>(sizeof(float2));
    const std::int64_t vector_stride = stride * (kHead * static_cast<int>(sizeof(float)));
    const std::int64_t before = (static_cast<std::int64_t>(tile) * p.groups + warp) * stride + head * p.tile_rows + row;
    const char* states = reinterpret_cast<const char*>(p.partials.state + before);
    const char* vectors = reinterpret_cast<const char*>(p.partials.acc + before * (kHead / 4) + lane % kLanes);
    float4* places[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int place = v * kLanes + lane % kLanes;  // which four elements of a lane of decode_pages these are
      const int f = place / 8 * 4;
      places[v] =
          reinterpret_cast<float4*>(own + (f / p.value_piece * 8 + place % 8) * p.value_piece + f % p.value_piece);
    }
    // These are computed now, before the wait below.
    asm volatile("" ::"r"(query), "r"(query_head), "l"(states), "l"(vectors), "l"(places[0]));
    ptx::touch_params<sizeof(MergePagesParams)>(p);
    touch_signs(p.output.rotation, p.output.shape.block, lane);
    ptx::let_next_kernel_start();
    ptx::wait_for_previous_kernel();
    const int4 note = tile < p.tiles ? p.partials.tiles[tile] : make_int4(0, -1, 0, 0);
    const int num_rows = abs(note.w);
    // Partial i comes from run i / groups and group i % groups. This warp has partials warp, warp + p.warps and so on.
    const int count = note.w < 0 || row >= num_rows ? 0 : (note.y - note.x + 1) * p.groups;
    Sum sum;
    int left = (count - warp + p.warps - 1) >> p.log2_warps;  // negative where this warp has none
    states += note.x * p.groups * state_stride;
    vectors += note.x * p.groups * vector_stride;
    std::int64_t state_step = p.warps * state_stride;
    std::int64_t vector_step = p.warps * vector_stride;
#pragma unroll 1
    for (int pass = 0;; ++pass) {  // pass 0 adds this warp's partials, pass 1 the warps' sums
      sum.add(states, state_step, vectors, vector_step, pass == 0 ? kLanes : 1, left, lane);
      if (pass == 1 || p.warps == 1) break;
      if (lane < kLanes) sums[warp * kLanes + lane] = sum;
      __syncthreads();
      if (warp > 0) return;
      sum = {};
      left = p.warps;
      states = reinterpret_cast<const char*>(&sums[0].max);
      vectors = reinterpret_cast<const char*>(sums[lane % kLanes].total);
      state_step = vector_step = kLanes * static_cast<int>(sizeof(Sum));
    }
    if (row >= num_rows) return;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (lane < kLanes) *places[v] = sum.total[v];
    }
    __syncwarp();
    const int token = note.z + query;
    using Map = LaneMap<8, kHead / 8, true>;
    finish_row<Map>(p.output, own, {sum.max * kLn2, sum.sum}, token, query_head, lane % Map::kLanes,
                    lane < Map::kLanes && token < p.num_tokens);
  }
};

}  // namespace quire::cuda
