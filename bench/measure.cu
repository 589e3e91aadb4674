#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <string>

#include "measure_cuda.h"

namespace quire::bench::cuda {
namespace {

Status cuda_status(cudaError_t error, const char* what) {
  return error == cudaSuccess ? Status()
                              : internal_error(std::string(what) + ": CUDA reports " + cudaGetErrorString(error));
}

double median(std::vector<double>& values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

double now_ms() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct CudaTimer {
  cudaStream_t stream = nullptr;
  cudaEvent_t start = nullptr, stop = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  CudaTimer() {
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    cudaEventCreate(&start);
    cudaEventCreate(&stop);
  }
  CudaTimer(const CudaTimer&) = delete;
  ~CudaTimer() {
    if (executable != nullptr) cudaGraphExecDestroy(executable);
    if (graph != nullptr) cudaGraphDestroy(graph);
    cudaEventDestroy(start);
    cudaEventDestroy(stop);
    cudaStreamDestroy(stream);
  }
  Result<double> replay() {
    cudaEventRecord(start, stream);
    cudaGraphLaunch(executable, stream);
    cudaEventRecord(stop, stream);
    if (Status status = cuda_status(cudaEventSynchronize(stop), "graph replay"); !status) return status;
    float ms = 0.0F;
    cudaEventElapsedTime(&ms, start, stop);
    return static_cast<double>(ms);
  }
};

__global__ void read_linear(const uint4* from, std::int64_t count, unsigned* sink) {
  unsigned sum = 0;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < count; i += 4 * stride) {
    uint4 word[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) word[j] = from[i + j * stride];
#pragma unroll
    for (int j = 0; j < 4; ++j) sum += word[j].x ^ word[j].y ^ word[j].z ^ word[j].w;
  }
  for (; i < count; i += stride) sum += from[i].x;
  if (sum == 0x12345678U) *sink = sum;  // keeps the loads
}

template <class Word>
__global__ void read_pages(PageRead read, int splits, unsigned* sink) {
  const int words = static_cast<int>(read.row_bytes / static_cast<std::int64_t>(sizeof(Word)));
  const auto per_split = (read.context + splits - 1) / splits;
  const std::int64_t begin = blockIdx.z * per_split;
  const std::int64_t end = min(begin + per_split, read.context);
  const auto* base = static_cast<const std::uint8_t*>(read.base) + blockIdx.y * read.head_stride;
  const std::int32_t* table = read.block_table + blockIdx.x * read.max_blocks;
  unsigned sum = 0;
  const std::int64_t total = (end - begin) * words;
#pragma unroll 4
  for (std::int64_t i = threadIdx.x; i < total; i += blockDim.x) {
    const std::int64_t key = begin + i / words;
    const std::uint8_t* row =
        base + table[key / read.block_size] * read.block_stride + key % read.block_size * read.slot_stride;
    const Word word = reinterpret_cast<const Word*>(row)[i % words];
    const auto* parts = reinterpret_cast<const unsigned*>(&word);
#pragma unroll
    for (std::size_t w = 0; w < sizeof(Word) / 4; ++w) sum ^= parts[w];
  }
  if (sum == 0x12345678U) *sink = sum;
}

}  // namespace

Result<double> median_ms(const Call& call, int num_calls, double budget_ms) {
  std::vector<double> times;
  CudaTimer timer;
  for (int i = 0; i < num_calls; ++i) {  // warm up outside the graph: attributes, lazy loading
    if (Status status = call(i, timer.stream); !status) return status;
  }
  if (Status status = cuda_status(cudaStreamSynchronize(timer.stream), "warm-up"); !status) return status;
  cudaStreamBeginCapture(timer.stream, cudaStreamCaptureModeThreadLocal);
  int failed_call = -1;
  for (int i = 0; i < num_calls && failed_call < 0; ++i) {
    if (!call(i, timer.stream).ok()) failed_call = i;
  }
  const cudaError_t captured = cudaStreamEndCapture(timer.stream, &timer.graph);
  if (failed_call >= 0) return internal_error("call " + std::to_string(failed_call) + " failed under capture");
  if (Status status = cuda_status(captured, "capture"); !status) return status;
  if (Status status = cuda_status(cudaGraphInstantiate(&timer.executable, timer.graph, 0), "instantiate"); !status)
    return status;
  const double begin = now_ms();
  while (times.size() < 5 || (now_ms() - begin < budget_ms && times.size() < 200)) {
    Result<double> ms = timer.replay();
    if (!ms) return ms;
    times.push_back(*ms / num_calls);
  }
  return median(times);
}

Result<double> linear_read_bandwidth() {
  constexpr std::int64_t kBytes = std::int64_t{2} << 30;
  void* memory = nullptr;
  if (Status status = cuda_status(cudaMalloc(&memory, kBytes + 16), "linear read buffer"); !status) return status;
  cudaMemset(memory, 1, kBytes + 16);
  auto* sink = reinterpret_cast<unsigned*>(static_cast<std::uint8_t*>(memory) + kBytes);
  double best = 0.0;
  for (const int blocks : {132 * 2, 132 * 4, 132 * 8, 132 * 16}) {
    for (const int threads : {256, 512, 1024}) {
      const Result<double> ms = median_ms(
          [&](int, void* stream) {
            read_linear<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<const uint4*>(memory),
                                                                                   kBytes / 16, sink);
            return cuda_status(cudaGetLastError(), "linear read");
          },
          1, 10.0);
      if (!ms) return ms;
      best = std::max(best, kBytes / (*ms * 1e-3));
    }
  }
  cudaFree(memory);
  return best;
}

