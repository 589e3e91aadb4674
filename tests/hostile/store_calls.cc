// reshape_and_cache, in several modes and both layouts.
#include <string>

#include "hostile/probe.h"
#include "reference/attention.h"
#include "support/modes.h"
#include "support/owned_tensor.h"
#include "support/paged_cache.h"
#include "support/random.h"

namespace quire::testing {
namespace {

struct Store {
  explicit Store(const PagedCache::Options& options) : cache(options) {}

  PagedCache cache;
  std::vector<std::uint8_t> head_major_k, head_major_v;
  OwnedTensor key, value, slot_mapping, k_scale, v_scale, counter;
  ReshapeAndCacheArgs args;
};

void add_buffers(Call& call, std::initializer_list<OwnedTensor*> tensors) {
  for (OwnedTensor* tensor : tensors) {
    if (!tensor->bytes.empty()) call.buffers.push_back(&tensor->bytes);
  }
}

struct StoreOptions {
  std::string mode;
  Layout layout = Layout::kNhd;
  bool head_major = false;
  bool scales = false;  // k_scale [Hk], v_scale one element
  bool ones = false;    // every extent that can be is 1
  bool swaps = false;
  const char* tensors = "";  // probes of those with this in their names
};

Call make_store(const StoreOptions& options) {
  const int head_size = 64;
  const int head_size_v = 32;
  const int heads = options.ones ? 1 : 3;
  const std::int64_t blocks = options.ones ? 1 : 7;
  const int slots = options.ones ? 1 : 4;
  const std::int64_t tokens = options.ones ? 1 : 5;
  auto store = std::make_shared<Store>(PagedCache::Options{.mode = options.mode,
                                                           .head_size = head_size,
                                                           .head_size_v = head_size_v,
                                                           .num_kv_heads = heads,
                                                           .block_size = slots,
                                                           .num_blocks = blocks,
                                                           .layout = options.layout,
                                                           .centre = true});
  Random random(1);
  ReshapeAndCacheArgs& args = store->args;
  store->key = OwnedTensor(DType::kFloat32, {tokens, heads, head_size}, options.ones ? 0 : 3);
  store->value = OwnedTensor(DType::kFloat32, {tokens, heads, head_size_v}, options.ones ? 0 : 1);
  store->slot_mapping = OwnedTensor(DType::kInt64, {tokens});
  store->key.fill(random.normals(store->key.view.numel()));
  store->value.fill(random.normals(store->value.view.numel()));
  store->slot_mapping.fill_integers(options.ones ? std::vector<std::int64_t>{0}
                                                 : std::vector<std::int64_t>{3, 27, -1, 12, 8});
  store->counter = OwnedTensor(DType::kInt64, {1});
  store->counter.fill_integers({0});
  store->cache.apply(args);
  args.key = store->key.view;
  args.value = store->value.view;
  args.slot_mapping = store->slot_mapping.view;

  Call call;
  call.memory = store;
  const char* key_cache = "num_blocks block_size num_kv_heads =row";
  const char* value_cache = "num_blocks block_size num_kv_heads =row";
  if (options.head_major) {
    const auto x = 16 / static_cast<std::int64_t>(dtype_bytes(args.cache.key_cache.dtype));
    key_cache = "num_blocks num_kv_heads =head_size/x block_size =x";
    value_cache = "num_blocks num_kv_heads head_size_v block_size";
    const auto place = [&](std::vector<std::uint8_t>& bytes, Tensor& cache, Tensor shaped) {
      bytes.assign(static_cast<std::size_t>(shaped.numel()) * dtype_bytes(cache.dtype), 0xFF);
      shaped.data = bytes.data();
      shaped.dtype = cache.dtype;
      cache = shaped;
      call.buffers.push_back(&bytes);
    };
    place(store->head_major_k, args.cache.key_cache,
          Tensor::contiguous(nullptr, DType::kUInt8, {blocks, heads, head_size / x, slots, x}));
    place(store->head_major_v, args.cache.value_cache,
          Tensor::contiguous(nullptr, DType::kUInt8, {blocks, heads, head_size_v, slots}));
  } else {
    for (const auto& buffer : store->cache.bytes()) {
      if (!buffer.empty()) call.buffers.push_back(const_cast<std::vector<std::uint8_t>*>(&buffer));
    }
  }
  if (options.scales) {
    store->k_scale = OwnedTensor(DType::kFloat32, {heads});
    store->v_scale = OwnedTensor(DType::kFloat32, {1});
    store->k_scale.fill(std::vector<float>(static_cast<std::size_t>(heads), 0.5F));
    store->v_scale.fill({1.5F});
    args.k_scale = store->k_scale.view;
    args.v_scale = store->v_scale.view;
  }
  add_buffers(call, {&store->key, &store->value, &store->slot_mapping, &store->k_scale, &store->v_scale,
                     &store->counter, &store->cache.k_page_meta, &store->cache.v_page_meta, &store->cache.k_head_vector,
                     &store->cache.v_head_vector});
  // "auto" stores any float: only the caller knows that the cache holds bfloat16.
  const std::vector<DType> wider = options.mode == "auto" ? std::vector{DType::kFloat32} : std::vector<DType>{};
  call.tensors = {{"key", &args.key, "num_tokens num_kv_heads =head_size"},
                  {"value", &args.value, "num_tokens num_kv_heads head_size_v"},
                  {"key_cache", &args.cache.key_cache, key_cache, Role::kExact, wider},
                  {"value_cache", &args.cache.value_cache, value_cache, Role::kExact, wider},
                  {"slot_mapping", &args.slot_mapping, "num_tokens"},
                  {"k_scale_cache", &args.cache.k_scale_cache, "num_blocks block_size num_kv_heads", Role::kExact},
                  {"v_scale_cache", &args.cache.v_scale_cache, "num_blocks block_size num_kv_heads", Role::kExact},
                  {"k_page_meta", &args.cache.k_page_meta, "num_blocks num_kv_heads =page_bytes"},
                  {"v_page_meta", &args.cache.v_page_meta, "num_blocks num_kv_heads =page_bytes_v"},
                  {"k_head_vector", &args.cache.k_head_vector, "num_kv_heads head_size"},
                  {"v_head_vector", &args.cache.v_head_vector, "num_kv_heads head_size_v"},
                  {"k_scale", &args.k_scale, "=num_kv_heads", Role::kInput, {}, true},
                  {"v_scale", &args.v_scale, "=1", Role::kInput, {}, true}};
  call.words = {"mode", "head_size", "block_size", "num_kv_heads", "error_counter"};
  call.run = [&args] { return reshape_and_cache(args, nullptr); };
  call.oracle = [&args] { return reference::reshape_and_cache(args); };

  all_tensor_probes(call, options.tensors);
  if (options.swaps) swap_probes(call);
  index_probes(call, "slot_mapping");
  for (const char* name : {"key", "value"}) {
    float_probes(call, name, Expect::kAccepted, Expect::kAccepted, Expect::kAccepted);
  }
  if (options.scales) {
    // A scale of 0, NaN or infinity divides the row as fp32 does. Either the bytes are the oracle's, or the call is
    // refused.
    for (const char* name : {"k_scale", "v_scale"}) {
      float_probes(call, name, Expect::kRight, Expect::kRight, Expect::kRight);
    }
  }
  scalar_probes<ModeId, std::int64_t>(call, "mode", &args.mode, {.refused = {-1, -5, kInt32Min, kInt32Max, 1000}});
  const auto other_mode = [&](const char* name) {
    if (modes_built({name}) && name != options.mode) {
      call.probes.push_back(
          {std::string("mode=") + name, Expect::kRight, [&args, name] { args.mode = mode_of(name); }});
    }
  };
  for (const char* name :
       {"auto", "bfloat16", "float32", "fp8", "fp8_e5m2", "int8_per_token_head", "fp8_per_token_head",
        "int4_per_token_head", "int2_per_token_head", "turboquant_k8v4", "turboquant_3bit_nc"}) {
    other_mode(name);
  }
  Store* const s = store.get();
  call.probes.push_back({"error_counter given", Expect::kRefused, [s] { s->args.error_counter = s->counter.view; }});
  call.probes.push_back({"slot_mapping int32", Expect::kAccepted, [s] {
                           s->args.slot_mapping.dtype = DType::kInt32;
                           s->args.slot_mapping.strides[0] *= 2;  // the low halves
                         }});
  plain_probes(call);
  return call;
}

}  // namespace

std::vector<Group> store_groups() {
  const auto group = [](const std::string& name, const StoreOptions& options) {
    return Group{"store/" + name, {options.mode}, [options] { return make_store(options); }, 170, 70};
  };
  std::vector<Group> groups;
  if (parse_kv_cache_dtype("k=guest_pair5,v=guest_int6").ok()) {  // tests/format/guests
    groups.push_back(group("guests", {.mode = "k=guest_pair5,v=guest_int6", .tensors = "_"}));
  }
  const std::vector<Group> of_every_build = {
      group("auto", {.mode = "auto", .swaps = true}),
      group("fp8", {.mode = "fp8", .scales = true, .swaps = true}),
      group("int8", {.mode = "int8_per_token_head", .tensors = "cache"}),
      group("int4", {.mode = "int4_per_token_head", .layout = Layout::kPadded, .swaps = true}),
      group("turboquant", {.mode = "turboquant_3bit_nc", .layout = Layout::kPackedRow, .tensors = "cache"}),
      group(
          "pair",
          {.mode = "k=int8_per_token_head,v=int4_per_token_head", .layout = Layout::kPackedInline, .tensors = "cache"}),
      group("ones", {.mode = "int4_per_token_head", .ones = true}),
      group("head_major_auto", {.mode = "auto", .head_major = true, .tensors = "cache"}),
      group("head_major_fp8", {.mode = "fp8", .head_major = true, .scales = true, .tensors = "cache"})};
  groups.insert(groups.end(), of_every_build.begin(), of_every_build.end());
  return groups;
}

}  // namespace quire::testing
