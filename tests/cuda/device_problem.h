// The ops of tests/support on the GPU: the same host arguments, mirrored to the device and back.
#pragma once

#include <gtest/gtest.h>

#include "cuda/device_memory.h"
#include "support/attention_case.h"

namespace quire::testing {

#define QUIRE_ASSERT_OK(expression)                                               \
  do {                                                                            \
    const ::quire::Status quire_status = (expression);                            \
    ASSERT_TRUE(quire_status.ok()) << #expression ": " << quire_status.message(); \
  } while (false)

// Stores on the device. Afterwards the caches (and the error counter) of `args`, which is on the host, are what it
// wrote.
Status store_on_device(const ReshapeAndCacheArgs& args);

// Attends over host arguments on the device, in a workspace that is poisoned first. out, lse and the error counter are
// what the device wrote.
Status attend_on_device(const UnifiedAttentionArgs& args, int num_splits, bool batch_invariant);

Status merge_on_device(const MergeAttnStatesArgs& args);

Status hadamard_on_device(const HadamardArgs& args);

// Sets a case's tolerances by the kernel that the device plans for it.
void prepare_for_device(AttentionCase& problem);

}  // namespace quire::testing
