// Everything that can be wrong with a call, found before anything is written: shapes, dtypes, strides, modes and, on
// the CPU, the values of lengths, slots and block ids. Each refusal is one sentence: argument, what came, what is
// supported.
#pragma once

#include "attention/problem.h"
#include "core/checks.h"
#include "quire/backend.h"
#include "quire/ops.h"

namespace quire::core {

// The first test of validate_attention: what every tensor must be (check_extents), and that all are on one device.
Status check_tensors(const UnifiedAttentionArgs& args);

Result<StoreProblem> validate_store(const ReshapeAndCacheArgs& args, const ModeRow& mode);

// `own_rows`: the registered backend that reads its own rows, so that the caches' last dimension and dtype are its
// business; null where the mode's formats are read. If it decodes row by row, rows and scale caches must be what it
// says.
Result<AttentionShape> validate_attention(const UnifiedAttentionArgs& args, const ModeRow& mode,
                                          const QuantKVBackend* own_rows);

Status validate_merge(const MergeAttnStatesArgs& args);

// Gives the formats of the problem's caches. Those of a registered mode are not known.
Result<FormatPair> validate_problem(const AttentionProblem& problem);

}  // namespace quire::core
