#include "measure.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>

#include "format/build_config.h"
#if quire_with_cuda
#include "cuda/device_memory.h"
#include "measure_cuda.h"
#endif

namespace quire::bench {
namespace {

double now_ms() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

[[maybe_unused]] Status no_cuda() {
  return unsupported(
      "device is cuda, but this build has no CUDA; configure with -DQUIRE_CUDA=ON where nvcc is installed");
}

}  // namespace

Status device_available(Device device) {
  if (device == Device::kCpu) return {};
#if quire_with_cuda
  return quire::cuda::device_available();
#else
  return no_cuda();
#endif
}

std::string device_description(Device device) {
#if quire_with_cuda
  if (device == Device::kCuda) return quire::cuda::device_description();
#endif
  return std::string(device_name(device));
}

Status synchronize(Device device) {
#if quire_with_cuda
  if (device == Device::kCuda) return quire::cuda::synchronize();
#endif
  (void)device;
  return {};
}

Result<Memory> Memory::allocate(Device device, std::size_t bytes) {
  Memory memory;
  if (device == Device::kCpu) {
    memory.data_ = std::shared_ptr<void>(std::aligned_alloc(64, (bytes + 64) / 64 * 64), [](void* p) { std::free(p); });
    if (memory.data_ == nullptr) return internal_error("no memory for " + std::to_string(bytes) + " bytes");
    return memory;
  }
#if quire_with_cuda
  Result<quire::cuda::DeviceBuffer> buffer = quire::cuda::DeviceBuffer::allocate(bytes);
  if (!buffer) return buffer.status();
  auto owner = std::make_shared<quire::cuda::DeviceBuffer>(std::move(buffer).value());
  memory.data_ = std::shared_ptr<void>(owner, owner->data());
  return memory;
#else
  return no_cuda();
#endif
}

Result<Memory> Memory::copy_of(Device device, const void* host, std::size_t bytes) {
  if (device == Device::kCpu) {
    Result<Memory> memory = allocate(device, bytes);
    if (memory) std::memcpy(memory->data(), host, bytes);
    return memory;
  }
#if quire_with_cuda
  Result<quire::cuda::DeviceBuffer> buffer = quire::cuda::DeviceBuffer::copy_of(host, bytes);
  if (!buffer) return buffer.status();
  auto owner = std::make_shared<quire::cuda::DeviceBuffer>(std::move(buffer).value());
  Memory memory;
  memory.data_ = std::shared_ptr<void>(owner, owner->data());
  return memory;
#else
  return no_cuda();
#endif
}

Result<double> median_ms(Device device, const Call& call, int num_calls, double budget_ms) {
  if (device == Device::kCuda) {
#if quire_with_cuda
    return cuda::median_ms(call, num_calls, budget_ms);
#else
    return no_cuda();
#endif
  }
  std::vector<double> times;
  if (Status status = call(0, nullptr); !status) return status;  // warm up
  const double begin = now_ms();
  for (int i = 0; times.size() < 3 || now_ms() - begin < budget_ms; i = (i + 1) % num_calls) {
    const double start = now_ms();
    if (Status status = call(i, nullptr); !status) return status;
    times.push_back(now_ms() - start);
  }
  const auto middle = times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2);
  std::nth_element(times.begin(), middle, times.end());
  return *middle;
}

Result<double> linear_read_bandwidth(Device device) {
  if (device == Device::kCuda) {
#if quire_with_cuda
    return cuda::linear_read_bandwidth();
#else
    return no_cuda();
#endif
  }
  constexpr std::int64_t kWords = (std::int64_t{2} << 30) / 8;
  std::vector<std::uint64_t> memory(static_cast<std::size_t>(kWords), 1);
  volatile std::uint64_t sink = 0;
  const Result<double> ms = median_ms(
      device,
      [&](int, void*) {
        std::uint64_t sum = 0;
#pragma omp parallel for reduction(+ : sum)
        for (std::int64_t i = 0; i < kWords; ++i) sum += memory[static_cast<std::size_t>(i)];
        sink = sink + sum;
        return Status();
      },
      1, 1000.0);
  if (!ms) return ms;
  return kWords * 8 / (*ms * 1e-3);
}

Result<double> copy_bandwidth(Device device) {
  if (device == Device::kCuda) {
#if quire_with_cuda
    return cuda::copy_bandwidth();
#else
    return no_cuda();
#endif
  }
  constexpr std::size_t kBytes = std::size_t{1} << 30;
  std::vector<std::uint8_t> from(kBytes, 1);
  std::vector<std::uint8_t> to(kBytes, 2);
  const Result<double> ms = median_ms(
      device,
      [&](int, void*) {
        std::memcpy(to.data(), from.data(), kBytes);
        return Status();
      },
      1, 1000.0);
  if (!ms) return ms;
  return 2.0 * kBytes / (*ms * 1e-3);
}

Result<double> page_read_ms(const std::vector<PageRead>& reads) {
#if quire_with_cuda
  return cuda::page_read_ms(reads);
#else
  (void)reads;
  return no_cuda();
#endif
}

}  // namespace quire::bench
