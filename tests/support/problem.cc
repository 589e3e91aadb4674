#include "support/problem.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <sstream>

#include "format/float_types.h"
#include "format/formats.h"
#include "reference/attention.h"

namespace quire::testing {
namespace {

// A plane of rows (or of scales) in one of a cache's buffers; bytes.
struct Plane {
  int buffer = 0;
  std::int64_t offset = 0;
  std::int64_t block_stride = 0, slot_stride = 0, head_stride = 0;
};

struct Planes {
  Plane k, v, k_scale, v_scale;
};

Plane dense(int buffer, std::int64_t row, std::int64_t slots, std::int64_t heads, bool head_first) {
  if (head_first) return {buffer, 0, slots * heads * row, row, slots * row};
  return {buffer, 0, slots * heads * row, heads * row, row};
}

// Where everything lies; k, v are the bytes of a row, ks, vs those of its scale (0 or 4).
Planes place(Layout layout, std::int64_t k, std::int64_t v, std::int64_t ks, std::int64_t vs, std::int64_t slots,
             std::int64_t heads) {
  const bool head_first = layout == Layout::kHnd;
  Planes planes{dense(0, k, slots, heads, head_first), dense(1, v, slots, heads, head_first),
                dense(2, ks, slots, heads, head_first), dense(3, vs, slots, heads, head_first)};
  switch (layout) {
    case Layout::kNhd:
    case Layout::kHnd:
      break;
    case Layout::kPadded: {
      Plane* all[] = {&planes.k, &planes.v, &planes.k_scale, &planes.v_scale};
      for (Plane* plane : all) {
        plane->head_stride += 8;
        plane->slot_stride = plane->head_stride * heads + 16;
        plane->block_stride = plane->slot_stride * slots + 48;  // an odd multiple of 16
        plane->offset = 32;
      }
      break;
    }
    case Layout::kPackedRow:
      planes.k = dense(0, k + v, slots, heads, false);
      planes.v = planes.k;
      planes.v.offset = k;
      break;
    case Layout::kInlineScale:
      planes.k = dense(0, k + ks, slots, heads, false);
      planes.v = dense(1, v + vs, slots, heads, false);
      planes.k_scale = planes.k;
      planes.k_scale.offset = k;
      planes.v_scale = planes.v;
      planes.v_scale.offset = v;
      break;
    case Layout::kPackedInline:
      planes.k = dense(0, k + ks + v + vs, slots, heads, true);
      planes.k_scale = planes.v = planes.v_scale = planes.k;
      planes.k_scale.offset = k;
      planes.v.offset = k + ks;
      planes.v_scale.offset = k + ks + v;
      break;
    case Layout::kKVInBlock:
      planes.v = dense(0, v, slots, heads, false);
      planes.v.offset = planes.k.block_stride;
      planes.k.block_stride += planes.v.block_stride;
      planes.v.block_stride = planes.k.block_stride;
      break;
    case Layout::kLayerInBlock: {
      Plane* all[] = {&planes.k, &planes.v, &planes.k_scale, &planes.v_scale};
      for (Plane* plane : all) {
        plane->offset = plane->head_stride * heads;
        plane->slot_stride = 3 * plane->head_stride * heads;
        plane->block_stride = slots * plane->slot_stride;
      }
      break;
    }
  }
  return planes;
}

Tensor view_of(std::vector<std::uint8_t>& buffer, const Plane& plane, DType dtype,
               std::initializer_list<std::int64_t> shape) {
  const std::int64_t size = static_cast<std::int64_t>(dtype_bytes(dtype));
  Tensor tensor = Tensor::contiguous(buffer.data() + plane.offset, dtype, shape);
  tensor.strides[0] = plane.block_stride / size;
  tensor.strides[1] = plane.slot_stride / size;
  tensor.strides[2] = plane.head_stride / size;
  return tensor;
}

std::vector<float> uniforms(Random& random, std::int64_t n, double low, double high) {
  std::vector<float> values(static_cast<std::size_t>(n));
  for (float& value : values) value = static_cast<float>(random.uniform(low, high));
  return values;
}

// Half a step of a dtype relative to its value (floats) and near zero.
double half_ulp(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return 0x1p-11;
    case DType::kBFloat16:
      return 0x1p-8;
    default:
      return 0x1p-24;
  }
}

// Distance between neighbours of e4m3fn around |x|.
double e4m3_step(double x) {
  const int exponent = std::max(-6, std::ilogb(std::max(std::abs(x), 0x1p-9)));
  return std::ldexp(1.0, exponent - 3);
}

}  // namespace

