#include "cpu/scratch.h"

#include <algorithm>
#include <limits>

#include "cpu/load.h"

namespace quire::cpu {

std::size_t Scratch::lay_out(const AttentionCall& call, int num_heads, int rows, std::uint8_t* base) {
  const int set_rows = (rows + call.k.blocks - 1) / call.k.blocks * call.k.blocks;  // products of bytes: whole sets
  std::size_t bytes = 0;
  const auto take = [&]<class T>(T*& at, std::int64_t count) {
    at = base == nullptr ? nullptr : reinterpret_cast<T*>(base + bytes);
    bytes += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
  };
  for (int h = 0; h < num_heads; ++h) {
    Head& head = heads[h];
    take(head.q, static_cast<std::int64_t>(rows) * call.k_stride);
    take(head.q_sum, rows);
    if (call.k_in_pairs()) {
      head.queries.parts = call.query_parts;
      head.queries.positions = call.k_positions;
      head.queries.part_stride = static_cast<std::int64_t>(rows) * call.k_positions;
      take(head.queries.data, static_cast<std::int64_t>(set_rows) * call.query_parts * call.k_positions);
      take(head.queries.step, rows);
      take(head.queries.byte_step, std::int64_t{4} * call.k.blocks);
      take(head.queries.centre, std::int64_t{4} * call.k.blocks);
    }
    take(head.acc, static_cast<std::int64_t>(rows) * call.acc_stride);
    take(head.offset_sum, rows);
    take(head.state, rows);
    take(head.total, static_cast<std::int64_t>(rows) * call.v_stride);
    take(head.total_state, rows);
  }
  take(scores, static_cast<std::int64_t>(set_rows) * kKeyTile);
  take(weights, std::int64_t{2} * rows * kKeyTile);
  take(unit, rows);
  take(row, call.acc_stride);
  take(keys, std::int64_t{2} * kKeyGroup * call.k_positions);
  // 16-bit operands, or fp32.
  const int key_words = call.k_in_pairs() ? call.k_positions : 2 * call.k_stride;
  take(columns, static_cast<std::int64_t>(rows > kFewRows ? kKeyTile : 0) * key_words);
  take(values, static_cast<std::int64_t>(kKeyTile) * call.v_positions);
  take(scale, kKeyTile);
  take(offset, kKeyTile);
  take(k_scales, call.key.scales_side_by_side() ? num_heads : 0);
  take(v_scales, call.value.scales_side_by_side() ? num_heads : 0);
  take(k_tile.levels, static_cast<std::int64_t>(kKeyTile) * call.k_stride);
  take(v_tile.levels, static_cast<std::int64_t>(kKeyTile) * call.v_stride);
  k_tile.stride = call.k_stride;
  v_tile.stride = call.v_stride;
  loaded = nullptr;
  return bytes;
}

namespace {
// Of int16 queries: so that sums of their products fit 32 bits, and the high byte of a query, rounded, 8.
float largest_query(const AttentionCall& call) {
  constexpr std::int64_t kMost = 127 * 256 + 127;
  const std::int64_t products = std::int64_t{call.shape.head_size} * std::max(1, call.key.operands.max_level);
  return static_cast<float>(std::min(kMost, std::numeric_limits<std::int32_t>::max() / products));
}
}  // namespace

void load_queries(const AttentionCall& call, const QueryTile& tile, HeadRange heads, Scratch& scratch) {
  if (scratch.loaded == &tile && scratch.loaded_head == heads.first) return;
  scratch.loaded = &tile;
  scratch.loaded_head = heads.first;
  const ConstTensor& query = call.args.query;
  const std::int64_t first = call.int_at(call.args.cu_seqlens_q, tile.batch) + tile.first_row;
  for (int h = 0; h < heads.count; ++h) {
    const RowOf rows{call.shape.group_size(), heads.first + h};
    const int num_rows = tile.num_tokens * rows.group;
    Scratch::Head& head = scratch.heads[h];
    for (int m = 0; m < num_rows; ++m) {
      float* q = head.q + static_cast<std::int64_t>(m) * call.k_stride;
      const std::int64_t at = (first + rows.token(m)) * query.strides[0] + rows.head(m) * query.strides[1];
      call.k.load_row(query.ptr<const std::uint8_t>() + at * static_cast<std::int64_t>(dtype_bytes(query.dtype)),
                      query.dtype, call.shape.head_size, q);
      call.k.rotate(call.key.rotation, q, call.key.shape);
      std::fill(q + call.shape.head_size, q + call.k_stride, 0.0F);
      float sum = 0.0F;
      for (int i = 0; i < call.shape.head_size; ++i) sum += q[i];
      head.q_sum[m] = sum;
    }
    if (!call.k_in_pairs()) continue;
    if (call.key_bytes && num_rows <= call.k.blocks) {
      call.key.operands.make_byte_queries(head.q, num_rows, call.k_stride, call.key.shape, largest_query(call),
                                          head.queries);
      continue;
    }
    call.k.make_queries(call.key.operands.operand, head.q, num_rows, call.k_stride, call.k_order, largest_query(call),
                        head.queries);
  }
}

}  // namespace quire::cpu
