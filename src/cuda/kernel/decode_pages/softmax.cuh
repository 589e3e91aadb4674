// The softmax of decode_pages, between its two products: a warp's running maxima, sums and accumulators.
#pragma once

#include <cstdint>

#include "cuda/kernel/decode_pages/config.h"
#include "cuda/ptx/math.cuh"
#include "cuda/softmax/bias.cuh"
#include "cuda/softmax/orientation.cuh"
#include "cuda/stage/metadata.cuh"
#include "format/exact.h"

namespace quire::cuda {

// A logit in log2 with its biases. It is a function call, because inlined it would be copied for each logit of a lane.
static __device__ __noinline__ float biased_logit(const AttentionParams& p, const TileRows& tile, const RowInfo& row,
                                                  float s, int key) {
  return kLog2E * add_bias(bias_row(p, tile, row), exact::nan_unless_finite(s * kLn2), key);
}

template <class KeyF, class ValueF, int kHead, int kRows>
class PageSoftmax {
 protected:
  using Config = DecodePagesConfig<KeyF, ValueF, kHead, kRows>;
  using Keys = typename Config::KeyPieces;
  using Values = typename Config::ValuePieces;
  using ValueOp = ValueOperand<ValueF>;
  static constexpr int kTiles = Config::kTiles;
  static constexpr int kColumns = Config::kColumns;
  static constexpr int kOutTiles = kHead / 16;  // tiles of the second product, 16 dimensions each
  static constexpr bool kSpread = Config::kSpread;
  static constexpr float kMostWeight = 4096.0F;
  static constexpr float kNothing = -3e38F;  // the maximum before the first key, which any logit passes
  static constexpr bool kWeighted = kHasMeta<ValueF>;
  static constexpr bool kCentered = ValueOp::kCenter != 0;

  // Which element of a tile's accumulator belongs to (column, key), where `key` 0 is this lane's key_ and 1 the key
  // eight later.
  static __device__ constexpr int element_of(int column, int key) { return 2 * key + (kSpread ? 0 : column % 2); }
  static __device__ constexpr int tile_of(int column) { return kSpread ? 0 : column / 2; }

