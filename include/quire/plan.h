// Planning of unified_attention: bounds in, the choice of kernels and the size of the workspace out. An engine plans
// once for each shape of batch and runs the plan for every layer and step whose lengths stay inside the bounds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "quire/export.h"
#include "quire/mode.h"
#include "quire/status.h"
#include "quire/tensor.h"

namespace quire {

// A plan needs to know this of a GPU. On the CPU all of it is 0.
struct Arch {
  int major = 0, minor = 0;  // compute capability
  int num_multiprocessors = 0;
  int shared_bytes = 0;  // of shared memory that a block can have
};

// Counts the devices of a type that this process can use: 1 for the CPU. kUnsupported in a build without CUDA.
QUIRE_API Result<int> device_count(DeviceType type);

// Asks a device for its facts. kUnsupported in a build without CUDA.
QUIRE_API Result<Arch> device_arch(Device device);

// A problem says what a plan needs to know: bounds, not contents. Captured graphs replay with any lengths inside the
// bounds.
struct AttentionProblem {
  Device device;
  Arch arch;  // of the device that will run the plan; problem_of fills it in
  ModeId mode{};
  int num_q_heads = 0;
  int num_kv_heads = 0;
  int head_size = 0;
  int head_size_v = 0;
  int block_size = 0;
  std::int64_t max_num_tokens = 0;
  std::int64_t max_batch = 0;  // this and the lengths: at most 2^31 - 1
  std::int64_t max_query_len = 0;
  std::int64_t max_seq_len = 0;
  DType query_dtype = DType::kBFloat16;
  DType key_cache_dtype = DType::kBFloat16;  // what an "auto" cache holds; other modes say so themselves
  DType value_cache_dtype = DType::kBFloat16;
  int row_alignment = 16;  // the power of two, at most 16, that divides the address of every row of both caches
  // CUDA: 16 neighbouring slots of a page, with their heads and scales, lie in few runs of whole, aligned 16-byte
  // vectors.
  bool whole_pages = true;
  bool has_centre = false;       // rows of a cache have a centre (KVCacheViews::k_page_meta, k_head_vector and V's)
  int num_splits = 0;            // hint: how many ways to split the keys; 0: the plan chooses
  bool batch_invariant = false;  // fixed split size: a sequence's bits do not depend on the rest of the batch
};

// A plan holds what plan_unified_attention chose. Copies share it, and it does not change. A default-constructed one is
// empty, and run_unified_attention refuses it.
class QUIRE_API AttentionPlan {
 public:
  AttentionPlan() = default;

  const AttentionProblem& problem() const;  // what it was made for
  std::size_t workspace_bytes() const;      // grows only with the bounds
  bool tensor_cores() const;                // its products are of 16-bit numbers; otherwise of fp32

  // The kernels that will run, in words: for logs and benchmarks. "cuda/decode_pages<128> (4 rows, tensor cores), 1
  // split".
  std::string describe() const;

  struct Data;  // quire's own
  explicit AttentionPlan(std::shared_ptr<const Data> data) : data_(std::move(data)) {}
  const Data* data() const { return data_.get(); }

 private:
  std::shared_ptr<const Data> data_;
};

// A pure function of the problem: it asks no device.
QUIRE_API Result<AttentionPlan> plan_unified_attention(const AttentionProblem& problem);

// Whether plan_unified_attention would have a plan for a problem, and of what kind, without making it: nothing is
// allocated and no device is asked. The Status of a problem that it refuses is that of the plan.
struct AttentionSupport {
  bool tensor_cores = false;
  std::size_t workspace_bytes = 0;
};
QUIRE_API Result<AttentionSupport> supports(const AttentionProblem& problem);

}  // namespace quire
