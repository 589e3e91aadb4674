#include "evaluation.h"

#include <fmt/core.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <set>

#include "options.h"
#include "quire/backend.h"

namespace quire::cli {
namespace {

std::string number(const std::optional<double>& value, const char* format) {
  return value ? fmt::format(fmt::runtime(format), *value) : "-";
}

// parts[first, last) with commas between.
std::string joined(const std::vector<std::string>& parts, std::size_t first, std::size_t last) {
  std::string text = parts[first];
  for (std::size_t i = first + 1; i < last; ++i) text.append(",").append(parts[i]);
  return text;
}

}  // namespace

Result<std::vector<ModeInfo>> parse_modes(const std::string& list) {
  std::vector<ModeInfo> modes;
  if (list == "all") {
    for (ModeInfo& mode : list_modes()) {
      if (mode.compiled && (!mode.key_format.empty() || get_backend(mode.id).ok())) modes.push_back(std::move(mode));
    }
    return modes;
  }
  const std::vector<std::string> parts = split_list(list);
  for (std::size_t first = 0; first < parts.size();) {
    // The name of a mode may hold a comma itself, so this takes as many parts as make a name.
    std::size_t last = parts.size();
    Result<ModeId> mode = parse_kv_cache_dtype(joined(parts, first, last));
    while (!mode.ok() && --last > first) mode = parse_kv_cache_dtype(joined(parts, first, last));
    if (!mode.ok()) return mode.status();
    auto info = mode_info(*mode);
    if (!info.ok()) return info.status();
    const bool seen = std::any_of(modes.begin(), modes.end(), [&](const ModeInfo& m) { return m.id == (*info)->id; });
    if (!seen) modes.push_back(**info);
    first = last;
  }
  return modes;
}

std::string skipped_layers(const std::vector<int>& layers) {
  return fmt::format("layers {} keep the model's own dtype, which the bytes per token count", fmt::join(layers, ", "));
}

llm::EvalPaths sets_beside(const std::string& model_dir) {
  const auto if_there = [&](const std::string& name) {
    const std::string path = model_dir + "/" + name;
    std::error_code error;
    return std::filesystem::is_regular_file(path, error) ? path : std::string();
  };
  const auto prompts = [&](const std::string& name) {
    const std::string path = if_there(name);
    return path.empty() ? if_there(name + ".gz") : path;
  };
  return {if_there("heldout_tokens.npy"), prompts("recall.jsonl"), prompts("arithmetic.jsonl")};
}

std::function<void(double, const std::string&)> progress_bar() {
  if (isatty(STDERR_FILENO) == 0) return {};
  return [](double fraction, const std::string& mode) {
    constexpr int kWidth = 40;
    const int filled = std::clamp(static_cast<int>(fraction * kWidth), 0, kWidth);
    fmt::print(stderr, "\r[{:#<{}}{:.<{}}] {:3.0f} % {:<24}", "", filled, "", kWidth - filled, fraction * 100.0, mode);
    if (fraction >= 1.0) fmt::print(stderr, "\r{:<80}\r", "");
    std::fflush(stderr);
  };
}

void print_scores(const std::vector<llm::EvalScore>& scores) {
  std::set<std::int64_t> contexts;
  for (const auto& score : scores) {
    for (const auto& [context, share] : score.recall) contexts.insert(context);
  }
  std::string recall_title = "recall";
  for (std::int64_t context : contexts) recall_title += fmt::format(" {}", context);
  const int recall_width =
      std::max<int>(static_cast<int>(recall_title.size()), 4 * static_cast<int>(contexts.size()) + 3 * 3);
  double bf16_bytes = 0.0;
  for (const auto& score : scores) {
    if (score.mode == "auto" || score.mode == "bfloat16") bf16_bytes = static_cast<double>(score.bytes_per_token);
  }
  std::size_t mode_width = 22;
  for (const auto& score : scores) mode_width = std::max(mode_width, score.mode.size());
  fmt::print("{:<{}} {:>12} {:>11} {:>6} {:>10} {:>9} {:>8}  {:<{}} {:>10} {:>9}\n", "mode", mode_width, "bytes/t-head",
             "bytes/token", "ratio", "perplexity", "KL", "same top", recall_title, recall_width, "arithmetic",
             "tokens/s");
  for (const auto& score : scores) {
    std::string recall;
    for (std::int64_t context : contexts) {
      const auto share = score.recall.find(context);
      recall +=
          (recall.empty() ? "" : " / ") + (share == score.recall.end() ? "-" : fmt::format("{:.2f}", share->second));
    }
    const std::string ratio =
        bf16_bytes > 0.0 ? fmt::format("{:.2f}", static_cast<double>(score.bytes_per_token) / bf16_bytes) : "-";
    fmt::print("{:<{}} {:>12} {:>11} {:>6} {:>10} {:>9} {:>8}  {:<{}} {:>10} {:>9.0f}\n", score.mode, mode_width,
               score.bytes_per_token_head, score.bytes_per_token, ratio, number(score.perplexity, "{:.4f}"),
               number(score.kl_divergence, "{:.6f}"), number(score.same_top_token, "{:.3f}"),
               recall.empty() ? "-" : recall, recall_width, number(score.arithmetic, "{:.3f}"),
               score.tokens_per_second);
  }
  for (const auto& score : scores) {
    if (!score.perplexity || !score.cpu_perplexity) continue;
    fmt::print("{:<{}} perplexity on the CPU, over the same keys and values: {:.4f}, relative difference {:.1e}\n",
               score.mode, mode_width, *score.cpu_perplexity,
               std::abs(*score.perplexity / *score.cpu_perplexity - 1.0));
  }
  if (!scores.empty() && !scores[0].skip_layers.empty()) {
    fmt::print("\n{}\n", skipped_layers(scores[0].skip_layers));
  }
}

}  // namespace quire::cli
