// The object that serves one quantizing mode, and the registry it is found through. Built-in modes need none of this:
// subclass QuantKVBackend to bring a way of storing that the table does not have.
//
//   1. writes differently, same bytes to read:  override reshape_and_cache, name the format in read_format().
//   2. new bytes:                               override reshape_and_cache and decode_row (generic reading, slower),
//                                               or unified_attention.
//
//   auto id = quire::register_mode({.name = "my_mode"});
//   quire::register_backend<MyBackend>(*id);           // MyBackend() runs at the first get_backend
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <typeindex>
#include <vector>

#include "quire/layout.h"
#include "quire/mode.h"
#include "quire/ops.h"
#include "quire/status.h"

namespace quire {

// Owns the scale caches of a mode; empty vectors for a mode without them.
struct ScaleCaches {
  std::vector<float> k, v;              // [num_blocks, block_size, num_kv_heads], zeros
  Tensor k_scale_cache, v_scale_cache;  // views of the above, not defined when empty
};

// One stored vector as decode_row sees it.
struct CacheRow {
  const std::uint8_t* data = nullptr;  // row_bytes(head_size) bytes
  const float* scale = nullptr;        // its entry of the scale cache, or null
  int head_size = 0;
  bool is_value = false;
};

class QuantKVBackend {
 public:
  virtual ~QuantKVBackend() = default;

  virtual ModeId mode() const = 0;
  virtual int packing_factor() const { return 1; }  // elements per stored byte
  virtual bool needs_scale_caches() const { return false; }

  // head_size / packing_factor; refused where it does not divide.
  Result<int> packed_head_size(int head_size) const;

  // Bytes of one row of K (or V). The default is packed_head_size.
  virtual Result<std::int64_t> row_bytes(int head_size, bool is_value) const;

  virtual Result<ScaleCaches> allocate_scale_caches(std::int64_t num_blocks, int block_size, int num_kv_heads) const;

  // The default stores in the mode's formats, or in read_format() where the mode has none.
  virtual Status reshape_and_cache(const ReshapeAndCacheArgs& args, void* stream) const;

  // The default reads read_format(), else the mode's formats, else decode_row; with none of them it refuses and names
  // the class.
  virtual Status unified_attention(const UnifiedAttentionArgs& args, void* stream) const;

  // The kv_cache_dtype whose bytes this backend writes, or empty.
  virtual std::string_view read_format() const { return {}; }

  // Decodes one row into out[0, head_size). Called from several threads. Return false if not overridden.
  virtual bool decode_row(const CacheRow& row, float* out) const;
  virtual bool has_decode_row() const { return false; }
};

using BackendFactory = std::function<std::unique_ptr<QuantKVBackend>()>;

// Registers a factory; nothing of it runs until the first get_backend. The same class again is accepted; a second class
// for a mode, an unknown mode, and the modes of NONE and FP8_PER_TENSOR are refused. Thread-safe.
Status register_backend(ModeId mode, std::type_index backend_class, BackendFactory factory);

template <class T>
Status register_backend(ModeId mode) {
  return register_backend(mode, typeid(T), [] { return std::make_unique<T>(); });
}

// The backend of a mode, constructed on first use and kept for the life of the process. Refused for the modes of NONE
// (nothing to quantize) and FP8_PER_TENSOR (both ops serve them without a backend, as in vLLM).
Result<const QuantKVBackend*> get_backend(ModeId mode);
Result<const QuantKVBackend*> get_backend(std::string_view kv_cache_dtype);
Result<const QuantKVBackend*> get_backend(KVQuantMode value);

// True where get_backend would succeed.
bool has_backend(ModeId mode);
bool has_backend(std::string_view kv_cache_dtype);
bool has_backend(KVQuantMode value);

}  // namespace quire
