// What a lane loads of a row that is to be stored: elements of a dense row of 16- or 32-bit floats.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "cuda/lane/bytes.cuh"
#include "cuda/lane/rotate.cuh"
#include "format/float_types.h"
#include "format/format.h"

namespace quire::cuda {

// The kElements elements of a lane from a dense row of 16- or 32-bit floats.
template <class Map>
__device__ __forceinline__ void load_lane(const std::uint8_t* row, DType dtype, int access, int lane, int head_size,
                                          float (&y)[Map::kElements]) {
  constexpr int kE = Map::kElements;
  const int first = lane * kE;
  const int count = Map::kRagged ? min(max(head_size - first, 0), kE) : (Map::kExact || first < head_size ? kE : 0);
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

// Whether a row's signs may be flipped while it is loaded, before its statistics are taken.
template <format::Format F>
inline constexpr bool kFlipsInput =
    F::kRotation == format::Rotation::kSignedHadamard&& F::kStatsOf != format::StatsOf::kInput;

// What a lane loads of its row. An exact map keeps 16-bit elements as they come, in half the registers, so that a
// second row can be on its way while the first is worked on.
template <class Map>
struct LaneInput {
  float y[Map::kElements] = {};

  // The elements of the format's row, with their signs flipped where kFlipsInput.
  template <format::Format F>
  __device__ __forceinline__ void widen(DType, int lane, int head_size, float (&to)[Map::kElements]) const {
#pragma unroll
    for (int j = 0; j < Map::kElements; ++j) to[j] = y[j];
    if constexpr (kFlipsInput<F>) flip_signs<Map>(to, lane, format::rotation_block(head_size));
  }
};

template <class Map>
requires(Map::kExact) struct LaneInput<Map> {
  static constexpr int kPairs = Map::kElements / 2;
  uint4 words[kPairs / 4];

  // Where word w of the lane's 8 elements lies in the row, in words.
  static __device__ __forceinline__ int place(int lane, int w) {
    constexpr int kChunkWords = Map::kChunk / 8;
    return (w / kChunkWords * Map::kLanes + lane) * kChunkWords + w % kChunkWords;
  }

  __device__ __forceinline__ void load(const std::uint8_t* row, int lane) {
#pragma unroll
    for (int w = 0; w < kPairs / 4; ++w) words[w] = reinterpret_cast<const uint4*>(row)[place(lane, w)];
  }
  template <format::Format F>
  __device__ __forceinline__ void widen(DType dtype, int lane, int, float (&to)[Map::kElements]) const {
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

}  // namespace quire::cuda
