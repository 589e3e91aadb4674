// A plan on CUDA is made by host code and is a pure function of the problem, so it is tested here without a device.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "call/plan_data.h"
#include "format/build_config.h"
#include "format/formats.h"
#include "quire/ops.h"
#include "support/modes.h"

namespace quire::testing {
namespace {

// A decode on an H200, or on the first GPU that this build has code for.
AttentionProblem decode_problem(const char* mode) {
  AttentionProblem problem;
  problem.device = Device::cuda();
  problem.mode = mode_of(mode);
  problem.num_q_heads = 32;
  problem.num_kv_heads = 8;
  problem.head_size = problem.head_size_v = 128;
  problem.block_size = 16;
  problem.max_num_tokens = problem.max_batch = 64;
  problem.max_query_len = 1;
  problem.max_seq_len = 8192;
  for (const int capability : {90, 80, 86, 89, 100, 103, 120, 121}) {
    problem.arch = {capability / 10, capability % 10, 132, 227 * 1024};
    if (plan_unified_attention(problem).ok()) break;
  }
  return problem;
}

AttentionProblem prefill_problem(const char* mode) {
  AttentionProblem problem = decode_problem(mode);
  problem.max_query_len = problem.max_num_tokens = 512;
  problem.max_batch = 1;
  return problem;
}

std::string kernel_of(const AttentionProblem& problem) {
  const Result<AttentionPlan> plan = plan_unified_attention(problem);
  return plan.ok() ? plan->describe() : plan.status().message();
}

class CudaPlan : public ::testing::Test {
  void SetUp() override {
    if (!quire_with_cuda) GTEST_SKIP() << "this build has no CUDA";
    if (!modes_built({"int4_per_token_head", "bfloat16"})) GTEST_SKIP() << "not built: int4_per_token_head, bfloat16";
  }
};

TEST_F(CudaPlan, NamesItsKernels) {
  AttentionProblem decode = decode_problem("int4_per_token_head");
  EXPECT_NE(kernel_of(decode).find("decode_pages<128> (4 rows"), std::string::npos) << kernel_of(decode);
  decode.max_query_len = 4;  // 16 rows of a KV head
  EXPECT_NE(kernel_of(decode).find("decode_pages<128> (16 rows"), std::string::npos) << kernel_of(decode);
  decode = decode_problem("int4_per_token_head");
  decode.block_size = 24;
  EXPECT_NE(kernel_of(decode).find("decode_split<128>"), std::string::npos) << kernel_of(decode);
  decode.block_size = 16;
  decode.whole_pages = false;
  EXPECT_NE(kernel_of(decode).find("decode_split<128>"), std::string::npos) << kernel_of(decode);
  const Result<AttentionPlan> prefill = plan_unified_attention(prefill_problem("int4_per_token_head"));
  ASSERT_TRUE(prefill.ok()) << prefill.status().message();
  EXPECT_NE(prefill->describe().find("prefill"), std::string::npos) << prefill->describe();
  EXPECT_NE(prefill->describe().find("decode_pages"), std::string::npos) << prefill->describe();
  EXPECT_TRUE(prefill->tensor_cores());

  AttentionProblem problem = prefill_problem("int4_per_token_head");
  problem.query_dtype = DType::kFloat32;
  EXPECT_NE(kernel_of(problem).find("attend_any"), std::string::npos);
  EXPECT_FALSE(plan_unified_attention(problem)->tensor_cores());
  problem = prefill_problem("bfloat16");
  problem.row_alignment = 2;
  EXPECT_NE(kernel_of(problem).find("attend_any"), std::string::npos);
  problem = prefill_problem("bfloat16");
  problem.query_dtype = DType::kFloat16;  // bfloat16 cannot hold it
  EXPECT_NE(kernel_of(problem).find("attend_any"), std::string::npos);
  problem = decode_problem("int4_per_token_head");
  problem.head_size = problem.head_size_v = 320;
  EXPECT_NE(kernel_of(problem).find("attend_any"), std::string::npos);
}

TEST_F(CudaPlan, CoversTheKeysWithItsSplits) {
  const AttentionPlan plan = *plan_unified_attention(decode_problem("int4_per_token_head"));
  EXPECT_GE(plan.data()->split_size * plan.data()->max_splits, 8192);
  EXPECT_LT(plan.data()->split_size * (plan.data()->max_splits - 1), 8192);
}

// The splits suit the GPU of the problem, not the one that they were tuned on.
TEST_F(CudaPlan, FitsItsSplitsToTheMultiprocessors) {
  AttentionProblem problem = decode_problem("int4_per_token_head");
  problem.whole_pages = false;  // decode_pages needs no splits
  problem.max_num_tokens = problem.max_batch = 1;
  problem.max_seq_len = 131072;
  std::int64_t before = 0;
  for (const int multiprocessors : {20, 78, 132}) {
    problem.arch.num_multiprocessors = multiprocessors;
    const Result<AttentionPlan> plan = plan_unified_attention(problem);
    ASSERT_TRUE(plan.ok());
    EXPECT_GT(plan->data()->max_splits, before) << multiprocessors;
    // The splits of 8 KV heads, three blocks a multiprocessor, fill whole waves.
    const std::int64_t wave = 3 * multiprocessors;
    const std::int64_t blocks = plan->data()->max_splits * 8;
    EXPECT_GE(static_cast<double>(blocks) / static_cast<double>((blocks + wave - 1) / wave * wave), 0.9) << blocks;
    before = plan->data()->max_splits;
  }
}

TEST_F(CudaPlan, IsAFunctionOfTheProblem) {
  for (const AttentionProblem& problem : {decode_problem("int4_per_token_head"), prefill_problem("bfloat16")}) {
    const AttentionPlan a = *plan_unified_attention(problem);
    const AttentionPlan b = *plan_unified_attention(problem);
    EXPECT_EQ(a.describe(), b.describe());
    EXPECT_EQ(a.data()->kernel_ids[0], b.data()->kernel_ids[0]);
    EXPECT_EQ(a.data()->kernel_ids[1], b.data()->kernel_ids[1]);
    EXPECT_EQ(a.data()->split_size, b.data()->split_size);
    EXPECT_EQ(a.workspace_bytes(), b.workspace_bytes());
  }
}

TEST_F(CudaPlan, RefusesDevicesItDoesNotKnow) {
  AttentionProblem problem = decode_problem("int4_per_token_head");
  problem.arch = {};
  EXPECT_EQ(plan_unified_attention(problem).status().message(),
            "arch has compute capability 0.0 and 0 multiprocessors; a problem on cuda takes it from device_arch or "
            "problem_of");
  problem.arch = {7, 5, 40, 64 * 1024};
  const Status status = plan_unified_attention(problem).status();
  EXPECT_EQ(status.code(), StatusCode::kUnsupported);
  EXPECT_TRUE(status.message().starts_with("the device has compute capability 7.5; this build has code for "))
      << status.message();
}

TEST_F(CudaPlan, EveryPairOfFormatsHasAKernel) {
  for (const format::FormatInfo& key : format::kFormatTable) {
    for (const format::FormatInfo& value : format::kFormatTable) {
      const std::string mode = "k=" + std::string(key.name) + ",v=" + std::string(value.name);
      const Result<ModeId> id = parse_kv_cache_dtype(mode);
      if (!id.ok() || !(*mode_info(*id))->compiled) continue;
      for (const DType query : {DType::kFloat32, DType::kBFloat16}) {
        AttentionProblem problem = decode_problem("int4_per_token_head");
        problem.mode = *id;
        problem.query_dtype = query;
        EXPECT_TRUE(plan_unified_attention(problem).ok())
            << mode << ": " << plan_unified_attention(problem).status().message();
      }
    }
  }
}

TEST(DeviceArch, OfDevices) {
  const Result<Arch> cpu = device_arch(Device::cpu());
  ASSERT_TRUE(cpu.ok());
  EXPECT_EQ(cpu->num_multiprocessors, 0);
  EXPECT_EQ(device_arch({static_cast<DeviceType>(7), 0}).status().message(),
            "device is an unknown device; supported: cpu and cuda");
  if (!quire_with_cuda) {
    EXPECT_EQ(device_arch(Device::cuda()).status().code(), StatusCode::kUnsupported);
  }
}

}  // namespace
}  // namespace quire::testing
