// TurboQuant's entry points on the GPU. The store's bytes are the CPU's, padding of wide slots included; the decode is
// compared with the oracle; tables on the device are compared once per address and trusted afterwards; both calls can
// be captured in a graph.
#include "quire/turboquant.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device_problem.h"
#include "support/attention_case.h"
#include "support/modes.h"
#include "support/owned_tensor.h"
#include "support/paged_cache.h"
#include "support/random.h"
#include "support/turboquant_tables.h"

namespace quire::testing {
namespace {

#define QUIRE_ASSERT_CUDA(expression) ASSERT_EQ(expression, cudaSuccess) << cudaGetErrorString(cudaGetLastError())

// Those with kernels.
constexpr TurboQuantConfig kConfigs[] = {
    {.key_bits = 8, .value_bits = 4},
    {.key_bits = 4, .value_bits = 4},
    {.key_bits = 3, .value_bits = 4},
    {.key_bits = 3, .value_bits = 3},
};

std::string mode_name(const TurboQuantConfig& config) { return (*mode_info(*turboquant_mode(config)))->name; }

// A table in a tensor of its own.
OwnedTensor table_tensor(const std::vector<float>& values, std::vector<std::int64_t> shape) {
  OwnedTensor table(DType::kFloat32, std::move(shape));
  table.fill(values);
  return table;
}
OwnedTensor rotation_tensor(int head_size) { return table_tensor(rotation_table(head_size), {head_size, head_size}); }

// A store of 41 tokens, some of them without a slot, into poisoned slots of `slot_bytes`, with every table on the host.
struct StoreCase {
  StoreCase(const TurboQuantConfig& config, int head_size, DType dtype, std::int64_t slot_bytes)
      : key(dtype, {kTokens, kHeads, head_size}),
        value(dtype, {kTokens, kHeads, head_size}),
        slot_mapping(DType::kInt32, {kTokens}),
        rotation(rotation_tensor(head_size)),
        cache(static_cast<std::size_t>(kBlocks * kBlockSize * kHeads * slot_bytes), 0xA5) {
    Random random(static_cast<std::uint64_t>(head_size));
    key.fill(random.normals(key.view.numel()));
    value.fill(random.normals(value.view.numel()));
    std::vector<std::int64_t> slots(kBlocks * kBlockSize);
    for (std::size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<std::int64_t>(i);
    random.shuffle(slots);
    slots.resize(kTokens);
    slots[7] = slots[40] = -1;
    slot_mapping.fill_integers(slots);
    args.config = config;
    args.key = key.view;
    args.value = value.view;
    args.kv_cache = Tensor::contiguous(cache.data(), DType::kUInt8, {kBlocks, kBlockSize, kHeads, slot_bytes});
    args.slot_mapping = slot_mapping.view;
    args.rotation = rotation.view;
    if (config.key_bits == 8) return;
    midpoints = table_tensor(midpoint_table(config.key_bits, head_size), {(1 << config.key_bits) - 1});
    args.midpoints = midpoints.view;
  }

  // Makes the same call on the GPU, with tables on the device where `device_tables` is set.
  Status run_on_gpu(bool device_tables) {
    TurboQuantStoreArgs on_gpu = args;
    std::vector<cuda::TensorRef> tensors = {&on_gpu.key, &on_gpu.value, &on_gpu.kv_cache, &on_gpu.slot_mapping};
    if (device_tables)
      tensors.insert(tensors.end(), {cuda::TensorRef(&on_gpu.rotation), cuda::TensorRef(&on_gpu.midpoints)});
    const Result<cuda::DeviceMirror> mirror = cuda::DeviceMirror::upload(tensors);
    if (!mirror.ok()) return mirror.status();
    if (Status status = turboquant_store(on_gpu, nullptr); !status) return status;
    if (Status status = cuda::synchronize(); !status) return status;
    return mirror->download(args.kv_cache);
  }

  static constexpr std::int64_t kTokens = 41, kHeads = 3, kBlocks = 4, kBlockSize = 16;
  OwnedTensor key, value, slot_mapping, rotation, midpoints;
  std::vector<std::uint8_t> cache;
  TurboQuantStoreArgs args;
};

// The bytes of a configuration's slot, rounded up to even.
std::int64_t slot_bytes_of(const TurboQuantConfig& config, int head_size) {
  KVCacheSpec spec;
  spec.mode = *turboquant_mode(config);
  spec.head_size = head_size;
  return make_layout(spec)->bytes_per_token_head;
}

TEST(CudaTurboQuant, StoresTheCpusBytesInSlotsOfAnyWidth) {
  for (const TurboQuantConfig& config : kConfigs) {
    if (!modes_built({mode_name(config)})) continue;
    for (const int head_size : {40, 64, 96, 128, 256}) {
      const std::int64_t exact = slot_bytes_of(config, head_size);
      const auto power_of_two = static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(exact)));
      for (const std::int64_t slot_bytes : {exact, exact + 2, power_of_two}) {
        for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
          for (const bool device_tables : {false, true}) {
            SCOPED_TRACE(mode_name(config) + " d" + std::to_string(head_size) + " slot " + std::to_string(slot_bytes) +
                         " from " + std::string(dtype_name(dtype)) + (device_tables ? ", tables on cuda" : ""));
            StoreCase on_cpu(config, head_size, dtype, slot_bytes);
            StoreCase on_gpu(config, head_size, dtype, slot_bytes);
            QUIRE_ASSERT_OK(turboquant_store(on_cpu.args, nullptr));
            QUIRE_ASSERT_OK(on_gpu.run_on_gpu(device_tables));
            ASSERT_EQ(on_gpu.cache, on_cpu.cache);
          }
        }
      }
    }
  }
}

