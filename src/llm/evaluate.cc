#include "llm/evaluate.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <new>
#include <nlohmann/json.hpp>
#include <sstream>

#include "llm/gzip.h"
#include "llm/npy.h"
#include "llm/read_file.h"
#include "llm/sampler.h"

namespace quire::llm {
namespace {

constexpr std::int64_t kChunkTokens = 512;    // of a window, per forward pass
constexpr std::int64_t kPromptTokens = 2048;  // of prompts, per forward pass
constexpr int kBlockSize = 16;

// One mode while it is measured.
struct Lane {
  explicit Lane(KVCache kv_cache) : cache(std::move(kv_cache)), allocator(cache.num_blocks(), kBlockSize, false) {}
  KVCache cache;
  BlockAllocator allocator;
  Sequence window;
  EvalScore score;
  double nll_sum = 0.0, kl_sum = 0.0;
  std::int64_t num_scored = 0, num_positions = 0, num_same_top = 0;
  std::int64_t num_tokens = 0;
  double seconds = 0.0;
  std::unique_ptr<Lane> on_cpu;  // with against_cpu: the partner that runs first and computes the keys and values

  std::optional<double> perplexity() const {
    if (num_scored == 0) return std::nullopt;
    return std::exp(nll_sum / static_cast<double>(num_scored));
  }

  Status forward(Model& model, const Batch& batch, float* logits) {
    const auto begin = std::chrono::steady_clock::now();
    Status status = model.forward(batch, cache, logits);
    seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    num_tokens += batch.num_tokens();
    return status ? status : Status(status.code(), score.mode + ": " + status.message());
  }
};

Result<Lane> make_lane(const ModelConfig& config, ModeId mode, const std::vector<int>& skip_layers,
                       std::int64_t num_tokens, Device device) {
  Result<KVCache> cache = KVCache::create(config, {.layer_modes = {mode},
                                                   .skip_layers = skip_layers,
                                                   .block_size = kBlockSize,
                                                   .num_blocks = (num_tokens + kBlockSize - 1) / kBlockSize,
                                                   .device = device});
  if (!cache.ok()) return cache.status();
  return Lane(std::move(*cache));
}

// The log of the sum of exponentials, computed after the largest is subtracted.
double log_sum_exp(const float* x, int n) {
  const float largest = *std::max_element(x, x + n);
  double sum = 0.0;
  for (int i = 0; i < n; ++i) sum += std::exp(x[i] - largest);
  return largest + std::log(sum);
}

// The reference's next-token distributions of one chunk.
struct Distributions {
  std::vector<float> log_p, p;  // [rows, vocab_size]
  std::vector<std::int32_t> top;
};

void to_distributions(const std::vector<float>& logits, std::int64_t rows, int vocab_size, Distributions& out) {
  out.log_p.resize(logits.size());
  out.p.resize(logits.size());
  out.top.resize(static_cast<std::size_t>(rows));
#pragma omp parallel for
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t base = row * vocab_size;
    const double lse = log_sum_exp(logits.data() + base, vocab_size);
    for (std::int64_t i = base; i < base + vocab_size; ++i) {
      const auto at = static_cast<std::size_t>(i);
      out.log_p[at] = static_cast<float>(logits[at] - lse);
      out.p[at] = std::exp(out.log_p[at]);
    }
    out.top[static_cast<std::size_t>(row)] = argmax(logits.data() + base, vocab_size);
  }
}

// next[row] is the token that follows, or -1 where none is scored.
void score_chunk(const std::vector<float>& logits, const Distributions& reference,
                 const std::vector<std::int32_t>& next, int vocab_size, Lane& lane) {
  double nll_sum = 0.0, kl_sum = 0.0;
  std::int64_t num_scored = 0, num_same_top = 0;
  const auto rows = static_cast<std::int64_t>(next.size());
#pragma omp parallel for reduction(+ : nll_sum, kl_sum, num_scored, num_same_top)
  for (std::int64_t row = 0; row < rows; ++row) {
    const float* x = logits.data() + row * vocab_size;
    const float* log_p = reference.log_p.data() + row * vocab_size;
    const float* p = reference.p.data() + row * vocab_size;
    const double lse = log_sum_exp(x, vocab_size);
    double kl = 0.0;
    // log p is rounded as the reference's log_p is, so that equal logits give exactly 0.
    for (int i = 0; i < vocab_size; ++i) kl += p[i] * (log_p[i] - static_cast<float>(x[i] - lse));
    kl_sum += kl;
    num_same_top += argmax(x, vocab_size) == reference.top[static_cast<std::size_t>(row)] ? 1 : 0;
    const std::int32_t token = next[static_cast<std::size_t>(row)];
    if (token >= 0) {
      nll_sum += lse - x[token];
      ++num_scored;
    }
  }
  lane.nll_sum += nll_sum;
  lane.kl_sum += kl_sum;
  lane.num_scored += num_scored;
  lane.num_same_top += num_same_top;
  lane.num_positions += rows;
}

class Evaluation {
 public:
  Evaluation(Model& model, const EvalSets& sets, const EvalOptions& options)
      : model_(model), config_(model.config()), sets_(sets), options_(options) {}

