// A consumer warp of decode_pages. It attends one KV head's query rows of each segment over the segment's keys, slice
// by slice.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/kernel/decode_pages/config.h"
#include "cuda/kernel/decode_pages/queries.cuh"
#include "cuda/ptx/bulk.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/softmax/softmax.cuh"
#include "cuda/stage/levels.cuh"
#include "cuda/stage/metadata.cuh"
#include "cuda/stage/query.cuh"

namespace quire::cuda {

template <class KeyF, class ValueF, int kHead, int kRows>
class PageConsumer : PageQueries<KeyF, ValueF, kHead, kRows> {
 public:
  using Config = DecodePagesConfig<KeyF, ValueF, kHead, kRows>;

  __device__ __forceinline__ PageConsumer(const DecodePagesParams& p, typename Config::Storage& shared,
                                          std::uint32_t stages, int part, int warp, int lane)
      : Base(p, shared.warps[warp], part, warp, lane),
        shared_(shared),
        stage_(group_),
        barriers_(ptx::shared_address(shared.full)),
        lane4_(4 * static_cast<std::uint32_t>(lane)) {
    // Row g of a product is key g ^ (g >> 1 & 1) of the slice. This order puts the keys that one load of V touches into
    // both halves of the shared-memory banks.
    const int head = warp % p.slice.num_heads;
    key_ = quad_ ^ (quad_ >> 1 & 1);
    value_key_ = 2 * pair_ ^ (pair_ & 1);
    const auto place = [&](const attention::SliceRows& rows, int slot) {
      return stages + static_cast<std::uint32_t>(rows.at + slot * rows.slot_stride + head * rows.head_stride);
    };
    key_at_ = place(p.slice.key, key_) + pair_ * Keys::kBytes;
    value_at_[0] = place(p.slice.value, value_key_) + quad_ * Values::kBytes;
    value_at_[1] = place(p.slice.value, value_key_ ^ 1) + quad_ * Values::kBytes;
    key_meta_ = kHasScaleCache<KeyF> ? place(p.slice.key_scale, key_)
                                     : place(p.slice.key, key_) + code_bytes<KeyF>(p.head_size);
    value_meta_ = kHasScaleCache<ValueF> ? place(p.slice.value_scale, key_)
                                         : place(p.slice.value, key_) + code_bytes<ValueF>(p.head_size_v);
    leads_ = lane == 0 ? 1U : 0U;
    touch_signs(KeyF::kRotation, format::row_shape(p.head_size).block, lane);
    // The empty assembly makes the compiler keep these in registers instead of computing them again in the loop.
    asm volatile("" : "+r"(key_at_), "+r"(value_at_[0]), "+r"(value_at_[1]), "+r"(key_meta_), "+r"(value_meta_));
    asm volatile("" : "+r"(barriers_), "+r"(leads_), "+r"(lane4_));
  }

  __device__ __forceinline__ void run() {
    ptx::wait_for_previous_kernel();
    for (int turn = 0;; ++turn) {
      const int i = turn % Config::kSegments;
      ptx::barrier_wait_at(ptx::shared_address(&shared_.segment_full[i]), turn / Config::kSegments % 2);
      const typename Config::Segment& segment = shared_.segments[i];
      if (segment.num_slices == 0) return;
      load_queries(segment.tile);
      clear();
      biased_ = p_.softcap > 0.0F || p_.alibi_slopes != nullptr || p_.qq_bias != nullptr ? 1U : 0U;
      asm volatile("" : "+r"(biased_));  // so that the loop tests a register
      // The stages of this group, those without a slice included.
      const int slices = (segment.num_slices + p_.groups - 1) / p_.groups;
      int left = slices;
      if (p_.aligned && !(Config::kTail && p_.head_size < kHead)) {
        constexpr int kN = Config::kSlicesAtOnce;
        for (; left >= kN; left -= kN) {
          take<kN, false, Config::kAccess>(segment);
          if (kCentered && left % 16 < kN) center();
        }
      }
      for (; left > 0; --left) {  // the rest, and every slice of an unusual layout
        take<1, Config::kTail, Config::kLeastAccess>(segment);
        if (kCentered && left % 16 == 0) center();
      }
      if constexpr (kCentered) center();
      finish(segment);
      __syncwarp();
      if (leads_ != 0) ptx::barrier_arrive_at(ptx::shared_address(&shared_.segment_empty[i]));
    }
  }

