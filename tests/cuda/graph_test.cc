// Store and attention are captured once in a CUDA graph and replayed with other lengths, tables and slots. The bits are
// those of eager calls.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <tuple>

#include "cuda/device_problem.h"
#include "support/modes.h"
#include "support/owned_tensor.h"
#include "support/paged_cache.h"
#include "support/random.h"

namespace quire::testing {
namespace {

#define QUIRE_ASSERT_CUDA(expression) ASSERT_EQ(expression, cudaSuccess) << cudaGetErrorString(cudaGetLastError())

class CudaGraph : public ::testing::TestWithParam<std::string> {};

TEST_P(CudaGraph, ReplaysWithOtherLengthsTablesAndSlots) {
  constexpr int kBatch = 3, kHeads = 2, kGroup = 4, kHeadSize = 128, kBlockSize = 16, kBlocks = 40, kColumns = 12;
  constexpr int kMaxQueryLen = 8, kTokens = kBatch * kMaxQueryLen;
  PagedCache::Options cache_options;
  cache_options.mode = GetParam();
  cache_options.head_size = kHeadSize;
  cache_options.num_kv_heads = kHeads;
  cache_options.num_blocks = kBlocks;
  const PagedCache host_cache(cache_options);
  Random random(31);

  // A cache full of rows, so that any table reads something finite.
  ReshapeAndCacheArgs fill;
  host_cache.apply(fill);
  OwnedTensor all_k(DType::kFloat32, {kBlocks * kBlockSize, kHeads, kHeadSize});
  OwnedTensor all_v(DType::kFloat32, {kBlocks * kBlockSize, kHeads, kHeadSize});
  OwnedTensor all_slots(DType::kInt64, {kBlocks * kBlockSize});
  all_k.fill(random.normals(all_k.view.numel()));
  all_v.fill(random.normals(all_v.view.numel()));
  std::vector<std::int64_t> every(kBlocks * kBlockSize);
  for (std::size_t i = 0; i < every.size(); ++i) every[i] = static_cast<std::int64_t>(i);
  all_slots.fill_integers(every);
  fill.key = all_k.view;
  fill.value = all_v.view;
  fill.slot_mapping = all_slots.view;
  QUIRE_ASSERT_OK(reshape_and_cache(fill, nullptr));

  // The step's inputs, rewritten between replays.
  OwnedTensor key(DType::kBFloat16, {kTokens, kHeads, kHeadSize}),
      value(DType::kBFloat16, {kTokens, kHeads, kHeadSize});
  OwnedTensor query(DType::kBFloat16, {kTokens, kHeads * kGroup, kHeadSize});
  OwnedTensor slots(DType::kInt64, {kTokens}), cu_seqlens(DType::kInt32, {kBatch + 1}),
      seq_lens(DType::kInt32, {kBatch});
  OwnedTensor table(DType::kInt32, {kBatch, kColumns});
  OwnedTensor out(DType::kFloat32, {kTokens, kHeads * kGroup, kHeadSize}),
      lse(DType::kFloat32, {kTokens, kHeads * kGroup});

  ReshapeAndCacheArgs store;
  host_cache.apply(store);
  store.key = key.view;
  store.value = value.view;
  store.slot_mapping = slots.view;
  UnifiedAttentionArgs attend;
  host_cache.apply(attend);
  attend.query = query.view;
  attend.out = out.view;
  attend.lse = lse.view;
  attend.cu_seqlens_q = cu_seqlens.view;
  attend.seq_lens = seq_lens.view;
  attend.block_table = table.view;
  attend.softmax_scale = 0.1F;
  attend.max_query_len = kMaxQueryLen;
  attend.max_seq_len = kColumns * kBlockSize;

  std::vector<cuda::TensorRef> tensors = cuda::tensors_of(store);
  for (const cuda::TensorRef& tensor : cuda::tensors_of(attend)) tensors.push_back(tensor);
  // Two copies of everything: one for the graph, one for eager calls.
  ReshapeAndCacheArgs store_eager = store;
  UnifiedAttentionArgs attend_eager = attend;
  std::vector<cuda::TensorRef> eager_tensors = cuda::tensors_of(store_eager);
  for (const cuda::TensorRef& tensor : cuda::tensors_of(attend_eager)) eager_tensors.push_back(tensor);
  const Result<cuda::DeviceMirror> graph_copy = cuda::DeviceMirror::upload(tensors);
  ASSERT_TRUE(graph_copy.ok()) << graph_copy.status().message();
  const Result<cuda::DeviceMirror> eager_copy = cuda::DeviceMirror::upload(eager_tensors);
  ASSERT_TRUE(eager_copy.ok()) << eager_copy.status().message();

  Result<AttentionProblem> problem = problem_of(attend);
  ASSERT_TRUE(problem.ok()) << problem.status().message();
  problem->num_splits = 3;
  const Result<AttentionPlan> plan = plan_unified_attention(*problem);
  ASSERT_TRUE(plan.ok()) << plan.status().message();
  Result<cuda::DeviceBuffer> workspace = cuda::DeviceBuffer::allocate(plan->workspace_bytes());
  ASSERT_TRUE(workspace.ok()) << workspace.status().message();

  cudaStream_t stream = nullptr;
  QUIRE_ASSERT_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cudaGraph_t graph = nullptr;
  QUIRE_ASSERT_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  QUIRE_ASSERT_OK(reshape_and_cache(store, stream));
  QUIRE_ASSERT_OK(run_unified_attention(plan.value(), attend, workspace->data(), workspace->bytes(), stream));
  QUIRE_ASSERT_CUDA(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t replay = nullptr;
  QUIRE_ASSERT_CUDA(cudaGraphInstantiate(&replay, graph, 0));

  const auto to_device = [](const OwnedTensor& host, const ConstTensor& device) {
    return cudaMemcpy(const_cast<void*>(device.data), host.bytes.data(), host.bytes.size(), cudaMemcpyHostToDevice);
  };
  for (int query_len = 1; query_len <= kMaxQueryLen; ++query_len) {
    SCOPED_TRACE(query_len);
    // Each step has other lengths, pages and slots. Rows past the last query are padding, with slot -1.
    std::vector<std::int64_t> pages(kBlocks);
    for (std::size_t i = 0; i < pages.size(); ++i) pages[i] = static_cast<std::int64_t>(i);
    random.shuffle(pages);
    pages.resize(kBatch * kColumns);
    std::vector<std::int64_t> starts{0}, lengths, step_slots(kTokens, -1);
    for (int b = 0; b < kBatch; ++b) {
      const int len = b == 1 ? query_len : 1 + static_cast<int>(random.below(query_len));
      const std::int64_t seq_len = len + random.below(kColumns * kBlockSize - len + 1);
      for (int i = 0; i < len; ++i) {
        const std::int64_t position = seq_len - len + i;
        step_slots[static_cast<std::size_t>(starts.back() + i)] =
            pages[static_cast<std::size_t>(b * kColumns + position / kBlockSize)] * kBlockSize + position % kBlockSize;
      }
      starts.push_back(starts.back() + len);
      lengths.push_back(seq_len);
    }
    key.fill(random.normals(key.view.numel()));
    value.fill(random.normals(value.view.numel()));
    query.fill(random.normals(query.view.numel()));
    slots.fill_integers(step_slots);
    cu_seqlens.fill_integers(starts);
    seq_lens.fill_integers(lengths);
    table.fill_integers(pages);
    for (const auto& [host, in_graph, in_eager] :
         {std::tuple{&key, &store.key, &store_eager.key}, std::tuple{&value, &store.value, &store_eager.value},
          std::tuple{&slots, &store.slot_mapping, &store_eager.slot_mapping},
          std::tuple{&query, &attend.query, &attend_eager.query},
          std::tuple{&cu_seqlens, &attend.cu_seqlens_q, &attend_eager.cu_seqlens_q},
          std::tuple{&seq_lens, &attend.seq_lens, &attend_eager.seq_lens},
          std::tuple{&table, &attend.block_table, &attend_eager.block_table}}) {
      QUIRE_ASSERT_CUDA(to_device(*host, *in_graph));
      QUIRE_ASSERT_CUDA(to_device(*host, *in_eager));
    }
    QUIRE_ASSERT_CUDA(cudaGraphLaunch(replay, stream));
    QUIRE_ASSERT_CUDA(cudaStreamSynchronize(stream));
    std::fill(out.bytes.begin(), out.bytes.end(), std::uint8_t{0xFF});
    QUIRE_ASSERT_OK(graph_copy.value().download(out.view));
    QUIRE_ASSERT_OK(graph_copy.value().download(lse.view));
    const auto graph_out = out.bytes;
    const auto graph_lse = lse.bytes;

    QUIRE_ASSERT_OK(reshape_and_cache(store_eager, nullptr));
    QUIRE_ASSERT_OK(run_unified_attention(plan.value(), attend_eager, workspace->data(), workspace->bytes(), nullptr));
    QUIRE_ASSERT_OK(cuda::synchronize());
    QUIRE_ASSERT_OK(eager_copy.value().download(out.view));
    QUIRE_ASSERT_OK(eager_copy.value().download(lse.view));
    // Rows past the last query keep what an earlier step left there, in both.
    EXPECT_EQ(graph_out, out.bytes);
    EXPECT_EQ(graph_lse, lse.bytes);
  }
  QUIRE_ASSERT_CUDA(cudaGraphExecDestroy(replay));
  QUIRE_ASSERT_CUDA(cudaGraphDestroy(graph));
  QUIRE_ASSERT_CUDA(cudaStreamDestroy(stream));
}

INSTANTIATE_TEST_SUITE_P(Modes, CudaGraph, ::testing::ValuesIn(table_modes()),
                         [](const auto& param) { return test_name(param.param); });

}  // namespace
}  // namespace quire::testing
