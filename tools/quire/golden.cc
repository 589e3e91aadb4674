#include "golden.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <set>
#include <string_view>
#include <utility>

#include "core/mode_table.h"
#include "cuda/device_memory.h"
#include "format/formats.h"
#include "format/row.h"
#include "llm/safetensors.h"
#include "quire/layout.h"
#include "quire/mode.h"
#include "quire/ops.h"
#include "reference/attention.h"

namespace quire::cli {
namespace {

using format::FormatId;
using nlohmann::json;

// An op with arguments that live on the host.
template <class Args>
Status run_on(Device device, const Args& args, Status (*op)(const Args& args, void* stream)) {
  if (device == Device::kCpu) return op(args, nullptr);
  return cuda::run_on_device(args, [&](const Args& on_device) { return op(on_device, nullptr); });
}

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// ---- gates --------------------------------------------------------------------------------------------------------

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
// fp8 outputs: half an fp8 step, and this share of the row's RMS for what kReadTolerance allows in one element.
constexpr double kReadToleranceFp8Element = 6e-2;

// Reading against the double-precision oracle on the same bytes. fp32 kernels: 2^-24 per operation, times 2^4 for the
// random walk of sums over some 2^8 terms, times 2^4 where a zero point of up to 15 steps is subtracted. CUDA kernels
// feed softmax weights and dequantized levels to the tensor cores in 16 bits: 2^-9 for each factor of bfloat16.
double oracle_tolerance(Device device) { return device == Device::kCpu ? std::ldexp(1.0, -16) : std::ldexp(1.0, -8); }

// The largest relative rounding error of an output dtype: half a unit in the last place.
double rounding_error(DType dtype) {
  return dtype == DType::kBFloat16 ? std::ldexp(1.0, -8) : dtype == DType::kFloat16 ? std::ldexp(1.0, -11) : 0.0;
}

// Centroids, relative: fp32 roundings of two solutions of one recipe.
constexpr double kCentroidTolerance = 1e-6;

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

double read_tolerance(std::string_view format, DType query_dtype) {
  if (const ReadGate* gate = find_gate(kReadGates, format)) return gate->tolerance;
  return query_dtype == DType::kFloat16 ? kReadToleranceFloat16 : kReadTolerance;
}

// The larger of the two, NaN counting as larger than anything.
double worse(double a, double b) { return std::isnan(a) || a >= b ? a : b; }

// ---- cases --------------------------------------------------------------------------------------------------------

struct GoldenCase {
  std::string where;  // "<path>: case '<name>'", for messages
  std::string name;
  std::map<std::string, Tensor, std::less<>> tensors;
  json params = json::object();

  // Not defined where the case has no such tensor.
  Tensor tensor(std::string_view tensor_name) const {
    const auto found = tensors.find(tensor_name);
    return found == tensors.end() ? Tensor() : found->second;
  }
  bool has(std::string_view tensor_name) const { return tensors.find(tensor_name) != tensors.end(); }
  Status refuse(const std::string& reason) const { return invalid_argument(where + ": " + reason); }

  Status require(std::string_view tensor_name, int ndim) const {
    if (!has(tensor_name)) return refuse(std::string("no tensor '").append(tensor_name) + "'");
    const Tensor found = tensor(tensor_name);
    if (found.ndim == ndim) return {};
    return refuse(std::string("'").append(tensor_name) + "' is " + to_string(found) + ", needs " +
                  std::to_string(ndim) + " dimensions");
  }

  // A parameter that may be missing: `value` then stays as it is.
  template <class T>
  Status read(const char* key, T* value) const {
    if (!params.contains(key)) return {};
    const json& found = params[key];
    const bool fits = std::is_same_v<T, bool>          ? found.is_boolean()
                      : std::is_same_v<T, std::string> ? found.is_string()
                      : std::is_integral_v<T>          ? found.is_number_integer() &&
                                                    std::fabs(found.get<double>()) <= std::numeric_limits<int>::max()
                                              : found.is_number();
    if (!fits) return refuse("parameter '" + std::string(key) + "' is " + found.dump() + ", of the wrong type");
    *value = found.get<T>();
    return {};
  }

  // A parameter that repeats what the tensors say: the two must agree.
  Status confirm(const char* key, std::int64_t actual) const {
    auto stated = static_cast<int>(actual);
    if (Status status = read(key, &stated); !status) return status;
    if (stated == actual) return {};
    return refuse("parameter '" + std::string(key) + "' is " + std::to_string(stated) + ", the tensors say " +
                  std::to_string(actual));
  }
};

// Host buffers that live as long as a case's replay.
class Scratch {
 public:
  // A dense tensor of a given shape, every byte `fill`.
  Tensor filled(const Tensor& shape_of, DType dtype, std::uint8_t fill) {
    Tensor tensor = shape_of;
    tensor.dtype = dtype;
    std::int64_t stride = 1;
    for (int i = tensor.ndim - 1; i >= 0; --i) {
      tensor.strides[i] = stride;
      stride *= tensor.shape[i];
    }
    tensor.data = buffers_.emplace_back(static_cast<std::size_t>(stride) * dtype_bytes(dtype), fill).data();
    return tensor;
  }
  Tensor filled_like(const Tensor& other, std::uint8_t fill) {
    return other.defined() ? filled(other, other.dtype, fill) : Tensor();
  }

