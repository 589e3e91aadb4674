// Backends: the defaults of QuantKVBackend, the built-in one, and the registry.
#include "quire/backend.h"

#include <cxxabi.h>

#include <cstdlib>
#include <map>
#include <mutex>

#include "core/dispatch.h"
#include "core/mode_table.h"

namespace quire {
namespace {

std::string class_name(const QuantKVBackend& backend) {
  int status = 0;
  char* demangled = abi::__cxa_demangle(typeid(backend).name(), nullptr, nullptr, &status);
  std::string name = status == 0 ? demangled : typeid(backend).name();
  std::free(demangled);
  return name;
}

// Serves a mode of the table through its formats.
class TableBackend final : public QuantKVBackend {
 public:
  explicit TableBackend(const ModeInfo& mode)
      : mode_(mode.id),
        key_(format::format_info(format::find_format(mode.key_format))),
        value_(format::format_info(format::find_format(mode.value_format))) {}

  ModeId mode() const override { return mode_; }
  int packing_factor() const override { return key_.unit_bytes == 0 ? 1 : key_.unit / key_.unit_bytes; }
  bool needs_scale_caches() const override {
    return key_.meta_place == format::MetaPlace::kScaleCache || value_.meta_place == format::MetaPlace::kScaleCache;
  }
  Result<std::int64_t> row_bytes(int head_size, bool is_value) const override {
    const format::FormatInfo& info = is_value ? value_ : key_;
    if (head_size % info.unit != 0) {
      return invalid_argument("head_size is " + std::to_string(head_size) + "; format " + std::string(info.name) +
                              " packs multiples of " + std::to_string(info.unit));
    }
    return info.row_bytes(head_size);
  }
  // Both ops dispatch modes of the table before they ask a backend, so the virtuals lead straight to the kernels.
  Status reshape_and_cache(const ReshapeAndCacheArgs& args, void* stream) const override {
    ReshapeAndCacheArgs own = args;
    own.mode = mode_;
    return core::store(own, stream);
  }
  Status unified_attention(const UnifiedAttentionArgs& args, void* stream) const override {
    UnifiedAttentionArgs own = args;
    own.mode = mode_;
    return core::attend(own, nullptr, nullptr, 0, nullptr, stream);
  }

