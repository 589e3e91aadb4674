// unified_attention on tensor cores for many query rows: prefill, chunked prefill and mixed batches.
//
//   grid    (row tile, KV head, split). A tile is 128 (64) rows (query token, query head) of one KV head, token-major:
//           the heads of a group share every K and V row. Tiles run from the last to the first, long ones first under
//           a causal mask.
//   block   4 warps of 32 (16) rows each; keys in tiles of 64, shared by the warps.
//   tile    rows come by cp.async, 16 bytes a copy. 16-bit rows are used where they land, two buffers; codes land in
//           one raw buffer and become 16-bit levels in shared memory once per tile, while the next tile's arrive.
//
// On Hopper head sizes up to 128 are prefill_sm90.cuh's. The arithmetic is decode.cuh's. Byte and instruction budget:
// docs/kernels/prefill.md.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/format/formats.cuh"
#include "cuda/kernel/prefill_sm90/kernel.cuh"
#include "cuda/launch.h"
#include "cuda/output/rows.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/softmax/softmax.cuh"
#include "cuda/stage/levels.cuh"
#include "cuda/stage/query.cuh"
#include "cuda/stage/rows.cuh"
#include "cuda/work/pages.cuh"
#include "cuda/work/rows.cuh"

namespace quire::cuda {

template <class KeyF, class ValueF, int kHead>
struct PrefillConfig {
  static constexpr int kKeys = kHead <= 128 ? 64 : 32;
  static constexpr int kRows = kPrefillRows<kHead>;
  static constexpr int kWarpRows = kRows / kWarps;
  static constexpr bool kConvertsKey = !kRaw16<KeyF>;
  static constexpr bool kConvertsValue = !kRaw16<ValueF>;
  static constexpr int kTile16 = kKeys * kPitch16<kHead>;
  // A tile that is used where it lands has two buffers; a converted one a raw buffer and one of levels.
  static constexpr int kKeyRaw = kConvertsKey ? kKeys * RawRow<KeyF, kHead>::kPitch : 0;
  static constexpr int kValueRaw = kConvertsValue ? kKeys * RawRow<ValueF, kHead>::kPitch : 0;
  static constexpr int kThreadsPerRow = kAttentionThreads / kKeys;