namespace {

Status attend_on_cpu(const UnifiedAttentionArgs& args, int num_splits, bool batch_invariant) {
  if (num_splits == 0 && !batch_invariant) return unified_attention(args);
  Result<AttentionProblem> problem = problem_of(args);
  if (!problem.ok()) return problem.status();
  problem->num_splits = num_splits;
  problem->batch_invariant = batch_invariant;
  const Result<AttentionPlan> plan = plan_unified_attention(*problem);
  if (!plan.ok()) return plan.status();
  // Exactly as long as the plan says; operator new aligns to 16 bytes.
  std::vector<std::uint8_t> workspace(std::max<std::size_t>(plan->workspace_bytes, 16), 0xFF);
  return run_unified_attention(*plan, args, workspace.data(), plan->workspace_bytes);
}

}  // namespace

TestedOps ops{Device::kCpu,
              {DType::kFloat32},
              [](const ReshapeAndCacheArgs& args) { return reshape_and_cache(args); },
              attend_on_cpu,
              [](const MergeAttnStatesArgs& args) { return merge_attn_states(args); },
              [](AttentionCase&) {}};

std::vector<ModeAndQuery> modes_and_queries() {
  std::vector<ModeAndQuery> all;
  for (const std::string& mode : table_modes()) {
    for (const DType dtype : ops.query_dtypes) all.push_back({mode, dtype});
  }
  return all;
}

std::string test_name(const ModeAndQuery& parameter) {
  const bool named = parameter.query_dtype != DType::kFloat32;
  return test_name(parameter.mode) + (named ? "_from_" + std::string(dtype_name(parameter.query_dtype)) : "");
}

std::string_view layout_name(Layout layout) {
  constexpr std::string_view names[] = {"nhd",    "hnd",           "padded",      "packed_row",
                                        "inline", "packed_inline", "kv_in_block", "layer_in_block"};
  return names[static_cast<int>(layout)];
}

// ---- PagedCache -----------------------------------------------------------------------------------------------------

PagedCache::PagedCache(const Options& options) : options_(options) {
  if (options_.head_size_v == 0) options_.head_size_v = options_.head_size;
  const ModeInfo mode = *mode_info(mode_of(options_.mode));
  const format::FormatInfo& key = format::format_info(reference::resolve_format(mode.key_format, options_.auto_dtype));
  const format::FormatInfo& value =
      format::format_info(reference::resolve_format(mode.value_format, options_.auto_dtype));
  const std::int64_t k = key.row_bytes(options_.head_size);
  const std::int64_t v = value.row_bytes(options_.head_size_v);
  const std::int64_t ks = key.meta_place == format::MetaPlace::kScaleCache ? 4 : 0;
  const std::int64_t vs = value.meta_place == format::MetaPlace::kScaleCache ? 4 : 0;
  const std::int64_t slots = options_.block_size;
  const std::int64_t heads = options_.num_kv_heads;

  Planes planes = place(options_.layout, k, v, ks, vs, slots, heads);
  buffers_.resize(4);
  const auto grow = [&](const Plane& plane, std::int64_t bytes) {
    if (bytes == 0) return;
    const std::int64_t end = plane.offset + (options_.num_blocks - 1) * plane.block_stride +
                             (slots - 1) * plane.slot_stride + (heads - 1) * plane.head_stride + bytes;
    std::vector<std::uint8_t>& buffer = buffers_[static_cast<std::size_t>(plane.buffer)];
    if (static_cast<std::int64_t>(buffer.size()) < end) buffer.resize(static_cast<std::size_t>(end), options_.poison);
  };
  grow(planes.k, k);
  grow(planes.v, v);
  grow(planes.k_scale, ks);
  grow(planes.v_scale, vs);

  const auto rows = [&](const Plane& plane, DType dtype, std::int64_t bytes) {
    return view_of(buffers_[static_cast<std::size_t>(plane.buffer)], plane, dtype,
                   {options_.num_blocks, slots, heads, bytes / static_cast<std::int64_t>(dtype_bytes(dtype))});
  };
  const auto scales = [&](const Plane& plane) {
    return view_of(buffers_[static_cast<std::size_t>(plane.buffer)], plane, DType::kFloat32,
                   {options_.num_blocks, slots, heads});
  };
  key_cache = rows(planes.k, key.cache_dtype, k);
  value_cache = rows(planes.v, value.cache_dtype, v);
  if (ks > 0) k_scale_cache = scales(planes.k_scale);
  if (vs > 0) v_scale_cache = scales(planes.v_scale);
}

