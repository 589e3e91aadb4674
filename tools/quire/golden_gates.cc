#include "golden_gates.h"

#include <algorithm>
#include <cmath>

#include "cpu/operand.h"
#include "format/formats.h"

namespace quire::cli {
namespace {

// Reading against the file's `out`, the worst row's ||mine - out|| / ||out||. The files' kernels round what they
// dequantize, and `out` itself, to the query's dtype; the rotated formats round once more in the rotated domain.
constexpr double kReadTolerance = 6e-3;
constexpr double kReadToleranceFloat16 = 7e-4;
struct ReadGate {
  std::string_view format;
  double tolerance;
};
constexpr ReadGate kReadGates[] = {
    {"fp8", 3e-2},  // the files' kernels round code * scale to the query's dtype; this library does not
    {"fp8_e5m2", 3e-2},
    {"int4_per_token_head", 2.5e-2},
    {"int2_per_token_head", 2.5e-2},
    {"turboquant_k8", 3.5e-3},
    {"turboquant_k4", 3.5e-3},
    {"turboquant_k3", 3.5e-3},
    {"turboquant_v4", 3.5e-3},
    {"turboquant_v3", 3.5e-3},
};

constexpr WriteGate kWriteGates[] = {
    // Where two roundings of x / scale differ, x lies on the border between their codes, and both decode equally far
    // from it, but for the roundings' own errors. In units of 2^-23 x: the file's kernels multiply by a reciprocal that
    // is 1 off (MUFU.RCP), round the product, 1/2, and int8's sum with a half, 1; this library's reciprocal and product
    // are 1 off in all. So x is at most 5/2 from the border, and one code at most 5 < 2^3 farther from x than the
    // other. int8 of 2026-04 truncates instead, and is never nearer. How many codes differ says nothing then.
    {"int8_per_token_head", 0.0, 1.0F, 0.0, kInfinity, 0x1p-20, false},
    {"fp8_per_token_head", 0.0, 0.0F, 1.0, kInfinity, 0x1p-20, false},
    {"int4_per_token_head", 0.01, 0.0F, 0.02, 1.02, kInfinity, true},
    {"int2_per_token_head", 0.01, 0.0F, 0.005, 1.005, kInfinity, false},
    // Ties go either way. With the fp32 scale both codes are half a step off; the fp16 scale and minimum that a reader
    // has move that by some 0.01 steps, which is a share of 0.005 in a row of 64 whose rms error is 0.29 steps.
    {"turboquant_v4", 0.0, 0.0F, 0.002, 1.01, kInfinity, false},
    {"turboquant_v3", 0.0, 0.0F, 0.002, 1.01, kInfinity, false},
};

template <class Gate, std::size_t kSize>
const Gate* find_gate(const Gate (&gates)[kSize], std::string_view format) {
  const auto* found = std::find_if(gates, gates + kSize, [&](const Gate& gate) { return gate.format == format; });
  return found == gates + kSize ? nullptr : found;
}

}  // namespace

double read_tolerance(std::string_view format, DType query_dtype) {
  if (const ReadGate* gate = find_gate(kReadGates, format)) return gate->tolerance;
  return query_dtype == DType::kFloat16 ? kReadToleranceFloat16 : kReadTolerance;
}

const WriteGate* find_write_gate(std::string_view format) { return find_gate(kWriteGates, format); }

// Reading against the double-precision oracle on the same bytes. fp32 kernels: 2^-24 per operation, times 2^4 for the
// random walk of sums over some 2^8 terms, times 2^4 where a zero point of up to 15 steps is subtracted. CUDA kernels
// feed softmax weights and dequantized levels to the tensor cores in 16 bits: 2^-9 for each factor of bfloat16.
//
// Products of 16 bits on the CPU, with queries of 16 bits or fewer (src/cpu/operand.h). The error of one factor is that
// of a row's output where this is as large as its values; where it is a fourth of them and the worst of some thousand
// rows is looked at, 2^3 times that.
//   bf16    weights in two parts: 2^-17.
//   int16   weights in steps of 2^-15 of a tile's largest. Queries in steps of 2^-15 of a row's largest element; sums
//           over levels of up to 10 bits (int2) leave 2^-14 at a head size of 128, times 2 for the largest element of a
//           row that has a few standard deviations: 2^-13.
//   TurboQuant's 4-bit keys: their levels become integers, 2^-12 of a standard deviation off.
double oracle_tolerance(Device device, DType query_dtype, std::string_view key_format, std::string_view value_format) {
  if (device.is_cuda()) return std::ldexp(1.0, -8);
  if (query_dtype == DType::kFloat32) return std::ldexp(1.0, -16);
  double tolerance = std::ldexp(1.0, -16);
  for (const std::string_view name : {key_format, value_format}) {
    const format::FormatId id = format::find_format(name == "auto" ? "bfloat16" : name);
    const cpu::Operand operand = cpu::operand_of(id);
    int exponent = operand == cpu::Operand::kInt16 ? -13 : operand == cpu::Operand::kBFloat16 ? -17 : -19;
    if (name == key_format && operand == cpu::Operand::kInt16 && format::format_info(id).level_norm) exponent = -12;
    tolerance = std::max(tolerance, std::ldexp(1.0, exponent + 3));
  }
  return tolerance;
}

double rounding_error(DType dtype) {
  return dtype == DType::kBFloat16 ? std::ldexp(1.0, -8) : dtype == DType::kFloat16 ? std::ldexp(1.0, -11) : 0.0;
}

double worse(double a, double b) { return std::isnan(a) || a >= b ? a : b; }

}  // namespace quire::cli
