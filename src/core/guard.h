// Memory that the system does not give is a Status, as every other failure: the body of each public function that
// allocates runs inside guarded().
#pragma once

#include <new>
#include <stdexcept>

#include "quire/status.h"

namespace quire::core {

inline Status out_of_memory() {
  try {
    return internal_error("out of memory: the system gave none for the call's own lists and messages");
  } catch (const std::bad_alloc&) {
    return internal_error("out of memory");  // short enough to need none
  }
}

// body() gives a Status or a Result.
template <class Body>
auto guarded(const Body& body) -> decltype(body()) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return out_of_memory();
  } catch (const std::length_error&) {
    return out_of_memory();
  }
}

}  // namespace quire::core
