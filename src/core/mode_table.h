// The modes at run time: the rows of modes.def, then those registered by the program. Ids index that list.
#pragma once

#include <string>
#include <string_view>

#include "format/formats.h"
#include "quire/mode.h"

namespace quire::core {

struct FormatPair {
  format::FormatId key = format::FormatId::kNone;
  format::FormatId value = format::FormatId::kNone;
  bool known() const { return key != format::FormatId::kNone && value != format::FormatId::kNone; }
};

// The formats a mode stores in; "auto" takes those of the dtypes given. Not known for a registered mode, and for "auto"
// with a dtype that is not a float.
inline FormatPair formats_of(const ModeInfo& mode, DType key_cache_dtype, DType value_cache_dtype) {
  const auto resolve = [](std::string_view name, DType dtype) {
    return format::find_format(name == format::AutoFloat::kName ? dtype_name(dtype) : name);
  };
  return {resolve(mode.key_format, key_cache_dtype), resolve(mode.value_format, value_cache_dtype)};
}

// Refuses a head size below 1 and one that is no multiple of `unit`, the elements that `who` ("mode ..") packs
// together.
Status check_multiple(std::string_view who, int unit, int head_size);

// For messages. "auto, bfloat16, ..":
std::string mode_names();
// The name of a mode, or "id 12345":
std::string mode_name(ModeId mode);
// Text from outside, in quotes: at most 64 characters of it, and what is not printable ASCII escaped.
std::string quoted(std::string_view text);

}  // namespace quire::core
