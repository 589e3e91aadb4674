#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "format/formats.h"
#include "golden_gates.h"
#include "golden_replay.h"
#include "reference/attention.h"

namespace quire::cli {
namespace {

using nlohmann::json;

// The worst row's ||a - b|| / ||b||, both [num_tokens, Hq, head_size_v].
double worst_row_error(const ConstTensor& a, const ConstTensor& b) {
  double worst = 0.0;
  for (std::int64_t i = 0; i < b.shape[0]; ++i) {
    for (std::int64_t h = 0; h < b.shape[1]; ++h) {
      double difference = 0.0;
      double norm = 0.0;
      for (std::int64_t e = 0; e < b.shape[2]; ++e) {
        const double theirs = reference::element(b, i, h, e);
        const double delta = reference::element(a, i, h, e) - theirs;
        difference += delta * delta;
        norm += theirs * theirs;
      }
      worst = worse(worst, difference == 0.0 ? 0.0 : std::sqrt(difference / norm));
    }
  }
  return worst;
}

// Compares an fp8 output with the float output that it was made from: the worst |code * scale - clamp(out)|, as a share
// of half an fp8 step at out plus `slack` times the row's RMS.
double worst_fp8_error(const ConstTensor& codes, double scale, const ConstTensor& out, double slack) {
  double worst = 0.0;
  for (std::int64_t i = 0; i < out.shape[0]; ++i) {
    for (std::int64_t h = 0; h < out.shape[1]; ++h) {
      double squares = 0.0;
      for (std::int64_t e = 0; e < out.shape[2]; ++e) squares += std::pow(reference::element(out, i, h, e), 2);
      const double rms = std::sqrt(squares / static_cast<double>(out.shape[2]));
      for (std::int64_t e = 0; e < out.shape[2]; ++e) {
        const double exact = std::clamp(reference::element(out, i, h, e) / scale, -448.0, 448.0);
        // e4m3: 3 mantissa bits, the smallest normal number 2^-6.
        const double half_step = std::ldexp(0.5, std::max(std::ilogb(std::fabs(exact) + 1e-30), -6) - 3);
        const double error = std::fabs(reference::element(codes, i, h, e) - exact) * scale;
        worst = worse(worst, error / (half_step * scale + slack * rms));
      }
    }
  }
  return worst;
}

Status confirm_lengths(const GoldenCase& golden, const char* key, const std::vector<int>& actual) {
  if (!golden.params.contains(key)) return {};
  const json& stated = golden.params[key];
  if (stated.is_array() && stated == json(actual)) return {};
  return golden.refuse("parameter '" + std::string(key) + "' is " + stated.dump() + ", the tensors say " +
                       json(actual).dump());
}

}  // namespace

Status replay_attention(Replay& replay) {
  const GoldenCase& golden = replay.golden;
  for (const auto& [name, ndim] : {std::pair{"query", 3}, {"out", 3}, {"seq_lens", 1}, {"block_table", 2}}) {
    if (Status status = golden.require(name, ndim); !status) return status;
  }
  UnifiedAttentionArgs args;
  args.mode = replay.mode.id;
  args.query = golden.tensor("query");
  std::vector<std::int32_t> one_token_each(static_cast<std::size_t>(args.query.shape[0]) + 1);
  if (golden.has("cu_seqlens_q")) {
    if (Status status = golden.require("cu_seqlens_q", 1); !status) return status;
    args.cu_seqlens_q = golden.tensor("cu_seqlens_q");
  } else {  // a decode of one token per sequence names none
    std::iota(one_token_each.begin(), one_token_each.end(), 0);
    args.cu_seqlens_q = Tensor::contiguous(one_token_each.data(), DType::kInt32, {args.query.shape[0] + 1});
  }
  args.seq_lens = golden.tensor("seq_lens");
  args.block_table = golden.tensor("block_table");
  const Tensor theirs = golden.tensor("out");
  const auto caches = caches_of(golden, replay.mode, args.query.shape[2], theirs.shape[2]);
  if (!caches.ok()) return caches.status();
  args.cache = *caches;
  args.sinks = golden.tensor("sinks");
  args.alibi_slopes = golden.tensor("alibi_slopes");
  args.qq_bias = golden.tensor("qq_bias");
  args.mask.mm_prefix_range = golden.tensor("mm_prefix_range");
  args.mask.rswa_prefix_lens = golden.tensor("rswa_prefix_lens");
  args.q_descale = golden.tensor("q_scale");
  args.k_descale = golden.tensor("k_scale");
  args.v_descale = golden.tensor("v_scale");
  if (!golden.params.contains("softmax_scale")) return golden.refuse("no parameter 'softmax_scale'");
  for (Status status :
       {golden.read("softmax_scale", &args.softmax_scale), golden.read("softcap", &args.softcap),
        golden.read("sliding_window", &args.mask.sliding_window),
        golden.read("chunk_lookback", &args.mask.chunk_lookback), golden.read("rswa_window", &args.mask.rswa_window),
        golden.read("use_alibi_sqrt", &args.use_alibi_sqrt), golden.confirm("num_q_heads", args.query.shape[1]),
        golden.confirm("head_size", args.query.shape[2]), golden.confirm("head_size_v", theirs.shape[2]),
        golden.confirm("num_kv_heads", args.cache.key_cache.shape[2]),
        golden.confirm("block_size", args.cache.key_cache.shape[1])}) {
    if (!status) return status;
  }

  // The first run has an fp32 output: what the kernel computes, before the output is rounded.
  args.out = replay.scratch.filled(theirs, DType::kFloat32, 0xFF);
  ConstTensor lse_shape = args.query;
  lse_shape.ndim = 2;
  args.lse = replay.scratch.filled(lse_shape, DType::kFloat32, 0xFF);
  const auto refused = [&](const Status& status) {
    replay.result.reason = "unified_attention: " + status.message();
    return Status();
  };
  // The CPU goes first (and alone with --device cpu), because it looks at every length and block id, which the other
  // devices and the oracle trust.
  if (Status status = run_on(Device::cpu(), args, &unified_attention); !status) return refused(status);
  if (!replay.device.is_cpu()) {
    if (Status status = run_on(replay.device, args, &unified_attention); !status) return refused(status);
  }
  std::vector<int> query_lens;
  std::vector<int> seq_lens;
  for (std::int64_t b = 0; b < args.seq_lens.shape[0]; ++b) {
    const auto* ends = args.cu_seqlens_q.ptr<const std::int32_t>();
    query_lens.push_back(ends[b + 1] - ends[b]);
    seq_lens.push_back(args.seq_lens.ptr<const std::int32_t>()[b]);
  }
  if (Status status = confirm_lengths(golden, "query_lens", query_lens); !status) return status;
  if (Status status = confirm_lengths(golden, "seq_lens", seq_lens); !status) return status;

  UnifiedAttentionArgs oracle = args;
  oracle.out = replay.scratch.filled(theirs, DType::kFloat32, 0xFF);
  oracle.lse = replay.scratch.filled(lse_shape, DType::kFloat32, 0xFF);
  if (Status status = reference::unified_attention(oracle); !status) return golden.refuse(status.message());
  const double tolerance =
      oracle_tolerance(replay.device, args.query.dtype, replay.mode.key_format, replay.mode.value_format);
  replay.measure("output against the oracle", worst_row_error(args.out, oracle.out), tolerance);
  double lse_error = 0.0;
  for (std::int64_t i = 0; i < args.lse.shape[0]; ++i) {
    for (std::int64_t h = 0; h < args.lse.shape[1]; ++h) {
      const double mine = reference::element(args.lse, i, h);
      const double exact = reference::element(oracle.lse, i, h);
      lse_error = worse(lse_error, mine == exact ? 0.0 : std::fabs(mine - exact) / std::max(1.0, std::fabs(exact)));
    }
  }
  replay.measure("LSE against the oracle", lse_error, tolerance);

  // The gates of the file are for an output that is not rounded. The next measure looks at the rounding.
  if (theirs.dtype == DType::kFloat8E4M3) {
    if (Status status = golden.require("output_scale", 1); !status) return status;
    args.output_scale = golden.tensor("output_scale");
    const double scale = reference::element(args.output_scale, 0);
    replay.measure("the file's fp8 output against this output",
                   worst_fp8_error(theirs, scale, args.out, kReadToleranceFp8Element), 1.0);
  } else {
    const auto key = reference::resolve_format(replay.mode.key_format, args.cache.key_cache.dtype);
    const auto value = reference::resolve_format(replay.mode.value_format, args.cache.value_cache.dtype);
    replay.measure("output against the file", worst_row_error(args.out, theirs),
                   std::max(read_tolerance(format::format_info(key).name, args.query.dtype),
                            read_tolerance(format::format_info(value).name, args.query.dtype)));
  }

  args.out = replay.scratch.filled(theirs, theirs.dtype, 0xFF);
  if (Status status = run_on(replay.device, args, &unified_attention); !status) return refused(status);
  const std::string what = std::string(dtype_name(theirs.dtype)) + " output against the oracle";
  if (theirs.dtype == DType::kFloat8E4M3) {
    // One element may be off by as much as the whole row's error: tolerance * norm = tolerance * sqrt(dv) * RMS.
    const double slack = tolerance * std::sqrt(static_cast<double>(theirs.shape[2]));
    const double scale = reference::element(args.output_scale, 0);
    replay.measure(what, worst_fp8_error(args.out, scale, oracle.out, slack), 1.0);
  } else {
    replay.measure(what, worst_row_error(args.out, oracle.out), tolerance + rounding_error(theirs.dtype));
  }
  return {};
}

}  // namespace quire::cli
