#include "llm/model.h"

#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <new>
#include <nlohmann/json.hpp>

#include "format/float_types.h"
#include "llm/read_file.h"
#include "llm/safetensors.h"

#ifdef _OPENMP
#include <omp.h>
#endif

// OpenBLAS's own threads would compete with OpenMP's. Other BLAS libraries do not have this function.
extern "C" void openblas_set_num_threads(int num_threads) __attribute__((weak));

namespace quire::llm {
namespace {

int max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// x[row] = x[row] / rms(x[row]) .* weight, in place.
void rms_norm(float* x, const std::vector<float>& weight, std::int64_t rows, std::int64_t row_stride, float eps) {
  const auto size = static_cast<std::int64_t>(weight.size());
#pragma omp parallel for if (rows > 16)
  for (std::int64_t row = 0; row < rows; ++row) {
    float* values = x + row * row_stride;
    float sum = 0.0F;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < size; ++i) sum += values[i] * values[i];
    const float inv_rms = 1.0F / std::sqrt(sum / static_cast<float>(size) + eps);
    for (std::int64_t i = 0; i < size; ++i) values[i] *= inv_rms * weight[static_cast<std::size_t>(i)];
  }
}

// x in a 16-bit float type.
void convert_to(DType dtype, const float* x, std::int64_t count, std::vector<std::uint16_t>& out) {
  out.resize(static_cast<std::size_t>(count));
  if (dtype == DType::kBFloat16) {
    std::transform(x, x + count, out.begin(), [](float value) { return format::float_to_bfloat16(value); });
  } else {
    std::transform(x, x + count, out.begin(), [](float value) { return format::float_to_half(value); });
  }
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

}  // namespace

void Batch::add(const Sequence& sequence, std::int64_t count, std::int64_t num_logits, int block_size) {
  const std::int64_t begin = sequence.num_stored, end = begin + count;
  for (std::int64_t p = begin; p < end; ++p) {
    token_ids.push_back(sequence.tokens[static_cast<std::size_t>(p)]);
    positions.push_back(static_cast<std::int32_t>(p));
    slot_mapping.push_back(std::int64_t{sequence.blocks[static_cast<std::size_t>(p / block_size)]} * block_size +
                           p % block_size);
    if (p >= end - num_logits) logit_rows.push_back(static_cast<std::int32_t>(num_tokens() - 1));
  }
  cu_seqlens_q.push_back(static_cast<std::int32_t>(num_tokens()));
  seq_lens.push_back(static_cast<std::int32_t>(end));
  const auto used = static_cast<std::ptrdiff_t>((end + block_size - 1) / block_size);
  blocks.emplace_back(sequence.blocks.begin(), sequence.blocks.begin() + used);
}

// ---- loading --------------------------------------------------------------------------------------------------------

// Finds tensors in one file or many and hands them out as checked fp32 arrays. Keeps the first refusal; after one it
// hands out nothing, so a list of loads needs a single check at its end.
class Model::Loader {
 public:
  explicit Loader(std::string model_dir) : model_dir_(std::move(model_dir)) {}

  Status open() {
    namespace fs = std::filesystem;
    const std::string single = model_dir_ + "/model.safetensors", index = single + ".index.json";
    std::error_code error;
    if (fs::exists(single, error) || !fs::exists(index, error)) return add_file(single);
    const Result<std::string> text = read_file(index);
    if (!text.ok()) return text.status();
    const auto object = nlohmann::json::parse(*text, nullptr, /*allow_exceptions=*/false);
    if (!object.is_object() || !object.contains("weight_map") || !object["weight_map"].is_object()) {
      return invalid_argument(index + ": not JSON with a \"weight_map\"");
    }
    std::map<std::string, bool> opened;
    for (const auto& [tensor, shard] : object["weight_map"].items()) {
      // A shard is a file of this folder, not a path out of it.
      if (!shard.is_string() || fs::path(shard.get<std::string>()).filename() != shard.get<std::string>()) {
        return invalid_argument(index + ": a \"weight_map\" entry is not a file name");
      }
      const auto name = shard.get<std::string>();
      if (opened.emplace(name, true).second) {
        if (Status status = add_file(model_dir_ + "/" + name); !status) return status;
      }
    }
    return {};
  }

  bool contains(const std::string& name) const { return find(name) != nullptr; }
  const Status& status() const { return status_; }

