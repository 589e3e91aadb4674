// Compiled once per SIMD target: Highway includes this file again for each (foreach_target.h), and kernels() picks the
// best the processor has. Encoding and decoding are the format's own scalar code, inlined here and vectorized by the
// compiler under each target's flags; the two products and the exponential are written with Highway.
#include "cpu/kernels.h"

#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/kernels.cc"
// foreach_target.h must come first.
#include <hwy/foreach_target.h>

#include <hwy/highway.h>

#include <hwy/contrib/math/math-inl.h>

#include "cpu/cpu.h"
#include "format/row.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using F32 = hn::CappedTag<float, kLaneAlign>;

template <class F>
void encode_row(float* y, format::RowShape shape, const format::SideInputs& side, std::uint8_t* data,
                std::uint8_t* meta) {
  format::encode_row<F>(y, shape, side, data, meta);
}

// True where every float is finite: an OR over exponent tests, which vectorizes.
bool all_finite(const float* x, int size) {
  std::uint32_t bad = 0;
  for (int i = 0; i < size; ++i) bad |= (exact::bits_of(x[i]) & 0x7f800000U) == 0x7f800000U ? 1U : 0U;
  return bad == 0;
}

// Only the float casts and fp8 have codes that are not finite levels; a centre may hold anything.
template <class F>
constexpr bool kLevelsMayBeNonFinite = F::kStatsOf == format::StatsOf::kNothing || F::kCentre != format::Centre::kNone;

template <class F>
void load_tile(const RowAddress* rows, int num_rows, format::RowShape shape, const float* head_vector,
               LevelTile& tile) {
  tile.any_offset = false;
  tile.all_finite = true;
  for (int n = 0; n < num_rows; ++n) {
    float* levels = tile.levels + static_cast<std::int64_t>(n) * tile.stride;
    format::Affine affine = format::decode_levels<F>(rows[n].data, rows[n].meta, shape, levels);
    format::add_centre<F>({.head_vector = head_vector, .page = rows[n].page}, shape, levels, affine);
    for (int i = shape.head_size; i < tile.stride; ++i) levels[i] = 0.0F;
    tile.scale[n] = affine.scale;
    tile.offset[n] = affine.offset;
    tile.any_offset = tile.any_offset || affine.offset != 0.0F;
    tile.all_finite = tile.all_finite && exact::is_finite(affine.scale) && exact::is_finite(affine.offset);
    if constexpr (kLevelsMayBeNonFinite<F>) tile.all_finite = tile.all_finite && all_finite(levels, shape.head_size);
  }
}

// kQ x kKeys dot products at once.
template <int kQ, int kKeys>
HWY_INLINE void dot_block(const float* q, const LevelTile& tile, int first_key, float* scores) {
  const F32 d;
  hn::Vec<F32> sum[kQ][kKeys];
  for (int m = 0; m < kQ; ++m) {
    for (int n = 0; n < kKeys; ++n) sum[m][n] = hn::Zero(d);
  }
  const float* levels = tile.levels + static_cast<std::int64_t>(first_key) * tile.stride;
  const int lanes = static_cast<int>(hn::Lanes(d));
  for (int i = 0; i < tile.stride; i += lanes) {
    hn::Vec<F32> key[kKeys];
    for (int n = 0; n < kKeys; ++n) key[n] = hn::Load(d, levels + n * tile.stride + i);
    for (int m = 0; m < kQ; ++m) {
      const auto query = hn::Load(d, q + m * tile.stride + i);
      for (int n = 0; n < kKeys; ++n) sum[m][n] = hn::MulAdd(query, key[n], sum[m][n]);
    }
  }
  for (int m = 0; m < kQ; ++m) {
    for (int n = 0; n < kKeys; ++n) scores[m * kKeyTile + first_key + n] = hn::GetLane(hn::SumOfLanes(d, sum[m][n]));
  }
}

void dot_tile(const float* q, int num_q, const LevelTile& tile, int num_keys, float* scores) {
  for (int n = 0; n < num_keys; n += 4) {
    const int keys = num_keys - n < 4 ? num_keys - n : 4;
    int m = 0;
    for (; m + 4 <= num_q && keys == 4; m += 4) {
      dot_block<4, 4>(q + static_cast<std::int64_t>(m) * tile.stride, tile, n, scores + m * kKeyTile);
    }
    for (; m < num_q; ++m) {
      const float* row = q + static_cast<std::int64_t>(m) * tile.stride;
      if (keys == 4) {
        dot_block<1, 4>(row, tile, n, scores + m * kKeyTile);
      } else {
        for (int k = 0; k < keys; ++k) dot_block<1, 1>(row, tile, n + k, scores + m * kKeyTile);
      }
    }
  }
}

template <int kQ>
HWY_INLINE void accumulate_block(const float* p, const LevelTile& tile, int num_keys, float* acc) {
  const F32 d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  for (int i = 0; i < tile.stride; i += lanes) {
    hn::Vec<F32> sum[kQ];
    for (int m = 0; m < kQ; ++m) sum[m] = hn::Load(d, acc + m * tile.stride + i);
    const float* levels = tile.levels + i;
    for (int n = 0; n < num_keys; ++n, levels += tile.stride) {
      const auto value = hn::Load(d, levels);
      for (int m = 0; m < kQ; ++m) sum[m] = hn::MulAdd(hn::Set(d, p[m * kKeyTile + n]), value, sum[m]);
    }
    for (int m = 0; m < kQ; ++m) hn::Store(sum[m], d, acc + m * tile.stride + i);
  }
}