  struct Tiles {
    alignas(16) std::uint8_t query[kRows * kPitch16<kHead>];
    alignas(16) std::uint8_t key[kConvertsKey ? 1 : 2][kTile16];
    alignas(16) std::uint8_t value[kConvertsValue ? 1 : 2][kTile16];
    alignas(16) std::uint8_t key_raw[kKeyRaw > 0 ? kKeyRaw : 16];
    alignas(16) std::uint8_t value_raw[kValueRaw > 0 ? kValueRaw : 16];
    float scales[2][kKeys];            // of K and V, where they come from a scale cache
    std::int64_t offset[2][2][kKeys];  // of K and V rows, -1: not read; two tiles, used in turn
    alignas(8) float key_scale[kKeys], key_offset[kKeys], value_scale[kKeys], value_offset[kKeys];
  };
  struct Rows {
    float acc[kRows][kHead + 4];
  };
  struct Storage {
    union {
      Tiles tiles;
      Rows rows;
    };
    RowInfo row[kRows];
    std::uint32_t readable[4][kWarps];    // one bit a key, 32 keys a word; by tile, of which three are in use at a time
    std::uint32_t largest_scale[kWarps];  // of the tile's V scales, as bits
  };
  static_assert(sizeof(Storage) <= 227 * 1024);
};

template <class KeyF, class ValueF, int kHead>
__device__ __forceinline__ void prefill_rows(const AttentionParams& p) {
  using Config = PrefillConfig<KeyF, ValueF, kHead>;
  constexpr int kKeys = Config::kKeys;
  constexpr int kSteps = kHead / 16;              // of 16 elements
  constexpr int kKeySteps = kKeys / 16;           // of 16 keys
  constexpr int kTiles = Config::kWarpRows / 16;  // of 16 rows, a warp's
  constexpr bool kKeyBf16 = std::is_same_v<KeyF, format::BFloat16>;
  constexpr bool kValueBf16 = std::is_same_v<ValueF, format::BFloat16>;
  constexpr bool kKeyScales = KeyF::kMetaPlace == format::MetaPlace::kScaleCache;
  constexpr bool kValueScales = ValueF::kMetaPlace == format::MetaPlace::kScaleCache;
  constexpr bool kKeyMeta = KeyF::kMetaBytes > 0;
  constexpr bool kValueMeta = ValueF::kMetaBytes > 0;
  constexpr int kParts = Config::kThreadsPerRow;  // threads that convert one row
  constexpr int kKeyBuffers = Config::kConvertsKey ? 1 : 2;
  constexpr int kValueBuffers = Config::kConvertsValue ? 1 : 2;
  static_assert(kHead / kParts % 32 == 0);

  extern __shared__ float4 shared_bytes[];
  auto& shared = *reinterpret_cast<typename Config::Storage*>(shared_bytes);
  auto& tiles = shared.tiles;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int kv_head = static_cast<int>(blockIdx.y);
  TileRows tile;
  if (!find_tile_rows(p, gridDim.x - 1 - blockIdx.x, Config::kRows, tile)) return;

  // Threads below kKeys look up K rows, the next kKeys V rows, two tiles ahead; all threads copy, one tile ahead.
  const int copy_key = thread % kKeys;
  const int copy_part = thread / kKeys;  // and convert this part of row copy_key
  const int key_row_bytes = static_cast<int>(format::row_bytes<KeyF>(p.head_size));
  const int value_row_bytes = static_cast<int>(format::row_bytes<ValueF>(p.head_size_v));
  const bool key_aligned = p.key.row_access >= 16;
  const bool value_aligned = p.value.row_access >= 16;
  const bool key_dense = is_dense<KeyF, kHead>(p.key, p.head_size);
  const bool value_dense = is_dense<ValueF, kHead>(p.value, p.head_size_v);
  KeyPlace place{-1, 0};  // of this thread's row of the next tile to copy
  const auto look_up = [&](int tile_key, int buffer) {
    if (copy_part < 2) {
      place = find_key(p, tile.batch, tile_key + copy_key, tile.begin, tile.end, copy_part == 0 && kv_head == 0);
      tiles.offset[buffer][copy_part][copy_key] = row_offset(copy_part == 0 ? p.key : p.value, place, kv_head);
      const std::uint32_t readable = __ballot_sync(kFullWarp, place.block >= 0);
      if (copy_part == 0 && lane == 0) shared.readable[tile_key / kKeys % 4][warp] = readable;
    }
  };
  const auto start_copies = [&](int buffer) {
    copy_rows<KeyF, kHead, kKeys, kAttentionThreads>(
        p.key, tiles.offset[buffer][0], key_dense, key_row_bytes,
        raw_rows<KeyF, kHead>(Config::kConvertsKey ? tiles.key_raw : tiles.key[buffer % kKeyBuffers]), thread);
    copy_rows<ValueF, kHead, kKeys, kAttentionThreads>(
        p.value, tiles.offset[buffer][1], value_dense, value_row_bytes,
        raw_rows<ValueF, kHead>(Config::kConvertsValue ? tiles.value_raw : tiles.value[buffer % kValueBuffers]),
        thread);
    if (kKeyScales && copy_part == 0) copy_scale(p.key, place, kv_head, &tiles.scales[0][copy_key]);
    if (kValueScales && copy_part == 1) copy_scale(p.value, place, kv_head, &tiles.scales[1][copy_key]);
    ptx::cp_async_commit();
  };
  int first_key = tile.begin / kKeys * kKeys;
  if (tile.begin < tile.end) {
    look_up(first_key, 0);
    __syncthreads();
    start_copies(0);
    look_up(first_key + kKeys, 1);
  }

  const int first_row = warp * Config::kWarpRows;
  load_queries<KeyF, kHead, Config::kWarpRows>(
      p, tile, kv_head, first_row, [&](int row) { return row_chunks(tiles.query + row * kPitch16<kHead>); }, shared.row,
      lane);
  __syncwarp();

  // This lane's rows: quad + 8 r of each of the warp's tiles of 16.
  const int quad = lane / 4;
  const int pair = lane % 4 * 2;
  const float logit_factor = log2_factor<KeyF>(p, tile.batch, kv_head);
  const bool biased = has_bias(p, logit_factor);
  RunningSoftmax<kTiles> state(logit_factor, shared.row + first_row, quad, kValueMeta ? 0.0F : 1.0F);
  float acc[kTiles][2 * kSteps][4] = {};
  const std::uint32_t query_address =
      ptx::shared_address(tiles.query) + (first_row + lane % 16) * kPitch16<kHead> + lane / 16 * 16;
  const int key_offset = (lane / 16 * 8 + lane % 8) * kPitch16<kHead> + lane / 8 % 2 * 16;
  const int value_offset = (lane % 16) * kPitch16<kHead> + lane / 16 * 16;

  for (int buffer = 0; first_key < tile.end; first_key += kKeys, buffer ^= 1) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    if constexpr (Config::kConvertsKey || Config::kConvertsValue) {
      constexpr int kPart = kHead / kParts;  // elements
      float squares = 0.0F;
      const std::uint8_t* key_row = tiles.key_raw + copy_key * RawRow<KeyF, kHead>::kPitch;
      const std::uint8_t* value_row = tiles.value_raw + copy_key * RawRow<ValueF, kHead>::kPitch;
      if (!key_aligned) key_row += row_skew(p.key, ::max(tiles.offset[buffer][0][copy_key], std::int64_t{0}));
      if (!value_aligned) value_row += row_skew(p.value, ::max(tiles.offset[buffer][1][copy_key], std::int64_t{0}));
      if constexpr (Config::kConvertsKey) {
        if constexpr (KeyF::kLevelNorm) {
          // The norm needs the whole row: each of its threads sums all parts, and keeps only its own levels.
          for (int part = 0; part < kParts; ++part) {
            if (part == copy_part) continue;
            sum_squares<KeyF, kPart / 32>(key_row + part * (kPart / KeyF::kUnit * KeyF::kUnitBytes), key_aligned,
                                          p.head_size - part * kPart, &squares);
          }
        }
        convert_part<KeyF, kPart / 32>(key_row + copy_part * (kPart / KeyF::kUnit * KeyF::kUnitBytes), key_aligned,
                                       tiles.key[0] + copy_key * kPitch16<kHead> + copy_part * kPart * 2,
                                       p.head_size - copy_part * kPart, &squares);
      }
      if constexpr (Config::kConvertsValue) {
        float unused = 0.0F;
        convert_part<ValueF, kPart / 32>(value_row + copy_part * (kPart / ValueF::kUnit * ValueF::kUnitBytes),
                                         value_aligned,
                                         tiles.value[0] + copy_key * kPitch16<kHead> + copy_part * kPart * 2,
                                         p.head_size_v - copy_part * kPart, &unused);
      }
      if constexpr (kKeyMeta) {
        if (copy_part == 0) {
          const auto* meta = kKeyScales ? reinterpret_cast<const std::uint8_t*>(&tiles.scales[0][copy_key])
                                        : key_row + format::code_bytes<KeyF>(p.head_size);
          format::Affine affine = KeyF::read_meta(meta, format::row_shape(p.head_size));
          if constexpr (KeyF::kLevelNorm) affine.scale *= rsqrtf(squares);
          tiles.key_scale[copy_key] = affine.scale;
          if constexpr (KeyF::kHasOffset) tiles.key_offset[copy_key] = affine.offset;
        }
      }
      if constexpr (kValueMeta) {
        const auto* meta = kValueScales ? reinterpret_cast<const std::uint8_t*>(&tiles.scales[1][copy_key])
                                        : value_row + format::code_bytes<ValueF>(p.head_size_v);
        const format::Affine affine = ValueF::read_meta(meta, format::row_shape(p.head_size_v));
        const float scale = affine.scale / level_unit<ValueF>;
        if (copy_part == 0) {
          tiles.value_scale[copy_key] = scale;
          if constexpr (ValueF::kHasOffset) tiles.value_offset[copy_key] = affine.offset;
        }
        const std::uint32_t largest = __reduce_max_sync(kFullWarp, __float_as_uint(fabsf(scale)));
        if (lane == 0) shared.largest_scale[warp] = largest;
      }
      __syncthreads();
    }
    std::uint32_t readable[kKeys / 32];
    bool all_seen = first_key >= tile.full_begin && first_key + kKeys <= tile.full_end;
#pragma unroll
    for (int w = 0; w < kKeys / 32; ++w) {
      readable[w] = shared.readable[first_key / kKeys % 4][w];
      all_seen = all_seen && readable[w] == 0xffffffffU;
    }
    if (first_key + kKeys < tile.end) start_copies(buffer ^ 1);

    // Logits: s[m][t][..] belongs to keys 8 t + pair + {0, 1}.
    float s[kTiles][2 * kKeySteps][4] = {};
    const std::uint32_t key_address =
        ptx::shared_address(tiles.key[Config::kConvertsKey ? 0 : buffer]) + static_cast<std::uint32_t>(key_offset);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      std::uint32_t query[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) ptx::ldmatrix_x4(query[m], query_address + 16 * m * kPitch16<kHead> + 32 * k);
#pragma unroll
      for (int t = 0; t < kKeySteps; ++t) {
        std::uint32_t b[4];
        ptx::ldmatrix_x4(b, key_address + 16 * t * kPitch16<kHead> + 32 * k);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          ptx::mma_16x8x16<kKeyBf16>(s[m][2 * t], query[m], b[0], b[1]);
          ptx::mma_16x8x16<kKeyBf16>(s[m][2 * t + 1], query[m], b[2], b[3]);
        }
      }
    }

    look_up(first_key + 2 * kKeys, buffer);
    scale_logits<KeyF>(s, state, tiles.key_scale, tiles.key_offset, pair);
    if (biased) bias_logits(s, state, p, tile, shared.row + first_row, first_key, quad, pair);
    if (!all_seen) mask_logits(s, shared.row + first_row, readable, first_key, quad, pair);
    float correction[kTiles][2];
    bool moved = exponentials(s, state, biased, correction);
    if constexpr (kValueMeta) {
      std::uint32_t largest = shared.largest_scale[0];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) largest = ::max(largest, shared.largest_scale[w]);
      moved |= weigh_values<ValueF>(s, state, tiles.value_scale, tiles.value_offset, largest, correction, pair);
    }
    if (__any_sync(kFullWarp, moved)) rescale(acc, correction);

    const std::uint32_t value_address = ptx::shared_address(tiles.value[Config::kConvertsValue ? 0 : buffer]) +
                                        static_cast<std::uint32_t>(value_offset);
