// The object that serves one quantizing mode, and the registry it is found through. Built-in modes need none of this:
// subclass QuantKVBackend to bring a way of storing that the table does not have.
//
//   1. writes differently, same bytes to read:  override reshape_and_cache, name the format in read_format().
//   2. new bytes:                               override reshape_and_cache and decode_row (generic reading, slower),
//                                               or unified_attention.
//
//   auto id = quire::register_mode({.name = "my_mode"});
//   quire::register_backend<MyBackend>(*id);           // MyBackend() runs at the first get_backend
//
// What a backend throws, to get_backend (its constructor), to an op or to make_layout, becomes a Status that names the
// mode. decode_row is called in the middle of an op: that one finishes, then returns the Status, and rows of `out` that
// see a row that could not be decoded are NaN.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "quire/export.h"
#include "quire/layout.h"
#include "quire/mode.h"
#include "quire/ops.h"
#include "quire/status.h"

namespace quire {

// The scale caches of a mode; a cache that the mode does not need is not defined. Copies share the memory, which lives
// as long as one of them.
struct ScaleCaches {
  Tensor k_scale_cache, v_scale_cache;  // [num_blocks, block_size, num_kv_heads] float32, zeros
  std::shared_ptr<void> memory;
};

// A row is one stored vector, as decode_row sees it.
struct CacheRow {
  const std::uint8_t* data = nullptr;  // row_bytes(head_size) bytes
  const float* scale = nullptr;        // its entry of the scale cache; null where needs_scale_caches() is false
  int head_size = 0;
  bool is_value = false;
};

class QUIRE_API QuantKVBackend {
 public:
  virtual ~QuantKVBackend() = default;

  virtual ModeId mode() const = 0;
  virtual bool needs_scale_caches() const { return false; }

  // Elements of a key row per element of the key cache: packed_head_size is head_size / packing_factor. Refused where
  // that is no whole number: 3-bit codes, metadata in the row.
  virtual Result<int> packing_factor() const { return 1; }

  // The last extent of the key cache, in elements of its dtype. In a mode of two formats the key's, not the value's.
  // The default is row_bytes of K, as of a cache of bytes.
  virtual Result<int> packed_head_size(int head_size) const;

  // Bytes of one row of K (or V). The default is head_size / packing_factor; refused where that does not divide.
  virtual Result<std::int64_t> row_bytes(int head_size, bool is_value) const;

  // Not defined where needs_scale_caches() is false. A backend that needs another shape or dtype overrides this, and
  // then unified_attention and reshape_and_cache too: make_layout and decode_row refuse scale caches other than the
  // default's.
  virtual Result<ScaleCaches> allocate_scale_caches(std::int64_t num_blocks, int block_size, int num_kv_heads) const;

  // The default stores in the mode's formats, or in read_format() where the mode has none.
  virtual Status reshape_and_cache(const ReshapeAndCacheArgs& args, void* stream) const;

  // The default reads read_format(), else the mode's formats, else decode_row; with none of them it refuses.
  virtual Status unified_attention(const UnifiedAttentionArgs& args, void* stream) const;

  // The kv_cache_dtype whose bytes this backend writes, or empty.
  virtual std::string_view read_format() const { return {}; }

  // Decodes one row into out[0, head_size); false where that is not possible. Called from several threads. The caches'
  // shapes, row_bytes and scale caches (if needed; else they are refused) have been checked.
  virtual bool decode_row(const CacheRow& row, float* out) const;
  virtual bool has_decode_row() const { return false; }
};

using BackendFactory = std::function<std::unique_ptr<QuantKVBackend>()>;

// Tells one backend class from another, without RTTI.
using BackendClass = const void*;
template <class T>
BackendClass backend_class() {
  static char identity;
  return &identity;
}

// Registers a factory; nothing of it runs until the first get_backend. The same class again is accepted; a second class
// for a mode, an unknown mode, and the modes of NONE and FP8_PER_TENSOR are refused. Thread-safe.
QUIRE_API Status register_backend(ModeId mode, BackendClass the_class, BackendFactory factory);

template <class T>
Status register_backend(ModeId mode) {
  return register_backend(mode, backend_class<T>(), [] { return std::make_unique<T>(); });
}

// The backend of a mode, constructed on first use and kept for the life of the process. Refused for the modes of NONE
// (nothing to quantize) and FP8_PER_TENSOR (both ops serve them without a backend, as in vLLM), and to a constructor or
// factory that asks for the very backend it is making.
QUIRE_API Result<const QuantKVBackend*> get_backend(ModeId mode);
QUIRE_API Result<const QuantKVBackend*> get_backend(std::string_view kv_cache_dtype);
QUIRE_API Result<const QuantKVBackend*> get_backend(KVQuantMode value);

// True where the mode has a backend, constructed or not. Only looks it up: no factory runs, and one that would fail is
// not noticed. False for NONE, FP8_PER_TENSOR and modes that are not in this build.
QUIRE_API bool has_backend(ModeId mode);
QUIRE_API bool has_backend(std::string_view kv_cache_dtype);
QUIRE_API bool has_backend(KVQuantMode value);

}  // namespace quire
