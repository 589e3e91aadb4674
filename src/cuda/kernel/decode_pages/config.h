// Sizes and shared memory of decode_pages.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/format/formats.cuh"
#include "cuda/format/operand.cuh"
#include "cuda/kernel/decode_pages/params.h"
#include "cuda/work/page_list.cuh"
#include "cuda/work/rows.cuh"

namespace quire::cuda {

// Whether codes that nobody wrote may be NaN.
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
  // Up to four rows stand on the even columns of a product, a row a lane: no lane computes the softmax of padding.
  static constexpr bool kSpread = kRows == 4;
  static constexpr int kTiles = kSpread ? 1 : kRows / 8;     // of 8 columns
  static constexpr int kColumns = kSpread ? 1 : 2 * kTiles;  // rows of a lane
  static constexpr int kSets = kRows / 4;                    // of four rows, in partials

  // Table look-ups wait on one another: more warps.
  static constexpr int kWarps = KeyOperand<KeyF>::kTableBytes > 0 && kHead <= 128 && kRows <= 8 ? 16 : 8;
  static constexpr int kThreads = 32 * (kWarps + 4);  // a warpgroup for the copies, so that it can give registers
  static constexpr int kConsumerRegisters = kWarps == 16 ? 104 : 216;
  static constexpr int kProducerRegisters = kWarps == 16 ? 64 : 72;
  // Slices at once.
  static constexpr int kRawWords =
      2 * KeyPieces::kCount * KeyPieces::kWords + 4 * ValuePieces::kCount * ValuePieces::kWords;
  static constexpr int kSlicesAtOnce = kWarps > 8 || kRows > 16 || kHead > 128 || kRawWords > 32 ? 1 : 2;
  static constexpr bool kLateValues = kRawWords > 32 || kRows > 16;  // loaded once K's registers are free
  // What divides the address of every row where nothing is odd about the layout: rows of slots are as aligned as a slot.
  static constexpr bool kSlots =
      KeyF::kMetaPlace == format::MetaPlace::kInRow || ValueF::kMetaPlace == format::MetaPlace::kInRow;
  static constexpr int kRowBytes = static_cast<int>(format::row_bytes<KeyF>(kHead) | format::row_bytes<ValueF>(kHead));
  static constexpr int kAccess = !kSlots ? 16 : kRowBytes % 4 == 0 ? 4 : 2;
  static constexpr int kLeastAccess = kSlots ? 2 : 4;                      // whatever the layout
  static constexpr bool kTail = kCodesMayBeNaN<KeyF> || KeyF::kLevelNorm;  // elements past the head size matter

  static constexpr int kMaxStages = 32;
  static constexpr int kSegments = 4;
  static constexpr int kQueryRows = kRows < 8 ? kRows : 8;  // on their way to registers
  static constexpr int kQueryPitch = 2 * kHead + 16;
  // Where accumulators take the registers, queries are kept in shared memory, as fragments.
  static constexpr bool kQueryInShared = kRows * kHead > 16 * 128;

  struct Segment {
    TileRows tile;
    SliceRun run;
    int num_slices;  // none: the end
    int slot;
  };
  struct StageInfo {
    int first_key;  // far below 0: nothing was copied
    int careful;    // some row does not see some of the keys
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
  static constexpr int kSlack = 512;  // what is read past the last row: a row of the head-size class
};

}  // namespace quire::cuda
