// Timing on either device, and the ceilings that results are held against. No CUDA types.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "quire/status.h"
#include "quire/tensor.h"

namespace quire::bench {

// Ok where the device can be used in this build on this machine.
Status device_available(Device device);
std::string device_description(Device device);
Status synchronize(Device device);

// Memory on either device; freed with its last copy.
class Memory {
 public:
  static Result<Memory> allocate(Device device, std::size_t bytes);
  static Result<Memory> copy_of(Device device, const void* host, std::size_t bytes);
  void* data() const { return data_.get(); }

 private:
  std::shared_ptr<void> data_;
};

// Milliseconds of one call: the median of many. On CUDA calls 0, 1, .. num_calls - 1 are captured into one graph (so
// that `call` may rotate among buffers), which is replayed; on the CPU they are timed one by one. Every call must be
// capturable.
using Call = std::function<Status(int index, void* stream)>;
Result<double> median_ms(Device device, const Call& call, int num_calls, double budget_ms);

// Bytes a second of the best linear read of 2 GiB on the device (CUDA: 16-byte loads, a fixed list of launches; CPU:
// all threads), and of a copy of 1 GiB (bytes read and written).
Result<double> linear_read_bandwidth(Device device);
Result<double> copy_bandwidth(Device device);

// Bytes a second of a kernel that only reads the rows of some pages, one block per (sequence, head, split), through a
// block table: what a layout allows. CUDA only. Strides in bytes; rows are read in 16-, 8- or 4-byte loads.
struct PageRead {
  const void* base = nullptr;
  std::int64_t block_stride = 0, slot_stride = 0, head_stride = 0;
  std::int64_t row_bytes = 0;
  const std::int32_t* block_table = nullptr;  // [batch, max_blocks]
  std::int64_t max_blocks = 0;
  int batch = 0, num_heads = 0, block_size = 0;
  std::int64_t context = 0;
};
Result<double> page_read_ms(const std::vector<PageRead>& reads);

}  // namespace quire::bench
