// Where a token is stored: the way from its number through the slot mapping to a block and an offset.
#pragma once

#include <cstdint>

#include "cuda/store_params.h"

namespace quire::cuda {

// Where a token goes. It is not stored where its slot is negative or outside of the cache.
struct SlotAddress {
  std::int64_t block = 0, offset = 0;
  bool stored = false;
};

__device__ __forceinline__ std::int64_t load_slot(const StoreParams& p, std::int64_t token) {
  const std::uint8_t* at = p.slot_mapping + token * p.slot_mapping_stride;
  return p.slots_are_int64 ? *reinterpret_cast<const std::int64_t*>(at) : *reinterpret_cast<const std::int32_t*>(at);
}

__device__ __forceinline__ SlotAddress find_slot(const StoreParams& p, std::int64_t slot, bool fits_31_bits,
                                                 bool counts_errors) {
  SlotAddress address;
  if (slot < 0) return address;
  if (slot >= p.num_slots) {
    if (counts_errors && p.error_counter != nullptr) atomicAdd(p.error_counter, 1ULL);
    return address;
  }
  if (fits_31_bits) {
    const std::uint32_t block = p.block.quotient(static_cast<std::uint32_t>(slot));
    address.block = block;
    address.offset = static_cast<std::uint32_t>(slot) - block * p.block.divisor;
  } else {
    address.block = slot / p.block_size;
    address.offset = slot - address.block * p.block_size;
  }
  address.stored = true;
  return address;
}

}  // namespace quire::cuda
