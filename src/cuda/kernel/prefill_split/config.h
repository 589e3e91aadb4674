// Sizes and shared memory of prefill_split.
#pragma once

#include <cstdint>

#include "cuda/attention_params.h"
#include "cuda/format/fragment.cuh"
#include "cuda/stage/rows.cuh"
#include "cuda/work/rows.cuh"

namespace quire::cuda {

template <class KeyF, class ValueF, int kHead>
struct PrefillConfig {
  static constexpr int kKeys = kHead <= 128 ? 64 : 32;
  static constexpr int kRows = kHead <= 128 ? 128 : 64;  // as many as have room for their accumulators
  static constexpr int kWarpRows = kRows / kWarps;
  static constexpr int kMinBlocks = kHead <= 128 ? 2 : 1;
  static constexpr bool kConvertsKey = !kRaw16<KeyF>;
  static constexpr bool kConvertsValue = !kRaw16<ValueF>;
  static constexpr int kTile16 = kKeys * kPitch16<kHead>;
  // A tile that is used where it lands has two buffers; a converted one a raw buffer and one of levels.
  static constexpr int kKeyBuffers = kConvertsKey ? 1 : 2;
  static constexpr int kValueBuffers = kConvertsValue ? 1 : 2;
  static constexpr int kKeyRaw = kConvertsKey ? kKeys * RawRow<KeyF, kHead>::kPitch : 0;
  static constexpr int kValueRaw = kConvertsValue ? kKeys * RawRow<ValueF, kHead>::kPitch : 0;
  static constexpr int kParts = kAttentionThreads / kKeys;  // threads that convert one row

  struct Tiles {
    alignas(16) std::uint8_t query[kRows * kPitch16<kHead>];
    alignas(16) std::uint8_t key[kKeyBuffers][kTile16];
    alignas(16) std::uint8_t value[kValueBuffers][kTile16];
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
    [[no_unique_address]] Tables<KeyF> key_tables;
    [[no_unique_address]] Tables<ValueF> value_tables;
  };
  static_assert(sizeof(Storage) <= 227 * 1024);
};

template <class KeyF, class ValueF, int kHead>
using PrefillStorage = typename PrefillConfig<KeyF, ValueF, kHead>::Storage;

}  // namespace quire::cuda
