// reshape_and_cache on the CPU: each row is converted to fp32, encoded by its format, and written to its slot.
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
  Kernels::EncodeRow encode;
  format::RowShape shape;

  const std::uint8_t* input_row(std::int64_t token, std::int64_t head) const {
    return input.ptr<const std::uint8_t>() +
           (token * input.strides[0] + head * input.strides[1]) * static_cast<std::int64_t>(dtype_bytes(input.dtype));
  }
  // Input already in the cache's fp8 is copied, not converted.
  bool copies() const { return dtype_bytes(input.dtype) == 1; }
};

void store_row(const Side& side, std::int64_t token, std::int64_t block, std::int64_t head, std::uint8_t* data,
               std::uint8_t* meta) {
  const std::uint8_t* input = side.input_row(token, head);
  const auto head_size = static_cast<std::size_t>(side.shape.head_size);
  alignas(64) std::uint8_t gathered[format::kMaxHeadSize * sizeof(float)];
  if (side.input.strides[2] != 1) {
    const std::size_t element = dtype_bytes(side.input.dtype);
    const std::int64_t stride = side.input.strides[2] * static_cast<std::int64_t>(element);
    for (std::size_t i = 0; i < head_size; ++i) {
      std::memcpy(gathered + i * element, input + static_cast<std::int64_t>(i) * stride, element);
    }
    input = gathered;
  }
  if (side.copies()) {
    std::memcpy(data, input, head_size);
    return;
  }
  alignas(64) float y[format::kMaxHeadSize];
  side.load(input, side.input.dtype, side.shape.head_size, y);
  format::SideInputs inputs = side.rows.side(block, head);
  inputs.tensor_scale = side.tensor_scale.at(0, head);
  side.encode(y, side.shape, inputs, data, meta);
}

void store_paged(const Side& side, const StoreProblem& problem, std::int64_t token, std::int64_t slot) {
  const std::int64_t block = slot / problem.block_size;
  const std::int64_t offset = slot % problem.block_size;
  for (int head = 0; head < problem.num_kv_heads; ++head) {
    std::uint8_t* data = side.rows.row(block, offset, head);
    std::uint8_t* meta = nullptr;
    if (side.format.meta_place == MetaPlace::kInRow) meta = data + side.format.code_bytes(side.shape.head_size);
    if (side.format.meta_place == MetaPlace::kScaleCache) meta = side.rows.scale(block, offset, head);
    store_row(side, token, block, head, data, meta);
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
    store_row(side, token, block, head, row, nullptr);
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
              k.encode_row[static_cast<std::size_t>(id)],
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