Result<double> copy_bandwidth() {
  constexpr std::int64_t kBytes = std::int64_t{1} << 30;
  void* from = nullptr;
  void* to = nullptr;
  if (Status status = cuda_status(cudaMalloc(&from, kBytes), "copy buffer"); !status) return status;
  if (Status status = cuda_status(cudaMalloc(&to, kBytes), "copy buffer"); !status) return status;
  cudaMemset(from, 1, kBytes);
  Result<double> ms = median_ms(
      [&](int, void* stream) {
        return cuda_status(
            cudaMemcpyAsync(to, from, kBytes, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)), "copy");
      },
      1, 50.0);
  cudaFree(from);
  cudaFree(to);
  if (!ms) return ms;
  return 2.0 * kBytes / (*ms * 1e-3);
}

Result<double> page_read_ms(const std::vector<PageRead>& reads) {
  void* sink = nullptr;
  if (Status status = cuda_status(cudaMalloc(&sink, 16), "sink"); !status) return status;
  double best = 0.0;
  for (const int threads : {128, 256, 512}) {
    const Result<double> ms = median_ms(
        [&](int, void* stream) {
          for (const PageRead& read : reads) {
            const int splits = std::max(1, 1056 / (read.batch * read.num_heads));
            const dim3 grid(static_cast<unsigned>(read.batch), static_cast<unsigned>(read.num_heads),
                            static_cast<unsigned>(splits));
            auto bits =
                reinterpret_cast<std::uintptr_t>(read.base) |
                static_cast<std::uintptr_t>(read.block_stride | read.slot_stride | read.head_stride | read.row_bytes);
            const auto cuda_stream = static_cast<cudaStream_t>(stream);
            auto* to = static_cast<unsigned*>(sink);
            if (bits % 16 == 0)
              read_pages<uint4><<<grid, threads, 0, cuda_stream>>>(read, splits, to);
            else if (bits % 8 == 0)
              read_pages<uint2><<<grid, threads, 0, cuda_stream>>>(read, splits, to);
            else if (bits % 4 == 0)
              read_pages<unsigned><<<grid, threads, 0, cuda_stream>>>(read, splits, to);
            else
              return unsupported("rows at odd addresses have no plain read");
          }
          return cuda_status(cudaGetLastError(), "page read");
        },
        1, 10.0);
    if (!ms) return ms;
    best = best == 0.0 ? *ms : std::min(best, *ms);
  }
  cudaFree(sink);
  return best;
}

}  // namespace quire::bench::cuda
