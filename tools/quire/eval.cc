// quire eval: perplexity, KL divergence, recall and arithmetic of a model with its cache in each mode.
#include <fmt/core.h>
#include <unistd.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cuda/device_memory.h"
#include "evaluation.h"
#include "options.h"
#include "verbs.h"

namespace quire::cli {
namespace {

struct Options {
  std::string model_dir, kv_cache_dtype = "all", skip_layers;
  llm::EvalPaths paths;
  llm::EvalOptions eval;
  bool as_json = false;
};

int run(Options& options) {
  auto modes = parse_modes(options.kv_cache_dtype);
  if (!modes.ok()) return report(modes.status());
  options.eval.modes = std::move(*modes);
  if (Status status = device_available(options.eval.device); !status) return report(status);
  auto model = llm::Model::load(options.model_dir);
  if (!model.ok()) return report(model.status());
  auto skip_layers = llm::parse_layers(options.skip_layers, model->config().num_layers);
  if (!skip_layers.ok()) return report(skip_layers.status());
  options.eval.skip_layers = std::move(*skip_layers);
  llm::EvalPaths& paths = options.paths;
  if (paths.tokens.empty() && paths.recall.empty() && paths.arithmetic.empty()) paths = sets_beside(options.model_dir);
  const auto sets = llm::load_eval_sets(paths, model->config());
  if (!sets.ok()) return report(sets.status());

  options.eval.progress = progress_bar();
  const auto scores = llm::evaluate(*model, *sets, options.eval);
  if (!scores.ok()) return report(scores.status());
  if (options.as_json) {
    fmt::print("{}\n", llm::to_json(*scores, options.model_dir, options.eval.device));
  } else {
    print_scores(*scores);
  }
  return 0;
}

}  // namespace

void add_eval(CLI::App& app, int& exit_status) {
  CLI::App* verb = app.add_subcommand("eval", "Measure a model's accuracy with its cache in each mode");
  auto options = std::make_shared<Options>();
  verb->add_option("--model", options->model_dir, "Folder with config.json and safetensors")->required();
  verb->add_option("-m,--kv-cache-dtype", options->kv_cache_dtype, "Modes, separated by commas, or all")
      ->capture_default_str();
  verb->add_option("--kv-cache-dtype-skip-layers", options->skip_layers, kSkipLayersHelp);
  verb->add_option("--tokens", options->paths.tokens, "Token ids for perplexity and KL divergence, .npy");
  verb->add_option("--recall", options->paths.recall,
                   "Prompts and answers, .jsonl or .jsonl.gz, reported per context length");
  verb->add_option("--arithmetic", options->paths.arithmetic, "Prompts and answers, .jsonl or .jsonl.gz");
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  add_integer<std::int64_t>(*verb, "--windows", options->eval.max_windows, "At most this many windows of tokens", 0,
                            kMost);
  add_integer<std::int64_t>(*verb, "--limit", options->eval.max_prompts,
                            "At most this many prompts per set and context length", 0, kMost);
  add_choice<std::optional<DType>>(*verb, "--qkv-dtype", options->eval.qkv_dtype,
                                   "Float type of q, k and v on their way to the cache; by default the model's",
                                   {{"model", std::nullopt},
                                    {"float32", DType::kFloat32},
                                    {"float16", DType::kFloat16},
                                    {"bfloat16", DType::kBFloat16}});
  add_device(*verb, options->eval.device, "Where the cache lives and both ops run");
  verb->add_flag("--against-cpu", options->eval.against_cpu,
                 "Measure cpu_perplexity too, and give the device's cache the CPU's keys and values");
  verb->add_flag("--json", options->as_json, "Print JSON");
  verb->footer(std::string("Without --tokens, --recall and --arithmetic: the sets that lie in the model's folder.\n") +
               kDeviceFooter);
  verb->callback([options, &exit_status] { exit_status = run(*options); });
}

}  // namespace quire::cli
