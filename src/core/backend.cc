// The backends: what QuantKVBackend does by default, the one that serves the modes of the table, and the registry.
#include "quire/backend.h"

#include <cstdlib>
#include <exception>
#include <limits>
#include <map>
#include <mutex>

#include "core/checks.h"
#include "core/dispatch.h"
#include "core/guard.h"
#include "core/mode_table.h"

namespace quire {
namespace {

// Serves a mode of the table through its formats.
class TableBackend final : public QuantKVBackend {
 public:
  explicit TableBackend(const core::ModeRow& mode)
      : mode_(mode), key_(format::format_info(mode.formats.key)), value_(format::format_info(mode.formats.value)) {}

  ModeId mode() const override { return mode_.id; }
  bool needs_scale_caches() const override { return has_scale_cache(key_) || has_scale_cache(value_); }
  Result<int> packing_factor() const override {
    if (const int factor = key_.packing_factor(); factor > 0) return factor;
    return invalid_argument("packing_factor of " + name() +
                            " is no whole number; ask packed_head_size for the extent of its key cache");
  }
  Result<int> packed_head_size(int head_size) const override {
    const Result<std::int64_t> bytes = row_bytes(head_size, false);
    if (!bytes) return bytes.status();
    return static_cast<int>(*bytes / static_cast<std::int64_t>(dtype_bytes(key_.cache_dtype)));
  }
  Result<std::int64_t> row_bytes(int head_size, bool is_value) const override {
    return core::guarded([&]() -> Result<std::int64_t> {
      const format::FormatInfo& info = is_value ? value_ : key_;
      if (Status status = core::check_multiple(name(), info.unit, head_size); !status) return status;
      return info.row_bytes(head_size);
    });
  }
  Result<ScaleCaches> allocate_scale_caches(std::int64_t num_blocks, int block_size, int num_kv_heads) const override {
    Result<ScaleCaches> caches = QuantKVBackend::allocate_scale_caches(num_blocks, block_size, num_kv_heads);
    if (caches && !has_scale_cache(key_)) caches->k_scale_cache = {};
    if (caches && !has_scale_cache(value_)) caches->v_scale_cache = {};
    return caches;
  }
  // Both ops dispatch modes of the table before they ask a backend, so the virtuals lead straight to the kernels.
  Status reshape_and_cache(const ReshapeAndCacheArgs& args, void* stream) const override {
    return core::store(args, mode_, stream);
  }
  Status unified_attention(const UnifiedAttentionArgs& args, void* stream) const override {
    return core::attend(args, mode_, nullptr, nullptr, 0, nullptr, stream);
  }

 private:
  static bool has_scale_cache(const format::FormatInfo& info) {
    return info.meta_place == format::MetaPlace::kScaleCache;
  }
  std::string name() const { return "mode " + mode_.name; }

