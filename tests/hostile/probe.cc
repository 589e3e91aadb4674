#include "hostile/probe.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <sstream>

#include "hostile/memory.h"
#include "reference/attention.h"

namespace quire::testing {
namespace {

using Bytes = std::vector<std::vector<std::uint8_t>>;

Bytes snapshot(const Call& call) {
  Bytes bytes;
  for (const auto* buffer : call.buffers) bytes.push_back(*buffer);
  return bytes;
}

void restore(const Call& call, const Bytes& bytes) {
  for (std::size_t i = 0; i < bytes.size(); ++i) std::ranges::copy(bytes[i], call.buffers[i]->begin());
}

// The first difference in words, or nothing where there is none.
std::string difference(const Bytes& got, const Bytes& expected) {
  for (std::size_t i = 0; i < got.size(); ++i) {
    const auto [a, b] = std::ranges::mismatch(got[i], expected[i]);
    if (a == got[i].end()) continue;
    char text[96];
    std::snprintf(text, sizeof text, "byte %td of buffer %zu is 0x%02x, not 0x%02x", a - got[i].begin(), i, *a, *b);
    return text;
  }
  return "";
}

struct Place {
  std::size_t buffer;
  std::int64_t offset;
};

// The buffer that holds bytes [first, last] relative to data. For a view without elements the end of a buffer counts
// too.
std::optional<Place> place_of(const Call& call, const void* data, __int128 first, __int128 last) {
  for (std::size_t i = 0; i < call.buffers.size(); ++i) {
    const std::uint8_t* begin = call.buffers[i]->data();
    const __int128 offset = static_cast<__int128>(reinterpret_cast<std::uintptr_t>(data)) -
                            static_cast<__int128>(reinterpret_cast<std::uintptr_t>(begin));
    if (offset + first >= 0 && offset + last < static_cast<__int128>(call.buffers[i]->size())) {
      return Place{i, static_cast<std::int64_t>(offset)};
    }
  }
  return std::nullopt;
}

bool sane_dims(const ConstTensor& t) { return t.ndim >= 0 && t.ndim <= Tensor::kMaxDims; }

bool has_elements(const ConstTensor& t) {
  if (!t.defined() || !sane_dims(t)) return false;
  return std::all_of(t.shape, t.shape + t.ndim, [](std::int64_t extent) { return extent > 0; });
}

// The first and the last byte of a view with elements, relative to its data, or nothing where they take more than 63
// bits.
std::optional<std::pair<__int128, __int128>> reach(const ConstTensor& t) {
  const auto size = static_cast<__int128>(dtype_bytes(t.dtype));
  __int128 first = 0;
  __int128 last = size - 1;
  for (int dim = 0; dim < t.ndim; ++dim) {
    const __int128 distance = static_cast<__int128>(t.shape[dim] - 1) * t.strides[dim];
    if (distance > kInt64Max || distance < kInt64Min) return std::nullopt;
    (distance < 0 ? first : last) += distance * size;
  }
  if (first < kInt64Min || last > kInt64Max) return std::nullopt;
  return std::pair{first, last};
}

// Where a view lies, if all its elements lie in one buffer.
std::optional<Place> inside(const Call& call, const ConstTensor& t) {
  const auto bytes = reach(t);
  return bytes ? place_of(call, t.data, bytes->first, bytes->second) : std::nullopt;
}

// Calls visit(index of the buffer, offset of the element) for each element of a view that has some.
template <class Visit>
void for_each_element(const ConstTensor& t, const Place& place, Visit&& visit) {
  std::array<std::int64_t, Tensor::kMaxDims> index{};
  while (true) {
    std::int64_t at = 0;
    for (int dim = 0; dim < t.ndim; ++dim) at += index[static_cast<std::size_t>(dim)] * t.strides[dim];
    visit(place.buffer, static_cast<std::size_t>(place.offset + at * static_cast<std::int64_t>(dtype_bytes(t.dtype))));
    int dim = t.ndim - 1;
    while (dim >= 0 && ++index[static_cast<std::size_t>(dim)] == t.shape[dim])
      index[static_cast<std::size_t>(dim--)] = 0;
    if (dim < 0) return;
  }
}

double load(DType dtype, std::uint8_t* at) { return reference::element(Tensor::contiguous(at, dtype, {1}), 0); }

// The tolerance is far above the rounding errors that tests/ops allows and far below what one key more or less makes:
// an accepted hostile call may only get its meaning wrong. Rounding to the type of the output comes on top.
bool near(double got, double expected, DType dtype) {
  if (std::isnan(got) || std::isnan(expected)) return std::isnan(got) && std::isnan(expected);
  if (got == expected) return true;
  const double relative = dtype == DType::kFloat32    ? 0x1p-9
                          : dtype == DType::kFloat16  ? 0x1p-8
                          : dtype == DType::kBFloat16 ? 0x1p-6
                                                      : 0x1p-3;  // e4m3: half a step
  return std::abs(got - expected) <= 2e-3 + relative * std::abs(expected);
}

// The extents of a tensor argument, by name.
std::vector<std::string> words_of(const char* shape) {
  std::istringstream text(shape);
  std::vector<std::string> words;
  for (std::string word; text >> word;) words.push_back(word);
  return words;
}

std::string bad_sentence(const Call& call, const std::string& text) {
  if (text.size() < 20) return "says too little";
  if (text.size() > 800) return "is " + std::to_string(text.size()) + " characters long";
  if (!std::ranges::all_of(text, [](char c) { return c >= ' ' && c <= '~'; })) return "is not one printable line";
  if (text.back() == '.') return "ends with a full stop";
  if (text.find("::") != std::string::npos) return "names a class";
  const auto named = [&](std::string_view word) { return text.find(word) != std::string::npos; };
  const auto named_by = [&](const TensorArgument& argument) {
    const std::vector<std::string> words = words_of(argument.shape);
    return named(argument.name) || std::ranges::any_of(words, [&](const std::string& word) {
             return std::isalpha(static_cast<unsigned char>(word[0])) != 0 && named(word);
           });
  };
  const bool names_one = std::ranges::any_of(call.words, named) || std::ranges::any_of(call.tensors, named_by);
  return names_one ? "" : "names no argument";
}

// The limit of a probe's process, where malloc is the C library's.
[[maybe_unused]] constexpr rlim_t kMostMemory = rlim_t{2} << 30;

Outcome failed(const std::string& text) { return {Outcome::kFailed, text}; }

// What differs between the bytes after a call and those that it should have left; `expect` says how outputs are
// compared.
std::string wrong_output(const Call& call, Expect expect, Bytes got, Bytes expected) {
  std::string wrong;
  const bool any_value = expect == Expect::kConfined || expect == Expect::kPartial;
  for (const TensorArgument& argument : call.tensors) {
    if (argument.role == Role::kInput || !has_elements(argument.tensor.get())) continue;
    const ConstTensor t = argument.tensor.get();
    const std::optional<Place> place = inside(call, t);
    if (!place) {  // larger than its buffer, without harm: which of its bytes may differ is not known
      if (!any_value && argument.role == Role::kExact) continue;
      return std::string(argument.name) + " is outside its buffer";
    }
    if (!any_value && argument.role == Role::kExact) continue;
    for_each_element(t, *place, [&](std::size_t buffer, std::size_t at) {
      std::uint8_t* a = got[buffer].data() + at;
      const double x = load(t.dtype, a);
      const double y = load(t.dtype, expected[buffer].data() + at);
      if (wrong.empty() && !any_value && !near(x, y, t.dtype)) {
        wrong = std::string(argument.name) + " has " + to_text(x) + " where the oracle has " + to_text(y);
      }
      std::copy_n(expected[buffer].data() + at, dtype_bytes(t.dtype), a);
    });
  }
  return wrong.empty() ? difference(got, expected) : wrong;
}

// Judges the call in the child, after the change.
Outcome judge(Call& call, Expect expect) {
  const Bytes before = snapshot(call);
  const Status status = call.run();
  const Bytes got = snapshot(call);

  if (!status.ok()) {
    const std::string wrote =
        expect == Expect::kPartial ? wrong_output(call, expect, got, before) : difference(got, before);
    if (!wrote.empty()) return failed("refused, but wrote: " + wrote + " (" + status.message() + ")");
    if (const std::string what = bad_sentence(call, status.message()); !what.empty()) {
      return failed("refused in a sentence that " + what + ": " + status.message().substr(0, 900));
    }
    if (expect == Expect::kAccepted) return failed("refused, though it is legal: " + status.message());
    return {Outcome::kRefusedOk, status.message()};
  }
  if (expect == Expect::kRefused) return failed("accepted");

  restore(call, before);
  if (expect == Expect::kRight || expect == Expect::kAccepted) {
    if (const Status oracle = call.oracle(); !oracle.ok()) return failed("accepted, but " + oracle.message());
  }
  const std::string wrong = wrong_output(call, expect, got, snapshot(call));
  return wrong.empty() ? Outcome{Outcome::kAcceptedOk, ""} : failed("accepted, but " + wrong);
}

// Makes the call without enough memory, again and again. Returns what is wrong about that, or nothing.
std::string judge_without_memory(Call& call) {
  const Bytes before = snapshot(call);
  Bytes after = before;
  for (int n = 0;; ++n) {
    allocations::fail_after(n);
    const Status status = call.run();
    const bool enough = !allocations::failed();
    allocations::limit();
    if (enough) return "";
    for (std::size_t i = 0; i < after.size(); ++i) std::ranges::copy(*call.buffers[i], after[i].begin());
    const std::string at = "after " + std::to_string(n) + " allocations ";
    if (status.ok()) {  // it could do without
      restore(call, before);
      continue;
    }
    if (const std::string wrote = difference(after, before); !wrote.empty()) return at + "refused, but wrote: " + wrote;
    if (status.message().find("memory") == std::string::npos)
      return at + "refused, not for want of memory: " + status.message();
  }
}

[[noreturn]] void child(Call& call, const Probe& probe, int report, std::FILE* log) {
  dup2(fileno(log), STDOUT_FILENO);
  dup2(fileno(log), STDERR_FILENO);
  const rlimit no_core{0, 0};
  setrlimit(RLIMIT_CORE, &no_core);
#ifndef __SANITIZE_ADDRESS__  // which reserves far more, and has its own limit
  const rlimit memory{kMostMemory, kMostMemory};
  setrlimit(RLIMIT_AS, &memory);
#endif
  alarm(kProbeSeconds);
  Outcome outcome;
  try {
    allocations::limit();
    probe.change();
    std::string wrong;
    if (probe.without_memory) wrong = judge_without_memory(call);
    outcome = wrong.empty() ? judge(call, probe.expect) : failed(wrong);
  } catch (const std::exception& error) {
    allocations::limit();
    outcome = failed(std::string("threw ") + error.what());
  } catch (...) {
    allocations::limit();
    outcome = failed("threw something");
  }
  const std::string text = std::string(1, static_cast<char>('0' + outcome.kind)) + outcome.text.substr(0, 4000);
  const bool told = write(report, text.data(), text.size()) == static_cast<ssize_t>(text.size());
  _exit(told ? 0 : 1);
}

// The line of a child's output that says why it died.
std::string telling_line(std::FILE* log) {
  std::rewind(log);
  std::string first;
  char line[512];
  while (std::fgets(line, sizeof line, log) != nullptr) {
    std::string text(line, std::strcspn(line, "\n"));
    if (text.find("runtime error") != std::string::npos || text.find("SUMMARY") != std::string::npos) return text;
    if (first.empty() && text.find_first_not_of("= ") != std::string::npos) first = text;
  }
  return first;
}

}  // namespace

std::string to_text(std::int64_t value) {
  const std::map<std::int64_t, const char*> names = {
      {kInt64Max, "INT64_MAX"}, {kInt64Min, "INT64_MIN"}, {kInt32Max, "INT32_MAX"}, {kInt32Min, "INT32_MIN"}};
  if (const auto found = names.find(value); found != names.end()) return found->second;
  for (int bits = 20; bits < 63; ++bits) {
    if (value == std::int64_t{1} << bits) return "2^" + std::to_string(bits);
  }
  return std::to_string(value);
}

std::string to_text(double value) {
  char text[40];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

Outcome run_probe(Call& call, const Probe& probe) {
  int report[2];
  std::FILE* log = std::tmpfile();
  if (log == nullptr || pipe(report) != 0) return failed("no pipe or no temporary file");
  std::fflush(nullptr);
  const pid_t pid = fork();
  if (pid == 0) {
    close(report[0]);
    child(call, probe, report[1], log);
  }
  close(report[1]);
  std::string text;
  char chunk[4096];
  for (ssize_t n = 0; (n = read(report[0], chunk, sizeof chunk)) > 0;) text.append(chunk, static_cast<std::size_t>(n));
  close(report[0]);
  int status = 0;
  waitpid(pid, &status, 0);
  Outcome outcome;
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0 && !text.empty()) {
    outcome = {static_cast<Outcome::Kind>(text[0] - '0'), text.substr(1)};
  } else if (WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM) {
    outcome = failed("did not end within " + std::to_string(kProbeSeconds) + " s");
  } else {
    const std::string how = WIFSIGNALED(status) ? std::string("signal ") + strsignal(WTERMSIG(status))
                                                : "exit status " + std::to_string(WEXITSTATUS(status));
    outcome = failed("died, " + how + ": " + telling_line(log));
  }
  std::fclose(log);
  return outcome;
}

// ---- tables of hostile values ------------------------------------------------------------------------------------

namespace {

constexpr DType kAllDTypes[] = {DType::kFloat32,    DType::kFloat16,    DType::kBFloat16,
                                DType::kFloat8E4M3, DType::kFloat8E5M2, DType::kInt8,
                                DType::kUInt8,      DType::kInt32,      DType::kInt64};
// Extents whose product with some other overflows 32 or 64 bits.
constexpr std::int64_t kLargeExtents[] = {std::int64_t{1} << 31, std::int64_t{1} << 32, std::int64_t{1} << 62,
                                          kInt64Max};

}  // namespace

void tensor_probes(Call& call, const TensorArgument& argument) {
  const cuda::TensorRef t = argument.tensor;
  const Tensor valid = t.writable();
  if (!valid.defined()) return;
  const std::string name = argument.name;
  const auto add = [&](const std::string& what, Expect expect, const Tensor& changed) {
    call.probes.push_back({name + what, expect, [t, changed] { t.set(changed); }});
  };
  const auto with = [&](auto&& change) {
    Tensor changed = valid;
    change(changed);
    return changed;
  };

  add(" missing", Expect::kRight, Tensor());
  add(".data=null", Expect::kRefused, with([](Tensor& x) { x.data = nullptr; }));
  // An address inside of the first or second element: the view leaves its buffer, and the alignment gives that away.
  for (std::size_t bytes : {1, 2}) {
    if (dtype_bytes(valid.dtype) <= bytes) continue;
    add(".data+" + std::to_string(bytes), Expect::kRefused,
        with([&](Tensor& x) { x.data = x.ptr<std::uint8_t>() + bytes; }));
  }
  for (DType dtype : kAllDTypes) {
    if (dtype == valid.dtype || std::ranges::find(argument.wider, dtype) != argument.wider.end()) continue;
    // The bits of the elements, read as another type, may be NaN, huge, or anything.
    const bool wider = dtype_bytes(dtype) > dtype_bytes(valid.dtype);
    add(".dtype=" + std::string(dtype_name(dtype)), wider ? Expect::kRefused : Expect::kConfined,
        with([&](Tensor& x) { x.dtype = dtype; }));
  }
  for (int number : {9, 77}) {
    add(".dtype=" + std::to_string(number), Expect::kRefused,
        with([&](Tensor& x) { x.dtype = static_cast<DType>(number); }));
  }
  add(".device=cpu:1", Expect::kRefused, with([](Tensor& x) { x.device.index = 1; }));
  add(".device=cuda", Expect::kRefused, with([](Tensor& x) { x.device = Device::cuda(); }));
  for (int number : {99}) {
    add(".device=" + std::to_string(number), Expect::kRefused,
        with([&](Tensor& x) { x.device.type = static_cast<DeviceType>(number); }));
  }
  for (int ndim : std::set{-1, 0, valid.ndim - 1, valid.ndim + 1, 7, 1000, kInt32Max}) {
    if (ndim == valid.ndim) continue;
    const bool scalar = argument.scale && ndim >= 0 && ndim <= 2;
    add(".ndim=" + to_text(std::int64_t{ndim}), scalar ? Expect::kRight : Expect::kRefused,
        with([&](Tensor& x) { x.ndim = ndim; }));
  }

  const std::vector<std::string> words = words_of(argument.shape);
  for (int dim = 0; dim < valid.ndim; ++dim) {
    const std::string at = "[" + std::to_string(dim) + "]";
    const char kind = words[static_cast<std::size_t>(dim)][0];
    const std::int64_t extent = valid.shape[dim];
    std::set<std::int64_t> extents = {-1, 0, extent - 1, extent + 1};
    extents.insert(std::begin(kLargeExtents), std::end(kLargeExtents));
    for (std::int64_t value : extents) {
      if (value == extent) continue;
      Expect expect = Expect::kRight;  // a smaller view is an honest one
      if (value < 0) expect = Expect::kRefused;
      if (value > extent && kind != '~') {
        // Taken at its word, it can only be refused where its own size overflows.
        if (kind == '!' && value < kInt64Max / 2) continue;
        expect = Expect::kRefused;
      }
      add(".shape" + at + "=" + to_text(value), expect, with([&](Tensor& x) { x.shape[dim] = value; }));
    }
    const std::int64_t backwards = -valid.strides[dim];
    for (std::int64_t stride :
         std::set<std::int64_t>{0, 1, -1, valid.strides[dim] + 1, backwards, kInt64Max, kInt64Min}) {
      if (stride == valid.strides[dim]) continue;
      Tensor changed = valid;
      changed.strides[dim] = stride;
      std::string text = to_text(stride);
      if (stride == backwards && stride != 0 && extent > 1) {  // backwards over the same elements
        changed.data = changed.ptr<std::uint8_t>() +
                       (extent - 1) * valid.strides[dim] * static_cast<std::int64_t>(dtype_bytes(valid.dtype));
        text += " backwards";
      }
      if (!has_elements(changed)) continue;
      if (!reach(changed)) {
        add(".strides" + at + "=" + text, Expect::kRefused, changed);
        continue;
      }
      // A stride decides nothing but addresses. Where those leave the buffer, only the caller can know.
      if (!inside(call, changed)) continue;
      // Rows of an output lie over one another, or over those of a neighbour in the same buffer.
      Expect expect = Expect::kRight;
      if (argument.role != Role::kInput && extent > 1 && changed.data == valid.data) {
        expect = stride == 0 ? Expect::kRefused : Expect::kConfined;
      }
      add(".strides" + at + "=" + text, expect, changed);
    }
  }
}

void all_tensor_probes(Call& call, std::string_view containing) {
  std::map<std::string, std::vector<std::pair<cuda::TensorRef, int>>> shared;
  for (const TensorArgument& argument : call.tensors) {
    if (std::string_view(argument.name).find(containing) == std::string_view::npos) continue;
    tensor_probes(call, argument);
  }
  for (const TensorArgument& argument : call.tensors) {
    if (!argument.tensor.get().defined()) continue;
    const std::vector<std::string> words = words_of(argument.shape);
    for (std::size_t dim = 0; dim < words.size(); ++dim) {
      if (std::isalpha(static_cast<unsigned char>(words[dim][0])) != 0) {
        shared[words[dim]].emplace_back(argument.tensor, static_cast<int>(dim));
      }
    }
  }
  for (const auto& [word, places] : shared) {
    const std::int64_t extent = places[0].first.get().shape[places[0].second];
    const auto set_all = [&all = places](std::int64_t value, bool null) {
      return [all, value, null] {
        for (const auto& place : all) {
          place.first.edit([&](Tensor& tensor) {
            tensor.shape[place.second] = value;
            if (null) tensor.data = nullptr;
          });
        }
      };
    };
    call.probes.push_back({"every " + word + "=0", Expect::kRight, set_all(0, false)});
    call.probes.push_back({"every " + word + "=0, null", Expect::kRight, set_all(0, true)});
    call.probes.push_back({"every " + word + "=-1, null", Expect::kRefused, set_all(-1, true)});
    if (extent > 1)
      call.probes.push_back({"every " + word + "=" + to_text(extent - 1), Expect::kRight, set_all(extent - 1, false)});
    // A product that wraps to 0 elements does not make a null pointer right.
    for (std::int64_t value : kLargeExtents) {
      call.probes.push_back(
          {"every " + word + "=" + to_text(value) + ", null", Expect::kRefused, set_all(value, true)});
    }
  }
}

void plain_probes(Call& call) {
  call.probes.push_back({"as it is", Expect::kAccepted, [] {}});
  call.probes.push_back({"memory ends", Expect::kAccepted, [] {}, true});
}

void swap_probes(Call& call) {
  for (const TensorArgument& a : call.tensors) {
    for (const TensorArgument& b : call.tensors) {
      if (a.tensor.address() == b.tensor.address() || !b.tensor.get().defined()) continue;
      const cuda::TensorRef to = a.tensor;
      const cuda::TensorRef from = b.tensor;
      // Two views share memory, and one of them is written, so what comes out is undefined.
      const bool writes = a.role != Role::kInput || b.role != Role::kInput;
      call.probes.push_back({std::string(a.name) + ":=" + b.name, writes ? Expect::kConfined : Expect::kRight,
                             [=] { to.set(from.get()); }});
      if (std::less<>()(a.tensor.address(), b.tensor.address())) {
        call.probes.push_back({std::string(a.name) + "<->" + b.name, Expect::kRight, [=] {
                                 const ConstTensor moved = to.get();
                                 to.set(from.get());
                                 from.set(moved);
                               }});
      }
    }
  }
}

namespace {

ConstTensor tensor_named(const Call& call, std::string_view name) {
  for (const TensorArgument& argument : call.tensors) {
    if (name == argument.name) return argument.tensor.get();
  }
  std::fprintf(stderr, "hostile: no tensor is called %.*s\n", static_cast<int>(name.size()), name.data());
  std::abort();
}

// Addresses of the elements to change, in row-major order.
std::vector<std::uint8_t*> elements_of(const Call& call, const ConstTensor& t, std::size_t most) {
  std::vector<std::uint8_t*> all;
  const std::optional<Place> place = has_elements(t) ? inside(call, t) : std::nullopt;
  if (!place) return all;
  for_each_element(t, *place,
                   [&](std::size_t buffer, std::size_t at) { all.push_back(call.buffers[buffer]->data() + at); });
  if (all.size() <= most) return all;
  if (most == 2) return {all.front(), all.back()};
  return {all.front(), all[all.size() / 2], all.back()};
}

}  // namespace

void index_probes(Call& call, const char* name, Expect expect) {
  const ConstTensor& t = tensor_named(call, name);
  std::size_t n = 0;
  for (std::uint8_t* at : elements_of(call, t, 3)) {
    std::vector<std::int64_t> values = {-1, 0, 1, 7, 1000, kInt32Max, kInt32Min};
    if (t.dtype == DType::kInt64) values.insert(values.end(), {kInt64Max, kInt64Min, std::int64_t{1} << 32});
    if (t.dtype == DType::kUInt8) values = {0, 1, 2, 255};
    for (std::int64_t value : values) {
      const std::size_t size = dtype_bytes(t.dtype);
      call.probes.push_back({std::string(name) + " value " + std::to_string(n) + "=" + to_text(value), expect,
                             [=] { std::memcpy(at, &value, size); }});  // little endian
    }
    ++n;
  }
}

void float_probes(Call& call, const char* name, Expect of_nan, Expect of_infinity, Expect of_finite) {
  const ConstTensor& t = tensor_named(call, name);
  std::size_t n = 0;
  for (std::uint8_t* at : elements_of(call, t, 2)) {
    for (const auto& [value, expect] : {std::pair{kNaN, of_nan},
                                        {kInf, of_infinity},
                                        {-kInf, of_infinity == Expect::kRefused ? Expect::kConfined : of_infinity},
                                        {0.0F, Expect::kRight},
                                        {-0.0F, Expect::kRight},
                                        {-1.0F, Expect::kRight},
                                        {kHuge, of_finite},
                                        {-kHuge, of_finite},
                                        {kTiny, of_finite}}) {
      call.probes.push_back(
          {std::string(name) + " value " + std::to_string(n) + "=" + to_text(static_cast<double>(value)), expect,
           [at, x = value] { std::memcpy(at, &x, sizeof x); }});
    }
    ++n;
  }
}

}  // namespace quire::testing
