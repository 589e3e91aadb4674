// Modes by name, and which of them this build has.
#pragma once

#include <gtest/gtest.h>

#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "quire/mode.h"

namespace quire::testing {

// The id of a mode of the table. A name that is not there aborts the test program.
ModeId mode_of(std::string_view name);

// The modes of the table whose formats can be read, in table order.
std::vector<std::string> table_modes();

// A mode's name as a part of a test's name, which has letters, digits and underscores only.
std::string test_name(std::string mode);

// Whether both formats of a mode pack rows of this head size, that is, whether it is a multiple of their units.
bool packs(std::string_view mode, int head_size);

// Whether this build has these modes (QUIRE_MODES).
bool modes_built(std::initializer_list<std::string_view> modes);
#define QUIRE_NEEDS_MODES(...) \
  if (!::quire::testing::modes_built({__VA_ARGS__})) GTEST_SKIP() << "this build leaves out a mode of " #__VA_ARGS__

}  // namespace quire::testing
