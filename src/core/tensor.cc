#include "quire/tensor.h"

namespace quire {

std::string to_string(const ConstTensor& tensor) {
  if (!tensor.defined()) return "not given";
  std::string text;
  if (tensor.ndim < 0 || tensor.ndim > Tensor::kMaxDims) {
    text = std::string(dtype_name(tensor.dtype)) + " of " + std::to_string(tensor.ndim) + " dimensions";
  } else {
    text = "[";
    for (int i = 0; i < tensor.ndim; ++i) {
      if (i > 0) text += ", ";
      text += std::to_string(tensor.shape[i]);
    }
    text += "] ";
    text += dtype_name(tensor.dtype);
  }
  if (tensor.device != Device::cpu()) text += " on " + to_string(tensor.device);
  return text;
}

std::string to_string(const Device& device) {
  std::string text(device_type_name(device.type));
  if (device != Device::cpu()) text += ":" + std::to_string(device.index);
  return text;
}

}  // namespace quire
