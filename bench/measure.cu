#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <string>

#include "cuda/device_memory.h"
#include "measure_cuda.h"
#include "quire/ops.h"

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

// How a kernel walks linear memory: the blocks of a grid-stride loop for each multiprocessor (0: as many blocks as
// cover the memory once), the threads of a block, and the 16-byte words that a thread has in flight.
struct Launch {
  int blocks, threads, words;
};
constexpr Launch kLinearLaunches[] = {{2, 256, 4},  {2, 512, 4},  {2, 1024, 4}, {4, 256, 4},  {4, 512, 4},
                                      {8, 128, 8},  {8, 256, 4},  {8, 256, 8},  {16, 128, 4}, {16, 128, 8},
                                      {16, 256, 4}, {32, 128, 4}, {0, 128, 4},  {0, 256, 1},  {0, 256, 4},
                                      {0, 256, 8},  {0, 512, 4},  {0, 1024, 4}, {0, 512, 1},  {0, 1024, 1}};

// The sum of bytes that are all 1 is never this, but the compiler cannot know it and keeps the loads.
constexpr unsigned kUnlikely = 0x12345678U;

// Reads `count` words, and writes them to `to` where kCopy is set.
template <bool kCopy, int kWords>
__global__ void walk_linear(const uint4* from, uint4* to, std::int64_t count, unsigned* sink) {
  unsigned sum = 0;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x * kWords;
  for (std::int64_t base = static_cast<std::int64_t>(blockIdx.x) * blockDim.x * kWords + threadIdx.x; base < count;
       base += step) {
    uint4 word[kWords];
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      const std::int64_t i = base + j * static_cast<std::int64_t>(blockDim.x);
      word[j] = i < count ? __ldcs(from + i) : uint4{};
    }
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      const std::int64_t i = base + j * static_cast<std::int64_t>(blockDim.x);
      if (kCopy && i < count) __stcs(to + i, word[j]);
      if (!kCopy) sum += word[j].x ^ word[j].y ^ word[j].z ^ word[j].w;
    }
  }
  if (!kCopy && sum == kUnlikely) *sink = sum;
}

template <bool kCopy>
void launch_linear(const Launch& launch, int num_multiprocessors, const uint4* from, uint4* to, std::int64_t count,
                   unsigned* sink, cudaStream_t stream) {
  const std::int64_t per_block = static_cast<std::int64_t>(launch.threads) * launch.words;
  const auto blocks = static_cast<unsigned>(launch.blocks > 0 ? std::int64_t{launch.blocks} * num_multiprocessors
                                                              : (count + per_block - 1) / per_block);
  const auto kernel = launch.words == 8   ? &walk_linear<kCopy, 8>
                      : launch.words == 4 ? &walk_linear<kCopy, 4>
                                          : &walk_linear<kCopy, 1>;
  kernel<<<blocks, launch.threads, 0, stream>>>(from, to, count, sink);
}

// The milliseconds of the best launch of the list.
template <bool kCopy>
Result<double> best_linear_ms(Device device, std::size_t bytes) {
  using quire::cuda::DeviceBuffer;
  const Result<Arch> arch = device_arch(device);
  if (!arch) return arch.status();
  Result<DeviceBuffer> from = DeviceBuffer::allocate(bytes);
  if (!from) return from.status();
  Result<DeviceBuffer> to = DeviceBuffer::allocate(kCopy ? bytes : sizeof(uint4));
  if (!to) return to.status();
  if (Status status = from->poison(1); !status) return status;
  double best = 0.0;
  for (const Launch& launch : kLinearLaunches) {
    const Result<double> ms = median_ms(
        [&](int, void* stream) {
          launch_linear<kCopy>(launch, arch->num_multiprocessors, static_cast<const uint4*>(from->data()),
                               static_cast<uint4*>(to->data()), static_cast<std::int64_t>(bytes / sizeof(uint4)),
                               static_cast<unsigned*>(to->data()), static_cast<cudaStream_t>(stream));
          return cuda_status(cudaGetLastError(), kCopy ? "linear copy" : "linear read");
        },
        4, 10.0);
    if (!ms) return ms;
    best = best == 0.0 ? *ms : std::min(best, *ms);
  }
  return best;
}

// The same bytes of every page: runs of contiguous bytes at equal distances, for each of some heads.
struct PageRuns {
  const std::uint8_t* base;
  std::int64_t block_stride, run_stride, head_stride, run_bytes;
  int runs, heads;
};

// The rows of each head, as one run where they lie side by side.
PageRuns runs_of_heads(const PageRead& read) {
  PageRuns pages{read.row(0, 0, 0), read.block_stride, read.slot_stride, read.head_stride,
                 read.row_bytes,    read.block_size,   read.num_heads};
  if (read.slot_stride == read.row_bytes) {
    pages.run_bytes *= read.block_size;
    pages.runs = 1;
  }
  return pages;
}

// The rows of all heads together, in runs that are as long as nothing lies between rows.
PageRuns runs_of_pages(const PageRead& read) {
  PageRuns pages = runs_of_heads(read);
  if (pages.runs == 1 && read.head_stride == pages.run_bytes) {
    pages.run_bytes *= read.num_heads;
  } else if (pages.runs == 1) {
    pages.runs = read.num_heads;
    pages.run_stride = read.head_stride;
  } else if (read.head_stride == read.row_bytes) {
    pages.run_bytes *= read.num_heads;
    if (read.slot_stride == pages.run_bytes) {
      pages.run_bytes *= read.block_size;
      pages.runs = 1;
    }
  } else {
    return pages;  // by heads, since the rows of all heads are no runs
  }
  pages.heads = 1;
  return pages;
}