  struct Slice {
    std::uint32_t key[2][Keys::kCount][Keys::kWords];
    std::uint32_t value[4][Values::kCount][Values::kWords];
    format::Affine of_key[2], of_value[2];  // of this lane's two keys
    std::uint32_t at;                       // bytes from the first stage to this one
    std::uint32_t barrier;
    int first_key;
    float s[kColumns][2];       // logits, in log2
    float x[kColumns][2];       // their exponentials
    float weight[kColumns][2];  // exponentials times the scale of the value, over unit_
  };

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      max_[c] = kNothing;
      sum_[c] = offset_[c] = 0.0F;
    }
    unit_ = inverse_ = 1.0F;
    fresh_ = true;
    clear_weights();
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int t = 0; t < kOutTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc_[m][t][i] = 0.0F;
      }
    }
  }

  // Turns the logits of the slices into weights.
  template <int kN>
  __device__ __forceinline__ void weigh(Slice (&slices)[kN], bool careful) {
    if constexpr (kWeighted) scale_values(slices, inverse_);
    float base[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) base[c] = max_[c];
    exponentials(slices, base);
    float top_weight = 0.0F, top = 0.0F;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          top_weight = fmaxf(top_weight, fabsf(slices[n].weight[c][i]));
          if constexpr (kWeighted) top = fmaxf(top, slices[n].x[c][i]);
        }
      }
    }
    if (__any_sync(kFullWarp, !(top_weight <= kMostWeight) || (kWeighted && !(top <= 3e38F)))) move(slices);
    if (careful) {
      add_up<true>(slices);
    } else {
      add_up<false>(slices);
    }
  }

  template <int kN>
  static __device__ __forceinline__ void scale_values(Slice (&slices)[kN], float factor) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        slices[n].of_value[i].scale *= factor;
        if constexpr (ValueF::kHasOffset) slices[n].of_value[i].offset *= factor;
      }
    }
  }

  template <int kN>
  static __device__ __forceinline__ void exponentials(Slice (&slices)[kN], const float (&base)[kColumns]) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          slices[n].x[c][i] = ptx::ex2_approx(slices[n].s[c][i] - base[c]);
          slices[n].weight[c][i] = kWeighted ? slices[n].x[c][i] * slices[n].of_value[i].scale : slices[n].x[c][i];
        }
      }
    }
  }

  // Moves the running maxima and the unit up, to where the weights of the slices' keys are at most 1.
  template <int kN>
  __device__ __forceinline__ void move(Slice (&slices)[kN]) {
    float grow = 1.0F;
    if constexpr (kWeighted) {
      float largest = 0.0F;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float scale = fabsf(slices[n].of_value[i].scale);
          if (exact::is_finite(scale)) largest = fmaxf(largest, scale);
        }
      }
      const std::uint32_t power = __reduce_max_sync(kFullWarp, __float_as_uint(largest)) & 0x7f800000U;
      if (power > 0x3f800000U || (fresh_ && power > 0x00800000U)) {
        grow = __uint_as_float(0x7f000000U - power);
        unit_ *= __uint_as_float(power);
        inverse_ *= grow;
        scale_values(slices, grow);
        fresh_ = false;
      }
    }
    float base[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      float top = fmaxf(slices[0].s[c][0], slices[0].s[c][1]);
#pragma unroll
      for (int n = 1; n < kN; ++n) top = fmaxf(top, fmaxf(slices[n].s[c][0], slices[n].s[c][1]));
      base[c] = fmaxf(KeysOnM::over_row(top, [](float a, float b) { return fmaxf(a, b); }), max_[c]);
      const float correction = ptx::ex2_approx(max_[c] - base[c]);
      max_[c] = base[c];
      sum_[c] *= correction;
      offset_[c] *= correction * grow;
#pragma unroll
      for (int t = 0; t < kOutTiles; ++t) {
        acc_[tile_of(c)][t][element_of(c, 0)] *= correction * grow;
        acc_[tile_of(c)][t][element_of(c, 1)] *= correction * grow;
      }
      if constexpr (kCentered) {
        weights_[tile_of(c)][element_of(c, 0)] *= correction * grow;
        weights_[tile_of(c)][element_of(c, 1)] *= correction * grow;
      }
    }
    exponentials(slices, base);
  }

  // Adds up the weights, and what offsets add to every dimension. 0 times a NaN scale is not 0, so where some row does
  // not see a key (kCareful), keys of weight 0 are left out.
  template <bool kCareful, int kN>
  __device__ __forceinline__ void add_up(Slice (&slices)[kN]) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        sum_[c] += slices[n].x[c][0] + slices[n].x[c][1];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const bool skips = kCareful && kWeighted && slices[n].x[c][i] == 0.0F;
          if (skips) slices[n].weight[c][i] = 0.0F;
          if constexpr (ValueF::kHasOffset) {
            const float offset = skips ? 0.0F : slices[n].of_value[i].offset;
            offset_[c] = fmaf(slices[n].x[c][i], offset, offset_[c]);
          }
          if constexpr (ValueOp::kBias != 0.0F) {
            offset_[c] = fmaf(slices[n].weight[c][i], -ValueOp::kBias, offset_[c]);
          }
        }
      }
    }
  }

  // Takes away what kCenter has added to the accumulators, often enough that they lose few bits to it.
  __device__ __forceinline__ void center() {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int t = 0; t < kOutTiles; ++t) {
        const int n = 2 * t % Values::kElements;
#pragma unroll
        for (int i = 0; i < (kSpread ? 3 : 4); i += kSpread ? 2 : 1) {
          const float code = static_cast<float>(ValueOp::kCenter) * ValueOp::weight(n + i / 2) / ValueOp::kScale;
          acc_[m][t][i] = fmaf(weights_[m][i], -code, acc_[m][t][i]);
        }
      }
    }
    clear_weights();
  }
  __device__ __forceinline__ void clear_weights() {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) weights_[m][i] = 0.0F;
    }
  }

  float max_[kColumns];                     // in log2
  float sum_[kColumns], offset_[kColumns];  // of this lane's keys; offset_ is in units
  float unit_, inverse_;
  bool fresh_;  // whether unit_ has yet to be chosen
  float acc_[kTiles][kOutTiles][4];
  // Sums of weights since center(), rounded as the products' weights are; they are used where kCentered.
  float weights_[kTiles][4];
};

}  // namespace quire::cuda