 private:
  using Base = PageQueries<KeyF, ValueF, kHead, kRows>;
  using Base::acc_;
  using Base::center;
  using Base::clear;
  using Base::element_of;
  using Base::finish;
  using Base::group_;
  using Base::kCentered;
  using Base::kColumns;
  using Base::kQueryGain;
  using Base::kSpread;
  using Base::kStepsOfPiece;
  using Base::kTiles;
  using Base::kTilesOfPiece;
  using Base::lane_;
  using Base::load_queries;
  using Base::own_;
  using Base::p_;
  using Base::pair_;
  using Base::quad_;
  using Base::query_fragment;
  using Base::query_sum;
  using Base::row_factor;
  using Base::row_of;
  using Base::tile_of;
  using Base::weigh;
  using Base::weights_;
  using typename Base::KeyOp;
  using typename Base::Keys;
  using typename Base::Slice;
  using typename Base::ValueOp;
  using typename Base::Values;
  static constexpr int kPlanes = KeyOp::kPlanes;
  // Two independent chains of products, where a single one would wait for its own result.
  static constexpr int kChains = kPlanes == 1 && kTiles == 1 ? 2 : 1;

  template <class F>
  static __device__ __forceinline__ std::uint32_t code_bytes(int head_size) {
    return static_cast<std::uint32_t>(format::code_bytes<F>(head_size));
  }

  // ---- slices -------------------------------------------------------------------------------------------------------

  // Attends over the next kN slices of this group. kTail: some elements past the head size reach the result. kAccess:
  // as in load_piece.
  template <int kN, bool kTail, int kAccess>
  __device__ __forceinline__ void take(const typename Config::Segment& segment) {
    Slice slices[kN];
    int careful = 0;
#pragma unroll
    for (int n = 0; n < kN; ++n) careful |= load_keys<kAccess>(slices[n]);
    if constexpr (kTail) zero_tail(slices[0]);
    multiply_keys<kN, kTail>(slices);
    if constexpr (!Config::kLateValues) load_values<kAccess>(slices);
    if (biased_ != 0) bias(slices, segment);
    if (careful != 0) mask(slices, segment.tile);
    weigh(slices, careful != 0);
    if constexpr (Config::kLateValues) load_values<kAccess>(slices);
    if constexpr (kCodesMayBeNaN<ValueF>) {
      if (careful != 0) zero_unread(slices, segment);
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) multiply_values(slices[n]);
  }

  // Waits for the next stage of this group and loads its keys and scales into registers. Returns whether some row does
  // not see some of the keys.
  template <int kAccess>
  __device__ __forceinline__ int load_keys(Slice& slice) {
    slice.barrier = barriers_ + 8 * stage_;
    slice.at = static_cast<std::uint32_t>(stage_ * p_.stage_bytes);
    ptx::barrier_wait_at(slice.barrier, parity_);
    const typename Config::StageInfo info = shared_.infos[stage_];
    slice.first_key = info.first_key;
    stage_ += p_.groups;
    if (stage_ >= p_.num_stages) {
      stage_ -= p_.num_stages;
      parity_ ^= 1U;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const std::uint32_t at = slice.at + key_at_ + i * 8 * p_.slice.key.slot_stride;
#pragma unroll
      for (int j = 0; j < Keys::kCount; ++j) {
        load_piece<Keys::kBytes, kAccess>(at + 4 * j * Keys::kBytes, slice.key[i][j]);
      }
      slice.of_key[i] = load_meta<KeyF>(slice.at + key_meta_, i, p_.slice.key, p_.slice.key_scale, p_.head_size);
      slice.of_value[i] =
          load_meta<ValueF>(slice.at + value_meta_, i, p_.slice.value, p_.slice.value_scale, p_.head_size_v);
    }
    return info.careful;
  }

