// The version of the headers, for the preprocessor, and that of the library a program runs with, which a shared
// libquire may change. Versions with the same major and minor number are compatible.
#pragma once

#include "quire/export.h"

#define QUIRE_VERSION_MAJOR 0
#define QUIRE_VERSION_MINOR 1
#define QUIRE_VERSION_PATCH 0
#define QUIRE_VERSION_NUMBER (QUIRE_VERSION_MAJOR * 10000 + QUIRE_VERSION_MINOR * 100 + QUIRE_VERSION_PATCH)

namespace quire {

// QUIRE_VERSION_NUMBER of the library, 100 for 0.1.0.
QUIRE_API int version_number();

// "0.1.0".
QUIRE_API const char* version();

}  // namespace quire
