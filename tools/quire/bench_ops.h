// What quire bench times: one op at one problem, as a row of its table.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "measure.h"
#include "options.h"
#include "quire/layout.h"
#include "quire/mode.h"
#include "quire/status.h"

namespace quire::cli {

// What --layout means. "vllm" is vLLM's own page: one row per token and head has K and then V, each followed by its
// scale where the mode has scales. It is token-major, as vLLM's engine prefers (LBNHC), or head-major (LBHNC).
// TurboQuant's slot is such a row already, and vLLM has it token-major only.
struct Placement {
  CacheOrder order;
  KVPacking packing;
  ScalePlacement scales;
};
extern const Choices<Placement> kLayouts;
using Layout = Choices<Placement>::value_type;

struct Problem {
  Device device;
  std::string mode;
  const Layout* layout;
  std::int64_t batch, context, q_len;
  int num_q_heads, num_kv_heads, head_size, head_size_v, block_size;
};

// The bytes a second that the device can read, which attention is compared with, and copy, which the store is compared
// with; on the CPU also the multiply-adds a second.
struct Ceilings {
  double read = 0.0, copy = 0.0;
  bench::ProductRates products;
};

Result<KVCacheLayout> layout_of(const Problem& problem, ModeId mode);

// Attention of q_len new tokens on context - q_len cached ones, for each sequence of a batch.
Result<nlohmann::ordered_json> bench_attention(const std::string& op, const Problem& problem, const Ceilings& ceilings,
                                               double budget_ms);
// Stores `context` tokens a sequence.
Result<nlohmann::ordered_json> bench_store(const Problem& problem, const Ceilings& ceilings, double budget_ms);

}  // namespace quire::cli
