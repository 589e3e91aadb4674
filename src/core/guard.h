// Exceptions become Statuses, as every other failure: the body of each public function that allocates runs inside
// guarded(), and what a registered backend brings inside call_backend().
#pragma once

#include <new>
#include <stdexcept>
#include <string_view>

#include "quire/mode.h"
#include "quire/status.h"

namespace quire::core {

inline Status out_of_memory() {
  try {
    return internal_error("out of memory: the system gave none for the call's own lists and messages");
  } catch (const std::bad_alloc&) {
    return internal_error("out of memory");  // short enough to need none
  }
}

// Runs body(), which gives a Status or a Result.
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

// What a registered backend's code has just thrown, as a Status. Call it from a handler.
Status thrown(std::string_view what, ModeId mode);

// Runs `what` ("unified_attention") of the registered backend of a mode. Returns its Status or Result.
template <class Call>
auto call_backend(std::string_view what, ModeId mode, const Call& call) -> decltype(call()) {
  try {
    return guarded(call);
  } catch (...) {
    return thrown(what, mode);
  }
}

}  // namespace quire::core
