// The modes at run time are the rows of modes.def, followed by those that the program registers. An id is a place in
// that list.
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

// A row of the table holds what the public sees and, looked up once, the formats behind their names.
struct ModeRow : ModeInfo {
  FormatPair formats;                         // kNone for "auto", and for a registered mode
  bool auto_key = false, auto_value = false;  // the cache tensor's own float type
};

// Finds the row of a mode, null where there is none. It lives as long as the process.
const ModeRow* find_mode(ModeId mode);

// The formats a mode stores in; "auto" takes those of the dtypes given. Not known for a registered mode, and for "auto"
// with a dtype that is not a float.
inline FormatPair formats_of(const ModeRow& mode, DType key_cache_dtype, DType value_cache_dtype) {
  FormatPair pair = mode.formats;
  if (mode.auto_key) pair.key = format::find_format(dtype_name(key_cache_dtype));
  if (mode.auto_value) pair.value = format::find_format(dtype_name(value_cache_dtype));
  return pair;
}

// Refuses a head size below 1 and one that is no multiple of `unit`, the elements that `who` ("mode
// int4_per_token_head") packs together.
Status check_multiple(std::string_view who, int unit, int head_size);

// Lists the modes for a message: "auto, bfloat16, float16" and so on.
std::string mode_names();
// Gives the name of a mode for a message, or "id 12345".
std::string mode_name(ModeId mode);
// Puts text from outside into quotes: at most 64 characters of it, with escapes for what is not printable ASCII.
std::string quoted(std::string_view text);

}  // namespace quire::core
