#include "llm/config.h"

#include <cmath>
#include <nlohmann/json.hpp>
#include <numbers>
#include <optional>

#include "llm/read_file.h"

namespace quire::llm {
namespace {

using nlohmann::json;

struct Architecture {
  const char* name;
  bool always_qkv_bias;
  bool attention_bias_covers_output;  // what "attention_bias": true means for o_proj
  bool qk_norm;
  bool window_by_default;  // sliding_window counts even without use_sliding_window
};

constexpr Architecture kArchitectures[] = {
    {"LlamaForCausalLM", false, true, false, false},
    {"MistralForCausalLM", false, false, false, true},
    {"Qwen2ForCausalLM", true, false, false, false},
    {"Qwen3ForCausalLM", false, true, true, false},
};

// Reads typed fields and keeps the first refusal, so that the parsing below reads as a list.
class Fields {
 public:
  Fields(const json& object, std::string source) : object_(object), source_(std::move(source)) {}

  // Null and absent are the same: the field is not given.
  const json* find(const char* key) const {
    const auto found = object_.find(key);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }

  // An integer in [low, high]; without a default the field is required.
  std::int64_t integer(const char* key, std::int64_t low, std::int64_t high, std::optional<std::int64_t> missing = {}) {
    const json* value = find(key);
    if (value == nullptr) {
      if (!missing) refuse(std::string("\"") + key + "\" is missing");
      return missing.value_or(low);
    }
    const bool in_range = value->is_number_integer() &&
                          !(value->is_number_unsigned() && value->get<std::uint64_t>() > INT64_MAX) &&
                          value->get<std::int64_t>() >= low && value->get<std::int64_t>() <= high;
    if (!in_range) {
      refuse(std::string("\"") + key + "\" is " + shown(*value) + ", expected an integer from " + std::to_string(low) +
             " to " + std::to_string(high));
      return low;
    }
    return value->get<std::int64_t>();
  }

  // A finite number greater than zero.
  double positive(const char* key, double missing) {
    const json* value = find(key);
    if (value == nullptr) return missing;
    const double number = value->is_number() ? value->get<double>() : 0.0;
    if (!(number > 0.0) || !std::isfinite(number)) {
      refuse(std::string("\"") + key + "\" is " + shown(*value) + ", expected a number above 0");
      return missing;
    }
    return number;
  }

  bool boolean(const char* key, bool missing) {
    const json* value = find(key);
    if (value == nullptr) return missing;
    if (!value->is_boolean()) refuse(std::string("\"") + key + "\" is " + shown(*value) + ", expected true or false");
    return value->is_boolean() && value->get<bool>();
  }

  std::string text(const char* key, const std::string& missing) {
    const json* value = find(key);
    if (value == nullptr) return missing;
    if (!value->is_string()) refuse(std::string("\"") + key + "\" is " + shown(*value) + ", expected a string");
    return value->is_string() ? value->get<std::string>() : missing;
  }

  void refuse(const std::string& reason, StatusCode code = StatusCode::kInvalidArgument) {
    if (status_.ok()) status_ = Status(code, source_ + ": " + reason);
  }
  const Status& status() const { return status_; }

  // A value as it appears in a message: printable ASCII, cut to a length that fits.
  static std::string shown(const json& value) {
    std::string dumped = value.dump(-1, ' ', true, json::error_handler_t::replace);
    if (dumped.size() > 60) dumped = dumped.substr(0, 57) + "...";
    return dumped;
  }

