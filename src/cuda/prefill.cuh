// unified_attention on tensor cores for many query rows: prefill, chunked prefill and mixed batches.
//
//   grid    (row tile, KV head, split). A tile is 128 (64) rows (query token, query head) of one KV head, token-major:
//   the heads
//           of a group share every K and V row. Tiles run from the last to the first, long ones first under a causal
//           mask.
//   block   4 warps of 32 (16) rows each; keys in tiles of 64, shared by the warps.
//   tile    rows come by cp.async, 16 bytes a copy. 16-bit rows are used where they land, two buffers; codes land in
//   one
//           raw buffer and become 16-bit levels in shared memory once per tile, while the next tile's codes arrive.
//
// The arithmetic is decode.cuh's. Byte and instruction budget: docs/kernels/prefill.md.
#pragma once

#include "cuda/tile.cuh"

namespace quire::cuda {

// Rows of a tile: two tiles of 16 a warp where their accumulators fit its registers.
template <int kHead>
inline constexpr int kPrefillRows = kHead <= 128 ? 128 : 64;

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
    float max[kRows], sum[kRows];
    std::uint32_t readable[2][kWarps];    // one bit a key, 32 keys a word; two copies, used in turn
    std::uint32_t largest_scale[kWarps];  // of the tile's V scales, as bits
  };
  static_assert(sizeof(Storage) <= 227 * 1024);
};

template <format::Format KeyF, format::Format ValueF, int kHead>
__global__ void __launch_bounds__(kAttentionThreads, kHead <= 128 ? 2 : 1)
    prefill_split(const __grid_constant__ AttentionParams p) {
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
      if (copy_part == 0 && lane == 0) shared.readable[buffer][warp] = readable;
    }
  };
  const auto start_copies = [&](int buffer) {
    copy_rows<KeyF, kHead, kKeys, kAttentionThreads>(
        p.key, tiles.offset[buffer][0], key_dense, key_row_bytes,
        Config::kConvertsKey ? tiles.key_raw : tiles.key[buffer % kKeyBuffers], thread);
    copy_rows<ValueF, kHead, kKeys, kAttentionThreads>(
        p.value, tiles.offset[buffer][1], value_dense, value_row_bytes,
        Config::kConvertsValue ? tiles.value_raw : tiles.value[buffer % kValueBuffers], thread);
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

  for (int r = warp * Config::kWarpRows; r < (warp + 1) * Config::kWarpRows; ++r) {
    load_query<KeyF, kHead>(p, tile, kv_head, r, tiles.query + r * kPitch16<kHead>, shared.row, lane);
  }
  __syncwarp();

  // This lane's rows: quad + 8 r of each of the warp's tiles of 16.
  const int quad = lane / 4;
  const int pair = lane % 4 * 2;
  const float logit_factor = p.softmax_scale * p.q_scale.at(tile.batch, kv_head) * p.k_scale.at(tile.batch, kv_head) *
                             KeyF::unrotate(format::row_shape(p.head_size)) /
                             (KeyF::kLevelNorm ? 1.0F : level_unit<KeyF>)*kLog2E;
  float factor[kTiles][2], query_sum[kTiles][2];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp * Config::kWarpRows + 16 * m + 8 * r + quad;
      factor[m][r] = logit_factor * shared.row[row].scale;
      query_sum[m][r] = shared.row[row].sum;
    }
  }
  // A slope that is not positive would turn maxima into minima: such logits are scaled at once, like biased ones.
  const bool has_bias = p.softcap > 0.0F || p.alibi_slopes != nullptr || p.qq_bias != nullptr || !(logit_factor > 0.0F);

  float acc[kTiles][2 * kSteps][4] = {};
  float max[kTiles][2], sum[kTiles][2] = {}, offset[kTiles][2] = {};
#pragma unroll
  for (int m = 0; m < kTiles; ++m) max[m][0] = max[m][1] = -INFINITY;
  float unit = kValueMeta ? 0.0F : 1.0F;

  const std::uint32_t query_address =
      ptx::shared_address(tiles.query) + (warp * Config::kWarpRows + lane % 16) * kPitch16<kHead> + lane / 16 * 16;
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
      readable[w] = shared.readable[buffer][w];
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
    // Logits in units of 1 / slope: the factor waits for the exponential, unless a bias comes between.
    if constexpr (kKeyMeta) {
#pragma unroll
      for (int t = 0; t < 2 * kKeySteps; ++t) {
        const float2 scale = *reinterpret_cast<const float2*>(&tiles.key_scale[8 * t + pair]);
        float2 zero = make_float2(0.0F, 0.0F);
        if constexpr (KeyF::kHasOffset) zero = *reinterpret_cast<const float2*>(&tiles.key_offset[8 * t + pair]);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            s[m][t][2 * r] *= scale.x;
            s[m][t][2 * r + 1] *= scale.y;
            if constexpr (KeyF::kHasOffset) {
              s[m][t][2 * r] = fmaf(zero.x, query_sum[m][r], s[m][t][2 * r]);
              s[m][t][2 * r + 1] = fmaf(zero.y, query_sum[m][r], s[m][t][2 * r + 1]);
            }
          }
        }
      }
    }
    if (has_bias) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const BiasRow bias = bias_row(p, tile, shared.row[warp * Config::kWarpRows + 16 * m + 8 * r + quad]);
#pragma unroll
          for (int i = 0; i < 4 * kKeySteps; ++i) {
            float& x = s[m][i / 2][2 * r + i % 2];
            x = kLog2E * add_bias(bias, x * (factor[m][r] * kLn2), first_key + 8 * (i / 2) + pair + i % 2);
          }
        }
      }
    }
    if (!all_seen) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const RowInfo& seen = shared.row[warp * Config::kWarpRows + 16 * m + 8 * r + quad];
