// Sizes and shared memory of attend_any.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/attention_params.h"
#include "format/format.h"

namespace quire::cuda {

struct AttendAnyConfig {
  static constexpr int kRows = 16;
  static constexpr int kKeys = 32;
  static constexpr int kRowsPerWarp = kRows / kWarps;
  static constexpr int kMaxColumns = format::kMaxHeadSize / kAttentionThreads;  // output columns of a thread

  // Distance of rows in shared memory, in floats: a multiple of 4 whose quarter is odd, so that 32 lanes reading 16
  // bytes each from 32 rows meet every bank once per phase.
  static __host__ __device__ constexpr int pitch(int head_size) {
    return (head_size + kChunk - 1) / kChunk * kChunk + 4;
  }

  // `floats` goes on with queries [kRows][key pitch], keys [kKeys][key pitch] and values [kKeys][value pitch].
  struct Storage {
    std::uint32_t warp_sees[2][kWarps];  // keys some row of the warp sees; two copies, used in turn
    std::uint32_t row_sees[kRows];
    std::int32_t block[kKeys];  // physical block of each key; -1: not read
    int slot[kKeys];
    float2 key_affine[kKeys], value_affine[kKeys];
    float weight[kKeys][kRows];  // p_k a_k
    float correction[kRows];
    float offset[kRows];  // sum_k p_k b_k
    float4 floats[1];
  };
  static __host__ __device__ constexpr std::size_t storage_bytes(int head_size, int head_size_v) {
    return sizeof(Storage) + sizeof(float) * ((kRows + kKeys) * pitch(head_size) + kKeys * pitch(head_size_v));
  }
};
static_assert(AttendAnyConfig::storage_bytes(format::kMaxHeadSize, format::kMaxHeadSize) <= 227 * 1024);

}  // namespace quire::cuda
