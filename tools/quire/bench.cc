// quire bench decode|prefill|store: times the ops over a grid of problems and compares them with the speed of memory.
#include <fmt/core.h>
#include <fmt/format.h>
#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench_ops.h"
#include "evaluation.h"
#include "measure.h"
#include "options.h"
#include "quire/executor.h"
#include "quire/layout.h"
#include "verbs.h"

namespace quire::cli {
namespace {

using Json = nlohmann::ordered_json;

const std::vector<std::string> kOps = {"decode", "prefill", "store"};

struct Options {
  std::string op = "decode";
  Device device = Device::cpu();
  std::string modes = "auto";
  std::vector<const Layout*> layouts = {&kLayouts[0]};
  std::vector<std::int64_t> batches = {1};
  std::vector<std::int64_t> contexts = {8192};
  std::vector<std::int64_t> q_lens;  // default: 1 for decode, the context for prefill
  std::vector<int> num_q_heads = {32};
  std::vector<int> num_kv_heads = {8};
  std::vector<int> head_sizes = {128};
  int head_size_v = 0;
  int block_size = 16;
  double budget_ms = 40.0;
  int threads = 0;
  bool json = false;
};

#define QUIRE_ASSIGN(name, expression)               \
  auto name##_result = (expression);                 \
  if (!name##_result) return name##_result.status(); \
  auto& name = *name##_result

// The version of the GPU driver as the kernel module tells it: in the line "NVRM version:", the first word that begins
// with a digit (580.159.04, say). It is empty where there is no such line.
std::string driver_version() {
  std::ifstream file("/proc/driver/nvidia/version");
  std::string word;
  while (file >> word) {
    if (word[0] >= '0' && word[0] <= '9') return word;
  }
  return {};
}

// The most bytes that a row of the table takes, estimated in a way that cannot overflow.
double memory_bytes(const std::string& op, const Problem& problem, const KVCacheLayout& layout) {
  const auto batch = static_cast<double>(problem.batch), context = static_cast<double>(problem.context);
  const auto rows = [](double tokens, int heads, int elements) { return 2.0 * tokens * heads * elements; };  // bf16
  const double cache = batch * std::ceil(context / problem.block_size) * static_cast<double>(layout.bytes_per_block);
  constexpr double kCopies = 256 << 20;  // the copies of a small problem, beside the first
  if (op == "store") {
    const double input =
        2.0 * rows(batch * context, problem.num_kv_heads, std::max(problem.head_size, problem.head_size_v));
    return 4.0 * kCopies + 4.0 * input + 2.0 * cache;
  }
  const double query_tokens = batch * static_cast<double>(problem.q_len);
  return kCopies + cache + rows(query_tokens, problem.num_q_heads, 2 * problem.head_size + problem.head_size_v);
}

// Ok where the problem can be laid out, its tokens can be counted in the int32 of block tables and lengths, and it fits
// into memory.
Status check_problem(const std::string& op, const Problem& problem) {
  QUIRE_ASSIGN(mode, parse_kv_cache_dtype(problem.mode));
  QUIRE_ASSIGN(layout, layout_of(problem, mode));
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  if (const std::int64_t tokens = problem.batch * problem.context; tokens > kMost) {
    return invalid_argument(fmt::format("{} sequences of {} tokens are {} tokens, supported are {}", problem.batch,
                                        problem.context, tokens, kMost));
  }
  const double needed = memory_bytes(op, problem, layout);
  const double available =
      problem.device.is_cuda()
          ? std::ldexp(1.0, 40)  // more than any device has; the device says itself what it has
          : static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  if (needed <= available) return {};
  return invalid_argument(fmt::format(
      "{} of {} sequences of {} tokens, {} query heads and {} KV heads of size {} needs some {:.2g} bytes of "
      "memory, there are {:.2g}",
      op, problem.batch, problem.context, problem.num_q_heads, problem.num_kv_heads, problem.head_size, needed,
      available));
}

std::vector<Problem> problems_of(const Options& options, const std::vector<ModeInfo>& modes) {
  std::vector<Problem> problems;
  for (const std::int64_t batch : options.batches)
    for (const std::int64_t context : options.contexts)
      for (const std::int64_t q_len :
           options.q_lens.empty() ? std::vector<std::int64_t>{options.op == "prefill" ? context : 1} : options.q_lens)
        for (const int q_heads : options.num_q_heads)
          for (const int kv_heads : options.num_kv_heads)
            for (const int head_size : options.head_sizes)
              for (const Layout* layout : options.layouts)
                for (const ModeInfo& mode : modes) {
                  const int head_size_v = options.head_size_v > 0 ? options.head_size_v : head_size;
                  problems.push_back({options.device, mode.name, layout, batch, context, std::min(q_len, context),
                                      q_heads, kv_heads, head_size, head_size_v, options.block_size});
                }
  return problems;
}

Status run_bench(const Options& options) {
  const Device device = options.device;
  if (options.threads > 0) omp_set_num_threads(options.threads);
  if (Status status = device_available(device); !status) return status;
  const Result<std::vector<ModeInfo>> modes = parse_modes(options.modes);
  if (!modes) return modes.status();
  const std::vector<Problem> problems = problems_of(options, *modes);
  const auto about = [](const Problem& problem, const Status& status) {
    return Status(status.code(), problem.mode + ": " + status.message());
  };
  for (const Problem& problem : problems) {
    if (Status status = check_problem(options.op, problem); !status) return about(problem, status);
  }
  Ceilings ceilings;
  QUIRE_ASSIGN(read, bench::linear_read_bandwidth(device));
  QUIRE_ASSIGN(copy, bench::copy_bandwidth(device));
  ceilings = {read, copy, {}};
  if (device.is_cpu()) ceilings.products = bench::product_rates();
  std::size_t mode_width = 22;
  for (const Problem& problem : problems) mode_width = std::max(mode_width, problem.mode.size());
  mode_width += 2;
  Json rows = Json::array();
  if (!options.json) {
    fmt::print("linear read {:.0f} GB/s, copy {:.0f} GB/s (read + written)\n", read * 1e-9, copy * 1e-9);
    if (device.is_cpu()) {
      fmt::print("multiply-adds: fp32 {:.0f} G/s, bf16 pairs {:.0f} G/s, int16 pairs {:.0f} G/s; {} threads\n",
                 ceilings.products.float32 * 1e-9, ceilings.products.bfloat16 * 1e-9, ceilings.products.int16 * 1e-9,
                 num_threads());
    }
    fmt::print("{:<8}{:<{}}{:<11}{:>6}{:>8}{:>7}{:>9}{:>6}{:>10}{:>9}{:>8}{:>8}{:>9}{:>8}{:>9}{:>9}\n", "op", "mode",
               mode_width, "layout", "batch", "context", "q_len", "heads", "d", "ms", "GB/s", "share", "layout",
               "products", "TFLOP/s", "host us", "+ plan");
  }
  for (const Problem& problem : problems) {
    const Result<Json> row = options.op == "store" ? bench_store(problem, ceilings, options.budget_ms)
                                                   : bench_attention(options.op, problem, ceilings, options.budget_ms);
    if (!row) return about(problem, row.status());
    if (!options.json) {
      const Json& r = *row;
      const auto share = [&](const char* name) {
        return r[name].is_null() ? std::string("-") : fmt::format("{:.2f}", r[name].get<double>());
      };
      fmt::print("{:<8}{:<{}}{:<11}{:>6}{:>8}{:>7}{:>9}{:>6}{:>10.4f}{:>9.0f}{:>8}{:>8}{:>9}{:>8.2f}{:>9}{:>9}\n",
                 options.op, problem.mode, mode_width, problem.layout->first, problem.batch, problem.context,
                 problem.q_len, fmt::format("{}/{}", problem.num_q_heads, problem.num_kv_heads), problem.head_size,
                 r["ms"].get<double>(), r["cache_gbps"].get<double>(), share("bandwidth_share"), share("layout_share"),
                 share("product_share"), r["tflops"].get<double>(), share("host_us"), share("host_us_with_plan"));
      std::fflush(stdout);
    }
    rows.push_back(*row);
  }
  if (options.json) {
    const Json report{{"device", device_description(device)},
                      {"driver", device.is_cuda() ? Json(driver_version()) : Json()},
                      {"linear_read_gbps", read * 1e-9},
                      {"copy_gbps", copy * 1e-9},
                      {"fp32_gmacs", ceilings.products.float32 * 1e-9},
                      {"bf16_gmacs", ceilings.products.bfloat16 * 1e-9},
                      {"int16_gmacs", ceilings.products.int16 * 1e-9},
                      {"threads", num_threads()},
                      {"rows", rows}};
    fmt::print("{}\n", report.dump(1));
  }
  return {};
}

}  // namespace

void add_bench(CLI::App& app, int& exit_status) {
  auto options = std::make_shared<Options>();
  CLI::App* verb = app.add_subcommand("bench", "Time the ops over a grid of problems");
  add_choice(*verb, "op", "decode, prefill or store", kOps, [options](std::size_t place) {
    options->op = kOps[place];
  })->required();
  add_device(*verb, options->device, "Where the ops run");
  verb->add_option("--mode", options->modes, "kv_cache_dtypes, comma-separated, or all");
  const std::vector<std::string> layouts = names_of(kLayouts);
  add_text(*verb, "--layout", fmt::format("{}", fmt::join(layouts, ", ")), "TEXT,..",
           [options, layouts](const std::string& text) {
             options->layouts.clear();
             for (const std::string& part : split_list(text)) {
               options->layouts.push_back(&kLayouts[parse_choice("--layout", part, layouts)]);
             }
           });
  constexpr int kMost = std::numeric_limits<std::int32_t>::max();
  add_integers<std::int64_t>(*verb, "--batch", options->batches, "sequences", 1, kMost);
  add_integers<std::int64_t>(*verb, "--context", options->contexts, "keys of a sequence, new tokens included", 1,
                             kMost);
  add_integers<std::int64_t>(*verb, "--q-len", options->q_lens, "query tokens of a sequence", 1, kMost);
  add_integers(*verb, "--num-q-heads", options->num_q_heads, "query heads", 1, kMost);
  add_integers(*verb, "--num-kv-heads", options->num_kv_heads, "KV heads", 1, kMost);
  add_integers(*verb, "--head-size", options->head_sizes, "head size of K", 1, kMost);
  add_integer(*verb, "--head-size-v", options->head_size_v, "default: the head size", 1, kMost);
  add_integer(*verb, "--block-size", options->block_size, "token slots of a page", 1, kMost);
  add_number(*verb, "--budget-ms", options->budget_ms, "time spent measuring one row", 1e-3, 3.6e6);
  add_integer(*verb, "--threads", options->threads, "threads on the CPU; default: OMP_NUM_THREADS", 1, 1024);
  verb->add_flag("--json", options->json, "JSON on stdout");
  verb->footer(
      "share: of the best linear read of 2 GiB (decode, prefill) or copy of 1 GiB (store) measured first, in the same "
      "process. layout: of the time a kernel takes that only reads the same pages (cuda). products: what the "
      "multiply-adds alone would take at the rates measured first, of the time (cpu). "
      "host us: microseconds of the host for a call, plan reused; + plan: planned in each call.");
  verb->callback([options, &exit_status] {
    if (Status status = run_bench(*options); !status) exit_status = report(status);
  });
}

}  // namespace quire::cli
