// merge_attn_states, against its formula in double precision.
#include <cmath>
#include <string>

#include "hostile/probe.h"
#include "reference/attention.h"
#include "support/owned_tensor.h"
#include "support/random.h"

namespace quire::testing {
namespace {

struct Merge {
  OwnedTensor out, lse, prefix_out, prefix_lse, suffix_out, suffix_lse;
  MergeAttnStatesArgs args;
};

void put(const Tensor& t, std::int64_t i, std::int64_t j, std::int64_t k, double value) {
  OwnedTensor element(t.dtype, {1});
  element.fill({static_cast<float>(value)});
  const std::int64_t at = i * t.strides[0] + j * t.strides[1] + k * t.strides[2];
  std::copy(element.bytes.begin(), element.bytes.end(),
            t.ptr<std::uint8_t>() + at * static_cast<std::int64_t>(dtype_bytes(t.dtype)));
}

// out = sum_i exp(lse_i - lse) out_i, lse = log sum_i exp(lse_i).
Status merge_in_double(const MergeAttnStatesArgs& args) {
  using reference::element;
  for (std::int64_t t = 0; t < args.prefix_out.shape[0]; ++t) {
    for (std::int64_t h = 0; h < args.prefix_out.shape[1]; ++h) {
      const double a = element(args.prefix_lse, t, h);
      const double b = element(args.suffix_lse, t, h);
      const double max = std::fmax(a, b);
      const bool empty = a == -kInf && b == -kInf;
      const double weight_a = empty ? 0.0 : std::exp(a - max);
      const double weight_b = empty ? 0.0 : std::exp(b - max);
      std::vector<double> row;
      for (std::int64_t i = 0; i < args.out.shape[2]; ++i) {
        const double x = weight_a == 0.0 ? 0.0 : weight_a * element(args.prefix_out, t, h, i);
        const double y = weight_b == 0.0 ? 0.0 : weight_b * element(args.suffix_out, t, h, i);
        row.push_back(empty ? 0.0 : (x + y) / (weight_a + weight_b));
      }
      for (std::size_t i = 0; i < row.size(); ++i) put(args.out, t, h, static_cast<std::int64_t>(i), row[i]);
      if (args.lse.defined()) put(args.lse, t, h, 0, empty ? -HUGE_VAL : max + std::log(weight_a + weight_b));
    }
  }
  return {};
}

Call make_merge(DType dtype, bool ones) {
  const auto merge = std::make_shared<Merge>();
  Merge& m = *merge;
  const std::int64_t tokens = ones ? 1 : 4;
  const std::int64_t heads = ones ? 1 : 3;
  Random random(7);
  for (OwnedTensor* tensor : {&m.out, &m.prefix_out, &m.suffix_out}) {
    *tensor = OwnedTensor(dtype, {tokens, heads, 40}, ones ? 0 : 8);
    tensor->fill(random.normals(tensor->view.numel()));
  }
  for (OwnedTensor* tensor : {&m.lse, &m.prefix_lse, &m.suffix_lse}) {
    *tensor = OwnedTensor(DType::kFloat32, {tokens, heads}, ones ? 0 : 1);
    tensor->fill(random.normals(tensor->view.numel()));
  }
  m.args = {m.out.view, m.lse.view, m.prefix_out.view, m.prefix_lse.view, m.suffix_out.view, m.suffix_lse.view};
  Call call;
  call.memory = merge;
  for (OwnedTensor* tensor : {&m.out, &m.lse, &m.prefix_out, &m.prefix_lse, &m.suffix_out, &m.suffix_lse}) {
    call.buffers.push_back(&tensor->bytes);
  }
  // Each tensor has a float type of its own: only the caller knows that this one holds 16 bits.
  const std::vector<DType> wider = dtype == DType::kFloat32 ? std::vector<DType>{} : std::vector{DType::kFloat32};
  call.tensors = {{"out", &m.args.out, "num_tokens num_q_heads head_size_v", Role::kClose, wider},
                  {"lse", &m.args.lse, "num_tokens num_q_heads", Role::kClose},
                  {"prefix_out", &m.args.prefix_out, "num_tokens num_q_heads head_size_v", Role::kInput, wider},
                  {"prefix_lse", &m.args.prefix_lse, "num_tokens num_q_heads"},
                  {"suffix_out", &m.args.suffix_out, "num_tokens num_q_heads head_size_v", Role::kInput, wider},
                  {"suffix_lse", &m.args.suffix_lse, "num_tokens num_q_heads"}};
  call.run = [&m] { return merge_attn_states(m.args, nullptr); };
  call.oracle = [&m] { return merge_in_double(m.args); };
  plain_probes(call);
  // out may alias a part, element for element.
  call.probes.push_back(
      {"out is prefix_out", Expect::kAccepted, [&m] { cuda::TensorRef(&m.args.out).set(m.args.prefix_out); }});
  call.probes.push_back(
      {"out is suffix_out", Expect::kAccepted, [&m] { cuda::TensorRef(&m.args.out).set(m.args.suffix_out); }});
  all_tensor_probes(call, dtype == DType::kFloat32 ? "" : "out");
  if (!ones) swap_probes(call);
  // Of two parts, one with LSE +inf or NaN makes NaN; where both are infinite the order of operations decides.
  for (const char* name : {"prefix_lse", "suffix_lse"}) {
    float_probes(call, name, Expect::kConfined, Expect::kConfined, Expect::kConfined);
  }
  if (dtype == DType::kFloat32) {
    for (const char* name : {"prefix_out", "suffix_out"}) {
      float_probes(call, name, Expect::kAccepted, Expect::kAccepted, Expect::kConfined);
    }
  }
  return call;
}

}  // namespace

std::vector<Group> merge_groups() {
  return {{"merge/float32", {}, [] { return make_merge(DType::kFloat32, false); }, 280, 120},
          {"merge/bfloat16", {}, [] { return make_merge(DType::kBFloat16, false); }, 170, 70},
          {"merge/ones", {}, [] { return make_merge(DType::kFloat32, true); }, 240, 130}};
}

}  // namespace quire::testing