  template <class F>
  static __device__ __forceinline__ format::Affine load_meta(std::uint32_t at, int i, const attention::SliceRows& rows,
                                                             const attention::SliceRows& scales, int head_size) {
    alignas(4) std::uint8_t meta[kHasMeta<F> ? (F::kMetaBytes + 3) / 4 * 4 : 4] = {};
    if constexpr (kHasScaleCache<F>) {
      const std::uint32_t word = ptx::load_shared_32(at + i * 8 * scales.slot_stride);
      memcpy(meta, &word, 4);
    } else if constexpr (kHasMeta<F>) {
#pragma unroll
      for (int b = 0; b < F::kMetaBytes; b += 2) {
        const auto half = static_cast<std::uint16_t>(ptx::load_shared_16(at + i * 8 * rows.slot_stride + b));
        memcpy(meta + b, &half, 2);
      }
    }
    return F::read_meta(meta, format::row_shape(head_size));
  }

  // Loads the values into registers and gives the stages back to the producer.
  template <int kAccess, int kN>
  __device__ __forceinline__ void load_values(Slice (&slices)[kN]) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::uint32_t at = slices[n].at + value_at_[i % 2] + i / 2 * 8 * p_.slice.value.slot_stride;
#pragma unroll
        for (int j = 0; j < Values::kCount; ++j) {
          load_piece<Values::kBytes, kAccess>(at + 8 * j * Values::kBytes, slices[n].value[i][j]);
        }
      }
    }
    __syncwarp();
    if (leads_ != 0) {
#pragma unroll
      for (int n = 0; n < kN; ++n) ptx::barrier_arrive_at(slices[n].barrier + 8 * Config::kMaxStages);
    }
  }

  // Replaces the codes of elements past the head size, which may be those of a NaN, by zeros.
  __device__ __forceinline__ void zero_tail(Slice& slice) const {
    if constexpr (kCodesMayBeNaN<KeyF>) {
      constexpr int kPerWord = 32 / kCodeBits<KeyF>;
#pragma unroll
      for (int j = 0; j < Keys::kCount; ++j) {
#pragma unroll
        for (int w = 0; w < Keys::kWords; ++w) {
          const bool inside = (4 * j + pair_) * Keys::kElements + w * kPerWord < p_.head_size;
          slice.key[0][j][w] = inside ? slice.key[0][j][w] : 0U;
          slice.key[1][j][w] = inside ? slice.key[1][j][w] : 0U;
        }
      }
    }
  }

  // Computes the logits of the lane's columns and keys, in log2 and times the row's scale.
  template <int kN, bool kTail>
  __device__ __forceinline__ void multiply_keys(Slice (&slices)[kN]) {
    float s[kN][kTiles][kPlanes * kChains][4] = {};
    float norm[kN][2][4] = {};
#pragma unroll
    for (int j = 0; j < Keys::kCount; ++j) {
      std::uint32_t pairs[kN][2][kPlanes][Keys::kElements / 2];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        KeyOp::template convert<Keys::kElements>(slices[n].key[0][j], shared_.table, lane4_, pairs[n][0]);
        KeyOp::template convert<Keys::kElements>(slices[n].key[1][j], shared_.table, lane4_, pairs[n][1]);
      }
#pragma unroll
      for (int k = 0; k < kStepsOfPiece; ++k) {
        const int step = j * kStepsOfPiece + k;
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int plane = 0; plane < kPlanes; ++plane) {
            std::uint32_t a[4] = {pairs[n][0][plane][2 * k], pairs[n][1][plane][2 * k], pairs[n][0][plane][2 * k + 1],
                                  pairs[n][1][plane][2 * k + 1]};
            if constexpr (kTail && KeyF::kLevelNorm) {
              const int first = (4 * j + pair_) * Keys::kElements + 4 * k;
              if (first >= p_.head_size) a[0] = a[1] = a[2] = a[3] = 0U;
            }
#pragma unroll
            for (int m = 0; m < kTiles; ++m) {
              const uint2 query = query_fragment(m, step);
              ptx::mma_16x8x16<Config::kBFloat16Keys>(s[n][m][kChains == 2 ? step % 2 : plane], a, query.x, query.y);
            }
            if constexpr (KeyF::kLevelNorm) {
              // The diagonals of these products are the squared norms of the rows' levels.
              ptx::mma_16x8x8(norm[n][0], a[0], a[1], a[0]);
              ptx::mma_16x8x8(norm[n][1], a[0], a[1], a[1]);
              ptx::mma_16x8x8(norm[n][0], a[2], a[3], a[2]);
              ptx::mma_16x8x8(norm[n][1], a[2], a[3], a[3]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      if constexpr (KeyF::kLevelNorm) {
        // This fetches the norms of the lane's two keys. That of key_ is element (quad, quad) of the first product;
        // that of the key eight later is on the diagonal of the second product's lower half.
        const int lane = (lane_ & 28) | quad_ / 2;
        const float squares = __shfl_sync(kFullWarp, quad_ & 1 ? norm[n][0][1] : norm[n][0][0], lane);
        const float later = __shfl_sync(kFullWarp, quad_ & 1 ? norm[n][1][3] : norm[n][1][2], lane);
        slices[n].of_key[0].scale *= ptx::rsqrt_approx(squares);
        slices[n].of_key[1].scale *= ptx::rsqrt_approx(later);
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          slices[n].s[c][i] = logit(s[n][tile_of(c)], slices[n].of_key[i], c, element_of(c, i));
        }
      }
    }
  }

  // One logit from its products.
  __device__ __forceinline__ float logit(const float (&products)[kPlanes * kChains][4], format::Affine of_key, int c,
                                         int element) const {
    float dot = 0.0F;
    if constexpr (kChains == 2) {
      dot = products[0][element] + products[1][element];
    } else if constexpr (kPlanes == 2) {
      dot = fmaf(products[1][element], KeyOp::plane(1) / KeyOp::plane(0), products[0][element]);
    } else {
      dot = products[0][element];
    }
    const float factor = row_factor(c);
    // The norm of a kLevelNorm format is taken of the scaled levels, so the unit cancels.
    constexpr float kPlane = KeyF::kLevelNorm ? 1.0F : KeyOp::plane(0) / kQueryGain;
    float s = 0.0F;
    if constexpr (KeyF::kHasOffset || KeyOp::kBias != 0.0F) {
      constexpr float kBiasInUnits = KeyOp::kBias / kPlane;
      const float zero = KeyF::kHasOffset ? fmaf(of_key.scale, -kBiasInUnits, of_key.offset * (1.0F / kPlane))
                                          : of_key.scale * -kBiasInUnits;
      s = fmaf(zero, query_sum(c), of_key.scale * dot) * (factor * kPlane);
    } else {
      s = dot * (kHasMeta<KeyF> ? of_key.scale * (factor * kPlane) : factor * kPlane);
    }
    return KeyF::kLogitsMayBeInfinite ? exact::nan_unless_finite(s) : s;
  }

  template <int kN>
  __device__ __forceinline__ void bias(Slice (&slices)[kN], const typename Config::Segment& segment) const {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          slices[n].s[c][i] = biased_logit(p_, segment.tile, own_.rows[row_of(c)], slices[n].s[c][i],
                                           slices[n].first_key + key_ + 8 * i);
        }
      }
    }
  }

  // Whether some row sees the key. The bytes in the place of any other key may be anything.
  static __device__ __forceinline__ bool is_read(const TileRows& tile, int key) {
    return (key >= tile.begin && key < tile.end) || (key >= tile.first && key < tile.prefix_end);
  }

  template <int kN>
  __device__ __forceinline__ void mask(Slice (&slices)[kN], const TileRows& tile) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = slices[n].first_key + key_ + 8 * i;
        if (!is_read(tile, key)) slices[n].of_value[i] = {0.0F, 0.0F};  // its scale must not choose the unit
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const RowInfo& row = own_.rows[row_of(c)];
          const bool in_prefix = static_cast<unsigned>(key) < static_cast<unsigned>(row.prefix_end);
          if (!in_prefix && (key < row.begin || key >= row.end)) slices[n].s[c][i] = -INFINITY;
        }
      }
    }
  }

  // Replaces the codes of rows that nobody sees by zeros: they may decode to NaN, which a weight of 0 does not remove.
  template <int kN>
  __device__ __forceinline__ void zero_unread(Slice (&slices)[kN], const typename Config::Segment& segment) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (is_read(segment.tile, slices[n].first_key + (value_key_ ^ i % 2) + i / 2 * 8)) continue;
