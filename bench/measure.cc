#include "measure.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "cuda/device_memory.h"
#include "measure_cuda.h"

namespace quire::bench {
namespace {

double now_ms() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// What a measurement on CUDA returns, run while `device` is the current one.
Result<double> on_device(Device device, const std::function<Result<double>()>& measure) {
  const CurrentDevice current(device);
  return current.status() ? measure() : current.status();
}

}  // namespace

Result<double> median_ms(Device device, const Call& call, int num_calls, double budget_ms) {
  if (device.is_cuda()) return on_device(device, [&] { return cuda::median_ms(call, num_calls, budget_ms); });
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
  if (device.is_cuda()) return on_device(device, [&] { return cuda::linear_read_bandwidth(device); });
  constexpr std::int64_t kWords = (std::int64_t{2} << 30) / 8;
  const Result<Memory> memory = Memory::allocate(device, kWords * 8);
  if (!memory) return memory.status();
  const auto* words = static_cast<const std::uint64_t*>(memory->data());
  volatile std::uint64_t sink = 0;
  const Result<double> ms = median_ms(
      device,
      [&](int, void*) {
        std::uint64_t sum = 0;
#pragma omp parallel for reduction(+ : sum)
        for (std::int64_t i = 0; i < kWords; ++i) sum += words[i];
        sink = sink + sum;
        return Status();
      },
      1, 1000.0);
  if (!ms) return ms;
  return kWords * 8 / (*ms * 1e-3);
}

Result<double> copy_bandwidth(Device device) {
  if (device.is_cuda()) return on_device(device, [&] { return cuda::copy_bandwidth(device); });
  constexpr std::size_t kBytes = std::size_t{1} << 30;
  constexpr std::size_t kPieceBytes = std::size_t{1} << 20;
  const Result<Memory> source = Memory::allocate(device, kBytes);
  const Result<Memory> target = Memory::allocate(device, kBytes);
  if (!source || !target) return source ? target.status() : source.status();
  const auto* from = static_cast<const std::uint8_t*>(source->data());
  auto* to = static_cast<std::uint8_t*>(target->data());
  const Result<double> ms = median_ms(
      device,
      [&](int, void*) {
#pragma omp parallel for
        for (std::size_t at = 0; at < kBytes; at += kPieceBytes) {
          std::memcpy(to + at, from + at, kPieceBytes);
        }
        return Status();
      },
      1, 1000.0);
  if (!ms) return ms;
  return 2.0 * kBytes / (*ms * 1e-3);
}

Result<double> page_read_ms(Device device, const std::vector<PageRead>& reads, const PageTable& table) {
  return on_device(device, [&] { return cuda::page_read_ms(device, reads, table); });
}

}  // namespace quire::bench
