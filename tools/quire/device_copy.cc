#include "device_copy.h"

#include "format/build_config.h"
#if quire_with_cuda
#include "cuda/device_memory.h"
#endif

namespace quire::cli {

#if quire_with_cuda
namespace {

// `op` with copies of args' tensors on the device; then the tensors it writes, copied back.
template <class Args>
Status run_on_cuda(const Args& args, Status (*op)(const Args& args, void* stream),
                   std::initializer_list<Tensor Args::*> written) {
  Args copies = args;
  auto mirror = cuda::DeviceMirror::upload(cuda::tensors_of(copies));
  if (!mirror.ok()) return mirror.status();
  if (Status status = op(copies, nullptr); !status) return status;
  if (Status status = cuda::synchronize(); !status) return status;
  for (Tensor Args::*tensor : written) {
    if (!(args.*tensor).defined()) continue;
    if (Status status = mirror->download(args.*tensor); !status) return status;
  }
  return {};
}

}  // namespace

Status device_available(Device device) { return device == Device::kCpu ? Status() : cuda::device_available(); }
#else
namespace {

template <class Args>
Status run_on_cuda(const Args&, Status (*)(const Args&, void*), std::initializer_list<Tensor Args::*>) {
  return device_available(Device::kCuda);
}

}  // namespace

Status device_available(Device device) {
  if (device == Device::kCpu) return {};
  return unsupported("device cuda: this build has no CUDA kernels; supported is cpu");
}
#endif

Status run_on(Device device, const ReshapeAndCacheArgs& args) {
  if (device == Device::kCpu) return reshape_and_cache(args);
  using Args = ReshapeAndCacheArgs;
  return run_on_cuda<Args>(args, &reshape_and_cache,
                           {&Args::key_cache, &Args::value_cache, &Args::k_scale_cache, &Args::v_scale_cache});
}

Status run_on(Device device, const UnifiedAttentionArgs& args) {
  if (device == Device::kCpu) return unified_attention(args);
  using Args = UnifiedAttentionArgs;
  return run_on_cuda<Args>(args, &unified_attention, {&Args::out, &Args::lse});
}

}  // namespace quire::cli