 private:
  std::deque<std::vector<std::uint8_t>> buffers_;
};

struct Caches {
  Tensor key, value;        // [num_blocks, block_size, Hk, row]
  Tensor k_scale, v_scale;  // [num_blocks, block_size, Hk], not defined where the mode has none
};

std::uint8_t* row_address(const Tensor& cache, std::int64_t block, std::int64_t slot, std::int64_t head) {
  const std::int64_t offset = block * cache.strides[0] + slot * cache.strides[1] + head * cache.strides[2];
  return cache.ptr<std::uint8_t>() + offset * static_cast<std::int64_t>(dtype_bytes(cache.dtype));
}

// Bytes of a row of a cache, or of an entry of a scale cache.
std::int64_t row_bytes(const Tensor& cache) {
  return (cache.ndim == 4 ? cache.shape[3] : 1) * static_cast<std::int64_t>(dtype_bytes(cache.dtype));
}

std::int64_t integer_at(const Tensor& tensor, std::int64_t i) {
  return tensor.dtype == DType::kInt64 ? tensor.ptr<std::int64_t>()[i] : tensor.ptr<std::int32_t>()[i];
}

// What a case is replayed with.
struct Replay {
  const GoldenCase& golden;
  Device device;
  CaseResult& result;
  ModeInfo mode;
  Scratch scratch;