// ---- OwnedTensor ----------------------------------------------------------------------------------------------------

OwnedTensor::OwnedTensor(DType dtype, std::vector<std::int64_t> shape, std::int64_t gap) {
  view.dtype = dtype;
  for (std::int64_t extent : shape) view.shape[view.ndim++] = extent;
  std::int64_t stride = 1;
  std::int64_t last = 0;  // index of the last element
  for (int i = view.ndim - 1; i >= 0; --i) {
    view.strides[i] = stride;
    last += (view.shape[i] - 1) * stride;
    stride *= view.shape[i];
    if (i == view.ndim - 1 && view.ndim > 1) stride += gap;
  }
  const std::int64_t elements = view.numel() == 0 ? 0 : last + 1;
  bytes.assign(static_cast<std::size_t>(elements) * dtype_bytes(dtype), 0xFF);
  view.data = bytes.data();
}

// Byte address of the n-th element in row-major order.
std::uint8_t* OwnedTensor::at(std::int64_t n) {
  std::int64_t offset = 0;
  for (int i = view.ndim - 1; i >= 0; --i) {
    offset += n % view.shape[i] * view.strides[i];
    n /= view.shape[i];
  }
  return bytes.data() + static_cast<std::size_t>(offset) * dtype_bytes(view.dtype);
}

void OwnedTensor::fill(const std::vector<float>& values) {
  for (std::int64_t n = 0; n < view.numel(); ++n) {
    const float x = values[static_cast<std::size_t>(n)];
    switch (view.dtype) {
      case DType::kFloat32:
        format::store_as(at(n), x);
        break;
      case DType::kFloat16:
        format::store_as(at(n), format::float_to_half(x));
        break;
      case DType::kBFloat16:
        format::store_as(at(n), format::float_to_bfloat16(x));
        break;
      case DType::kFloat8E4M3:
        *at(n) = format::E4M3::encode(x);
        break;
      case DType::kFloat8E5M2:
        *at(n) = format::E5M2::encode(x);
        break;
      default:
        std::abort();
    }
  }
}

void OwnedTensor::fill_integers(const std::vector<std::int64_t>& values) {
  for (std::int64_t n = 0; n < view.numel(); ++n) {
    const std::int64_t x = values[static_cast<std::size_t>(n)];
    if (view.dtype == DType::kInt64) {
      format::store_as(at(n), x);
    } else if (view.dtype == DType::kInt32) {
      format::store_as(at(n), static_cast<std::int32_t>(x));
    } else {
      *at(n) = static_cast<std::uint8_t>(x);
    }
  }
}

float OwnedTensor::get(std::int64_t i, std::int64_t j, std::int64_t k) const {
  return static_cast<float>(reference::element(view, i, j, k));
}

// ---- AttentionCase --------------------------------------------------------------------------------------------------

