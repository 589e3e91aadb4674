// fp8 with one scale for the whole tensor, given by the caller (1 where it gives none):
//
//     code = fp8(x / scale), saturating; NaN stays NaN        value = code * scale
//
// The scale is not stored: attention receives it as k_scale or v_scale and multiplies there. This is the one format
// that divides per element instead of multiplying by a reciprocal, as vLLM does.
#pragma once

#include "format/float_types.h"
#include "format/format.h"
#include "format/lane.h"

namespace quire::format {

template <class Fp8>
struct Fp8PerTensorOf : FormatDefaults {
  static constexpr bool kTensorScale = true;
  struct Encoder {
    float tensor_scale;
  };
  static QUIRE_HD Encoder finish(NoStats, RowShape, float tensor_scale) { return {tensor_scale}; }
  static QUIRE_HD void pack(Encoder encoder, const float* y, std::uint8_t* bytes) {
    const float scaled = exact::divide(*y, encoder.tensor_scale);
    // A processor may give the NaN of a division either sign: the code is always 0x7f.
    *bytes = Fp8::encode(scaled == scaled ? scaled : exact::quiet_nan());
  }
#ifdef __CUDACC__
  // Every element's division by one divisor. With r = 1 / scale correctly rounded, x r misses the quotient by less than
  // 2 ulp, one step of Newton's by less than 1 ulp, and from there a second step rounds correctly (Markstein, IBM
  // Journal of R&D 34, 1990), as long as no remainder underflows. With 2^-64 <= scale <= 2^64 one does so only for
  // quotients below 2^-38, whose code is a signed zero however they are rounded. The remainders' signs are such that a
  // zero keeps its own. A NaN code says that an element was not finite, or that its quotient is none: then all are
  // divided.
  template <int kN>
  static __device__ __forceinline__ void pack_lane(const Encoder& encoder, float (&y)[kN], std::uint8_t* bytes) {
    const float scale = encoder.tensor_scale;
    const float r = exact::reciprocal(scale);
    bool divides = !(scale >= 0x1p-64F && scale <= 0x1p64F);
    if (!divides) {
      float quotient[kN];
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        float q = y[j] * r;
        q = __fmaf_rn(-__fmaf_rn(q, scale, -y[j]), r, q);
        quotient[j] = __fmaf_rn(-__fmaf_rn(q, scale, -y[j]), r, q);
      }
      divides = lane::encode_fp8<Fp8>(quotient, bytes);
    }
    if (divides) {
#pragma unroll
      for (int j = 0; j < kN; ++j) pack(encoder, y + j, bytes + j);
    }
  }
#endif
  static QUIRE_HD void unpack(const std::uint8_t* bytes, float* level) { *level = Fp8::decode(*bytes); }
};

struct Fp8PerTensor : Fp8PerTensorOf<E4M3> {
  static constexpr std::string_view kName = "fp8";
  static constexpr DType kCacheDType = DType::kFloat8E4M3;
  static constexpr double kMaxNmse = 1.5e-3;
};

struct Fp8E5M2PerTensor : Fp8PerTensorOf<E5M2> {
  static constexpr std::string_view kName = "fp8_e5m2";
  static constexpr DType kCacheDType = DType::kFloat8E5M2;
  static constexpr double kMaxNmse = 6e-3;
};

}  // namespace quire::format
