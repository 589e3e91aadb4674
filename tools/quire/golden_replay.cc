#include "golden_replay.h"

#include "golden_gates.h"
#include "quire/layout.h"

namespace quire::cli {

void Replay::measure(const std::string& what, double error, double tolerance) {
  for (Measure& known : result.measures) {
    if (known.what == what) {
      known.error = worse(known.error, error);
      return;
    }
  }
  result.measures.push_back({what, error, tolerance});
}

Result<KVCacheViews> caches_of(const GoldenCase& golden, const ModeInfo& mode, std::int64_t head_size,
                               std::int64_t head_size_v, HostBuffers* scratch, std::uint8_t fill) {
  const auto get = [&](const char* name) {
    const Tensor tensor = golden.tensor(name);
    return scratch != nullptr ? scratch->filled_like(tensor, fill) : tensor;
  };
  for (const char* name : {"k_scale_cache", "v_scale_cache"}) {
    if (!golden.has(name)) continue;
    if (Status status = golden.require(name, 3); !status) return status;
  }
  KVCacheViews caches;
  caches.k_scale_cache = get("k_scale_cache");
  caches.v_scale_cache = get("v_scale_cache");
  if (golden.has("kv_cache")) {
    if (Status status = golden.require("kv_cache", 4); !status) return status;
    const Tensor packed = get("kv_cache");
    // The elements of a K row, of a V row and of both: those of DiffKV are plain, those of a slot are bytes.
    std::int64_t k_row = head_size, v_row = head_size_v, both = head_size + head_size_v;
    if (mode.shared_slot) {
      KVCacheSpec spec;
      spec.mode = mode.id;
      spec.head_size = static_cast<int>(head_size);
      spec.head_size_v = static_cast<int>(head_size_v);
      const auto layout = make_layout(spec);
      if (!layout.ok()) return golden.refuse(layout.status().message());
      k_row = layout->k_data_bytes, v_row = layout->v_data_bytes, both = layout->bytes_per_token_head;
      for (Status status : {golden.confirm("key_packed_size", k_row), golden.confirm("slot_size_aligned", both)}) {
        if (!status) return status;
      }
    }
    if (packed.shape[3] != both) {
      return golden.refuse("'kv_cache' is " + to_string(packed) + ", its last dimension needs to be " +
                           std::to_string(both));
    }
    caches.key_cache = packed.slice_last(0, k_row);
    caches.value_cache = packed.slice_last(k_row, k_row + v_row);
  } else {
    for (const char* name : {"key_cache", "value_cache"}) {
      if (Status status = golden.require(name, 4); !status) return status;
    }
    caches.key_cache = get("key_cache");
    caches.value_cache = get("value_cache");
  }
  return caches;
}

}  // namespace quire::cli
