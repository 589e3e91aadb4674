// Where a lane's accumulator elements stand in a tile of logits or outputs, for m16n8k16 and wgmma alike. The tile has
// query rows on one side and keys (of logits) or columns (of outputs) on the other; x[m][t][i] is element i of the
// fragment of row tile m and key tile t.
//
//   quad = lane / 4, pair = lane % 4 * 2
//
//                 x[m][t][i] is row                     and key                      lanes that share a row
//   RowsOnM       16 m + 8 (i / 2) + quad               8 t + pair + i % 2           4: the same quad
//   KeysOnM       8 m + pair + i % 2                    16 t + 8 (i / 2) + quad      8: the same pair
//
// RowsOnM is Q K^T and P V as they are written. KeysOnM is K Q^T and V^T P^T: the keys fill the tensor cores' 16 rows,
// which pays where there are at most 8 query rows.
//
// In both a lane has two rows a row tile and two keys a key tile.
#pragma once

#include <cuda_runtime.h>

#include "cuda/lane/map.cuh"

namespace quire::cuda {

struct RowsOnM {
  static constexpr int kTileRows = 16;
  static constexpr int kTileKeys = 8;
  int quad, pair;

  __device__ __forceinline__ explicit RowsOnM(int lane) : quad(lane / 4), pair(lane % 4 * 2) {}
  // Which of the lane's two rows and of its two keys element i belongs to.
  static __device__ constexpr int row_of(int i) { return i / 2; }
  static __device__ constexpr int key_of(int i) { return i % 2; }
  __device__ __forceinline__ int row(int m, int r) const { return 16 * m + 8 * r + quad; }
  __device__ __forceinline__ int key(int t, int k) const { return 8 * t + pair + k; }
  // What some array of the tile's keys holds for the two keys of key tile t.
  __device__ __forceinline__ float2 of_keys(const float* keys, int t) const {
    return *reinterpret_cast<const float2*>(&keys[8 * t + pair]);
  }
  // The first of the lanes that share a row.
  __device__ __forceinline__ bool leads() const { return pair == 0; }
  // Merges a value of each lane over those that share its row.
  template <class Merge>
  static __device__ __forceinline__ float over_row(float x, Merge&& merge) {
    x = merge(x, __shfl_xor_sync(kFullWarp, x, 1));
    return merge(x, __shfl_xor_sync(kFullWarp, x, 2));
  }
};

struct KeysOnM {
  static constexpr int kTileRows = 8;
  static constexpr int kTileKeys = 16;
  int quad, pair;

  __device__ __forceinline__ explicit KeysOnM(int lane) : quad(lane / 4), pair(lane % 4 * 2) {}
  static __device__ constexpr int row_of(int i) { return i % 2; }
  static __device__ constexpr int key_of(int i) { return i / 2; }
  __device__ __forceinline__ int row(int m, int r) const { return 8 * m + pair + r; }
  __device__ __forceinline__ int key(int t, int k) const { return 16 * t + 8 * k + quad; }
  __device__ __forceinline__ float2 of_keys(const float* keys, int t) const {
    return make_float2(keys[16 * t + quad], keys[16 * t + 8 + quad]);
  }
  __device__ __forceinline__ bool leads() const { return quad == 0; }
  template <class Merge>
  static __device__ __forceinline__ float over_row(float x, Merge&& merge) {
    x = merge(x, __shfl_xor_sync(kFullWarp, x, 4));
    x = merge(x, __shfl_xor_sync(kFullWarp, x, 8));
    return merge(x, __shfl_xor_sync(kFullWarp, x, 16));
  }
};

}  // namespace quire::cuda
