// One row by the lanes of a warp: the second driver of the contract in format/format.h (format/row.h is the first).
//
//   A row of head_size elements lies over kLanes neighbouring lanes (2 to 32; a warp holds 32 / kLanes rows), lane
//   l holding the kElements contiguous elements from l * kElements on, or (kChunked) every kLanes-th chunk of kChunk:
//
//     butterflies   h < kChunk between a lane's registers, then by a shuffle with lane l ^ (h / kChunk), then, of a
//                   chunked tile, between registers again
//     statistics    the contract's tree, element i with i + h, h ascending: first inside a lane, then across lanes
//     pack          a lane packs its own units and writes its own bytes; lane 0 writes the metadata
//
// Elements past head_size hold zeros and never enter the statistics. Where head_size is not a multiple of kElements
// (kRagged) one lane is partly filled; the rotation's block is then smaller than kElements, so it never crosses lanes.
// Where every lane is known to be full (kExact) the head size is a constant.
// Every lane of the warp takes part in every shuffle, also lanes whose row is skipped.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <type_traits>

#include "format/float_types.h"
#include "format/format.h"
#include "quire/tensor.h"

namespace quire::cuda {

inline constexpr unsigned kFullWarp = 0xffffffffU;

template <int kElementsPerLane, int kLanesPerRow, bool kIsRagged, bool kIsExact = false,
          int kElementsPerChunk = kElementsPerLane>
struct RowTile {
  static constexpr int kElements = kElementsPerLane;
  static constexpr int kLanes = kLanesPerRow;
  static constexpr int kChunk = kElementsPerChunk;
  static constexpr bool kChunked = kChunk < kElements;
  static constexpr bool kRagged = kIsRagged;
  static constexpr bool kExact = kIsExact;
  static_assert((kElements & (kElements - 1)) == 0 && kElements >= 8,
                "a power of two that every format's unit divides");
  static_assert(kLanes >= 2 && kLanes <= 32 && (kLanes & (kLanes - 1)) == 0);
  static_assert(!kChunked || (kExact && kChunk % 8 == 0), "chunks of 16-byte loads");

  static __host__ __device__ constexpr bool holds(int head_size) {
    if (kExact) return head_size == kElements * kLanes;
    return head_size <= kElements * kLanes && (kRagged || head_size % kElements == 0);
  }
  // The head size, a constant where it is known.
  static __device__ constexpr int head_size(int given) { return kExact ? kElements * kLanes : given; }
};

// A trivially copyable value of lane `lane ^ lane_mask`.
template <int kLanes, class T>
__device__ __forceinline__ T shuffle_xor(const T& value, int lane_mask) {
  static_assert(std::is_trivially_copyable_v<T>);
  constexpr int kWords = (sizeof(T) + 3) / 4;
  unsigned words[kWords] = {};
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (int w = 0; w < kWords; ++w) words[w] = __shfl_xor_sync(kFullWarp, words[w], lane_mask, kLanes);
  T other;
  memcpy(&other, words, sizeof(T));
  return other;
}

// `bytes` bytes from or to global memory, in pieces of `access` bytes (1, 2, 4, 8 or 16, dividing the address).
template <class Word, int kBytes>
__device__ __forceinline__ void load_words(const std::uint8_t* from, std::uint8_t (&to)[kBytes], int bytes) {
  if constexpr (sizeof(Word) <= kBytes) {
#pragma unroll
    for (int i = 0; i < kBytes / static_cast<int>(sizeof(Word)); ++i) {
      if (i * static_cast<int>(sizeof(Word)) < bytes) {
        const Word word = reinterpret_cast<const Word*>(from)[i];
        memcpy(to + i * sizeof(Word), &word, sizeof(Word));
      }
    }
  }
}
template <int kBytes>
__device__ __forceinline__ void load_bytes(const std::uint8_t* from, std::uint8_t (&to)[kBytes], int bytes,
                                           int access) {
  if (kBytes % 16 == 0 && access >= 16) return load_words<uint4>(from, to, bytes);
  if (kBytes % 8 == 0 && access >= 8) return load_words<uint2>(from, to, bytes);
  if (kBytes % 4 == 0 && access >= 4) return load_words<std::uint32_t>(from, to, bytes);
  if (kBytes % 2 == 0 && access >= 2) return load_words<std::uint16_t>(from, to, bytes);
  load_words<std::uint8_t>(from, to, bytes);
}

template <class Word, int kBytes>
__device__ __forceinline__ void store_words(const std::uint8_t (&from)[kBytes], std::uint8_t* to, int bytes) {
  if constexpr (sizeof(Word) <= kBytes) {
#pragma unroll
    for (int i = 0; i < kBytes / static_cast<int>(sizeof(Word)); ++i) {
      if (i * static_cast<int>(sizeof(Word)) < bytes) {
        Word word;
        memcpy(&word, from + i * sizeof(Word), sizeof(Word));
        reinterpret_cast<Word*>(to)[i] = word;
      }
    }
  }
}
template <int kBytes>
__device__ __forceinline__ void store_bytes(const std::uint8_t (&from)[kBytes], std::uint8_t* to, int bytes,
                                            int access) {
  if (kBytes % 16 == 0 && access >= 16) return store_words<uint4>(from, to, bytes);
  if (kBytes % 8 == 0 && access >= 8) return store_words<uint2>(from, to, bytes);
  if (kBytes % 4 == 0 && access >= 4) return store_words<std::uint32_t>(from, to, bytes);
  if (kBytes % 2 == 0 && access >= 2) return store_words<std::uint16_t>(from, to, bytes);
  store_words<std::uint8_t>(from, to, bytes);
}

// One element of a float tensor, widened. float8 reads its code's value.
__device__ __forceinline__ float load_float(const std::uint8_t* at, DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return format::half_to_float(*reinterpret_cast<const std::uint16_t*>(at));
    case DType::kBFloat16:
      return format::bfloat16_to_float(*reinterpret_cast<const std::uint16_t*>(at));
    case DType::kFloat8E4M3:
      return format::E4M3::decode(*at);
    case DType::kFloat8E5M2:
      return format::E5M2::decode(*at);
    default:
      return *reinterpret_cast<const float*>(at);
  }
}