std::string AttentionCase::Options::describe() const {
  std::ostringstream text;
  text << mode << " d" << head_size;
  if (head_size_v != 0) text << "/" << head_size_v;
  text << " kv_heads " << num_kv_heads << " group " << group << " block " << block_size << " " << layout_name(layout)
       << " q " << dtype_name(dtype) << " out " << dtype_name(out_dtype);
  if (mode == "auto") text << " cache " << dtype_name(auto_dtype);
  text << " sequences";
  for (const Lengths& s : sequences) text << " " << s.query_len << "/" << s.seq_len;
  if (!causal) text << " non-causal";
  if (causal_per_seq) text << " causal_per_seq";
  if (window != -1) text << " window " << window;
  if (chunk_lookback != -1) text << " chunk_lookback " << chunk_lookback;
  if (mm_prefix) text << " mm_prefix";
  if (clamp_mm_prefix) text << " clamp_mm_prefix";
  if (softcap != 0.0F) text << " softcap " << softcap;
  if (sinks) text << " sinks";
  if (alibi) text << (alibi_sqrt ? " alibi_sqrt" : " alibi");
  if (qq_bias) text << " qq_bias";
  const auto scale = [&](const char* name, ScaleShape shape) {
    constexpr const char* names[] = {"", "one", "[Hk]", "[B, Hk]"};
    if (shape != ScaleShape::kNone) text << " " << name << " " << names[static_cast<int>(shape)];
  };
  scale("q_scale", q_scale);
  scale("k_scale", k_scale);
  scale("v_scale", v_scale);
  if (output_scale != 0.0F) text << " output_scale " << output_scale;
  text << " seed " << seed;
  return text.str();
}

AttentionCase::AttentionCase(const Options& given) : options(given) {
  if (options.head_size_v == 0) options.head_size_v = options.head_size;
  Random random(options.seed);
  build_cache(random);
  build_inputs(random);
}

void AttentionCase::build_cache(Random& random) {
  const std::int64_t block_size = options.block_size;
  std::int64_t stored = 0;
  std::int64_t num_pages = 0;
  std::int64_t widest = 1;
  for (const Lengths& s : options.sequences) {
    const std::int64_t pages = (s.seq_len + block_size - 1) / block_size;
    stored += s.seq_len;
    num_pages += pages;
    widest = std::max(widest, pages);
  }

  PagedCache::Options cache_options;
  cache_options.mode = options.mode;
  cache_options.head_size = options.head_size;
  cache_options.head_size_v = options.head_size_v;
  cache_options.num_kv_heads = options.num_kv_heads;
  cache_options.block_size = options.block_size;
  cache_options.num_blocks = num_pages + 2;
  cache_options.auto_dtype = options.auto_dtype;
  cache_options.layout = options.layout;
  cache = std::make_unique<PagedCache>(cache_options);

  // Block 0 is never used: it stays poison, like the null block of a cache manager.
  std::vector<std::int64_t> pages;
  for (std::int64_t page = 1; page < cache_options.num_blocks; ++page) pages.push_back(page);
  Random page_order(options.seed * 1000 + options.page_seed);
  page_order.shuffle(pages);

  // Every other seed has a table exactly as wide as the longest sequence.
  const std::int64_t batch = static_cast<std::int64_t>(options.sequences.size());
  const std::int64_t columns = widest + static_cast<std::int64_t>(options.seed % 2);
  const std::int64_t garbage[] = {-1, std::numeric_limits<std::int32_t>::max(), 0, cache_options.num_blocks,
                                  std::numeric_limits<std::int32_t>::min()};
  std::vector<std::int64_t> table(static_cast<std::size_t>(batch * columns));
  for (std::size_t i = 0; i < table.size(); ++i) table[i] = garbage[i % 5];
  std::vector<std::int64_t> slots;
  std::size_t next = 0;
  for (std::int64_t b = 0; b < batch; ++b) {
    const Lengths& s = options.sequences[static_cast<std::size_t>(b)];
    for (std::int64_t j = 0; j < s.seq_len; ++j) {
      if (j % block_size == 0) table[static_cast<std::size_t>(b * columns + j / block_size)] = pages[next++];
      slots.push_back(pages[next - 1] * block_size + j % block_size);
    }
  }

  // Real keys have a common component per head and now and then an outlier.
  key = OwnedTensor(DType::kFloat32, {stored, options.num_kv_heads, options.head_size});
  value = OwnedTensor(DType::kFloat32, {stored, options.num_kv_heads, options.head_size_v});
  slot_mapping = OwnedTensor(DType::kInt64, {stored});
  std::vector<float> k = random.normals(key.view.numel());
  for (std::size_t i = 0; i < k.size(); ++i) {
    if (static_cast<int>(i) % options.head_size == 3) k[i] += 2.0F;
    if (random.below(512) == 0) k[i] *= 6.0F;
  }
  key.fill(k);
  value.fill(random.normals(value.view.numel()));
  slot_mapping.fill_integers(slots);

  ReshapeAndCacheArgs store;
  cache->apply(store);
  store.key = key.view;
  store.value = value.view;
  store.slot_mapping = slot_mapping.view;
  const Status status = reference::reshape_and_cache(store);
  if (!status.ok()) std::abort();

  // Pages before the first key that any row can see hold nothing the op may look at.
  if (options.garbage_out_of_window && options.window > 0 && !options.mm_prefix) {
    for (std::int64_t b = 0; b < batch; ++b) {
      const Lengths& s = options.sequences[static_cast<std::size_t>(b)];
      const std::int64_t first = std::max(0, s.seq_len - s.query_len);
      std::int64_t begin = first - options.window + 1;
      if (options.chunk_lookback >= 0) {
        const std::int64_t chunk = options.window / (options.chunk_lookback + 1);
        begin = (first / chunk - options.chunk_lookback) * chunk;
      }
      for (std::int64_t page = 0; (page + 1) * block_size <= begin; ++page) {
        table[static_cast<std::size_t>(b * columns + page)] = garbage[page % 5];
      }
    }
  }
  block_table = OwnedTensor(DType::kInt32, {batch, columns}, 3);
  block_table.fill_integers(table);
  cache->apply(args);
  args.block_table = block_table.view;
}

