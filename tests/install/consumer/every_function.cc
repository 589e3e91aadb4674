// Links every public function that is not inline, and derives from every public class. Prints how many functions, which
// tests/install/shared compares with what the headers declare.
#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

#include "quire/quire.h"
#include "quire/quire_c.h"

namespace {

std::vector<void (*)()> functions;

// The type selects the overload.
template <class F>
void link(F* function) {
  functions.push_back(reinterpret_cast<void (*)()>(function));
}

// A mode of floats, which are read in the place of another mode's.
class Backend : public quire::QuantKVBackend {
 public:
  quire::ModeId mode() const override { return *quire::parse_kv_cache_dtype("every_function"); }
  std::string_view read_format() const override { return "float32"; }
};

}  // namespace

int main() {
  using namespace quire;
  using Name = std::string_view;
  link<Status(ModeId, BackendClass, BackendFactory)>(register_backend);
  link<Result<const QuantKVBackend*>(ModeId)>(get_backend);
  link<Result<const QuantKVBackend*>(Name)>(get_backend);
  link<Result<const QuantKVBackend*>(KVQuantMode)>(get_backend);
  link<bool(ModeId)>(has_backend);
  link<bool(Name)>(has_backend);
  link<bool(KVQuantMode)>(has_backend);
  link(make_layout);
  link(make_views);
  link(cache_bytes);
  link(kv_quant_mode_name);
  link(kv_quant_mode_from_name);
  link(is_per_token_head);
  link(packing_factor);
  link(packed_head_size);
  link(get_kv_quant_mode);
  link(is_quantized_kv_cache);
  link(kv_cache_uses_per_token_head_scales);
  link(parse_kv_cache_dtype);
  link(mode_from_kv_quant_mode);
  link(mode_info);
  link(list_modes);
  link(register_mode);
  link(reshape_and_cache);
  link(plan_unified_attention);
  link(run_unified_attention);
  link(device_arch);
  link(device_count);
  link(supports);
  link(set_executor);
  link(set_num_threads);
  link(num_threads);
  link(version);
  link(version_number);
  link(problem_of);
  link(unified_attention);
  link(merge_attn_states);
  link(hadamard);
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  link(reshape_and_cache_infer_mode);
#pragma GCC diagnostic pop
  link(set_log_hook);
  link<std::string(const ConstTensor&)>(to_string);
  link<std::string(const Device&)>(to_string);
  link(turboquant_uses_e4b15);
  link(turboquant_mode);
  link(turboquant_store);
  link(turboquant_decode_attention);
  link<Result<KVCacheViews>(const TurboQuantConfig&, const Tensor&, int)>(turboquant_views);
  link<Result<ConstKVCacheViews>(const TurboQuantConfig&, const ConstTensor&, int)>(turboquant_views);
  link(boundary_skip_layers);
  // Those of C.
  link(quire_last_error);
  link(quire_version);
  link(quire_version_number);
  link(quire_device_count);
  link(quire_set_num_threads);
  link(quire_set_executor);
  link(quire_parse_kv_cache_dtype);
  link(quire_mode_name);
  link(quire_get_backend);
  link(quire_backend_row_bytes);
  link(quire_backend_packed_head_size);
  link(quire_backend_needs_scale_caches);
  link(quire_make_layout);
  link(quire_cache_bytes);
  link(quire_make_views);
  link(quire_reshape_and_cache);
  link(quire_unified_attention);
  link(quire_merge_attn_states);
  link(quire_hadamard);
  link(quire_problem_of);
  link(quire_supports);
  link(quire_plan_create);
  link(quire_plan_destroy);
  link(quire_plan_workspace_bytes);
  link(quire_plan_describe);
  link(quire_run_unified_attention);

  // The members of AttentionPlan.
  const AttentionPlan plan;
  if (plan.workspace_bytes() != 0 || plan.tensor_cores() || plan.problem().max_batch != 0) return 1;
  if (plan.describe() != "an empty plan") return 1;

  const Result<ModeId> mode = register_mode({"every_function", {}});
  if (!mode.ok() || !register_backend<Backend>(*mode).ok()) return 1;
  const Result<const QuantKVBackend*> backend = get_backend("every_function");
  if (!backend.ok() || (*backend)->mode() != *mode || (*backend)->has_decode_row()) return 1;
  for (auto* function : functions) {
    if (function == nullptr) return 1;
  }
  std::printf("%d functions\n", static_cast<int>(functions.size()));
}
