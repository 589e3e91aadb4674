// Timing on either device, and the ceilings that results are compared with. There are no CUDA types here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "attention/paged_rows.h"
#include "quire/status.h"
#include "quire/tensor.h"

namespace quire::bench {

// The milliseconds of one call: the median of many. On CUDA the calls 0 to num_calls - 1 are captured into one graph,
// which is replayed, so that `call` may rotate among buffers; on the CPU they are timed one by one. Every call must be
// capturable.
using Call = std::function<Status(int index, void* stream)>;
Result<double> median_ms(Device device, const Call& call, int num_calls, double budget_ms);

// The bytes a second of the best linear read of 2 GiB on the device, and of the best copy of 1 GiB (bytes read and
// written). CUDA runs kernels of 16-byte accesses over a fixed list of launches; the CPU uses all threads.
Result<double> linear_read_bandwidth(Device device);
Result<double> copy_bandwidth(Device device);

// The multiply-adds a second of the CPU's threads where nothing else limits them: in fp32, and of pairs of bf16 (those
// of fp32 again where attention makes them of bf16) and int16.
struct ProductRates {
  double float32 = 0.0, bfloat16 = 0.0, int16 = 0.0;
};
ProductRates product_rates();

// The rows of one cache tensor, as some sequences hold them through a block table. Scales are rows of their own.
struct PageRead : attention::PagedRows {
  std::int64_t row_bytes = 0;
  int num_heads = 0, block_size = 0;
};
struct PageTable {
  const std::int32_t* blocks = nullptr;  // [copies, batch, max_blocks]
  std::int64_t max_blocks = 0;
  int batch = 0, copies = 1;
};

// The milliseconds of kernels that only read the whole pages of one copy of the table, for all of `reads`: the most
// that a layout allows. It is the best of a fixed list of launches, by heads (a thread block reads the rows of one
// head, as attention does) and by whole pages where nothing lies between rows. Rows may start at any address. What is
// read is their 16-byte aligned cover, so up to 15 bytes before and after a tensor's rows must be readable. Calls
// rotate among the copies. Only CUDA has it.
Result<double> page_read_ms(Device device, const std::vector<PageRead>& reads, const PageTable& table);

}  // namespace quire::bench
