// The sizes and the shared memory of decode_pages, for a pair of formats, a class of head sizes and a number of query
// rows.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/format/formats.cuh"
#include "cuda/format/operand.cuh"
#include "cuda/kernel/decode_pages/params.h"
#include "cuda/work/page_list.cuh"
#include "cuda/work/rows.cuh"

namespace quire::cuda {

// Whether the bytes of a slot that was never stored may decode to NaN. Such rows need care even where nobody sees them.
template <class F>
inline constexpr bool kCodesMayBeNaN =
    F::kStatsOf == format::StatsOf::kNothing || std::is_same_v<F, format::Fp8PerTokenHead>;

template <class KeyF, class ValueF, int kHead, int kTileRows>
struct DecodePagesConfig {
  static constexpr int kRows = kTileRows;
  using KeyPieces = Pieces<KeyF, kHead, 4>;
  using ValuePieces = Pieces<ValueF, kHead, 8>;
  static constexpr bool kBFloat16Keys = std::is_same_v<KeyF, format::BFloat16>;
  static constexpr bool kBFloat16Values = std::is_same_v<ValueF, format::BFloat16>;
  // A tile of four rows stands on the even columns of a product, one row a lane, so that no lane computes the softmax
  // of padding.
  static constexpr bool kSpread = kRows == 4;
  static constexpr int kTiles = kSpread ? 1 : kRows / 8;     // tiles of 8 columns
  static constexpr int kColumns = kSpread ? 1 : 2 * kTiles;  // query rows that one lane holds
  static constexpr int kSets = kRows / 4;                    // groups of four rows, the unit of a partial result

  // Look-ups in a table wait for one another, so more warps are needed to fill the time.
  static constexpr int kWarps = KeyOperand<KeyF>::kTableBytes > 0 && kHead <= 128 && kRows <= 8 ? 16 : 8;
  // The copies have a whole warpgroup, so that it can give registers away.
  static constexpr int kThreads = 32 * (kWarps + 4);
  static constexpr int kConsumerRegisters = kWarps == 16 ? 104 : 216;
  static constexpr int kProducerRegisters = kWarps == 16 ? 64 : 72;
  // How many slices a warp works on at once.
  static constexpr int kRawWords =
      2 * KeyPieces::kCount * KeyPieces::kWords + 4 * ValuePieces::kCount * ValuePieces::kWords;
  static constexpr int kSlicesAtOnce = kWarps > 8 || kRows > 16 || kHead > 128 || kRawWords > 32 ? 1 : 2;
  // Whether V is loaded only when K's registers are free.
  static constexpr bool kLateValues = kRawWords > 32 || kRows > 16;
  // The power of two that divides the address of every row in an ordinary layout. Rows inside of slots are only as
  // aligned as the slot.
  static constexpr bool kSlots =
      KeyF::kMetaPlace == format::MetaPlace::kInRow || ValueF::kMetaPlace == format::MetaPlace::kInRow;
  static constexpr int kRowBytes = static_cast<int>(format::row_bytes<KeyF>(kHead) | format::row_bytes<ValueF>(kHead));
  static constexpr int kAccess = !kSlots ? 16 : kRowBytes % 4 == 0 ? 4 : 2;
  static constexpr int kLeastAccess = kSlots ? 2 : 4;  // what every accepted layout guarantees
  // Whether elements past the head size reach the result.
  static constexpr bool kTail = kCodesMayBeNaN<KeyF> || KeyF::kLevelNorm;

  static constexpr int kMaxStages = 32;
  static constexpr int kSegments = 4;
  static constexpr int kQueryRows = kRows < 8 ? kRows : 8;  // rows that are staged at a time on their way to registers
  static constexpr int kQueryPitch = 2 * kHead + 16;
  // Where the accumulators take the registers, the queries stay in shared memory, as fragments.
  static constexpr bool kQueryInShared = kRows * kHead > 16 * 128;

  struct Segment {
    TileRows tile;
    SliceRun run;
    int num_slices;  // 0 marks the end of the list
    int slot;
  };
  struct StageInfo {
    int first_key;  // far below 0 where nothing was copied
    int careful;    // 1 where some row does not see some of the keys
  };
  struct Warp {
    alignas(16) std::uint8_t queries[kQueryRows * kQueryPitch];
    RowInfo rows[kRows];
    uint2 fragments[kQueryInShared ? kTiles : 1][kQueryInShared ? kHead / 16 : 1][kQueryInShared ? 32 : 1];
  };
  struct Storage {
    alignas(128) std::uint8_t table[KeyOperand<KeyF>::kTableBytes > 0 ? KeyOperand<KeyF>::kTableBytes : 16];
    alignas(16) Warp warps[kWarps];
    Segment segments[kSegments];
    StageInfo infos[kMaxStages];
    std::uint64_t full[kMaxStages], empty[kMaxStages], segment_full[kSegments], segment_empty[kSegments];
  };
  static constexpr int kHeaderBytes = (static_cast<int>(sizeof(Storage)) + 127) / 128 * 128;
  static constexpr int kSharedBytes = 227 * 1024;
  static constexpr int kSlack = 512;  // bytes that loads may read past the last row: one row of the head-size class
};

}  // namespace quire::cuda
