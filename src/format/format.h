// The contract of a format: what the bytes of one row mean. A row is one token of one KV head, x[0] to x[head_size -
// 1].
//
//     value[i] = affine.scale * level(code[i]) + affine.offset        (in the rotated domain, where there is one)
//
// A format is a struct of constants and static host+device functions; docs/formats/README.md shows how to add one.
// Nothing outside src/format knows how many bytes a row takes, what a code means or where a zero point hides.
//
// WRITING a row, by a loop, by SIMD lanes or by the lanes of a warp (format/row.h and cuda/format/encode.cuh are the
// two drivers):
//
//     stats   = merge(stat(x0), stat(x1), ...)     pairwise, element i with i + h, h = 1, 2, 4 on: a fixed tree;
//                                                  merge(a, b) = merge(b, a), up to the sign of a zero.
//                                                  Stats::kAnyOrder: any other tree gives the same, up to that sign
//     encoder = finish(stats, shape, side)         side: what else the caller gives (SideInputs)
//     pack(encoder, y, bytes)                      kUnit elements at a time into kUnitBytes bytes, or (kWholeRow)
//     encode_row(encoder, y, shape, bytes)         all of them, where one code depends on another
//     write_meta(encoder, meta)                    kMetaBytes bytes, once per row
//
//     On CUDA a lane packs all of its elements at once (cuda/format/pack.cuh).
//
//   y is x, rotated where kRotation asks for it, less the row's centre where there is one. kStatsOf says whether the
//   statistics are those of y (kRotated: the usual case), of x before the rotation (kInput: such a format also has
//   normalize(encoder, x), applied to x before it is rotated; TurboQuant keys), or whether there are none.
//
// READING a row:
//
//     unpack(bytes, level)                         kUnit levels at a time
//     affine = read_meta(meta, shape)              one (scale, offset) per row
//
//   kHistory: a unit's levels depend on the byte before the unit too, bytes[-1], which is 0 before the row's first.
//
//   kCentre: value[i] = affine.scale * level(code[i]) + affine.offset + centre(side, shape, i), still in the rotated
//   domain. The centre is the same for all rows of a KV head (kHead: from side.head_vector) or of a page and KV head
//   (kPage: from side.page), so attention adds q . centre to the logits of those rows. Where the call gives neither a
//   vector nor pages there is no centre.
//
//   kLevelNorm: the reader divides affine.scale by the Euclidean norm of the row's levels, which it sums while
//   unpacking (TurboQuant's norm correction). A rotated format is never rotated back element by element: dot(q, x) =
//   unrotate(shape) * dot(H s q, y') and x = unrotate(shape) * s H y', so attention rotates the query once and the
//   output once.
//
// WHERE metadata lives: kScaleCache is one fp32 at an address of its own (separate tensor or inline, that is strides);
// kInRow follows the row's codes directly, 2-byte aligned. A page and KV head may have page_bytes(head_size) bytes
// more, in a tensor of their own. K and V are two independent rows; when they share a slot the value row simply starts
// where the key row ends.
//
// NON-FINITE input: a format with statistics of its own stores codes 0 and a NaN scale for a row with any non-finite
// element, so attention shows NaN and never a plausible number. finish() yields poisoned(), whose `inverse` is NaN, and
// pack() maps a NaN product to code 0.
#pragma once

#include <concepts>
#include <cstdint>
#include <cstring>
#include <string_view>

#include "format/exact.h"
#include "format/rotation.h"
#include "quire/tensor.h"

namespace quire::format {

enum class Rotation : std::uint8_t { kNone, kHadamard, kSignedHadamard };
enum class MetaPlace : std::uint8_t { kNone, kScaleCache, kInRow };
enum class StatsOf : std::uint8_t { kNothing, kInput, kRotated };
enum class Centre : std::uint8_t { kNone, kHead, kPage };

struct RowShape {
  int head_size;
  int block;  // of the rotation: rotation_block(head_size)
};

QUIRE_HD constexpr RowShape row_shape(int head_size) { return {head_size, rotation_block(head_size)}; }

struct Affine {
  float scale;
  float offset;
};

// What a format may be given besides the row.
struct SideInputs {
  float tensor_scale = 1.0F;           // kTensorScale: of the whole tensor
  const float* head_vector = nullptr;  // Centre::kHead: [head_size], of the row's KV head
  const std::uint8_t* page = nullptr;  // Centre::kPage: page_bytes(head_size) bytes, of the row's page and KV head
};

// The statistics of a format that needs none.
struct NoStats {
  static constexpr bool kAnyOrder = true;
};

// Defaults, inherited by every format; a format overrides what differs.
struct FormatDefaults {
  static constexpr int kUnit = 1;
  static constexpr int kUnitBytes = 1;
  static constexpr MetaPlace kMetaPlace = MetaPlace::kNone;
  static constexpr int kMetaBytes = 0;
  static constexpr Rotation kRotation = Rotation::kNone;
  static constexpr StatsOf kStatsOf = StatsOf::kNothing;
  static constexpr bool kTensorScale = false;  // the encoder divides by side.tensor_scale
  static constexpr bool kWholeRow = false;     // encode_row instead of pack
  static constexpr Centre kCentre = Centre::kNone;
  static constexpr bool kLevelNorm = false;
  static constexpr bool kHasOffset = false;  // read_meta's offset may differ from 0
  // Whether a product of a query and a key of the format can be infinite. Not where its levels and scales are too small
  // for it: e4m3, e4b15 and codebook levels with fp16 scales or none.
  static constexpr bool kLogitsMayBeInfinite = true;
  // Whether a unit's levels depend on the byte before the unit as well (0 before the row's first).
  static constexpr bool kHistory = false;
  static constexpr DType kCacheDType = DType::kUInt8;

