// The tiles of the store that depend on the number of rows, which the small batches of store_test.cc do not reach.
#include <algorithm>
#include <limits>

#include "cuda/device_problem.h"
#include "support/modes.h"
#include "support/owned_tensor.h"
#include "support/paged_cache.h"
#include "support/random.h"

namespace quire::testing {
namespace {

// 9000 rows of 128 take the tile of few lanes a row and fill its last block partly.
TEST(CudaStore, BytesOfManyRowsEqualTheCpus) {
  constexpr std::int64_t kTokens = 1125, kSlots = 1152, kHeads = 8, kHeadSize = 128;
  int n = 0;
  for (const std::string& mode : table_modes()) {
    for (const Layout layout : kAllLayouts) {
      for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
        if (layout != Layout::kNhd && dtype != DType::kBFloat16) continue;
        SCOPED_TRACE(mode + " " + std::string(layout_name(layout)) + " from " + std::string(dtype_name(dtype)));
        PagedCache::Options options;
        options.mode = mode;
        options.head_size = kHeadSize;
        options.num_kv_heads = kHeads;
        options.block_size = 16 << n++ % 3;
        options.num_blocks = kSlots / options.block_size;
        options.layout = layout;
        Random random(17);
        // Rows of nothing, of one value, with an element that is not finite; the rest Gaussian.
        std::vector<float> rows = random.normals(kTokens * kHeads * kHeadSize);
        for (std::int64_t r = 0; r < kTokens * kHeads; r += 5) {
          const auto first = rows.begin() + r * kHeadSize;
          const float fill[] = {0.0F, -0.0F, 0.7F, 1e-30F};
          if (r % 25 < 20) std::fill(first, first + kHeadSize, fill[r % 4]);
          if (r % 40 == 0) first[r % kHeadSize] = std::numeric_limits<float>::quiet_NaN();
          if (r % 40 == 10) first[r % kHeadSize] = -std::numeric_limits<float>::infinity();
        }
        OwnedTensor key(dtype, {kTokens, kHeads, kHeadSize}), value(dtype, {kTokens, kHeads, kHeadSize});
        key.fill(rows);
        std::reverse(rows.begin(), rows.end());
        value.fill(rows);
        std::vector<std::int64_t> slots(kSlots);
        for (std::size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<std::int64_t>(i);
        random.shuffle(slots);
        slots.resize(kTokens);
        slots[3] = slots[4] = slots[kTokens - 1] = -1;
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
}

}  // namespace
}  // namespace quire::testing
