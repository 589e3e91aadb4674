// When a slice is copied run by run, every row is where its description says.
#include "attention/page_slices.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

namespace quire::attention {
namespace {

struct Cache {
  std::vector<std::uint8_t> bytes;
  PagedRows key, value;

  explicit Cache(std::size_t size) : bytes(size + 16) {
    std::uint32_t x = 1;
    for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>((x = x * 1664525U + 1013904223U) >> 24);
  }
  // 16-byte aligned.
  std::uint8_t* at(std::int64_t offset) {
    const auto address = reinterpret_cast<std::uintptr_t>(bytes.data());
    return bytes.data() + (16 - address % 16) % 16 + offset;
  }
};

// Checks every slice of `blocks` blocks against the strides.
void check(const Cache& cache, std::int64_t key_bytes, std::int64_t value_bytes, int num_kv_heads, int block_size,
           int blocks, int expected_runs) {
  const auto slice = page_slice(cache.key, key_bytes, cache.value, value_bytes, num_kv_heads, block_size);
  ASSERT_TRUE(slice.has_value());
  EXPECT_EQ(slice->num_runs, expected_runs);
  EXPECT_EQ(slice->bytes % 16, 0);
  for (int block = 0; block < blocks; ++block) {
    for (int first = 0; first < block_size; first += kSliceSlots) {
      for (int part = 0; part < num_kv_heads / slice->num_heads; ++part) {
        std::vector<std::uint8_t> copy(static_cast<std::size_t>(slice->bytes), 0);
        for (int r = 0; r < slice->num_runs; ++r) {
          const PageRun& run = slice->runs[r];
          const std::uint8_t* from = run.data + block * run.block_stride + part * run.part_stride +
                                     static_cast<std::int64_t>(first / kSliceSlots) * run.slice_stride;
          EXPECT_EQ(reinterpret_cast<std::uintptr_t>(from) % 16, 0U);
          EXPECT_EQ(run.bytes % 16, 0);
          EXPECT_EQ(run.at % 16, 0);
          std::memcpy(copy.data() + run.at, from, static_cast<std::size_t>(run.bytes));
        }
        const auto compare = [&](const SliceRows& rows, const std::uint8_t* row, int slot, int head,
                                 std::int64_t size) {
          const std::uint8_t* found = copy.data() + rows.at + slot * rows.slot_stride + head * rows.head_stride;
          EXPECT_EQ(std::memcmp(found, row, static_cast<std::size_t>(size)), 0)
              << "block " << block << " slot " << first + slot << " head " << head << " of part " << part;
        };
        for (int slot = 0; slot < kSliceSlots; ++slot) {
          for (int h = 0; h < slice->num_heads; ++h) {
            const int head = part * slice->num_heads + h;
            compare(slice->key, cache.key.row(block, first + slot, head), slot, h, key_bytes);
            compare(slice->value, cache.value.row(block, first + slot, head), slot, h, value_bytes);
            if (cache.key.scales != nullptr) {
              compare(slice->key_scale, cache.key.scale(block, first + slot, head), slot, h, 4);
            }
            if (cache.value.scales != nullptr) {
              compare(slice->value_scale, cache.value.scale(block, first + slot, head), slot, h, 4);
            }
          }
        }
      }
    }
  }
}

void set(PagedRows& rows, std::uint8_t* data, std::int64_t block, std::int64_t slot, std::int64_t head) {
  rows.data = data;
  rows.block_stride = block;
  rows.slot_stride = slot;
  rows.head_stride = head;
}
void set_scales(PagedRows& rows, std::uint8_t* data, std::int64_t block, std::int64_t slot, std::int64_t head) {
  rows.scales = data;
  rows.scale_block_stride = block;
  rows.scale_slot_stride = slot;
  rows.scale_head_stride = head;
}

TEST(PageSlices, SeparateCaches) {
  for (const int block_size : {16, 32}) {
    for (const bool head_major : {false, true}) {
      constexpr int kHeads = 8, kRow = 64, kBlocks = 3;
      const std::int64_t page = block_size * kHeads * kRow;
      const std::int64_t scales = block_size * kHeads * 4;
      Cache cache(static_cast<std::size_t>(kBlocks * 2 * (page + scales)));
      const std::int64_t slot = head_major ? kRow : kHeads * kRow;
      const std::int64_t head = head_major ? block_size * kRow : kRow;
      set(cache.key, cache.at(0), page, slot, head);
      set(cache.value, cache.at(kBlocks * page), page, slot, head);
      set_scales(cache.key, cache.at(kBlocks * 2 * page), scales, kHeads * 4, 4);
      set_scales(cache.value, cache.at(kBlocks * (2 * page + scales)), scales, kHeads * 4, 4);
      // Heads are copied one by one only where the slots of a head are more than a slice.
      check(cache, kRow, kRow, kHeads, block_size, kBlocks,
            head_major && block_size > kSliceSlots ? 2 * kHeads + 2 : 4);
    }
  }
}

TEST(PageSlices, MoreHeadsThanASliceHas) {
  constexpr int kHeads = 12, kRow = 64, kSlots = 16;
  Cache cache(2 * 2 * kSlots * kHeads * kRow);
  set(cache.key, cache.at(0), 2 * kSlots * kHeads * kRow, kHeads * kRow, kRow);
  set(cache.value, cache.at(kSlots * kHeads * kRow), 2 * kSlots * kHeads * kRow, kHeads * kRow, kRow);
  check(cache, kRow, kRow, kHeads, kSlots, 2, 2 * kSlots);  // six heads of a slot at a time
}

TEST(PageSlices, RowsThatInterleaveAreOneRun) {
  // vLLM's page: codes and scale of K, codes and scale of V, for each slot and head.
  constexpr int kHeads = 4, kRow = 64, kSlots = 16, kBoth = 2 * (kRow + 4), kLayers = 3;
  constexpr std::int64_t kPage = kSlots * kHeads * kBoth;
  for (const bool head_major : {false, true}) {
    Cache cache(static_cast<std::size_t>(2 * kLayers * kPage));
    const std::int64_t slot = head_major ? kBoth : kHeads * kBoth;
    const std::int64_t head = head_major ? kSlots * kBoth : kBoth;
    std::uint8_t* base = cache.at(kPage);  // the middle layer
    set(cache.key, base, kLayers * kPage, slot, head);
    set(cache.value, base + kRow + 4, kLayers * kPage, slot, head);
    set_scales(cache.key, base + kRow, kLayers * kPage, slot, head);
    set_scales(cache.value, base + 2 * kRow + 4, kLayers * kPage, slot, head);
    check(cache, kRow, kRow, kHeads, kSlots, 2, 1);
  }
}

TEST(PageSlices, SlotsOfTwoByteAlignment) {
  constexpr int kHeads = 8, kKey = 66, kValue = 68, kSlots = 16;
  Cache cache(2 * kSlots * kHeads * (kKey + kValue));
  const std::int64_t slot = kHeads * (kKey + kValue);
  set(cache.key, cache.at(0), kSlots * slot, slot, kKey + kValue);
  set(cache.value, cache.at(kKey), kSlots * slot, slot, kKey + kValue);
  check(cache, kKey, kValue, kHeads, kSlots, 2, 1);
}

TEST(PageSlices, WhatIsNoRunOfWholeVectors) {
  constexpr int kHeads = 2, kRow = 64, kSlots = 16;
  Cache cache(8 * kSlots * kHeads * kRow);
  const auto described = [&](int num_kv_heads, int block_size) {
    return page_slice(cache.key, kRow, cache.value, kRow, num_kv_heads, block_size).has_value();
  };
  const auto dense = [&] {
    set(cache.key, cache.at(0), kSlots * kHeads * kRow, kHeads * kRow, kRow);
    set(cache.value, cache.at(4 * kSlots * kHeads * kRow), kSlots * kHeads * kRow, kHeads * kRow, kRow);
  };
  dense();
  EXPECT_TRUE(described(kHeads, kSlots));
  EXPECT_FALSE(described(kHeads, 24));  // no whole number of slices
  cache.key.data = cache.at(4);         // not aligned
  EXPECT_FALSE(described(kHeads, kSlots));
  dense();
  cache.value.block_stride += 8;
  EXPECT_FALSE(described(kHeads, kSlots));
  dense();
  cache.key.head_stride = 3 * kRow;  // most of a run would be others' bytes
  cache.key.slot_stride = 6 * kRow;
  EXPECT_FALSE(described(kHeads, kSlots));
}

}  // namespace
}  // namespace quire::attention
