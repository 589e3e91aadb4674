// What attention multiplies: fp32 levels, or operands of 16 bits, of which processors multiply and add pairs.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "format/formats.h"

namespace quire::cpu {

enum class Operand : std::uint8_t { kFloat32, kBFloat16, kInt16 };

// Which formats have 16-bit operands, and in what unit. Codebooks: the unit that brings all levels next to integers,
// found by search. int2's are integers in it; TurboQuant's are off by 2.6e-4 (4 bits) and 7e-5 (3 bits) of a standard
// deviation at most.
template <Operand kForm>
struct OperandTraits {
  static constexpr Operand kOperand = kForm;
  static constexpr float kUnit = 1.0F;
  static constexpr int kMaxLevel = 0;
};
// Codes of 8 bits that are floats.
template <class Type>
struct Float8Traits : OperandTraits<Operand::kBFloat16> {
  using Float8 = Type;
};
template <class F>
struct OperandOf : OperandTraits<Operand::kFloat32> {};
template <>
struct OperandOf<format::BFloat16> : OperandTraits<Operand::kBFloat16> {};
template <>
struct OperandOf<format::Fp8PerTensor> : Float8Traits<format::E4M3> {};
template <>
struct OperandOf<format::Fp8E5M2PerTensor> : Float8Traits<format::E5M2> {};
template <>
struct OperandOf<format::Fp8PerTokenHead> : Float8Traits<format::E4M3> {};
template <>
struct OperandOf<format::TurboQuantK8> : Float8Traits<format::E4M3> {};
template <>
struct OperandOf<format::TurboQuantK8E4B15> : Float8Traits<format::E4B15> {};
template <>
struct OperandOf<format::Int8PerTokenHead> : OperandTraits<Operand::kInt16> {
  static constexpr int kMaxLevel = 128;
};
template <>
struct OperandOf<format::Int4PerTokenHead> : OperandTraits<Operand::kInt16> {
  static constexpr int kMaxLevel = 8;
};
template <>
struct OperandOf<format::Int2PerTokenHead> : OperandTraits<Operand::kInt16> {
  static constexpr float kUnit = 0.0016F;
  static constexpr int kMaxLevel = 944;
};
template <>
struct OperandOf<format::TurboQuantK4> : OperandTraits<Operand::kInt16> {
  static constexpr float kUnit = 0.00189234740F;
  static constexpr int kMaxLevel = 1443;
};
template <>
struct OperandOf<format::TurboQuantK3> : OperandTraits<Operand::kInt16> {
  static constexpr float kUnit = 0.00109827142F;
  static constexpr int kMaxLevel = 1958;
};
template <>
struct OperandOf<format::TurboQuantV4> : OperandTraits<Operand::kInt16> {
  static constexpr int kMaxLevel = 8;
};
template <>
struct OperandOf<format::TurboQuantV3> : OperandTraits<Operand::kInt16> {
  static constexpr int kMaxLevel = 4;
};

// What a format's rows are multiplied as, from queries of 16 bits or fewer, where the processor has products of bf16;
// where it has none, those of bf16 are multiplied in fp32.
inline Operand operand_of(format::FormatId id) {
  if (id == format::FormatId::kNone) return Operand::kFloat32;
  Operand operand = Operand::kFloat32;
  format::for_each_format([&]<class F>() {
    if (format::format_id<F> == id) operand = OperandOf<F>::kOperand;
  });
  return operand;
}

}  // namespace quire::cpu
