// The ops as tests call them, with arguments on the host. They are the CPU's until a test program puts another device
// behind them (tests/cuda/main.cc). The tests of tests/ops that go through these run on every device.
#pragma once

#include <string>
#include <vector>

#include "quire/quire.h"

namespace quire::testing {

class AttentionCase;

struct TestedOps {
  Device device;
  std::vector<DType> query_dtypes;  // those that kernels of their own may serve
  Status (*store)(const ReshapeAndCacheArgs& args);
  // The one-call form or, where num_splits or batch_invariant is given, a plan that runs with a poisoned workspace.
  Status (*attend)(const UnifiedAttentionArgs& args, int num_splits, bool batch_invariant);
  Status (*merge)(const MergeAttnStatesArgs& args);
  Status (*hadamard)(const HadamardArgs& args);
  void (*prepare)(AttentionCase& problem);  // sets the tolerances of a case that is about to run
};
extern TestedOps ops;

// Every mode of the table with every query dtype of `ops`: the parameters of a test suite, and the suffix of its tests.
struct ModeAndQuery {
  std::string mode;
  DType query_dtype;
};
std::vector<ModeAndQuery> modes_and_queries();
std::string test_name(const ModeAndQuery& parameter);

}  // namespace quire::testing
