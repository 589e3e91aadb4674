// TurboQuant's keys and values of 3 and 4 bits on CUDA. Its fp8 keys are in fp8.cuh.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/format/fragment.cuh"
#include "cuda/format/nibbles.cuh"
#include "cuda/format/operand.cuh"
#include "cuda/format/pack.cuh"
#include "cuda/lane/map.cuh"
#include "format/turboquant.h"

namespace quire::cuda {

// ---- codes to levels ------------------------------------------------------------------------------------------------

// The largest relative errors are 2.5e-5 (3 bits) and 7.4e-5 (4 bits), against 3e-4 without a unit.
template <>
inline constexpr float level_unit<format::TurboQuantK3> = 1.260678F;
template <>
inline constexpr float level_unit<format::TurboQuantK4> = 1.7335825F;

template <>
struct Fragment<format::TurboQuantV4> : LevelsNibble {};

// Spreads eight 3-bit codes, the low 24 bits, to eight nibbles.
__device__ __forceinline__ std::uint32_t spread_3_to_4(std::uint32_t codes) {
  std::uint32_t x = (codes & 0xfffU) | ((codes & 0xfff000U) << 4);
  x = (x & 0x003f003fU) | ((x & 0x0fc00fc0U) << 2);
  return (x & 0x07070707U) | ((x & 0x38383838U) << 1);
}

// The 24 bits of eight codes: those of group `group` among the three words that 32 elements have.
__device__ __forceinline__ std::uint32_t three_bytes(const std::uint32_t (&words)[3], int group) {
  switch (group) {
    case 0:
      return words[0];
    case 1:
      return __funnelshift_r(words[0], words[1], 24);
    case 2:
      return __funnelshift_r(words[1], words[2], 16);
    default:
      return words[2] >> 8;
  }
}

template <>
struct Fragment<format::TurboQuantK3> {
  static constexpr int kElements = 32;
  static constexpr int kWords = 3;
  static __device__ __forceinline__ void convert(const std::uint32_t (&words)[kWords], std::uint32_t (&pairs)[16]) {
    constexpr ByteTables kTables = ByteTables::make(
        [](int code) { return constant_half(format::centroid<3>(code) * level_unit<format::TurboQuantK3>); }, 8);
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const std::uint32_t nibbles = spread_3_to_4(three_bytes(words, g));
      kTables.look_up(nibbles, pairs + 4 * g);
      kTables.look_up(nibbles >> 16, pairs + 4 * g + 2);
    }
  }
};

template <>
struct Fragment<format::TurboQuantV3> {
  static constexpr int kElements = 32;
  static constexpr int kWords = 3;
  static __device__ __forceinline__ void convert(const std::uint32_t (&words)[kWords], std::uint32_t (&pairs)[16]) {
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      nibbles_to_pairs(spread_3_to_4(three_bytes(words, g)), 0x64046404U, pairs + 4 * g);  // level = code - 4
    }
  }
};

// The sixteen centroids are symmetric, so the magnitude is looked up and the sign is set apart.
template <>
struct Fragment<format::TurboQuantK4> {
  static constexpr int kElements = 32;
  static constexpr int kWords = 4;
  static __device__ __forceinline__ void convert(const std::uint32_t (&words)[kWords], std::uint32_t (&pairs)[16]) {
    constexpr ByteTables kTables = ByteTables::make(
        [](int i) { return constant_half(format::Codebook<4>::positive(i) * level_unit<format::TurboQuantK4>); }, 8);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      // Codes below 8 are negative, and their magnitudes grow as the codes fall.
      const std::uint32_t negative = ~words[w] & 0x88888888U;
      const std::uint32_t magnitude = (words[w] ^ ((negative >> 3) * 7U)) & 0x77777777U;
      kTables.look_up(magnitude, pairs + 4 * w);
      kTables.look_up(magnitude >> 16, pairs + 4 * w + 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::uint32_t signs = negative >> (8 * i);
        pairs[4 * w + i] ^= ((signs & 0x8U) << 12) | ((signs & 0x80U) << 24);
      }
    }
  }
};

