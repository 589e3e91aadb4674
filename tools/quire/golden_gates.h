// The gates: how far a replay may be from a golden file and from the oracle. Each gate stands next to its reason in
// golden_gates.cc; tests/golden/README.md lists them.
#pragma once

#include <limits>
#include <string_view>

#include "quire/tensor.h"

namespace quire::cli {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Reading against the file's `out`, the worst row's ||mine - out|| / ||out||, by the format of K or of V.
double read_tolerance(std::string_view format, DType query_dtype);

// The slack of fp8 outputs: besides half an fp8 step, this share of the row's RMS allows for read_tolerance in one
// element.
inline constexpr double kReadToleranceFp8Element = 6e-2;

// Reading against the double-precision oracle on the same bytes.
double oracle_tolerance(Device device, DType query_dtype, std::string_view key_format, std::string_view value_format);

// The largest relative rounding error of an output dtype: half a unit in the last place.
double rounding_error(DType dtype);

// The relative tolerance of centroids, which are fp32 roundings of two solutions of one recipe.
inline constexpr double kCentroidTolerance = 1e-6;

// The gates of writing, for the formats whose bytes need not be equal to the file's.
struct WriteGate {
  std::string_view format;
  double scale_error;      // relative, worst row; 0: equal
  float code_distance;     // codes this far apart, zero points subtracted, count as the same
  double codes_different;  // the share of codes that differ
  double decoded_error;    // worst row's ||decoded - x|| over the file's
  double farther;          // worst element's |decoded - x| beyond the file's, over |x|
  bool exempt_one_sided;   // leave out rows whose rotated range excludes 0: the file's kernels lose them
};

// Returns null where the bytes must be equal to the file's.
const WriteGate* find_write_gate(std::string_view format);

// The larger of the two, where NaN is larger than any number.
double worse(double a, double b);

}  // namespace quire::cli