TEST(CudaTurboQuant, StoresTheSameBytesWithoutNormCorrection) {
  TurboQuantConfig config{.key_bits = 4, .value_bits = 4};
  QUIRE_NEEDS_MODES(mode_name(config));
  StoreCase with(config, 64, DType::kBFloat16, 70);
  config.norm_correction = false;
  StoreCase without(config, 64, DType::kBFloat16, 70);
  QUIRE_ASSERT_OK(with.run_on_gpu(true));
  QUIRE_ASSERT_OK(without.run_on_gpu(true));
  EXPECT_EQ(without.cache, with.cache);
}

// One-token sequences over a packed cache, and the entry point's arguments for them.
struct DecodeCase {
  DecodeCase(const TurboQuantConfig& config, int head_size, DType dtype)
      : problem(options(config, head_size, dtype)), rotation(rotation_tensor(head_size)) {
    const UnifiedAttentionArgs& op = problem.args;
    args.config = config;
    args.query = op.query;
    args.out = op.out;
    args.lse = op.lse;
    // The case's tensors have rows after the last token; here each row is a sequence.
    edit_all({&args.query, &args.out, &args.lse}, [&](Tensor& tensor) { tensor.shape[0] = problem.num_tokens; });
    args.kv_cache = op.cache.key_cache;
    args.kv_cache.dtype = DType::kUInt8;
    args.kv_cache.shape[3] = args.kv_cache.strides[2];  // key row and value row
    args.block_table = op.block_table;
    args.seq_lens = op.seq_lens;
    args.softmax_scale = op.softmax_scale;
    args.rotation = rotation.view;
    if (config.key_bits == 8) return;
    centroids = table_tensor(centroid_table(config.key_bits, head_size), {1 << config.key_bits});
    args.centroids = centroids.view;
  }

  std::vector<cuda::TensorRef> tensors_of(TurboQuantDecodeArgs& of) const {
    return {&of.query, &of.out, &of.lse, &of.kv_cache, &of.block_table, &of.seq_lens, &of.rotation, &of.centroids};
  }

  static AttentionCase::Options options(const TurboQuantConfig& config, int head_size, DType dtype) {
    AttentionCase::Options options;
    options.mode = mode_name(config);
    options.head_size = head_size;
    options.dtype = dtype;
    options.layout = Layout::kPackedRow;
    options.sequences = {{1, 53}, {1, 1}, {1, 700}, {1, 16}, {1, 17}};
    return options;
  }

  AttentionCase problem;
  OwnedTensor rotation, centroids;
  TurboQuantDecodeArgs args;
};