// Values of 3 bits: three codes of each of two tokens at a time are moved to the low 9 bits of a half and stay there,
// where they are 1, 8 and 64 times as large.
template <>
struct ValueOperand<format::TurboQuantV3> {
  static constexpr int kPlanes = 1;
  static constexpr float kBias = 0.0F, kScale = 0x1p24F;
  static constexpr int kCenter = 4;
  static constexpr float plane(int) { return 1.0F; }
  static constexpr float weight(int n) { return static_cast<float>(1 << (3 * (n % 3))); }
  // The bits of a piece from bit `first` on.
  template <int kWords>
  static __device__ __forceinline__ std::uint32_t bits_from(const std::uint32_t (&words)[kWords], int first) {
    const int w = first / 32;
    if (first % 32 == 0) return words[w];
    return w + 1 < kWords && first % 32 > 23 ? __funnelshift_r(words[w], words[w + 1], first % 32)
                                             : words[w] >> (first % 32);
  }
  template <int kElements, int kWords>
  static __device__ __forceinline__ void convert(const std::uint32_t (&a)[kWords], const std::uint32_t (&b)[kWords],
                                                 std::uint32_t (&values)[1][kElements]) {
    std::uint32_t both = 0;
#pragma unroll
    for (int n = 0; n < kElements; ++n) {
      if (n % 3 == 0) both = ptx::permute(bits_from(a, 3 * n), bits_from(b, 3 * n), 0x5410U);
      values[0][n] = both & (0x00070007U << (3 * (n % 3)));
    }
  }
};
template <>
struct ValueOperand<format::TurboQuantV4> : ValuesNibble {};

// The levels of two neighbouring codes, indexed by the bits of both.
template <class F, int kBits>
struct KeyPairs {
  std::uint32_t pairs[1 << (2 * kBits)] = {};
  constexpr KeyPairs() {
    for (int codes = 0; codes < 1 << (2 * kBits); ++codes) {
      pairs[codes] = constant_half(format::centroid<kBits>(codes % (1 << kBits)) * level_unit<F>) |
                     constant_half(format::centroid<kBits>(codes >> kBits) * level_unit<F>) << 16;
    }
  }
};
template <class F, int kBits>
__device__ const KeyPairs<F, kBits> key_pairs;

// Keys: two neighbouring codes at a time are looked up in a table of pairs. Every lane has its own copy of the table,
// so that no two lanes meet in a bank.
template <class F, int kBits>
struct KeyPairTable {
  static constexpr int kPlanes = 1;
  static constexpr float kBias = 0.0F;
  static constexpr int kTableBytes = 128 << (2 * kBits);
  static constexpr float plane(int) { return 1.0F / level_unit<F>; }
  static constexpr int element(int pair, int half) { return 2 * pair + half; }
  static constexpr float weight(int) { return 1.0F; }
  static __device__ __forceinline__ void fill(std::uint8_t* table, int thread, int num_threads) {
#pragma unroll 8
    for (int i = thread; i < 32 << (2 * kBits); i += num_threads) {
      reinterpret_cast<std::uint32_t*>(table)[i] = key_pairs<F, kBits>.pairs[i / 32];
    }
  }
  // `lane4` is 4 times the lane, the bytes into an entry at which the lane's copy lies.
  template <int kElements, int kWords>
  static __device__ __forceinline__ void convert(const std::uint32_t (&words)[kWords], const std::uint8_t* table,
                                                 std::uint32_t lane4, std::uint32_t (&pairs)[1][kElements / 2]) {
    constexpr std::uint32_t kMask = ((1U << (2 * kBits)) - 1) << 7;
#pragma unroll
    for (int i = 0; i < kElements / 2; ++i) {
      const int first = 2 * kBits * i;
      const int w = first / 32;
      const int shift = first % 32 - 7;
      std::uint32_t at = 0;
      if (first % 32 + 2 * kBits > 32 && w + 1 < kWords) {
        at = __funnelshift_r(words[w], words[w + 1], shift);
      } else {
        at = shift >= 0 ? words[w] >> shift : words[w] << -shift;
      }
      pairs[0][i] = *reinterpret_cast<const std::uint32_t*>(table + ptx::and_or(at, kMask, lane4));
    }
  }
};
template <>
struct KeyOperand<format::TurboQuantK3> : KeyPairTable<format::TurboQuantK3, 3> {};
template <>
struct KeyOperand<format::TurboQuantK4> : KeyPairTable<format::TurboQuantK4, 4> {};

