// Several GPUs in one process: an op runs where its tensors are, whichever device is the thread's current one, and
// leaves that one current. And a GPU that is not there.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/device_problem.h"
#include "support/modes.h"
#include "support/owned_tensor.h"
#include "support/paged_cache.h"

namespace quire::testing {
namespace {

int current_device() {
  int index = -1;
  EXPECT_EQ(cudaGetDevice(&index), cudaSuccess);
  return index;
}

// The copies on a GPU of what a case stores and reads, over a cache that is poison; the case's own cache holds the rows
// that a store must leave there.
struct Copies {
  Copies(AttentionCase& from, Device device) : problem(from), cache(from.cache->options()) {
    cache.apply(store);
    store.key = problem.key.view;
    store.value = problem.value.view;
    store.slot_mapping = problem.slot_mapping.view;
    read = problem.args;
    read.cache = cache.views();
    cuda::fill_in_bounds(read);
    std::fill(problem.out.bytes.begin(), problem.out.bytes.end(), std::uint8_t{0xFF});
    std::fill(problem.lse.bytes.begin(), problem.lse.bytes.end(), std::uint8_t{0xFF});
    std::vector<cuda::TensorRef> tensors = cuda::tensors_of(store);
    for (const cuda::TensorRef& tensor : cuda::tensors_of(read)) tensors.push_back(tensor);
    Result<cuda::DeviceMirror> uploaded = cuda::DeviceMirror::upload(tensors, device);
    status = uploaded.status();
    if (uploaded.ok()) mirror = std::move(*uploaded);
  }

  // To the case's outputs and this cache's bytes.
  Status download() const {
    for (const Tensor& tensor : {problem.args.out, problem.args.lse, cache.key_cache, cache.value_cache,
                                 cache.k_scale_cache, cache.v_scale_cache}) {
      if (!tensor.defined()) continue;
      if (Status copied = mirror.download(tensor); !copied) return copied;
    }
    return {};
  }

