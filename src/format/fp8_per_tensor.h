// fp8 with one scale for the whole tensor, given by the caller (1 where it gives none):
//
//     code = fp8(x / scale), saturating; NaN stays NaN        value = code * scale
//
// The scale is not stored: attention receives it as k_scale or v_scale and multiplies there. This is the one format
// that divides per element instead of multiplying by a reciprocal, as vLLM does.
#pragma once

#include "format/float_types.h"
#include "format/format.h"

namespace quire::format {

template <class Fp8>
struct Fp8PerTensorOf : FormatDefaults {
  static constexpr bool kTensorScale = true;
  struct Encoder {
    float tensor_scale;
  };
  static QUIRE_HD Encoder finish(NoStats, RowShape, const SideInputs& side) { return {side.tensor_scale}; }
  static QUIRE_HD void pack(Encoder encoder, const float* y, std::uint8_t* bytes) {
    const float scaled = exact::divide(*y, encoder.tensor_scale);
    // A processor may give the NaN of a division either sign: the code is always 0x7f.
    *bytes = Fp8::encode(scaled == scaled ? scaled : exact::quiet_nan());
  }
  static QUIRE_HD void unpack(const std::uint8_t* bytes, float* level) { *level = Fp8::decode(*bytes); }
};

struct Fp8PerTensor : Fp8PerTensorOf<E4M3> {
  static constexpr std::string_view kName = "fp8";
  static constexpr DType kCacheDType = DType::kFloat8E4M3;
  static constexpr bool kLogitsMayBeInfinite = false;
  static constexpr double kMaxNmse = 1.5e-3;
};

struct Fp8E5M2PerTensor : Fp8PerTensorOf<E5M2> {
  static constexpr std::string_view kName = "fp8_e5m2";
  static constexpr DType kCacheDType = DType::kFloat8E5M2;
  static constexpr double kMaxNmse = 6e-3;
};

}  // namespace quire::format
