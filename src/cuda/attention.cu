// The host side of the attention kernels: the plan that chooses among them, their parameters, the merge of their
// partial results, and merge_attn_states.
//
//   decode_split (decode.cuh)               tensor cores; sequences of few query rows
//   prefill_split (prefill.cuh)             tensor cores; sequences of many query rows
//   prefill_split_sm90 (prefill_sm90.cuh)   the same on Hopper, for head sizes up to 128
//   attend_split (attention.cuh)            fp32 arithmetic: every dtype, alignment and head size

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <utility>

#include "cuda/cuda.h"
#include "cuda/kernel/attend_split/kernel.cuh"
#include "cuda/kernel/decode_split/kernel.cuh"
#include "cuda/kernel/prefill_split/kernel.cuh"
#include "cuda/launch.h"

namespace quire::cuda {

#define QUIRE_CUDA_PAIR(Key, Value)                                                                                   \
  extern template cudaError_t launch_attention<format::Key, format::Value>(const AttentionParams&, std::int64_t, int, \
                                                                           cudaStream_t);
#include "cuda/pairs.def"
#undef QUIRE_CUDA_PAIR
#define QUIRE_CUDA_TENSOR_PAIR(Key, Value, kHead)                                                                     \
  extern template cudaError_t launch_decode<format::Key, format::Value, kHead>(const AttentionParams&, std::int64_t,  \
                                                                               int, cudaStream_t);                    \
  extern template cudaError_t launch_prefill<format::Key, format::Value, kHead>(const AttentionParams&, std::int64_t, \
                                                                                int, cudaStream_t);
#include "cuda/pairs.def"
#undef QUIRE_CUDA_TENSOR_PAIR

namespace {

using AttentionLauncher = cudaError_t(const AttentionParams&, std::int64_t, int, cudaStream_t);

constexpr PairEntry<AttentionLauncher> kAttentionLaunchers[] = {
#define QUIRE_CUDA_PAIR(Key, Value) \
  {format::format_id<format::Key>, format::format_id<format::Value>, &launch_attention<format::Key, format::Value>},
#include "cuda/pairs.def"
#undef QUIRE_CUDA_PAIR
};

// The tensor-core kernels of a pair, for head sizes up to max_head_size.
struct TensorEntry {
  format::FormatId key, value;
  int max_head_size;
  int prefill_rows;  // of a row tile
  AttentionLauncher* decode;
  AttentionLauncher* prefill;
};
constexpr TensorEntry kTensorEntries[] = {
#define QUIRE_CUDA_TENSOR_PAIR(Key, Value, kHead)     \
  {format::format_id<format::Key>,                    \
   format::format_id<format::Value>,                  \
   kHead,                                             \
   kPrefillRows<kHead>,                               \
   &launch_decode<format::Key, format::Value, kHead>, \
   &launch_prefill<format::Key, format::Value, kHead>},
#include "cuda/pairs.def"
#undef QUIRE_CUDA_TENSOR_PAIR
};

// The kernels that serve a problem on tensor cores, the smallest head-size class first; null: attend_split serves it.
const TensorEntry* find_tensor_kernels(const AttentionProblem& problem, format::FormatId key, format::FormatId value) {
  // 16-bit products would round an fp32 query.
  if (problem.query_dtype == DType::kFloat32) return nullptr;
  const auto raw = [&](format::FormatId id, bool is_key) {
    const DType dtype = format::format_info(id).cache_dtype;
    // A 16-bit cache is multiplied as it lies: aligned, and by a query that its type can hold.
    if (dtype == DType::kBFloat16)
      return problem.row_alignment >= 16 && !(is_key && problem.query_dtype == DType::kFloat16);
    if (dtype == DType::kFloat16) return problem.row_alignment >= 16;
    return true;
  };
  if (key == format::FormatId::kNone || value == format::FormatId::kNone || !raw(key, true) || !raw(value, false))
    return nullptr;
  for (const TensorEntry& entry : kTensorEntries) {
    if (entry.key == key && entry.value == value &&
        std::max(problem.head_size, problem.head_size_v) <= entry.max_head_size) {
      return &entry;
    }
  }
  return nullptr;
}

// Folds the splits of one (token, head) in key order and finishes the row. One block per row.
__global__ void __launch_bounds__(kAttentionThreads) merge_splits(const __grid_constant__ AttentionParams p) {
  __shared__ float row[format::kMaxHeadSize];
  const std::int64_t index = blockIdx.x;
  const std::int64_t token = index / p.num_q_heads;
  const int head = static_cast<int>(index - token * p.num_q_heads);
  if (token >= p.cu_seqlens_q[p.batch * p.cu_stride]) return;
  const float2* states = p.partials.state + index * p.max_splits;
  const float* partial = p.partials.acc + index * p.max_splits * p.head_size_v;

  attention::SoftmaxState state;
  for (int s = 0; s < p.max_splits; ++s) state.max = exact::max(state.max, states[s].x);
  float acc[kMaxColumns] = {};
  for (int s = 0; s < p.max_splits; ++s) {
    if (states[s].y == 0.0F) continue;  // no visible key: its accumulator is not looked at
    const float factor = attention::rescale(states[s].x, state.max);
    state.sum = fmaf(states[s].y, factor, state.sum);
#pragma unroll
    for (int i = 0; i < kMaxColumns; ++i) {
      const int column = static_cast<int>(threadIdx.x) + i * kAttentionThreads;
      if (column < p.head_size_v) acc[i] = fmaf(partial[s * p.head_size_v + column], factor, acc[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kMaxColumns; ++i) {
    const int column = static_cast<int>(threadIdx.x) + i * kAttentionThreads;
    if (column < p.head_size_v) row[column] = acc[i];
  }
  __syncthreads();
  if (threadIdx.x < 32) finish_row(p.output, row, state, token, head, static_cast<int>(threadIdx.x));
}

// A part of merge_attn_states. Strides in bytes for out, in elements for lse.
struct MergePart {
  std::uint8_t* out = nullptr;  // [num_tokens, num_heads, head_size_v]
  std::int64_t token_stride = 0, head_stride = 0, element_stride = 0;
  DType dtype = DType::kFloat32;
  float* lse = nullptr;  // [num_tokens, num_heads]
  std::int64_t lse_token_stride = 0, lse_head_stride = 0;
};
struct MergeParams {
  MergePart prefix, suffix, merged;
  std::int64_t num_rows = 0;
  int num_heads = 0, head_size_v = 0;
};

// One warp per row: it has read both LSEs before it writes one, so the result may alias a part.
__global__ void __launch_bounds__(kAttentionThreads) merge_states(const __grid_constant__ MergeParams p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (index >= p.num_rows) return;
  const std::int64_t token = index / p.num_heads;
  const std::int64_t head = index - token * p.num_heads;
  const auto lse_at = [&](const MergePart& part) {
    return part.lse + token * part.lse_token_stride + head * part.lse_head_stride;
  };
  const auto out_at = [&](const MergePart& part, int i) {
    return part.out + token * part.token_stride + head * part.head_stride + i * part.element_stride;
  };
  const float a = *lse_at(p.prefix);
  const float b = *lse_at(p.suffix);
  __syncwarp();
  const float max = fmaxf(a, b);
  const float weight_a = a == -INFINITY ? 0.0F : expf(a - max);
  const float weight_b = b == -INFINITY ? 0.0F : expf(b - max);
  const float sum = weight_a + weight_b;
  const float inverse = sum == 0.0F ? 0.0F : 1.0F / sum;
  for (int i = lane; i < p.head_size_v; i += 32) {
    float x = 0.0F;
    if (a != -INFINITY) x = weight_a * inverse * load_float(out_at(p.prefix, i), p.prefix.dtype);
    if (b != -INFINITY) x += weight_b * inverse * load_float(out_at(p.suffix, i), p.suffix.dtype);
    std::uint8_t* to = out_at(p.merged, i);
    if (p.merged.dtype == DType::kFloat32) {
      *reinterpret_cast<float*>(to) = x;
    } else {
      *reinterpret_cast<std::uint16_t*>(to) =
          p.merged.dtype == DType::kFloat16 ? format::float_to_half(x) : format::float_to_bfloat16(x);
    }
  }
  if (lane == 0 && p.merged.lse != nullptr) *lse_at(p.merged) = sum == 0.0F ? -INFINITY : max + logf(sum);
}

MergePart make_part(const Tensor& out, const Tensor& lse) {
  const auto bytes = static_cast<std::int64_t>(dtype_bytes(out.dtype));
  MergePart part;
  part.out = out.ptr<std::uint8_t>();
  part.token_stride = out.strides[0] * bytes;
  part.head_stride = out.strides[1] * bytes;
  part.element_stride = out.strides[2] * bytes;
  part.dtype = out.dtype;
  if (lse.defined()) {
    part.lse = lse.ptr<float>();
    part.lse_token_stride = lse.strides[0];
    part.lse_head_stride = lse.strides[1];
  }
  return part;
}

CacheSide make_cache_side(const Tensor& cache, const Tensor& scale_cache, format::FormatId id, int head_size) {
  const auto bytes = static_cast<std::int64_t>(dtype_bytes(cache.dtype));
  const format::FormatInfo& info = format::format_info(id);
  CacheSide side;
  side.data = cache.ptr<const std::uint8_t>();
  side.block_stride = cache.strides[0] * bytes;
  side.slot_stride = cache.strides[1] * bytes;
  side.head_stride = cache.strides[2] * bytes;
  side.access = access_bytes(cache.data, {side.block_stride, side.slot_stride, side.head_stride,
                                          info.code_bytes(head_size), info.code_bytes(kChunk)});
  side.row_access = access_bytes(cache.data, {side.block_stride, side.slot_stride, side.head_stride});
  if (scale_cache.defined()) {
    side.scales = scale_cache.ptr<const std::uint8_t>();
    side.scale_block_stride = scale_cache.strides[0] * 4;
    side.scale_slot_stride = scale_cache.strides[1] * 4;
    side.scale_head_stride = scale_cache.strides[2] * 4;
  }
  return side;
}

// Rows [.., .., head_size] of 16-bit elements that are whole 16-byte vectors.
bool whole_vectors(const Tensor& rows) {
  return dtype_bytes(rows.dtype) == 2 &&
         access_bytes(rows.data, {rows.strides[0] * 2, rows.strides[1] * 2, rows.shape[2] * 2}) >= 16;
}

AttentionParams make_params(const AttentionPlan& plan, const UnifiedAttentionArgs& args, const AttentionShape& shape) {
  AttentionParams p;
  p.query = args.query.ptr<const std::uint8_t>();
  p.query_dtype = args.query.dtype;
  p.query_element_bytes = static_cast<int>(dtype_bytes(args.query.dtype));
  p.query_token_stride = args.query.strides[0] * p.query_element_bytes;
  p.query_head_stride = args.query.strides[1] * p.query_element_bytes;
  p.query_vectors = whole_vectors(args.query);
  p.key = make_cache_side(args.key_cache, args.k_scale_cache, shape.key_format, shape.head_size);
  p.value = make_cache_side(args.value_cache, args.v_scale_cache, shape.value_format, shape.head_size_v);

  p.cu_seqlens_q = args.cu_seqlens_q.ptr<const std::int32_t>();
  p.cu_stride = args.cu_seqlens_q.strides[0];
  p.seq_lens = args.seq_lens.ptr<const std::int32_t>();
  p.seq_stride = args.seq_lens.strides[0];
  p.block_table = args.block_table.ptr<const std::int32_t>();
  p.table_batch_stride = args.block_table.strides[0];
  p.table_block_stride = args.block_table.strides[1];

  p.mask = attention::make_mask_rule(args.sliding_window, args.chunk_lookback, args.mm_prefix_clamp_window);
  p.causal = args.causal;
  if (args.causal_per_seq.defined()) {
    p.causal_per_seq = args.causal_per_seq.ptr<const std::uint8_t>();
    p.causal_stride = args.causal_per_seq.strides[0];
  }
  if (args.mm_prefix_range.defined()) {
    p.ranges = args.mm_prefix_range.ptr<const std::int32_t>();
    p.ranges_batch_stride = args.mm_prefix_range.strides[0];
    p.range_stride = args.mm_prefix_range.strides[1];
    p.bound_stride = args.mm_prefix_range.strides[2];
    p.num_ranges = shape.num_mm_ranges;
  }

  p.softcap = args.softcap;
  if (args.alibi_slopes.defined()) {
    p.alibi_slopes = args.alibi_slopes.ptr<const float>();
    p.alibi_stride = args.alibi_slopes.strides[0];
  }
  p.alibi_sqrt = args.use_alibi_sqrt;
  if (args.qq_bias.defined()) {
    p.qq_bias = args.qq_bias.ptr<const float>();
    p.qq_row_stride = args.qq_bias.strides[0];
    p.qq_column_stride = args.qq_bias.strides[1];
    p.qq_size = shape.qq_bias_size;
  }
  p.softmax_scale = args.softmax_scale;
  p.q_scale = make_scale_view(args.q_scale);
  p.k_scale = make_scale_view(args.k_scale);
  p.v_scale = make_scale_view(args.v_scale);

  p.num_tokens = shape.num_tokens;
  p.batch = shape.batch;
  p.num_q_heads = shape.num_q_heads;
  p.group_size = shape.group_size();
  p.head_size = shape.head_size;
  p.head_size_v = shape.head_size_v;
  p.num_blocks = shape.num_blocks;
  p.max_blocks = shape.max_blocks;
  p.block_size = shape.block_size;
  p.block_shift = std::has_single_bit(static_cast<unsigned>(shape.block_size))
                      ? std::countr_zero(static_cast<unsigned>(shape.block_size))
                      : -1;
  p.split_size = plan.split_size;
  p.max_splits = static_cast<int>(plan.max_splits);

  const auto out_bytes = static_cast<std::int64_t>(dtype_bytes(args.out.dtype));
  p.output.out = args.out.ptr<std::uint8_t>();
  p.output.dtype = args.out.dtype;
  p.output.vectors = whole_vectors(args.out);
  p.output.token_stride = args.out.strides[0] * out_bytes;
  p.output.head_stride = args.out.strides[1] * out_bytes;
  p.output.output_scale = args.output_scale.ptr<const float>();
  if (args.lse.defined()) {
    p.output.lse = args.lse.ptr<float>();
    p.output.lse_token_stride = args.lse.strides[0];
    p.output.lse_head_stride = args.lse.strides[1];
  }
  if (args.sinks.defined()) {
    p.output.sinks = args.sinks.ptr<const float>();
    p.output.sink_stride = args.sinks.strides[0];
  }
  p.output.shape = format::row_shape(shape.head_size_v);
  p.output.rotation = format::format_info(shape.value_format).rotation;
  p.output.unrotate = format::format_info(shape.value_format).unrotate(p.output.shape);
  p.error_counter = args.error_counter.ptr<unsigned long long>();
  return p;
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

namespace {

// The formats of a problem's mode; a registered mode has none.
std::pair<format::FormatId, format::FormatId> formats_of(const AttentionProblem& problem) {
  const Result<ModeInfo> mode = mode_info(problem.mode);
  if (!mode) return {format::FormatId::kNone, format::FormatId::kNone};
  const auto resolve = [&](const std::string& name) {
    return format::find_format(name == format::AutoFloat::kName ? dtype_name(problem.cache_dtype) : name);
  };
  return {resolve(mode->key_format), resolve(mode->value_format)};
}

// Row tiles of each kernel's grid.
struct Tiles {
  std::int64_t few = 0;   // decode_split: every sequence has sequence_tiles of them
  std::int64_t many = 0;  // prefill_split
  std::int64_t any = 0;   // attend_split
  int sequence_tiles = 1;
};

Tiles count_tiles(const AttentionProblem& bounds, std::int64_t num_tokens, std::int64_t batch,
                  const TensorEntry* tensor) {
  const std::int64_t group_size = bounds.num_q_heads / bounds.num_kv_heads;
  Tiles tiles;
  if (tensor == nullptr) {
    tiles.any = num_tokens * group_size / kRows + batch;
    return tiles;
  }
  const std::int64_t longest = bounds.max_query_len * group_size;  // rows of a sequence
  tiles.sequence_tiles = longest > kRows ? kDecodeRows / kRows : 1;
  tiles.few = batch * tiles.sequence_tiles;
  if (longest > kDecodeRows) tiles.many = num_tokens * group_size / tensor->prefill_rows + batch;
  return tiles;
}

// How many ways to split the keys of `blocks` row tiles x KV heads. Blocks run in waves of so many on each of an H200's
// 132 multiprocessors, and the last wave is rarely full; a block's prologue, epilogue and partial result cost as much
// as so many keys (measured: about 256 for 16 rows; 128 rows write eight times as much). The best product of both
// shares wins.
std::int64_t choose_splits(std::int64_t blocks, std::int64_t max_keys, int blocks_per_multiprocessor,
                           double overhead_keys) {
  const double wave = blocks_per_multiprocessor * 132;
  constexpr std::int64_t kMostSplits = 128;
  std::int64_t best = 1;
  double best_share = 0.0;
  for (std::int64_t splits = 1; splits <= std::min(kMostSplits, ceil_div(max_keys, 256)); ++splits) {
    const double waves = static_cast<double>(blocks * splits) / wave;
    const double keys = static_cast<double>(max_keys) / static_cast<double>(splits);
    const double share = waves / std::ceil(waves) * (keys / (keys + overhead_keys));
    if (share > best_share) {
      best = splits;
      best_share = share;
    }
  }
  return best;
}

}  // namespace

Result<AttentionPlan> plan(const AttentionProblem& problem) {
  constexpr std::int64_t kInvariantSplit = 2048;  // depends on nothing but itself
  constexpr std::int64_t kMaxSplits = 1024;
  constexpr std::int64_t kSplitMultiple = 128;  // of every kernel's key tile

  // What one grid cannot hold is refused, the rows before anything is computed from them: the rest then fits 63 bits.
  constexpr std::int64_t kMaxGridX = std::numeric_limits<std::int32_t>::max();
  constexpr std::int64_t kMaxGridYZ = 65535;
  const auto too_many = [](const std::string& what, std::int64_t most) {
    return unsupported(what + "; one CUDA grid takes at most " + std::to_string(most));
  };
  const std::optional<std::int64_t> rows = checked_product({problem.max_num_tokens, problem.num_q_heads});
  if (!rows || *rows > kMaxGridX) {
    return too_many("max_num_tokens " + std::to_string(problem.max_num_tokens) + " times num_q_heads " +
                        std::to_string(problem.num_q_heads) + " is the number of rows",
                    kMaxGridX);
  }
  if (problem.num_kv_heads > kMaxGridYZ) {
    return too_many("num_kv_heads is " + std::to_string(problem.num_kv_heads), kMaxGridYZ);
  }

  AttentionPlan plan;
  plan.problem = problem;
  const auto [key, value] = formats_of(problem);
  const TensorEntry* tensor = find_tensor_kernels(problem, key, value);
  const bool uses_sm90 = tensor != nullptr && tensor->max_head_size <= kMaxHeadSm90 && runs_sm90_kernels();
  const Tiles tiles = count_tiles(problem, problem.max_num_tokens, problem.max_batch, tensor);
  if (const std::int64_t most = std::max({tiles.few, tiles.many, tiles.any}); most > kMaxGridX) {
    return too_many("max_batch " + std::to_string(problem.max_batch) + " makes " + std::to_string(most) + " row tiles",
                    kMaxGridX);
  }
  const std::int64_t group_size = problem.num_q_heads / problem.num_kv_heads;
  if (tensor == nullptr) {
    plan.kernel = "cuda/attend_split (16 rows x 32 keys, fp32)";
  } else {
    const std::string head_class = std::to_string(tensor->max_head_size);
    plan.kernel = "cuda/decode_split<" + head_class + "> (16 rows x 16 keys, tensor cores)";
    if (tiles.many > 0) {
      plan.kernel = (uses_sm90 ? "cuda/prefill_split_sm90 (" : "cuda/prefill_split<" + head_class + "> (") +
                    std::to_string(tensor->prefill_rows) +
                    " rows, tensor cores) and decode_split for sequences of up to " + std::to_string(kDecodeRows) +
                    " rows";
    }
  }
  const std::int64_t tile_rows = tiles.many > 0 ? tensor->prefill_rows : kRows;
  plan.query_tile = static_cast<int>(std::max<std::int64_t>(1, tile_rows / group_size));

  const std::int64_t max_keys = std::max<std::int64_t>(problem.max_seq_len, 1);
  const std::int64_t blocks =
      std::max<std::int64_t>(1, (tiles.many > 0 ? tiles.many : tiles.few + tiles.any) * problem.num_kv_heads);
  if (problem.batch_invariant) {
    plan.split_size = kInvariantSplit;
  } else {
    std::int64_t splits = problem.num_splits;
    if (splits <= 0)
      splits = tiles.many > 0 ? choose_splits(blocks, max_keys, uses_sm90 ? 1 : 2, 4096)
                              : choose_splits(blocks, max_keys, 3, 256);
    splits = std::clamp<std::int64_t>(splits, 1, kMaxSplits);
    plan.split_size = ceil_div(ceil_div(max_keys, splits), kSplitMultiple) * kSplitMultiple;
  }
  plan.max_splits = ceil_div(max_keys, plan.split_size);
  if (plan.max_splits > kMaxGridYZ) {
    return too_many("max_seq_len " + std::to_string(problem.max_seq_len) + " in splits of " +
                        std::to_string(plan.split_size) + " keys makes " + std::to_string(plan.max_splits) + " splits",
                    kMaxGridYZ);
  }
  if (plan.max_splits > 1) {
    plan.workspace_bytes = static_cast<std::size_t>(*rows) * static_cast<std::size_t>(plan.max_splits) *
                           (sizeof(float2) + sizeof(float) * static_cast<std::size_t>(problem.head_size_v));
  }
  return plan;
}

Status run(const AttentionPlan& plan, const UnifiedAttentionArgs& args, const AttentionShape& shape, void* workspace,
           void* stream) {
  AttentionLauncher* exact = find_pair(kAttentionLaunchers, shape.key_format, shape.value_format);
  if (exact == nullptr) return pair_not_built(shape.key_format, shape.value_format);
  if (shape.num_tokens == 0 || shape.batch == 0) return {};

  AttentionParams params = make_params(plan, args, shape);
  const std::int64_t rows = shape.num_tokens * shape.num_q_heads;
  if (params.max_splits > 1) {
    params.partials.state = static_cast<float2*>(workspace);
    params.partials.acc = reinterpret_cast<float*>(params.partials.state + rows * params.max_splits);
  }
  const TensorEntry* tensor = find_tensor_kernels(plan.problem, shape.key_format, shape.value_format);
  const Tiles tiles = count_tiles(plan.problem, shape.num_tokens, shape.batch, tensor);
  params.sequence_tiles = tiles.sequence_tiles;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaSuccess;
  if (tiles.any > 0) error = exact(params, tiles.any, shape.num_kv_heads, cuda_stream);
  if (tiles.many > 0) error = tensor->prefill(params, tiles.many, shape.num_kv_heads, cuda_stream);
  if (tiles.few > 0 && error == cudaSuccess) error = tensor->decode(params, tiles.few, shape.num_kv_heads, cuda_stream);
  if (error != cudaSuccess || params.max_splits == 1) return cuda_status(error, "unified_attention");
  merge_splits<<<static_cast<unsigned>(rows), kAttentionThreads, 0, cuda_stream>>>(params);
  return cuda_status(cudaGetLastError(), "unified_attention (merge)");
}

Status unified_attention_alloc(const AttentionPlan& plan, const UnifiedAttentionArgs& args, const AttentionShape& shape,
                               void* stream) {
  if (plan.workspace_bytes == 0) return run(plan, args, shape, nullptr, stream);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  void* workspace = nullptr;
  const Status allocated = cuda_status(cudaMallocAsync(&workspace, plan.workspace_bytes, cuda_stream), "workspace");
  if (!allocated) return allocated;
  const Status ran = run(plan, args, shape, workspace, stream);
  const Status freed = cuda_status(cudaFreeAsync(workspace, cuda_stream), "workspace");
  return ran.ok() ? freed : ran;
}

Status merge_attn_states(const MergeAttnStatesArgs& args, void* stream) {
  MergeParams params;
  params.prefix = make_part(args.prefix_out, args.prefix_lse);
  params.suffix = make_part(args.suffix_out, args.suffix_lse);
  params.merged = make_part(args.out, args.lse);
  params.num_heads = static_cast<int>(args.out.shape[1]);
  params.num_rows = args.out.shape[0] * args.out.shape[1];
  params.head_size_v = static_cast<int>(args.out.shape[2]);
  if (params.num_rows == 0) return {};
  constexpr std::int64_t kMaxRows = std::int64_t{std::numeric_limits<std::int32_t>::max()} * kWarps;
  if (params.num_rows > kMaxRows) {
    return unsupported("prefix_out is " + to_string(args.prefix_out) + "; one CUDA call merges at most " +
                       std::to_string(kMaxRows) + " rows");
  }
  const auto blocks = static_cast<unsigned>(ceil_div(params.num_rows, kWarps));
  merge_states<<<blocks, kAttentionThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
  return cuda_status(cudaGetLastError(), "merge_attn_states");
}

}  // namespace quire::cuda
