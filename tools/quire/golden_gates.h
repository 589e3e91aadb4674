// How far from a golden file a replay may be, and from the oracle. Each gate stands next to its reason in
// golden_gates.cc; tests/golden/README.md lists them.
#pragma once

#include <limits>
#include <string_view>

#include "quire/tensor.h"

namespace quire::cli {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Reading against the file's `out`, the worst row's ||mine - out|| / ||out||, by the format of K or of V.
double read_tolerance(std::string_view format, DType query_dtype);

// fp8 outputs: half an fp8 step, and this share of the row's RMS for what read_tolerance allows in one element.
inline constexpr double kReadToleranceFp8Element = 6e-2;

// Reading against the double-precision oracle on the same bytes.
double oracle_tolerance(Device device, DType query_dtype, std::string_view key_format, std::string_view value_format);

// The largest relative rounding error of an output dtype: half a unit in the last place.
double rounding_error(DType dtype);

// Centroids, relative: fp32 roundings of two solutions of one recipe.
inline constexpr double kCentroidTolerance = 1e-6;

// Writing, for the formats whose bytes are not simply equal to the file's.
struct WriteGate {
  std::string_view format;
  double scale_error;      // relative, worst row; 0: equal
  float code_distance;     // codes this far apart, zero points subtracted, count as the same
  double codes_different;  // the share of codes that differ
  double decoded_error;    // worst row's ||decoded - x|| over the file's
  double farther;          // worst element's |decoded - x| beyond the file's, over |x|
  bool exempt_one_sided;   // leave out rows whose rotated range excludes 0: the file's kernels lose them
};

// Null where the bytes must be equal to the file's.
const WriteGate* find_write_gate(std::string_view format);

// The larger of the two, NaN counting as larger than anything.
double worse(double a, double b);

}  // namespace quire::cli
