// The TurboQuant entry points. Their oracle is that of the two ops, over the key and value views of the slot tensor.
#include <bit>
#include <climits>
#include <cmath>
#include <string>

#include "format/turboquant.h"
#include "hostile/probe.h"
#include "reference/attention.h"
#include "support/owned_tensor.h"
#include "support/random.h"

namespace quire::testing {
namespace {

constexpr int kHeadSize = 64;
constexpr int kHeads = 3;
constexpr int kGroup = 2;
constexpr int kBlockSize = 4;
constexpr int kBlocks = 5;

struct Slots {
  OwnedTensor key, value, slot_mapping, query, out, lse, block_table, seq_lens, rotation, codebook;
  std::vector<std::uint8_t> cache;
  TurboQuantStoreArgs store;
  TurboQuantDecodeArgs decode;
  std::int64_t k_bytes = 0, v_bytes = 0;  // of one row
};

std::shared_ptr<Slots> make_slots(const TurboQuantConfig& config) {
  auto slots = std::make_shared<Slots>();
  Slots& s = *slots;
  const ModeId mode = *turboquant_mode(config);
  const KVCacheLayout layout = *make_layout({.mode = mode, .head_size = kHeadSize, .num_kv_heads = kHeads});
  s.k_bytes = layout.k_data_bytes;
  s.v_bytes = layout.v_data_bytes;
  const std::int64_t slot_bytes = layout.bytes_per_token_head;
  s.cache.assign(static_cast<std::size_t>(kBlocks * kBlockSize * kHeads * slot_bytes), 0xA5);
  const Tensor kv_cache = Tensor::contiguous(s.cache.data(), DType::kUInt8, {kBlocks, kBlockSize, kHeads, slot_bytes});

  // Two sequences, of 6 and 3 keys, on blocks 4, 2 and 1.
  Random random(11);
  s.key = OwnedTensor(DType::kFloat32, {9, kHeads, kHeadSize});
  s.value = OwnedTensor(DType::kFloat32, {9, kHeads, kHeadSize});
  s.query = OwnedTensor(DType::kFloat32, {2, kHeads * kGroup, kHeadSize}, 5);
  s.out = OwnedTensor(DType::kFloat32, {2, kHeads * kGroup, kHeadSize}, 3);
  s.lse = OwnedTensor(DType::kFloat32, {2, kHeads * kGroup}, 1);
  for (OwnedTensor* tensor : {&s.key, &s.value, &s.query}) tensor->fill(random.normals(tensor->view.numel()));
  s.slot_mapping = OwnedTensor(DType::kInt64, {9});
  s.slot_mapping.fill_integers({16, 17, 18, 19, 8, 9, 4, 5, 6});
  s.block_table = OwnedTensor(DType::kInt32, {2, 2});
  s.block_table.fill_integers({4, 2, 1, -1});
  s.seq_lens = OwnedTensor(DType::kInt32, {2});
  s.seq_lens.fill_integers({6, 3});

  if (config.key_bits != 8) {  // fp8 keys use neither
    s.rotation = OwnedTensor(DType::kFloat32, {kHeadSize, kHeadSize});
    std::vector<float> matrix;
    for (unsigned i = 0; i < kHeadSize; ++i) {
      for (unsigned j = 0; j < kHeadSize; ++j) matrix.push_back(std::popcount(i & j) % 2 != 0 ? -0.125F : 0.125F);
    }
    s.rotation.fill(matrix);
    std::vector<float> centroids;
    centroids.reserve(16);
    for (int i = 0; i < 1 << config.key_bits; ++i) {
      centroids.push_back((config.key_bits == 3 ? format::centroid<3>(i) : format::centroid<4>(i)) / 8.0F);
    }
    s.codebook = OwnedTensor(DType::kFloat32, {1 << config.key_bits});
    s.codebook.fill(centroids);
  }

  s.store.config = s.decode.config = config;
  s.store.key = s.key.view;
  s.store.value = s.value.view;
  s.store.kv_cache = kv_cache;
  s.decode.kv_cache = kv_cache;
  s.store.slot_mapping = s.slot_mapping.view;
  s.store.rotation = s.decode.rotation = s.rotation.view;
  s.decode.query = s.query.view;
  s.decode.out = s.out.view;
  s.decode.lse = s.lse.view;
  s.decode.block_table = s.block_table.view;
  s.decode.seq_lens = s.seq_lens.view;
  s.decode.centroids = s.codebook.view;
  s.decode.softmax_scale = 0.125F;
  return slots;
}

// Everything follows the configuration in force, from which the bytes of a row follow.
template <class Args, class Data>
Status views_of(const Slots& s, const TurboQuantConfig& config, const BasicTensor<Data>& kv_cache, Args& args) {
  const Result<ModeId> mode = turboquant_mode(config);
  if (!mode.ok()) return mode.status();
  args.mode = *mode;
  args.cache.key_cache = kv_cache.slice_last(0, s.k_bytes);
  args.cache.value_cache = kv_cache.slice_last(s.k_bytes, s.k_bytes + s.v_bytes);
  return {};
}

Status store_oracle(const Slots& s) {
  ReshapeAndCacheArgs args;
  if (Status status = views_of(s, s.store.config, s.store.kv_cache, args); !status) return status;
  args.key = s.store.key;
  args.value = s.store.value;
  args.slot_mapping = s.store.slot_mapping;
  return reference::reshape_and_cache(args);
}

Status decode_oracle(const Slots& s) {
  UnifiedAttentionArgs args;
  if (Status status = views_of(s, s.decode.config, s.decode.kv_cache, args); !status) return status;
  std::vector<std::int64_t> starts;
  for (std::int64_t i = 0; i <= s.decode.query.shape[0]; ++i) starts.push_back(i);
  OwnedTensor cu_seqlens_q(DType::kInt32, {std::ssize(starts)});
  cu_seqlens_q.fill_integers(starts);
  args.cu_seqlens_q = cu_seqlens_q.view;
  args.query = s.decode.query;
  args.out = s.decode.out;
  args.lse = s.decode.lse;
  args.block_table = s.decode.block_table;
  args.seq_lens = s.decode.seq_lens;
  args.softmax_scale = s.decode.softmax_scale;
  return reference::unified_attention(args);
}

void config_probes(Call& call, TurboQuantConfig& config) {
  const Values<int> bits{
      .refused = {INT_MIN, -1, 0, 1, 2, 5, 6, 7, 9, 16, INT_MAX}, .right = {}, .accepted = {}, .confined = {3, 4, 8}};
  scalar_probes<int>(call, "key_bits", &config.key_bits, bits);
  scalar_probes<int>(
      call, "value_bits", &config.value_bits,
      {.refused = {INT_MIN, -1, 0, 1, 2, 5, 8, INT_MAX}, .right = {}, .accepted = {}, .confined = {3, 4}});
  scalar_probes<bool>(call, "norm_correction", &config.norm_correction,
                      {.right = {}, .accepted = {true}, .confined = {false}});
  scalar_probes<bool>(call, "key_e4b15", &config.key_e4b15, {.accepted = {false}, .confined = {true}});
}

void table_probes(Call& call, const char* name, OwnedTensor& table) {
  if (table.bytes.empty()) return;
  float* const first = table.view.ptr<float>();
  for (float value : {kNaN, kInf, -kInf, 0.0F, kHuge}) {
    call.probes.push_back({std::string(name) + " value 0=" + to_text(static_cast<double>(value)), Expect::kRefused,
                           [=] { *first = value; }});
  }
}

Call make_store(const TurboQuantConfig& config) {
  const auto slots = make_slots(config);
  Slots& s = *slots;
  if (config.key_bits != 8) {
    std::vector<float> midpoints;
    for (std::int64_t i = 1; i < s.codebook.view.shape[0]; ++i) {
      midpoints.push_back((s.codebook.get(i - 1) + s.codebook.get(i)) / 2);
    }
    s.codebook = OwnedTensor(DType::kFloat32, {std::ssize(midpoints)});
    s.codebook.fill(midpoints);
    s.store.midpoints = s.codebook.view;
  }
  Call call;
  call.memory = slots;
  call.buffers = {&s.cache};
  for (OwnedTensor* tensor : {&s.key, &s.value, &s.slot_mapping, &s.rotation, &s.codebook}) {
    if (!tensor->bytes.empty()) call.buffers.push_back(&tensor->bytes);
  }
  call.tensors = {{"key", &s.store.key, "num_tokens num_kv_heads head_size"},
                  {"value", &s.store.value, "num_tokens num_kv_heads head_size"},
                  {"kv_cache", &s.store.kv_cache, "~num_blocks ~block_size num_kv_heads ~slot", Role::kExact},
                  {"slot_mapping", &s.store.slot_mapping, "num_tokens"},
                  {"rotation", &s.store.rotation, "=head_size =head_size"},
                  {"midpoints", &s.store.midpoints, "=midpoints"}};
  call.words = {"key_cache", "value_cache", "config"};
  call.run = [&s] { return turboquant_store(s.store, nullptr); };
  call.oracle = [&s] { return store_oracle(s); };
  plain_probes(call);
  all_tensor_probes(call, config.key_bits == 8 ? "cache" : "");
  index_probes(call, "slot_mapping");
  config_probes(call, s.store.config);
  table_probes(call, "rotation", s.rotation);
  table_probes(call, "midpoints", s.codebook);
  return call;
}

Call make_decode(const TurboQuantConfig& config) {
  const auto slots = make_slots(config);
  Slots& s = *slots;
  if (!store_oracle(s).ok()) std::abort();
  Call call;
  call.memory = slots;
  call.buffers = {&s.cache};
  for (OwnedTensor* tensor : {&s.query, &s.out, &s.lse, &s.block_table, &s.seq_lens, &s.rotation, &s.codebook}) {
    if (!tensor->bytes.empty()) call.buffers.push_back(&tensor->bytes);
  }
  call.tensors = {{"query", &s.decode.query, "batch num_q_heads head_size"},
                  {"out", &s.decode.out, "batch num_q_heads head_size", Role::kClose},
                  {"kv_cache", &s.decode.kv_cache, "~num_blocks !block_size =num_kv_heads ~slot"},
                  {"block_table", &s.decode.block_table, "batch ~max_blocks"},
                  {"seq_lens", &s.decode.seq_lens, "batch"},
                  {"rotation", &s.decode.rotation, "=head_size =head_size"},
                  {"centroids", &s.decode.centroids, "=centroids"},
                  {"lse", &s.decode.lse, "batch num_q_heads", Role::kClose}};
  call.words = {"key_cache", "value_cache", "config"};
  call.run = [&s] { return turboquant_decode_attention(s.decode, nullptr); };
  call.oracle = [&s] { return decode_oracle(s); };
  plain_probes(call);
  all_tensor_probes(call, config.key_bits == 8 ? "cache" : "");
  for (const char* name : {"block_table", "seq_lens"}) index_probes(call, name);
  config_probes(call, s.decode.config);
  table_probes(call, "rotation", s.rotation);
  table_probes(call, "centroids", s.codebook);
  scalar_probes<float>(call, "softmax_scale", &s.decode.softmax_scale,
                       {.refused = {kNaN, kInf, -kInf, 0.0F}, .right = {-0.1F}, .confined = {kHuge, kTiny}});
  // The query says how many sequences there are. Nothing may be allocated or counted before the other arguments agree.
  ConstTensor& query = s.decode.query;
  for (std::int64_t batch : {std::int64_t{-2}, std::int64_t{kInt32Max}, std::int64_t{1} << 40}) {
    call.probes.push_back(
        {"query.shape[0]=" + to_text(batch), Expect::kRefused, [&query, batch] { query.shape[0] = batch; }});
  }
  return call;
}

// turboquant_views returns views that lie inside of the slots.
struct Views {
  TurboQuantConfig config;
  int head_size = kHeadSize;
  Tensor kv_cache;
  std::vector<std::uint8_t> cache;
  Result<KVCacheViews> views = Status();
};

Call make_views_call(const TurboQuantConfig& config) {
  const auto memory = std::make_shared<Views>();
  Views& v = *memory;
  const auto slots = make_slots(config);
  v.config = config;
  v.cache = slots->cache;
  v.kv_cache = slots->store.kv_cache;
  v.kv_cache.data = v.cache.data();
  Call call;
  call.memory = memory;
  call.buffers = {&v.cache};
  call.tensors = {{"kv_cache", &v.kv_cache, "~num_blocks ~block_size ~num_kv_heads ~slot"}};
  call.words = {"head_size"};
  call.run = [&v] {
    v.views = turboquant_views(v.config, v.kv_cache, v.head_size);
    return v.views.status();
  };
  call.oracle = [&v]() -> Status {
    const Tensor& key = v.views->key_cache;
    const Tensor& value = v.views->value_cache;
    if (key.ndim != 4 || value.ndim != 4) return internal_error("a view has not 4 dimensions");
    const std::int64_t end = value.ptr<std::uint8_t>() - v.kv_cache.ptr<std::uint8_t>() + value.shape[3];
    if (key.shape[3] < 1 || value.shape[3] < 1 || end > v.kv_cache.shape[3])
      return internal_error("a view leaves its slot");
    return {};
  };
  plain_probes(call);
  Tensor& t = v.kv_cache;
  for (int ndim : {kInt32Min, -1, 0, 3, 5, 7, 1000, kInt32Max}) {
    call.probes.push_back(
        {"kv_cache.ndim=" + to_text(std::int64_t{ndim}), Expect::kRefused, [&t, ndim] { t.ndim = ndim; }});
  }
  for (std::int64_t extent : {kInt64Min, std::int64_t{-1}, std::int64_t{0}, std::int64_t{1}, t.shape[3] - 1}) {
    call.probes.push_back(
        {"kv_cache.shape[3]=" + to_text(extent), Expect::kRefused, [&t, extent] { t.shape[3] = extent; }});
  }
  for (int dtype : {0, 1, 5, 8, 77}) {
    call.probes.push_back({"kv_cache.dtype=" + std::to_string(dtype), Expect::kRefused,
                           [&t, dtype] { t.dtype = static_cast<DType>(dtype); }});
  }
  call.probes.push_back({"kv_cache missing", Expect::kRefused, [&t] { t = Tensor(); }});
  scalar_probes<int>(call, "head_size", &v.head_size,
                     {.refused = {INT_MIN, -1, 0, 1, 31, 65, 128, 513, 1024, INT_MAX}, .right = {32, 63}});
  config_probes(call, v.config);
  return call;
}

// boundary_skip_layers returns layers of the model, ascending.
struct Layers {
  int num_layers = 32;
  int n = 2;
};

Call make_layers() {
  const auto memory = std::make_shared<Layers>();
  Layers& l = *memory;
  Call call;
  call.memory = memory;
  call.run = [&l]() -> Status {
    const std::vector<int> layers = boundary_skip_layers(l.num_layers, l.n);
    int last = -1;
    for (int layer : layers) {
      if (layer <= last || layer >= l.num_layers) throw std::out_of_range("a layer that is not there");
      last = layer;
    }
    return {};
  };
  // The list for INT_MAX layers has as many entries as are asked for: large n only with few layers.
  for (int num_layers : {INT_MIN, -1, 0, 1, 2, 3, 1000, INT_MAX - 1, INT_MAX}) {
    for (int n : {INT_MIN, -1, 0, 1, 2, 100}) {
      call.probes.push_back(
          {std::to_string(num_layers) + "," + std::to_string(n), Expect::kAccepted, [&l, num_layers, n] {
             l.num_layers = num_layers;
             l.n = n;
           }});
    }
  }
  for (int n : {1000, INT_MAX}) {
    call.probes.push_back({"32," + std::to_string(n), Expect::kAccepted, [&l, n] { l.n = n; }});
  }
  return call;
}

}  // namespace

std::vector<Group> turboquant_groups() {
  const TurboQuantConfig k8v4{.key_bits = 8, .value_bits = 4};
  const TurboQuantConfig k3v3{.key_bits = 3, .value_bits = 3};
  return {{"turboquant/store_k8v4", {"turboquant_k8v4"}, [=] { return make_store(k8v4); }, 95, 38},
          {"turboquant/store_3bit", {"turboquant_3bit_nc"}, [=] { return make_store(k3v3); }, 280, 60},
          {"turboquant/decode_k8v4", {"turboquant_k8v4"}, [=] { return make_decode(k8v4); }, 100, 45},
          {"turboquant/decode_3bit", {"turboquant_3bit_nc"}, [=] { return make_decode(k3v3); }, 370, 60},
          {"turboquant/views", {"turboquant_3bit_nc"}, [=] { return make_views_call(k3v3); }, 45, 5},
          {"turboquant/layers", {}, make_layers, 0, 50}};
}

}  // namespace quire::testing
