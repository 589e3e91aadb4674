#include "support/modes.h"

#include <cctype>
#include <cstdio>
#include <cstdlib>

#include "format/formats.h"

namespace quire::testing {

ModeId mode_of(std::string_view name) {
  const Result<ModeId> mode = parse_kv_cache_dtype(name);
  if (!mode.ok()) {
    std::fprintf(stderr, "test: %s\n", mode.status().message().c_str());
    std::abort();
  }
  return *mode;
}

std::vector<std::string> table_modes() {
  std::vector<std::string> names;
  for (const ModeInfo& mode : list_modes()) {
    if (!mode.registered && mode.compiled) names.push_back(mode.name);
  }
  return names;
}

std::string test_name(std::string mode) {
  for (char& c : mode) {
    if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
  }
  return mode;
}

bool packs(std::string_view mode, int head_size) {
  const ModeInfo info = **mode_info(mode_of(mode));
  for (const std::string& name : {info.key_format, info.value_format}) {
    const format::FormatId id = format::find_format(name);  // none: "auto", whose floats stand alone
    if (id != format::FormatId::kNone && head_size % format::format_info(id).unit != 0) return false;
  }
  return true;
}

bool modes_built(std::initializer_list<std::string_view> modes) {
  for (const std::string_view name : modes) {
    if (!(*mode_info(mode_of(name)))->compiled) return false;
  }
  return true;
}

}  // namespace quire::testing