void AttentionCase::build_inputs(Random& random) {
  const std::int64_t batch = static_cast<std::int64_t>(options.sequences.size());
  const std::int64_t num_q_heads = options.num_kv_heads * options.group;
  std::vector<std::int64_t> starts{0}, lengths;
  int longest_query = 1;
  for (const Lengths& s : options.sequences) {
    starts.push_back(starts.back() + s.query_len);
    lengths.push_back(s.seq_len);
    longest_query = std::max(longest_query, s.query_len);
  }
  num_tokens = starts.back();
  cu_seqlens_q = OwnedTensor(DType::kInt32, {batch + 1});
  cu_seqlens_q.fill_integers(starts);
  seq_lens = OwnedTensor(DType::kInt32, {batch});
  seq_lens.fill_integers(lengths);
  args.cu_seqlens_q = cu_seqlens_q.view;
  args.seq_lens = seq_lens.view;

  // Two rows more than there are queries: padding of a captured batch, not to be touched.
  const std::int64_t rows = num_tokens + 2;
  query = OwnedTensor(options.dtype, {rows, num_q_heads, options.head_size}, 8);
  std::vector<float> q = random.normals(query.view.numel());
  for (std::size_t i = static_cast<std::size_t>(num_tokens * num_q_heads * options.head_size); i < q.size(); ++i) {
    q[i] = std::numeric_limits<float>::quiet_NaN();
  }
  query.fill(q);
  out = OwnedTensor(options.out_dtype, {rows, num_q_heads, options.head_size_v}, 4);
  expected_out = OwnedTensor(DType::kFloat32, {rows, num_q_heads, options.head_size_v});
  lse = OwnedTensor(DType::kFloat32, {rows, num_q_heads}, 1);
  expected_lse = OwnedTensor(DType::kFloat32, {rows, num_q_heads});
  args.query = query.view;
  args.out = out.view;
  if (options.lse) args.lse = lse.view;
  args.softmax_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(options.head_size)));

  args.causal = options.causal;
  args.sliding_window = options.window;
  args.chunk_lookback = options.chunk_lookback;
  args.mm_prefix_clamp_window = options.clamp_mm_prefix;
  args.softcap = options.softcap;
  args.use_alibi_sqrt = options.alibi_sqrt;
  if (options.causal_per_seq) {
    causal_per_seq = OwnedTensor(DType::kUInt8, {batch});
    std::vector<std::int64_t> flags(static_cast<std::size_t>(batch));
    for (std::size_t b = 0; b < flags.size(); ++b) flags[b] = static_cast<std::int64_t>(b % 2);
    causal_per_seq.fill_integers(flags);
    args.causal_per_seq = causal_per_seq.view;
  }
  if (options.mm_prefix) {
    // Padding, a one-token span (which opens nothing), a span inside and one that runs past the end.
    mm_prefix_range = OwnedTensor(DType::kInt32, {batch, 4, 2});
    std::vector<std::int64_t> spans;
    for (const Lengths& s : options.sequences) {
      const std::int64_t n = s.seq_len;
      for (std::int64_t x : {std::int64_t{0}, std::int64_t{0}, n - 4, n - 4, n / 3, n - 3, n - 2, n + 10}) {
        spans.push_back(x);
      }
    }
    mm_prefix_range.fill_integers(spans);
    args.mm_prefix_range = mm_prefix_range.view;
  }
  if (options.sinks) {
    sinks = OwnedTensor(DType::kFloat32, {num_q_heads});
    sinks.fill(uniforms(random, num_q_heads, -1.0, 3.0));
    args.sinks = sinks.view;
  }
  if (options.alibi) {
    alibi_slopes = OwnedTensor(DType::kFloat32, {num_q_heads});
    alibi_slopes.fill(uniforms(random, num_q_heads, 0.02, 0.2));
    args.alibi_slopes = alibi_slopes.view;
  }
  if (options.qq_bias) {
    qq_bias = OwnedTensor(DType::kFloat32, {longest_query + 1, longest_query + 1}, 2);
    qq_bias.fill(uniforms(random, qq_bias.view.numel(), -2.0, 2.0));
    args.qq_bias = qq_bias.view;
  }
  const auto make_scale = [&](OwnedTensor& scale, ScaleShape shape, double low, double high) {
    if (shape == ScaleShape::kNone) return;
    if (shape == ScaleShape::kOne) scale = OwnedTensor(DType::kFloat32, {1});
    if (shape == ScaleShape::kPerHead) scale = OwnedTensor(DType::kFloat32, {options.num_kv_heads});
    if (shape == ScaleShape::kPerSequence) scale = OwnedTensor(DType::kFloat32, {batch, options.num_kv_heads}, 1);
    scale.fill(uniforms(random, scale.view.numel(), low, high));
  };
  make_scale(q_scale, options.q_scale, 0.5, 0.9);
  make_scale(k_scale, options.k_scale, 1.1, 1.5);
  make_scale(v_scale, options.v_scale, 0.2, 0.4);
  args.q_scale = q_scale.view;
  args.k_scale = k_scale.view;
  args.v_scale = v_scale.view;
  if (options.output_scale != 0.0F) {
    output_scale = OwnedTensor(DType::kFloat32, {1});
    output_scale.fill({options.output_scale});
    args.output_scale = output_scale.view;
  }
}

