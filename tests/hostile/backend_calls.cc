// Registered modes: a backend that decodes its own rows, called with wrong arguments and giving wrong answers.
#include <climits>
#include <stdexcept>
#include <string>

#include "hostile/probe.h"
#include "reference/attention.h"
#include "support/attention_case.h"
#include "support/modes.h"
#include "support/owned_tensor.h"

namespace quire::testing {
namespace {

// What a backend may get wrong.
struct Faults {
  std::int64_t extra_row_bytes = 0;  // row_bytes answers this much too much
  bool row_bytes_refuses = false, row_bytes_throws = false;
  bool decode_throws = false, decode_throws_int = false, decode_refuses = false;
  int packing_factor = 1;
  std::string read_format;
  bool other_mode = false;  // mode() is not the mode it was registered for
  bool scale_caches = true;
};

// Stores rows of int8 and a scale cache, as int8_per_token_head does, whose oracle is therefore this mode's too.
class RowBackend : public QuantKVBackend {
 public:
  RowBackend(ModeId mode, const Faults& faults) : mode_(mode), faults_(faults) {}

  ModeId mode() const override { return faults_.other_mode ? mode_of("int8_per_token_head") : mode_; }
  Result<int> packing_factor() const override { return faults_.packing_factor; }
  bool needs_scale_caches() const override { return faults_.scale_caches; }
  std::string_view read_format() const override { return faults_.read_format; }
  bool has_decode_row() const override { return true; }
  Result<std::int64_t> row_bytes(int head_size, bool) const override {
    if (faults_.row_bytes_throws) throw std::runtime_error("row_bytes");
    if (faults_.row_bytes_refuses)
      return unsupported("head_size is " + std::to_string(head_size) + "; no row of mine has it");
    return head_size + faults_.extra_row_bytes;
  }
  bool decode_row(const CacheRow& row, float* out) const override {
    if (faults_.decode_throws) throw std::runtime_error("decode_row");
    if (faults_.decode_throws_int) throw 7;
    if (faults_.decode_refuses) return false;
    for (int i = 0; i < row.head_size; ++i) {
      out[i] = static_cast<float>(static_cast<std::int8_t>(row.data[i])) * (faults_.scale_caches ? *row.scale : 1.0F);
    }
    return true;
  }

 private:
  ModeId mode_;
  const Faults& faults_;  // a probe changes them before the backend is made
};

// Every group that is made has a mode of its own, and its backend does not exist until a probe's process asks for it.
ModeId new_mode() {
  static int count = 0;
  return *register_mode({.name = "hostile_rows_" + std::to_string(count++), .aliases = {}});
}

struct Rows {
  explicit Rows(const AttentionCase::Options& options) : attention(options) {}

