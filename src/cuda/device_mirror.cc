// The parts of device_memory.h that no CUDA call is made from: which bytes of the host a call needs, and memory on
// either device.
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#include "call/tensors.h"
#include "cuda/device_memory.h"

namespace quire {
namespace cuda {
namespace {

// Host addresses a tensor touches, [begin, end).
std::pair<std::uintptr_t, std::uintptr_t> span_of(const ConstTensor& tensor) {
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

bool has_memory(const ConstTensor& tensor) { return tensor.defined() && tensor.data != nullptr && tensor.numel() > 0; }

bool on_host(const ConstTensor& tensor) { return tensor.device.is_cpu(); }

template <class Args>
std::vector<TensorRef> all_tensors(Args& args) {
  std::vector<TensorRef> tensors;
  call::for_each_tensor(args, [&](const char*, auto& tensor) { tensors.emplace_back(&tensor); });
  return tensors;
}

template <class Args>
Status run_mirrored(const Args& args, const std::function<Status(const Args&)>& op, Device device) {
  const CurrentDevice current(device);
  if (!current.status()) return current.status();
  Args copies = args;
  const Result<DeviceMirror> mirror = DeviceMirror::upload(all_tensors(copies), device);
  if (!mirror.ok()) return mirror.status();
  if (Status status = op(copies); !status) return status;
  if (Status status = cuda::synchronize(); !status) return status;
  Status status;
  call::for_each_tensor(args, [&](const char*, const auto& tensor) {
    constexpr bool kWritten = std::is_same_v<decltype(tensor), const Tensor&>;
    if constexpr (kWritten) {
      if (status.ok() && on_host(tensor)) status = mirror->download(tensor);
    }
  });
  return status;
}

}  // namespace

void fill_in_bounds(UnifiedAttentionArgs& args) {
  const auto readable = [](const ConstTensor& tensor, std::int64_t least) {
    return tensor.ndim == 1 && tensor.dtype == DType::kInt32 && on_host(tensor) && has_memory(tensor) &&
           tensor.shape[0] >= least;
  };
  if (!readable(args.cu_seqlens_q, 2) || !readable(args.seq_lens, args.cu_seqlens_q.shape[0] - 1)) return;
  const auto at = [](const ConstTensor& tensor, std::int64_t i) {
    return std::int64_t{tensor.ptr<const std::int32_t>()[i * tensor.strides[0]]};
  };
  std::int64_t query_len = 1, seq_len = 1;
  for (std::int64_t b = 0; b + 1 < args.cu_seqlens_q.shape[0]; ++b) {
    query_len = std::max(query_len, at(args.cu_seqlens_q, b + 1) - at(args.cu_seqlens_q, b));
    seq_len = std::max(seq_len, at(args.seq_lens, b));
  }
  if (args.max_query_len == 0) args.max_query_len = query_len;
  if (args.max_seq_len == 0) args.max_seq_len = seq_len;
}

void TensorRef::set(const ConstTensor& tensor) const {
  if (read_ != nullptr) {
    *read_ = tensor;
    return;
  }
  written_->data = const_cast<void*>(tensor.data);
  written_->dtype = tensor.dtype;
  written_->device = tensor.device;
  written_->ndim = tensor.ndim;
  std::ranges::copy(tensor.shape, written_->shape);
  std::ranges::copy(tensor.strides, written_->strides);
}

Result<DeviceMirror> DeviceMirror::upload(const std::vector<TensorRef>& tensors, Device device) {
  const CurrentDevice current(device);
  if (!current.status()) return current.status();
  std::vector<std::pair<std::uintptr_t, std::uintptr_t>> spans;
  for (const TensorRef& tensor : tensors) {
    if (on_host(tensor.get()) && has_memory(tensor.get())) spans.push_back(span_of(tensor.get()));
  }
  std::ranges::sort(spans);
  DeviceMirror mirror;
  mirror.device_ = device;
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
  for (const TensorRef& ref : tensors) {
    ConstTensor tensor = ref.get();
    if (!tensor.defined() || !on_host(tensor)) continue;
    if (const Region* region = mirror.find(tensor)) {
      tensor.data = static_cast<std::uint8_t*>(region->copy.data()) + region->padding +
                    (reinterpret_cast<std::uintptr_t>(tensor.data) - region->begin);
    }
    tensor.device = device;
    ref.set(tensor);
  }
  return mirror;
}

const DeviceMirror::Region* DeviceMirror::find(const ConstTensor& host) const {
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
  const CurrentDevice current(device_);
  if (!current.status()) return current.status();
  const auto span = span_of(host);
  return region->copy.copy_out(reinterpret_cast<void*>(span.first), span.second - span.first,
                               region->padding + (span.first - region->begin));
}

std::vector<TensorRef> tensors_of(ReshapeAndCacheArgs& args) { return all_tensors(args); }
std::vector<TensorRef> tensors_of(UnifiedAttentionArgs& args) { return all_tensors(args); }
std::vector<TensorRef> tensors_of(MergeAttnStatesArgs& args) { return all_tensors(args); }
std::vector<TensorRef> tensors_of(HadamardArgs& args) { return all_tensors(args); }

Status run_on_device(const ReshapeAndCacheArgs& args, const std::function<Status(const ReshapeAndCacheArgs&)>& op,
                     Device device) {
  return run_mirrored(args, op, device);
}

Status run_on_device(const UnifiedAttentionArgs& args, const std::function<Status(const UnifiedAttentionArgs&)>& op,
                     Device device) {
  UnifiedAttentionArgs bounded = args;
  fill_in_bounds(bounded);
  return run_mirrored(bounded, op, device);
}

Status run_on_device(const MergeAttnStatesArgs& args, const std::function<Status(const MergeAttnStatesArgs&)>& op,
                     Device device) {
  return run_mirrored(args, op, device);
}

Status run_on_device(const HadamardArgs& args, const std::function<Status(const HadamardArgs&)>& op, Device device) {
  return run_mirrored(args, op, device);
}

}  // namespace cuda

Status device_available(Device device) { return device.is_cpu() ? Status() : cuda::device_available(device.index); }

std::string device_description(Device device) {
  return device.is_cpu() ? std::string(device_type_name(device.type)) : cuda::device_description(device.index);
}

Status synchronize(Device device) {
  if (device.is_cpu()) return {};
  const CurrentDevice current(device);
  return current.status() ? cuda::synchronize() : current.status();
}

Result<Memory> Memory::allocate(Device device, std::size_t bytes) {
  if (device.is_cuda()) {
    const CurrentDevice current(device);
    if (!current.status()) return current.status();
    Result<cuda::DeviceBuffer> buffer = cuda::DeviceBuffer::allocate(bytes);
    if (!buffer) return buffer.status();
    if (Status status = buffer->poison(0); !status) return status;
    return own(std::move(buffer).value());
  }
  Memory memory;
  memory.bytes_ = bytes;
  if (bytes == 0) return memory;
  constexpr std::size_t kHugePage = std::size_t{1} << 21;
  const std::align_val_t alignment{bytes < 2 * kHugePage ? 64 : kHugePage};
  void* data = ::operator new(bytes, alignment, std::nothrow);
  if (data == nullptr) return internal_error("no memory for " + std::to_string(bytes) + " bytes");
#ifdef MADV_HUGEPAGE
  // Before it is touched: what is there already stays in small pages. So it does where this is refused.
  if (bytes >= 2 * kHugePage) (void)madvise(data, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  std::memset(data, 0, bytes);
  memory.data_ = std::shared_ptr<void>(data, [alignment](void* p) { ::operator delete(p, alignment); });
  return memory;
}

Result<Memory> Memory::copy_of(Device device, const void* host, std::size_t bytes) {
  if (device.is_cuda()) {
    const CurrentDevice current(device);
    if (!current.status()) return current.status();
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