void accumulate_tile(const float* p, int num_q, const LevelTile& tile, int num_keys, float* acc) {
  int m = 0;
  for (; m + 8 <= num_q; m += 8) {
    accumulate_block<8>(p + m * kKeyTile, tile, num_keys, acc + static_cast<std::int64_t>(m) * tile.stride);
  }
  for (; m < num_q; ++m) {
    accumulate_block<1>(p + m * kKeyTile, tile, num_keys, acc + static_cast<std::int64_t>(m) * tile.stride);
  }
}

float exp_row(float* p, int num_keys, float max) {
  const F32 d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  const auto maximum = hn::Set(d, max);
  auto sum = hn::Zero(d);
  int n = 0;
  for (; n + lanes <= num_keys; n += lanes) {
    const auto x = hn::Sub(hn::LoadU(d, p + n), maximum);
    // Exp returns 0 for very negative arguments, -inf included; a NaN must survive it.
    const auto e = hn::IfThenElse(hn::IsNaN(x), x, hn::Exp(d, x));
    hn::StoreU(e, d, p + n);
    sum = hn::Add(sum, e);
  }
  float total = hn::GetLane(hn::SumOfLanes(d, sum));
  if (n < num_keys) {
    HWY_ALIGN float rest[kLaneAlign];
    for (int i = 0; i < kLaneAlign; ++i) rest[i] = n + i < num_keys ? p[n + i] : -INFINITY;
    const auto x = hn::Sub(hn::Load(d, rest), maximum);
    const auto e = hn::IfThenElse(hn::IsNaN(x), x, hn::Exp(d, x));
    hn::Store(e, d, rest);
    for (int i = 0; n + i < num_keys; ++i) p[n + i] = rest[i];
    total += hn::GetLane(hn::SumOfLanes(d, e));
  }
  return total;
}

void scale_row(float* x, int size, float factor) {
  for (int i = 0; i < size; ++i) x[i] *= factor;
}

void rotate(format::Rotation rotation, float* y, format::RowShape shape) { format::rotate(rotation, y, shape); }
void rotate_back(format::Rotation rotation, float* y, format::RowShape shape) {
  format::rotate_back(rotation, y, shape);
}

template <class F>
constexpr Kernels::EncodeRow encode_row_if_enabled() {
  if constexpr (format::format_enabled<F>()) return &encode_row<F>;
  return nullptr;
}
template <class F>
constexpr Kernels::LoadTile load_tile_if_enabled() {
  if constexpr (format::format_enabled<F>()) return &load_tile<F>;
  return nullptr;
}

template <class... Fs>
constexpr Kernels make_kernels(format::TypeList<Fs...>) {
  return {hwy::TargetName(HWY_TARGET),
          {encode_row_if_enabled<Fs>()...},
          {load_tile_if_enabled<Fs>()...},
          &dot_tile,
          &accumulate_tile,
          &exp_row,
          &scale_row,
          &rotate,
          &rotate_back};
}

}  // namespace

const Kernels* target_kernels() {
  static const Kernels table = make_kernels(format::AllFormats{});
  return &table;
}

}  // namespace HWY_NAMESPACE
}  // namespace quire::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quire::cpu {
namespace {
HWY_EXPORT(target_kernels);

std::uint32_t compiled_targets() { return static_cast<std::uint32_t>(HWY_TARGETS); }
}  // namespace

const Kernels& kernels() { return *HWY_DYNAMIC_DISPATCH(target_kernels)(); }

std::vector<std::string> simd_targets() {
  std::vector<std::string> names;
  // Highway numbers better targets with lower bits.
  const auto runnable = static_cast<std::uint32_t>(hwy::SupportedTargets()) & compiled_targets();
  for (std::uint32_t bit = 1; bit != 0; bit <<= 1) {
    if (runnable & bit) names.emplace_back(hwy::TargetName(static_cast<int>(bit)));
  }
  return names;
}

Status use_simd_target(const std::string& name) {
  hwy::SetSupportedTargetsForTest(0);
  if (!name.empty()) {
    const auto runnable = static_cast<std::uint32_t>(hwy::SupportedTargets()) & compiled_targets();
    std::uint32_t found = 0;
    for (std::uint32_t bit = 1; bit != 0; bit <<= 1) {
      if ((runnable & bit) && name == hwy::TargetName(static_cast<int>(bit))) found = bit;
    }
    if (found == 0) {
      std::string names;
      for (const std::string& target : simd_targets()) names += (names.empty() ? "" : ", ") + target;
      return not_found("SIMD target '" + name + "' is not compiled in or not runnable here; targets: " + names);
    }
    hwy::SetSupportedTargetsForTest(static_cast<decltype(hwy::SupportedTargets())>(found));
  }
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  return {};
}

}  // namespace quire::cpu
#endif  // HWY_ONCE