TEST(CudaTurboQuant, DecodesWithinTheTolerance) {
  for (const TurboQuantConfig& config : kConfigs) {
    if (!modes_built({mode_name(config)})) continue;
    for (const int head_size : {64, 128, 256}) {
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
        SCOPED_TRACE(mode_name(config) + " d" + std::to_string(head_size) + " " + std::string(dtype_name(dtype)));
        DecodeCase decode(config, head_size, dtype);
        AttentionCase& problem = decode.problem;
        prepare_for_device(problem);
        std::fill(problem.out.bytes.begin(), problem.out.bytes.end(), std::uint8_t{0xFF});
        std::fill(problem.lse.bytes.begin(), problem.lse.bytes.end(), std::uint8_t{0xFF});
        TurboQuantDecodeArgs on_gpu = decode.args;
        const Result<cuda::DeviceMirror> mirror = cuda::DeviceMirror::upload(decode.tensors_of(on_gpu));
        ASSERT_TRUE(mirror.ok()) << mirror.status().message();
        QUIRE_ASSERT_OK(turboquant_decode_attention(on_gpu, nullptr));
        QUIRE_ASSERT_OK(cuda::synchronize());
        QUIRE_ASSERT_OK(mirror->download(decode.args.out));
        QUIRE_ASSERT_OK(mirror->download(decode.args.lse));
        problem.run_oracle();
        EXPECT_TRUE(problem.matches());
      }
    }
  }
}

// No other test gives tables for these head sizes: an address that an earlier test freed may be trusted for its sizes.
TEST(CudaTurboQuant, TablesOnTheDeviceAreComparedOnceThenTrusted) {
  constexpr int kHeadSize = 80, kSmaller = 48;
  const TurboQuantConfig config{.key_bits = 4, .value_bits = 4};
  QUIRE_NEEDS_MODES(mode_name(config));
  StoreCase store(config, kHeadSize, DType::kFloat32, slot_bytes_of(config, kHeadSize));
  StoreCase smaller(config, kSmaller, DType::kFloat32, slot_bytes_of(config, kSmaller));
  const auto poisoned = store.cache;
  std::vector<float> identity(kHeadSize * kHeadSize, 0.0F);
  for (int i = 0; i < kHeadSize; ++i) identity[static_cast<std::size_t>(i * kHeadSize + i)] = 1.0F;
  const auto bytes_of = [](const std::vector<float>& values) { return values.size() * sizeof(float); };

  Result<cuda::DeviceBuffer> rotation = cuda::DeviceBuffer::copy_of(identity.data(), bytes_of(identity));
  ASSERT_TRUE(rotation.ok()) << rotation.status().message();
  for (StoreCase* of : {&store, &smaller}) {
    of->args.rotation.data = rotation->data();
    of->args.rotation.device = Device::cuda();
  }
  // A wrong table is refused every time, and nothing is stored.
  for (int round = 0; round < 2; ++round) {
    const Status wrong = store.run_on_gpu(false);
    EXPECT_EQ(wrong.code(), StatusCode::kUnsupported);
    EXPECT_NE(wrong.message().find("rotation[0, 0] is 1.000000; only the Walsh-Hadamard matrix"), std::string::npos)
        << wrong.message();
    EXPECT_EQ(store.cache, poisoned);
  }
  // A right one is accepted, and from then on not looked at again.
  const std::vector<float> right = rotation_table(kHeadSize);
  QUIRE_ASSERT_OK(rotation->copy_in(right.data(), bytes_of(right)));
  QUIRE_ASSERT_OK(store.run_on_gpu(false));
  QUIRE_ASSERT_OK(rotation->copy_in(identity.data(), bytes_of(identity)));
  QUIRE_ASSERT_OK(store.run_on_gpu(false));
  // For another head size the address is new.
  EXPECT_EQ(smaller.run_on_gpu(false).code(), StatusCode::kUnsupported);

  // The same holds for a codebook, of the store and of the decode.
  const std::vector<float> zeros(15, 0.0F);
  Result<cuda::DeviceBuffer> midpoints = cuda::DeviceBuffer::copy_of(zeros.data(), bytes_of(zeros));
  ASSERT_TRUE(midpoints.ok()) << midpoints.status().message();
  store.args.midpoints.data = midpoints->data();
  store.args.midpoints.device = Device::cuda();
  const Status wrong = store.run_on_gpu(false);
  EXPECT_EQ(wrong.code(), StatusCode::kUnsupported);
  EXPECT_NE(wrong.message().find("midpoints[0] is 0.000000; only the Lloyd-Max codebook"), std::string::npos)
      << wrong.message();
  const std::vector<float> right_midpoints = midpoint_table(4, kHeadSize);
  QUIRE_ASSERT_OK(midpoints->copy_in(right_midpoints.data(), bytes_of(right_midpoints)));
  QUIRE_ASSERT_OK(store.run_on_gpu(false));
}

