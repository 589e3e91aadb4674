#include "host_time.h"

#include <algorithm>
#include <array>
#include <chrono>

#include "cuda/device_memory.h"

namespace quire::cli {

Result<double> host_microseconds(Device device, const std::function<Status()>& call) {
  // A stream takes some hundred launches before the host has to wait for it.
  constexpr int kBatches = 9, kCalls = 32;
  std::array<double, kBatches> batches{};
  for (int i = 0; i < 2; ++i) {  // what only first calls do
    if (Status status = call(); !status) return status;
  }
  for (double& batch : batches) {
    if (Status status = synchronize(device); !status) return status;
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kCalls; ++i) {
      if (Status status = call(); !status) return status;
    }
    batch = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count() / kCalls;
  }
  if (Status status = synchronize(device); !status) return status;
  std::ranges::nth_element(batches, batches.begin() + kBatches / 2);
  return batches[kBatches / 2];
}

}  // namespace quire::cli
