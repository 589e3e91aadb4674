// Lloyd-Max codebooks of a unit Gaussian: 2^bits centroids, symmetric about 0, listed for the positive half. A format
// for N(0, sigma^2) scales them by sigma. docs/formats/turboquant.md says how they were solved;
// tests/format/codebook_test.cc solves them again.
#pragma once

#include <cstdint>

#include "format/exact.h"
#include "format/lane.h"

namespace quire::format {

template <int kBits>
struct Codebook;

template <>
struct Codebook<3> {
  static constexpr int kHalf = 4;
  static QUIRE_HD constexpr float positive(int i) {
    constexpr float table[kHalf] = {0.244983592F, 0.755645499F, 1.34318F, 2.15034954F};
    return table[i];
  }
};

template <>
struct Codebook<4> {
  static constexpr int kHalf = 8;
  static QUIRE_HD constexpr float positive(int i) {
    constexpr float table[kHalf] = {0.128427661F, 0.388137791F, 0.656879919F, 0.942448243F,
                                    1.25625757F,  1.61788176F,  2.06844712F,  2.73092222F};
    return table[i];
  }
};

// Codes ascend with the centroid: 0 is the most negative, kHalf the smallest positive one.
template <int kBits>
QUIRE_HD constexpr float centroid(int code) {
  using Book = Codebook<kBits>;
  return code >= Book::kHalf ? Book::positive(code - Book::kHalf) : -Book::positive(Book::kHalf - 1 - code);
}

// Between the centroids of `code` - 1 and `code`.
template <int kBits>
QUIRE_HD constexpr float lower_midpoint(int code) {
  return 0.5F * (centroid<kBits>(code - 1) + centroid<kBits>(code));
}

// How many midpoints of neighbouring centroids are <= y. NaN gives 0.
template <int kBits>
QUIRE_HD std::uint32_t nearest_centroid(float y) {
  std::uint32_t code = 0;
  for (int i = 1; i < 2 * Codebook<kBits>::kHalf; ++i) code += y >= lower_midpoint<kBits>(i) ? 1U : 0U;
  return code;
}

#ifdef __CUDACC__
// The same by a table: a uniform grid so fine that a cell holds one midpoint at most. The code of a y in cell k is the
// number of midpoints before the cell, one more from the cell's own midpoint on. Which cell takes a y near a border is
// up to rounding, and it does not matter: no midpoint lies near one.
template <int kBits>
struct CentroidGrid {
  static constexpr int kCells = 31;             // around 0; the outer two reach to infinity
  static constexpr float kReach = 30 * 0.225F;  // between the centres of the outer two

  struct Cell {
    float minus_midpoint;  // y + minus_midpoint is negative, and not -0, exactly where y is below the midpoint
    std::uint32_t before;
  };
  Cell cells[32] = {};

  constexpr CentroidGrid() {
    for (int k = 0; k < 32; ++k) {
      const float centre = (static_cast<float>(k) - 15.0F) * (kReach / 30);
      cells[k] = {-1e30F, 0};  // no midpoint: every y is below
      for (int i = 1; i < 2 * Codebook<kBits>::kHalf; ++i) {
        const float midpoint = lower_midpoint<kBits>(i);
        const float distance = (midpoint - centre) / (kReach / 30);
        if (distance <= -0.5F) ++cells[k].before;
        if (distance > -0.5F && distance < 0.5F) cells[k].minus_midpoint = midpoint == 0.0F ? 0.0F : -midpoint;
      }
    }
  }
  // The midpoints in order, one a cell, none near a border.
  constexpr bool holds() const {
    for (int i = 1; i < 2 * Codebook<kBits>::kHalf; ++i) {
      const float place = lower_midpoint<kBits>(i) / (kReach / 30) + 15.0F;
      const int k = static_cast<int>(place + 0.5F);
      const float distance = place - static_cast<float>(k);
      if (k < 1 || k > 29 || distance < -0.49F || distance > 0.49F) return false;
      if (cells[k].minus_midpoint != -lower_midpoint<kBits>(i)) return false;
      if (cells[k].before != static_cast<std::uint32_t>(i - 1)) return false;
    }
    return true;
  }
};

template <int kBits>
__device__ const CentroidGrid<kBits> centroid_grid;

// nearest_centroid of many y, none of them NaN or beyond 1e29. The lanes of a warp hold the grid, a cell each, and look
// up one another's.
template <int kBits, int kN>
__device__ __forceinline__ void nearest_centroids(const float (&y)[kN], std::uint32_t (&codes)[kN]) {
  using Grid = CentroidGrid<kBits>;
  static_assert(Grid().holds());
  const typename Grid::Cell own = centroid_grid<kBits>.cells[lane::index()];
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    const float place = exact::fma_saturate(y[j], 1.0F / Grid::kReach, 0.5F);
    // 2^23 + k has k in its low bits, which are all that a shuffle reads of a lane's number.
    const std::uint32_t cell = exact::bits_of(__fmaf_rn(place, 30.0F, 8388608.0F));
    const float below = y[j] + __shfl_sync(~0U, own.minus_midpoint, static_cast<int>(cell));
    const std::uint32_t before = __shfl_sync(~0U, own.before, static_cast<int>(cell));
    codes[j] = before + 1 - (exact::bits_of(below) >> 31);
  }
}
#endif

}  // namespace quire::format