  // Appends the tensor's elements to `out`.
  void append(const std::string& name, const std::vector<std::int64_t>& shape, std::vector<float>& out) {
    if (!status_.ok()) return;
    const SafetensorsFile* file = find(name);
    if (file == nullptr) {
      status_ = not_found(model_dir_ + ": the model has no tensor '" + name + "'");
      return;
    }
    const Result<Tensor> tensor = file->tensor(name);
    if (!tensor.ok()) {
      status_ = tensor.status();
      return;
    }
    const std::vector<std::int64_t> found(tensor->shape, tensor->shape + tensor->ndim);
    if (found != shape) {
      status_ = invalid_argument(file->path() + ": tensor '" + name + "' has shape " + shape_text(found) +
                                 ", config.json asks for " + shape_text(shape));
      return;
    }
    const std::size_t begin = out.size(), count = static_cast<std::size_t>(tensor->numel());
    out.resize(begin + count);
    const auto* halves = tensor->ptr<const std::uint16_t>();
    switch (tensor->dtype) {
      case DType::kFloat32:
        if (count > 0) std::memcpy(out.data() + begin, tensor->data, count * sizeof(float));
        break;
      case DType::kBFloat16:
        for (std::size_t i = 0; i < count; ++i) out[begin + i] = format::bfloat16_to_float(halves[i]);
        break;
      case DType::kFloat16:
        for (std::size_t i = 0; i < count; ++i) out[begin + i] = format::half_to_float(halves[i]);
        break;
      default:
        status_ = unsupported(file->path() + ": tensor '" + name + "' is " + std::string(dtype_name(tensor->dtype)) +
                              "; supported are float32, float16, bfloat16");
    }
  }

  std::vector<float> vector(const std::string& name, std::int64_t size) {
    std::vector<float> out;
    append(name, {size}, out);
    return out;
  }

  // The rows of several matrices, one under the other, so that one product serves them all.
  struct Rows {
    const char* name;
    int out;
  };
  Linear linear(const std::string& prefix, const std::vector<Rows>& parts, int in, bool bias) {
    Linear linear;
    linear.in = in;
    for (const Rows& part : parts) {
      append(prefix + part.name + ".weight", {part.out, in}, linear.weight);
      if (bias) append(prefix + part.name + ".bias", {part.out}, linear.bias);
      linear.out += part.out;
    }
    return linear;
  }

 private:
  Status add_file(const std::string& path) {
    Result<SafetensorsFile> file = SafetensorsFile::open(path);
    if (!file.ok()) return file.status();
    files_.push_back(std::move(*file));
    return {};
  }

  const SafetensorsFile* find(const std::string& name) const {
    const auto found =
        std::find_if(files_.begin(), files_.end(), [&](const auto& file) { return file.contains(name); });
    return found == files_.end() ? nullptr : &*found;
  }

