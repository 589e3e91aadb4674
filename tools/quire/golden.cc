#include "golden.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <string_view>
#include <utility>

#include "format/formats.h"
#include "golden_file.h"
#include "golden_gates.h"
#include "golden_replay.h"
#include "llm/safetensors.h"
#include "quire/mode.h"

namespace quire::cli {
namespace {

Status replay_ops(const GoldenCase& golden, Device device, CaseResult& result) {
  std::string name = "auto";  // diffkv cases name none
  if (Status status = golden.read("mode", &name); !status) return status;
  if (Status status = golden.read("preset", &name); !status) return status;
  const auto skip = [&](const std::string& reason) {
    result.skipped = true;
    result.reason = reason;
    return Status();
  };
  const auto id = parse_kv_cache_dtype(name);
  if (!id.ok()) return skip("this build has no mode " + name);
  const auto known = mode_info(*id);
  if (!known.ok()) return known.status();
  const ModeInfo* mode = *known;
  if (!mode->compiled) return skip("mode " + name + " was left out of this build");
  if (mode->key_format.empty()) return skip("no gates are known for mode " + name);

  if (mode->kv_quant_mode == KVQuantMode::kFp8PerTensor) {
    for (const char* scale : {"k_scale", "v_scale"}) {
      if (!golden.has(scale)) return golden.refuse(std::string("no tensor '") + scale + "'");
    }
  }
  Replay replay{golden, device, result, *mode, {}};
  const bool reads = golden.has("query");
  if (golden.has("key") || !reads) {
    if (Status status = replay_write(replay); !status || !result.reason.empty()) return status;
  }
  return reads ? replay_attention(replay) : Status();
}

Status replay_signs(const GoldenCase& golden, Device, CaseResult& result) {
  if (Status status = golden.require("signs", 1); !status) return status;
  const Tensor signs = golden.tensor("signs");
  if (signs.dtype != DType::kFloat32 || signs.shape[0] > format::kMaxHeadSize) {
    return golden.refuse("'signs' is " + to_string(signs) + ", needs at most 512 float32");
  }
  int different = 0;
  for (int i = 0; i < signs.shape[0]; ++i) {
    const float mine = format::apply_sign(1.0F, format::rht_sign_word(i / 32, format::kMaxHeadSize), i % 32);
    different += mine == signs.ptr<float>()[i] ? 0 : 1;
  }
  result.measures.push_back({"signs that differ", static_cast<double>(different), 0.0});
  return {};
}

template <int kBits>
double centroid_at(int code) {
  return format::centroid<kBits>(code);
}

// tq_centroids/<head size>_<bits>: the codebook of N(0, 1 / head size).
Status replay_centroids(const GoldenCase& golden, Device, CaseResult& result) {
  if (Status status = golden.require("centroids", 1); !status) return status;
  const Tensor theirs = golden.tensor("centroids");
  const std::string numbers = golden.name.substr(golden.name.find('/') + 1);
  const int head_size = std::atoi(numbers.c_str());
  const std::string bits = numbers.substr(std::min(numbers.find('_'), numbers.size()));
  double (*mine)(int) = bits == "_3" ? centroid_at<3> : bits == "_4" ? centroid_at<4> : nullptr;
  if (mine == nullptr || head_size < 1) return golden.refuse("its name is not tq_centroids/<head size>_<3 or 4>");
  if (theirs.dtype != DType::kFloat32 || theirs.shape[0] != (bits == "_3" ? 8 : 16)) {
    return golden.refuse("'centroids' is " + to_string(theirs) + ", needs one float32 per code");
  }
  double worst = 0.0;
  for (int i = 0; i < theirs.shape[0]; ++i) {
    const double exact = theirs.ptr<float>()[i] * std::sqrt(static_cast<double>(head_size));
    worst = worse(worst, std::fabs(mine(i) / exact - 1.0));
  }
  result.measures.push_back({"centroids, relative difference", worst, kCentroidTolerance});
  return {};
}

// e4b15/float16: Triton's code of every float16, indexed by its bits.
Status replay_e4b15(const GoldenCase& golden, Device, CaseResult& result) {
  if (Status status = golden.require("codes", 1); !status) return status;
  const Tensor theirs = golden.tensor("codes");
  if (theirs.dtype != DType::kUInt8 || theirs.shape[0] != 1 << 16) {
    return golden.refuse("'codes' is " + to_string(theirs) + ", needs 65536 uint8");
  }
  int different = 0;
  for (int bits = 0; bits < 1 << 16; ++bits) {
    const std::uint8_t mine = format::E4B15::encode(format::half_to_float(static_cast<std::uint16_t>(bits)));
    different += mine == theirs.ptr<std::uint8_t>()[bits] ? 0 : 1;
  }
  result.measures.push_back({"codes that differ", static_cast<double>(different), 0.0});
  return {};
}

struct CaseKind {
  std::string_view prefix;
  const char* required_param;  // null: none
  Status (*replay)(const GoldenCase& golden, Device device, CaseResult& result);
};
constexpr CaseKind kCaseKinds[] = {
    {"write/", "mode", replay_ops},        {"attn/", "mode", replay_ops},
    {"diffkv/", nullptr, replay_ops},      {"turboquant/", "preset", replay_ops},
    {"rht_signs/", nullptr, replay_signs}, {"tq_centroids/", nullptr, replay_centroids},
    {"e4b15/", nullptr, replay_e4b15},
};

// The tensors that a case of each kind has, so that a lost or misnamed one is not taken for one that was never there. A
// column is a kind, in the order of kCaseKinds. R: every case has it. W: a case that is written has it. o: it may be
// there. -: it has no place there.
struct TensorRule {
  std::string_view tensor;
  char of_kind[std::size(kCaseKinds) + 1];
};
constexpr TensorRule kTensorRules[] = {
    {"key", "RWWR---"},           {"value", "RWWR---"},        {"slot_mapping", "RWWR---"},
    {"key_cache", "RR-----"},     {"value_cache", "RR-----"},  {"kv_cache", "--RR---"},
    {"query", "-RRR---"},         {"out", "-RRR---"},          {"seq_lens", "-RRR---"},
    {"block_table", "-RRR---"},   {"cu_seqlens_q", "-RR----"}, {"k_scale_cache", "oo-----"},
    {"v_scale_cache", "oo-----"}, {"k_scale", "ooo----"},      {"v_scale", "ooo----"},
    {"q_scale", "-oo----"},       {"output_scale", "-oo----"}, {"sinks", "-oo----"},
    {"alibi_slopes", "-oo----"},  {"qq_bias", "-oo----"},      {"mm_prefix_range", "-oo----"},
    {"midpoints", "---R---"},     {"signs", "----R--"},        {"rswa_prefix_lens", "-oo----"},
    {"centroids", "---R-R-"},     {"codes", "------R"},
};

Status check_tensors(const GoldenCase& golden, const CaseKind& kind) {
  const auto column = static_cast<std::size_t>(&kind - kCaseKinds);
  const auto place = [&](std::string_view tensor) {
    const auto* rule = std::find_if(std::begin(kTensorRules), std::end(kTensorRules),
                                    [&](const TensorRule& known) { return known.tensor == tensor; });
    return rule == std::end(kTensorRules) ? '-' : rule->of_kind[column];
  };
  std::string known;
  for (const TensorRule& rule : kTensorRules) {
    if (rule.of_kind[column] != '-') known.append(known.empty() ? "" : ", ").append(rule.tensor);
  }
  bool written = false;
  for (const auto& [name, tensor] : golden.tensors) {
    if (place(name) == '-') return golden.refuse("tensor '" + name + "' has no meaning; supported are " + known);
    written = written || place(name) == 'W';
  }
  for (const TensorRule& rule : kTensorRules) {
    const char needed = rule.of_kind[column];
    if ((needed == 'R' || (needed == 'W' && written)) && !golden.has(rule.tensor)) {
      return golden.refuse("no tensor '" + std::string(rule.tensor) + "'");
    }
  }
  if (kind.required_param != nullptr && !golden.params.contains(kind.required_param)) {
    return golden.refuse(std::string("no parameter '") + kind.required_param + "'");
  }
  return {};
}

}  // namespace

bool CaseResult::pass() const {
  return !skipped && reason.empty() && !measures.empty() &&
         std::all_of(measures.begin(), measures.end(), [](const Measure& measure) { return measure.pass(); });
}

const Measure* CaseResult::worst() const {
  const auto share = [](const Measure& measure) {
    if (measure.error == 0.0) return 0.0;
    const double ratio = measure.error / measure.tolerance;
    return std::isnan(ratio) ? kInfinity : ratio;
  };
  const auto found = std::max_element(measures.begin(), measures.end(),
                                      [&](const Measure& a, const Measure& b) { return share(a) < share(b); });
  return found == measures.end() ? nullptr : &*found;
}

Result<std::vector<CaseResult>> replay_golden_file(const std::string& path, Device device) {
  if (Status status = device_available(device); !status) return status;
  const auto file = llm::SafetensorsFile::open(path);
  if (!file.ok()) return file.status();
  const auto cases = cases_of(*file);
  if (!cases.ok()) return cases.status();
  std::vector<CaseResult> results;
  for (const GoldenCase& golden : *cases) {
    const auto* kind = std::find_if(std::begin(kCaseKinds), std::end(kCaseKinds),
                                    [&](const CaseKind& known) { return golden.name.rfind(known.prefix, 0) == 0; });
    if (kind == std::end(kCaseKinds)) return golden.refuse("no known kind of case; names begin with write/, attn/, ..");
    if (Status status = check_tensors(golden, *kind); !status) return status;
    CaseResult result;
    result.name = golden.name;
    if (Status status = kind->replay(golden, device, result); !status) return status;
    results.push_back(std::move(result));
  }
  return results;
}

}  // namespace quire::cli
