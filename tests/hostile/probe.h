// The hostile tests change one thing about a valid call of an op, run it in a process of its own, and judge the result.
//
// A Call is a valid call with all that a judge needs to know: its tensors by name and shape, every byte it may touch,
// the op, and the oracle. A Probe changes one thing. What must hold of it, whatever was changed:
//
//   - the process ends by itself within kProbeSeconds: no signal, no sanitizer report, nothing thrown;
//   - a refusal is one printable sentence that names an argument, and no byte of any buffer has changed;
//   - an accepted call has the oracle's outputs, and no byte beside the elements of its outputs has changed.
//
// A probe never lies about memory in a way that no library could notice: a view that leaves its buffer is only tried
// where another argument contradicts it (see tensor_probes). Buffers are heap blocks of exactly the size the views
// need, so that AddressSanitizer sees one byte too many.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/device_memory.h"
#include "quire/quire.h"

namespace quire::testing {

constexpr int kProbeSeconds = 20;

enum class Expect {
  kRefused,   // cannot be right: must be refused
  kRight,     // refused, or done as the oracle does it
  kAccepted,  // is legal: must be done, as the oracle does it
  kConfined,  // refused, or writes elements of its outputs and nothing else: their values are undefined (two arguments
              // over the same memory) or not the oracle's (logits that overflow fp32)
  kPartial,   // the same, and a refusal may come when some of them are written: a user's code failed in the middle
};

struct Probe {
  std::string name;
  Expect expect = Expect::kRight;
  std::function<void()> change;
  bool without_memory = false;  // before the call it is made again and again, each time with one more allocation
};

enum class Role {
  kInput,
  kExact,  // an output whose bytes are the oracle's
  kClose,  // an output of floats, computed in another order than the oracle's
};

// A tensor of a call. `shape` names the extents, one word each. A word that other tensors of the call have too is
// contradicted by them when it changes here alone; the others say what the library can know:
//   =word   follows from other arguments
//   ~word   may be larger than the buffer without harm: what lies beyond is not read (a block table's columns)
//   !word   is taken at its word: nothing else says how large it is
struct TensorArgument {
  const char* name;
  cuda::TensorRef tensor;
  const char* shape;
  Role role = Role::kInput;
  std::vector<DType> wider = {};  // legal dtypes that are wider than the one the buffer was made for
  bool scale = false;             // one element, of any number of dimensions up to 2
};

struct Call {
  std::shared_ptr<void> memory;                     // owns what the pointers below point to
  std::vector<std::vector<std::uint8_t>*> buffers;  // all bytes the tensors lie in
  std::vector<TensorArgument> tensors;
  std::vector<std::string> words;                            // what a refusal may name, beside the tensors
  std::vector<Probe> probes;                                 // those of this call alone, scalars first
  std::function<Status()> run;                               // the op
  std::function<Status()> oracle = [] { return Status(); };  // the same by other code, in place; says what is wrong
};

// ---- tables of hostile values ------------------------------------------------------------------------------------

constexpr std::int64_t kInt64Max = std::numeric_limits<std::int64_t>::max();
constexpr std::int64_t kInt64Min = std::numeric_limits<std::int64_t>::min();
constexpr std::int32_t kInt32Max = std::numeric_limits<std::int32_t>::max();
constexpr std::int32_t kInt32Min = std::numeric_limits<std::int32_t>::min();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kHuge = std::numeric_limits<float>::max();
constexpr float kTiny = std::numeric_limits<float>::denorm_min();

// data, dtype, device, ndim, every extent and every stride of one tensor; and the tensor left out.
void tensor_probes(Call& call, const TensorArgument& argument);
// tensor_probes of all tensors with `containing` in their names, and each word of all shapes changed in all at once.
void all_tensor_probes(Call& call, std::string_view containing = "");
// The call as it is, after calls in which the memory ends: at the first allocation, at the second, and so on.
void plain_probes(Call& call);
// Every two tensors swapped, and every tensor passed in the place of every other.
void swap_probes(Call& call);
// Every element of an integer tensor (of many, the first, the middle and the last) set to each hostile integer.
void index_probes(Call& call, const char* name, Expect expect = Expect::kRight);
// The first and the last element of a float tensor set to each special value.
void float_probes(Call& call, const char* name, Expect of_nan, Expect of_infinity, Expect of_finite);

// What to expect of which values of a scalar.
template <class T>
struct Values {
  std::vector<T> refused = {}, right = {}, accepted = {}, confined = {};
};

std::string to_text(std::int64_t value);
std::string to_text(double value);

template <class T, class U = T>
void scalar_probes(Call& call, const char* name, T* field, const Values<U>& values) {
  call.words.emplace_back(name);
  const auto add = [&](const std::vector<U>& list, Expect expect) {
    for (const U value : list) {
      std::string text;
      if constexpr (std::is_floating_point_v<U>) {
        text = to_text(static_cast<double>(value));
      } else {
        text = to_text(static_cast<std::int64_t>(value));
      }
      call.probes.push_back({std::string(name) + "=" + text, expect, [=] { *field = static_cast<T>(value); }});
    }
  };
  add(values.refused, Expect::kRefused);
  add(values.right, Expect::kRight);
  add(values.accepted, Expect::kAccepted);
  add(values.confined, Expect::kConfined);
}

// ---- groups ------------------------------------------------------------------------------------------------------

// A valid call and all its probes, which are one test. The minima keep the tables from becoming empty unnoticed.
struct Group {
  std::string name;                // "store/int4_per_token_head"
  std::vector<std::string> modes;  // that must be in the build
  std::function<Call()> make;
  int min_refused = 0;
  int min_accepted = 0;
};

std::vector<Group> store_groups();
std::vector<Group> attention_groups();
std::vector<Group> plan_groups();
std::vector<Group> merge_groups();
std::vector<Group> turboquant_groups();
std::vector<Group> layout_groups();
std::vector<Group> mode_groups();
std::vector<Group> backend_groups();
std::vector<Group> random_groups();

// ---- running -----------------------------------------------------------------------------------------------------

struct Outcome {
  enum Kind { kRefusedOk, kAcceptedOk, kFailed } kind = kFailed;
  std::string text;  // the refusal's sentence, or what went wrong
};

// Runs the probe in a child of this process, which must not have started threads yet.
Outcome run_probe(Call& call, const Probe& probe);

}  // namespace quire::testing