#pragma unroll
        for (int j = 0; j < Values::kCount; ++j) {
#pragma unroll
          for (int w = 0; w < Values::kWords; ++w) slices[n].value[i][j][w] = 0U;
        }
      }
    }
  }

  __device__ __forceinline__ void multiply_values(const Slice& slice) {
    std::uint32_t weights[kTiles][ValueOp::kPlanes][2];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int plane = 0; plane < ValueOp::kPlanes; ++plane) {
        const float factor = ValueOp::plane(plane);
        const auto at = [&](int column, int key) {
          return ValueOp::kPlanes == 1 ? slice.weight[column][key] : slice.weight[column][key] * factor;
        };
        constexpr bool kBf16 = Config::kBFloat16Values;
        if constexpr (kSpread) {
          // Even columns hold keys 0 to 7 of the slice, odd ones 8 to 15.
          weights[0][plane][0] = ptx::transpose_8x8(pack_pair<kBf16>(at(0, 0), at(0, 1)));
          weights[0][plane][1] = __shfl_xor_sync(kFullWarp, weights[0][plane][0], 4);
        } else {
          weights[m][plane][0] = ptx::transpose_8x8(pack_pair<kBf16>(at(2 * m, 0), at(2 * m + 1, 0)));
          weights[m][plane][1] = ptx::transpose_8x8(pack_pair<kBf16>(at(2 * m, 1), at(2 * m + 1, 1)));
        }
      }
    }
    if constexpr (kCentered) {
      constexpr std::uint32_t kOnes[4] = {0x3c003c00U, 0x3c003c00U, 0x3c003c00U, 0x3c003c00U};
#pragma unroll
      for (int m = 0; m < kTiles; ++m) ptx::mma_16x8x16<false>(weights_[m], kOnes, weights[m][0][0], weights[m][0][1]);
    }
