// What TurboQuant's entry points need on the device besides the two ops: cu_seqlens_q of one token a sequence, and the
// check of tables that the caller keeps there.
#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/cuda.h"
#include "cuda/launch.h"

namespace quire::cuda {
namespace {

__global__ void count_up(std::int32_t* values, std::int64_t count) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) values[i] = static_cast<std::int32_t>(i);
}

// A table in device memory whose elements were compared.
struct CheckedTable {
  std::string_view name;
  const void* data = nullptr;
  int head_size = 0;
  std::int64_t num_elements = 0;
  bool operator==(const CheckedTable&) const = default;
};

// The latest of them, for the whole process. The number is fixed, so that new addresses in every call cost no memory;
// a table that was pushed out is compared again.
class CheckedTables {
 public:
  bool contains(const CheckedTable& table) {
    const std::lock_guard lock(mutex_);
    for (const CheckedTable& checked : tables_) {
      if (checked == table) return true;
    }
    return false;
  }
  void add(const CheckedTable& table) {
    const std::lock_guard lock(mutex_);
    tables_[next_] = table;
    next_ = (next_ + 1) % tables_.size();
  }

 private:
  std::mutex mutex_;
  std::array<CheckedTable, 1024> tables_;
  std::size_t next_ = 0;
};
CheckedTables checked_tables;

}  // namespace

Status with_one_token_each(Device device, std::int64_t batch,
                           const std::function<Status(const ConstTensor& cu_seqlens_q)>& op, void* stream) {
  const DeviceGuard guard(device.index);
  if (!guard.status()) return guard.status();
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const std::int64_t count = batch + 1;
  void* starts = nullptr;
  const Status allocated = cuda_status(
      cudaMallocAsync(&starts, static_cast<std::size_t>(count) * sizeof(std::int32_t), cuda_stream), "cu_seqlens_q");
  if (!allocated) return allocated;
  constexpr std::int64_t kThreads = 256;
  count_up<<<static_cast<unsigned>((count + kThreads - 1) / kThreads), kThreads, 0, cuda_stream>>>(
      static_cast<std::int32_t*>(starts), count);
  const Status filled = cuda_status(cudaGetLastError(), "cu_seqlens_q");
  const Status ran = filled ? op(ConstTensor::contiguous(starts, DType::kInt32, {count}, device)) : filled;
  const Status freed = cuda_status(cudaFreeAsync(starts, cuda_stream), "cu_seqlens_q");
  return ran ? freed : ran;
}

Status check_table_once(std::string_view name, const ConstTensor& table, int head_size,
                        const std::function<Status(const ConstTensor& on_host)>& check, void* stream) {
  const DeviceGuard guard(table.device.index);
  if (!guard.status()) return guard.status();
  const CheckedTable entry{name, table.data, head_size, table.numel()};
  if (checked_tables.contains(entry)) return {};

  const std::string what(name);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  const Status asked = cuda_status(cudaStreamIsCapturing(cuda_stream, &capture), what.c_str());
  if (!asked) return asked;
  if (capture != cudaStreamCaptureStatusNone) {
    return unsupported(what +
                       " on cuda is new at its address, so it has to be copied to the host and compared, which cannot "
                       "be captured in a graph; make a call with it before the capture, or leave it out");
  }
  std::vector<float> copy(static_cast<std::size_t>(entry.num_elements));
  const Status copied = cuda_status(
      cudaMemcpyAsync(copy.data(), table.data, copy.size() * sizeof(float), cudaMemcpyDeviceToHost, cuda_stream),
      what.c_str());
  if (!copied) return copied;
  const Status waited = cuda_status(cudaStreamSynchronize(cuda_stream), what.c_str());
  if (!waited) return waited;
  ConstTensor on_host = table;
  on_host.data = copy.data();
  on_host.device = Device::cpu();
  const Status checked = check(on_host);
  if (checked) checked_tables.add(entry);
  return checked;
}

}  // namespace quire::cuda