// The kElements elements of a lane from a dense row of 16- or 32-bit floats.
template <class Tile>
__device__ __forceinline__ void load_lane(const std::uint8_t* row, DType dtype, int access, int lane, int head_size,
                                          float (&y)[Tile::kElements]) {
  constexpr int kE = Tile::kElements;
  const int first = lane * kE;
  const int count = Tile::kRagged ? min(max(head_size - first, 0), kE) : (Tile::kExact || first < head_size ? kE : 0);
  if (dtype == DType::kFloat32) {
    alignas(16) std::uint8_t bytes[kE * 4] = {};
    load_bytes(row + first * 4, bytes, count * 4, access);
#pragma unroll
    for (int j = 0; j < kE; ++j) y[j] = format::load_as<float>(bytes + 4 * j);
    return;
  }
  alignas(16) std::uint8_t bytes[kE * 2] = {};
  load_bytes(row + first * 2, bytes, count * 2, access);
  if (dtype == DType::kFloat16) {
#pragma unroll
    for (int j = 0; j < kE; ++j) y[j] = format::half_to_float(format::load_as<std::uint16_t>(bytes + 2 * j));
  } else {
#pragma unroll
    for (int j = 0; j < kE; j += 2) {  // the halves of a word: one instruction each
      const auto pair = format::load_as<std::uint32_t>(bytes + 2 * j);
      y[j] = __uint_as_float(pair << 16);
      y[j + 1] = __uint_as_float(pair & 0xffff0000U);
    }
  }
}

// format::rht_sign_word of every block size 2^n, in constant memory: a table inside a function would be built on each
// thread's stack.
struct SignWords {
  std::uint32_t words[10][format::kMaxHeadSize / 32];
};
__constant__ constexpr SignWords kSignWords = [] {
  static_assert(format::kMaxHeadSize == 1 << 9);
  SignWords table{};
  for (int n = 0; n < 10; ++n) {
    for (int w = 0; w < format::kMaxHeadSize / 32; ++w) table.words[n][w] = format::rht_sign_word(w, 1 << n);
  }
  return table;
}();

// The signs of an exact tile, whose row is one block, as a mask for each pair of 16-bit elements.
__device__ constexpr std::array<std::uint32_t, format::kMaxHeadSize / 2> kPairSigns = [] {
  std::array<std::uint32_t, format::kMaxHeadSize / 2> masks{};
  for (int i = 0; i < format::kMaxHeadSize; ++i) {
    if ((format::rht_sign_word(i / 32, format::kMaxHeadSize) >> (i % 32)) & 1U)
      masks[i / 2] |= i % 2 == 0 ? 0x8000U : 0x80000000U;
  }
  return masks;
}();

template <class Tile>
__device__ __forceinline__ void flip_signs(float (&y)[Tile::kElements], int lane, int block) {
  constexpr int kE = Tile::kElements;
  const int first = lane * kE;
  const std::uint32_t word = kSignWords.words[__ffs(block) - 1][first / 32] >> (first % 32);
#pragma unroll
  for (int j = 0; j < kE; ++j) y[j] = format::apply_sign(y[j], word, j);
}

