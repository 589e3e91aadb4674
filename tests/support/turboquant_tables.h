// The tables that vLLM passes to TurboQuant's entry points, row-major, computed in double precision.
#pragma once

#include <bit>
#include <cmath>
#include <vector>

#include "format/codebook.h"

namespace quire::testing {

// The rotation [head_size, head_size]: it has Hadamard matrices over sqrt(block) on the diagonal, where block is the
// largest power of two that divides head_size.
inline std::vector<float> rotation_table(int head_size) {
  const int block = head_size & -head_size;
  std::vector<float> matrix;
  for (int i = 0; i < head_size; ++i) {
    for (int j = 0; j < head_size; ++j) {
      const bool negative = std::popcount(static_cast<unsigned>(i & j & (block - 1))) % 2 != 0;
      const double unit = (negative ? -1.0 : 1.0) / std::sqrt(static_cast<double>(block));
      matrix.push_back(i / block == j / block ? static_cast<float>(unit) : 0.0F);
    }
  }
  return matrix;
}

// The 2^bits centroids of N(0, 1 / head_size), bits 3 or 4.
inline std::vector<float> centroid_table(int bits, int head_size) {
  const auto sigma = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_size)));
  std::vector<float> centroids;
  for (int code = 0; code < 1 << bits; ++code) {
    centroids.push_back(sigma * (bits == 3 ? format::centroid<3>(code) : format::centroid<4>(code)));
  }
  return centroids;
}

// The means of neighbouring centroids.
inline std::vector<float> midpoint_table(int bits, int head_size) {
  const std::vector<float> centroids = centroid_table(bits, head_size);
  std::vector<float> midpoints;
  for (std::size_t i = 1; i < centroids.size(); ++i) midpoints.push_back((centroids[i - 1] + centroids[i]) / 2);
  return midpoints;
}

}  // namespace quire::testing
