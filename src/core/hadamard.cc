// hadamard validates its arguments here and goes to the device that they are on.
#include <string>

#include "core/device.h"
#include "core/guard.h"
#include "core/tensor_fields.h"
#include "format/rotation.h"
#include "quire/ops.h"

namespace quire {
namespace core {
namespace {

Status check_rows(const char* name, const ConstTensor& rows) {
  if (!rows.defined()) return invalid_argument(std::string(name) + " is not given; it must be [any, head_size]");
  if (rows.ndim < 1) {
    return invalid_argument(std::string(name) + " is " + to_string(rows) + "; it must have 1 to 6 dimensions");
  }
  QUIRE_RETURN_IF_ERROR(check_dtype(name, rows.dtype, kFloats));
  return check_memory(name, rows);
}

Status validate_hadamard(const HadamardArgs& args) {
  QUIRE_RETURN_IF_ERROR(check_tensors(args));
  QUIRE_RETURN_IF_ERROR(check_rows("x", args.x));
  QUIRE_RETURN_IF_ERROR(check_rows("out", args.out));
  bool same = args.x.ndim == args.out.ndim;
  for (int dim = 0; same && dim < args.x.ndim; ++dim) same = args.x.shape[dim] == args.out.shape[dim];
  if (!same) {
    return invalid_argument("out is " + to_string(args.out) + " and x is " + to_string(args.x) +
                            "; they must have one shape");
  }
  const std::int64_t head_size = args.x.shape[args.x.ndim - 1];
  if (args.x.numel() > 0 && head_size > format::kMaxHeadSize) {
    return invalid_argument("x is " + to_string(args.x) + "; rows of 1 to " + str(format::kMaxHeadSize) +
                            " elements are supported");
  }
  return check_apart("out", args.out);
}

}  // namespace
}  // namespace core

Status hadamard(const HadamardArgs& args, void* stream) {
  return core::guarded([&]() -> Status {
    if (Status status = core::validate_hadamard(args); !status) return status;
    return core::device_ops(args.x.device.type).hadamard(core::drop_idle_strides(args), stream);
  });
}

}  // namespace quire