  const core::ModeRow& mode_;
  const format::FormatInfo& key_;
  const format::FormatInfo& value_;
};

struct Registration {
  BackendClass the_class = nullptr;
  BackendFactory factory;
  bool constructing = false;
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

// What it takes for a mode to have a backend, once one is registered.
Status check_servable(const ModeInfo& mode) {
  if (Status status = check_quantizing(mode); !status) return status;
  return mode.compiled ? Status() : core::mode_not_built(mode);
}

Result<std::unique_ptr<QuantKVBackend>> make_backend(const ModeInfo& mode, const BackendFactory& factory) {
  std::unique_ptr<QuantKVBackend> made = factory();
  if (made == nullptr)
    return invalid_argument("factory of mode " + mode.name + " yielded nothing; it must make a backend");
  if (made->mode() != mode.id) {
    return invalid_argument("factory of mode " + mode.name + " yielded a backend of mode " +
                            core::mode_name(made->mode()) + "; its mode() must be the one it is registered for");
  }
  return made;
}

}  // namespace

Result<int> QuantKVBackend::packed_head_size(int head_size) const {
  return core::guarded([&]() -> Result<int> {
    const Result<std::int64_t> bytes = row_bytes(head_size, false);
    if (!bytes) return bytes.status();
    if (*bytes < 1 || *bytes > std::numeric_limits<int>::max()) {
      return invalid_argument("row_bytes of mode " + core::mode_name(mode()) + " is " + std::to_string(*bytes) +
                              " at head_size " + std::to_string(head_size) + "; supported: 1 to " +
                              std::to_string(std::numeric_limits<int>::max()));
    }
    return static_cast<int>(*bytes);
  });
}

Result<std::int64_t> QuantKVBackend::row_bytes(int head_size, bool) const {
  return core::guarded([&]() -> Result<std::int64_t> {
    const Result<int> factor = packing_factor();
    if (!factor) return factor.status();
    const std::string who = "mode " + core::mode_name(mode());
    if (*factor < 1) {
      return invalid_argument("packing_factor of " + who + " is " + std::to_string(*factor) +
                              "; supported: 1 and more");
    }
    if (Status status = core::check_multiple(who, *factor, head_size); !status) return status;
    return std::int64_t{head_size / *factor};
  });
}

Result<ScaleCaches> QuantKVBackend::allocate_scale_caches(std::int64_t num_blocks, int block_size,
                                                          int num_kv_heads) const {
  return core::guarded([&]() -> Result<ScaleCaches> {
    ScaleCaches caches;
    if (!needs_scale_caches()) return caches;
    const std::string shape = "[" + std::to_string(num_blocks) + ", " + std::to_string(block_size) + ", " +
                              std::to_string(num_kv_heads) + "]";
    if (num_blocks < 0 || block_size < 1 || num_kv_heads < 1) {
      return invalid_argument("scale caches of " + shape +
                              " were asked for; num_blocks must be at least 0, block_size and num_kv_heads at least 1");
    }
    constexpr std::int64_t kMostBytes = std::numeric_limits<std::ptrdiff_t>::max();
    constexpr std::int64_t kBytes = 2 * sizeof(float);  // of one entry, K and V
    const std::int64_t rows = std::int64_t{block_size} * num_kv_heads;
    if (rows > kMostBytes / kBytes || num_blocks > kMostBytes / kBytes / rows) {
      return invalid_argument("scale caches of " + shape + " were asked for; their bytes must fit in 63 bits");
    }
    const std::int64_t entries = num_blocks * rows;
    auto* zeros = static_cast<float*>(std::calloc(static_cast<std::size_t>(entries), kBytes));
    if (zeros == nullptr && entries > 0)
      return internal_error("no memory for two scale caches of " + shape + " float32");
    caches.memory = std::shared_ptr<void>(zeros, std::free);
    caches.k_scale_cache = Tensor::contiguous(zeros, DType::kFloat32, {num_blocks, block_size, num_kv_heads});
    caches.v_scale_cache = Tensor::contiguous(zeros + entries, DType::kFloat32, {num_blocks, block_size, num_kv_heads});
    return caches;
  });
}

Status QuantKVBackend::reshape_and_cache(const ReshapeAndCacheArgs& args, void* stream) const {
  if (read_format().empty()) {
    return unsupported("the backend of mode " + core::mode_name(mode()) +
                       " neither overrides reshape_and_cache nor names a read_format");
  }
  const Result<ModeId> format_mode = parse_kv_cache_dtype(read_format());
  if (!format_mode) return format_mode.status();
  return core::store(args, *core::find_mode(*format_mode), stream);
}

Status QuantKVBackend::unified_attention(const UnifiedAttentionArgs& args, void* stream) const {
  if (!read_format().empty()) {
    const Result<ModeId> format_mode = parse_kv_cache_dtype(read_format());
    if (!format_mode) return format_mode.status();
    return core::attend(args, *core::find_mode(*format_mode), nullptr, nullptr, 0, nullptr, stream);
  }
  if (has_decode_row()) {
    const Result<const core::ModeRow*> own = core::known_mode(mode());
    if (!own) return own.status();
    return core::attend(args, **own, nullptr, nullptr, 0, this, stream);
  }
  return unsupported("the backend of mode " + core::mode_name(mode()) +
                     " does not override unified_attention and has no readable format; name a read_format or override "
                     "decode_row");
}

bool QuantKVBackend::decode_row(const CacheRow&, float*) const { return false; }

namespace core {

Status thrown(std::string_view what, ModeId mode) {
  std::string message(what);
  message += " of mode " + mode_name(mode) + " threw an exception";
  try {
    throw;
  } catch (const std::exception& exception) {
    message += ": " + quoted(exception.what());
  } catch (...) {
  }
  return internal_error(std::move(message));
}

}  // namespace core

Status register_backend(ModeId id, BackendClass the_class, BackendFactory factory) {
  return core::guarded([&]() -> Status {
    const Result<const core::ModeRow*> known = core::known_mode(id);
    if (!known) return known.status();
    const core::ModeRow* mode = *known;
    if (Status status = check_quantizing(*mode); !status) return status;
    if (!factory)
      return invalid_argument("factory of mode " + mode->name + " is empty; give a function that makes the backend");
    if (!mode->registered) {
      if (the_class == backend_class<TableBackend>()) return {};
      return already_exists("mode " + mode->name +
                            " is quire's own and has its backend; register_mode a name for another one");
    }
    std::lock_guard lock(registry().mutex);
    auto [position, inserted] = registry().registrations.try_emplace(id);
    if (!inserted && position->second.the_class != the_class) {
      return already_exists("mode " + mode->name +
                            " is served by a registered backend of another class; the same class again is accepted");
    }
    if (inserted) {
      position->second.the_class = the_class;
      position->second.factory = std::move(factory);
    }
    return {};
  });
}

bool has_backend(ModeId id) {
  const core::ModeRow* mode = core::find_mode(id);
  if (mode == nullptr || !check_servable(*mode)) return false;
  std::lock_guard lock(registry().mutex);
  return !mode->registered || registry().registrations.contains(id);
}

Result<const QuantKVBackend*> get_backend(ModeId id) {
  return core::guarded([&]() -> Result<const QuantKVBackend*> {
    const Result<const core::ModeRow*> known = core::known_mode(id);
    if (!known) return known.status();
    const core::ModeRow* mode = *known;
    if (Status status = check_servable(*mode); !status) return status;
    std::lock_guard lock(registry().mutex);
    auto position = registry().registrations.find(id);
    if (position == registry().registrations.end()) {
      if (mode->registered) return not_found("mode " + mode->name + " has no backend; call register_backend for it");
      auto backend = std::make_unique<TableBackend>(*mode);
      position = registry().registrations.try_emplace(id).first;
      position->second.the_class = backend_class<TableBackend>();
      position->second.backend = std::move(backend);
    }
    Registration& registration = position->second;
    if (registration.backend == nullptr) {
      if (registration.constructing) {
        return invalid_argument("the backend of mode " + mode->name +
                                " is being made; its constructor and factory cannot ask for it");
      }
      const struct Constructing {
        bool& flag;
        ~Constructing() { flag = false; }
      } constructing{registration.constructing = true};
      Result<std::unique_ptr<QuantKVBackend>> made =
          core::call_backend("factory", id, [&] { return make_backend(*mode, registration.factory); });
      if (!made) return made.status();
      registration.backend = *std::move(made);
    }
    return registration.backend.get();
  });
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
  if (value == KVQuantMode::kFp8PerTensor) {
    return invalid_argument(
        "KVQuantMode FP8_PER_TENSOR has no backend; call the ops directly with k_scale and v_scale");
  }
  const Result<ModeId> mode = mode_from_kv_quant_mode(value);
  if (!mode) return mode.status();
  return get_backend(*mode);
}

bool has_backend(std::string_view kv_cache_dtype) {
  const Result<ModeId> mode = parse_kv_cache_dtype(kv_cache_dtype);
  return mode && has_backend(*mode);
}

bool has_backend(KVQuantMode value) {
  const Result<ModeId> mode = mode_from_kv_quant_mode(value);
  return mode && has_backend(*mode);
}

}  // namespace quire
