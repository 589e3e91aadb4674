#include "measure.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>

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

void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = 4096;
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(memory) + bytes) / kPage * kPage;
  // Where it is refused, the pages stay small.
  if (begin < end) (void)!madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

Result<double> linear_read_bandwidth(Device device) {
  if (device.is_cuda()) return on_device(device, [&] { return cuda::linear_read_bandwidth(device); });
  constexpr std::int64_t kWords = (std::int64_t{2} << 30) / 8;
  const auto memory = std::make_unique_for_overwrite<std::uint64_t[]>(static_cast<std::size_t>(kWords));
  prefer_huge_pages(memory.get(), kWords * 8);
  std::fill_n(memory.get(), kWords, 1);
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
  if (device.is_cuda()) return on_device(device, [&] { return cuda::copy_bandwidth(device); });
  constexpr std::size_t kBytes = std::size_t{1} << 30;
  constexpr std::size_t kPieceBytes = std::size_t{1} << 20;
  const auto from = std::make_unique_for_overwrite<std::uint8_t[]>(kBytes);
  const auto to = std::make_unique_for_overwrite<std::uint8_t[]>(kBytes);
  for (std::uint8_t* memory : {from.get(), to.get()}) {
    prefer_huge_pages(memory, kBytes);
    std::memset(memory, 1, kBytes);
  }
  const Result<double> ms = median_ms(
      device,
      [&](int, void*) {
#pragma omp parallel for
        for (std::size_t at = 0; at < kBytes; at += kPieceBytes) {
          std::memcpy(to.get() + at, from.get() + at, kPieceBytes);
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
