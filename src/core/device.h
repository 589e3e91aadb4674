// The table of devices: what each one does for the ops. Nothing else in the ops knows one device from another.
#pragma once

#include <string>

#include "attention/problem.h"
#include "call/plan_data.h"
#include "core/mode_table.h"
#include "quire/backend.h"
#include "quire/ops.h"

namespace quire::core {

struct DeviceOps {
  Result<int> (*count)();

  // The facts of device `index`; refused where there is no such device.
  Result<Arch> (*arch)(int index);

  // Fills in a problem's bounds on lengths: from the arguments or, where the host can read them, from the lengths.
  // `planned` is the problem of the plan the call brings, or null.
  Status (*bound_lengths)(const UnifiedAttentionArgs& args, const AttentionShape& shape,
                          const AttentionProblem* planned, AttentionProblem& problem);

  // Fills in all of a plan but the problem and the formats, which are there.
  Status (*plan)(PlanData& plan);

  // Names the kernels of a plan.
  std::string (*describe)(const PlanData& plan);

  Status (*store)(const ReshapeAndCacheArgs& args, const StoreProblem& problem, void* stream);

  // Reads the formats of `shape` or, where they are not known, rows through `decoder`. `workspace` holds
  // plan.workspace_bytes; null: the device finds its own for the call.
  Status (*attend)(const PlanData& plan, const UnifiedAttentionArgs& args, const AttentionShape& shape,
                   const QuantKVBackend* decoder, void* workspace, void* stream);

  Status (*merge)(const MergeAttnStatesArgs& args, void* stream);

  Status (*hadamard)(const HadamardArgs& args, void* stream);
};

// Finds the row of a device. Validated arguments name one that there is.
const DeviceOps& device_ops(DeviceType type);

}  // namespace quire::core
