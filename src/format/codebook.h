// Lloyd-Max codebooks of a unit Gaussian: 2^bits centroids, symmetric about 0, listed for the positive half. A format
// for N(0, sigma^2) scales them by sigma. docs/formats/turboquant.md says how they were solved;
// tests/format/codebook_test.cc solves them again.
#pragma once

#include <cstdint>

#include "format/exact.h"

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

// Gives the point halfway between the centroids of `code` - 1 and of `code`.
template <int kBits>
QUIRE_HD constexpr float lower_midpoint(int code) {
  return 0.5F * (centroid<kBits>(code - 1) + centroid<kBits>(code));
}

// Finds the code of the nearest centroid by counting the midpoints of neighbours that are <= y. A NaN gives 0.
template <int kBits>
QUIRE_HD std::uint32_t nearest_centroid(float y) {
  std::uint32_t code = 0;
  for (int i = 1; i < 2 * Codebook<kBits>::kHalf; ++i) code += y >= lower_midpoint<kBits>(i) ? 1U : 0U;
  return code;
}

}  // namespace quire::format