  Result<std::vector<EvalScore>> run() {
    window_tokens_ = std::min<std::int64_t>(config_.max_position, 2048);
    num_windows_ = static_cast<std::int64_t>(sets_.tokens.size()) / window_tokens_;
    if (options_.max_windows >= 0) num_windows_ = std::min(num_windows_, options_.max_windows);
    for (const auto* set : {&sets_.recall, &sets_.arithmetic}) chosen_.push_back(choose(*set));

    std::int64_t prompt_tokens = 0, longest = kPromptTokens;
    for (const auto& prompts : chosen_) {
      for (const EvalPrompt* prompt : prompts) {
        prompt_tokens += length(*prompt);
        longest = std::max(longest, length(*prompt));
      }
    }
    const auto num_modes = static_cast<std::int64_t>(options_.modes.size());
    const std::int64_t lanes_of_mode = options_.against_cpu ? 2 : 1;
    total_tokens_ = num_windows_ * window_tokens_ * (num_modes * lanes_of_mode + 1) + prompt_tokens * num_modes;
    if (total_tokens_ == 0) return invalid_argument("there is nothing to evaluate: no whole window and no prompts");

    for (const ModeInfo& mode : options_.modes) {
      // Every prompt of a batch may leave one block partly filled.
      Result<Lane> lane =
          make_lane(config_, mode.id, options_.skip_layers, std::max(window_tokens_, 2 * longest), options_.device);
      if (!lane.ok()) return lane.status();
      lane->score.mode = mode.name;
      int layer = 0;  // the first in the mode
      while (layer + 1 < config_.num_layers && std::ranges::count(options_.skip_layers, layer) > 0) ++layer;
      lane->score.bytes_per_token_head = lane->cache.layout(layer).bytes_per_token_head;
      lane->score.skip_layers = options_.skip_layers;
      lane->score.bytes_per_token = lane->cache.bytes_per_token();
      if (options_.against_cpu) {
        Result<Lane> on_cpu = make_lane(config_, mode.id, options_.skip_layers, window_tokens_, Device::cpu());
        if (!on_cpu.ok()) return on_cpu.status();
        on_cpu->score.mode = mode.name + " on the CPU";
        lane->on_cpu = std::make_unique<Lane>(std::move(*on_cpu));
      }
      lanes_.push_back(std::move(*lane));
    }
    if (num_windows_ > 0) {
      if (Status status = run_windows(); !status) return status;
    }
    for (Lane& lane : lanes_) {
      if (Status status = run_prompts(lane); !status) return status;
    }

    std::vector<EvalScore> scores;
    for (Lane& lane : lanes_) {
      lane.score.perplexity = lane.perplexity();
      if (lane.on_cpu) lane.score.cpu_perplexity = lane.on_cpu->perplexity();
      if (lane.num_scored > 0) {
        lane.score.kl_divergence = lane.kl_sum / static_cast<double>(lane.num_positions);
        lane.score.same_top_token = static_cast<double>(lane.num_same_top) / static_cast<double>(lane.num_positions);
      }
      lane.score.tokens_per_second = static_cast<double>(lane.num_tokens) / lane.seconds;
      scores.push_back(std::move(lane.score));
    }
    return scores;
  }

