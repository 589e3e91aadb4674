// A backend of a program that is compiled with -fno-rtti (tests/core/CMakeLists.txt). registry_test.cc uses it.
#include <memory>
#include <string>

#include "quire/quire.h"

#ifdef __GXX_RTTI
#error "this file is here to be compiled without RTTI"
#endif

namespace quire::testing {
namespace {

ModeId registered;

class NoRtti : public QuantKVBackend {
 public:
  ModeId mode() const override { return registered; }
};

}  // namespace

ModeId register_backend_without_rtti(const std::string& name);
ModeId register_backend_without_rtti(const std::string& name) {
  registered = *register_mode({.name = name, .aliases = {}});
  return register_backend<NoRtti>(registered).ok() ? registered : ModeId{};
}

}  // namespace quire::testing
