// Names and numbers of modes: parse_kv_cache_dtype, mode_info, mode_from_kv_quant_mode, register_mode.
#include <climits>
#include <string>

#include "hostile/probe.h"
#include "support/modes.h"

namespace quire::testing {
namespace {

// A call without buffers, whose function is the probe's.
Call make_calls(std::vector<std::string> words) {
  const auto run = std::make_shared<std::function<Status()>>();
  Call call;
  call.memory = run;
  call.words = std::move(words);
  call.run = [run] { return (*run)(); };
  return call;
}

void add(Call& call, const std::string& name, Expect expect, const std::function<Status()>& run,
         bool without_memory = false) {
  auto* const target = static_cast<std::function<Status()>*>(call.memory.get());
  call.probes.push_back({name, expect, [target, run] { *target = run; }, without_memory});
}

struct HostileName {
  const char* label;
  std::string name;
  bool matter_of_taste = false;  // as the name of a registered mode
};

// Names that no mode has and none may have.
std::vector<HostileName> hostile_names() {
  return {{"empty", ""},
          {"blank", " ", true},
          {"newline", "int4\nper_token_head"},
          {"newline at the end", "fp8\n"},
          {"NUL", std::string("fp8\0x", 5)},
          {"escape", "\033[31mfp8"},
          {"not ASCII", "fp8\xff\xfe", true},
          {"comma", "fp8,int4"},
          {"quotes", "'\"`", true},
          {"megabyte", std::string(1 << 20, 'x'), true},
          {"megabyte of newlines", std::string(1 << 20, '\n')},
          {"pair of nothing", "k=,v="},
          {"half a pair", "k=int8_per_token_head", true},
          {"half a pair and comma", "k=int8_per_token_head,v="},
          {"pair with newline", "k=int8_per_token_head,v=int4_per_token_head\n"},
          {"three parts", "k=int8_per_token_head,v=int4_per_token_head,v=int2_per_token_head"},
          {"megabyte pair", "k=" + std::string(1 << 20, 'y') + ",v=fp8"},
          {"format string", "%s%s%s%n", true}};
}

Call make_lookups() {
  Call call = make_calls({"kv_cache_dtype", "mode id", "KVQuantMode", "head_size"});
  std::vector<HostileName> names = hostile_names();
  names.insert(
      names.end(),
      {{"capitals", "FP8"}, {"blank at the end", "fp8 "}, {"pair of auto", "k=auto,v=auto"}, {"only k=", "k="}});
  for (const HostileName& entry : names) {
    const auto name = std::make_shared<std::string>(entry.name);
    add(call, std::string("parse_kv_cache_dtype ") + entry.label, Expect::kRefused,
        [name] { return parse_kv_cache_dtype(*name).status(); });
    add(call, std::string("get_backend ") + entry.label, Expect::kRefused,
        [name] { return get_backend(*name).status(); });
    add(call, std::string("has_backend ") + entry.label, Expect::kAccepted,
        [name] { return has_backend(*name) ? internal_error("has_backend is true") : Status(); });
    add(call, std::string("kv_quant_mode_from_name ") + entry.label, Expect::kRefused,
        [name] { return kv_quant_mode_from_name(*name).status(); });
    // As in vLLM, every string that begins with fp8 is FP8_PER_TENSOR, and any other unknown one is NONE.
    add(call, std::string("get_kv_quant_mode ") + entry.label, Expect::kAccepted, [name] {
      const KVQuantMode mode = name->starts_with("fp8") ? KVQuantMode::kFp8PerTensor : KVQuantMode::kNone;
      const bool right = get_kv_quant_mode(*name) == mode &&
                         is_quantized_kv_cache(*name) == (mode != KVQuantMode::kNone) &&
                         !kv_cache_uses_per_token_head_scales(*name);
      return right ? Status() : internal_error("a mode was found");
    });
  }
  for (int id : {INT_MIN, -1, 1000000, INT_MAX}) {
    const std::string number = to_text(std::int64_t{id});
    add(call, "mode_info " + number, Expect::kRefused, [id] { return mode_info(static_cast<ModeId>(id)).status(); });
    add(call, "get_backend " + number, Expect::kRefused,
        [id] { return get_backend(static_cast<ModeId>(id)).status(); });
    add(call, "has_backend " + number, Expect::kAccepted,
        [id] { return has_backend(static_cast<ModeId>(id)) ? internal_error("has_backend is true") : Status(); });
  }
  for (int value : {INT_MIN, -1, 0, 1, 6, 77, INT_MAX}) {
    const std::string number = to_text(std::int64_t{value});
    const auto mode = static_cast<KVQuantMode>(value);
    const bool known = value == 0 || value == 1;
    add(call, "mode_from_kv_quant_mode " + number, Expect::kRefused,
        [mode] { return mode_from_kv_quant_mode(mode).status(); });
    add(call, "get_backend of KVQuantMode " + number, Expect::kRefused, [mode] { return get_backend(mode).status(); });
    add(call, "has_backend of KVQuantMode " + number, Expect::kAccepted,
        [mode] { return has_backend(mode) ? internal_error("has_backend is true") : Status(); });
    add(call, "kv_quant_mode_name " + number, Expect::kAccepted, [=] {
      return (kv_quant_mode_name(mode) != "unknown") == known ? Status() : internal_error("the name is wrong");
    });
    add(call, "is_per_token_head " + number, Expect::kAccepted,
        [mode] { return is_per_token_head(mode) ? internal_error("it is true") : Status(); });
    add(call, "packing_factor " + number, known ? Expect::kAccepted : Expect::kRefused,
        [mode] { return packing_factor(mode).status(); });
    add(call, "packed_head_size " + number, known ? Expect::kAccepted : Expect::kRefused,
        [mode] { return packed_head_size(mode, 64).status(); });
  }
  for (int head_size : {INT_MIN, -64, -1, 0, 63, 65, INT_MAX}) {
    add(call, "packed_head_size of " + to_text(std::int64_t{head_size}), Expect::kRefused,
        [head_size] { return packed_head_size(KVQuantMode::kInt4PerTokenHead, head_size).status(); });
  }
  return call;
}

Call make_registrations() {
  Call call = make_calls({"name", "alias", "mode", "factory"});
  const auto registered = [](const ModeSpec& spec) { return [spec] { return register_mode(spec).status(); }; };
  for (const HostileName& entry : hostile_names()) {
    const Expect expect = entry.matter_of_taste ? Expect::kConfined : Expect::kRefused;
    const std::string label = entry.label;
    add(call, "name " + label, expect, registered({.name = entry.name, .aliases = {}}));
    add(call, "alias " + label, expect, registered({.name = "my_mode", .aliases = {entry.name}}));
  }
  for (const char* name :
       {"auto", "fp8", "fp8_e4m3", "int4_per_token_head", "k=int8_per_token_head,v=int8_per_token_head",
        "k=int8_per_token_head,v=int2_per_token_head"}) {
    add(call, std::string("name ") + name, Expect::kRefused, registered({.name = name, .aliases = {}}));
    add(call, std::string("alias ") + name, Expect::kRefused, registered({.name = "my_mode", .aliases = {name}}));
  }
  add(call, "alias is the name", Expect::kRefused, registered({.name = "my_mode", .aliases = {"my_mode"}}));
  add(call, "an alias twice", Expect::kRefused, registered({.name = "my_mode", .aliases = {"other", "other"}}));
  add(call, "a name twice", Expect::kRefused, [] {
    const Status first = register_mode({.name = "my_mode", .aliases = {}}).status();
    return first.ok() ? register_mode({.name = "my_mode", .aliases = {}}).status() : Status();
  });
  add(call, "a good name", Expect::kAccepted, registered({.name = "my_mode", .aliases = {"my_alias"}}));
  add(call, "a thousand names", Expect::kAccepted, [] {
    for (int i = 0; i < 1000; ++i) {
      if (Status status = register_mode({.name = "my_mode_" + std::to_string(i), .aliases = {}}).status(); !status)
        return status;
    }
    return Status();
  });
  // A refused registration leaves nothing behind.
  add(call, "refused name stays free", Expect::kAccepted, []() -> Status {
    if (register_mode({.name = "my_mode", .aliases = {"fp8"}}).ok())
      return internal_error("an alias of fp8 was accepted");
    return register_mode({.name = "my_mode", .aliases = {}}).status();
  });
  return call;
}

struct NoRows : QuantKVBackend {
  ModeId mode() const override { return ModeId{}; }
};

// Calls that allocate are made without enough memory first. What failed must leave nothing behind.
Call make_without_memory() {
  Call call = make_calls({"memory"});
  const auto without = [&](const std::string& name, const std::function<Status()>& run) {
    add(call, name, Expect::kAccepted, run, true);
  };
  const auto spec =
      std::make_shared<ModeSpec>(ModeSpec{.name = "a_mode_of_a_long_name", .aliases = {"an_alias_of_a_long_name"}});
  const auto pair = std::make_shared<std::string>("k=int4_per_token_head,v=turboquant_v3");
  without("parse_kv_cache_dtype", [pair] { return parse_kv_cache_dtype(*pair).status(); });
  without("mode_info", [id = mode_of("int4_per_token_head")] { return mode_info(id).status(); });
  without("mode_from_kv_quant_mode", [] { return mode_from_kv_quant_mode(KVQuantMode::kInt4PerTokenHead).status(); });
  without("register_mode", [spec, id = std::make_shared<Result<ModeId>>(Status())] {
    if (!id->ok()) *id = register_mode(*spec);
    return id->status();
  });
  without("get_backend", [] { return get_backend("int4_per_token_head").status(); });
  without("allocate_scale_caches", []() -> Status {
    const Result<const QuantKVBackend*> backend = get_backend("int4_per_token_head");
    return backend.ok() ? (*backend)->allocate_scale_caches(2, 16, 8).status() : backend.status();
  });
  without("packed_head_size", []() -> Status {
    const Result<const QuantKVBackend*> backend = get_backend("int4_per_token_head");
    return backend.ok() ? (*backend)->packed_head_size(64).status() : backend.status();
  });
  const ModeId id =
      *register_mode({.name = "mode_without_memory_" + std::to_string(list_modes().size()), .aliases = {}});
  without("register_backend", [id] { return register_backend<NoRows>(id); });
  return call;
}

}  // namespace

std::vector<Group> mode_groups() {
  return {{"modes/lookup", {}, make_lookups, 95, 65},
          {"modes/register", {}, make_registrations, 45, 3},
          {"modes/memory", {"int4_per_token_head"}, make_without_memory, 0, 8}};
}

}  // namespace quire::testing