  std::string model_dir_;
  std::vector<SafetensorsFile> files_;
  Status status_;
};

Result<Model> Model::load(const std::string& model_dir) try {
  Result<ModelConfig> parsed = load_config(model_dir);
  if (!parsed.ok()) return parsed.status();
  Model model;
  model.config_ = std::move(*parsed);
  const ModelConfig& c = model.config_;
  Loader loader(model_dir);
  if (Status status = loader.open(); !status) return status;

  loader.append("model.embed_tokens.weight", {c.vocab_size, c.hidden_size}, model.embedding_);
  for (int i = 0; i < c.num_layers && loader.status().ok(); ++i) {
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    Layer layer;
    layer.input_norm = loader.vector(prefix + "input_layernorm.weight", c.hidden_size);
    layer.post_attention_norm = loader.vector(prefix + "post_attention_layernorm.weight", c.hidden_size);
    if (c.qk_norm) {
      layer.q_norm = loader.vector(prefix + "self_attn.q_norm.weight", c.head_size);
      layer.k_norm = loader.vector(prefix + "self_attn.k_norm.weight", c.head_size);
    }
    layer.qkv =
        loader.linear(prefix + "self_attn.", {{"q_proj", c.q_size()}, {"k_proj", c.kv_size()}, {"v_proj", c.kv_size()}},
                      c.hidden_size, c.qkv_bias);
    layer.output = loader.linear(prefix + "self_attn.", {{"o_proj", c.hidden_size}}, c.q_size(), c.output_bias);
    layer.gate_up =
        loader.linear(prefix + "mlp.", {{"gate_proj", c.intermediate_size}, {"up_proj", c.intermediate_size}},
                      c.hidden_size, c.mlp_bias);
    layer.down = loader.linear(prefix + "mlp.", {{"down_proj", c.hidden_size}}, c.intermediate_size, c.mlp_bias);
    model.layers_.push_back(std::move(layer));
  }
  model.final_norm_ = loader.vector("model.norm.weight", c.hidden_size);
  if (!c.tied_embeddings) model.head_ = loader.linear("", {{"lm_head", c.vocab_size}}, c.hidden_size, false);
  if (!loader.status().ok()) return loader.status();

  model.inv_freq_ = rope_frequencies(c.rope, c.head_size);
  if (openblas_set_num_threads != nullptr) openblas_set_num_threads(1);
  return model;
} catch (const std::bad_alloc&) {
  return internal_error(model_dir + ": there is not enough memory for the weights");
}

// ---- running --------------------------------------------------------------------------------------------------------

namespace {

// y [rows, out] = x [rows, in] * weight^T + bias. Threads share the columns of y; each calls a single-threaded BLAS.
void multiply(const float* weight, const std::vector<float>& bias, int out, int in, const float* x, std::int64_t rows,
              float* y) {
  constexpr int kColumns = 64;          // a thread's share of the columns is a multiple of this
  constexpr std::int64_t kFewRows = 3;  // up to here reading the weights is all the work: matrix-vector products
  const int panels = (out + kColumns - 1) / kColumns;
  const int threads = std::min(max_threads(), panels);
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int t = 0; t < threads; ++t) {
    const int begin = panels * t / threads * kColumns, end = std::min(panels * (t + 1) / threads * kColumns, out);
    const float* w = weight + std::int64_t{begin} * in;
    for (std::int64_t row = 0; row < rows && !bias.empty(); ++row) {
      std::copy(bias.begin() + begin, bias.begin() + end, y + row * out + begin);
    }
    const float beta = bias.empty() ? 0.0F : 1.0F;
    if (rows > kFewRows) {
      cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, static_cast<int>(rows), end - begin, in, 1.0F, x, in, w, in,
                  beta, y + begin, out);
      continue;
    }
    for (std::int64_t row = 0; row < rows; ++row) {
      cblas_sgemv(CblasRowMajor, CblasNoTrans, end - begin, in, 1.0F, w, in, x + row * in, 1, beta,
                  y + row * out + begin, 1);
    }
  }
}

}  // namespace

void Model::Linear::run(const float* x, std::int64_t rows, float* y) const {
  multiply(weight.data(), bias, out, in, x, rows, y);
}

// Element i of a head pairs with element i + head_size / 2 and turns by position * inv_freq[i].
void Model::rope(float* heads, int num_heads, std::int64_t num_tokens) const {
  const int half = config_.head_size / 2;
  const std::int64_t row_stride = config_.q_size() + 2 * config_.kv_size();
#pragma omp parallel for if (num_tokens > 16)
  for (std::int64_t token = 0; token < num_tokens; ++token) {
    const float* cosine = cos_sin_.data() + token * 2 * half;
    const float* sine = cosine + half;
    for (int head = 0; head < num_heads; ++head) {
      float* low = heads + token * row_stride + std::int64_t{head} * config_.head_size;
      float* high = low + half;
      for (int i = 0; i < half; ++i) {
        const float a = low[i], b = high[i];
        low[i] = a * cosine[i] - b * sine[i];
        high[i] = b * cosine[i] + a * sine[i];
      }
    }
  }
}