 private:
  // The last token of the answer is compared but need not be run.
  static std::int64_t length(const EvalPrompt& prompt) {
    return static_cast<std::int64_t>(prompt.prompt.size() + prompt.answer.size()) - 1;
  }

  std::vector<const EvalPrompt*> choose(const std::vector<EvalPrompt>& set) const {
    std::vector<const EvalPrompt*> chosen;
    std::map<std::int64_t, std::int64_t> taken;
    for (const EvalPrompt& prompt : set) {
      if (options_.max_prompts < 0 || taken[prompt.context]++ < options_.max_prompts) chosen.push_back(&prompt);
    }
    return chosen;
  }

  void advance(std::int64_t num_tokens, const std::string& mode) {
    done_tokens_ += num_tokens;
    if (options_.progress)
      options_.progress(static_cast<double>(done_tokens_) / static_cast<double>(total_tokens_), mode);
  }

  // Chunk by chunk through the reference and every mode, so that only one chunk's distributions are kept.
  Status run_windows() {
    Result<ModeId> fp32 = parse_kv_cache_dtype("float32");
    if (!fp32.ok()) return fp32.status();
    Result<Lane> reference = make_lane(config_, *fp32, {}, window_tokens_, options_.device);
    if (!reference.ok()) return reference.status();
    reference->score.mode = "the fp32 reference";
    std::vector<Lane*> all{&*reference};
    for (Lane& lane : lanes_) {
      if (lane.on_cpu) all.push_back(lane.on_cpu.get());
      all.push_back(&lane);
    }

    Distributions distributions;
    Model::KVTape tape;
    const auto vocab_size = static_cast<std::int64_t>(config_.vocab_size);
    for (std::int64_t w = 0; w < num_windows_; ++w) {
      const auto begin = sets_.tokens.begin() + w * window_tokens_;
      for (Lane* lane : all) {
        lane->window.tokens.assign(begin, begin + window_tokens_);
        if (!lane->allocator.reserve(lane->window, window_tokens_)) return internal_error("the cache is too small");
      }
      for (std::int64_t at = 0; at < window_tokens_; at += kChunkTokens) {
        const std::int64_t count = std::min(kChunkTokens, window_tokens_ - at);
        std::vector<std::int32_t> next(begin + at + 1, begin + std::min(at + count + 1, window_tokens_));
        next.resize(static_cast<std::size_t>(count), -1);
        for (Lane* lane : all) {
          Batch batch;
          batch.add(lane->window, count, count, kBlockSize);
          logits_.resize(static_cast<std::size_t>(count * vocab_size));
          const bool leads = options_.against_cpu && !lane->on_cpu;  // its partner follows
          model_.record_kv(leads ? &tape : nullptr);
          if (lane->on_cpu) model_.replay_kv(&tape);
          const Status status = lane->forward(model_, batch, logits_.data());
          model_.record_kv(nullptr);
          if (!status) return status;
          lane->window.num_stored += count;
          if (lane == all[0]) {
            to_distributions(logits_, count, config_.vocab_size, distributions);
          } else {
            score_chunk(logits_, distributions, next, config_.vocab_size, *lane);
          }
          advance(count, lane->score.mode);
        }
      }
      for (Lane* lane : all) lane->allocator.release(lane->window);
    }
    return {};
  }

