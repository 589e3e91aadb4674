// What a call costs the host before, between and after the work itself.
#pragma once

#include <functional>

#include "quire/status.h"
#include "quire/tensor.h"

namespace quire::cli {

// Microseconds of the host for one call, the median of several batches. Give a call that has nothing to compute. On CUDA
// calls are not waited for inside a batch, so that what is timed is validation and launch.
Result<double> host_microseconds(Device device, const std::function<Status()>& call);

}  // namespace quire::cli