// Reads normed_ and writes projected_, by attention through the cache.
Status Model::attention_block(int layer_index, const Batch& batch, const Tensor& block_table, KVCache& cache) {
  const Layer& layer = layers_[static_cast<std::size_t>(layer_index)];
  const ModelConfig& c = config_;
  const std::int64_t n = batch.num_tokens(), row_stride = c.q_size() + 2 * c.kv_size();
  float* q = qkv_.data();  // [n, q | k | v]: the ops read k, v and q where the product left them
  float* k = q + c.q_size();
  float* v = k + c.kv_size();
  layer.qkv.run(normed_.data(), n, q);
  if (c.qk_norm) {
    for (int h = 0; h < c.num_q_heads; ++h) rms_norm(q + h * c.head_size, layer.q_norm, n, row_stride, c.rms_norm_eps);
    for (int h = 0; h < c.num_kv_heads; ++h) rms_norm(k + h * c.head_size, layer.k_norm, n, row_stride, c.rms_norm_eps);
  }
  rope(q, c.num_q_heads, n);
  rope(k, c.num_kv_heads, n);
  const std::int64_t kv_size = 2 * c.kv_size();
  if (recorded_ != nullptr) {
    recorded_->resize(layers_.size());
    std::vector<float>& tape = (*recorded_)[static_cast<std::size_t>(layer_index)];
    tape.resize(static_cast<std::size_t>(n * kv_size));
    for (std::int64_t i = 0; i < n; ++i) std::copy_n(k + i * row_stride, kv_size, tape.data() + i * kv_size);
  } else if (replayed_ != nullptr) {
    const std::vector<float>& tape = replayed_->at(static_cast<std::size_t>(layer_index));
    for (std::int64_t i = 0; i < n; ++i) std::copy_n(tape.data() + i * kv_size, kv_size, k + i * row_stride);
  }
  void* handed_over = q;
  if (qkv_dtype_ != DType::kFloat32) {
    convert_to(qkv_dtype_, q, n * row_stride, qkv_16_);
    handed_over = qkv_16_.data();
  }
  const auto heads_of = [&](const float* first, int num_heads) {
    const auto offset = (first - q) * static_cast<std::ptrdiff_t>(dtype_bytes(qkv_dtype_));
    return Tensor::strided(static_cast<std::uint8_t*>(handed_over) + offset, qkv_dtype_, {n, num_heads, c.head_size},
                           {row_stride, c.head_size, 1});
  };
  const auto vector_of = [](const auto& values, DType dtype) {
    return ConstTensor::contiguous(values.data(), dtype, {static_cast<std::int64_t>(values.size())});
  };
  ReshapeAndCacheArgs store;
  store.key = heads_of(k, c.num_kv_heads);
  store.value = heads_of(v, c.num_kv_heads);
  store.slot_mapping = vector_of(batch.slot_mapping, DType::kInt64);
  if (Status status = cache.reshape_and_cache(layer_index, store); !status) return status;

  UnifiedAttentionArgs attend;
  attend.query = heads_of(q, c.num_q_heads);
  attend.out = Tensor::contiguous(attention_.data(), DType::kFloat32, {n, c.num_q_heads, c.head_size});
  attend.cu_seqlens_q = vector_of(batch.cu_seqlens_q, DType::kInt32);
  attend.seq_lens = vector_of(batch.seq_lens, DType::kInt32);
  attend.block_table = block_table;
  attend.softmax_scale = 1.0F / std::sqrt(static_cast<float>(c.head_size));
  attend.mask.sliding_window = c.sliding_window;
  if (Status status = cache.unified_attention(layer_index, attend); !status) return status;
  layer.output.run(attention_.data(), n, projected_.data());
  return {};
}

// Reads normed_ and writes projected_.
void Model::mlp_block(const Layer& layer, std::int64_t n) {
  const std::int64_t size = config_.intermediate_size;
  layer.gate_up.run(normed_.data(), n, gate_up_.data());
#pragma omp parallel for if (n > 4)
  for (std::int64_t token = 0; token < n; ++token) {
    const float* gate = gate_up_.data() + token * 2 * size;
    const float* up = gate + size;
    float* out = gated_.data() + token * size;
    for (std::int64_t i = 0; i < size; ++i) out[i] = gate[i] / (1.0F + std::exp(-gate[i])) * up[i];
  }
  layer.down.run(gated_.data(), n, projected_.data());
}

Status Model::check(const Batch& batch) const {
  for (std::size_t i = 0; i < batch.token_ids.size(); ++i) {
    if (batch.token_ids[i] < 0 || batch.token_ids[i] >= config_.vocab_size) {
      return out_of_range("token id " + std::to_string(batch.token_ids[i]) + " at position " +
                          std::to_string(batch.positions[i]) + " is outside the vocabulary of " +
                          std::to_string(config_.vocab_size));
    }
  }
  return {};
}

