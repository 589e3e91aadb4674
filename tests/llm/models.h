// Models for the tests: tiny-lm from the repository, random ones written to a temporary folder, and an oracle: the
// decoder of llm/model.h in double precision, one token against all earlier ones, without a cache, a batch or a BLAS.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <map>
#include <nlohmann/json.hpp>
#include <numbers>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "format/float_types.h"
#include "llm/model.h"
#include "llm/safetensors_writer.h"
#include "quire/mode.h"
#include "support/modes.h"
#include "support/random.h"

namespace quire::testing {

inline std::string tiny_lm_dir() { return std::string(QUIRE_SOURCE_DIR) + "/models/tiny-lm"; }

// A folder that goes away with the object.
class TempDir {
 public:
  TempDir() {
    std::string pattern = (std::filesystem::temp_directory_path() / "quire-test-XXXXXX").string();
    if (mkdtemp(pattern.data()) == nullptr) ADD_FAILURE() << "no temporary folder";
    path_ = pattern;
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  ~TempDir() {
    std::error_code error;
    std::filesystem::remove_all(path_, error);
  }
  const std::string& path() const { return path_; }
  void write(const std::string& name, const std::string& bytes) const {
    std::ofstream(path_ + "/" + name, std::ios::binary) << bytes;
  }

 private:
  std::string path_;
};

struct TestTensor {
  std::vector<std::int64_t> shape;
  std::vector<float> values;
};
using TestTensors = std::map<std::string, TestTensor>;

inline std::string safetensors_bytes(const TestTensors& tensors, DType dtype) {
  test::EditableFile file;
  for (const auto& [name, tensor] : tensors) {
    test::StoredTensor& stored = file.tensors[name];
    stored.dtype = dtype;
    stored.shape = tensor.shape;
    for (float value : tensor.values) {
      const std::uint16_t half =
          dtype == DType::kFloat16 ? format::float_to_half(value) : format::float_to_bfloat16(value);
      const void* element = dtype == DType::kFloat32 ? static_cast<const void*>(&value) : &half;
      stored.bytes.append(static_cast<const char*>(element), dtype_bytes(dtype));
    }
  }
  return file.bytes();
}

// A model that is small enough for the oracle. Its weights are multiples of 1/128 up to 1.5, exact in every file dtype.
struct TestModel {
  nlohmann::json config;
  TestTensors tensors;

  explicit TestModel(const std::string& architecture, nlohmann::json changes = nlohmann::json::object()) {
    config = {{"architectures", {architecture}},
              {"vocab_size", 61},
              {"hidden_size", 48},
              {"intermediate_size", 80},
              {"num_hidden_layers", 3},
              {"num_attention_heads", 4},
              {"num_key_value_heads", 2},
              {"head_dim", 32},
              {"rms_norm_eps", 1e-5},
              {"rope_theta", 10000.0},
              {"tie_word_embeddings", true},
              {"max_position_embeddings", 512}};
    config.update(changes);
    const auto get = [&](const char* key) { return config[key].get<std::int64_t>(); };
    const std::int64_t hidden = get("hidden_size"), vocab = get("vocab_size"), inner = get("intermediate_size");
    const std::int64_t q = get("num_attention_heads") * get("head_dim"),
                       kv = get("num_key_value_heads") * get("head_dim");
    const bool qwen2 = architecture == "Qwen2ForCausalLM", qwen3 = architecture == "Qwen3ForCausalLM";
    const bool attention_bias = config.value("attention_bias", false);
    Random random(7);
    const auto add = [&](const std::string& name, std::vector<std::int64_t> shape) {
      TestTensor& tensor = tensors[name];
      tensor.shape = std::move(shape);
      std::int64_t count = 1;
      for (std::int64_t extent : tensor.shape) count *= extent;
      const bool norm = name.find("norm") != std::string::npos;
      for (std::int64_t i = 0; i < count; ++i) {
        const double value = norm ? random.uniform(0.5, 1.5) : random.uniform(-0.4, 0.4);
        tensor.values.push_back(static_cast<float>(std::round(value * 128.0) / 128.0));
      }
    };
    const auto add_linear = [&](const std::string& name, std::int64_t out, std::int64_t in, bool bias) {
      add(name + ".weight", {out, in});
      if (bias) add(name + ".bias", {out});
    };
    add("model.embed_tokens.weight", {vocab, hidden});
    add("model.norm.weight", {hidden});
    if (!config["tie_word_embeddings"].get<bool>()) add("lm_head.weight", {vocab, hidden});
    for (std::int64_t i = 0; i < get("num_hidden_layers"); ++i) {
      const std::string prefix = "model.layers." + std::to_string(i) + ".";
      add(prefix + "input_layernorm.weight", {hidden});
      add(prefix + "post_attention_layernorm.weight", {hidden});
      add_linear(prefix + "self_attn.q_proj", q, hidden, qwen2 || attention_bias);
      add_linear(prefix + "self_attn.k_proj", kv, hidden, qwen2 || attention_bias);
      add_linear(prefix + "self_attn.v_proj", kv, hidden, qwen2 || attention_bias);
      add_linear(prefix + "self_attn.o_proj", hidden, q, attention_bias);
      if (qwen3) add(prefix + "self_attn.q_norm.weight", {get("head_dim")});
      if (qwen3) add(prefix + "self_attn.k_norm.weight", {get("head_dim")});
      add_linear(prefix + "mlp.gate_proj", inner, hidden, config.value("mlp_bias", false));
      add_linear(prefix + "mlp.up_proj", inner, hidden, config.value("mlp_bias", false));
      add_linear(prefix + "mlp.down_proj", hidden, inner, config.value("mlp_bias", false));
    }
  }

