// Rows of any supported dtype to fp32 and back.
#pragma once

#include <cstdint>
#include <cstring>

#include "format/float_types.h"
#include "quire/tensor.h"

namespace quire::cpu {

namespace detail {
template <class Code, class Convert>
inline void convert_codes(const std::uint8_t* source, int size, float* out, Convert convert) {
  for (int i = 0; i < size; ++i) {
    Code code;
    std::memcpy(&code, source + static_cast<std::size_t>(i) * sizeof(Code), sizeof(Code));
    out[i] = convert(code);
  }
}
}  // namespace detail

// source [size] of a float dtype (float8 included).
inline void load_floats(const std::uint8_t* source, DType dtype, int size, float* out) {
  switch (dtype) {
    case DType::kFloat16:
      return detail::convert_codes<std::uint16_t>(source, size, out, [](auto c) { return format::half_to_float(c); });
    case DType::kBFloat16:
      return detail::convert_codes<std::uint16_t>(source, size, out,
                                                  [](auto c) { return format::bfloat16_to_float(c); });
    case DType::kFloat8E4M3:
      return detail::convert_codes<std::uint8_t>(source, size, out, [](auto c) { return format::E4M3::decode(c); });
    case DType::kFloat8E5M2:
      return detail::convert_codes<std::uint8_t>(source, size, out, [](auto c) { return format::E5M2::decode(c); });
    default:
      std::memcpy(out, source, static_cast<std::size_t>(size) * sizeof(float));
  }
}

// values [size] rounded to nearest even into a float dtype; float8_e4m3fn saturates.
inline void store_floats(const float* values, int size, DType dtype, std::uint8_t* target) {
  const auto put = [&](int i, auto code) {
    std::memcpy(target + static_cast<std::size_t>(i) * sizeof(code), &code, sizeof(code));
  };
  switch (dtype) {
    case DType::kFloat16:
      for (int i = 0; i < size; ++i) put(i, format::float_to_half(values[i]));
      return;
    case DType::kBFloat16:
      for (int i = 0; i < size; ++i) put(i, format::float_to_bfloat16(values[i]));
      return;
    case DType::kFloat8E4M3:
      for (int i = 0; i < size; ++i) put(i, format::E4M3::encode(values[i]));
      return;
    default:
      std::memcpy(target, values, static_cast<std::size_t>(size) * sizeof(float));
  }
}

}  // namespace quire::cpu
