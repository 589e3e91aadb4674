// The parts of device_memory.h that no CUDA call is made from: which bytes of the host a call needs, and memory on
// either device.
#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <new>
#include <utility>

#include "cuda/device_memory.h"

namespace quire {
namespace cuda {
namespace {

// Host addresses a tensor touches, [begin, end).
std::pair<std::uintptr_t, std::uintptr_t> span_of(const Tensor& tensor) {
  std::int64_t first = 0;
  std::int64_t last = 0;
  for (int i = 0; i < tensor.ndim; ++i) {
    const std::int64_t reach = (tensor.shape[i] - 1) * tensor.strides[i];
    (reach < 0 ? first : last) += reach;
  }
  const auto size = static_cast<std::int64_t>(dtype_bytes(tensor.dtype));
  const auto base = reinterpret_cast<std::intptr_t>(tensor.data);
  return {static_cast<std::uintptr_t>(base + first * size), static_cast<std::uintptr_t>(base + (last + 1) * size)};
}

bool has_memory(const Tensor& tensor) { return tensor.defined() && tensor.data != nullptr && tensor.numel() > 0; }

bool on_host(const Tensor& tensor) { return tensor.device == Device::kCpu; }

template <class Args>
Status run_mirrored(const Args& args, const std::function<Status(const Args&)>& op,
                    std::initializer_list<Tensor Args::*> written) {
  Args copies = args;
  const Result<DeviceMirror> mirror = DeviceMirror::upload(tensors_of(copies));
  if (!mirror.ok()) return mirror.status();
  if (Status status = op(copies); !status) return status;
  if (Status status = cuda::synchronize(); !status) return status;
  for (Tensor Args::*tensor : written) {
    if (!on_host(args.*tensor)) continue;
    if (Status status = mirror->download(args.*tensor); !status) return status;
  }
  return {};
}

}  // namespace

Result<DeviceMirror> DeviceMirror::upload(const std::vector<Tensor*>& tensors) {
  std::vector<std::pair<std::uintptr_t, std::uintptr_t>> spans;
  for (const Tensor* tensor : tensors) {
    if (on_host(*tensor) && has_memory(*tensor)) spans.push_back(span_of(*tensor));
  }
  std::ranges::sort(spans);
  DeviceMirror mirror;
  for (const auto& [begin, end] : spans) {
    if (!mirror.regions_.empty() && begin < mirror.regions_.back().end) {
      mirror.regions_.back().end = std::max(mirror.regions_.back().end, end);
    } else {
      Region& region = mirror.regions_.emplace_back();
      region.begin = begin;
      region.end = end;
    }
  }
  for (Region& region : mirror.regions_) {
    region.padding = region.begin % 256;
    const std::size_t bytes = region.end - region.begin;
    Result<DeviceBuffer> copy = DeviceBuffer::allocate(region.padding + bytes);
    if (!copy) return copy.status();
    region.copy = std::move(*copy);
    Status status = region.copy.copy_in(reinterpret_cast<const void*>(region.begin), bytes, region.padding);
    if (!status) return status;
  }
  for (Tensor* tensor : tensors) {
    if (!tensor->defined() || !on_host(*tensor)) continue;
    if (const Region* region = mirror.find(*tensor)) {
      tensor->data = static_cast<std::uint8_t*>(region->copy.data()) + region->padding +
                     (reinterpret_cast<std::uintptr_t>(tensor->data) - region->begin);
    }
    tensor->device = Device::kCuda;
  }
  return mirror;
}

const DeviceMirror::Region* DeviceMirror::find(const Tensor& host) const {
  if (!has_memory(host)) return nullptr;
  const auto span = span_of(host);
  for (const Region& region : regions_) {
    if (region.begin <= span.first && span.second <= region.end) return &region;
  }
  return nullptr;
}

Status DeviceMirror::download(const Tensor& host) const {
  if (!has_memory(host)) return {};
  const Region* region = find(host);
  if (region == nullptr) return invalid_argument("a tensor to download was not among those uploaded");
  const auto span = span_of(host);
  return region->copy.copy_out(reinterpret_cast<void*>(span.first), span.second - span.first,
                               region->padding + (span.first - region->begin));
}

std::vector<Tensor*> tensors_of(ReshapeAndCacheArgs& args) {
  return {&args.key,           &args.value,         &args.key_cache,     &args.value_cache,  &args.slot_mapping,
          &args.k_scale_cache, &args.v_scale_cache, &args.k_scale,       &args.v_scale,      &args.error_counter,
          &args.k_page_meta,   &args.v_page_meta,   &args.k_head_vector, &args.v_head_vector};
}

std::vector<Tensor*> tensors_of(UnifiedAttentionArgs& args) {
  return {&args.query,           &args.out,          &args.key_cache,     &args.value_cache,   &args.k_scale_cache,
          &args.v_scale_cache,   &args.cu_seqlens_q, &args.seq_lens,      &args.block_table,   &args.causal_per_seq,
          &args.mm_prefix_range, &args.sinks,        &args.alibi_slopes,  &args.qq_bias,       &args.q_scale,
          &args.k_scale,         &args.v_scale,      &args.output_scale,  &args.lse,           &args.error_counter,
          &args.k_page_meta,     &args.v_page_meta,  &args.k_head_vector, &args.v_head_vector, &args.rswa_prefix_lens};
}

std::vector<Tensor*> tensors_of(MergeAttnStatesArgs& args) {
  return {&args.out, &args.lse, &args.prefix_out, &args.prefix_lse, &args.suffix_out, &args.suffix_lse};
}

Status run_on_device(const ReshapeAndCacheArgs& args, const std::function<Status(const ReshapeAndCacheArgs&)>& op) {
  using Args = ReshapeAndCacheArgs;
  return run_mirrored<Args>(
      args, op,
      {&Args::key_cache, &Args::value_cache, &Args::k_scale_cache, &Args::v_scale_cache, &Args::error_counter});
}

Status run_on_device(const UnifiedAttentionArgs& args, const std::function<Status(const UnifiedAttentionArgs&)>& op) {
  using Args = UnifiedAttentionArgs;
  return run_mirrored<Args>(args, op, {&Args::out, &Args::lse, &Args::error_counter});
}

Status run_on_device(const MergeAttnStatesArgs& args, const std::function<Status(const MergeAttnStatesArgs&)>& op) {
  using Args = MergeAttnStatesArgs;
  return run_mirrored<Args>(args, op, {&Args::out, &Args::lse});
}

}  // namespace cuda

Status device_available(Device device) { return device == Device::kCpu ? Status() : cuda::device_available(); }

std::string device_description(Device device) {
  return device == Device::kCpu ? std::string(device_name(device)) : cuda::device_description();
}

Status synchronize(Device device) { return device == Device::kCpu ? Status() : cuda::synchronize(); }

Result<Memory> Memory::allocate(Device device, std::size_t bytes) {
  if (device == Device::kCuda) {
    Result<cuda::DeviceBuffer> buffer = cuda::DeviceBuffer::allocate(bytes);
    if (!buffer) return buffer.status();
    if (Status status = buffer->poison(0); !status) return status;
    return own(std::move(buffer).value());
  }
  Memory memory;
  memory.bytes_ = bytes;
  if (bytes == 0) return memory;
  constexpr std::align_val_t kAlignment{64};
  void* data = ::operator new(bytes, kAlignment, std::nothrow);
  if (data == nullptr) return internal_error("no memory for " + std::to_string(bytes) + " bytes");
  std::memset(data, 0, bytes);
  memory.data_ = std::shared_ptr<void>(data, [](void* p) { ::operator delete(p, kAlignment); });
  return memory;
}

Result<Memory> Memory::copy_of(Device device, const void* host, std::size_t bytes) {
  if (device == Device::kCuda) {
    Result<cuda::DeviceBuffer> buffer = cuda::DeviceBuffer::copy_of(host, bytes);
    if (!buffer) return buffer.status();
    return own(std::move(buffer).value());
  }
  Result<Memory> memory = allocate(device, bytes);
  if (memory && bytes > 0) std::memcpy(memory->data(), host, bytes);
  return memory;
}

Memory Memory::own(cuda::DeviceBuffer buffer) {
  Memory memory;
  memory.bytes_ = buffer.bytes();
  const auto owner = std::make_shared<cuda::DeviceBuffer>(std::move(buffer));
  memory.data_ = std::shared_ptr<void>(owner, owner->data());
  return memory;
}

}  // namespace quire
