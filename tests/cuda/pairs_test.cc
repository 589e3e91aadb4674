// Every pair of formats on CUDA, those included that no mode names: the kernels that look formats up at run time store
// and read them.
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/device_problem.h"
#include "format/formats.h"

namespace quire::testing {
namespace {

std::vector<std::string> every_pair() {
  std::vector<std::string> modes;
  for (const format::FormatInfo& key : format::kFormatTable) {
    for (const format::FormatInfo& value : format::kFormatTable) {
      const std::string mode = "k=" + std::string(key.name) + ",v=" + std::string(value.name);
      const Result<ModeId> id = parse_kv_cache_dtype(mode);
      if (id.ok() && (*mode_info(*id))->compiled) modes.push_back(mode);
    }
  }
  return modes;
}

TEST(CudaPairs, EveryPairIsReadAsByTheOracle) {
  for (const std::string& mode : every_pair()) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      SCOPED_TRACE(mode + " from " + std::string(dtype_name(dtype)));
      AttentionCase::Options options;
      options.mode = mode;
      options.dtype = dtype;
      options.sequences = {{1, 45}, {3, 9}};
      AttentionCase problem(options);
      ASSERT_TRUE(problem.check());
    }
  }
}

TEST(CudaPairs, EveryPairIsStoredAsOnTheCpu) {
  constexpr std::int64_t kTokens = 37, kHeads = 3, kHeadSize = 96;
  for (const std::string& mode : every_pair()) {
    for (const Layout layout : {Layout::kNhd, Layout::kHnd}) {  // in the others not every pair is aligned
      SCOPED_TRACE(mode + " " + std::string(layout_name(layout)));
      PagedCache::Options options;
      options.mode = mode;
      options.head_size = kHeadSize;
      options.num_kv_heads = kHeads;
      options.num_blocks = 4;
      options.layout = layout;
      Random random(23);
      OwnedTensor key(DType::kBFloat16, {kTokens, kHeads, kHeadSize});
      OwnedTensor value(DType::kBFloat16, {kTokens, kHeads, kHeadSize});
      key.fill(random.normals(kTokens * kHeads * kHeadSize));
      value.fill(random.normals(kTokens * kHeads * kHeadSize));
      std::vector<std::int64_t> slots(4 * 16);
      for (std::size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<std::int64_t>(i);
      random.shuffle(slots);
      slots.resize(kTokens);
      slots[5] = -1;
      OwnedTensor slot_mapping(DType::kInt64, {kTokens});
      slot_mapping.fill_integers(slots);
      ReshapeAndCacheArgs args;
      args.key = key.view;
      args.value = value.view;
      args.slot_mapping = slot_mapping.view;
      const PagedCache on_cpu(options), on_gpu(options);
      on_cpu.apply(args);
      QUIRE_ASSERT_OK(reshape_and_cache(args, nullptr));
      on_gpu.apply(args);
      QUIRE_ASSERT_OK(store_on_device(args));
      ASSERT_TRUE(on_gpu.bytes() == on_cpu.bytes());
    }
  }
}

}  // namespace
}  // namespace quire::testing