  AttentionCase attention;
  ModeId mode{};
  Faults faults;
  BackendFactory factory;  // empty: a RowBackend
};

std::shared_ptr<Rows> make_rows() {
  AttentionCase::Options options;
  options.mode = "int8_per_token_head";
  options.head_size = 64;
  options.head_size_v = 32;
  options.num_kv_heads = 3;
  options.block_size = 4;
  options.sequences = {{3, 14}, {1, 9}};
  auto rows = std::make_shared<Rows>(options);
  rows->mode = rows->attention.args.mode = new_mode();
  return rows;
}

Status register_rows(Rows& rows) {
  return register_backend(rows.mode, backend_class<RowBackend>(), [&rows]() -> std::unique_ptr<QuantKVBackend> {
    if (rows.factory) return rows.factory();
    return std::make_unique<RowBackend>(rows.mode, rows.faults);
  });
}

Call call_of(const std::shared_ptr<Rows>& rows) {
  Rows& r = *rows;
  UnifiedAttentionArgs& args = r.attention.args;
  Call call;
  call.memory = rows;
  for (const auto& buffer : r.attention.cache->bytes()) {
    if (!buffer.empty()) call.buffers.push_back(const_cast<std::vector<std::uint8_t>*>(&buffer));
  }
  for (OwnedTensor* tensor : {&r.attention.query, &r.attention.out, &r.attention.lse, &r.attention.cu_seqlens_q,
                              &r.attention.seq_lens, &r.attention.block_table}) {
    call.buffers.push_back(&tensor->bytes);
  }
  // The dtype of the rows is the backend's business, so only the caller knows that they are bytes.
  const std::vector<DType> wider = {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt32, DType::kInt64};
  call.tensors = {
      {"query", &args.query, "num_tokens num_q_heads =head_size"},
      {"out", &args.out, "num_tokens num_q_heads =head_size_v", Role::kClose},
      {"key_cache", &args.cache.key_cache, "num_blocks block_size num_kv_heads ~row", Role::kInput, wider},
      {"value_cache", &args.cache.value_cache, "num_blocks block_size num_kv_heads ~row", Role::kInput, wider},
      {"k_scale_cache", &args.cache.k_scale_cache, "num_blocks block_size num_kv_heads"},
      {"v_scale_cache", &args.cache.v_scale_cache, "num_blocks block_size num_kv_heads"},
      {"cu_seqlens_q", &args.cu_seqlens_q, "=batch+1"},
      {"seq_lens", &args.seq_lens, "batch"},
      {"block_table", &args.block_table, "batch ~max_blocks"},
      {"lse", &args.lse, "num_tokens num_q_heads", Role::kClose}};
  call.words = {"mode",      "head_size",      "block_size",  "backend",   "factory",
                "row_bytes", "packing_factor", "read_format", "decode_row"};
  call.run = [&args] { return unified_attention(args, nullptr); };
  call.oracle = [&args] {
    UnifiedAttentionArgs oracle = args;
    oracle.mode = mode_of("int8_per_token_head");
    return reference::unified_attention(oracle);
  };
  return call;
}

// Calls with wrong arguments.
Call make_arguments() {
  const auto rows = make_rows();
  if (!register_rows(*rows).ok()) std::abort();
  Call call = call_of(rows);
  UnifiedAttentionArgs& args = rows->attention.args;
  plain_probes(call);
  // The backend needs its scale caches: as with a mode of the table, a call without them is refused.
  call.probes.push_back({"no k_scale_cache", Expect::kRefused, [&args] { args.cache.k_scale_cache = Tensor(); }});
  call.probes.push_back({"no v_scale_cache", Expect::kRefused, [&args] { args.cache.v_scale_cache = Tensor(); }});
  call.probes.push_back({"scale caches of [1, 1, 1]", Expect::kRefused, [&args] {
                           for (ConstTensor* tensor : {&args.cache.k_scale_cache, &args.cache.v_scale_cache}) {
                             for (int dim = 0; dim < 3; ++dim) tensor->shape[dim] = 1;
                           }
                         }});
  call.probes.push_back({"rows of 1 byte", Expect::kRefused,
                         [&args] { args.cache.key_cache.shape[3] = args.cache.value_cache.shape[3] = 1; }});
  all_tensor_probes(call);
  for (const char* name : {"cu_seqlens_q", "seq_lens", "block_table"}) index_probes(call, name);
  return call;
}

// A backend of the table, whose ops are called without the registry.
Call make_direct() {
  const auto rows = make_rows();
  rows->attention.args.mode = mode_of("int8_per_token_head");
  Call call = call_of(rows);
  UnifiedAttentionArgs& args = rows->attention.args;
  call.run = [&args]() -> Status {
    const Result<const QuantKVBackend*> backend = get_backend("int8_per_token_head");
    return backend.ok() ? (*backend)->unified_attention(args, nullptr) : backend.status();
  };
  plain_probes(call);
  all_tensor_probes(call, "cache");
  index_probes(call, "block_table");
  return call;
}

// Calls of a backend that is wrong, which reach each fault in five ways.
Call make_faults() {
  const auto rows = make_rows();
  Rows& r = *rows;
  Call call = call_of(rows);
  struct Fault {
    const char* name;
    Expect attention, others;
    std::function<void(Rows&)> set;
  };
  const auto faults = [](auto&& change) { return [change](Rows& x) { change(x.faults); }; };
  constexpr Expect kEither = Expect::kConfined;
  const Fault all[] = {
      {"none", Expect::kAccepted, kEither, [](Rows&) {}},
      {"decode_row throws", Expect::kPartial, kEither, faults([](Faults& f) { f.decode_throws = true; })},
      {"decode_row throws an int", Expect::kPartial, kEither, faults([](Faults& f) { f.decode_throws_int = true; })},
      {"decode_row returns false", Expect::kPartial, kEither, faults([](Faults& f) { f.decode_refuses = true; })},
      {"row_bytes throws", kEither, kEither, faults([](Faults& f) { f.row_bytes_throws = true; })},
      {"row_bytes refuses", kEither, kEither, faults([](Faults& f) { f.row_bytes_refuses = true; })},
      {"row_bytes one too many", Expect::kRefused, kEither, faults([](Faults& f) { f.extra_row_bytes = 1; })},
      {"row_bytes one less", kEither, kEither, faults([](Faults& f) { f.extra_row_bytes = -1; })},
      {"row_bytes 0 or less", kEither, kEither, faults([](Faults& f) { f.extra_row_bytes = -64; })},
      {"row_bytes INT64_MIN", kEither, kEither, faults([](Faults& f) { f.extra_row_bytes = kInt64Min; })},
      {"row_bytes 2^62", Expect::kRefused, kEither,
       faults([](Faults& f) { f.extra_row_bytes = std::int64_t{1} << 62; })},
      {"row_bytes INT64_MAX", Expect::kRefused, kEither, faults([](Faults& f) { f.extra_row_bytes = kInt64Max - 64; })},
      {"packing_factor 0", kEither, kEither, faults([](Faults& f) { f.packing_factor = 0; })},
      {"packing_factor -1", kEither, kEither, faults([](Faults& f) { f.packing_factor = -1; })},
      {"packing_factor 3", kEither, kEither, faults([](Faults& f) { f.packing_factor = 3; })},
      {"packing_factor INT_MIN", kEither, kEither, faults([](Faults& f) { f.packing_factor = INT_MIN; })},
      {"read_format unknown", Expect::kRefused, kEither, faults([](Faults& f) { f.read_format = "no such mode"; })},
      {"read_format with newline", Expect::kRefused, kEither, faults([](Faults& f) { f.read_format = "fp8\n"; })},
      {"read_format its own mode", Expect::kRefused, kEither,
       [](Rows& x) { x.faults.read_format = (*mode_info(x.mode))->name; }},
      {"read_format of another size", Expect::kRefused, kEither, faults([](Faults& f) { f.read_format = "float32"; })},
      {"read_format of the same bytes", Expect::kAccepted, kEither,
       faults([](Faults& f) { f.read_format = "int8_per_token_head"; })},
      {"mode() is another", Expect::kRefused, kEither, faults([](Faults& f) { f.other_mode = true; })},
      {"factory makes nothing", Expect::kRefused, kEither,
       [](Rows& x) { x.factory = [] { return std::unique_ptr<QuantKVBackend>(); }; }},
      {"factory throws", Expect::kRefused, kEither,
       [](Rows& x) { x.factory = []() -> std::unique_ptr<QuantKVBackend> { throw std::runtime_error("factory"); }; }},
      {"factory looks up its own mode", kEither, kEither,
       [](Rows& x) {
         x.factory = [&x]() -> std::unique_ptr<QuantKVBackend> {
           const bool found = get_backend(x.mode).ok();
           return found ? nullptr : std::make_unique<RowBackend>(x.mode, x.faults);
         };
       }},
      {"factory asks whether its mode has a backend", kEither, kEither,
       [](Rows& x) {
         x.factory = [&x]() -> std::unique_ptr<QuantKVBackend> {
           (void)has_backend(x.mode);
           return std::make_unique<RowBackend>(x.mode, x.faults);
         };
       }},
      {"factory asks for another mode", Expect::kAccepted, kEither,
       [](Rows& x) {
         x.factory = [&x]() -> std::unique_ptr<QuantKVBackend> {
           (void)get_backend("int4_per_token_head");
           return std::make_unique<RowBackend>(x.mode, x.faults);
         };
       }},
      {"no backend", Expect::kRefused, kEither, nullptr},
  };
  const auto run = std::make_shared<std::function<Status()>>();
  const auto way = [&](const Fault& fault, const std::string& name, Expect expect, const std::function<Status()>& op) {
    call.probes.push_back({std::string(fault.name) + ", " + name, expect, [&r, run, set = fault.set, op] {
                             *run = op;
                             if (!set) return;
                             set(r);
                             if (!register_rows(r).ok()) std::abort();
                           }});
  };
  UnifiedAttentionArgs& args = r.attention.args;
  for (const Fault& fault : all) {
    way(fault, "unified_attention", fault.attention, [&args] { return unified_attention(args, nullptr); });
    way(fault, "plan and run", fault.attention == Expect::kPartial ? Expect::kPartial : kEither, [&args]() -> Status {
      const Result<AttentionProblem> problem = problem_of(args);
      if (!problem.ok()) return problem.status();
      const Result<AttentionPlan> plan = plan_unified_attention(*problem);
      if (!plan.ok()) return plan.status();
      std::vector<std::uint8_t> workspace(plan->workspace_bytes() + 16);
      return run_unified_attention(*plan, args, workspace.data(), workspace.size(), nullptr);
    });
    way(fault, "reshape_and_cache", kEither, [&r]() -> Status {
      ReshapeAndCacheArgs store;
      r.attention.cache->apply(store);
      store.mode = r.mode;
      store.key = r.attention.key.view;
      store.value = r.attention.value.view;
      store.slot_mapping = r.attention.slot_mapping.view;
      return reshape_and_cache(store, nullptr);
    });
    way(fault, "make_layout", kEither, [&r]() -> Status {
      const Result<KVCacheLayout> layout = make_layout({.mode = r.mode, .head_size = 64, .num_kv_heads = 3});
      if (!layout.ok()) return layout.status();
      if (layout->bytes_per_block < 1 || layout->tokens_per_gib < 0)
        throw std::out_of_range("a layout of negative size");
      return {};
    });
    way(fault, "sizes", kEither, [&r]() -> Status {
      (void)has_backend(r.mode);
      const Result<const QuantKVBackend*> backend = get_backend(r.mode);
      if (!backend.ok()) return backend.status();
      try {
        const Result<int> packed = (*backend)->packed_head_size(64);
        // Of rows of bytes, what row_bytes says: not the low half of it.
        if (packed.ok() && *packed != 64 + r.faults.extra_row_bytes) throw std::out_of_range("another head size");
        return packed.status();
      } catch (const std::runtime_error&) {  // a method that is called directly throws what its class throws
        return {};
      }
    });
  }
  call.run = [run] { return (*run)(); };
  // A store writes the caches, so where it is accepted they are its outputs.
  for (TensorArgument& argument : call.tensors) {
    if (std::string_view(argument.name).find("cache") != std::string_view::npos) argument.role = Role::kExact;
  }
  return call;
}

// The backends of the table, by their methods.
Call make_methods(const std::string& mode) {
  Call call;
  const auto run = std::make_shared<std::function<Status()>>();
  call.run = [run] { return (*run)(); };
  call.words = {"head_size", "num_blocks", "block_size", "num_kv_heads", "scale caches", "memory"};
  const auto add = [&](const std::string& name, Expect expect, auto&& op) {
    call.probes.push_back({name, expect, [run, mode, op] {
                             *run = [mode, op]() -> Status {
                               const Result<const QuantKVBackend*> backend = get_backend(mode);
                               return backend.ok() ? op(**backend) : backend.status();
                             };
                           }});
  };
  for (int head_size : {INT_MIN, -64, -1, 0, 1, 31, 32, 33, 63, 64, 128, 512, 513, 1 << 20, INT_MAX}) {
    const std::string text = to_text(std::int64_t{head_size});
    const Expect expect = head_size < 1 ? Expect::kRefused : Expect::kRight;
    add("packed_head_size(" + text + ")", expect, [=](const QuantKVBackend& b) -> Status {
      const Result<int> packed = b.packed_head_size(head_size);
      if (packed.ok() && *packed < 1) throw std::out_of_range("a packed head size below 1");
      return packed.status();
    });
    for (bool is_value : {false, true}) {
      add(std::string("row_bytes(") + text + (is_value ? ", value)" : ", key)"), expect,
          [=](const QuantKVBackend& b) -> Status {
            const Result<std::int64_t> bytes = b.row_bytes(head_size, is_value);
            if (bytes.ok() && *bytes < 1) throw std::out_of_range("a row of less than 1 byte");
            return bytes.status();
          });
    }
  }
  const bool scales = mode.starts_with("int");  // turboquant_* have none: nothing to allocate, nothing to refuse
  for (std::int64_t num_blocks : {kInt64Min, std::int64_t{-1}, std::int64_t{0}, std::int64_t{2}, std::int64_t{1} << 31,
                                  std::int64_t{1} << 45, std::int64_t{1} << 60, kInt64Max}) {
    for (const auto& [block_size, heads] : {std::pair{16, 8},
                                            {1, 1},
                                            {16, 1},
                                            {0, 8},
                                            {-1, 8},
                                            {16, 0},
                                            {16, -8},
                                            {INT_MAX, INT_MAX},
                                            {INT_MIN, INT_MIN}}) {
      const bool sane = num_blocks >= 0 && block_size > 0 && heads > 0;
      const bool large = num_blocks > 0 && (num_blocks > 1000 || block_size == INT_MAX);
      const Expect expect = !scales ? Expect::kRight : !sane || large ? Expect::kRefused : Expect::kRight;
      add("allocate_scale_caches(" + to_text(num_blocks) + ", " + to_text(std::int64_t{block_size}) + ", " +
              to_text(std::int64_t{heads}) + ")",
          expect, [=, block_size = block_size, heads = heads](const QuantKVBackend& b) -> Status {
            const auto caches = b.allocate_scale_caches(num_blocks, block_size, heads);
            if (!caches.ok()) return caches.status();
            const Tensor& k = (*caches).k_scale_cache;
            if (!k.defined()) return {};
            // All of it can be written.
            volatile float* data = k.ptr<float>();
            for (std::int64_t i = 0; i < num_blocks * block_size * heads; ++i) data[i] = 1.0F;
            return {};
          });
    }
  }
  return call;
}

}  // namespace

std::vector<Group> backend_groups() {
  const std::string rows = "int8_per_token_head";
  return {{"backend/arguments", {rows}, make_arguments, 450, 80},
          {"backend/direct", {rows}, make_direct, 200, 40},
          {"backend/faults", {rows, "int4_per_token_head"}, make_faults, 70, 50},
          {"backend/int4", {"int4_per_token_head"}, [] { return make_methods("int4_per_token_head"); }, 85, 15},
          {"backend/turboquant", {"turboquant_3bit_nc"}, [] { return make_methods("turboquant_3bit_nc"); }, 25, 75}};
}

}  // namespace quire::testing