template <int kE>
__device__ __forceinline__ void butterflies(float (&y)[kE], int distance) {
#pragma unroll
  for (int pair = 0; pair < kE / 2; ++pair) {
    const int i = pair / distance * 2 * distance + pair % distance;
    const float a = y[i];
    const float b = y[i + distance];
    y[i] = a + b;
    y[i + distance] = a - b;
  }
}

template <class Tile>
__device__ __forceinline__ void hadamard(float (&y)[Tile::kElements], int lane, int block) {
  constexpr int kE = Tile::kElements;
#pragma unroll
  for (int h = 1; h < Tile::kChunk; h *= 2) {
    if (!Tile::kRagged || h < block) butterflies(y, h);
  }
#pragma unroll
  for (int step = 1; step < Tile::kLanes; step *= 2) {
    if (step * Tile::kChunk < block) {
      // The lower lane adds, the upper one subtracts its own: a product with +-1 is exact, so one rounding remains.
      const float sign = (lane & step) != 0 ? -1.0F : 1.0F;
#pragma unroll
      for (int j = 0; j < kE; ++j) {
        const float other = __shfl_xor_sync(kFullWarp, y[j], step, Tile::kLanes);
        y[j] = __fmaf_rn(y[j], sign, other);
      }
    }
  }
#pragma unroll
  for (int distance = Tile::kChunk; distance < kE; distance *= 2) butterflies(y, distance);
}

// y = H y or H (s .* y).
template <class Tile>
__device__ __forceinline__ void rotate(format::Rotation rotation, float (&y)[Tile::kElements], int lane, int block) {
  if (rotation == format::Rotation::kSignedHadamard) flip_signs<Tile>(y, lane, block);
  if (rotation != format::Rotation::kNone) hadamard<Tile>(y, lane, block);
}

// y = H y or s .* (H y).
template <class Tile>
__device__ __forceinline__ void rotate_back(format::Rotation rotation, float (&y)[Tile::kElements], int lane,
                                            int block) {
  if (rotation != format::Rotation::kNone) hadamard<Tile>(y, lane, block);
  if (rotation == format::Rotation::kSignedHadamard) flip_signs<Tile>(y, lane, block);
}

// Whether a row's signs may be flipped before its statistics are taken: as it is loaded.
template <format::Format F>
inline constexpr bool kFlipsInput =
    F::kRotation == format::Rotation::kSignedHadamard&& F::kStatsOf != format::StatsOf::kInput;

// What a lane loads of its row. An exact tile keeps its 16-bit elements as they come, in half the registers, so that a
// second row can be on its way while the first is worked on.
template <class Tile>
struct LaneInput {
  float y[Tile::kElements] = {};

  // The elements of the format's row, its signs flipped where kFlipsInput.
  template <format::Format F>
  __device__ __forceinline__ void widen(DType, int lane, int head_size, float (&to)[Tile::kElements]) const {
#pragma unroll
    for (int j = 0; j < Tile::kElements; ++j) to[j] = y[j];
    if constexpr (kFlipsInput<F>) flip_signs<Tile>(to, lane, format::rotation_block(head_size));
  }
};

template <class Tile>
requires(Tile::kExact) struct LaneInput<Tile> {
  static constexpr int kPairs = Tile::kElements / 2;
  uint4 words[kPairs / 4];

  // Where word w of 8 elements lies in the row, in words.
  static __device__ __forceinline__ int place(int lane, int w) {
    constexpr int kChunkWords = Tile::kChunk / 8;
    return (w / kChunkWords * Tile::kLanes + lane) * kChunkWords + w % kChunkWords;
  }

  __device__ __forceinline__ void load(const std::uint8_t* row, int lane) {
#pragma unroll
    for (int w = 0; w < kPairs / 4; ++w) words[w] = reinterpret_cast<const uint4*>(row)[place(lane, w)];
  }
  template <format::Format F>
  __device__ __forceinline__ void widen(DType dtype, int lane, int, float (&to)[Tile::kElements]) const {
    alignas(16) std::uint32_t pairs[kPairs];
    memcpy(pairs, words, sizeof(pairs));
    if constexpr (kFlipsInput<F>) {  // two elements at once
      alignas(16) std::uint32_t signs[kPairs];
#pragma unroll
      for (int w = 0; w < kPairs / 4; ++w) {
        const uint4 four = reinterpret_cast<const uint4*>(kPairSigns.data())[place(lane, w)];
        memcpy(signs + 4 * w, &four, 16);
      }
#pragma unroll
      for (int j = 0; j < kPairs; ++j) pairs[j] ^= signs[j];
    }
    if (dtype == DType::kFloat16) {
#pragma unroll
      for (int j = 0; j < 2 * kPairs; ++j) {
        to[j] = format::half_to_float(static_cast<std::uint16_t>(pairs[j / 2] >> (16 * (j % 2))));
      }
    } else {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        to[2 * j] = __uint_as_float(pairs[j] << 16);
        to[2 * j + 1] = __uint_as_float(pairs[j] & 0xffff0000U);
      }
    }
  }
};

