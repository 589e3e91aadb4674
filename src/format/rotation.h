// Walsh-Hadamard rotations of a row, fp32, in place.
//
//   H  : the unnormalized Walsh-Hadamard matrix in Sylvester order, H * H = b * I. For a head size that is not a power
//        of two H is block-diagonal with blocks of b, the largest power of two that divides it.
//   RHT: H * (s .* x), s the sign vector below: its first b signs, again in every block.
//
// The stages run h = 1, 2, 4 up to b/2, pair (j, j + h) -> (a + b, a - b): a fixed tree, so a loop, SIMD lanes and the
// lanes of a warp give the same bits.
#pragma once

#include <cstdint>

#include "format/exact.h"

namespace quire::format {

inline constexpr int kMaxHeadSize = 512;
inline constexpr int kMinHeadSize = 32;

// The largest power of two that divides head_size.
QUIRE_HD constexpr int rotation_block(int head_size) { return head_size & -head_size; }

// The signs of elements 32 * word to 32 * word + 31 of a row rotated in blocks of `block`: element i is negated where
// bit i % 32 is set. They are the first `block` outputs of MT19937 seeded with 0x9E3779B9, +1 where the low 24 bits are
// below 2^23, repeated. tests/format/rotation_test.cc derives the table again with std::mt19937.
QUIRE_HD constexpr std::uint32_t rht_sign_word(int word, int block) {
  constexpr std::uint32_t words[kMaxHeadSize / 32] = {
      0x9a8ca6f2U, 0x7f7fca4eU, 0x59bbc293U, 0x9480abc7U, 0xb55b747eU, 0x54503bbeU, 0xcdf467b7U, 0x05dfbc5fU,
      0xb291e3ccU, 0x57563834U, 0xe46ae225U, 0x67fc4ca6U, 0xcfc78691U, 0x32d9dff1U, 0x365fdb89U, 0x75625346U,
  };
  if (block >= 32) return words[word % (block / 32)];
  std::uint32_t signs = words[0] & ((1U << block) - 1U);
  for (int filled = block; filled < 32; filled *= 2) signs |= signs << filled;
  return signs;
}

// x with its sign flipped where bit `bit` of `word` is set.
QUIRE_HD float apply_sign(float x, std::uint32_t word, int bit) {
  return exact::from_bits(exact::bits_of(x) ^ (((word >> bit) & 1U) << 31));
}

}  // namespace quire::format