  Status run_prompts(Lane& lane) {
    for (std::size_t set = 0; set < chosen_.size(); ++set) {
      std::map<std::int64_t, std::pair<std::int64_t, std::int64_t>> tally;  // context -> right, all
      const auto& prompts = chosen_[set];
      for (std::size_t first = 0; first < prompts.size();) {
        Batch batch;
        std::vector<Sequence> sequences;
        std::size_t last = first;
        while (last < prompts.size() &&
               (last == first || batch.num_tokens() + length(*prompts[last]) <= kPromptTokens)) {
          const EvalPrompt& prompt = *prompts[last];
          Sequence sequence{.tokens = prompt.prompt, .blocks = {}};
          sequence.tokens.insert(sequence.tokens.end(), prompt.answer.begin(), prompt.answer.end() - 1);
          if (!lane.allocator.reserve(sequence, length(prompt))) break;
          batch.add(sequence, length(prompt), static_cast<std::int64_t>(prompt.answer.size()), kBlockSize);
          sequences.push_back(std::move(sequence));
          ++last;
        }
        if (sequences.empty()) return internal_error("the cache is too small");
        logits_.resize(batch.logit_rows.size() * static_cast<std::size_t>(config_.vocab_size));
        if (Status status = lane.forward(model_, batch, logits_.data()); !status) return status;
        const float* row = logits_.data();
        for (std::size_t i = first; i < last; ++i) {
          bool right = true;
          for (std::int32_t token : prompts[i]->answer) {
            right = right && argmax(row, config_.vocab_size) == token;
            row += config_.vocab_size;
          }
          auto& [num_right, num_all] = tally[prompts[i]->context];
          num_right += right ? 1 : 0;
          ++num_all;
        }
        for (Sequence& sequence : sequences) lane.allocator.release(sequence);
        advance(batch.num_tokens(), lane.score.mode);
        first = last;
      }
      std::int64_t right = 0, all = 0;
      for (const auto& [context, counts] : tally) {
        if (set == 0)
          lane.score.recall[context] = static_cast<double>(counts.first) / static_cast<double>(counts.second);
        right += counts.first;
        all += counts.second;
      }
      if (set == 1 && all > 0) lane.score.arithmetic = static_cast<double>(right) / static_cast<double>(all);
    }
    return {};
  }

  Model& model_;
  const ModelConfig& config_;
  const EvalSets& sets_;
  const EvalOptions& options_;
  std::int64_t window_tokens_ = 0, num_windows_ = 0;
  std::int64_t total_tokens_ = 0, done_tokens_ = 0;
  std::vector<std::vector<const EvalPrompt*>> chosen_;  // recall, arithmetic
  std::vector<Lane> lanes_;
  std::vector<float> logits_;
};

// What the bytes of a gzip file unpack to.
Result<std::string> unpacked(const std::string& path, const std::string& packed) try {
  GzipReader reader(path, reinterpret_cast<const std::uint8_t*>(packed.data()),
                    static_cast<std::int64_t>(packed.size()));
  auto bytes = reader.read(kMaxUnpackedBytes);
  if (!bytes.ok()) return bytes.status();
  if (static_cast<std::int64_t>(bytes->size()) == kMaxUnpackedBytes) {
    return out_of_range(path + ": unpacks to " + std::to_string(kMaxUnpackedBytes) +
                        " bytes or more, which a .gz file of "
                        "prompts may not hold");
  }
  return std::string(bytes->begin(), bytes->end());
} catch (const std::bad_alloc&) {
  return internal_error(path + ": there is not enough memory to unpack the file");
}

}  // namespace

