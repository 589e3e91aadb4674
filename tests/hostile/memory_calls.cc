// Memory that ends in the middle of a call: the n-th large allocation fails, and all after it. The answer is a Status,
// and nothing has been written.
#include <string>

#include "hostile/memory.h"
#include "hostile/probe.h"
#include "reference/attention.h"
#include "support/problem.h"

namespace quire::testing {
namespace {

constexpr int kAllocations = 8;

void add_failures(Call& call) {
  call.words.emplace_back("memory");
  for (int n = 0; n <= kAllocations; ++n) {
    call.probes.push_back(
        {std::to_string(n) + " allocations succeed", Expect::kRight, [n] { allocations::fail_after(n); }});
  }
}

Call make_attention(const std::string& mode, bool splits) {
  AttentionCase::Options options;
  options.mode = mode;
  options.head_size = options.head_size_v = 128;
  options.group = 8;
  // Enough sequences for their tiles to be a large allocation.
  if (!splits) options.sequences.assign(64, {2, 20});
  if (splits) options.sequences = {{1, 2100}, {4, 1500}};
  const auto problem = std::make_shared<AttentionCase>(options);
  AttentionCase& c = *problem;
  Call call;
  call.memory = problem;
  call.buffers = {&c.out.bytes, &c.lse.bytes};
  call.tensors = {{"out", &c.args.out, "num_tokens num_q_heads =head_size_v", Role::kClose},
                  {"lse", &c.args.lse, "num_tokens num_q_heads", Role::kClose}};
  call.run = [&c] { return unified_attention(c.args); };
  call.oracle = [&c] { return reference::unified_attention(c.args); };
  add_failures(call);
  return call;
}

Call make_store(const std::string& mode) {
  AttentionCase::Options options;
  options.mode = mode;
  const auto problem = std::make_shared<AttentionCase>(options);
  AttentionCase& c = *problem;
  Random random(5);  // other rows than the cache holds
  c.key.fill(random.normals(c.key.view.numel()));
  Call call;
  call.memory = problem;
  const auto args = std::make_shared<ReshapeAndCacheArgs>();
  c.cache->apply(*args);
  args->key = c.key.view;
  args->value = c.value.view;
  args->slot_mapping = c.slot_mapping.view;
  for (const auto& buffer : c.cache->bytes()) call.buffers.push_back(const_cast<std::vector<std::uint8_t>*>(&buffer));
  call.run = [args] { return reshape_and_cache(*args); };
  call.oracle = [args] { return reference::reshape_and_cache(*args); };
  add_failures(call);
  return call;
}

Call make_scale_caches() {
  Call call;
  call.run = []() -> Status {
    const Result<const QuantKVBackend*> backend = get_backend("int8_per_token_head");
    return backend.ok() ? (*backend)->allocate_scale_caches(100, 16, 8).status() : backend.status();
  };
  add_failures(call);
  return call;
}

}  // namespace

std::vector<Group> memory_groups() {
  const std::string mode = "int4_per_token_head";
  return {{"memory/attention", {mode}, [=] { return make_attention(mode, false); }, 3, 1},
          {"memory/splits", {mode}, [=] { return make_attention(mode, true); }, 3, 1},
          {"memory/store", {mode}, [=] { return make_store(mode); }, 0, 1},
          {"memory/scale_caches", {mode, "int8_per_token_head"}, make_scale_caches, 1, 1}};
}

}  // namespace quire::testing