#pragma unroll
    for (int j = 0; j < Values::kCount; ++j) {
      std::uint32_t early[ValueOp::kPlanes][Values::kElements], late[ValueOp::kPlanes][Values::kElements];
      ValueOp::template convert<Values::kElements>(slice.value[0][j], slice.value[1][j], early);
      ValueOp::template convert<Values::kElements>(slice.value[2][j], slice.value[3][j], late);
#pragma unroll
      for (int t = 0; t < kTilesOfPiece; ++t) {
#pragma unroll
        for (int plane = 0; plane < ValueOp::kPlanes; ++plane) {
          const std::uint32_t a[4] = {early[plane][2 * t], early[plane][2 * t + 1], late[plane][2 * t],
                                      late[plane][2 * t + 1]};
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
            ptx::mma_16x8x16<Config::kBFloat16Values>(acc_[m][j * kTilesOfPiece + t], a, weights[m][plane][0],
                                                      weights[m][plane][1]);
          }
        }
      }
    }
  }

  typename Config::Storage& shared_;
  int stage_;
  std::uint32_t parity_ = 0;
  std::uint32_t barriers_, lane4_, leads_;
  int key_, value_key_;
  std::uint32_t key_at_, value_at_[2], key_meta_, value_meta_;  // shared addresses within the first stage

  std::uint32_t biased_;
};

}  // namespace quire::cuda
