// The unquantized formats: a row stored as float32, float16 or bfloat16. Codes are the bits; conversion rounds to
// nearest even; NaN payloads and infinities pass through, so storing the same type copies every bit.
#pragma once

#include "format/float_types.h"
#include "format/format.h"

namespace quire::format {

struct FloatCastDefaults : FormatDefaults {
  struct Encoder {};
  static QUIRE_HD Encoder finish(NoStats, RowShape, const SideInputs&) { return {}; }
};

struct Float32 : FloatCastDefaults {
  static constexpr std::string_view kName = "float32";
  static constexpr DType kCacheDType = DType::kFloat32;
  static constexpr int kUnitBytes = 4;
  static constexpr double kMaxNmse = 0.0;
  static QUIRE_HD void pack(Encoder, const float* y, std::uint8_t* bytes) { store_as(bytes, *y); }
  static QUIRE_HD void unpack(const std::uint8_t* bytes, float* level) { *level = load_as<float>(bytes); }
};

struct Float16 : FloatCastDefaults {
  static constexpr std::string_view kName = "float16";
  static constexpr DType kCacheDType = DType::kFloat16;
  static constexpr int kUnitBytes = 2;
  static constexpr double kMaxNmse = 1e-7;
  static QUIRE_HD void pack(Encoder, const float* y, std::uint8_t* bytes) { store_as(bytes, float_to_half(*y)); }
  static QUIRE_HD void unpack(const std::uint8_t* bytes, float* level) {
    *level = half_to_float(load_as<std::uint16_t>(bytes));
  }
};

struct BFloat16 : FloatCastDefaults {
  static constexpr std::string_view kName = "bfloat16";
  static constexpr DType kCacheDType = DType::kBFloat16;
  static constexpr int kUnitBytes = 2;
  static constexpr double kMaxNmse = 5e-6;
  static QUIRE_HD void pack(Encoder, const float* y, std::uint8_t* bytes) { store_as(bytes, float_to_bfloat16(*y)); }
  static QUIRE_HD void unpack(const std::uint8_t* bytes, float* level) {
    *level = bfloat16_to_float(load_as<std::uint16_t>(bytes));
  }
};

// Stands in the mode table for "whichever of the three the cache tensor holds".
struct AutoFloat {
  static constexpr std::string_view kName = "auto";
};

}  // namespace quire::format
