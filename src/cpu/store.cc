// reshape_and_cache on the CPU: each row is converted to fp32, encoded by its format, and written to its slot.
#include <algorithm>
#include <cstring>

#include "attention/paged_rows.h"
#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace quire::cpu {
namespace {

using format::FormatInfo;
using format::MetaPlace;

// One of the two tensors of a call: its input rows, its cache, its format.
struct Side {
  const ConstTensor& input;
  const Tensor& cache;
  attention::WritablePagedRows rows;
  ScaleView tensor_scale;
  const FormatInfo& format;
  decltype(Kernels::load_row) load;
  Kernels::EncodeRows encode;
  format::RowShape shape;

  const std::uint8_t* input_row(std::int64_t token, std::int64_t head) const {
    return input.ptr<const std::uint8_t>() +
           (token * input.strides[0] + head * input.strides[1]) * static_cast<std::int64_t>(dtype_bytes(input.dtype));
  }
  // Input already in the cache's float type is copied, not converted: that would keep every bit, too.
  bool copies() const { return input.dtype == cache.dtype || dtype_bytes(input.dtype) == 1; }
};

// Where a row goes.
struct Target {
  std::uint8_t* data;
  std::uint8_t* meta;
};

// Neighbouring heads of a token, num <= kRowsTogether.
constexpr int kRowsTogether = 4;
void store_rows(const Side& side, std::int64_t token, std::int64_t block, std::int64_t head, const Target* targets,
                int num) {
  const auto head_size = static_cast<std::size_t>(side.shape.head_size);
  const std::size_t element = dtype_bytes(side.input.dtype);
  alignas(64) std::uint8_t gathered[format::kMaxHeadSize * sizeof(float)];
  alignas(64) float y[kRowsTogether][format::kMaxHeadSize];
  EncodeJob jobs[kRowsTogether];
  for (int r = 0; r < num; ++r) {
    const std::uint8_t* input = side.input_row(token, head + r);
    if (side.input.strides[2] != 1) {
      const std::int64_t stride = side.input.strides[2] * static_cast<std::int64_t>(element);
      for (std::size_t i = 0; i < head_size; ++i) {
        std::memcpy(gathered + i * element, input + static_cast<std::int64_t>(i) * stride, element);
      }
      input = gathered;
    }
    if (side.copies()) {
      std::memcpy(targets[r].data, input, head_size * element);
      continue;
    }
    side.load(input, side.input.dtype, side.shape.head_size, y[r]);
    jobs[r] = {y[r], side.rows.side(block, head + r), targets[r].data, targets[r].meta};
    jobs[r].side.tensor_scale = side.tensor_scale.at(0, head + r);
  }
  if (!side.copies()) side.encode(jobs, num, side.shape);
}

void store_paged(const Side& side, const StoreProblem& problem, std::int64_t token, std::int64_t slot) {
  const std::int64_t block = slot / problem.block_size;
  const std::int64_t offset = slot % problem.block_size;
  for (int head = 0; head < problem.num_kv_heads; head += kRowsTogether) {
    const int num = std::min(kRowsTogether, problem.num_kv_heads - head);
    Target targets[kRowsTogether];
    for (int r = 0; r < num; ++r) {
      std::uint8_t* data = side.rows.row(block, offset, head + r);
      targets[r] = {data, nullptr};
      if (side.format.meta_place == MetaPlace::kInRow) {
        targets[r].meta = data + side.format.code_bytes(side.shape.head_size);
      }
      if (side.format.meta_place == MetaPlace::kScaleCache) {
        targets[r].meta = side.rows.scale(block, offset, head + r);
      }
    }
    store_rows(side, token, block, head, targets, num);
  }
}

// Element i of a row goes to [block, head, i / x, offset, i % x] (K) or [block, head, i, offset] (V).
void store_head_major(const Side& side, const StoreProblem& problem, bool is_key, std::int64_t token,
                      std::int64_t slot) {
  const std::int64_t block = slot / problem.block_size;
  const std::int64_t offset = slot % problem.block_size;
  const auto element = static_cast<std::int64_t>(dtype_bytes(side.cache.dtype));
  for (int head = 0; head < problem.num_kv_heads; ++head) {
    alignas(64) std::uint8_t row[format::kMaxHeadSize * sizeof(float)];
    const Target target{row, nullptr};
    store_rows(side, token, block, head, &target, 1);
    const std::int64_t* s = side.cache.strides;
    std::uint8_t* base = side.cache.ptr<std::uint8_t>() + (block * s[0] + head * s[1]) * element;
    for (int i = 0; i < side.shape.head_size; ++i) {
      const int x = problem.head_major_x;
      const std::int64_t at = is_key ? i / x * s[2] + offset * s[3] + i % x * s[4] : i * s[2] + offset * s[3];
      std::memcpy(base + at * element, row + i * element, static_cast<std::size_t>(element));
    }
  }
}

}  // namespace

Status reshape_and_cache(const ReshapeAndCacheArgs& args, const StoreProblem& problem) {
  const Kernels& k = kernels();
  const auto make_side = [&](const ConstTensor& input, const Tensor& cache, const attention::SideTensors<void>& tensors,
                             const ConstTensor& tensor_scale, format::FormatId id, int head_size) {
    Side side{input,
              cache,
              {},
              make_scale_view(tensor_scale),
              format::format_info(id),
              k.load_row,
              k.encode_rows[static_cast<std::size_t>(id)],
              format::row_shape(head_size)};
    attention::set_paged_rows(side.rows, cache, tensors);
    return side;
  };
  const KVCacheViews& cache = args.cache;
  const Side sides[2] = {
      make_side(args.key, cache.key_cache, {cache.k_scale_cache, cache.k_page_meta, cache.k_head_vector}, args.k_scale,
                problem.key_format, problem.head_size),
      make_side(args.value, cache.value_cache, {cache.v_scale_cache, cache.v_page_meta, cache.v_head_vector},
                args.v_scale, problem.value_format, problem.head_size_v)};
  constexpr std::int64_t kNeighbours = 16;
  const bool wide_slots = args.slot_mapping.dtype == DType::kInt64;
  const std::int64_t slot_stride = args.slot_mapping.strides[0];
  const int parts = problem.num_tokens > 1 ? num_parts() : 1;
  run_parts(parts, [&](int part) {
    for (std::int64_t token = 0; token < problem.num_tokens; ++token) {
      const std::int64_t slot = wide_slots ? args.slot_mapping.ptr<const std::int64_t>()[token * slot_stride]
                                           : args.slot_mapping.ptr<const std::int32_t>()[token * slot_stride];
      // A slot belongs to one part, so duplicates never tear a row. Neighbours belong together: they share cache lines.
      if (slot < 0 || slot / kNeighbours % parts != part) continue;
      for (const Side& side : sides) {
        if (problem.head_major_x > 0) {
          store_head_major(side, problem, &side == &sides[0], token, slot);
        } else {
          store_paged(side, problem, token, slot);
        }
      }
    }
  });
  return {};
}

}  // namespace quire::cpu