  using Stats = NoStats;
  static QUIRE_HD NoStats stat(float) { return {}; }
  static QUIRE_HD NoStats merge(NoStats, NoStats) { return {}; }
  static QUIRE_HD constexpr float unrotate(RowShape) { return 1.0F; }
  static QUIRE_HD Affine read_meta(const std::uint8_t*, RowShape) { return {1.0F, 0.0F}; }
  template <class Encoder>
  static QUIRE_HD void write_meta(const Encoder&, std::uint8_t*) {}
  static QUIRE_HD constexpr int page_bytes(int) { return 0; }
  static QUIRE_HD float centre(const SideInputs&, RowShape, int) { return 0.0F; }
};

// clang-format off
template <class F>
concept Format = requires(const float* y, float* level, std::uint8_t* bytes, const std::uint8_t* const_bytes,
                          typename F::Stats stats, typename F::Encoder encoder, RowShape shape, SideInputs side) {
  { F::kName } -> std::convertible_to<std::string_view>;
  { F::stat(0.0F) } -> std::same_as<typename F::Stats>;
  { F::merge(stats, stats) } -> std::same_as<typename F::Stats>;
  { F::finish(stats, shape, side) } -> std::same_as<typename F::Encoder>;
  requires F::kWholeRow || requires { { F::pack(encoder, y, bytes) } -> std::same_as<void>; };
  { F::write_meta(encoder, bytes) } -> std::same_as<void>;
  { F::unpack(const_bytes, level) } -> std::same_as<void>;
  { F::read_meta(const_bytes, shape) } -> std::same_as<Affine>;
  { F::unrotate(shape) } -> std::same_as<float>;
  { F::page_bytes(0) } -> std::same_as<int>;
  { F::centre(side, shape, 0) } -> std::same_as<float>;
  // How far a row of Gaussian noise may move: ||decoded - x||^2 <= kMaxNmse * ||x||^2. Checked by a test.
  { F::kMaxNmse } -> std::convertible_to<double>;
};
// clang-format on

// Bytes of a row's codes, and of the row in its cache tensor.
template <Format F>
QUIRE_HD constexpr std::int64_t code_bytes(std::int64_t head_size) {
  return head_size / F::kUnit * F::kUnitBytes;
}
template <Format F>
QUIRE_HD constexpr std::int64_t row_bytes(std::int64_t head_size) {
  return code_bytes<F>(head_size) + (F::kMetaPlace == MetaPlace::kInRow ? F::kMetaBytes : 0);
}

// Whether rows of the format have a centre in a call.
template <class F>
QUIRE_HD bool has_centre(const SideInputs& side) {
  return (F::kCentre == Centre::kHead && side.head_vector != nullptr) ||
         (F::kCentre == Centre::kPage && side.page != nullptr);
}

// Metadata is read and written through memcpy: it may be only 2-byte aligned.
template <class T>
QUIRE_HD T load_as(const std::uint8_t* bytes) {
  T value;
  memcpy(&value, bytes, sizeof(T));
  return value;
}
template <class T>
QUIRE_HD void store_as(std::uint8_t* bytes, T value) {
  memcpy(bytes, &value, sizeof(T));
}

// ---- the parts that several formats share ---------------------------------------------------------------------------

// max |x|. Not finite where an element is not.
struct AbsMax {
  static constexpr bool kAnyOrder = true;
  float value;
  static QUIRE_HD AbsMax of(float x) { return {exact::abs(x)}; }
  static QUIRE_HD AbsMax merge(AbsMax a, AbsMax b) { return {exact::max_or_nan(a.value, b.value)}; }
  QUIRE_HD bool finite() const { return exact::is_finite(value); }
};

// min and max.
struct Range {
  static constexpr bool kAnyOrder = true;
  float low, high;
  static QUIRE_HD Range of(float x) { return {x, x}; }
  static QUIRE_HD Range merge(Range a, Range b) {
    return {exact::min_or_nan(a.low, b.low), exact::max_or_nan(a.high, b.high)};
  }
  // Whether every element is, and their distance too: infinities and NaNs reach the difference.
  QUIRE_HD bool finite() const { return exact::is_finite(high - low); }
};

// Sum of squares. Not order-free: the tree of the contract fixes its bits.
struct SquareSum {
  static constexpr bool kAnyOrder = false;
  float value;
  static QUIRE_HD SquareSum of(float x) { return {x * x}; }
  static QUIRE_HD SquareSum merge(SquareSum a, SquareSum b) { return {a.value + b.value}; }
};

// The encoder of the *_per_token_head formats.
struct ScaledEncoder {
  float scale;    // what a reader multiplies by
  float inverse;  // 1 / scale, once per row; NaN for a poisoned row
  float zero;     // zero point, in codes
  static QUIRE_HD ScaledEncoder poisoned() { return {exact::quiet_nan(), exact::quiet_nan(), 0.0F}; }
  QUIRE_HD bool is_poisoned() const { return inverse != inverse; }
};

// A 4-byte fp32 scale in a scale cache.
struct ScaleCacheDefaults : FormatDefaults {
  static constexpr MetaPlace kMetaPlace = MetaPlace::kScaleCache;
  static constexpr int kMetaBytes = 4;
  using Encoder = ScaledEncoder;
  static QUIRE_HD void write_meta(const ScaledEncoder& encoder, std::uint8_t* meta) { store_as(meta, encoder.scale); }
  static QUIRE_HD Affine read_meta(const std::uint8_t* meta, RowShape) { return {load_as<float>(meta), 0.0F}; }
};

}  // namespace quire::format