Status Model::forward(const Batch& batch, KVCache& cache, float* logits) {
  const ModelConfig& c = config_;
  const std::int64_t n = batch.num_tokens(), hidden_size = c.hidden_size, half = c.head_size / 2;
  if (n == 0) return {};
  if (Status status = check(batch); !status) return status;
  for (auto [scratch, row] : {std::pair(&hidden_, hidden_size),
                              {&normed_, hidden_size},
                              {&projected_, hidden_size},
                              {&qkv_, std::int64_t{c.q_size()} + 2 * c.kv_size()},
                              {&attention_, std::int64_t{c.q_size()}},
                              {&gate_up_, std::int64_t{2} * c.intermediate_size},
                              {&gated_, std::int64_t{c.intermediate_size}},
                              {&cos_sin_, 2 * half}}) {
    if (static_cast<std::int64_t>(scratch->size()) < n * row) scratch->resize(static_cast<std::size_t>(n * row));
  }

  // One rectangular table for the op; what lies past a sequence's own blocks is never read.
  std::size_t max_blocks = 1;
  for (const auto& blocks : batch.blocks) max_blocks = std::max(max_blocks, blocks.size());
  std::vector<std::int32_t> table(batch.blocks.size() * max_blocks, -1);
  for (std::size_t i = 0; i < batch.blocks.size(); ++i) {
    std::copy(batch.blocks[i].begin(), batch.blocks[i].end(),
              table.begin() + static_cast<std::ptrdiff_t>(i * max_blocks));
  }
  const Tensor block_table =
      Tensor::contiguous(table.data(), DType::kInt32, {batch.num_seqs(), static_cast<std::int64_t>(max_blocks)});

#pragma omp parallel for if (n > 16)
  for (std::int64_t token = 0; token < n; ++token) {
    const auto t = static_cast<std::size_t>(token);
    std::copy_n(embedding_.data() + batch.token_ids[t] * hidden_size, hidden_size,
                hidden_.data() + token * hidden_size);
    for (std::int64_t i = 0; i < half; ++i) {
      const double angle = batch.positions[t] * inv_freq_[static_cast<std::size_t>(i)];
      cos_sin_[static_cast<std::size_t>(token * 2 * half + i)] = static_cast<float>(std::cos(angle));
      cos_sin_[static_cast<std::size_t>((token * 2 + 1) * half + i)] = static_cast<float>(std::sin(angle));
    }
  }
  const auto add_projected = [&] {
    for (std::int64_t i = 0; i < n * hidden_size; ++i) {
      hidden_[static_cast<std::size_t>(i)] += projected_[static_cast<std::size_t>(i)];
    }
  };
  const auto norm_hidden = [&](const std::vector<float>& weight) {
    std::copy_n(hidden_.data(), n * hidden_size, normed_.data());
    rms_norm(normed_.data(), weight, n, hidden_size, c.rms_norm_eps);
  };
  for (int i = 0; i < c.num_layers; ++i) {
    const Layer& layer = layers_[static_cast<std::size_t>(i)];
    norm_hidden(layer.input_norm);
    if (Status status = attention_block(i, batch, block_table, cache); !status) return status;
    add_projected();
    norm_hidden(layer.post_attention_norm);
    mlp_block(layer, n);
    add_projected();
  }

  const auto num_rows = static_cast<std::int64_t>(batch.logit_rows.size());
  for (std::int64_t row = 0; row < num_rows; ++row) {  // rows ascend, so no row is overwritten before it is read
    std::copy_n(hidden_.data() + batch.logit_rows[static_cast<std::size_t>(row)] * hidden_size, hidden_size,
                normed_.data() + row * hidden_size);
  }
  rms_norm(normed_.data(), final_norm_, num_rows, hidden_size, c.rms_norm_eps);
  if (num_rows > 0) {
    const std::vector<float>& head = c.tied_embeddings ? embedding_ : head_.weight;
    multiply(head.data(), {}, c.vocab_size, c.hidden_size, normed_.data(), num_rows, logits);
  }
  for (std::int64_t row = 0; row < num_rows; ++row) {
    const float* values = logits + row * c.vocab_size;
    if (std::all_of(values, values + c.vocab_size, [](float value) { return std::isfinite(value); })) continue;
    const std::int32_t token = batch.logit_rows[static_cast<std::size_t>(row)];
    return internal_error("the logits at position " + std::to_string(batch.positions[static_cast<std::size_t>(token)]) +
                          " are not finite: the weights hold NaN or infinity, or the cache's mode overflows");
  }
  return {};
}

}  // namespace quire::llm
