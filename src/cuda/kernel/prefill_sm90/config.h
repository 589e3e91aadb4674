// Sizes and shared memory of prefill_sm90.
#pragma once

#include <cstdint>

#include "cuda/attention_params.h"
#include "cuda/format/fragment.cuh"
#include "cuda/stage/rows.cuh"
#include "cuda/work/rows.cuh"

namespace quire::cuda {

inline constexpr int kMaxHeadSm90 = 128;

// Whether this pass of the compiler knows wgmma.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
inline constexpr bool kHasWgmma = true;
#else
inline constexpr bool kHasWgmma = false;
#endif

template <class KeyF, class ValueF>
struct PrefillSm90Config {
  static constexpr int kHead = kMaxHeadSm90;
  static constexpr int kRows = 128;
  static constexpr int kKeys = 128;
  static constexpr int kStages = 2;
  static constexpr int kLookAhead = 4;    // tiles whose rows' places are kept: at least 3
  static constexpr int kWarpgroup = 128;  // threads
  static constexpr int kThreads = 3 * kWarpgroup;
  static constexpr int kWarpRows = 16;
  static_assert(kRows == 2 * 4 * kWarpRows && kKeys == kWarpgroup);
  // Of a multiprocessor's 65536 registers: 128 x 88 + 256 x 208.
  static constexpr int kProducerRegisters = 88;
  static constexpr int kConsumerRegisters = 208;

  // 128 rows of 128 elements: two halves of 64 columns, swizzled.
  static constexpr int kHalf = 128 * 128;
  struct Matrix {
    alignas(1024) std::uint8_t bytes[2 * kHalf];

    // Chunk c, 16 bytes, of a row.
    static __device__ __forceinline__ int offset(int row, int chunk) {
      return (chunk >> 3) * kHalf + row * 128 + ((chunk ^ row) & 7) * 16;
    }
  };
  struct Stages {
    Matrix key[kStages], value[kStages];
  };
  struct Rows {
    float acc[kRows][kHead + 4];
  };
  // What the levels of a stage mean.
  struct Meta {
    alignas(8) float scale[kKeys], offset[kKeys];
    std::uint32_t readable[kKeys / 32];       // K: one bit a key
    std::uint32_t largest_scale[kKeys / 32];  // V: of 32 keys, as bits
  };
  // What producer and consumers share of K or of V besides the stages.
  template <class F>
  struct Side {
    alignas(16) std::uint8_t raw[kRaw16<F> ? 16 : kKeys * RawRow<F, kHead>::kPitch];
    Meta meta[kStages];
    std::int64_t offset[kLookAhead][kKeys];  // of rows; -1: not read
    float scales[kKeys];                     // where they come from a scale cache
    std::uint64_t full[kStages], empty[kStages];
  };
  struct Storage {
    Matrix query;
    union {
      Stages stages;
      Rows rows;
    };
    Side<KeyF> key;
    Side<ValueF> value;
    RowInfo row[kRows];
    [[no_unique_address]] Tables<KeyF> key_tables;
    [[no_unique_address]] Tables<ValueF> value_tables;
  };
  static constexpr int kStorageBytes = sizeof(Storage) + 1024;  // to start at a multiple of 1024
  static_assert(kStorageBytes <= 227 * 1024);
};

template <class KeyF, class ValueF>
using PrefillSm90Storage = typename PrefillSm90Config<KeyF, ValueF>::Storage;

// Barriers of a block by number; 0 is __syncthreads. The last two are pairs, one for each consumer.
enum : int { kProducersBarrier = 1, kConsumersBarrier = 2, kConsumerBarrier = 3, kTurnBarrier = 5 };

}  // namespace quire::cuda
