// How the rows of 16 neighbouring slots of a page, of some KV heads, lie in memory: as a few runs that can be copied
// whole, or not. A slice is those 16 slots; copied run by run to one place it holds codes and scales of K and of V.
//
// Rows of K and of V and their scales are regions of rows with strides. Regions that interleave (K and V in one slot,
// scales inline) are one region. A region's slice is one run where its 16 slots and its heads touch, else a run for
// each head (slots touch) or for each slot (heads touch).
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "attention/paged_rows.h"

namespace quire::attention {

inline constexpr int kSliceSlots = 16;

struct PageRun {
  const std::uint8_t* data;  // of block 0, slots 0 to 15, the first heads
  std::int64_t block_stride;
  std::int64_t part_stride;   // from one set of heads to the next
  std::int32_t slice_stride;  // from 16 slots to the next 16 in the block
  std::int32_t bytes;
  std::int32_t at;  // where the run goes in the copy
};

// Where rows lie in the copy: at + slot * slot_stride + head * head_stride.
struct SliceRows {
  std::int32_t at = 0, slot_stride = 0, head_stride = 0;
};

struct PageSlice {
  static constexpr int kMaxRuns = 64;
  int num_heads = 0;  // KV heads of a slice; the cache's number is a multiple
  int num_runs = 0;
  int bytes = 0;       // of the copy, a multiple of 16
  int copy_bytes = 0;  // of the runs
  SliceRows key, value, key_scale, value_scale;
  PageRun runs[kMaxRuns];
};

// The most heads, at most 8, that divide the cache's and leave room for several slices in 227 KiB. row_bytes: of a row
// of K and one of V.
constexpr int heads_of_slice(int num_kv_heads, std::int64_t row_bytes) {
  const std::int64_t most_bytes = row_bytes > 512 ? 48 * 1024 : 64 * 1024;
  const std::int64_t fit = std::max<std::int64_t>(1, most_bytes / (kSliceSlots * std::max<std::int64_t>(row_bytes, 1)));
  int heads = static_cast<int>(std::min<std::int64_t>({num_kv_heads, 8, fit}));
  while (num_kv_heads % heads != 0) --heads;
  return heads;
}

namespace slices {

struct Region {
  const std::uint8_t* data;
  std::int64_t block, slot, head;  // strides
  std::int64_t bytes;              // of a row and what interleaves with it
};

// Says whether `other` interleaves with `region`; if it does, the region grows to cover both.
inline bool join(Region& region, const Region& other) {
  if (region.block != other.block || region.slot != other.slot || region.head != other.head) return false;
  const std::int64_t delta = other.data - region.data;
  if (delta < 0 || delta >= std::min(region.slot, region.head)) return false;
  region.bytes = std::max(region.bytes, delta + other.bytes);
  return true;
}

// Appends the runs of a region; false where it cannot be copied in runs of whole 16-byte vectors.
inline bool add_region(PageSlice& slice, const Region& region, int num_kv_heads, SliceRows& rows) {
  constexpr int kSlots = kSliceSlots;
  const int heads = slice.num_heads;
  const bool slots_inner = heads == 1 || region.slot <= region.head;
  const std::int64_t inner = slots_inner ? region.slot : region.head;
  const std::int64_t outer = slots_inner ? region.head : region.slot;
  const int num_inner = slots_inner ? kSlots : heads;
  const int num_outer = slots_inner ? heads : kSlots;
  if (inner < region.bytes || inner > 2 * region.bytes) return false;
  std::int64_t bytes = (num_inner - 1) * inner + region.bytes;
  bool whole = num_outer == 1;
  if (!whole && outer == num_inner * inner) {
    bytes += (num_outer - 1) * outer;
    whole = true;
  }
  const std::int64_t part = heads * region.head;
  const auto bits = reinterpret_cast<std::uintptr_t>(region.data) | static_cast<std::uintptr_t>(region.block) |
                    static_cast<std::uintptr_t>(kSlots * region.slot) | static_cast<std::uintptr_t>(bytes) |
                    static_cast<std::uintptr_t>(heads < num_kv_heads ? part : 0) |
                    static_cast<std::uintptr_t>(whole ? 0 : outer);
  constexpr std::int64_t kMost = 1 << 18;
  const int num_runs = whole ? 1 : num_outer;
  if (bits % 16 != 0 || bytes > kMost || kSlots * region.slot > INT32_MAX / 2 ||
      slice.num_runs + num_runs > PageSlice::kMaxRuns) {
    return false;
  }
  const int at = slice.bytes;
  for (int i = 0; i < num_runs; ++i) {
    slice.runs[slice.num_runs++] = {region.data + i * outer,
                                    region.block,
                                    part,
                                    static_cast<std::int32_t>(kSlots * region.slot),
                                    static_cast<std::int32_t>(bytes),
                                    static_cast<std::int32_t>(slice.bytes)};
    slice.bytes += static_cast<int>(bytes);
    slice.copy_bytes += static_cast<int>(bytes);
  }
  const auto outer_in_copy = static_cast<std::int32_t>(whole ? outer : bytes);
  rows = {at, slots_inner ? static_cast<std::int32_t>(inner) : outer_in_copy,
          slots_inner ? outer_in_copy : static_cast<std::int32_t>(inner)};
  return true;
}

}  // namespace slices

// Finds the slice of a cache, or nothing where its pages cannot be copied in runs. key_bytes and value_bytes are those
// of a row.
inline std::optional<PageSlice> page_slice(const PagedRows& key, std::int64_t key_bytes, const PagedRows& value,
                                           std::int64_t value_bytes, int num_kv_heads, std::int64_t block_size) {
  using slices::Region;
  if (block_size % kSliceSlots != 0) return std::nullopt;
  PageSlice slice;
  slice.num_heads = heads_of_slice(num_kv_heads, key_bytes + value_bytes);
  // One head's stride is anything.
  const auto head_stride = [&](std::int64_t stride, std::int64_t slot) { return num_kv_heads == 1 ? slot : stride; };
  struct Part {
    Region region;
    SliceRows* rows;
  } parts[4] = {};
  int num_parts = 0;
  // In order of their addresses, so that the first of those that interleave begins their region.
  const auto add = [&](const Region& region, SliceRows& rows) {
    int i = num_parts++;
    for (; i > 0 && parts[i - 1].region.data > region.data; --i) parts[i] = parts[i - 1];
    parts[i] = {region, &rows};
  };
  const auto add_side = [&](const PagedRows& side, std::int64_t bytes, SliceRows& rows, SliceRows& scale_rows) {
    add({side.data, side.block_stride, side.slot_stride, head_stride(side.head_stride, side.slot_stride), bytes}, rows);
    if (side.scales == nullptr) return;
    add({side.scales, side.scale_block_stride, side.scale_slot_stride,
         head_stride(side.scale_head_stride, side.scale_slot_stride), 4},
        scale_rows);
  };
  add_side(key, key_bytes, slice.key, slice.key_scale);
  add_side(value, value_bytes, slice.value, slice.value_scale);
  bool done[4] = {};
  for (int i = 0; i < num_parts; ++i) {
    if (done[i]) continue;
    Region region = parts[i].region;
    bool joined[4] = {};
    for (int j = i + 1; j < num_parts; ++j) {
      if (!done[j]) joined[j] = done[j] = slices::join(region, parts[j].region);
    }
    SliceRows& rows = *parts[i].rows;
    if (!slices::add_region(slice, region, num_kv_heads, rows)) return std::nullopt;
    for (int j = i + 1; j < num_parts; ++j) {
      if (!joined[j]) continue;
      *parts[j].rows = rows;
      parts[j].rows->at += static_cast<std::int32_t>(parts[j].region.data - parts[i].region.data);
    }
  }
  return slice;
}

}  // namespace quire::attention
