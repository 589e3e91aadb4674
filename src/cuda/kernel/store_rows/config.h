// Sizes and shared memory of store_rows.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/lane/map.cuh"
#include "format/format.h"

namespace quire::cuda {

// Whether a lane's part of a row takes so many registers that it holds one row at a time.
template <class Map>
inline constexpr bool kRowByRow = Map::kElements >= 32;

// The threads of a block of store_rows, and how many blocks are to share a multiprocessor (0: the compiler's choice).
// Warps that live long come in small blocks, so that the launch ends sooner after the last one starts.
template <class Map>
inline constexpr int kMapThreads = Map::kElements >= 64 ? 64 : 128;
template <class Map>
inline constexpr int kMinBlocks = kRowByRow<Map> ? 8 : 0;

// Rows with metadata inside lie at odd addresses. Such pairs of formats are assembled in shared memory, K row and V row
// of a token head one behind the other, and copied from there in whole runs of slots where they adjoin, 16 bytes at a
// time, so that no sector is written in parts.
template <format::Format KeyF, format::Format ValueF>
inline constexpr bool kStaged =
    KeyF::kMetaPlace == format::MetaPlace::kInRow || ValueF::kMetaPlace == format::MetaPlace::kInRow;

// Bytes per access to a row in the stage.
template <format::Format KeyF, format::Format ValueF>
constexpr int stage_access(int head_size, int head_size_v) {
  const std::int64_t bits = 16 | format::row_bytes<KeyF>(head_size) | format::code_bytes<KeyF>(head_size) |
                            format::row_bytes<ValueF>(head_size_v) | format::code_bytes<ValueF>(head_size_v);
  return static_cast<int>(bits & -bits);
}

template <format::Format KeyF, format::Format ValueF, class Map>
struct StoreStage {
  static constexpr int kWarpRows = 32 / Map::kLanes;
  static constexpr int kHeadSize = Map::kElements * Map::kLanes;
  static constexpr int kBytes =
      kStaged<KeyF, ValueF>
          ? static_cast<int>(kWarpRows * (format::row_bytes<KeyF>(kHeadSize) + format::row_bytes<ValueF>(kHeadSize)))
          : 1;
  struct alignas(16) Warp {
    std::uint8_t bytes[kBytes];
  };
  Warp warps[kMapThreads<Map> / 32];
};

// Whether one body of code stores the rows of K and then those of V. The multiprocessor then fetches half as many
// instructions, and the library holds half as many. A kernel that wants the rows of K and of V in flight at the same
// time has two bodies.
template <format::Format KeyF, format::Format ValueF, class Map>
inline constexpr bool kOneBody =
    std::is_same_v<KeyF, ValueF> && !kStaged<KeyF, ValueF> && (kRowByRow<Map> || !Map::kExact);

}  // namespace quire::cuda
