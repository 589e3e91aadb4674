// A mode is a named way of storing a KV cache: one row of src/core/modes.def, or one registered at run time.
// It is identified by its kv_cache_dtype string, spelled as in vLLM ("int4_per_token_head"), and by a ModeId.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "quire/status.h"
#include "quire/tensor.h"

namespace quire {

// vLLM's enum. Its numbers have moved between vLLM versions: exchange modes by name, not by number.
enum class KVQuantMode : int {
  kNone = 0,
  kFp8PerTensor = 1,
  kInt8PerTokenHead = 2,
  kFp8PerTokenHead = 3,
  kInt4PerTokenHead = 4,
  kInt2PerTokenHead = 5,
};

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
// (k=int8_per_token_head,v=turboquant_v3); a pair the table has is that mode. kNotFound lists the names that exist.
Result<ModeId> parse_kv_cache_dtype(std::string_view name);

// The mode of an enum value. kInvalidArgument where several modes share the value (NONE, FP8_PER_TENSOR).
Result<ModeId> mode_from_kv_quant_mode(KVQuantMode value);

Result<ModeInfo> mode_info(ModeId mode);

// Every mode with a name of its own: those of the table in table order, then the registered ones.
std::vector<ModeInfo> list_modes();

// Adds a mode that is not in the table, to be served by a backend registered for it (quire/backend.h).
// The name must be new; formats may be left empty. Thread-safe.
struct ModeSpec {
  std::string name;
  std::vector<std::string> aliases;
};
Result<ModeId> register_mode(const ModeSpec& spec);

}  // namespace quire
