// What the public ops and the backends' defaults share: the library's own kernels behind validation.
#pragma once

#include <cstddef>

#include "quire/backend.h"
#include "quire/ops.h"

namespace quire::core {

// Stores in the formats of args.mode.
Status store(const ReshapeAndCacheArgs& args, void* stream);

// Reads the formats of args.mode, or rows through `decoder` where it is not null. A null plan: one is made, with its
// workspace.
Status attend(const UnifiedAttentionArgs& args, const AttentionPlan* plan, void* workspace, std::size_t workspace_bytes,
              const QuantKVBackend* decoder, void* stream);

void log(const char* message);

}  // namespace quire::core