#pragma unroll
          for (int t = 0; t < 2 * kKeySteps; ++t) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int n = 8 * t + pair + e;
              const int key = first_key + n;
              if (key < seen.begin || key >= seen.end || (readable[n / 32] >> (n % 32) & 1U) == 0)
                s[m][t][2 * r + e] = -INFINITY;
            }
          }
        }
      }
    }

    // The running softmax, in base 2.
    float unit_ratio = 1.0F;
    float inverse_unit = 1.0F;
    bool poisoned = false;  // some scale of the tile is NaN
    if constexpr (kValueMeta) {
      std::uint32_t largest = shared.largest_scale[0];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) largest = ::max(largest, shared.largest_scale[w]);
      poisoned = largest >= 0x7f800000U;
      const float next =
          fmaxf(unit, poisoned ? largest_finite<kKeys>(tiles.value_scale) : power_above(__uint_as_float(largest)));
      unit_ratio = next > 0.0F ? unit / next : 1.0F;
      inverse_unit = next > 0.0F ? 1.0F / next : 0.0F;
      unit = next;
    }
    float correction[kTiles][2];
    bool moved = unit_ratio != 1.0F;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float slope = has_bias ? 1.0F : factor[m][r];
        float largest = -INFINITY;
#pragma unroll
        for (int t = 0; t < 2 * kKeySteps; ++t) largest = fmaxf(largest, fmaxf(s[m][t][2 * r], s[m][t][2 * r + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 2));
        const float next = fmaxf(max[m][r], largest);
        const float base = next == -INFINITY ? 0.0F : slope * next;
        const float shrink = ptx::ex2_approx(max[m][r] == -INFINITY ? -INFINITY : fmaf(slope, max[m][r], -base));
        moved = moved || next != max[m][r];
        max[m][r] = next;
        correction[m][r] = shrink * unit_ratio;
        sum[m][r] *= shrink;
        offset[m][r] *= shrink;
#pragma unroll
        for (int i = 0; i < 4 * kKeySteps; ++i) {
          float& x = s[m][i / 2][2 * r + i % 2];
          x = ptx::ex2_approx(fmaf(slope, x, -base));
          sum[m][r] += x;
        }
      }
    }
    if constexpr (kValueMeta) {
#pragma unroll
      for (int t = 0; t < 2 * kKeySteps; ++t) {
        const float2 scale = *reinterpret_cast<const float2*>(&tiles.value_scale[8 * t + pair]);
        float2 zero = make_float2(0.0F, 0.0F);
        if constexpr (ValueF::kHasOffset) zero = *reinterpret_cast<const float2*>(&tiles.value_offset[8 * t + pair]);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& x = s[m][t][i];
            const bool weightless = poisoned && x == 0.0F;  // 0 times a NaN scale is not 0
            if constexpr (ValueF::kHasOffset) {
              offset[m][i / 2] += weightless ? 0.0F : x * (i % 2 == 0 ? zero.x : zero.y);
            }
            x = weightless ? 0.0F : x * ((i % 2 == 0 ? scale.x : scale.y) * inverse_unit);
          }
        }
      }
    }
    if (__any_sync(kFullWarp, moved)) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int n = 0; n < 2 * kSteps; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[m][n][i] *= correction[m][i / 2];
        }
      }
    }

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
  const float value_factor = p.v_scale.at(tile.batch, kv_head);
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp * Config::kWarpRows + 16 * m + 8 * r + quad;
#pragma unroll
      for (int step = 1; step <= 2; step *= 2) {
        sum[m][r] += __shfl_xor_sync(kFullWarp, sum[m][r], step);
        offset[m][r] += __shfl_xor_sync(kFullWarp, offset[m][r], step);
      }
      shared.max[row] = max[m][r] == -INFINITY ? -INFINITY : max[m][r] * (has_bias ? kLn2 : factor[m][r] * kLn2);
      shared.sum[row] = sum[m][r];
#pragma unroll
      for (int n = 0; n < 2 * kSteps; ++n) {
        *reinterpret_cast<float2*>(&shared.rows.acc[row][8 * n + pair]) =
            make_float2((acc[m][n][2 * r] * unit + offset[m][r]) * value_factor,
                        (acc[m][n][2 * r + 1] * unit + offset[m][r]) * value_factor);
      }
    }
  }
  __syncwarp();
  for (int row = warp * Config::kWarpRows; row < (warp + 1) * Config::kWarpRows; ++row) {
    const RowInfo& info = shared.row[row];
    if (info.query < 0) break;
    const std::int64_t token = tile.query_begin + info.query;
    const int head = info.head;
    attention::SoftmaxState state{shared.max[row], shared.sum[row]};
    if constexpr (ValueF::kStatsOf == format::StatsOf::kNothing) {
      bool finite = true;
      for (int c = lane; c < p.head_size_v; c += 32) finite = finite && exact::is_finite(shared.rows.acc[row][c]);
      if (!__all_sync(kFullWarp, finite)) {
        state = exact_row<KeyF, ValueF>(p, tile, kv_head, token, head, shared.rows.acc[row], lane);
      }
    }
    __syncwarp();
    write_row<RowTile<8, 32, true>>(p, shared.rows.acc[row], state, token, head, lane);
  }
}

template <format::Format KeyF, format::Format ValueF, int kHead>
cudaError_t launch_prefill(const AttentionParams& params, std::int64_t tiles, int num_kv_heads, cudaStream_t stream) {
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
