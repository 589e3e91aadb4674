// What a plan holds: the device's choice for a problem. The device that made it fills it in and reads it back.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format/formats.h"
#include "quire/plan.h"

namespace quire {

// Not seen outside of a shared library, nor is what the standard library makes of it.
struct [[gnu::visibility("hidden")]] AttentionPlan::Data {
  AttentionProblem problem;
  format::FormatId key_format = format::FormatId::kNone;  // kNone: a registered mode's own
  format::FormatId value_format = format::FormatId::kNone;
  int kernel_ids[2] = {-1, -1};     // the device's numbers for the kernels of sequences of few and of many query rows
  bool tensor_cores = false;        // products are of 16-bit numbers; otherwise of fp32
  int query_tile = 1;               // query tokens of one sequence handled together
  std::int64_t split_size = 0;      // keys of one split, a multiple of the key tile
  std::int64_t max_splits = 1;      // splits of the longest sequence within the bounds
  std::size_t workspace_bytes = 0;  // grows only with the bounds
};
using PlanData = AttentionPlan::Data;

}  // namespace quire