// Block (sequence, head, split) reads its share of the sequence's pages; each thread reads the same words of several
// pages.
__global__ void read_pages(const __grid_constant__ PageRuns pages, const std::int32_t* table, std::int64_t max_blocks,
                           unsigned* sink) {
  constexpr int kPages = 4;  // pages in flight
  table += blockIdx.x * max_blocks;
  const auto per_split = static_cast<int>((max_blocks + gridDim.z - 1) / gridDim.z);
  const int begin = static_cast<int>(blockIdx.z) * per_split;
  const int end = min(begin + per_split, static_cast<int>(max_blocks));
  const std::uint8_t* base = pages.base + blockIdx.y * pages.head_stride;
  // The 16-byte words of the aligned cover of a run, wherever the run starts.
  const bool aligned =
      ((reinterpret_cast<std::uintptr_t>(base) | pages.block_stride | pages.run_stride | pages.run_bytes) & 15) == 0;
  const int words = static_cast<int>(aligned ? pages.run_bytes / 16 : (pages.run_bytes + 30) / 16);
  const int words_of_page = words * pages.runs;
  const int threads = static_cast<int>(blockDim.x);
  const int page_step = max(threads / words_of_page, 1);
  const int first_page = begin + static_cast<int>(threadIdx.x) / words_of_page;
  unsigned sum = 0;
  if (words_of_page <= threads && static_cast<int>(threadIdx.x) >= page_step * words_of_page) return;
  for (int index = static_cast<int>(threadIdx.x) % words_of_page; index < words_of_page; index += threads) {
    const std::int64_t offset = index / words * pages.run_stride;
    const int word = index % words;
    for (int page = first_page; page < end; page += kPages * page_step) {
      uint4 got[kPages] = {};
#pragma unroll
      for (int j = 0; j < kPages; ++j) {
        if (page + j * page_step >= end) continue;
        const std::uint8_t* run = base + table[page + j * page_step] * pages.block_stride + offset;
        const auto first = reinterpret_cast<std::uintptr_t>(run) / 16 + static_cast<unsigned>(word);
        if (first * 16 < reinterpret_cast<std::uintptr_t>(run) + static_cast<std::uintptr_t>(pages.run_bytes))
          got[j] = __ldcs(reinterpret_cast<const uint4*>(first * 16));
      }
#pragma unroll
      for (int j = 0; j < kPages; ++j) sum += got[j].x ^ got[j].y ^ got[j].z ^ got[j].w;
    }
  }
  if (sum == kUnlikely) *sink = sum;
}

}  // namespace

Result<double> median_ms(const Call& call, int num_calls, double budget_ms) {
  std::vector<double> times;
  CudaTimer timer;
  for (int i = 0; i < num_calls; ++i) {  // warms up outside the graph: attributes, lazy loading
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

Result<double> linear_read_bandwidth(Device device) {
  constexpr std::size_t kBytes = std::size_t{2} << 30;
  const Result<double> ms = best_linear_ms<false>(device, kBytes);
  if (!ms) return ms;
  return kBytes / (*ms * 1e-3);
}

Result<double> copy_bandwidth(Device device) {
  constexpr std::size_t kBytes = std::size_t{1} << 30;
  const Result<double> ms = best_linear_ms<true>(device, kBytes);
  if (!ms) return ms;
  return 2.0 * kBytes / (*ms * 1e-3);
}

Result<double> page_read_ms(Device device, const std::vector<PageRead>& reads, const PageTable& table) {
  const Result<Arch> arch = device_arch(device);
  if (!arch) return arch.status();
  Result<quire::cuda::DeviceBuffer> sink = quire::cuda::DeviceBuffer::allocate(16);
  if (!sink) return sink.status();
  double best = 0.0;
  for (const auto& runs_of : {runs_of_heads, runs_of_pages}) {
    for (const int threads : {128, 256, 512}) {
      for (const int blocks : {arch->num_multiprocessors * 8, arch->num_multiprocessors * 32}) {
        const Result<double> ms = median_ms(
            [&](int index, void* stream) {
              const std::int32_t* blocks_of_copy = table.blocks + index * table.batch * table.max_blocks;
              for (const PageRead& read : reads) {
                const PageRuns pages = runs_of(read);
                const std::int64_t splits =
                    std::clamp<std::int64_t>(blocks / (table.batch * pages.heads), 1, table.max_blocks);
                const dim3 grid(static_cast<unsigned>(table.batch), static_cast<unsigned>(pages.heads),
                                static_cast<unsigned>(splits));
                read_pages<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(
                    pages, blocks_of_copy, table.max_blocks, static_cast<unsigned*>(sink->data()));
              }
              return cuda_status(cudaGetLastError(), "page read");
            },
            table.copies, 5.0);
        if (!ms) return ms;
        best = best == 0.0 ? *ms : std::min(best, *ms);
      }
    }
  }
  return best;
}

}  // namespace quire::bench::cuda
