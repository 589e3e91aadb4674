// Runs an op on a device with arguments that live on the host: copies the tensors there, runs, copies what the op wrote
// back. For checks, where time does not matter.
#pragma once

#include "quire/ops.h"
#include "quire/status.h"
#include "quire/tensor.h"

namespace quire::cli {

// kUnsupported where this build has no kernels for the device, or the machine no such device.
Status device_available(Device device);

Status run_on(Device device, const ReshapeAndCacheArgs& args);
Status run_on(Device device, const UnifiedAttentionArgs& args);

}  // namespace quire::cli
