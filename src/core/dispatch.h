// The public ops and the defaults of the backends share these: the library's own kernels, behind validation.
#pragma once

#include <cstddef>

#include "call/plan_data.h"
#include "core/mode_table.h"
#include "quire/backend.h"
#include "quire/ops.h"

namespace quire::core {

// Stores in the formats of `mode`, whatever args.mode says.
Status store(const ReshapeAndCacheArgs& args, const ModeRow& mode, void* stream);

// Reads the formats of `mode`, whatever args.mode says, or rows through `decoder` where it is not null. A null plan:
// one is made, with its workspace.
Status attend(const UnifiedAttentionArgs& args, const ModeRow& mode, const PlanData* plan, void* workspace,
              std::size_t workspace_bytes, const QuantKVBackend* decoder, void* stream);

void log(const char* message);

}  // namespace quire::core