 private:
  const json& object_;
  std::string source_;
  Status status_;
};

// "rope_scaling", or "rope_parameters" of newer folders, which also holds the theta.
void parse_rope(const json& object, const std::string& source, RopeConfig& rope, Fields& outer) {
  if (!object.is_object()) {
    outer.refuse("the rope settings are " + Fields::shown(object) + ", expected an object");
    return;
  }
  Fields fields(object, source);
  rope.theta = fields.positive("rope_theta", rope.theta);
  const std::string type = fields.text("rope_type", fields.text("type", "default"));
  if (type == "linear") {
    rope.scaling = RopeConfig::Scaling::kLinear;
    rope.factor = fields.positive("factor", 1.0);
  } else if (type == "llama3") {
    rope.scaling = RopeConfig::Scaling::kLlama3;
    rope.factor = fields.positive("factor", 8.0);
    rope.low_freq_factor = fields.positive("low_freq_factor", 1.0);
    rope.high_freq_factor = fields.positive("high_freq_factor", 4.0);
    rope.original_max_position = fields.integer("original_max_position_embeddings", 1, 1 << 30, 8192);
    if (!(rope.high_freq_factor > rope.low_freq_factor)) {
      fields.refuse("\"high_freq_factor\" must be above \"low_freq_factor\"");
    }
  } else if (type != "default") {
    fields.refuse("rope scaling " + Fields::shown(type) + " is not supported; supported are default, linear, llama3",
                  StatusCode::kUnsupported);
  }
  if (!fields.status().ok()) outer.refuse(fields.status().message().substr(source.size() + 2), fields.status().code());
}

}  // namespace

Result<ModelConfig> parse_config(const std::string& json_text, const std::string& source) {
  const json object = json::parse(json_text, nullptr, /*allow_exceptions=*/false);
  if (object.is_discarded()) return invalid_argument(source + ": not JSON");
  if (!object.is_object()) return invalid_argument(source + ": not a JSON object");
  Fields fields(object, source);

  const json* names = fields.find("architectures");
  if (names == nullptr || !names->is_array() || names->size() != 1 || !(*names)[0].is_string()) {
    return invalid_argument(source + ": \"architectures\" must be a list of one name");
  }
  ModelConfig config;
  config.architecture = (*names)[0].get<std::string>();
  const Architecture* architecture = nullptr;
  std::string supported;
  for (const Architecture& known : kArchitectures) {
    if (config.architecture == known.name) architecture = &known;
    supported += (supported.empty() ? "" : ", ") + std::string(known.name);
  }
  if (architecture == nullptr) {
    return unsupported(source + ": architecture " + Fields::shown((*names)[0]) + " is not supported; supported are " +
                       supported);
  }

  // The bounds are far above any model and keep every product of two sizes inside an int.
  constexpr std::int64_t kMaxSize = 1 << 20;
  config.vocab_size = static_cast<int>(fields.integer("vocab_size", 1, 1 << 24));
  config.hidden_size = static_cast<int>(fields.integer("hidden_size", 1, kMaxSize));
  config.intermediate_size = static_cast<int>(fields.integer("intermediate_size", 1, kMaxSize));
  config.num_layers = static_cast<int>(fields.integer("num_hidden_layers", 1, 1024));
  config.num_q_heads = static_cast<int>(fields.integer("num_attention_heads", 1, 1024));
  config.num_kv_heads = static_cast<int>(fields.integer("num_key_value_heads", 1, 1024, config.num_q_heads));
  config.head_size =
      static_cast<int>(fields.integer("head_dim", 2, 1024, std::max(config.hidden_size / config.num_q_heads, 2)));
  config.rms_norm_eps = static_cast<float>(fields.positive("rms_norm_eps", 1e-6));
  config.max_position = fields.integer("max_position_embeddings", 1, 1 << 30, 2048);
  config.tied_embeddings = fields.boolean("tie_word_embeddings", false);
  config.mlp_bias = fields.boolean("mlp_bias", false);
  config.qk_norm = architecture->qk_norm;
  const bool attention_bias = fields.boolean("attention_bias", false);
  config.qkv_bias = architecture->always_qkv_bias || attention_bias;
  config.output_bias = attention_bias && architecture->attention_bias_covers_output;
  config.rope.theta = fields.positive("rope_theta", 10000.0);
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (const json* rope = fields.find(key)) parse_rope(*rope, source, config.rope, fields);
  }
  config.bos_token_id = static_cast<int>(fields.integer("bos_token_id", 0, config.vocab_size - 1, -1));
  if (const json* eos = fields.find("eos_token_id")) {
    const json list = eos->is_array() ? *eos : json::array({*eos});
    for (const json& id : list) {
      if (!id.is_number_integer() || id.get<std::int64_t>() < 0 || id.get<std::int64_t>() >= config.vocab_size) {
        fields.refuse("\"eos_token_id\" is " + Fields::shown(*eos) + ", expected token ids below " +
                      std::to_string(config.vocab_size));
        break;
      }
      config.eos_token_ids.push_back(id.get<std::int32_t>());
    }
  }

