// The table of devices: what each one does for the ops. Nothing else in the ops knows one device from another.
#pragma once

#include "attention/problem.h"
#include "core/mode_table.h"
#include "quire/backend.h"
#include "quire/ops.h"

namespace quire::core {

struct DeviceOps {
  Result<Arch> (*arch)();

  // Fills in a problem's bounds on lengths: from the arguments or, where the host can read them, from the lengths.
  // `planned` is the problem of the plan the call brings, or null.
  void (*bound_lengths)(const UnifiedAttentionArgs& args, const AttentionShape& shape, const AttentionProblem* planned,
                        AttentionProblem& problem);

  Result<AttentionPlan> (*plan)(const AttentionProblem& problem, FormatPair formats);

  Status (*store)(const ReshapeAndCacheArgs& args, const StoreProblem& problem, void* stream);

  // Reads the formats of `shape` or, where they are not known, rows through `decoder`. `workspace` holds
  // plan.workspace_bytes; null: the device finds its own for the call.
  Status (*attend)(const AttentionPlan& plan, const UnifiedAttentionArgs& args, const AttentionShape& shape,
                   const QuantKVBackend* decoder, void* workspace, void* stream);

  Status (*merge)(const MergeAttnStatesArgs& args, void* stream);
};

// Validated arguments name one of the devices.
const DeviceOps& device_ops(Device device);

}  // namespace quire::core