 private:
  ModeId mode_;
  const format::FormatInfo& key_;
  const format::FormatInfo& value_;
};

struct Registration {
  std::type_index backend_class = typeid(void);
  BackendFactory factory;
  std::unique_ptr<const QuantKVBackend> backend;
};

struct Registry {
  // Recursive: a factory or a backend's constructor may look up another backend.
  std::recursive_mutex mutex;
  std::map<ModeId, Registration> registrations;
};

Registry& registry() {
  static Registry instance;
  return instance;
}

// NONE and FP8_PER_TENSOR have no backend; both ops serve them.
Status check_quantizing(const ModeInfo& mode) {
  if (mode.kv_quant_mode == KVQuantMode::kNone) {
    return invalid_argument("mode " + mode.name +
                            " is NONE, which quantizes nothing and has no backend; call the ops directly");
  }
  if (mode.kv_quant_mode == KVQuantMode::kFp8PerTensor) {
    return invalid_argument("mode " + mode.name +
                            " is FP8_PER_TENSOR, which has no backend; call the ops directly with k_scale and v_scale");
  }
  return {};
}

}  // namespace

Result<int> QuantKVBackend::packed_head_size(int head_size) const {
  if (head_size < 1 || head_size % packing_factor() != 0) {
    return invalid_argument("head_size is " + std::to_string(head_size) + "; " + class_name(*this) +
                            " packs multiples of " + std::to_string(packing_factor()));
  }
  return head_size / packing_factor();
}

Result<std::int64_t> QuantKVBackend::row_bytes(int head_size, bool) const {
  Result<int> packed = packed_head_size(head_size);
  if (!packed) return packed.status();
  return static_cast<std::int64_t>(*packed);
}

Result<ScaleCaches> QuantKVBackend::allocate_scale_caches(std::int64_t num_blocks, int block_size,
                                                          int num_kv_heads) const {
  ScaleCaches caches;
  if (!needs_scale_caches()) return caches;
  if (num_blocks < 0 || block_size < 1 || num_kv_heads < 1) {
    return invalid_argument("scale caches of [" + std::to_string(num_blocks) + ", " + std::to_string(block_size) +
                            ", " + std::to_string(num_kv_heads) + "] were asked for; every extent must be at least 1");
  }
  const auto size = static_cast<std::size_t>(num_blocks) * static_cast<std::size_t>(block_size) *
                    static_cast<std::size_t>(num_kv_heads);
  caches.k.resize(size);
  caches.v.resize(size);
  caches.k_scale_cache = Tensor::contiguous(caches.k.data(), DType::kFloat32, {num_blocks, block_size, num_kv_heads});
  caches.v_scale_cache = Tensor::contiguous(caches.v.data(), DType::kFloat32, {num_blocks, block_size, num_kv_heads});
  return caches;
}

Status QuantKVBackend::reshape_and_cache(const ReshapeAndCacheArgs& args, void* stream) const {
  if (read_format().empty()) {
    return unsupported("class " + class_name(*this) + " neither overrides reshape_and_cache nor names a read_format");
  }
  const Result<ModeId> format_mode = parse_kv_cache_dtype(read_format());
  if (!format_mode) return format_mode.status();
  ReshapeAndCacheArgs own = args;
  own.mode = *format_mode;
  return core::store(own, stream);
}

Status QuantKVBackend::unified_attention(const UnifiedAttentionArgs& args, void* stream) const {
  if (!read_format().empty()) {
    const Result<ModeId> format_mode = parse_kv_cache_dtype(read_format());
    if (!format_mode) return format_mode.status();
    UnifiedAttentionArgs own = args;
    own.mode = *format_mode;
    return core::attend(own, nullptr, nullptr, 0, nullptr, stream);
  }
  if (has_decode_row()) return core::attend(args, nullptr, nullptr, 0, this, stream);
  return unsupported(
      "class " + class_name(*this) +
      " does not override unified_attention and has no readable format; name a read_format or override decode_row");
}

bool QuantKVBackend::decode_row(const CacheRow&, float*) const { return false; }

Status register_backend(ModeId id, std::type_index backend_class, BackendFactory factory) {
  const Result<ModeInfo> mode = mode_info(id);
  if (!mode) return mode.status();
  if (Status status = check_quantizing(*mode); !status) return status;
  if (!factory)
    return invalid_argument("factory of mode " + mode->name + " is empty; give a function that makes the backend");
  if (!mode->registered) {
    if (backend_class == typeid(TableBackend)) return {};
    return already_exists("mode " + mode->name +
                          " is quire's own and has its backend; register_mode a name for another one");
  }
  std::lock_guard lock(registry().mutex);
  auto [position, inserted] = registry().registrations.try_emplace(id);
  if (!inserted && position->second.backend_class != backend_class) {
    return already_exists("mode " + mode->name +
                          " is served by a registered backend of another class; the same class again is accepted");
  }
  if (inserted) {
    position->second.backend_class = backend_class;
    position->second.factory = std::move(factory);
  }
  return {};
}

Result<const QuantKVBackend*> get_backend(ModeId id) {
  const Result<ModeInfo> mode = mode_info(id);
  if (!mode) return mode.status();
  if (Status status = check_quantizing(*mode); !status) return status;
  if (!mode->compiled) {
    return unsupported("mode " + mode->name +
                       " is not in this build; configure with -DQUIRE_MODES=all or a list that names it");
  }
  std::lock_guard lock(registry().mutex);
  auto position = registry().registrations.find(id);
  if (position == registry().registrations.end()) {
    if (mode->registered) return not_found("mode " + mode->name + " has no backend; call register_backend for it");
    position = registry().registrations.try_emplace(id).first;
    position->second.backend_class = typeid(TableBackend);
    position->second.backend = std::make_unique<TableBackend>(*mode);
  }
  Registration& registration = position->second;
  if (registration.backend == nullptr) {
    std::unique_ptr<QuantKVBackend> made = registration.factory();
    if (made == nullptr)
      return invalid_argument("factory of mode " + mode->name + " yielded nothing; it must make a backend");
    if (made->mode() != id) {
      const Result<ModeInfo> other = mode_info(made->mode());
      return invalid_argument("factory of mode " + mode->name + " yielded a backend of mode " +
                              (other ? other->name : "id " + std::to_string(static_cast<int>(made->mode()))) +
                              "; its mode() must be the one it is registered for");
    }
    registration.backend = std::move(made);
  }
  return registration.backend.get();
}

Result<const QuantKVBackend*> get_backend(std::string_view kv_cache_dtype) {
  const Result<ModeId> mode = parse_kv_cache_dtype(kv_cache_dtype);
  if (!mode) return mode.status();
  return get_backend(*mode);
}

Result<const QuantKVBackend*> get_backend(KVQuantMode value) {
  if (value == KVQuantMode::kNone) {
    return invalid_argument("KVQuantMode NONE quantizes nothing and has no backend; call the ops directly");
  }
  const Result<ModeId> mode = mode_from_kv_quant_mode(value);
  if (!mode) return mode.status();
  return get_backend(*mode);
}

bool has_backend(ModeId mode) { return get_backend(mode).ok(); }
bool has_backend(std::string_view kv_cache_dtype) { return get_backend(kv_cache_dtype).ok(); }
bool has_backend(KVQuantMode value) { return get_backend(value).ok(); }

}  // namespace quire
