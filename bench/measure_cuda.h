// What measure.cc asks of measure.cu. In a build without CUDA, no_cuda.cc answers.
#pragma once

#include "measure.h"

namespace quire::bench::cuda {

Result<double> median_ms(const Call& call, int num_calls, double budget_ms);
Result<double> linear_read_bandwidth();
Result<double> copy_bandwidth();
Result<double> page_read_ms(const std::vector<PageRead>& reads, const PageTable& table);

}  // namespace quire::bench::cuda
