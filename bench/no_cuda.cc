// Answers the calls of measure_cuda.h in a build without CUDA: each is refused in a sentence.
#include "cuda/device_memory.h"
#include "measure_cuda.h"

namespace quire::bench::cuda {

Result<double> median_ms(const Call&, int, double) { return quire::cuda::device_available(); }
Result<double> linear_read_bandwidth(Device) { return quire::cuda::device_available(); }
Result<double> copy_bandwidth(Device) { return quire::cuda::device_available(); }
Result<double> page_read_ms(Device, const std::vector<PageRead>&, const PageTable&) {
  return quire::cuda::device_available();
}

}  // namespace quire::bench::cuda