  AttentionCase& problem;
  PagedCache cache;
  ReshapeAndCacheArgs store;
  UnifiedAttentionArgs read;
  cuda::DeviceMirror mirror;
  Status status;
};

class CudaDevices : public ::testing::TestWithParam<std::string> {};

TEST_P(CudaDevices, TheOpsRunWhereTheirTensorsAre) {
  const Result<int> count = device_count(DeviceType::kCuda);
  ASSERT_TRUE(count.ok()) << count.status().message();
  if (*count < 2) GTEST_SKIP() << "this process sees " << *count << " CUDA device; this test needs 2";
  const Device second = Device::cuda(1);
  ASSERT_EQ(current_device(), 0);

  AttentionCase::Options options;
  options.mode = GetParam();
  options.head_size = 128;
  options.dtype = options.out_dtype = DType::kBFloat16;
  options.sequences = {{1, 1200}, {5, 90}, {70, 300}};  // decode with partial results, a few rows, and a prompt
  AttentionCase problem(options);
  prepare_for_device(problem);
  problem.run_oracle();
  Copies on_first(problem, Device::cuda(0));
  QUIRE_ASSERT_OK(on_first.status);
  Copies copies(problem, second);
  QUIRE_ASSERT_OK(copies.status);
  cudaStream_t stream = nullptr;
  {
    const CurrentDevice current(second);
    QUIRE_ASSERT_OK(current.status());
    ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  }
  ASSERT_EQ(current_device(), 0);

  // In one call, in the default stream of the tensors' device, while the first device works too.
  QUIRE_ASSERT_OK(reshape_and_cache(on_first.store, nullptr));
  QUIRE_ASSERT_OK(reshape_and_cache(copies.store, nullptr));
  EXPECT_EQ(current_device(), 0);
  QUIRE_ASSERT_OK(unified_attention(on_first.read, nullptr));
  QUIRE_ASSERT_OK(unified_attention(copies.read, nullptr));
  EXPECT_EQ(current_device(), 0);
  QUIRE_ASSERT_OK(synchronize(second));
  QUIRE_ASSERT_OK(copies.download());
  EXPECT_EQ(copies.cache.bytes(), problem.cache->bytes());
  EXPECT_TRUE(problem.matches());
  QUIRE_ASSERT_OK(synchronize(Device::cuda(0)));
  QUIRE_ASSERT_OK(on_first.download());
  EXPECT_EQ(on_first.cache.bytes(), problem.cache->bytes());
  EXPECT_TRUE(problem.matches());

  // With a plan for that device, a workspace on it and a stream of it.
  Copies planned(problem, second);
  QUIRE_ASSERT_OK(planned.status);
  const Result<AttentionProblem> bounds = problem_of(planned.read);
  ASSERT_TRUE(bounds.ok()) << bounds.status().message();
  EXPECT_EQ(bounds->device, second);
  const Result<AttentionPlan> plan = plan_unified_attention(*bounds);
  ASSERT_TRUE(plan.ok()) << plan.status().message();
  const Result<Memory> workspace = Memory::allocate(second, std::max<std::size_t>(plan->workspace_bytes(), 16));
  ASSERT_TRUE(workspace.ok()) << workspace.status().message();
  QUIRE_ASSERT_OK(reshape_and_cache(planned.store, stream));
  QUIRE_ASSERT_OK(run_unified_attention(*plan, planned.read, workspace->data(), workspace->bytes(), stream));
  EXPECT_EQ(current_device(), 0);
  QUIRE_ASSERT_OK(synchronize(second));
  QUIRE_ASSERT_OK(planned.download());
  EXPECT_EQ(planned.cache.bytes(), problem.cache->bytes());
  EXPECT_TRUE(problem.matches());

  // That plan is not one for the first device.
  const Status refused = run_unified_attention(*plan, on_first.read, workspace->data(), workspace->bytes(), nullptr);
  EXPECT_NE(refused.message().find("device is cuda:0, but the plan was made for cuda:1"), std::string::npos)
      << refused.message();
  const CurrentDevice current(second);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

INSTANTIATE_TEST_SUITE_P(Modes, CudaDevices, ::testing::ValuesIn(table_modes()),
                         [](const auto& param) { return test_name(param.param); });

// On a machine with one GPU this is cuda:1.
TEST(CudaDevices, OneThatIsNotThereIsRefused) {
  QUIRE_NEEDS_MODES("int4_per_token_head");
  const Result<int> count = device_count(DeviceType::kCuda);
  ASSERT_TRUE(count.ok()) << count.status().message();
  const Device absent = Device::cuda(*count);
  const std::string sentence = "device is " + to_string(absent) + "; this process sees " + std::to_string(*count) +
                               " CUDA device" +
                               (*count == 1 ? ", cuda:0" : "s, cuda:0 to cuda:" + std::to_string(*count - 1));
  AttentionCase problem(AttentionCase::Options{});
  Copies copies(problem, Device::cuda(0));
  QUIRE_ASSERT_OK(copies.status);
  EXPECT_EQ(device_arch(absent).status().message(), sentence);
  EXPECT_EQ(device_available(absent).message(), sentence);
  EXPECT_EQ(Memory::allocate(absent, 16).status().message(), sentence);
  EXPECT_EQ(CurrentDevice(absent).status().message(), sentence);
  EXPECT_EQ(Copies(problem, absent).status.message(), sentence);
  const auto moved = [&](auto args) {
    for (const cuda::TensorRef& tensor : cuda::tensors_of(args)) {
      tensor.edit([&](Tensor& edited) { edited.device = absent; });
    }
    return args;
  };
  EXPECT_EQ(reshape_and_cache(moved(copies.store), nullptr).message(), sentence);
  EXPECT_EQ(unified_attention(moved(copies.read), nullptr).message(), sentence);
  MergeAttnStatesArgs merge;
  merge.out = copies.read.out;
  merge.lse = copies.read.lse;
  merge.prefix_out = merge.suffix_out = copies.read.out;
  merge.prefix_lse = merge.suffix_lse = copies.read.lse;
  EXPECT_EQ(merge_attn_states(moved(merge), nullptr).message(), sentence);
  HadamardArgs rotation;
  rotation.out = Tensor::contiguous(copies.read.out.data, DType::kFloat32, {1, 64});
  rotation.x = ConstTensor::contiguous(copies.store.key.data, DType::kFloat32, {1, 64});
  EXPECT_EQ(hadamard(moved(rotation), nullptr).message(), sentence);
}

}  // namespace
}  // namespace quire::testing
