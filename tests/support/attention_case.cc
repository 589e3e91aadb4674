#include "support/attention_case.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <limits>
#include <sstream>

#include "call/tensors.h"
#include "cuda/device_memory.h"
#include "reference/attention.h"
#include "support/tested_ops.h"

namespace quire::testing {
namespace {

std::vector<float> uniforms(Random& random, std::int64_t n, double low, double high) {
  std::vector<float> values(static_cast<std::size_t>(n));
  for (float& value : values) value = static_cast<float>(random.uniform(low, high));
  return values;
}

}  // namespace

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
  if (rswa_window != -1) {
    text << " rswa_window " << rswa_window << " rswa_prefix_lens";
    for (const std::int64_t prefix_len : rswa_prefix_lens) text << " " << prefix_len;
  }
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
  cache_options.centre = options.centre;
  cache = std::make_unique<PagedCache>(cache_options);

  // Block 0 is never used: it stays poison, like the null block of a cache manager.
  std::vector<std::int64_t> pages;
  for (std::int64_t page = 1; page < cache_options.num_blocks; ++page) pages.push_back(page);
  Random page_order(options.seed * 1000 + options.page_seed);
  page_order.shuffle(pages);

  // With every other seed the table is exactly as wide as the longest sequence.
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

  // Real keys have a common component per head, and now and then an outlier.
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

  // Pages before the first key that any row can see hold nothing that the op may look at.
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
  // Neither do those between the prefix and the first row's R-SWA window.
  if (options.garbage_out_of_window && options.rswa_window > 0 && !options.mm_prefix) {
    for (std::int64_t b = 0; b < batch; ++b) {
      const Lengths& s = options.sequences[static_cast<std::size_t>(b)];
      const std::int64_t begin = std::max(0, s.seq_len - s.query_len) - std::int64_t{options.rswa_window} + 1;
      const std::int64_t prefix_len = std::max<std::int64_t>(0, rswa_prefix_len(b));
      for (std::int64_t page = (prefix_len + block_size - 1) / block_size; (page + 1) * block_size <= begin; ++page) {
        table[static_cast<std::size_t>(b * columns + page)] = garbage[page % 5];
      }
    }
  }
  block_table = OwnedTensor(DType::kInt32, {batch, columns}, 3);
  block_table.fill_integers(table);
  cache->apply(args);
  args.block_table = block_table.view;
}

std::int64_t AttentionCase::rswa_prefix_len(std::int64_t sequence) const {
  return options.rswa_prefix_lens[static_cast<std::size_t>(sequence) % options.rswa_prefix_lens.size()];
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

  // There are two rows more than queries: padding of a captured batch, which must not be touched.
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

  args.mask.causal = options.causal;
  args.mask.sliding_window = options.window;
  args.mask.chunk_lookback = options.chunk_lookback;
  args.mask.mm_prefix_clamp_window = options.clamp_mm_prefix;
  args.softcap = options.softcap;
  args.use_alibi_sqrt = options.alibi_sqrt;
  if (options.causal_per_seq) {
    causal_per_seq = OwnedTensor(DType::kUInt8, {batch});
    std::vector<std::int64_t> flags(static_cast<std::size_t>(batch));
    for (std::size_t b = 0; b < flags.size(); ++b) flags[b] = static_cast<std::int64_t>(b % 2);
    causal_per_seq.fill_integers(flags);
    args.mask.causal_per_seq = causal_per_seq.view;
  }
  if (options.mm_prefix) {
    // The spans are padding, one of a single token (which opens nothing), one inside, and one that runs past the end.
    mm_prefix_range = OwnedTensor(DType::kInt32, {batch, 4, 2});
    std::vector<std::int64_t> spans;
    for (const Lengths& s : options.sequences) {
      const std::int64_t n = s.seq_len;
      for (std::int64_t x : {std::int64_t{0}, std::int64_t{0}, n - 4, n - 4, n / 3, n - 3, n - 2, n + 10}) {
        spans.push_back(x);
      }
    }
    mm_prefix_range.fill_integers(spans);
    args.mask.mm_prefix_range = mm_prefix_range.view;
  }
  args.mask.rswa_window = options.rswa_window;
  if (options.rswa_window != -1) {
    // The lengths are a column of a table with two columns.
    rswa_prefix_lens = OwnedTensor(DType::kInt32, {batch, 1}, 1);
    std::vector<std::int64_t> prefix_lens;
    for (std::int64_t b = 0; b < batch; ++b) prefix_lens.push_back(rswa_prefix_len(b));
    rswa_prefix_lens.fill_integers(prefix_lens);
    args.mask.rswa_prefix_lens =
        Tensor::strided(rswa_prefix_lens.view.data, DType::kInt32, {batch}, {rswa_prefix_lens.view.strides[0]});
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
  args.q_descale = q_scale.view;
  args.k_descale = k_scale.view;
  args.v_descale = v_scale.view;
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

Result<AttentionPlan> AttentionCase::plan() const {
  UnifiedAttentionArgs planned = args;
  if (ops.device.is_cuda()) cuda::fill_in_bounds(planned);
  call::for_each_tensor(planned, [](const char*, auto& tensor) { tensor.device = ops.device; });
  const Result<AttentionProblem> problem = problem_of(planned);
  if (!problem.ok()) return problem.status();
  return plan_unified_attention(*problem);
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

}  // namespace quire::testing
