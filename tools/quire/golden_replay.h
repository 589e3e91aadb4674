// Replays one case of a golden file: its ops run on a device, and the results are compared with the file's bytes and
// outputs and with the oracle. Reading uses the file's caches, writing fresh ones.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "cuda/device_memory.h"
#include "golden.h"
#include "golden_file.h"
#include "quire/layout.h"
#include "quire/mode.h"
#include "quire/ops.h"

namespace quire::cli {

// Runs an op with arguments that live on the host.
template <class Args>
Status run_on(Device device, const Args& args, Status (*op)(const Args& args, void* stream)) {
  if (device.is_cpu()) return op(args, nullptr);
  return cuda::run_on_device(
      args, [&](const Args& on_device) { return op(on_device, nullptr); }, device);
}

// Host buffers that live as long as a case's replay.
class HostBuffers {
 public:
  // A dense tensor of a given shape in which every byte is `fill`.
  Tensor filled(const ConstTensor& shape_of, DType dtype, std::uint8_t fill) {
    Tensor tensor;
    tensor.dtype = dtype;
    tensor.ndim = shape_of.ndim;
    std::ranges::copy(shape_of.shape, tensor.shape);
    std::int64_t stride = 1;
    for (int i = tensor.ndim - 1; i >= 0; --i) {
      tensor.strides[i] = stride;
      stride *= tensor.shape[i];
    }
    tensor.data = buffers_.emplace_back(static_cast<std::size_t>(stride) * dtype_bytes(dtype), fill).data();
    return tensor;
  }
  Tensor filled_like(const ConstTensor& other, std::uint8_t fill) {
    return other.defined() ? filled(other, other.dtype, fill) : Tensor();
  }

 private:
  std::deque<std::vector<std::uint8_t>> buffers_;
};

// What a case is replayed with.
struct Replay {
  const GoldenCase& golden;
  Device device;
  CaseResult& result;
  const ModeInfo& mode;
  HostBuffers scratch;

  // Records a measurement; several of one thing count as the worst of them.
  void measure(const std::string& what, double error, double tolerance);
};

// The caches of the file or, where `fill` is given, fresh ones of the same shapes and nesting.
Result<KVCacheViews> caches_of(const GoldenCase& golden, const ModeInfo& mode, std::int64_t head_size,
                               std::int64_t head_size_v, HostBuffers* scratch = nullptr, std::uint8_t fill = 0);

// Stores again, from the same inputs, what the file stores. An op's refusal goes into the result; a status is an error
// of the file.
Status replay_write(Replay& replay);

// Reads again, from the file's caches, what the file reads.
Status replay_attention(Replay& replay);

}  // namespace quire::cli