  void save(const TempDir& dir, DType dtype = DType::kFloat32) const {
    dir.write("config.json", config.dump());
    dir.write("model.safetensors", safetensors_bytes(tensors, dtype));
  }
};

// The logits [tokens.size(), vocab_size] by the oracle.
inline std::vector<double> oracle_logits(const TestModel& model, const std::vector<std::int32_t>& tokens) {
  using Row = std::vector<double>;
  const nlohmann::json& c = model.config;
  const auto get = [&](const char* key) { return c[key].get<int>(); };
  const int head_size = get("head_dim"), num_q = get("num_attention_heads"), num_kv = get("num_key_value_heads");
  const double eps = c["rms_norm_eps"].get<double>();
  const auto weights = [&](const std::string& name) -> const TestTensor& { return model.tensors.at(name); };
  const auto matvec = [&](const std::string& name, const Row& x) {
    const TestTensor& w = weights(name + ".weight");
    Row y(static_cast<std::size_t>(w.shape[0]));
    for (std::size_t o = 0; o < y.size(); ++o) {
      for (std::size_t i = 0; i < x.size(); ++i) y[o] += static_cast<double>(w.values[o * x.size() + i]) * x[i];
      if (model.tensors.count(name + ".bias") != 0) y[o] += static_cast<double>(weights(name + ".bias").values[o]);
    }
    return y;
  };
  const auto normed = [&](const std::string& name, const Row& x, std::size_t begin, std::size_t count) {
    double sum = 0.0;
    for (std::size_t i = 0; i < count; ++i) sum += x[begin + i] * x[begin + i];
    Row y(count);
    for (std::size_t i = 0; i < count; ++i) {
      y[i] = x[begin + i] / std::sqrt(sum / static_cast<double>(count) + eps) *
             static_cast<double>(weights(name).values[i]);
    }
    return y;
  };
  const auto head_norm = [&](const std::string& name, Row& heads) {
    if (model.tensors.count(name) == 0) return;
    for (std::size_t at = 0; at < heads.size(); at += static_cast<std::size_t>(head_size)) {
      const Row head = normed(name, heads, at, static_cast<std::size_t>(head_size));
      std::copy(head.begin(), head.end(), heads.begin() + static_cast<std::ptrdiff_t>(at));
    }
  };
  const auto rope = [&](Row& heads, int position) {
    const nlohmann::json scaling = c.value("rope_scaling", nlohmann::json::object());
    const auto setting = [&](const char* key) { return scaling[key].get<double>(); };
    const std::string type = scaling.value("rope_type", "default");
    const int half = head_size / 2;
    for (std::size_t at = 0; at < heads.size(); at += static_cast<std::size_t>(head_size)) {
      for (int i = 0; i < half; ++i) {
        double frequency = 1.0 / std::pow(c["rope_theta"].get<double>(), 2.0 * i / head_size);
        if (type == "linear") frequency /= setting("factor");
        if (type == "llama3") {
          // By wavelength, as the scaling was published.
          const double wavelength = 2.0 * std::numbers::pi / frequency;
          const double old_context = setting("original_max_position_embeddings");
          const double low = old_context / setting("low_freq_factor"), high = old_context / setting("high_freq_factor");
          if (wavelength > low) {
            frequency /= setting("factor");
          } else if (wavelength >= high) {
            const double smooth = (old_context / wavelength - setting("low_freq_factor")) /
                                  (setting("high_freq_factor") - setting("low_freq_factor"));
            frequency = (1.0 - smooth) * frequency / setting("factor") + smooth * frequency;
          }
        }
        double& a = heads[at + static_cast<std::size_t>(i)];
        double& b = heads[at + static_cast<std::size_t>(i + half)];
        const double cosine = std::cos(position * frequency), sine = std::sin(position * frequency);
        std::tie(a, b) = std::pair(a * cosine - b * sine, b * cosine + a * sine);
      }
    }
  };

  const std::size_t n = tokens.size();
  std::vector<Row> hidden(n);
  for (std::size_t t = 0; t < n; ++t) {
    const auto size = static_cast<std::size_t>(get("hidden_size"));
    const float* row = weights("model.embed_tokens.weight").values.data() + static_cast<std::size_t>(tokens[t]) * size;
    hidden[t].assign(row, row + size);
  }
  const int window = c.value("sliding_window", 1 << 30);
  for (int layer = 0; layer < get("num_hidden_layers"); ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    std::vector<Row> keys(n), values(n);
    for (std::size_t t = 0; t < n; ++t) {
      const Row x = normed(prefix + "input_layernorm.weight", hidden[t], 0, hidden[t].size());
      Row q = matvec(prefix + "self_attn.q_proj", x);
      keys[t] = matvec(prefix + "self_attn.k_proj", x);
      values[t] = matvec(prefix + "self_attn.v_proj", x);
      head_norm(prefix + "self_attn.q_norm.weight", q);
      head_norm(prefix + "self_attn.k_norm.weight", keys[t]);
      rope(q, static_cast<int>(t));
      rope(keys[t], static_cast<int>(t));
      Row attended(q.size());
      for (int h = 0; h < num_q; ++h) {
        const auto q_at = static_cast<std::size_t>(h * head_size);
        const auto kv_at = static_cast<std::size_t>(h / (num_q / num_kv) * head_size);
        const std::size_t first =
            t + 1 > static_cast<std::size_t>(window) ? t + 1 - static_cast<std::size_t>(window) : 0;
        std::vector<double> p(t + 1);
        double sum = 0.0;
        for (std::size_t j = first; j <= t; ++j) {
          for (std::size_t i = 0; i < static_cast<std::size_t>(head_size); ++i)
            p[j] += q[q_at + i] * keys[j][kv_at + i];
          p[j] = std::exp(p[j] / std::sqrt(static_cast<double>(head_size)));
          sum += p[j];
        }
        for (std::size_t j = first; j <= t; ++j) {
          for (std::size_t i = 0; i < static_cast<std::size_t>(head_size); ++i) {
            attended[q_at + i] += p[j] / sum * values[j][kv_at + i];
          }
        }
      }
      const Row projected = matvec(prefix + "self_attn.o_proj", attended);
      for (std::size_t i = 0; i < hidden[t].size(); ++i) hidden[t][i] += projected[i];
      const Row y = normed(prefix + "post_attention_layernorm.weight", hidden[t], 0, hidden[t].size());
      Row gate = matvec(prefix + "mlp.gate_proj", y);
      const Row up = matvec(prefix + "mlp.up_proj", y);
      for (std::size_t i = 0; i < gate.size(); ++i) gate[i] = gate[i] / (1.0 + std::exp(-gate[i])) * up[i];
      const Row down = matvec(prefix + "mlp.down_proj", gate);
      for (std::size_t i = 0; i < hidden[t].size(); ++i) hidden[t][i] += down[i];
    }
  }
  std::vector<double> logits;
  for (std::size_t t = 0; t < n; ++t) {
    const bool tied = c["tie_word_embeddings"].get<bool>();
    const Row x = normed("model.norm.weight", hidden[t], 0, hidden[t].size());
    const Row row = matvec(tied ? "model.embed_tokens" : "lm_head", x);
    logits.insert(logits.end(), row.begin(), row.end());
  }
  return logits;
}

inline std::vector<ModeInfo> modes_of(std::initializer_list<const char*> names) {
  std::vector<ModeInfo> modes;
  for (const char* name : names) modes.push_back(**mode_info(mode_of(name)));
  return modes;
}

// The logits of every token, when the sequence runs in pieces of at most `chunk` tokens.
inline std::vector<float> run_logits(llm::Model& model, const std::vector<std::int32_t>& tokens,
                                     const std::string& mode, std::int64_t chunk = 1 << 20) {
  constexpr int kBlockSize = 16;
  const auto n = static_cast<std::int64_t>(tokens.size());
  const auto vocab_size = static_cast<std::size_t>(model.config().vocab_size);
  const auto id = parse_kv_cache_dtype(mode);
  EXPECT_TRUE(id.ok()) << id.status().message();
  auto cache = llm::KVCache::create(model.config(),
                                    {.layer_modes = {*id}, .block_size = kBlockSize, .num_blocks = n / kBlockSize + 1});
  EXPECT_TRUE(cache.ok()) << cache.status().message();
  llm::BlockAllocator allocator(cache->num_blocks(), kBlockSize, false);
  llm::Sequence sequence{.tokens = tokens, .blocks = {}};
  EXPECT_TRUE(allocator.reserve(sequence, n));
  std::vector<float> logits(tokens.size() * vocab_size);
  while (sequence.num_stored < n) {
    const std::int64_t count = std::min(chunk, n - sequence.num_stored);
    llm::Batch batch;
    batch.add(sequence, count, count, kBlockSize);
    const Status status =
        model.forward(batch, *cache, logits.data() + static_cast<std::size_t>(sequence.num_stored) * vocab_size);
    EXPECT_TRUE(status.ok()) << status.message();
    sequence.num_stored += count;
  }
  return logits;
}

// A .npy file, version 1.0.
inline std::string npy_bytes(const std::string& descr, const std::string& shape, const std::string& data) {
  std::string header = "{'descr': '" + descr + "', 'fortran_order': False, 'shape': " + shape + ", }\n";
  std::string out = std::string("\x93NUMPY\x01\x00", 8);
  out.push_back(static_cast<char>(header.size() & 0xff));
  out.push_back(static_cast<char>(header.size() >> 8));
  return out + header + data;
}

}  // namespace quire::testing
