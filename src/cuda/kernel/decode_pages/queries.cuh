// The query rows of a segment as a consumer warp of decode_pages keeps them: as the second operand of its first
// product.
#pragma once

#include <cstdint>

#include "cuda/kernel/decode_pages/config.h"
#include "cuda/kernel/decode_pages/output.cuh"
#include "cuda/ptx/bulk.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/softmax/bias.cuh"
#include "cuda/stage/query.cuh"

namespace quire::cuda {

template <class KeyF, class ValueF, int kHead, int kRows>
class PageQueries : protected PageOutput<KeyF, ValueF, kHead, kRows> {
 protected:
  using Base = PageOutput<KeyF, ValueF, kHead, kRows>;
  using Base::head_;
  using Base::kColumns;
  using Base::kSpread;
  using Base::kTiles;
  using Base::lane_;
  using Base::own_;
  using Base::p_;
  using Base::pair_;
  using Base::quad_;
  using Base::row_of;
  using typename Base::Config;
  using typename Base::Keys;
  using KeyOp = KeyOperand<KeyF>;
  static constexpr bool kInShared = Config::kQueryInShared;
  static constexpr int kSteps = kHead / 16;  // k-steps of the first product
  static constexpr int kStepsOfPiece = Keys::kElements / 4;
  // Queries are multiplied by this gain, so that they stay normal fp16 numbers when they are divided by a pair's
  // weight.
  static constexpr float kQueryGain = KeyOp::weight(1) != 1.0F || KeyOp::kPlanes > 1 ? 32.0F : 1.0F;

  using Base::Base;

  __device__ __forceinline__ void load_queries(const TileRows& rows) {
    TileRows tile = rows;
    tile.kv_head = head_;
    if (lane_ < kRows) own_.rows[lane_] = row_info(p_, tile, lane_);
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll 1
      for (int r = 0; r < Config::kQueryRows; r += 4) {
        put_four_queries<KeyF, kHead>(p_, tile, own_.rows + 8 * m + r, own_.queries + r * Config::kQueryPitch,
                                      Config::kQueryPitch, lane_);
      }
      __syncwarp();
      keep_queries(m);
      __syncwarp();
    }
    factor_ = logit_factor(p_, tile) * kLog2E;
    if constexpr (!kInShared) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        row_factor_[c] = factor_ * own_.rows[row_of(c)].scale;
        query_sum_[c] = own_.rows[row_of(c)].sum;
      }
    }
  }

  __device__ __forceinline__ uint2 query_fragment(int m, int step) const {
    if constexpr (kInShared) return own_.fragments[m][step][lane_];
    return make_uint2(query_[m][step][0], query_[m][step][1]);
  }
  // The factor of a column's products, and below it the sum of its query's elements.
  __device__ __forceinline__ float row_factor(int column) const {
    if constexpr (kInShared) return factor_ * own_.rows[row_of(column)].scale;
    return row_factor_[column];
  }
  __device__ __forceinline__ float query_sum(int column) const {
    if constexpr (kInShared) return own_.rows[row_of(column)].sum;
    return query_sum_[column];
  }

 private:
  // Keeps rows 8 m to 8 m + 7 as the second operand, with their elements arranged as those of the keys are.
  __device__ __forceinline__ void keep_queries(int m) {
    const int row = kSpread ? quad_ / 2 : quad_;
    const std::uint8_t* from = own_.queries + row * Config::kQueryPitch + 2 * pair_ * Keys::kElements;
    const bool empty = kSpread && quad_ % 2 != 0;
#pragma unroll
    for (int j = 0; j < Keys::kCount; ++j) {
      std::uint32_t words[Keys::kElements / 2];
#pragma unroll
      for (int w = 0; w < Keys::kElements / 2; w += 4) {
        ptx::load_shared_128(ptx::shared_address(from) + 8 * j * Keys::kElements + 4 * w, words + w);
      }
#pragma unroll
      for (int i = 0; i < Keys::kElements / 2; ++i) {
        constexpr auto selector = [](int pair) {
          return (KeyOp::element(pair, 0) % 2 == 0 ? 0x0010U : 0x0032U) |
                 (KeyOp::element(pair, 1) % 2 == 0 ? 0x5400U : 0x7600U);
        };
        std::uint32_t both =
            ptx::permute(words[KeyOp::element(i, 0) / 2], words[KeyOp::element(i, 1) / 2], selector(i));
        if constexpr (kQueryGain != 1.0F) {
          both = pair_bits(__hmul2(as_half2(both), __float2half2_rn(kQueryGain / KeyOp::weight(i))));
        }
        const int step = j * kStepsOfPiece + i / 2;
        if constexpr (kInShared) {
          (i % 2 == 0 ? own_.fragments[m][step][lane_].x : own_.fragments[m][step][lane_].y) = both;
        } else {
          query_[m][step][i % 2] = empty ? 0U : both;
        }
      }
    }
  }

  std::uint32_t query_[kInShared ? 1 : kTiles][kInShared ? 1 : kSteps][2];
  float factor_;  // the part of the factor that all rows share
  float row_factor_[kInShared ? 1 : kColumns], query_sum_[kInShared ? 1 : kColumns];
};

}  // namespace quire::cuda
