// quire demo: every mode on a small language model in a few minutes: a table, then one paragraph in two modes.
#include <fcntl.h>
#include <fmt/core.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "evaluation.h"
#include "llm/engine.h"
#include "llm/tokenizer.h"
#include "verbs.h"

namespace quire::cli {
namespace {

// Sized for about two minutes on two idle cores with all modes.
constexpr std::int64_t kWindows = 1;
constexpr std::int64_t kPromptsPerContext = 2;
constexpr std::int64_t kNewTokens = 64;
constexpr const char* kPrompt = "The mmap system call maps a file into memory. It returns";
constexpr llm::SamplingParams kSampling = {.temperature = 0.6F, .top_p = 0.9F, .seed = 1};
constexpr const char* kSampleModes[2] = {"auto", "int4_per_token_head"};

struct Options {
  std::string model_dir = "models/tiny-lm", json_path;
};

Result<std::string> continuation(llm::Model& model, const llm::Tokenizer& tokenizer, const char* mode_name) {
  const auto mode = parse_kv_cache_dtype(mode_name);
  if (!mode.ok()) return mode.status();
  llm::Request request{.prompt = tokenizer.encode(kPrompt), .max_new_tokens = kNewTokens, .sampling = kSampling};
  if (model.config().bos_token_id >= 0) request.prompt.insert(request.prompt.begin(), model.config().bos_token_id);
  auto engine = llm::Engine::create(model, {.cache = {.layer_modes = {*mode}, .num_blocks = 16}});
  if (!engine.ok()) return engine.status();
  if (auto id = engine->add(request); !id.ok()) return id.status();
  llm::TextStream stream(tokenizer, request.prompt);
  std::string text;
  while (engine->busy()) {
    const auto outputs = engine->step();
    if (!outputs.ok()) return outputs.status();
    for (const auto& output : *outputs) text += stream.push(output.token);
  }
  return text + stream.finish();
}

// Cuts text into lines of at most `width` bytes, between words.
std::vector<std::string> wrapped(const std::string& text, std::size_t width) {
  std::vector<std::string> lines(1);
  std::istringstream words(text);
  for (std::string word; words >> word;) {
    if (!lines.back().empty() && lines.back().size() + 1 + word.size() > width) lines.emplace_back();
    lines.back() += (lines.back().empty() ? "" : " ") + word.substr(0, width);
  }
  return lines;
}

Status print_samples(llm::Model& model, const std::string& model_dir) {
  const auto tokenizer = llm::Tokenizer::load(model_dir);
  if (!tokenizer.ok()) return tokenizer.status();
  constexpr std::size_t kWidth = 56;
  std::vector<std::string> columns[2];
  for (int i = 0; i < 2; ++i) {
    const auto text = continuation(model, *tokenizer, kSampleModes[i]);
    if (!text.ok()) return text.status();
    columns[i] = wrapped(*text, kWidth);
  }
  fmt::print("\n\"{}\" continued for {} tokens with the same seed:\n\n", kPrompt, kNewTokens);
  fmt::print("{:<{}}  {}\n", kSampleModes[0], kWidth, kSampleModes[1]);
  for (std::size_t i = 0; i < std::max(columns[0].size(), columns[1].size()); ++i) {
    const auto line = [&](int column) { return i < columns[column].size() ? columns[column][i] : std::string(); };
    fmt::print("{:<{}}  {}\n", line(0), kWidth, line(1));
  }
  return {};
}

// The file of --json-out, which is opened before anything is computed. Only write() changes what it holds: a run that
// fails before that leaves an older file as it was, and creates none.
class OutputFile {
 public:
  OutputFile() = default;
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  ~OutputFile() {
    if (fd_ < 0) return;
    close(fd_);
    if (created_) unlink(path_.c_str());
  }

  Status open(const std::string& path) {
    path_ = path;
    fd_ = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    created_ = fd_ >= 0;
    if (!created_) fd_ = ::open(path.c_str(), O_WRONLY | O_CLOEXEC);
    if (fd_ >= 0) return {};
    return not_found(path + ": cannot open the file for writing: " + std::strerror(errno));
  }