// ---- elements to codes ----------------------------------------------------------------------------------------------

// nearest_centroid by a table: a uniform grid that is so fine that a cell holds one midpoint at most. The code of a y
// in cell k is the number of midpoints before the cell, plus one from the cell's own midpoint on. Rounding decides
// which cell takes a y near a border; that does not matter, since no midpoint lies near one.
template <int kBits>
struct CentroidGrid {
  static constexpr int kCells = 31;             // cells around 0; the outer two reach to infinity
  static constexpr float kReach = 30 * 0.225F;  // the distance between the centres of the outer two cells

  struct Cell {
    float minus_midpoint;  // y + minus_midpoint is negative, and not -0, exactly where y is below the midpoint
    std::uint32_t before;
  };
  Cell cells[32] = {};

  constexpr CentroidGrid() {
    for (int k = 0; k < 32; ++k) {
      const float centre = (static_cast<float>(k) - 15.0F) * (kReach / 30);
      cells[k] = {-1e30F, 0};  // a cell without a midpoint, which every y is below
      for (int i = 1; i < 2 * format::Codebook<kBits>::kHalf; ++i) {
        const float midpoint = format::lower_midpoint<kBits>(i);
        const float distance = (midpoint - centre) / (kReach / 30);
        if (distance <= -0.5F) ++cells[k].before;
        if (distance > -0.5F && distance < 0.5F) cells[k].minus_midpoint = midpoint == 0.0F ? 0.0F : -midpoint;
      }
    }
  }
  // Whether the midpoints are in order, at most one a cell, and none near a border.
  constexpr bool holds() const {
    for (int i = 1; i < 2 * format::Codebook<kBits>::kHalf; ++i) {
      const float place = format::lower_midpoint<kBits>(i) / (kReach / 30) + 15.0F;
      const int k = static_cast<int>(place + 0.5F);
      const float distance = place - static_cast<float>(k);
      if (k < 1 || k > 29 || distance < -0.49F || distance > 0.49F) return false;
      if (cells[k].minus_midpoint != -format::lower_midpoint<kBits>(i)) return false;
      if (cells[k].before != static_cast<std::uint32_t>(i - 1)) return false;
    }
    return true;
  }
};

template <int kBits>
__device__ const CentroidGrid<kBits> centroid_grid;

// nearest_centroid of many y, none of which is NaN or beyond 1e29. The lanes of a warp hold one cell of the grid each
// and look up one another's.
template <int kBits, int kN>
__device__ __forceinline__ void nearest_centroids(const float (&y)[kN], std::uint32_t (&codes)[kN]) {
  using Grid = CentroidGrid<kBits>;
  static_assert(Grid().holds());
  const typename Grid::Cell own = centroid_grid<kBits>.cells[lane_index()];
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    const float place = ptx::fma_saturate(y[j], 1.0F / Grid::kReach, 0.5F);
    // The low bits of the float 2^23 + k are k, and a shuffle reads no other bits of a lane's number.
    const std::uint32_t cell = exact::bits_of(__fmaf_rn(place, 30.0F, 8388608.0F));
    const float below = y[j] + __shfl_sync(~0U, own.minus_midpoint, static_cast<int>(cell));
    const std::uint32_t before = __shfl_sync(~0U, own.before, static_cast<int>(cell));
    codes[j] = before + 1 - (exact::bits_of(below) >> 31);
  }
}

// Packs codes of kBits into bytes. A code may have the exponent of a float above it; kThirdBias, added to the third of
// eight codes, takes away what the exponents leave in the bytes.
template <int kBits>
struct CodePacker;