Status AttentionCase::store() const {
  ReshapeAndCacheArgs store;
  cache->apply(store);
  store.key = key.view;
  store.value = value.view;
  store.slot_mapping = slot_mapping.view;
  return ops.store(store);
}

Status AttentionCase::run(int num_splits, bool batch_invariant) {
  std::fill(out.bytes.begin(), out.bytes.end(), 0xFF);
  std::fill(lse.bytes.begin(), lse.bytes.end(), 0xFF);
  ops.prepare(*this);
  return ops.attend(args, num_splits, batch_invariant);
}

std::string AttentionCase::kernel() const {
  UnifiedAttentionArgs planned = args;
  for (Tensor* tensor : {&planned.query,
                         &planned.out,
                         &planned.key_cache,
                         &planned.value_cache,
                         &planned.k_scale_cache,
                         &planned.v_scale_cache,
                         &planned.cu_seqlens_q,
                         &planned.seq_lens,
                         &planned.block_table,
                         &planned.causal_per_seq,
                         &planned.mm_prefix_range,
                         &planned.sinks,
                         &planned.alibi_slopes,
                         &planned.qq_bias,
                         &planned.q_scale,
                         &planned.k_scale,
                         &planned.v_scale,
                         &planned.output_scale,
                         &planned.lse,
                         &planned.error_counter}) {
    tensor->device = ops.device;
  }
  const Result<AttentionProblem> problem = problem_of(planned);
  if (!problem.ok()) return problem.status().message();
  const Result<AttentionPlan> plan = plan_unified_attention(*problem);
  return plan.ok() ? plan->kernel : plan.status().message();
}

