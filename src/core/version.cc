#include "quire/version.h"

#define QUIRE_TEXT_OF(x) #x
#define QUIRE_TEXT(x) QUIRE_TEXT_OF(x)

namespace quire {

int version_number() { return QUIRE_VERSION_NUMBER; }

const char* version() {
  return QUIRE_TEXT(QUIRE_VERSION_MAJOR) "." QUIRE_TEXT(QUIRE_VERSION_MINOR) "." QUIRE_TEXT(QUIRE_VERSION_PATCH);
}

}  // namespace quire