  // Several measurements of one thing count as the worst of them.
  void measure(const std::string& what, double error, double tolerance) {
    for (Measure& known : result.measures) {
      if (known.what == what) {
        known.error = worse(known.error, error);
        return;
      }
    }
    result.measures.push_back({what, error, tolerance});
  }
};

// The caches of the file, or, with `fill`, fresh ones of the same shapes and nesting.
Result<Caches> caches_of(const GoldenCase& golden, const ModeInfo& mode, std::int64_t head_size,
                         std::int64_t head_size_v, Scratch* scratch = nullptr, std::uint8_t fill = 0) {
  const auto get = [&](const char* name) {
    const Tensor tensor = golden.tensor(name);
    return scratch != nullptr ? scratch->filled_like(tensor, fill) : tensor;
  };
  for (const char* name : {"k_scale_cache", "v_scale_cache"}) {
    if (!golden.has(name)) continue;
    if (Status status = golden.require(name, 3); !status) return status;
  }
  Caches caches;
  caches.k_scale = get("k_scale_cache");
  caches.v_scale = get("v_scale_cache");
  if (golden.has("kv_cache")) {
    if (Status status = golden.require("kv_cache", 4); !status) return status;
    const Tensor packed = get("kv_cache");
    // Elements of a K row, a V row and both: DiffKV's are plain, a slot's are bytes.
    std::int64_t k_row = head_size, v_row = head_size_v, both = head_size + head_size_v;
    if (mode.shared_slot) {
      KVCacheSpec spec;
      spec.mode = mode.id;
      spec.head_size = static_cast<int>(head_size);
      spec.head_size_v = static_cast<int>(head_size_v);
      const auto layout = make_layout(spec);
      if (!layout.ok()) return golden.refuse(layout.status().message());
      k_row = layout->k_data_bytes, v_row = layout->v_data_bytes, both = layout->bytes_per_token_head;
      for (Status status : {golden.confirm("key_packed_size", k_row), golden.confirm("slot_size_aligned", both)}) {
        if (!status) return status;
      }
    }
    if (packed.shape[3] != both) {
      return golden.refuse("'kv_cache' is " + to_string(packed) + ", its last dimension needs to be " +
                           std::to_string(both));
    }
    caches.key = packed.slice_last(0, k_row);
    caches.value = packed.slice_last(k_row, k_row + v_row);
  } else {
    for (const char* name : {"key_cache", "value_cache"}) {
      if (Status status = golden.require(name, 4); !status) return status;
    }
    caches.key = get("key_cache");
    caches.value = get("value_cache");
  }
  return caches;
}

// ---- writing ------------------------------------------------------------------------------------------------------

// K or V: one stored tensor of a case, what quire wrote and what the file holds.
struct Side {
  const char* label;
  FormatId format;
  Tensor input;  // [T, Hk, head_size]
  Tensor mine, theirs;
  Tensor my_scales, their_scales;
};

// Codes as numbers, zero point subtracted, and the scale, of one row.
struct DecodedRow {
  std::vector<float> codes;
  double scale = 0.0;
  double offset = 0.0;
};

// Metadata inside a row, or null.
const std::uint8_t* meta_in_row(FormatId id, const std::uint8_t* data, int head_size) {
  const format::FormatInfo& info = format::format_info(id);
  return info.meta_place == format::MetaPlace::kInRow ? data + info.code_bytes(head_size) : nullptr;
}

DecodedRow decode_codes(FormatId id, const Tensor& cache, const Tensor& scales, std::int64_t block, std::int64_t slot,
                        std::int64_t head, int head_size) {
  DecodedRow row;
  row.codes.resize(static_cast<std::size_t>(head_size));
  const std::uint8_t* data = row_address(cache, block, slot, head);
  const std::uint8_t* meta =
      scales.defined() ? row_address(scales, block, slot, head) : meta_in_row(id, data, head_size);
  format::for_each_format([&]<class F>() {
    if (format::format_id<F> != id) return;
    const format::Affine affine = format::decode_levels<F>(data, meta, format::row_shape(head_size), row.codes.data());
    row.scale = affine.scale;
    row.offset = affine.offset;
    for (float& code : row.codes) code += affine.offset == 0.0F ? 0.0F : std::round(affine.offset / affine.scale);
  });
  return row;
}

// Whether 0 lies outside the range of the row as the format sees it, that is, rotated.
bool one_sided(FormatId id, const std::vector<float>& row) {
  const auto head_size = static_cast<int>(row.size());
  std::vector<float> rotated = row;
  format::rotate(format::format_info(id).rotation, rotated.data(), format::row_shape(head_size));
  const auto [low, high] = std::minmax_element(rotated.begin(), rotated.end());
  return *low > 0.0F || *high < 0.0F;
}

Status compare_rows(Replay& replay, const Side& side, const WriteGate& gate) {
  const Tensor slot_mapping = replay.golden.tensor("slot_mapping");
  const auto head_size = static_cast<int>(side.input.shape[2]);
  const std::int64_t block_size = side.mine.shape[1];
  const std::string label = side.label;
  std::int64_t num_codes = 0;
  std::int64_t num_different = 0;
  for (std::int64_t t = 0; t < slot_mapping.shape[0]; ++t) {
    const std::int64_t slot = integer_at(slot_mapping, t);
    if (slot < 0) continue;
    for (std::int64_t head = 0; head < side.mine.shape[2]; ++head) {
      std::vector<float> input(static_cast<std::size_t>(head_size));
      for (int i = 0; i < head_size; ++i) {
        input[static_cast<std::size_t>(i)] = static_cast<float>(reference::element(side.input, t, head, i));
      }
      if (gate.exempt_one_sided && one_sided(side.format, input)) continue;
      const std::int64_t block = slot / block_size;
      const std::int64_t offset = slot % block_size;
      const DecodedRow mine = decode_codes(side.format, side.mine, side.my_scales, block, offset, head, head_size);
      const DecodedRow theirs =
          decode_codes(side.format, side.theirs, side.their_scales, block, offset, head, head_size);

      const double scale_error = mine.scale == theirs.scale ? 0.0 : std::fabs(mine.scale - theirs.scale) / theirs.scale;
      replay.measure(label + " scales, relative difference", scale_error, gate.scale_error);
      if (format::format_info(side.format).meta_place == format::MetaPlace::kInRow) {
        replay.measure(label + " minima, difference", std::fabs(mine.offset - theirs.offset), 0.0);
      }
      for (std::size_t i = 0; i < input.size(); ++i) {
        const float distance = std::fabs(mine.codes[i] - theirs.codes[i]);
        num_different += distance <= gate.code_distance ? 0 : 1;
        ++num_codes;
      }

      std::vector<double> errors[2] = {std::vector<double>(input.size()), std::vector<double>(input.size())};
      double squares[2] = {0.0, 0.0};
      const Tensor* stored[2][2] = {{&side.mine, &side.my_scales}, {&side.theirs, &side.their_scales}};
      for (int which = 0; which < 2; ++which) {
        if (Status status = reference::decode_cache_row(side.format, *stored[which][0], *stored[which][1], block,
                                                        offset, head, head_size, errors[which].data());
            !status) {
          return status;
        }
        for (std::size_t i = 0; i < input.size(); ++i) {
          double& error = errors[which][i];
          error = std::fabs(error - input[i]);
          squares[which] += error * error;
        }
      }
      if (gate.decoded_error < kInfinity) {
        const double ratio = squares[0] == 0.0 ? 0.0 : std::sqrt(squares[0] / squares[1]);
        replay.measure(label + " decoded error over the file's", ratio, gate.decoded_error);
      }
      for (std::size_t i = 0; i < input.size() && gate.farther < kInfinity; ++i) {
        const double beyond = errors[0][i] - errors[1][i];
        replay.measure(label + " element farther from the input than the file's",
                       beyond <= 0.0 ? 0.0 : beyond / std::fabs(input[i]), gate.farther);
      }
    }
  }
  if (num_codes > 0) {
    replay.measure(label + " codes, share that differs",
                   static_cast<double>(num_different) / static_cast<double>(num_codes), gate.codes_different);
  }
  return {};
}

// Calls visit(block, slot, head) for every row of a cache.
template <class Visit>
void for_each_row(const Tensor& cache, Visit&& visit) {
  for (std::int64_t block = 0; block < cache.shape[0]; ++block) {
    for (std::int64_t slot = 0; slot < cache.shape[1]; ++slot) {
      for (std::int64_t head = 0; head < cache.shape[2]; ++head) visit(block, slot, head);
    }
  }
}

Status replay_write(Replay& replay) {
  const GoldenCase& golden = replay.golden;
  for (const auto& [name, ndim] : {std::pair{"key", 3}, {"value", 3}, {"slot_mapping", 1}}) {
    if (Status status = golden.require(name, ndim); !status) return status;
  }
  const Tensor key = golden.tensor("key");
  const Tensor value = golden.tensor("value");
  const auto theirs = caches_of(golden, replay.mode, key.shape[2], value.shape[2]);
  if (!theirs.ok()) return theirs.status();
  for (const auto& [name, actual] : {std::pair{"head_size", key.shape[2]},
                                     {"block_size", theirs->key.shape[1]},
                                     {"num_kv_heads", theirs->key.shape[2]}}) {
    if (Status status = golden.confirm(name, actual); !status) return status;
  }

  // From a cleared cache and from one of 0xFF: what was there before must not matter.
  for (const std::uint8_t fill : {std::uint8_t{0x00}, std::uint8_t{0xFF}}) {
    const auto mine = caches_of(golden, replay.mode, key.shape[2], value.shape[2], &replay.scratch, fill);
    if (!mine.ok()) return mine.status();
    ReshapeAndCacheArgs args;
    args.mode = replay.mode.id;
    args.key = key;
    args.value = value;
    args.slot_mapping = golden.tensor("slot_mapping");
    args.k_scale = golden.tensor("k_scale");
    args.v_scale = golden.tensor("v_scale");
    args.key_cache = mine->key;
    args.value_cache = mine->value;
    args.k_scale_cache = mine->k_scale;
    args.v_scale_cache = mine->v_scale;
    if (Status status = run_on(replay.device, args, &reshape_and_cache); !status) {
      replay.result.reason = "reshape_and_cache: " + status.message();
      return {};
    }

    const std::int64_t block_size = mine->key.shape[1];
    std::set<std::int64_t> written;
    for (std::int64_t t = 0; t < args.slot_mapping.shape[0]; ++t) written.insert(integer_at(args.slot_mapping, t));
    const core::FormatPair formats = core::formats_of(replay.mode, mine->key.dtype, mine->value.dtype);
    const Side sides[] = {
        {"K", formats.key, key, mine->key, theirs->key, mine->k_scale, theirs->k_scale},
        {"V", formats.value, value, mine->value, theirs->value, mine->v_scale, theirs->v_scale},
    };
    for (const Side& side : sides) {
      const WriteGate* gate = find_gate(kWriteGates, format::format_info(side.format).name);
      std::int64_t changed = 0;
      std::int64_t different = 0;
      const std::pair<const Tensor*, const Tensor*> stored[] = {{&side.mine, &side.theirs},
                                                                {&side.my_scales, &side.their_scales}};
      for (const auto& [my_tensor, their_tensor] : stored) {
        if (!my_tensor->defined()) continue;
        const std::int64_t bytes = row_bytes(*my_tensor);
        for_each_row(*my_tensor, [&](std::int64_t block, std::int64_t slot, std::int64_t head) {
          const std::uint8_t* my_row = row_address(*my_tensor, block, slot, head);
          const std::uint8_t* their_row = row_address(*their_tensor, block, slot, head);
          const bool is_written = written.count(block * block_size + slot) > 0;
          for (std::int64_t i = 0; i < bytes; ++i) {
            changed += !is_written && my_row[i] != fill ? 1 : 0;
            different += is_written && my_row[i] != their_row[i] ? 1 : 0;
          }
        });
      }
      const std::string label = side.label;
      replay.measure(label + " bytes of unwritten slots that changed", static_cast<double>(changed), 0.0);
      if (gate == nullptr) {
        replay.measure(label + " bytes that differ", static_cast<double>(different), 0.0);
      } else if (Status status = compare_rows(replay, side, *gate); !status) {
        return status;
      }
    }
  }
  return {};
}

// ---- reading ------------------------------------------------------------------------------------------------------

// The worst row's ||a - b|| / ||b||, both [num_tokens, Hq, head_size_v].
double worst_row_error(const Tensor& a, const Tensor& b) {
  double worst = 0.0;
  for (std::int64_t i = 0; i < b.shape[0]; ++i) {
    for (std::int64_t h = 0; h < b.shape[1]; ++h) {
      double difference = 0.0;
      double norm = 0.0;
      for (std::int64_t e = 0; e < b.shape[2]; ++e) {
        const double theirs = reference::element(b, i, h, e);
        const double delta = reference::element(a, i, h, e) - theirs;
        difference += delta * delta;
        norm += theirs * theirs;
      }
      worst = worse(worst, difference == 0.0 ? 0.0 : std::sqrt(difference / norm));
    }
  }
  return worst;
}

// An fp8 output against the float output it was made from: the worst |code * scale - clamp(out)|, as a share of half an
// fp8 step at out plus `slack` times the row's RMS.
double worst_fp8_error(const Tensor& codes, double scale, const Tensor& out, double slack) {
  double worst = 0.0;
  for (std::int64_t i = 0; i < out.shape[0]; ++i) {
    for (std::int64_t h = 0; h < out.shape[1]; ++h) {
      double squares = 0.0;
      for (std::int64_t e = 0; e < out.shape[2]; ++e) squares += std::pow(reference::element(out, i, h, e), 2);
      const double rms = std::sqrt(squares / static_cast<double>(out.shape[2]));
      for (std::int64_t e = 0; e < out.shape[2]; ++e) {
        const double exact = std::clamp(reference::element(out, i, h, e) / scale, -448.0, 448.0);
        // e4m3: 3 mantissa bits, the smallest normal number 2^-6.
        const double half_step = std::ldexp(0.5, std::max(std::ilogb(std::fabs(exact) + 1e-30), -6) - 3);
        const double error = std::fabs(reference::element(codes, i, h, e) - exact) * scale;
        worst = worse(worst, error / (half_step * scale + slack * rms));
      }
    }
  }
  return worst;
}

Status confirm_lengths(const GoldenCase& golden, const char* key, const std::vector<int>& actual) {
  if (!golden.params.contains(key)) return {};
  const json& stated = golden.params[key];
  if (stated.is_array() && stated == json(actual)) return {};
  return golden.refuse("parameter '" + std::string(key) + "' is " + stated.dump() + ", the tensors say " +
                       json(actual).dump());
}

Status replay_attention(Replay& replay) {
  const GoldenCase& golden = replay.golden;
  for (const auto& [name, ndim] : {std::pair{"query", 3}, {"out", 3}, {"seq_lens", 1}, {"block_table", 2}}) {
    if (Status status = golden.require(name, ndim); !status) return status;
  }
  UnifiedAttentionArgs args;
  args.mode = replay.mode.id;
  args.query = golden.tensor("query");
  std::vector<std::int32_t> one_token_each(static_cast<std::size_t>(args.query.shape[0]) + 1);
  if (golden.has("cu_seqlens_q")) {
    if (Status status = golden.require("cu_seqlens_q", 1); !status) return status;
    args.cu_seqlens_q = golden.tensor("cu_seqlens_q");
  } else {  // a decode of one token per sequence names none
    std::iota(one_token_each.begin(), one_token_each.end(), 0);
    args.cu_seqlens_q = Tensor::contiguous(one_token_each.data(), DType::kInt32, {args.query.shape[0] + 1});
  }
  args.seq_lens = golden.tensor("seq_lens");
  args.block_table = golden.tensor("block_table");
  const Tensor theirs = golden.tensor("out");
  const auto caches = caches_of(golden, replay.mode, args.query.shape[2], theirs.shape[2]);
  if (!caches.ok()) return caches.status();
  args.key_cache = caches->key;
  args.value_cache = caches->value;
  args.k_scale_cache = caches->k_scale;
  args.v_scale_cache = caches->v_scale;
  args.sinks = golden.tensor("sinks");
  args.alibi_slopes = golden.tensor("alibi_slopes");
  args.qq_bias = golden.tensor("qq_bias");
  args.mm_prefix_range = golden.tensor("mm_prefix_range");
  args.q_scale = golden.tensor("q_scale");
  args.k_scale = golden.tensor("k_scale");
  args.v_scale = golden.tensor("v_scale");
  if (!golden.params.contains("softmax_scale")) return golden.refuse("no parameter 'softmax_scale'");
  for (Status status :
       {golden.read("softmax_scale", &args.softmax_scale), golden.read("softcap", &args.softcap),
        golden.read("sliding_window", &args.sliding_window), golden.read("chunk_lookback", &args.chunk_lookback),
        golden.read("use_alibi_sqrt", &args.use_alibi_sqrt), golden.confirm("num_q_heads", args.query.shape[1]),
        golden.confirm("head_size", args.query.shape[2]), golden.confirm("head_size_v", theirs.shape[2]),
        golden.confirm("num_kv_heads", args.key_cache.shape[2]),
        golden.confirm("block_size", args.key_cache.shape[1])}) {
    if (!status) return status;
  }

  // In fp32 first: what the kernel computes, before any rounding of the output.
  args.out = replay.scratch.filled(theirs, DType::kFloat32, 0xFF);
  Tensor lse_shape = args.query;
  lse_shape.ndim = 2;
  args.lse = replay.scratch.filled(lse_shape, DType::kFloat32, 0xFF);
  const auto refused = [&](const Status& status) {
    replay.result.reason = "unified_attention: " + status.message();
    return Status();
  };
  // The CPU goes first, and alone with --device cpu: it looks at every length and block id, which the other devices and
  // the oracle take on trust.
  if (Status status = run_on(Device::kCpu, args, &unified_attention); !status) return refused(status);
  if (replay.device != Device::kCpu) {
    if (Status status = run_on(replay.device, args, &unified_attention); !status) return refused(status);
  }
  std::vector<int> query_lens;
  std::vector<int> seq_lens;
  for (std::int64_t b = 0; b < args.seq_lens.shape[0]; ++b) {
    const auto* ends = args.cu_seqlens_q.ptr<std::int32_t>();
    query_lens.push_back(ends[b + 1] - ends[b]);
    seq_lens.push_back(args.seq_lens.ptr<std::int32_t>()[b]);
  }
  if (Status status = confirm_lengths(golden, "query_lens", query_lens); !status) return status;
  if (Status status = confirm_lengths(golden, "seq_lens", seq_lens); !status) return status;

  UnifiedAttentionArgs oracle = args;
  oracle.out = replay.scratch.filled(theirs, DType::kFloat32, 0xFF);
  oracle.lse = replay.scratch.filled(lse_shape, DType::kFloat32, 0xFF);
  if (Status status = reference::unified_attention(oracle); !status) return golden.refuse(status.message());
  const double tolerance = oracle_tolerance(replay.device);
  replay.measure("output against the oracle", worst_row_error(args.out, oracle.out), tolerance);
  double lse_error = 0.0;
  for (std::int64_t i = 0; i < args.lse.shape[0]; ++i) {
    for (std::int64_t h = 0; h < args.lse.shape[1]; ++h) {
      const double mine = reference::element(args.lse, i, h);
      const double exact = reference::element(oracle.lse, i, h);
      lse_error = worse(lse_error, mine == exact ? 0.0 : std::fabs(mine - exact) / std::max(1.0, std::fabs(exact)));
    }
  }
  replay.measure("LSE against the oracle", lse_error, tolerance);

  // The gates of the file are for an output that is not rounded; the rounding is the next measure's.
  if (theirs.dtype == DType::kFloat8E4M3) {
    if (Status status = golden.require("output_scale", 1); !status) return status;
    args.output_scale = golden.tensor("output_scale");
    const double scale = reference::element(args.output_scale, 0);
    replay.measure("the file's fp8 output against this output",
                   worst_fp8_error(theirs, scale, args.out, kReadToleranceFp8Element), 1.0);
  } else {
    const core::FormatPair formats = core::formats_of(replay.mode, args.key_cache.dtype, args.value_cache.dtype);
    replay.measure("output against the file", worst_row_error(args.out, theirs),
                   std::max(read_tolerance(format::format_info(formats.key).name, args.query.dtype),
                            read_tolerance(format::format_info(formats.value).name, args.query.dtype)));
  }

  args.out = replay.scratch.filled(theirs, theirs.dtype, 0xFF);
  if (Status status = run_on(replay.device, args, &unified_attention); !status) return refused(status);
  const std::string what = std::string(dtype_name(theirs.dtype)) + " output against the oracle";
  if (theirs.dtype == DType::kFloat8E4M3) {
    // One element may be off by as much as the whole row's error: tolerance * norm = tolerance * sqrt(dv) * RMS.
    const double slack = tolerance * std::sqrt(static_cast<double>(theirs.shape[2]));
    const double scale = reference::element(args.output_scale, 0);
    replay.measure(what, worst_fp8_error(args.out, scale, oracle.out, slack), 1.0);
  } else {
    replay.measure(what, worst_row_error(args.out, oracle.out), tolerance + rounding_error(theirs.dtype));
  }
  return {};
}

// ---- kinds of cases -----------------------------------------------------------------------------------------------

Status replay_ops(const GoldenCase& golden, Device device, CaseResult& result) {
  std::string name = "auto";  // diffkv cases name none
  if (Status status = golden.read("mode", &name); !status) return status;
  if (Status status = golden.read("preset", &name); !status) return status;
  const auto skip = [&](const std::string& reason) {
    result.skipped = true;
    result.reason = reason;
    return Status();
  };
  const auto id = parse_kv_cache_dtype(name);
  if (!id.ok()) return skip("this build has no mode " + name);
  const auto mode = mode_info(*id);
  if (!mode.ok()) return mode.status();
  if (!mode->compiled) return skip("mode " + name + " was left out of this build");
  if (mode->key_format.empty()) return skip("no gates are known for mode " + name);

  if (mode->kv_quant_mode == KVQuantMode::kFp8PerTensor) {
    for (const char* scale : {"k_scale", "v_scale"}) {
      if (!golden.has(scale)) return golden.refuse(std::string("no tensor '") + scale + "'");
    }
  }
  Replay replay{golden, device, result, *mode, {}};
  const bool reads = golden.has("query");
  if (golden.has("key") || !reads) {
    if (Status status = replay_write(replay); !status || !result.reason.empty()) return status;
  }
  return reads ? replay_attention(replay) : Status();
}

Status replay_signs(const GoldenCase& golden, Device, CaseResult& result) {
  if (Status status = golden.require("signs", 1); !status) return status;
  const Tensor signs = golden.tensor("signs");
  if (signs.dtype != DType::kFloat32 || signs.shape[0] > format::kMaxHeadSize) {
    return golden.refuse("'signs' is " + to_string(signs) + ", needs at most 512 float32");
  }
  int different = 0;
  for (int i = 0; i < signs.shape[0]; ++i) {
    const float mine = format::apply_sign(1.0F, format::rht_sign_word(i / 32, format::kMaxHeadSize), i % 32);
    different += mine == signs.ptr<float>()[i] ? 0 : 1;
  }
  result.measures.push_back({"signs that differ", static_cast<double>(different), 0.0});
  return {};
}

template <int kBits>
double centroid_at(int code) {
  return format::centroid<kBits>(code);
}

// tq_centroids/<head size>_<bits>: the codebook of N(0, 1 / head size).
Status replay_centroids(const GoldenCase& golden, Device, CaseResult& result) {
  if (Status status = golden.require("centroids", 1); !status) return status;
  const Tensor theirs = golden.tensor("centroids");
  const std::string numbers = golden.name.substr(golden.name.find('/') + 1);
  const int head_size = std::atoi(numbers.c_str());
  const std::string bits = numbers.substr(std::min(numbers.find('_'), numbers.size()));
  double (*mine)(int) = bits == "_3" ? centroid_at<3> : bits == "_4" ? centroid_at<4> : nullptr;
  if (mine == nullptr || head_size < 1) return golden.refuse("its name is not tq_centroids/<head size>_<3 or 4>");
  if (theirs.dtype != DType::kFloat32 || theirs.shape[0] != (bits == "_3" ? 8 : 16)) {
    return golden.refuse("'centroids' is " + to_string(theirs) + ", needs one float32 per code");
  }
  double worst = 0.0;
  for (int i = 0; i < theirs.shape[0]; ++i) {
    const double exact = theirs.ptr<float>()[i] * std::sqrt(static_cast<double>(head_size));
    worst = worse(worst, std::fabs(mine(i) / exact - 1.0));
  }
  result.measures.push_back({"centroids, relative difference", worst, kCentroidTolerance});
  return {};
}

// e4b15/float16: Triton's code of every float16, by its bits.
Status replay_e4b15(const GoldenCase& golden, Device, CaseResult& result) {
  if (Status status = golden.require("codes", 1); !status) return status;
  const Tensor theirs = golden.tensor("codes");
  if (theirs.dtype != DType::kUInt8 || theirs.shape[0] != 1 << 16) {
    return golden.refuse("'codes' is " + to_string(theirs) + ", needs 65536 uint8");
  }
  int different = 0;
  for (int bits = 0; bits < 1 << 16; ++bits) {
    const std::uint8_t mine = format::E4B15::encode(format::half_to_float(static_cast<std::uint16_t>(bits)));
    different += mine == theirs.ptr<std::uint8_t>()[bits] ? 0 : 1;
  }
  result.measures.push_back({"codes that differ", static_cast<double>(different), 0.0});
  return {};
}

struct CaseKind {
  std::string_view prefix;
  const char* required_param;  // null: none
  Status (*replay)(const GoldenCase& golden, Device device, CaseResult& result);
};
constexpr CaseKind kCaseKinds[] = {
    {"write/", "mode", replay_ops},        {"attn/", "mode", replay_ops},
    {"diffkv/", nullptr, replay_ops},      {"turboquant/", "preset", replay_ops},
    {"rht_signs/", nullptr, replay_signs}, {"tq_centroids/", nullptr, replay_centroids},
    {"e4b15/", nullptr, replay_e4b15},
};

// What a case of each kind is made of, so that a lost or misnamed tensor is not taken for one that was never there.
// A column is a kind, in the order of kCaseKinds; R: every case has it, W: a case that is written has it, o: it may be
// there, -: it has no place there.
struct TensorRule {
  std::string_view tensor;
  char of_kind[std::size(kCaseKinds) + 1];
};
constexpr TensorRule kTensorRules[] = {
    {"key", "RWWR---"},           {"value", "RWWR---"},        {"slot_mapping", "RWWR---"},
    {"key_cache", "RR-----"},     {"value_cache", "RR-----"},  {"kv_cache", "--RR---"},
    {"query", "-RRR---"},         {"out", "-RRR---"},          {"seq_lens", "-RRR---"},
    {"block_table", "-RRR---"},   {"cu_seqlens_q", "-RR----"}, {"k_scale_cache", "oo-----"},
    {"v_scale_cache", "oo-----"}, {"k_scale", "ooo----"},      {"v_scale", "ooo----"},
    {"q_scale", "-oo----"},       {"output_scale", "-oo----"}, {"sinks", "-oo----"},
    {"alibi_slopes", "-oo----"},  {"qq_bias", "-oo----"},      {"mm_prefix_range", "-oo----"},
    {"midpoints", "---R---"},     {"signs", "----R--"},        {"centroids", "---R-R-"},
    {"codes", "------R"},
};

Status check_tensors(const GoldenCase& golden, const CaseKind& kind) {
  const auto column = static_cast<std::size_t>(&kind - kCaseKinds);
  const auto place = [&](std::string_view tensor) {
    const auto* rule = std::find_if(std::begin(kTensorRules), std::end(kTensorRules),
                                    [&](const TensorRule& known) { return known.tensor == tensor; });
    return rule == std::end(kTensorRules) ? '-' : rule->of_kind[column];
  };
  std::string known;
  for (const TensorRule& rule : kTensorRules) {
    if (rule.of_kind[column] != '-') known.append(known.empty() ? "" : ", ").append(rule.tensor);
  }
  bool written = false;
  for (const auto& [name, tensor] : golden.tensors) {
    if (place(name) == '-') return golden.refuse("tensor '" + name + "' has no meaning; supported are " + known);
    written = written || place(name) == 'W';
  }
  for (const TensorRule& rule : kTensorRules) {
    const char needed = rule.of_kind[column];
    if ((needed == 'R' || (needed == 'W' && written)) && !golden.has(rule.tensor)) {
      return golden.refuse("no tensor '" + std::string(rule.tensor) + "'");
    }
  }
  if (kind.required_param != nullptr && !golden.params.contains(kind.required_param)) {
    return golden.refuse(std::string("no parameter '") + kind.required_param + "'");
  }
  return {};
}

Result<std::vector<GoldenCase>> cases_of(const llm::SafetensorsFile& file) {
  std::map<std::string, GoldenCase> cases;
  for (const std::string& name : file.names()) {
    const std::size_t slash = name.rfind('/');
    if (slash == std::string::npos) {
      return invalid_argument(file.path() + ": tensor '" + name + "' belongs to no case; names are <case>/<tensor>");
    }
    const auto tensor = file.tensor(name);
    if (!tensor.ok()) return tensor.status();
    GoldenCase& golden = cases[name.substr(0, slash)];
    golden.name = name.substr(0, slash);
    golden.where = file.path() + ": case '" + golden.name + "'";
    golden.tensors.emplace(name.substr(slash + 1), *tensor);
  }
  for (const auto& [name, text] : file.metadata()) {
    const auto found = cases.find(name);
    if (found == cases.end())
      return invalid_argument(file.path() + ": metadata of case '" + name + "', but no tensors");
    GoldenCase& golden = found->second;
    golden.params = json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (!golden.params.is_object()) return golden.refuse("its parameters are not a JSON object");
  }
  std::vector<GoldenCase> list;
  for (auto& [name, golden] : cases) list.push_back(std::move(golden));
  return list;
}

}  // namespace

bool CaseResult::pass() const {
  return !skipped && reason.empty() && !measures.empty() &&
         std::all_of(measures.begin(), measures.end(), [](const Measure& measure) { return measure.pass(); });
}

const Measure* CaseResult::worst() const {
  const auto share = [](const Measure& measure) {
    if (measure.error == 0.0) return 0.0;
    const double ratio = measure.error / measure.tolerance;
    return std::isnan(ratio) ? kInfinity : ratio;
  };
  const auto found = std::max_element(measures.begin(), measures.end(),
                                      [&](const Measure& a, const Measure& b) { return share(a) < share(b); });
  return found == measures.end() ? nullptr : &*found;
}

Result<std::vector<CaseResult>> replay_golden_file(const std::string& path, Device device) {
  if (Status status = device_available(device); !status) return status;
  const auto file = llm::SafetensorsFile::open(path);
  if (!file.ok()) return file.status();
  const auto cases = cases_of(*file);
  if (!cases.ok()) return cases.status();
  std::vector<CaseResult> results;
  for (const GoldenCase& golden : *cases) {
    const auto* kind = std::find_if(std::begin(kCaseKinds), std::end(kCaseKinds),
                                    [&](const CaseKind& known) { return golden.name.rfind(known.prefix, 0) == 0; });
    if (kind == std::end(kCaseKinds)) return golden.refuse("no known kind of case; names begin with write/, attn/, ..");
    if (Status status = check_tensors(golden, *kind); !status) return status;
    CaseResult result;
    result.name = golden.name;
    if (Status status = kind->replay(golden, device, result); !status) return status;
    results.push_back(std::move(result));
  }
  return results;
}

}  // namespace quire::cli
