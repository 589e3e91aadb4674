#include "cuda/device_memory.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "cuda/launch.h"

namespace quire::cuda {
namespace {

Status outside(const char* what, std::size_t offset, std::size_t bytes, std::size_t size) {
  return out_of_range(std::string(what) + " of " + std::to_string(bytes) + " bytes at " + std::to_string(offset) +
                      " leaves the device buffer of " + std::to_string(size) + " bytes");
}

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

}  // namespace

Status device_available() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return unsupported(std::string("no CUDA device: ") + cudaGetErrorString(error));
  if (count == 0) return unsupported("no CUDA device");
  return {};
}

std::string device_description() {
  int device = 0;
  cudaDeviceProp properties;
  if (cudaGetDevice(&device) != cudaSuccess || cudaGetDeviceProperties(&properties, device) != cudaSuccess) return {};
  char memory[32];
  std::snprintf(memory, sizeof(memory), "%.1f GiB", static_cast<double>(properties.totalGlobalMem) / (1U << 30));
  return std::string(properties.name) + ", sm_" + std::to_string(properties.major) + std::to_string(properties.minor) +
         ", " + std::to_string(properties.multiProcessorCount) + " SMs, " + memory;
}

Status synchronize() { return cuda_status(cudaDeviceSynchronize(), "synchronize"); }

DeviceBuffer::~DeviceBuffer() { cudaFree(data_); }

DeviceBuffer::DeviceBuffer(DeviceBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Result<DeviceBuffer> DeviceBuffer::allocate(std::size_t bytes) {
  DeviceBuffer buffer;
  if (bytes > 0) {
    if (Status status = cuda_status(cudaMalloc(&buffer.data_, bytes), "allocation"); !status) return status;
  }
  buffer.bytes_ = bytes;
  return buffer;
}

Result<DeviceBuffer> DeviceBuffer::copy_of(const void* host, std::size_t bytes) {
  Result<DeviceBuffer> buffer = allocate(bytes);
  if (!buffer) return buffer;
  if (Status status = buffer->copy_in(host, bytes); !status) return status;
  return buffer;
}

Status DeviceBuffer::copy_in(const void* host, std::size_t bytes, std::size_t offset) {
  if (offset > bytes_ || bytes > bytes_ - offset) return outside("a copy in", offset, bytes, bytes_);
  if (bytes == 0) return {};
  return cuda_status(cudaMemcpy(static_cast<std::uint8_t*>(data_) + offset, host, bytes, cudaMemcpyHostToDevice),
                     "copy in");
}

Status DeviceBuffer::copy_out(void* host, std::size_t bytes, std::size_t offset) const {
  if (offset > bytes_ || bytes > bytes_ - offset) return outside("a copy out", offset, bytes, bytes_);
  if (bytes == 0) return {};
  return cuda_status(cudaMemcpy(host, static_cast<const std::uint8_t*>(data_) + offset, bytes, cudaMemcpyDeviceToHost),
                     "copy out");
}

Status DeviceBuffer::poison(std::uint8_t value) {
  if (bytes_ == 0) return {};
  return cuda_status(cudaMemset(data_, value, bytes_), "poison");
}

Result<DeviceMirror> DeviceMirror::upload(const std::vector<Tensor*>& tensors) {
  std::vector<std::pair<std::uintptr_t, std::uintptr_t>> spans;
  for (const Tensor* tensor : tensors) {
    if (has_memory(*tensor)) spans.push_back(span_of(*tensor));
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
    if (!tensor->defined()) continue;
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
  return {&args.key,           &args.value,         &args.key_cache, &args.value_cache, &args.slot_mapping,
          &args.k_scale_cache, &args.v_scale_cache, &args.k_scale,   &args.v_scale,     &args.error_counter};
}

std::vector<Tensor*> tensors_of(UnifiedAttentionArgs& args) {
  return {&args.query,           &args.out,          &args.key_cache,    &args.value_cache, &args.k_scale_cache,
          &args.v_scale_cache,   &args.cu_seqlens_q, &args.seq_lens,     &args.block_table, &args.causal_per_seq,
          &args.mm_prefix_range, &args.sinks,        &args.alibi_slopes, &args.qq_bias,     &args.q_scale,
          &args.k_scale,         &args.v_scale,      &args.output_scale, &args.lse,         &args.error_counter};
}

std::vector<Tensor*> tensors_of(MergeAttnStatesArgs& args) {
  return {&args.out, &args.lse, &args.prefix_out, &args.prefix_lse, &args.suffix_out, &args.suffix_lse};
}

}  // namespace quire::cuda