TEST(CudaTurboQuant, ATableWithoutElementsOrOnAnotherDeviceIsRefused) {
  const TurboQuantConfig config{.key_bits = 4, .value_bits = 4};
  QUIRE_NEEDS_MODES(mode_name(config));
  StoreCase store(config, 64, DType::kFloat32, 70);
  const auto poisoned = store.cache;
  store.args.rotation.data = nullptr;
  store.args.rotation.device = Device::cuda();
  const Status null = store.run_on_gpu(false);
  EXPECT_NE(null.message().find("rotation is a null pointer"), std::string::npos) << null.message();
  // A call on the CPU takes tables on the CPU.
  store.args.rotation = store.rotation.view;
  store.args.rotation.device = Device::cuda();
  const Status on_cpu = turboquant_store(store.args, nullptr);
  EXPECT_NE(on_cpu.message().find("rotation is on cuda:0, but the call's other tensors are on cpu"), std::string::npos)
      << on_cpu.message();
  EXPECT_EQ(store.cache, poisoned);
}

// A captured decode replays with other lengths; a table that was never compared cannot be captured, and its refusal
// leaves the capture whole.
TEST(CudaTurboQuant, ADecodeIsCapturedAfterItsTablesWereCompared) {
  constexpr int kHeadSize = 160;  // no other test's
  const TurboQuantConfig config{.key_bits = 4, .value_bits = 4};
  QUIRE_NEEDS_MODES(mode_name(config));
  DecodeCase decode(config, kHeadSize, DType::kFloat32);
  AttentionCase& problem = decode.problem;
  TurboQuantDecodeArgs on_gpu = decode.args;
  const Result<cuda::DeviceMirror> mirror = cuda::DeviceMirror::upload(decode.tensors_of(on_gpu));
  ASSERT_TRUE(mirror.ok()) << mirror.status().message();

  cudaStream_t stream = nullptr;
  QUIRE_ASSERT_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cudaGraph_t graph = nullptr;
  QUIRE_ASSERT_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  const Status too_early = turboquant_decode_attention(on_gpu, stream);
  QUIRE_ASSERT_CUDA(cudaStreamEndCapture(stream, &graph));
  QUIRE_ASSERT_CUDA(cudaGraphDestroy(graph));
  EXPECT_EQ(too_early.code(), StatusCode::kUnsupported);
  EXPECT_NE(too_early.message().find("make a call with it before the capture"), std::string::npos)
      << too_early.message();

  QUIRE_ASSERT_OK(turboquant_decode_attention(on_gpu, stream));
  QUIRE_ASSERT_CUDA(cudaStreamSynchronize(stream));
  QUIRE_ASSERT_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  QUIRE_ASSERT_OK(turboquant_decode_attention(on_gpu, stream));
  QUIRE_ASSERT_CUDA(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t replay = nullptr;
  QUIRE_ASSERT_CUDA(cudaGraphInstantiate(&replay, graph, 0));
  for (const std::vector<std::int64_t>& lengths :
       {std::vector<std::int64_t>{53, 1, 700, 16, 17}, {12, 0, 90, 3, 1}, {1, 1, 256, 15, 9}}) {
    problem.seq_lens.fill_integers(lengths);
    QUIRE_ASSERT_CUDA(cudaMemcpy(const_cast<void*>(on_gpu.seq_lens.data), problem.seq_lens.bytes.data(),
                                 problem.seq_lens.bytes.size(), cudaMemcpyHostToDevice));
    std::vector<std::vector<std::uint8_t>> outputs, log_sums;
    for (const bool replayed : {true, false}) {
      if (replayed) {
        QUIRE_ASSERT_CUDA(cudaGraphLaunch(replay, stream));
      } else {
        QUIRE_ASSERT_OK(turboquant_decode_attention(on_gpu, stream));
      }
      QUIRE_ASSERT_CUDA(cudaStreamSynchronize(stream));
      std::fill(problem.out.bytes.begin(), problem.out.bytes.end(), std::uint8_t{0xFF});
      std::fill(problem.lse.bytes.begin(), problem.lse.bytes.end(), std::uint8_t{0xFF});
      QUIRE_ASSERT_OK(mirror->download(decode.args.out));
      QUIRE_ASSERT_OK(mirror->download(decode.args.lse));
      outputs.push_back(problem.out.bytes);
      log_sums.push_back(problem.lse.bytes);
    }
    EXPECT_EQ(outputs[0], outputs[1]);
    EXPECT_EQ(log_sums[0], log_sums[1]);
  }
  QUIRE_ASSERT_CUDA(cudaGraphExecDestroy(replay));
  QUIRE_ASSERT_CUDA(cudaGraphDestroy(graph));
  QUIRE_ASSERT_CUDA(cudaStreamDestroy(stream));
}

}  // namespace
}  // namespace quire::testing
