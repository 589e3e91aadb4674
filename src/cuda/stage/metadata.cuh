// The metadata of rows: (scale, offset) of a row in global or in shared memory.
#pragma once

#include <cstdint>

#include "cuda/attention_params.h"
#include "cuda/format/fragment.cuh"
#include "cuda/lane/bytes.cuh"
#include "format/format.h"

namespace quire::cuda {

template <class F>
inline constexpr bool kHasScaleCache = F::kMetaPlace == format::MetaPlace::kScaleCache;
template <class F>
inline constexpr bool kHasMeta = F::kMetaBytes > 0;

// The metadata of one row in global memory, loaded with one access where it lies in a scale cache.
template <format::Format F>
__device__ __forceinline__ format::Affine load_affine(const CacheSide& side, std::int64_t block, std::int64_t slot,
                                                      int head, format::RowShape shape) {
  alignas(16) std::uint8_t meta[kHasMeta<F> ? F::kMetaBytes : 1] = {};
  if constexpr (kHasScaleCache<F>) {
    load_bytes(side.scale(block, slot, head), meta, F::kMetaBytes, 4);
  } else if constexpr (F::kMetaPlace == format::MetaPlace::kInRow) {
    load_bytes(side.row(block, slot, head) + format::code_bytes<F>(shape.head_size), meta, F::kMetaBytes,
               side.access < 2 ? side.access : 2);
  }
  return F::read_meta(meta, shape);
}

// The metadata of a raw row in shared memory; `scale` is its copy from a scale cache.
template <class F>
__device__ __forceinline__ format::Affine raw_affine(const float* scale, const std::uint8_t* row, int head_size) {
  const auto* meta =
      kHasScaleCache<F> ? reinterpret_cast<const std::uint8_t*>(scale) : row + format::code_bytes<F>(head_size);
  return F::read_meta(meta, format::row_shape(head_size));
}

// What 16-bit levels mean, given the row's metadata and, for a kLevelNorm format, the sum of the levels' squares. A
// key's unit is part of the logit's factor, a value's of its scale; the norm of levels in units contains the unit
// already.
template <class F, bool kIsKey>
__device__ __forceinline__ format::Affine affine_of_levels(format::Affine affine, float squares) {
  if constexpr (F::kLevelNorm) {
    affine.scale *= rsqrtf(squares);
  } else if constexpr (!kIsKey) {
    affine.scale /= level_unit<F>;
  }
  return affine;
}

// Both of the above.
template <class F, bool kIsKey>
__device__ __forceinline__ format::Affine staged_affine(const float* scale, const std::uint8_t* row, int head_size,
                                                        float squares) {
  return affine_of_levels<F, kIsKey>(raw_affine<F>(scale, row, head_size), squares);
}

}  // namespace quire::cuda
