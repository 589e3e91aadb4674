// Legal calls that combine many extreme features. Each must be carried out, within the tolerances that tests/support
// derives.
#include <algorithm>
#include <string>

#include "hostile/probe.h"
#include "support/attention_case.h"
#include "support/modes.h"
#include "support/paged_cache.h"
#include "support/random.h"

namespace quire::testing {
namespace {

constexpr int kCalls = 300;

template <class T>
T one_of(Random& random, std::initializer_list<T> values) {
  return values.begin()[random.below(std::ssize(values))];
}

AttentionCase::Options random_options(std::uint64_t seed) {
  Random random(seed);
  AttentionCase::Options options;
  std::vector<std::string> modes = table_modes();
  std::erase_if(modes, [](const std::string& mode) { return mode.starts_with("guest"); });  // not at all sizes below
  options.mode = modes[static_cast<std::size_t>(random.below(std::ssize(modes)))];
  options.head_size = one_of(random, {32, 40, 64, 72, 96, 128});
  options.head_size_v = one_of(random, {0, 32, 64, 80, 128});
  options.num_kv_heads = one_of(random, {1, 2, 3});
  options.group = one_of(random, {1, 2, 5});
  options.block_size = one_of(random, {1, 3, 8, 16, 40});
  options.sequences.clear();
  for (std::int64_t n = random.below(4); n >= 0; --n) {
    options.sequences.push_back({one_of(random, {0, 1, 1, 2, 7, 19}), one_of(random, {0, 1, 2, 15, 16, 17, 64, 90})});
  }
  options.dtype = one_of(random, {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat8E4M3});
  options.out_dtype = one_of(random, {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat8E4M3});
  options.auto_dtype = one_of(random, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
  options.layout = kAllLayouts[random.below(std::ssize(kAllLayouts))];
  const auto one_in = [&](int n) { return random.below(n) == 0; };
  options.causal = !one_in(4);
  options.causal_per_seq = one_in(4);
  if (one_in(2)) options.window = one_of(random, {1, 2, 3, 8, 50, 1000, kInt32Max});
  if (options.window > 2 && one_in(3)) options.chunk_lookback = one_of(random, {0, 1, options.window - 1});
  options.mm_prefix = one_in(3);
  options.clamp_mm_prefix = options.mm_prefix && options.window > 0 && one_in(2);
  if (options.window == -1 && one_in(2)) {
    options.rswa_window = one_of(random, {1, 2, 3, 8, 50, 1000, kInt32Max});
    options.rswa_prefix_lens = {one_of(random, {0, 1, 8, 17, 64, -1, kInt32Min}),
                                one_of(random, {0, 3, 15, 16, 40, 1000, kInt32Max})};
  }
  if (one_in(3)) options.softcap = one_of(random, {0.5F, 5.0F, 30.0F});
  options.sinks = one_in(3);
  options.alibi = one_in(3);
  options.alibi_sqrt = options.alibi && one_in(2);
  options.qq_bias = one_in(4);
  const auto scale = [&] {
    return one_of(random, {ScaleShape::kNone, ScaleShape::kOne, ScaleShape::kPerHead, ScaleShape::kPerSequence});
  };
  options.k_scale = scale();
  options.v_scale = scale();
  if (dtype_bytes(options.dtype) == 1)
    options.q_scale = one_of(random, {ScaleShape::kNone, ScaleShape::kOne, ScaleShape::kPerSequence});
  if (dtype_bytes(options.out_dtype) == 1) options.output_scale = one_of(random, {0.05F, 1.0F});
  options.lse = !one_in(4);
  options.seed = seed;
  return options;
}

struct RandomCall {
  std::uint64_t seed = 0;
  std::unique_ptr<AttentionCase> problem;
};

Call make_random() {
  const auto memory = std::make_shared<RandomCall>();
  RandomCall& r = *memory;
  Call call;
  call.memory = memory;
  call.run = [&r] {
    r.problem = std::make_unique<AttentionCase>(random_options(r.seed));
    Random random(r.seed);
    return r.problem->run(one_of(random, {0, 0, 1, 3}));
  };
  call.oracle = [&r]() -> Status {
    r.problem->run_oracle();
    const ::testing::AssertionResult result = r.problem->matches();
    return result ? Status() : internal_error(result.message());
  };
  for (std::uint64_t seed = 1; seed <= kCalls; ++seed) {
    call.probes.push_back({std::to_string(seed), Expect::kAccepted, [&r, seed] { r.seed = seed; }});
  }
  return call;
}

}  // namespace

std::vector<Group> random_groups() { return {{"random/attention", {}, make_random, 0, kCalls}}; }

}  // namespace quire::testing