template <>
struct CodePacker<4> {
  // Eight words that have the exponent of 2^23, shifted by 0, 4, 8 and so on up to 28 bits, add 0xfb000000 to their
  // codes (modulo 2^32). This bias of the third word, shifted by 8 bits, adds the 0x05000000 that makes that 0.
  static constexpr std::uint32_t kThirdBias = 0x50000U;
  template <int kN>
  static __device__ __forceinline__ void pack(const std::uint32_t (&codes)[kN], std::uint8_t* bytes) {
#pragma unroll
    for (int i = 0; i < kN; i += 8) {
      format::store_as(bytes + i / 2, join_all<4>(codes[i], codes[i + 1], codes[i + 2], codes[i + 3], codes[i + 4],
                                                  codes[i + 5], codes[i + 6], codes[i + 7]));
    }
  }
};

template <>
struct CodePacker<3> {
  static constexpr std::uint32_t kThirdBias = 0;
  // Bits 24 and above of the sum of the codes are dropped.
  template <int kN>
  static __device__ __forceinline__ void pack(const std::uint32_t (&codes)[kN], std::uint8_t* bytes) {
    std::uint32_t words[kN / 8];
#pragma unroll
    for (int w = 0; w < kN / 8; ++w) {
      const std::uint32_t* c = codes + 8 * w;
      words[w] = join_all<3>(c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]);
    }
    if constexpr (kN % 32 == 0) {  // four times 3 bytes are three words
#pragma unroll
      for (int w = 0; w < kN / 8; w += 4) {
        format::store_as(bytes + 3 * w, __byte_perm(words[w], words[w + 1], 0x4210));
        format::store_as(bytes + 3 * w + 4, __byte_perm(words[w + 1], words[w + 2], 0x5421));
        format::store_as(bytes + 3 * w + 8, __byte_perm(words[w + 2], words[w + 3], 0x6542));
      }
    } else {
#pragma unroll
      for (int i = 0; i < 3 * (kN / 8); ++i) bytes[i] = static_cast<std::uint8_t>(words[i / 3] >> (8 * (i % 3)));
    }
  }
};

template <class F, int kBits>
struct KeyPacker {
  template <int kN>
  static __device__ __forceinline__ void pack(const typename F::Encoder& encoder, float (&y)[kN], std::uint8_t* bytes) {
    const bool poisoned = encoder.inverse != encoder.inverse;
#pragma unroll
    for (int j = 0; j < kN; ++j) y[j] *= encoder.unit;
    if (poisoned) {  // below every midpoint, so that every code is 0
#pragma unroll
      for (int j = 0; j < kN; ++j) y[j] = -1e6F;
    }
    std::uint32_t codes[kN];
    nearest_centroids<kBits>(y, codes);
    CodePacker<kBits>::pack(codes, bytes);
  }
};
template <>
struct Packer<format::TurboQuantK4> : KeyPacker<format::TurboQuantK4, 4> {};
template <>
struct Packer<format::TurboQuantK3> : KeyPacker<format::TurboQuantK3, 3> {};

template <class F, int kBits>
struct ValuePacker {
  // In a finite row steps + 0.5 lies in [0.5, kMaxCode + 0.5 + rounding], so it needs no clamp, and 2^23 added toward
  // zero leaves its integer part in the low bits.
  template <int kN>
  static __device__ __forceinline__ void pack(typename F::Encoder encoder, float (&y)[kN], std::uint8_t* bytes) {
    if (encoder.inverse != encoder.inverse) {
      encoder = {0.0F, 0.0F, 0.0F};
#pragma unroll
      for (int j = 0; j < kN; ++j) y[j] = 0.0F;
    }
    std::uint32_t codes[kN];
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const float steps = (y[i] - encoder.low) * encoder.inverse;
      const std::uint32_t bias = i % 8 == 2 ? CodePacker<kBits>::kThirdBias : 0U;
      codes[i] = exact::bits_of(__fadd_rz(steps + 0.5F, exact::from_bits(0x4b000000U + bias)));
    }
    CodePacker<kBits>::pack(codes, bytes);
  }
};
template <>
struct Packer<format::TurboQuantV4> : ValuePacker<format::TurboQuantV4, 4> {};
template <>
struct Packer<format::TurboQuantV3> : ValuePacker<format::TurboQuantV3, 3> {};

}  // namespace quire::cuda