void AttentionCase::run_oracle() {
  UnifiedAttentionArgs oracle = args;
  oracle.out = expected_out.view;
  oracle.lse = expected_lse.view;
  oracle.output_scale = Tensor();
  const Status status = reference::unified_attention(oracle);
  if (!status.ok()) {
    ADD_FAILURE() << status.message();
  }
}

::testing::AssertionResult AttentionCase::check(int num_splits, bool batch_invariant) {
  const Status status = run(num_splits, batch_invariant);
  if (!status.ok()) return ::testing::AssertionFailure() << options.describe() << ": " << status.message();
  run_oracle();
  return matches();
}

// How far a correct fp32 implementation may be from the oracle, as a factor on the largest value row's norm V. Rounding
// errors of a sum of n terms add up like a random walk: u sqrt(n) of its partial sums, u = 2^-24.
//   A logit is a dot product of d terms of size 1 / sqrt(d): u sqrt(d); the same again for the rotation of the query.
//   Softcap, biases and exp cost u each on a logit of size L: u L. An error in the logits moves the output by as much,
//   V being its unit. The weighted sum over n keys costs u sqrt(n) V.
// A key format with a norm correction (TurboQuant) divides each row by a norm of d squares, u sqrt(d) / 2 of the logit.
// Correct code stays under a tenth of this (SIMD sums in lanes); leaving out one of a thousand keys costs 2^-10.
// A sum in one register instead of 16 lanes walks sqrt(16) times as far: serial_sums.
// Tensor-core kernels round more. A rotated query's d elements: with unit roundoff u = query_unit a logit moves by
// u / sqrt(3) times the norm of the products q_i k_i, which is about 1, or 2 with a k_scale: 6 u covers 5 sigma.
// (Codebook levels in fp16 add 2^-13 at most.) Each softmax weight: weight_unit V, were all errors alike. ex2.approx
// and the change of base add 2^-22 and 3 roundings of the logit.
double AttentionCase::lse_tolerance() const {
  int longest = 1;
  for (const Lengths& s : options.sequences) longest = std::max(longest, s.seq_len);
  const double d = std::max(options.head_size, options.head_size_v);
  const double largest_logit = (options.alibi ? 0.2 * longest : 0.0) + options.softcap + 10.0;
  const ModeInfo mode = *mode_info(mode_of(options.mode));
  const format::FormatId key_format = reference::resolve_format(mode.key_format, options.auto_dtype);
  double norm = 0.0;
  format::for_each_format([&]<class F>() {
    if (F::kLevelNorm && format::format_id<F> == key_format) norm = largest_logit * std::sqrt(d) / 2.0;
  });
  return 0x1p-24 * serial_sums * (2.0 * std::sqrt(d) + std::sqrt(static_cast<double>(longest)) + largest_logit + norm) +
         (query_unit > 0x1p-24 ? 6.0 * query_unit : 0.0) +
         (weight_unit > 0x1p-24 ? 0x1p-22 + 0x3p-24 * largest_logit : 0.0);
}

double AttentionCase::tolerance() const { return lse_tolerance() + (weight_unit > 0x1p-24 ? weight_unit : 0.0); }