#pragma unroll
    for (int t = 0; t < kKeySteps; ++t) {
      std::uint32_t weights[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weights[m][i] = pack_pair<kValueBf16>(s[m][2 * t + i / 2][i % 2 * 2], s[m][2 * t + i / 2][i % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int n = 0; n < kSteps; ++n) {
        std::uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, value_address + 16 * t * kPitch16<kHead> + 32 * n);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          ptx::mma_16x8x16<kValueBf16>(acc[m][2 * n], weights[m], b[0], b[1]);
          ptx::mma_16x8x16<kValueBf16>(acc[m][2 * n + 1], weights[m], b[2], b[3]);
        }
      }
    }
  }

  __syncthreads();  // the tiles' memory becomes Rows
  finish_rows<KeyF, ValueF>(p, tile, kv_head, acc, state, biased, shared.rows.acc, shared.row, first_row, lane);
}

template <format::Format KeyF, format::Format ValueF, int kHead>
__global__ void __launch_bounds__(kAttentionThreads, kHead <= 128 ? 2 : 1)
    prefill_split(const __grid_constant__ AttentionParams p) {
  if constexpr (kHasWgmma && kHead <= kMaxHeadSm90) {
    __trap();  // prefill_split_sm90 serves these
  } else {
    prefill_rows<KeyF, ValueF, kHead>(p);
  }
}

template <format::Format KeyF, format::Format ValueF, int kHead>
cudaError_t launch_prefill(const AttentionParams& params, std::int64_t tiles, int num_kv_heads, cudaStream_t stream) {
  if constexpr (kHead <= kMaxHeadSm90) {
    if (runs_sm90_kernels()) return launch_prefill_sm90<KeyF, ValueF>(params, tiles, num_kv_heads, stream);
  }
  constexpr std::size_t kBytes = sizeof(typename PrefillConfig<KeyF, ValueF, kHead>::Storage);
  const auto kernel = &prefill_split<KeyF, ValueF, kHead>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kBytes));
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(num_kv_heads),
                  static_cast<unsigned>(params.max_splits));
  kernel<<<grid, kAttentionThreads, kBytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace quire::cuda
