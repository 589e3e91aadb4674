// What holds for every tensor of every op, written once over the lists of call/tensors.h.
#pragma once

#include <string>

#include "call/tensors.h"
#include "core/checks.h"
#include "quire/status.h"
#include "quire/tensor.h"

namespace quire::core {

// What every tensor must be (check_extents), and that all lie where the first one given does.
template <class Args>
Status check_tensors(const Args& args) {
  Status status;
  const char* first = nullptr;
  Device device;
  call::for_each_tensor(args, [&](const char* name, const ConstTensor& tensor) {
    if (!status.ok() || !tensor.defined()) return;
    if (status = check_extents(name, tensor); !status.ok()) return;
    if (status = check_device(name, " is on ", tensor.device); !status.ok()) return;
    if (first == nullptr) {
      first = name;
      device = tensor.device;
    }
    if (tensor.device == device) return;
    status = invalid_argument(std::string(name) + " is on " + to_string(tensor.device) + ", but " + first + " is on " +
                              to_string(device) + "; all tensors of a call must be on one device");
  });
  return status;
}

// The arguments with stride 0 in every dimension of extent 0 or 1. Such a stride enters no address and may hold
// anything, so the devices, which scale and align by strides, get calls without them.
template <class Args>
Args drop_idle_strides(const Args& args) {
  Args copy = args;
  call::for_each_tensor(copy, [](const char*, auto& tensor) {
    for (int dim = 0; dim < tensor.ndim; ++dim) {
      if (tensor.shape[dim] <= 1) tensor.strides[dim] = 0;
    }
  });
  return copy;
}

}  // namespace quire::core
