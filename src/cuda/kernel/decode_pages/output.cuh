// How a consumer warp of decode_pages leaves a segment: as a partial result, in the order of the fragments.
#pragma once

#include <cstdint>

#include "attention/softmax.h"
#include "cuda/kernel/decode_pages/config.h"
#include "cuda/kernel/decode_pages/softmax.cuh"
#include "cuda/output/redo.cuh"
#include "cuda/softmax/bias.cuh"

namespace quire::cuda {

// Whether a key of a segment belongs to this group of warps.
struct SlicesOfGroup {
  SliceRun run;
  int group, groups;
  __device__ __forceinline__ bool operator()(int key) const { return run.index(key / kSliceKeys) % groups == group; }
};

template <class KeyF, class ValueF, int kHead, int kRows>
class PageOutput : protected PageSoftmax<KeyF, ValueF, kHead, kRows> {
 protected:
  using Softmax = PageSoftmax<KeyF, ValueF, kHead, kRows>;
  using Softmax::acc_;
  using Softmax::element_of;
  using Softmax::kColumns;
  using Softmax::kNothing;
  using Softmax::kSpread;
  using Softmax::max_;
  using Softmax::offset_;
  using Softmax::sum_;
  using Softmax::tile_of;
  using Softmax::unit_;
  using typename Softmax::Config;
  using typename Softmax::ValueOp;
  using typename Softmax::Values;
  static constexpr int kTilesOfPiece = Values::kElements / 2;

  __device__ __forceinline__ PageOutput(const DecodePagesParams& p, typename Config::Warp& own, int part, int warp,
                                        int lane)
      : p_(p),
        own_(own),
        lane_(lane),
        quad_(lane / 4),
        pair_(lane % 4),
        group_(warp / p.slice.num_heads),
        head_(part * p.slice.num_heads + warp % p.slice.num_heads) {}

  // The query row of the tile that a column of this lane holds.
  __device__ __forceinline__ int row_of(int column) const {
    return kSpread ? pair_ : 8 * (column / 2) + 2 * pair_ + column % 2;
  }
  // Element `n` of piece j of a column's output, before it is multiplied by v_scale.
  __device__ __forceinline__ float output(int column, int j, int n) const {
    const float acc = acc_[tile_of(column)][j * kTilesOfPiece + n / 2][element_of(column, n % 2)];
    return fmaf(acc, ValueOp::kScale / ValueOp::weight(n), offset_[column]) * unit_;
  }

  __device__ __forceinline__ void finish(const typename Config::Segment& segment) {
    const auto add = [](float a, float b) { return a + b; };
    const float value_factor = p_.v_scale.at(segment.tile.batch, head_);
    const std::int64_t place = (static_cast<std::int64_t>(segment.slot) * p_.groups + group_) * p_.num_kv_heads + head_;
    float4* out = p_.partials_of_pages.acc + place * kRows * (kHead / 4) + quad_;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      attention::SoftmaxState state{max_[c] == kNothing ? -INFINITY : max_[c], KeysOnM::over_row(sum_[c], add)};
      offset_[c] = KeysOnM::over_row(offset_[c], add);
      float y[kHead / 8];
      bool finite = true;
#pragma unroll
      for (int f = 0; f < kHead / 8; ++f) {
        y[f] = output(c, f / Values::kElements, f % Values::kElements) * value_factor;
        if (dimension(f) < p_.head_size_v) finite = finite && exact::is_finite(y[f]);
      }
      if constexpr (ValueF::kStatsOf == format::StatsOf::kNothing) {
        if (!__all_sync(kFullWarp, finite)) redo(segment, c, finite, y, state);
      }
      if (quad_ == 0) p_.partials_of_pages.state[place * kRows + row_of(c)] = make_float2(state.max, state.sum);
#pragma unroll
      for (int f = 0; f < kHead / 8; f += 4) {
        out[row_of(c) * (kHead / 4) + f / 4 * 8] = make_float4(y[f], y[f + 1], y[f + 2], y[f + 3]);
      }
    }
  }

  // The dimension of V that this lane's element f is.
  __device__ __forceinline__ int dimension(int f) const {
    return (f / Values::kElements * 8 + quad_) * Values::kElements + f % Values::kElements;
  }

  // Rows of a column that met an infinite or NaN value are computed again, value by value.
  __device__ __forceinline__ void redo(const typename Config::Segment& segment, int column, bool finite,
                                       float (&y)[kHead / 8], attention::SoftmaxState& state) {
    TileRows tile = segment.tile;
    tile.kv_head = head_;
    tile.first = max(tile.first, segment.run.first * kSliceKeys);
    tile.end = min(tile.end, (segment.run.slice(segment.num_slices - 1) + 1) * kSliceKeys);
    auto* row = reinterpret_cast<float*>(own_.queries);  // the queries are in registers by now, so their place is free
    static_assert(Config::kQueryRows * Config::kQueryPitch >= kHead * static_cast<int>(sizeof(float)));
    const std::uint32_t odd = __ballot_sync(kFullWarp, !finite);
    for (int t = 0; t < 4; ++t) {
      const RowInfo& info = own_.rows[__shfl_sync(kFullWarp, row_of(column), t)];
      if ((odd & (0x11111111U << t)) == 0 || info.query < 0) continue;
      const attention::SoftmaxState again =
          exact_row<KeyF, ValueF>(p_, tile, tile.query_begin + info.query, info.head, row, lane_,
                                  SlicesOfGroup{segment.run, group_, p_.groups});
      __syncwarp();
      if (pair_ == t) {
        state = {again.max * kLog2E, again.sum};
#pragma unroll
        for (int f = 0; f < kHead / 8; ++f) y[f] = dimension(f) < p_.head_size_v ? row[dimension(f)] : 0.0F;
      }
      __syncwarp();
    }
  }

  const DecodePagesParams& p_;
  typename Config::Warp& own_;
  const int lane_, quad_, pair_, group_, head_;
};

}  // namespace quire::cuda
