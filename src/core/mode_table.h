// The modes at run time: the rows of modes.def, then those registered by the program. Ids index that list.
#pragma once

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
FormatPair formats_of(const ModeInfo& mode, DType key_cache_dtype, DType value_cache_dtype);

// "auto, bfloat16, ...", for messages.
std::string mode_names();

}  // namespace quire::core