  // Replaces the contents of the file. Where that fails, a regular file is left empty.
  Status write(const std::string& text) {
    struct stat info = {};
    const bool regular = fstat(fd_, &info) == 0 && S_ISREG(info.st_mode);
    bool good = !regular || ftruncate(fd_, 0) == 0;
    for (std::size_t done = 0; good && done < text.size();) {
      const ssize_t count = ::write(fd_, text.data() + done, text.size() - done);
      good = count > 0;
      done += good ? static_cast<std::size_t>(count) : 0;
    }
    if (good) {
      created_ = false;
      return {};
    }
    const std::string reason = std::strerror(errno);
    const bool emptied = !regular || ftruncate(fd_, 0) == 0;
    return internal_error(path_ + (emptied ? ": cannot write the file: " : ": the file was written in part: ") +
                          reason);
  }

 private:
  std::string path_;
  int fd_ = -1;
  bool created_ = false;
};

int run(const Options& options) {
  OutputFile json;
  if (!options.json_path.empty()) {
    if (Status status = json.open(options.json_path); !status) return report(status);
  }
  auto model = llm::Model::load(options.model_dir);
  if (!model.ok()) return report(model.status());
  const llm::ModelConfig& config = model->config();
  const auto sets = llm::load_eval_sets(sets_beside(options.model_dir), config);
  if (!sets.ok()) return report(sets.status());
  auto modes = parse_modes("all");
  if (!modes.ok()) return report(modes.status());

  fmt::print("{}: {} layers, {} query heads, {} KV heads of size {}\n", options.model_dir, config.num_layers,
             config.num_q_heads, config.num_kv_heads, config.head_size);
  fmt::print(
      "Writing and reading its KV cache in every mode: {} x {} tokens of text, {} prompts per set and length.\n\n",
      kWindows, std::min<std::int64_t>(config.max_position, 2048), kPromptsPerContext);
  std::fflush(stdout);
  const auto scores = llm::evaluate(*model, *sets,
                                    {.modes = std::move(*modes),
                                     .max_windows = kWindows,
                                     .max_prompts = kPromptsPerContext,
                                     .progress = progress_bar()});
  if (!scores.ok()) return report(scores.status());
  print_scores(*scores);
  fmt::print(
      "\nratio: bytes against bf16. KL: nats per token to the same model over an fp32 cache. Few prompts: recall "
      "moves\n"
      "by {:.2f} at a time here; docs/results/accuracy.md has the full measurement.\n",
      1.0 / static_cast<double>(kPromptsPerContext));
  if (Status status = print_samples(*model, options.model_dir); !status) return report(status);

  if (!options.json_path.empty()) {
    const Status status = json.write(llm::to_json(*scores, options.model_dir, Device::cpu()) + "\n");
    if (!status) return report(status);
  }
  fmt::print(
      "\nNext:\n"
      "  quire generate --model {0} --kv-cache-dtype int4_per_token_head --prompt \"A regular expression\"\n"
      "  quire eval --model {0} --kv-cache-dtype all      the full measurement\n"
      "  quire modes                                      what the modes are; docs/formats/ has their bytes\n"
      "  src/llm/model.cc, Model::attention_block         the two calls that put a cache behind a model\n",
      options.model_dir);
  return 0;
}

}  // namespace

void add_demo(CLI::App& app, int& exit_status) {
  CLI::App* verb = app.add_subcommand("demo", "Every mode on a small language model, in a few minutes");
  auto options = std::make_shared<Options>();
  verb->add_option("--model", options->model_dir, "Model folder with its evaluation sets")->capture_default_str();
  verb->add_option("--json-out", options->json_path, "Also write the table as JSON to this file, when all is done");
  verb->callback([options, &exit_status] { exit_status = run(*options); });
}

}  // namespace quire::cli
