// A mode is a named way of storing a KV cache: one row of src/format/modes.def, or one registered at run time.
// It is identified by its kv_cache_dtype string, spelled as in vLLM ("int4_per_token_head"), and by a ModeId.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "quire/export.h"
#include "quire/status.h"
#include "quire/tensor.h"

namespace quire {

// vLLM's enum. Its numbers have moved between vLLM versions (5 is NVFP4 in some): exchange modes by name, not number.
enum class KVQuantMode : int {
  kNone = 0,
  kFp8PerTensor = 1,
  kInt8PerTokenHead = 2,
  kFp8PerTokenHead = 3,
  kInt4PerTokenHead = 4,
  kInt2PerTokenHead = 5,
};

// "INT8_PER_TOKEN_HEAD", as vLLM spells it; "unknown" for a number that is none of the above.
QUIRE_API std::string_view kv_quant_mode_name(KVQuantMode value);

// kNotFound lists the names that exist.
QUIRE_API Result<KVQuantMode> kv_quant_mode_from_name(std::string_view name);

// Says whether a mode is one of the four that have an fp32 scale per (token, head).
QUIRE_API bool is_per_token_head(KVQuantMode value);

// Elements of a row per element of the cache: 4 for INT2_PER_TOKEN_HEAD, 2 for INT4_PER_TOKEN_HEAD, else 1.
QUIRE_API Result<int> packing_factor(KVQuantMode value);
// head_size / packing_factor; refused where it does not divide.
QUIRE_API Result<int> packed_head_size(KVQuantMode value, int head_size);

// vLLM's functions of the same names: what the enum says of a kv_cache_dtype string. What begins with "fp8" is
// FP8_PER_TENSOR. NONE, and so not quantized, is also every string the enum knows nothing of: unknown ones, nvfp4,
// turboquant_*, modes of two formats, registered modes. What quire stores in those is a question for mode_info.
QUIRE_API KVQuantMode get_kv_quant_mode(std::string_view kv_cache_dtype);
QUIRE_API bool is_quantized_kv_cache(std::string_view kv_cache_dtype);
QUIRE_API bool kv_cache_uses_per_token_head_scales(std::string_view kv_cache_dtype);

enum class ModeId : std::int32_t {};

struct ModeInfo {
  ModeId id{};
  std::string name;
  std::vector<std::string> aliases;
  std::optional<KVQuantMode> kv_quant_mode;  // none for modes vLLM's enum does not know
  std::string key_format;                    // a format's name; "auto" is the cache tensor's own float type;
  std::string value_format;                  // empty for a registered mode that brings its own bytes
  bool shared_slot = false;                  // K row and V row side by side in one slot of one tensor
  bool compiled = true;                      // false when left out of this build by QUIRE_MODES
  bool registered = false;                   // true when it came from register_mode
  bool composed = false;                     // true when spelled k=<format>,v=<format> and not a row of the table
};

// The mode of a name or an alias. Any pair of formats is a mode too, spelled "k=<format>,v=<format>"
// (k=int8_per_token_head,v=turboquant_v3), aliases of formats too (k=fp8_e4m3,v=float16); a pair the table has is that
// mode. kNotFound lists the names that exist.
QUIRE_API Result<ModeId> parse_kv_cache_dtype(std::string_view name);

// Finds the mode of an enum value. kInvalidArgument where several modes share the value (NONE, FP8_PER_TENSOR).
QUIRE_API Result<ModeId> mode_from_kv_quant_mode(KVQuantMode value);

// Finds the row of a mode in the table. It does not change and lives as long as the process.
QUIRE_API Result<const ModeInfo*> mode_info(ModeId mode);

// Lists every mode that has a name of its own: those of the table in table order, then the registered ones.
QUIRE_API std::vector<ModeInfo> list_modes();

// Adds a mode that is not in the table, to be served by a backend registered for it (quire/backend.h). Name and aliases
// must be new and differ, and are 1 to 64 letters, digits, '_', '-' and '.'. Thread-safe.
struct ModeSpec {
  std::string name;
  std::vector<std::string> aliases;
};
QUIRE_API Result<ModeId> register_mode(const ModeSpec& spec);

}  // namespace quire
