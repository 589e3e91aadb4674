// What measure.cc asks of measure.cu, with `device` as the current device. In a build without CUDA, no_cuda.cc answers.
#pragma once

#include "measure.h"

namespace quire::bench::cuda {

Result<double> median_ms(const Call& call, int num_calls, double budget_ms);
Result<double> linear_read_bandwidth(Device device);
Result<double> copy_bandwidth(Device device);
Result<double> page_read_ms(Device device, const std::vector<PageRead>& reads, const PageTable& table);

}  // namespace quire::bench::cuda
