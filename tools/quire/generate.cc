// quire generate: text from a model whose keys and values live in a cache of the given mode.
#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "evaluation.h"
#include "llm/engine.h"
#include "llm/tokenizer.h"
#include "options.h"
#include "quire/mode.h"
#include "verbs.h"

namespace quire::cli {
namespace {

struct Options {
  std::string model_dir, kv_cache_dtype = "auto", skip_layers, prompt;
  std::vector<std::int32_t> token_ids;
  llm::Request request{.prompt = {}, .max_new_tokens = 64, .sampling = {}};
  int block_size = 16;
  Device device = Device::cpu();
};

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

int run(Options& options) {
  const auto mode = parse_kv_cache_dtype(options.kv_cache_dtype);
  if (!mode.ok()) return report(mode.status());
  auto model = llm::Model::load(options.model_dir);
  if (!model.ok()) return report(model.status());
  const auto skip_layers = llm::parse_layers(options.skip_layers, model->config().num_layers);
  if (!skip_layers.ok()) return report(skip_layers.status());

  std::optional<llm::Tokenizer> tokenizer;
  llm::Request& request = options.request;
  request.prompt = options.token_ids;
  if (options.token_ids.empty()) {
    auto loaded = llm::Tokenizer::load(options.model_dir);
    if (!loaded.ok()) return report(loaded.status());
    tokenizer.emplace(std::move(*loaded));
    request.prompt = tokenizer->encode(options.prompt);
    if (model->config().bos_token_id >= 0) request.prompt.insert(request.prompt.begin(), model->config().bos_token_id);
  }

  // The cache has at most the model's context, so that a larger request is refused by the engine instead of being
  // allocated.
  const std::int64_t context = model->config().max_position;
  const std::int64_t num_new_at_most = std::clamp<std::int64_t>(request.max_new_tokens, 0, context);
  const std::int64_t capacity = std::min(static_cast<std::int64_t>(request.prompt.size()) + num_new_at_most, context);
  auto engine = llm::Engine::create(
      *model, {.cache = {.layer_modes = {*mode},
                         .skip_layers = *skip_layers,
                         .block_size = options.block_size,
                         .num_blocks = (capacity + options.block_size - 1) / std::max(options.block_size, 1),
                         .device = options.device}});
  if (!engine.ok()) return report(engine.status());
  if (auto id = engine->add(request); !id.ok()) return report(id.status());

  std::optional<llm::TextStream> text;
  if (tokenizer) text.emplace(*tokenizer, request.prompt);
  if (tokenizer) fmt::print("{}", options.prompt);
  std::fflush(stdout);
  auto begin = std::chrono::steady_clock::now();
  double prompt_seconds = 0.0;
  std::int64_t num_new = 0;
  while (engine->busy()) {
    const auto outputs = engine->step();
    if (!outputs.ok()) return report(outputs.status());
    for (const auto& output : *outputs) {
      if (num_new++ == 0) {
        prompt_seconds = seconds_since(begin);
        begin = std::chrono::steady_clock::now();
      }
      if (text) {
        fmt::print("{}", text->push(output.token));
      } else {
        fmt::print("{}{}", num_new > 1 ? "," : "", output.token);
      }
      std::fflush(stdout);
    }
  }
  const double new_seconds = seconds_since(begin);
  fmt::print("{}\n", text ? text->finish() : "");
  std::fflush(stdout);
  const auto& cache = engine->cache();
  const auto prompt_tokens = static_cast<std::int64_t>(request.prompt.size());
  fmt::print(stderr, "\n{}: {} bytes per token in the cache, {:.1f} KiB for {} tokens ({} blocks of {})\n",
             options.kv_cache_dtype, cache.bytes_per_token(), static_cast<double>(cache.bytes()) / 1024.0,
             prompt_tokens + num_new, cache.num_blocks(), cache.block_size());
  if (!skip_layers->empty()) fmt::print(stderr, "{}\n", skipped_layers(*skip_layers));
  fmt::print(stderr, "prompt: {} tokens, {:.1f} tokens/s; generated: {} tokens, {:.1f} tokens/s\n", prompt_tokens,
             static_cast<double>(prompt_tokens) / prompt_seconds, num_new,
             num_new > 1 ? static_cast<double>(num_new - 1) / new_seconds : 1.0 / prompt_seconds);
  return 0;
}

}  // namespace

void add_generate(CLI::App& app, int& exit_status) {
  CLI::App* verb = app.add_subcommand("generate", "Generate text with a model whose cache is in a mode");
  auto options = std::make_shared<Options>();
  llm::Request& request = options->request;
  verb->add_option("--model", options->model_dir, "Folder with config.json and safetensors")->required();
  verb->add_option("-m,--kv-cache-dtype", options->kv_cache_dtype, "Mode of the cache")->capture_default_str();
  verb->add_option("--kv-cache-dtype-skip-layers", options->skip_layers, kSkipLayersHelp);
  auto* prompt = verb->add_option("-p,--prompt", options->prompt, "Text to continue (needs tokenizer.model)");
  add_integers(*verb, "--token-ids", options->token_ids, "Token ids to continue, separated by commas; prints ids", 0)
      ->excludes(prompt);
  add_integer(*verb, "-n,--max-new-tokens", request.max_new_tokens, "Tokens to generate")->capture_default_str();
  constexpr float kLargest = std::numeric_limits<float>::max();
  add_number(*verb, "--temperature", request.sampling.temperature, "0: always the likeliest token", -kLargest, kLargest)
      ->capture_default_str();
  add_number(*verb, "--top-p", request.sampling.top_p, "Sample from the smallest set of tokens with this probability",
             -kLargest, kLargest)
      ->capture_default_str();
  add_integer(*verb, "--seed", request.sampling.seed, "Seed of the sampling")->capture_default_str();
  verb->add_flag("!--ignore-eos", request.stop_at_eos, "Go on after an end-of-sequence token");
  add_integer(*verb, "--block-size", options->block_size, "Token slots of a cache page")->capture_default_str();
  add_device(*verb, options->device, "Where the cache lives and both ops run");
  verb->footer(kDeviceFooter);
  verb->callback([options, &exit_status] { exit_status = run(*options); });
}

}  // namespace quire::cli
