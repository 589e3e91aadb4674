// Encodes one row by the lanes of a warp. It is the second driver of the contract in format/format.h; format/row.h is
// the first.
//
//     rotation      is that of lane/rotate.cuh
//     statistics    follow the contract's tree, which merges element i with i + h, h ascending: first in a lane, then
//                   across lanes
//     pack          a lane packs its own units and writes its own bytes; lane 0 writes the metadata
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/format/pack.cuh"
#include "cuda/lane/bytes.cuh"
#include "cuda/lane/input.cuh"
#include "cuda/lane/map.cuh"
#include "cuda/lane/rotate.cuh"
#include "format/format.h"

namespace quire::cuda {

// The statistics of the row, the same in every lane that holds a part of it.
template <format::Format F, class Map>
__device__ __forceinline__ typename F::Stats row_stats(const float (&y)[Map::kElements], int lane, int head_size) {
  constexpr int kE = Map::kElements;
  using Stats = typename F::Stats;
  Stats stats[kE];
#pragma unroll
  for (int j = 0; j < kE; ++j) stats[j] = F::stat(y[j]);
  // What the lanes merge among them: one value a lane, or one a chunk where the order matters.
  constexpr int kOwn = Stats::kAnyOrder ? kE : Map::kChunk;
#pragma unroll
  for (int h = 1; h < kOwn; h *= 2) {
#pragma unroll
    for (int j = 0; j < kE; j += 2 * h) {
      if (!Map::kRagged || lane * kE + j + h < head_size) stats[j] = F::merge(stats[j], stats[j + h]);
    }
  }
#pragma unroll
  for (int step = 1; step < Map::kLanes; step *= 2) {
    // The upper half of the 2 * step lanes may lie past the row; then both halves take what the lower half has.
    const int upper_lane = (lane & ~(2 * step - 1)) + step;
#pragma unroll
    for (int j = 0; j < kE; j += kOwn) {
      const Stats other = shuffle_xor<Map::kLanes>(stats[j], step);
      if (Map::kExact || upper_lane * kE < head_size) {
        stats[j] = F::merge(stats[j], other);
      } else if ((lane & step) != 0) {
        stats[j] = other;
      }
    }
  }
#pragma unroll
  for (int h = kOwn; h < kE; h *= 2) {
#pragma unroll
    for (int j = 0; j < kE; j += 2 * h) stats[j] = F::merge(stats[j], stats[j + h]);
  }
  return stats[0];
}

// Subtracts the row's centre from y. Elements past the head size stay zeros.
template <format::Format F, class Map>
__device__ __forceinline__ void subtract_centre(const format::SideInputs& side, float (&y)[Map::kElements], int lane,
                                                format::RowShape shape) {
  if constexpr (F::kCentre != format::Centre::kNone) {
    if (!format::has_centre<F>(side)) return;
#pragma unroll
    for (int j = 0; j < Map::kElements; ++j) {
      const int i = Map::element(lane, j);
      if (i < shape.head_size) y[j] -= F::centre(side, shape, i);
    }
  }
}

// Writes the codes of a lane's elements to their place in the row.
template <format::Format F, class Map>
__device__ __forceinline__ void store_codes(const typename F::Encoder& encoder, float (&y)[Map::kElements], int lane,
                                            format::RowShape shape, bool store, std::uint8_t* data, int access) {
  constexpr int kE = Map::kElements;
  constexpr int kChunkBytes = Map::kChunk / F::kUnit * F::kUnitBytes;
  alignas(16) std::uint8_t bytes[kE / F::kUnit * F::kUnitBytes];
  Packer<F>::pack(encoder, y, bytes);
  if (!store) return;
#pragma unroll
  for (int c = 0; c < kE / Map::kChunk; ++c) {
    const int at = (c * Map::kLanes + lane) * kChunkBytes;
    const int held = static_cast<int>(format::code_bytes<F>(shape.head_size)) - at;
    const int count = Map::kExact ? kChunkBytes : min(max(held, 0), kChunkBytes);
    alignas(16) std::uint8_t chunk[kChunkBytes];
    memcpy(chunk, bytes + c * kChunkBytes, kChunkBytes);
    store_bytes(chunk, data + at, count, access);
  }
}

// Writes the codes of a row that is encoded as a whole (kWholeRow). The row's first lane does it and gathers the
// others' elements.
template <format::Format F, class Map>
__device__ __forceinline__ void store_whole_row(const typename F::Encoder& encoder, const float (&y)[Map::kElements],
                                                int lane, format::RowShape shape, bool store, std::uint8_t* data) {
  float row[Map::kElements * Map::kLanes];
#pragma unroll 1
  for (int source = 0; source < Map::kLanes; ++source) {
#pragma unroll
    for (int j = 0; j < Map::kElements; ++j) {
      row[Map::element(source, j)] = __shfl_sync(kFullWarp, y[j], source, Map::kLanes);
    }
  }
  if (!store || lane != 0) return;
  std::uint8_t codes[format::code_bytes<F>(Map::kElements * Map::kLanes)];
  F::encode_row(encoder, row, shape, codes);
  const auto bytes = static_cast<int>(format::code_bytes<F>(shape.head_size));
  for (int i = 0; i < bytes; ++i) data[i] = codes[i];
}

// Encodes a row and writes it where `store` is set; the bits are those of format::encode_row. Lane `lane` of the row
// brings its elements in y, as LaneInput::widen gave them, and they are overwritten. `access` divides the row's address
// and its bytes of codes; store_bytes considers the distance between lanes.
template <format::Format F, class Map>
__device__ __forceinline__ void encode_row(float (&y)[Map::kElements], int lane, format::RowShape shape,
                                           const format::SideInputs& side, bool store, std::uint8_t* data, int access,
                                           std::uint8_t* meta) {
  constexpr format::Rotation kRotation = kFlipsInput<F> ? format::Rotation::kHadamard : F::kRotation;
  using format::StatsOf;
  typename F::Stats stats{};
  if constexpr (F::kStatsOf == StatsOf::kInput) stats = row_stats<F, Map>(y, lane, shape.head_size);
  if constexpr (F::kStatsOf != StatsOf::kInput) {
    rotate<Map>(kRotation, y, lane, shape.block);
    subtract_centre<F, Map>(side, y, lane, shape);
    if constexpr (F::kStatsOf == StatsOf::kRotated) stats = row_stats<F, Map>(y, lane, shape.head_size);
  }
  const typename F::Encoder encoder = F::finish(stats, shape, side);
  if constexpr (F::kStatsOf == StatsOf::kInput) {
#pragma unroll
    for (int j = 0; j < Map::kElements; ++j) y[j] = F::normalize(encoder, y[j]);
    rotate<Map>(kRotation, y, lane, shape.block);
  }
  if constexpr (F::kWholeRow) {
    store_whole_row<F, Map>(encoder, y, lane, shape, store, data);
  } else {
    store_codes<F, Map>(encoder, y, lane, shape, store, data, access);
  }
  if (!store) return;
  if constexpr (F::kMetaBytes > 0) {
    if (lane == 0) {
      alignas(4) std::uint8_t meta_bytes[F::kMetaBytes];
      F::write_meta(encoder, meta_bytes);
      // A scale cache is fp32. Metadata in the row is aligned as the row and its codes are.
      store_bytes(meta_bytes, meta, F::kMetaBytes,
                  F::kMetaPlace == format::MetaPlace::kScaleCache ? 4 : min(access, F::kMetaBytes));
    }
  }
}

}  // namespace quire::cuda