::testing::AssertionResult AttentionCase::matches() const {
  // Norm of the largest value row: quantizing moves a row by less than half its norm in every format.
  double largest_value = 0.0;
  for (std::int64_t t = 0; t < value.view.shape[0]; ++t) {
    for (std::int64_t h = 0; h < options.num_kv_heads; ++h) {
      double squares = 0.0;
      for (int i = 0; i < options.head_size_v; ++i) squares += std::pow(value.get(t, h, i), 2);
      largest_value = std::max(largest_value, std::sqrt(squares));
    }
  }
  const double v_factor = options.v_scale == ScaleShape::kNone ? 1.0 : 0.4;
  const double bound = tolerance() * 1.5 * largest_value * v_factor;
  const std::int64_t heads = options.num_kv_heads * options.group;
  const bool fp8_out = dtype_bytes(options.out_dtype) == 1;

  for (std::int64_t t = 0; t < num_tokens; ++t) {
    for (std::int64_t h = 0; h < heads; ++h) {
      double error = 0.0;
      double norm = 0.0;
      for (int i = 0; i < options.head_size_v; ++i) {
        const double expected = expected_out.get(t, h, i);
        double got = out.get(t, h, i);
        if (std::isnan(expected) || std::isnan(got)) {
          if (std::isnan(expected) != std::isnan(got)) {
            return ::testing::AssertionFailure() << options.describe() << ": token " << t << " head " << h
                                                 << " element " << i << " is " << got << ", oracle " << expected;
          }
          continue;
        }
        if (fp8_out) {
          const double s = options.output_scale;
          const double limited = std::clamp(expected / s, -448.0, 448.0);
          const double slack = bound / s;
          if (std::abs(got - limited) > 0.5 * e4m3_step(std::abs(limited) + slack) + slack) {
            return ::testing::AssertionFailure()
                   << options.describe() << ": token " << t << " head " << h << " element " << i << " is code value "
                   << got << ", oracle " << limited;
          }
          continue;
        }
        error += (got - expected) * (got - expected);
        norm += expected * expected;
      }
      error = std::sqrt(error);
      // Rounding to the output's dtype: half an ulp of each element, and 2^-25 where fp16 has gone subnormal.
      const double allowed = bound + half_ulp(options.out_dtype) * std::sqrt(norm) +
                             (options.out_dtype == DType::kFloat16 ? 0x1p-25 * std::sqrt(options.head_size_v) : 0.0);
      if (!(error <= allowed)) {
        return ::testing::AssertionFailure() << options.describe() << ": token " << t << " head " << h << " is off by "
                                             << error << " (norm " << std::sqrt(norm) << "), allowed " << allowed;
      }
      if (options.lse) {
        const double expected = expected_lse.get(t, h);
        const double got = lse.get(t, h);
        const bool both_special = (std::isnan(expected) && std::isnan(got)) || expected == got;
        if (!both_special && !(std::abs(got - expected) <= lse_tolerance() + 0x1p-23 * std::abs(expected))) {
          return ::testing::AssertionFailure() << options.describe() << ": lse of token " << t << " head " << h
                                               << " is " << got << ", oracle " << expected;
        }
      }
    }
  }

  // What is not output is as it was: rows past the last query and the gaps between rows.
  const auto untouched = [](const OwnedTensor& tensor, std::int64_t used_rows) {
    std::vector<bool> written(tensor.bytes.size(), false);
    const std::int64_t size = static_cast<std::int64_t>(dtype_bytes(tensor.view.dtype));
    const bool rows3 = tensor.view.ndim == 3;
    for (std::int64_t t = 0; t < used_rows; ++t) {
      for (std::int64_t h = 0; h < tensor.view.shape[1]; ++h) {
        for (std::int64_t i = 0; i < (rows3 ? tensor.view.shape[2] : 1); ++i) {
          const std::int64_t at = (t * tensor.view.strides[0] + h * tensor.view.strides[1] + (rows3 ? i : 0)) * size;
          for (std::int64_t n = 0; n < size; ++n) written[static_cast<std::size_t>(at + n)] = true;
        }
      }
    }
    for (std::size_t i = 0; i < written.size(); ++i) {
      if (!written[i] && tensor.bytes[i] != 0xFF) return false;
    }
    return true;
  };
  if (!untouched(out, num_tokens))
    return ::testing::AssertionFailure() << options.describe() << ": wrote between rows of out";
  if (!untouched(lse, options.lse ? num_tokens : 0)) {
    return ::testing::AssertionFailure() << options.describe() << ": wrote between rows of lse";
  }
  return ::testing::AssertionSuccess();
}

}  // namespace quire::testing
