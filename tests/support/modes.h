// Modes by name, and which of them this build has.
#pragma once

#include <gtest/gtest.h>

#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "quire/mode.h"

namespace quire::testing {

// The id of a mode of the table; aborts the test program for a name that is not there.
ModeId mode_of(std::string_view name);

// Modes of the table with readable formats, in table order.
std::vector<std::string> table_modes();

// A mode's name as part of a test's name: letters, digits and underscores only.
std::string test_name(std::string mode);

// Whether both formats of a mode pack rows of this head size: it is a multiple of their units.
bool packs(std::string_view mode, int head_size);

// Whether this build has these modes (QUIRE_MODES).
bool modes_built(std::initializer_list<std::string_view> modes);
#define QUIRE_NEEDS_MODES(...) \
  if (!::quire::testing::modes_built({__VA_ARGS__})) GTEST_SKIP() << "this build leaves out a mode of " #__VA_ARGS__

}  // namespace quire::testing
