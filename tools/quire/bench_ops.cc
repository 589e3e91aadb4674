#include "bench_ops.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <map>
#include <random>
#include <utility>
#include <vector>

#include "cpu/operand.h"
#include "cuda/device_memory.h"
#include "format/float_types.h"
#include "format/formats.h"
#include "host_time.h"
#include "quire/ops.h"

#define QUIRE_ASSIGN(name, expression)               \
  auto name##_result = (expression);                 \
  if (!name##_result) return name##_result.status(); \
  auto& name = *name##_result

namespace quire::cli {

const Choices<Placement> kLayouts = {
    {"nhd", {CacheOrder::kNHD, KVPacking::kSeparate, ScalePlacement::kSeparate}},
    {"hnd", {CacheOrder::kHND, KVPacking::kSeparate, ScalePlacement::kSeparate}},
    {"nhd_inline", {CacheOrder::kNHD, KVPacking::kSeparate, ScalePlacement::kInline}},
    {"hnd_inline", {CacheOrder::kHND, KVPacking::kSeparate, ScalePlacement::kInline}},
    {"vllm", {CacheOrder::kNHD, KVPacking::kKVInRow, ScalePlacement::kInline}},
    {"vllm_hnd", {CacheOrder::kHND, KVPacking::kKVInRow, ScalePlacement::kInline}},
};

namespace {

using Json = nlohmann::ordered_json;

template <class T>
Result<Memory> copy_of(Device device, const std::vector<T>& values) {
  return Memory::copy_of(device, values.data(), values.size() * sizeof(T));
}

// The least seconds that the multiply-adds of attention take on the CPU's threads from 16-bit queries: half of them
// with keys and half with values, each in the operands of its format.
double product_seconds(const ModeInfo& mode, double multiply_adds, const bench::ProductRates& rates) {
  const auto rate = [&](const std::string& name) {
    const format::FormatId id = format::find_format(name == "auto" ? "bfloat16" : name);
    switch (cpu::operand_of(id)) {
      case cpu::Operand::kBFloat16:
        return rates.bfloat16;
      case cpu::Operand::kInt16:
        return rates.int16;
      default:
        return rates.float32;
    }
  };
  return 0.5 * multiply_adds * (1.0 / rate(mode.key_format) + 1.0 / rate(mode.value_format));
}

}  // namespace

Result<KVCacheLayout> layout_of(const Problem& problem, ModeId mode) {
  KVCacheSpec spec;
  spec.mode = mode;
  spec.head_size = problem.head_size;
  spec.head_size_v = problem.head_size_v;
  spec.num_kv_heads = problem.num_kv_heads;
  spec.block_size = problem.block_size;
  const Placement& placement = problem.layout->second;
  spec.order = placement.order;
  spec.packing = placement.packing;
  spec.scales = placement.scales;
  return make_layout(spec);
}

namespace {

// The first `count` elements of the sequence of a seed. It is kept, since the rows of a table ask for the same
// elements.
std::vector<std::uint16_t> random_rows(std::int64_t count, unsigned seed) {
  struct Sequence {
    std::mt19937 random;
    std::normal_distribution<float> normal;
    std::vector<std::uint16_t> rows;
  };
  static std::map<unsigned, Sequence> sequences;
  Sequence& sequence = sequences.try_emplace(seed, Sequence{std::mt19937(seed), {}, {}}).first->second;
  while (std::ssize(sequence.rows) < count) {
    sequence.rows.push_back(format::float_to_bfloat16(sequence.normal(sequence.random)));
  }
  return {sequence.rows.begin(), sequence.rows.begin() + count};
}

// A cache on the device in which every slot was stored once, and whose pages are in random order.
struct Cache {
  KVCacheLayout layout;
  Memory base, v_base, k_scales, v_scales;
  KVCacheViews views;
  std::int64_t num_blocks = 0;
};

Result<Cache> make_cache(const Problem& problem, ModeId mode, std::int64_t num_blocks, const Memory& key,
                         const Memory& value, std::int64_t input_tokens) {
  Cache cache;
  QUIRE_ASSIGN(layout, layout_of(problem, mode));
  cache.layout = layout;
  cache.num_blocks = num_blocks;
  QUIRE_ASSIGN(bytes, cache_bytes(layout, num_blocks));
  for (const auto& [memory, size] :
       {std::pair{&cache.base, bytes.base}, std::pair{&cache.v_base, bytes.v_base},
        std::pair{&cache.k_scales, bytes.k_scales}, std::pair{&cache.v_scales, bytes.v_scales}}) {
    constexpr std::int64_t kReadableBehind = 16;  // what page_read_ms asks for
    QUIRE_ASSIGN(allocated, Memory::allocate(problem.device, static_cast<std::size_t>(size + kReadableBehind)));
    *memory = std::move(allocated);
  }
  cache.views = make_views(layout, num_blocks, cache.base.data(), cache.v_base.data(), cache.k_scales.data(),
                           cache.v_scales.data(), problem.device);
  ReshapeAndCacheArgs args;
  args.mode = mode;
  args.cache = cache.views;
  const std::int64_t slots = num_blocks * problem.block_size;
  for (std::int64_t first = 0; first < slots; first += input_tokens) {
    const std::int64_t count = std::min(input_tokens, slots - first);
    std::vector<std::int64_t> mapping(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count; ++i) mapping[static_cast<std::size_t>(i)] = first + i;
    QUIRE_ASSIGN(slot_mapping, copy_of(problem.device, mapping));
    args.key = Tensor::contiguous(key.data(), DType::kBFloat16, {count, problem.num_kv_heads, problem.head_size},
                                  problem.device);
    args.value = Tensor::contiguous(value.data(), DType::kBFloat16, {count, problem.num_kv_heads, problem.head_size_v},
                                    problem.device);
    args.slot_mapping = Tensor::contiguous(slot_mapping.data(), DType::kInt64, {count}, problem.device);
    if (Status status = reshape_and_cache(args, nullptr); !status) return status;
    if (Status status = synchronize(problem.device); !status) return status;
  }
  return cache;
}

Json row_of(const std::string& op, const Problem& problem, double ms) {
  return Json{{"op", op},
              {"device", device_type_name(problem.device.type)},
              {"mode", problem.mode},
              {"layout", problem.layout->first},
              {"batch", problem.batch},
              {"context", problem.context},
              {"q_len", problem.q_len},
              {"num_q_heads", problem.num_q_heads},
              {"num_kv_heads", problem.num_kv_heads},
              {"head_size", problem.head_size},
              {"head_size_v", problem.head_size_v},
              {"block_size", problem.block_size},
              {"ms", ms}};
}

// What a call reads of a page. Tensors whose rows lie end to end (K and V of a slot, inline scales) count as one.
std::vector<bench::PageRead> page_reads(const UnifiedAttentionArgs& args) {
  std::vector<bench::PageRead> reads;
  for (const ConstTensor* rows :
       {&args.cache.key_cache, &args.cache.k_scale_cache, &args.cache.value_cache, &args.cache.v_scale_cache}) {
    if (!rows->defined()) continue;
    const auto element = static_cast<std::int64_t>(dtype_bytes(rows->dtype));
    bench::PageRead read;
    attention::set_paged_rows(read, *rows, {});
    read.row_bytes = rows->ndim == 4 ? rows->shape[3] * element : element;
    read.block_size = static_cast<int>(rows->shape[1]);
    read.num_heads = static_cast<int>(rows->shape[2]);
    const auto goes_on = [&](const bench::PageRead& before) {
      return before.row(0, 0, 0) + before.row_bytes == read.row(0, 0, 0) && before.block_stride == read.block_stride &&
             before.slot_stride == read.slot_stride && before.head_stride == read.head_stride;
    };
    if (!reads.empty() && goes_on(reads.back())) {
      reads.back().row_bytes += read.row_bytes;
    } else {
      reads.push_back(read);
    }
  }
  return reads;
}

// The largest cache between the device and its memory, in bytes; kSmallestCache where none is known that is larger.
constexpr std::int64_t kSmallestCache = std::int64_t{64} << 20;
std::int64_t largest_cache([[maybe_unused]] Device device) {
#ifdef _SC_LEVEL3_CACHE_SIZE
  if (device.is_cpu()) return std::max<std::int64_t>(kSmallestCache, sysconf(_SC_LEVEL3_CACHE_SIZE));
#endif
  return kSmallestCache;
}

}  // namespace

Result<Json> bench_attention(const std::string& op, const Problem& problem, const Ceilings& ceilings,
                             double budget_ms) {
  QUIRE_ASSIGN(mode, parse_kv_cache_dtype(problem.mode));
  const std::int64_t blocks_per_sequence = (problem.context + problem.block_size - 1) / problem.block_size;
  const std::int64_t blocks_per_copy = blocks_per_sequence * problem.batch;
  QUIRE_ASSIGN(layout, layout_of(problem, mode));
  // Enough copies that a call never finds its pages in a cache.
  const std::int64_t largest = largest_cache(problem.device);
  const std::int64_t copy_bytes = std::max<std::int64_t>(layout.bytes_per_block * blocks_per_copy, 1);
  const auto copies = static_cast<int>(std::min(4 * largest / copy_bytes + 1, largest / (kSmallestCache / 64)));

  constexpr std::int64_t kInputTokens = 4096;
  QUIRE_ASSIGN(key, copy_of(problem.device, random_rows(kInputTokens * problem.num_kv_heads * problem.head_size, 1)));
  QUIRE_ASSIGN(value,
               copy_of(problem.device, random_rows(kInputTokens * problem.num_kv_heads * problem.head_size_v, 2)));
  QUIRE_ASSIGN(cache, make_cache(problem, mode, blocks_per_copy * copies, key, value, kInputTokens));

  std::vector<std::int32_t> table(static_cast<std::size_t>(blocks_per_copy * copies));
  for (std::size_t i = 0; i < table.size(); ++i) table[i] = static_cast<std::int32_t>(i);
  std::mt19937 random(3);
  std::shuffle(table.begin(), table.end(), random);
  const std::int64_t num_tokens = problem.batch * problem.q_len;
  std::vector<std::int32_t> cu_seqlens, seq_lens;
  for (std::int64_t b = 0; b <= problem.batch; ++b) cu_seqlens.push_back(static_cast<std::int32_t>(b * problem.q_len));
  seq_lens.assign(static_cast<std::size_t>(problem.batch), static_cast<std::int32_t>(problem.context));
  QUIRE_ASSIGN(tables, copy_of(problem.device, table));
  QUIRE_ASSIGN(cu, copy_of(problem.device, cu_seqlens));
  QUIRE_ASSIGN(lens, copy_of(problem.device, seq_lens));
  QUIRE_ASSIGN(query, copy_of(problem.device, random_rows(num_tokens * problem.num_q_heads * problem.head_size, 4)));
  QUIRE_ASSIGN(out,
               Memory::allocate(problem.device,
                                static_cast<std::size_t>(num_tokens * problem.num_q_heads * problem.head_size_v) * 2));

  UnifiedAttentionArgs args;
  args.mode = mode;
  args.query = Tensor::contiguous(query.data(), DType::kBFloat16, {num_tokens, problem.num_q_heads, problem.head_size},
                                  problem.device);
  args.out = Tensor::contiguous(out.data(), DType::kBFloat16, {num_tokens, problem.num_q_heads, problem.head_size_v},
                                problem.device);
  args.cache = cache.views;
  args.cu_seqlens_q = Tensor::contiguous(cu.data(), DType::kInt32, {problem.batch + 1}, problem.device);
  args.seq_lens = Tensor::contiguous(lens.data(), DType::kInt32, {problem.batch}, problem.device);
  args.softmax_scale = 1.0F / std::sqrt(static_cast<float>(problem.head_size));
  args.max_query_len = problem.q_len;
  args.max_seq_len = problem.context;
  const auto table_of = [&](int copy) {
    return Tensor::contiguous(static_cast<std::int32_t*>(tables.data()) + copy * blocks_per_copy, DType::kInt32,
                              {problem.batch, blocks_per_sequence}, problem.device);
  };
  args.block_table = table_of(0);
  QUIRE_ASSIGN(bounds, problem_of(args));
  QUIRE_ASSIGN(plan, plan_unified_attention(bounds));
  QUIRE_ASSIGN(workspace, Memory::allocate(problem.device, plan.workspace_bytes() + 64));
  auto aligned = reinterpret_cast<std::uintptr_t>(workspace.data());
  aligned = (aligned + 63) / 64 * 64;
  const auto call = [&](int index, void* stream) {
    UnifiedAttentionArgs own = args;
    own.block_table = table_of(index);
    return run_unified_attention(plan, own, reinterpret_cast<void*>(aligned), plan.workspace_bytes(), stream);
  };
  QUIRE_ASSIGN(ms, bench::median_ms(problem.device, call, copies, budget_ms));

  // `visible` counts the keys that a causal mask lets the query rows of a sequence see, and `flops` the operations on
  // them.
  const double keys = static_cast<double>(problem.context) * static_cast<double>(problem.batch);
  const double bytes = keys * static_cast<double>(cache.layout.bytes_per_token_head) * problem.num_kv_heads;
  const double visible = static_cast<double>(problem.q_len) *
                         (static_cast<double>(problem.context) - (static_cast<double>(problem.q_len) - 1.0) / 2.0);
  const double flops = 2.0 * visible * static_cast<double>(problem.batch) * problem.num_q_heads *
                       (problem.head_size + problem.head_size_v);
  Json row = row_of(op, problem, ms);
  row["cache_gbps"] = bytes / ms * 1e-6;
  row["bandwidth_share"] = bytes / (ms * 1e-3) / ceilings.read;
  row["layout_share"] = nullptr;
  if (problem.device.is_cuda()) {
    const bench::PageTable pages{static_cast<const std::int32_t*>(tables.data()), blocks_per_sequence,
                                 static_cast<int>(problem.batch), copies};
    QUIRE_ASSIGN(read_ms, bench::page_read_ms(problem.device, page_reads(args), pages));
    row["layout_share"] = read_ms / ms;
  }
  row["product_share"] = nullptr;
  if (problem.device.is_cpu()) {
    QUIRE_ASSIGN(info, mode_info(mode));
    row["product_share"] = product_seconds(*info, flops / 2.0, ceilings.products) / (ms * 1e-3);
  }
  row["tflops"] = flops / (ms * 1e-3) * 1e-12;
  row["kernel"] = plan.describe();
  // No sequence has a query, so that nothing is computed and the host is all there is to time.
  UnifiedAttentionArgs idle = args;
  QUIRE_ASSIGN(no_queries, copy_of(problem.device, std::vector<std::int32_t>(cu_seqlens.size())));
  idle.cu_seqlens_q = ConstTensor::contiguous(no_queries.data(), DType::kInt32, {problem.batch + 1}, problem.device);
  const auto run_with = [&](const AttentionPlan& its_plan) {
    return run_unified_attention(its_plan, idle, reinterpret_cast<void*>(aligned), plan.workspace_bytes(), nullptr);
  };
  QUIRE_ASSIGN(host_us, host_microseconds(problem.device, [&] { return run_with(plan); }));
  QUIRE_ASSIGN(host_us_with_plan, host_microseconds(problem.device, [&]() -> Status {
                 QUIRE_ASSIGN(own_bounds, problem_of(idle));
                 QUIRE_ASSIGN(own_plan, plan_unified_attention(own_bounds));
                 return run_with(own_plan);
               }));
  row["host_us"] = host_us;
  row["host_us_with_plan"] = host_us_with_plan;
  return row;
}

Result<Json> bench_store(const Problem& problem, const Ceilings& ceilings, double budget_ms) {
  QUIRE_ASSIGN(mode, parse_kv_cache_dtype(problem.mode));
  const std::int64_t tokens = problem.batch * problem.context;
  const std::int64_t num_blocks = (tokens + problem.block_size - 1) / problem.block_size;
  const double in_bytes =
      static_cast<double>(tokens) * problem.num_kv_heads * (problem.head_size + problem.head_size_v) * 2.0;
  // With few tokens 100 calls run back to back; with many there are enough inputs that they come from memory.
  const auto copies = static_cast<int>(std::clamp(256e6 / in_bytes + 1.0, 2.0, 100.0));
  QUIRE_ASSIGN(key, copy_of(problem.device, random_rows(tokens * problem.num_kv_heads * problem.head_size, 1)));
  QUIRE_ASSIGN(value, copy_of(problem.device, random_rows(tokens * problem.num_kv_heads * problem.head_size_v, 2)));
  QUIRE_ASSIGN(cache, make_cache(problem, mode, num_blocks * copies, key, value, tokens));
  std::vector<std::int64_t> mapping(static_cast<std::size_t>(num_blocks * copies * problem.block_size));
  for (std::size_t i = 0; i < mapping.size(); ++i) mapping[i] = static_cast<std::int64_t>(i);
  QUIRE_ASSIGN(slots, copy_of(problem.device, mapping));
  std::vector<Memory> keys, values;  // inputs beside the first
  const auto rows = random_rows(tokens * problem.num_kv_heads * std::max(problem.head_size, problem.head_size_v), 5);
  const int inputs = std::min(copies, 8);
  for (int i = 1; i < inputs; ++i) {
    QUIRE_ASSIGN(more_keys, copy_of(problem.device, rows));
    QUIRE_ASSIGN(more_values, copy_of(problem.device, rows));
    keys.push_back(std::move(more_keys));
    values.push_back(std::move(more_values));
  }
  const auto call = [&](int index, void* stream) {
    ReshapeAndCacheArgs args;
    const int input = index % inputs;
    args.mode = mode;
    args.key = Tensor::contiguous(input == 0 ? key.data() : keys[static_cast<std::size_t>(input - 1)].data(),
                                  DType::kBFloat16, {tokens, problem.num_kv_heads, problem.head_size}, problem.device);
    args.value =
        Tensor::contiguous(input == 0 ? value.data() : values[static_cast<std::size_t>(input - 1)].data(),
                           DType::kBFloat16, {tokens, problem.num_kv_heads, problem.head_size_v}, problem.device);
    args.cache = cache.views;
    args.slot_mapping =
        Tensor::contiguous(static_cast<std::int64_t*>(slots.data()) + index * num_blocks * problem.block_size,
                           DType::kInt64, {tokens}, problem.device);
    return reshape_and_cache(args, stream);
  };
  QUIRE_ASSIGN(ms, bench::median_ms(problem.device, call, copies, budget_ms));
  const double bytes = in_bytes + static_cast<double>(tokens) * problem.num_kv_heads *
                                      static_cast<double>(cache.layout.bytes_per_token_head);
  Json row = row_of("store", problem, ms);
  row["cache_gbps"] = bytes / ms * 1e-6;
  row["bandwidth_share"] = bytes / (ms * 1e-3) / ceilings.copy;
  row["layout_share"] = nullptr;
  row["product_share"] = nullptr;
  row["tflops"] = 0.0;
  row["kernel"] = "reshape_and_cache";
  // Every token is skipped, so that nothing is encoded and the host is all there is to time.
  ReshapeAndCacheArgs idle;
  idle.mode = mode;
  idle.key = Tensor::contiguous(key.data(), DType::kBFloat16, {tokens, problem.num_kv_heads, problem.head_size},
                                problem.device);
  idle.value = Tensor::contiguous(value.data(), DType::kBFloat16, {tokens, problem.num_kv_heads, problem.head_size_v},
                                  problem.device);
  idle.cache = cache.views;
  QUIRE_ASSIGN(skipped, copy_of(problem.device, std::vector<std::int64_t>(static_cast<std::size_t>(tokens), -1)));
  idle.slot_mapping = ConstTensor::contiguous(skipped.data(), DType::kInt64, {tokens}, problem.device);
  QUIRE_ASSIGN(host_us, host_microseconds(problem.device, [&] { return reshape_and_cache(idle, nullptr); }));
  row["host_us"] = host_us;
  row["host_us_with_plan"] = nullptr;
  return row;
}

}  // namespace quire::cli
