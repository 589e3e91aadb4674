// Sizes and shared memory of decode_split.
#pragma once

#include <cstdint>

#include "cuda/attention_params.h"
#include "cuda/format/fragment.cuh"
#include "cuda/stage/rows.cuh"
#include "cuda/work/rows.cuh"

namespace quire::cuda {

template <class KeyF, class ValueF, int kHead>
struct DecodeConfig {
  static constexpr int kRows = 16;
  static constexpr int kSlice = 16;  // keys
  static constexpr int kKeyBytes = kSlice * RawRow<KeyF, kHead>::kPitch;
  static constexpr int kValueBytes = kSlice * RawRow<ValueF, kHead>::kPitch;
  static constexpr bool kConverts = !kRaw16<KeyF> || !kRaw16<ValueF>;
  static constexpr int kConvertedBytes = kConverts ? kSlice * kPitch16<kHead> : 0;
  static constexpr int kStageBytes = kKeyBytes + kValueBytes;
  // Three blocks a multiprocessor at head sizes up to 128: 74 KiB each.
  static constexpr int kBudget = (kHead <= 128 ? 18 : 48) * 1024;  // of a warp
  static constexpr int kFit = (kBudget - kConvertedBytes - 512) / (kStageBytes + 384);
  static constexpr int kStages = kFit < 2 ? 2 : (kFit > 4 ? 4 : kFit);
  static constexpr bool kQueryInRegisters = kHead <= 128;
  static constexpr int kMinBlocks = kHead <= 128 ? 3 : 1;

  static constexpr int kAffineRows = KeyF::kMetaBytes + ValueF::kMetaBytes > 0 ? kSlice : 1;

  // One warp's part of shared memory.
  struct Warp {
    alignas(16) std::uint8_t raw[kStages][kStageBytes];
    alignas(16) std::uint8_t converted[kConvertedBytes > 0 ? kConvertedBytes : 16];
    alignas(8) float key_scale[kAffineRows], key_offset[kAffineRows];
    alignas(8) float value_scale[kAffineRows], value_offset[kAffineRows];
    float scales[kStages][2][kAffineRows];    // of K and V, where they come from a scale cache
    std::uint32_t readable[kStages];          // one bit a key
    std::int64_t offset[kStages][2][kSlice];  // of K and V rows; -1: not read
  };
  struct Merge {
    float acc[kWarps][kRows][kHead + 4];
    float max[kWarps][kRows], sum[kWarps][kRows];
  };
  static constexpr int kQueryBytes = kRows * kPitch16<kHead>;
  struct Storage {
    union {
      alignas(16) std::uint8_t query_at_first[kQueryBytes];  // until it is in registers
      Warp warp[kWarps];
      Merge merge;
    };
    alignas(16) std::uint8_t query_kept[kQueryInRegisters ? 16 : kQueryBytes];
    RowInfo row[kRows];
    [[no_unique_address]] Tables<KeyF> key_tables;
    [[no_unique_address]] Tables<ValueF> value_tables;
  };
  static_assert(sizeof(Storage) <= (kHead <= 128 ? 74 : 227) * 1024);
};

}  // namespace quire::cuda