  const std::string dtype = fields.text("torch_dtype", fields.text("dtype", "bfloat16"));
  if (dtype == "bfloat16") {
    config.dtype = DType::kBFloat16;
  } else if (dtype == "float16") {
    config.dtype = DType::kFloat16;
  } else if (dtype == "float32") {
    config.dtype = DType::kFloat32;
  } else {
    fields.refuse("dtype " + Fields::shown(dtype) + " is not supported; supported are float32, float16, bfloat16",
                  StatusCode::kUnsupported);
  }

  const auto window = fields.integer("sliding_window", 1, 1 << 30, -1);
  const bool window_on = fields.boolean("use_sliding_window", architecture->window_by_default);
  if (window_on && architecture->window_by_default) config.sliding_window = static_cast<int>(window);
  if (window_on && !architecture->window_by_default) {
    fields.refuse("\"use_sliding_window\" is not supported for " + config.architecture, StatusCode::kUnsupported);
  }
  const std::string activation = fields.text("hidden_act", "silu");
  if (activation != "silu") {
    fields.refuse("\"hidden_act\" " + Fields::shown(activation) + " is not supported; supported is silu",
                  StatusCode::kUnsupported);
  }
  if (fields.find("quantization_config") != nullptr) {
    fields.refuse("quantized weights (\"quantization_config\") are not supported", StatusCode::kUnsupported);
  }
  if (const json* layers = fields.find("layer_types")) {
    for (const json& type : layers->is_array() ? *layers : json::array()) {
      if (type != "full_attention" && config.sliding_window < 0) {
        fields.refuse("layer type " + Fields::shown(type) + " is not supported; supported is full_attention",
                      StatusCode::kUnsupported);
      }
    }
  }
  if (fields.positive("partial_rotary_factor", 1.0) != 1.0) {
    fields.refuse("\"partial_rotary_factor\" is not supported", StatusCode::kUnsupported);
  }

  if (config.num_q_heads % config.num_kv_heads != 0) {
    fields.refuse("\"num_attention_heads\" " + std::to_string(config.num_q_heads) +
                  " is not a multiple of \"num_key_value_heads\" " + std::to_string(config.num_kv_heads));
  }
  if (fields.find("head_dim") == nullptr && config.hidden_size % config.num_q_heads != 0) {
    fields.refuse("\"hidden_size\" " + std::to_string(config.hidden_size) +
                  " is not a multiple of \"num_attention_heads\" " + std::to_string(config.num_q_heads));
  }
  if (config.head_size % 2 != 0) {
    fields.refuse("head size " + std::to_string(config.head_size) + " is odd, rotary positions need pairs");
  }
  if (!fields.status().ok()) return fields.status();
  return config;
}

Result<ModelConfig> load_config(const std::string& model_dir) {
  const std::string path = model_dir + "/config.json";
  const Result<std::string> text = read_file(path);
  if (text.ok()) return parse_config(*text, path);
  const bool missing = text.status().code() == StatusCode::kNotFound;
  return Status(text.status().code(),
                text.status().message() + (missing ? "; a model is a folder with config.json and safetensors" : ""));
}

std::vector<double> rope_frequencies(const RopeConfig& rope, int head_size) {
  std::vector<double> frequencies(static_cast<std::size_t>(head_size / 2));
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    double frequency = std::pow(rope.theta, -2.0 * static_cast<double>(i) / head_size);
    if (rope.scaling == RopeConfig::Scaling::kLinear) frequency /= rope.factor;
    if (rope.scaling == RopeConfig::Scaling::kLlama3) {
      // A frequency that makes many turns over the original context stays as it was, and one that makes few is slower
      // by `factor`; between them lies a linear blend.
      const double turns = static_cast<double>(rope.original_max_position) * frequency / (2.0 * std::numbers::pi);
      const double blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
      const double keep = std::min(std::max(blend, 0.0), 1.0);
      frequency = keep * frequency + (1.0 - keep) * frequency / rope.factor;
    }
    frequencies[i] = frequency;
  }
  return frequencies;
}

}  // namespace quire::llm