Result<std::vector<EvalPrompt>> read_prompts(const std::string& path, const ModelConfig& config) {
  Result<std::string> text = read_file(path);
  if (text.ok() && is_gzip_name(path)) text = unpacked(path, *text);
  if (!text.ok()) return text.status();
  std::istringstream lines(*text);
  std::vector<EvalPrompt> prompts;
  std::string line;
  for (std::int64_t number = 1; std::getline(lines, line); ++number) {
    if (line.empty()) continue;
    const std::string where = path + ":" + std::to_string(number) + ": ";
    const auto object = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!object.is_object()) return invalid_argument(where + "not a JSON object");
    EvalPrompt prompt;
    for (auto [key, ids] : {std::pair("prompt", &prompt.prompt), {"answer", &prompt.answer}}) {
      if (!object.contains(key) || !object[key].is_array() || object[key].empty()) {
        return invalid_argument(where + "\"" + key + "\" must be a list of token ids");
      }
      for (const auto& id : object[key]) {
        if (!id.is_number_integer() || id.get<std::int64_t>() < 0 || id.get<std::int64_t>() >= config.vocab_size) {
          return out_of_range(where + "\"" + key + "\" holds " + id.dump().substr(0, 40) +
                              ", which is no token id of the vocabulary of " + std::to_string(config.vocab_size));
        }
        ids->push_back(id.get<std::int32_t>());
      }
    }
    if (object.contains("context")) {
      const auto& context = object["context"];
      if (!context.is_number_integer() || context.get<std::int64_t>() < 0) {
        return invalid_argument(where + "\"context\" is " + context.dump().substr(0, 40) +
                                ", expected an integer of at least 0");
      }
      prompt.context = context.get<std::int64_t>();
    }
    const auto num_tokens = static_cast<std::int64_t>(prompt.prompt.size() + prompt.answer.size());
    if (num_tokens > config.max_position) {
      return out_of_range(where + std::to_string(num_tokens) + " tokens exceed the model's context of " +
                          std::to_string(config.max_position));
    }
    prompts.push_back(std::move(prompt));
  }
  return prompts;
}

Result<EvalSets> load_eval_sets(const EvalPaths& paths, const ModelConfig& config) {
  EvalSets sets;
  if (!paths.tokens.empty()) {
    auto tokens = read_npy_tokens(paths.tokens, config.vocab_size);
    if (!tokens.ok()) return tokens.status();
    sets.tokens = std::move(*tokens);
  }
  for (auto [path, set] : {std::pair(&paths.recall, &sets.recall), {&paths.arithmetic, &sets.arithmetic}}) {
    if (path->empty()) continue;
    auto prompts = read_prompts(*path, config);
    if (!prompts.ok()) return prompts.status();
    *set = std::move(*prompts);
  }
  return sets;
}

Result<std::vector<EvalScore>> evaluate(Model& model, const EvalSets& sets, const EvalOptions& options) {
  model.set_qkv_dtype(options.qkv_dtype.value_or(model.config().dtype));
  Result<std::vector<EvalScore>> scores = Evaluation(model, sets, options).run();
  model.set_qkv_dtype(DType::kFloat32);
  return scores;
}

std::string to_json(const std::vector<EvalScore>& scores, const std::string& model_name, Device device) {
  using nlohmann::ordered_json;
  const auto or_null = [](const std::optional<double>& value) { return value ? ordered_json(*value) : ordered_json(); };
  ordered_json modes = ordered_json::object();
  for (const EvalScore& score : scores) {
    ordered_json recall = ordered_json::object();
    for (const auto& [context, share] : score.recall) recall[std::to_string(context)] = share;
    modes[score.mode] = {{"bytes_per_token_head", score.bytes_per_token_head},
                         {"bytes_per_token", score.bytes_per_token},
                         {"perplexity", or_null(score.perplexity)},
                         {"cpu_perplexity", or_null(score.cpu_perplexity)},
                         {"kl_divergence", or_null(score.kl_divergence)},
                         {"same_top_token", or_null(score.same_top_token)},
                         {"recall", recall},
                         {"arithmetic", or_null(score.arithmetic)},
                         {"tokens_per_second", score.tokens_per_second}};
    if (!score.skip_layers.empty()) modes[score.mode]["skip_layers"] = score.skip_layers;
  }
  return ordered_json{{"model", model_name}, {"device", device_type_name(device.type)}, {"modes", modes}}.dump(2);
}

}  // namespace quire::llm