// The statistics of the row, the same in every lane that holds a part of it.
template <format::Format F, class Tile>
__device__ __forceinline__ typename F::Stats row_stats(const float (&y)[Tile::kElements], int lane, int head_size) {
  constexpr int kE = Tile::kElements;
  using Stats = typename F::Stats;
  Stats stats[kE];
#pragma unroll
  for (int j = 0; j < kE; ++j) stats[j] = F::stat(y[j]);
  // What the lanes merge among them: one value each, or one a chunk where the order matters.
  constexpr int kOwn = Stats::kAnyOrder ? kE : Tile::kChunk;
#pragma unroll
  for (int h = 1; h < kOwn; h *= 2) {
#pragma unroll
    for (int j = 0; j < kE; j += 2 * h) {
      if (!Tile::kRagged || lane * kE + j + h < head_size) stats[j] = F::merge(stats[j], stats[j + h]);
    }
  }
#pragma unroll
  for (int step = 1; step < Tile::kLanes; step *= 2) {
    // The upper half of the 2 * step lanes may lie past the row: both halves then have what the lower one has.
    const int upper_lane = (lane & ~(2 * step - 1)) + step;
#pragma unroll
    for (int j = 0; j < kE; j += kOwn) {
      const Stats other = shuffle_xor<Tile::kLanes>(stats[j], step);
      if (Tile::kExact || upper_lane * kE < head_size) {
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

// The bytes of a lane's elements.
template <format::Format F, int kN>
__device__ __forceinline__ void pack_elements(const typename F::Encoder& encoder, float (&y)[kN], std::uint8_t* bytes) {
  static_assert(kN % F::kUnit == 0, "a lane holds whole units");
  if constexpr (requires { F::pack_lane(encoder, y, bytes); }) {
    F::pack_lane(encoder, y, bytes);
  } else {
#pragma unroll
    for (int u = 0; u < kN / F::kUnit; ++u) F::pack(encoder, y + u * F::kUnit, bytes + u * F::kUnitBytes);
  }
}

// Encodes the row whose lane `lane` holds y as LaneInput::widen gave it, which is overwritten, and writes it where
// `store` is set. `access` divides the row's address and its bytes of codes; store_bytes heeds the distance of lanes.
// The bits are those of format::encode_row.
template <format::Format F, class Tile>
__device__ __forceinline__ void encode_row(float (&y)[Tile::kElements], int lane, format::RowShape shape,
                                           float tensor_scale, bool store, std::uint8_t* data, int access,
                                           std::uint8_t* meta) {
  constexpr int kE = Tile::kElements;
  constexpr format::Rotation kRotation = kFlipsInput<F> ? format::Rotation::kHadamard : F::kRotation;
  using format::StatsOf;
  typename F::Stats stats{};
  if constexpr (F::kStatsOf == StatsOf::kInput) stats = row_stats<F, Tile>(y, lane, shape.head_size);
  if constexpr (F::kStatsOf != StatsOf::kInput) {
    rotate<Tile>(kRotation, y, lane, shape.block);
    if constexpr (F::kStatsOf == StatsOf::kRotated) stats = row_stats<F, Tile>(y, lane, shape.head_size);
  }
  const typename F::Encoder encoder = F::finish(stats, shape, tensor_scale);
  if constexpr (F::kStatsOf == StatsOf::kInput) {
#pragma unroll
    for (int j = 0; j < kE; ++j) y[j] = F::normalize(encoder, y[j]);
    rotate<Tile>(kRotation, y, lane, shape.block);
  }
  constexpr int kChunkBytes = Tile::kChunk / F::kUnit * F::kUnitBytes;
  alignas(16) std::uint8_t bytes[kE / F::kUnit * F::kUnitBytes];
  pack_elements<F>(encoder, y, bytes);
  if (!store) return;
#pragma unroll
  for (int c = 0; c < kE / Tile::kChunk; ++c) {
    const int at = (c * Tile::kLanes + lane) * kChunkBytes;
    const int held = static_cast<int>(format::code_bytes<F>(shape.head_size)) - at;
    const int count = Tile::kExact ? kChunkBytes : min(max(held, 0), kChunkBytes);
    alignas(16) std::uint8_t chunk[kChunkBytes];
    memcpy(chunk, bytes + c * kChunkBytes, kChunkBytes);
    store_bytes(chunk, data + at, count, access);
  }
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
