#include <algorithm>
#include <cmath>
#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "format/formats.h"
#include "format/row.h"
#include "golden_gates.h"
#include "golden_replay.h"
#include "reference/attention.h"

namespace quire::cli {
namespace {

using format::FormatId;

std::uint8_t* row_address(const Tensor& cache, std::int64_t block, std::int64_t slot, std::int64_t head) {
  const std::int64_t offset = block * cache.strides[0] + slot * cache.strides[1] + head * cache.strides[2];
  return cache.ptr<std::uint8_t>() + offset * static_cast<std::int64_t>(dtype_bytes(cache.dtype));
}

// The bytes of a row of a cache, or of an entry of a scale cache.
std::int64_t row_bytes(const Tensor& cache) {
  return (cache.ndim == 4 ? cache.shape[3] : 1) * static_cast<std::int64_t>(dtype_bytes(cache.dtype));
}

std::int64_t integer_at(const ConstTensor& tensor, std::int64_t i) {
  return tensor.dtype == DType::kInt64 ? tensor.ptr<const std::int64_t>()[i] : tensor.ptr<const std::int32_t>()[i];
}

// K or V: one stored tensor of a case, as quire wrote it and as the file has it.
struct Side {
  const char* label;
  FormatId format;
  Tensor input;  // [T, Hk, head_size]
  Tensor mine, theirs;
  Tensor my_scales, their_scales;
};

// The codes of one row as numbers, with the zero point subtracted, and its scale.
struct DecodedRow {
  std::vector<float> codes;
  double scale = 0.0;
  double offset = 0.0;
};

// The metadata inside a row, or null.
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

// Whether 0 lies outside of the range of the row as the format sees it, that is, after its rotation.
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
      const Tensor none;
      for (int which = 0; which < 2; ++which) {
        if (Status status = reference::decode_cache_row(side.format, {*stored[which][0], *stored[which][1], none, none},
                                                        block, offset, head, head_size, errors[which].data());
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

}  // namespace

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
                                     {"block_size", theirs->key_cache.shape[1]},
                                     {"num_kv_heads", theirs->key_cache.shape[2]}}) {
    if (Status status = golden.confirm(name, actual); !status) return status;
  }

  // The case is written over a cleared cache and over one of 0xFF, since what was there before must not matter.
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
    args.cache = *mine;
    if (Status status = run_on(replay.device, args, &reshape_and_cache); !status) {
      replay.result.reason = "reshape_and_cache: " + status.message();
      return {};
    }

    const std::int64_t block_size = mine->key_cache.shape[1];
    std::set<std::int64_t> written;
    for (std::int64_t t = 0; t < args.slot_mapping.shape[0]; ++t) written.insert(integer_at(args.slot_mapping, t));
    const FormatId key_format = reference::resolve_format(replay.mode.key_format, mine->key_cache.dtype);
    const FormatId value_format = reference::resolve_format(replay.mode.value_format, mine->value_cache.dtype);
    const Side sides[] = {
        {"K", key_format, key, mine->key_cache, theirs->key_cache, mine->k_scale_cache, theirs->k_scale_cache},
        {"V", value_format, value, mine->value_cache, theirs->value_cache, mine->v_scale_cache, theirs->v_scale_cache},
    };
    for (const Side& side : sides) {
      const WriteGate* gate = find_write_gate(format::format_info(side.format).name);
      std::int64_t changed = 0;
      std::int64_t different = 0;
      const auto compare_bytes = [&](const Tensor& my_tensor, const Tensor& their_tensor) {
        if (!my_tensor.defined()) return;
        const std::int64_t bytes = row_bytes(my_tensor);
        for_each_row(my_tensor, [&](std::int64_t block, std::int64_t slot, std::int64_t head) {
          const std::uint8_t* my_row = row_address(my_tensor, block, slot, head);
          const std::uint8_t* their_row = row_address(their_tensor, block, slot, head);
          const bool is_written = written.count(block * block_size + slot) > 0;
          for (std::int64_t i = 0; i < bytes; ++i) {
            changed += !is_written && my_row[i] != fill ? 1 : 0;
            different += is_written && my_row[i] != their_row[i] ? 1 : 0;
          }
        });
      };
      compare_bytes(side.mine, side.theirs);
      compare_bytes(side.my_scales, side.their_scales);
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

}  // namespace quire::cli
