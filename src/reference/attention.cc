#include "reference/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "format/row.h"

namespace quire::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Calls visit.template operator()<F>() for the format of that id.
template <class Visit>
void with_format(format::FormatId id, Visit&& visit) {
  format::for_each_format([&]<class F>() {
    if (format::format_id<F> == id) visit.template operator()<F>();
  });
}

// To be written where the tensor may be.
template <class Data>
auto address(const BasicTensor<Data>& tensor, std::int64_t i, std::int64_t j = 0, std::int64_t k = 0,
             std::int64_t l = 0) {
  using Byte = std::conditional_t<std::is_const_v<Data>, const std::uint8_t, std::uint8_t>;
  const std::int64_t offset =
      i * tensor.strides[0] + j * tensor.strides[1] + k * tensor.strides[2] + l * tensor.strides[3];
  return static_cast<Byte*>(tensor.data) + offset * static_cast<std::int64_t>(dtype_bytes(tensor.dtype));
}

double load(DType dtype, const std::uint8_t* bytes) {
  switch (dtype) {
    case DType::kFloat32:
      return format::load_as<float>(bytes);
    case DType::kFloat16:
      return format::half_to_float(format::load_as<std::uint16_t>(bytes));
    case DType::kBFloat16:
      return format::bfloat16_to_float(format::load_as<std::uint16_t>(bytes));
    case DType::kFloat8E4M3:
      return format::E4M3::decode(*bytes);
    case DType::kFloat8E5M2:
      return format::E5M2::decode(*bytes);
    default:
      return std::numeric_limits<double>::quiet_NaN();
  }
}

void store(DType dtype, std::uint8_t* bytes, double value) {
  const float x = static_cast<float>(value);
  switch (dtype) {
    case DType::kFloat32:
      format::store_as(bytes, x);
      break;
    case DType::kFloat16:
      format::store_as(bytes, format::float_to_half(x));
      break;
    case DType::kBFloat16:
      format::store_as(bytes, format::float_to_bfloat16(x));
      break;
    case DType::kFloat8E4M3:
      *bytes = format::E4M3::encode(x);
      break;
    default:
      break;
  }
}

std::int64_t integer(const ConstTensor& tensor, std::int64_t i, std::int64_t j = 0, std::int64_t k = 0) {
  const std::uint8_t* bytes = address(tensor, i, j, k);
  if (tensor.dtype == DType::kInt64) return format::load_as<std::int64_t>(bytes);
  if (tensor.dtype == DType::kInt32) return format::load_as<std::int32_t>(bytes);
  return *bytes;
}

// A scale of one element, [Hk] or [B, Hk]; 1 where not given.
double scale_of(const ConstTensor& scale, std::int64_t sequence, std::int64_t kv_head) {
  if (!scale.defined()) return 1.0;
  if (scale.numel() == 1) return element(scale, 0);
  return scale.ndim == 1 ? element(scale, kv_head) : element(scale, sequence, kv_head);
}

// One sequence of the batch.
struct Sequence {
  std::int64_t index;
  std::int64_t first_token;  // row of its first query in query, out and lse
  std::int64_t query_len;
  std::int64_t seq_len;
  bool causal;

  std::int64_t context_len() const { return seq_len - query_len; }
  std::int64_t position(std::int64_t row) const { return context_len() + row; }
};

// Does the query at absolute position p see key j?
bool visible(const UnifiedAttentionArgs& args, const Sequence& sequence, std::int64_t p, std::int64_t j) {
  if (p < 0 || j < 0 || j >= sequence.seq_len) return false;

  const std::int64_t window = args.mask.sliding_window;
  const bool in_window = window < 1 || (p - j < window && j - p < window);

  bool seen = sequence.causal ? j <= p : true;
  if (args.mask.chunk_lookback >= 0) {
    const std::int64_t chunk = window / (args.mask.chunk_lookback + 1);
    seen = seen && p / chunk - j / chunk <= args.mask.chunk_lookback;
  } else if (args.mask.rswa_prefix_lens.defined()) {
    const bool in_prefix = j < integer(args.mask.rswa_prefix_lens, sequence.index);
    seen = seen && (in_prefix || p - j < args.mask.rswa_window);
  } else {
    seen = seen && in_window;
  }

  if (args.mask.mm_prefix_range.defined()) {
    for (std::int64_t r = 0; r < args.mask.mm_prefix_range.shape[1]; ++r) {
      const std::int64_t start = integer(args.mask.mm_prefix_range, sequence.index, r, 0);
      const std::int64_t end = integer(args.mask.mm_prefix_range, sequence.index, r, 1);
      const bool both_inside = start < end && start <= p && p <= end && start <= j && j <= end;
      if (both_inside && (!args.mask.mm_prefix_clamp_window || window < 1 || p - j < window)) seen = true;
    }
  }
  return seen;
}

// Steps 2, 4 and 5: what happens to the logit of a visible key after the dot product.
double adjust_logit(const UnifiedAttentionArgs& args, const Sequence& sequence, std::int64_t row, std::int64_t j,
                    std::int64_t q_head, double logit) {
  if (args.softcap > 0) logit = args.softcap * std::tanh(logit / args.softcap);
  const std::int64_t p = sequence.position(row);
  if (args.alibi_slopes.defined()) {
    const double slope = element(args.alibi_slopes, q_head);
    if (args.use_alibi_sqrt) {
      logit += j <= p ? -slope * std::sqrt(static_cast<double>(p - j)) : 0.0;
    } else {
      logit += slope * static_cast<double>(j - sequence.context_len());
    }
  }
  if (args.qq_bias.defined()) {
    const std::int64_t column = j - sequence.context_len();
    if (column >= 0 && column < args.qq_bias.shape[1]) logit += element(args.qq_bias, row, column);
  }
  return logit;
}

// What a format is given of a page and KV head besides the row.
format::SideInputs side_inputs(const ConstTensor& page_meta, const ConstTensor& head_vector, std::int64_t block,
                               std::int64_t head) {
  format::SideInputs side;
  if (page_meta.defined()) side.page = address(page_meta, block, head);
  if (head_vector.defined()) side.head_vector = reinterpret_cast<const float*>(address(head_vector, head));
  return side;
}

// The rows of one (sequence, KV head), decoded on first use.
class DecodedRows {
 public:
  DecodedRows(format::FormatId format, const StoredRows& rows, const ConstTensor& block_table, std::int64_t sequence,
              std::int64_t kv_head, int head_size, std::int64_t seq_len)
      : format_(format),
        rows_(rows),
        block_table_(block_table),
        sequence_(sequence),
        kv_head_(kv_head),
        head_size_(head_size),
        present_(static_cast<std::size_t>(seq_len), false),
        values_(static_cast<std::size_t>(seq_len * head_size)) {}

  // x [head_size] of key j, or null where the block table points outside the cache.
  const double* row(std::int64_t j) {
    double* x = values_.data() + j * head_size_;
    if (!present_[static_cast<std::size_t>(j)]) {
      const std::int64_t block_size = rows_.cache.shape[1];
      const std::int64_t block = integer(block_table_, sequence_, j / block_size);
      const Status status = decode_cache_row(format_, rows_, block, j % block_size, kv_head_, head_size_, x);
      if (!status.ok()) return nullptr;
      present_[static_cast<std::size_t>(j)] = true;
    }
    return x;
  }

 private:
  format::FormatId format_;
  const StoredRows rows_;
  const ConstTensor& block_table_;
  std::int64_t sequence_, kv_head_;
  int head_size_;
  std::vector<bool> present_;
  std::vector<double> values_;  // [seq_len, head_size]
};

}  // namespace

double element(const ConstTensor& tensor, std::int64_t i, std::int64_t j, std::int64_t k) {
  return load(tensor.dtype, address(tensor, i, j, k));
}

format::FormatId resolve_format(std::string_view name, DType cache_dtype) {
  return format::find_format(name == format::AutoFloat::kName ? dtype_name(cache_dtype) : name);
}

void decode_row(format::FormatId format, const std::uint8_t* data, const std::uint8_t* meta,
                const format::SideInputs& side, int head_size, double* x) {
  with_format(format, [&]<class F>() {
    const format::RowShape shape = format::row_shape(head_size);
    for (int i = 0; i < head_size; i += F::kUnit) {
      float levels[F::kUnit];
      // The byte before the unit, 0 before the first: for formats whose codes walk along the row.
      std::uint8_t bytes[1 + F::kUnitBytes] = {};
      const std::uint8_t* unit = data + i / F::kUnit * F::kUnitBytes;
      if (i > 0) bytes[0] = unit[-1];
      std::memcpy(bytes + 1, unit, F::kUnitBytes);
      F::unpack(bytes + 1, levels);
      std::copy(levels, levels + F::kUnit, x + i);
    }
    if (F::kMetaPlace == format::MetaPlace::kInRow) meta = data + format::code_bytes<F>(head_size);
    const format::Affine affine = F::read_meta(meta, shape);
    double norm = 1.0;
    if (F::kLevelNorm) {
      double squares = 0.0;
      for (int i = 0; i < head_size; ++i) squares += x[i] * x[i];
      norm = std::sqrt(squares);
    }
    for (int i = 0; i < head_size; ++i) x[i] = affine.scale / norm * x[i] + affine.offset;
    if (format::has_centre<F>(side)) {
      for (int i = 0; i < head_size; ++i) x[i] += F::centre(side, shape, i);
    }

    // x = unrotate * s .* (H y'). H is symmetric: stage h pairs i with i + h inside blocks of shape.block.
    if (F::kRotation == format::Rotation::kNone) return;
    for (int h = 1; h < shape.block; h *= 2) {
      for (int i = 0; i < head_size; ++i) {
        if ((i & h) != 0) continue;
        const double a = x[i];
        const double b = x[i + h];
        x[i] = a + b;
        x[i + h] = a - b;
      }
    }
    for (int i = 0; i < head_size; ++i) {
      const int sign = i % shape.block;  // every block has the same signs
      const bool negative = F::kRotation == format::Rotation::kSignedHadamard &&
                            ((format::rht_sign_word(sign / 32, format::kMaxHeadSize) >> (sign % 32)) & 1U) != 0;
      x[i] *= negative ? -F::unrotate(shape) : F::unrotate(shape);
    }
  });
}

Status decode_cache_row(format::FormatId format, const StoredRows& rows, std::int64_t block, std::int64_t slot,
                        std::int64_t head, int head_size, double* x) {
  if (block < 0 || block >= rows.cache.shape[0]) {
    return out_of_range("reference: block " + std::to_string(block) + " is outside a cache of " +
                        std::to_string(rows.cache.shape[0]) + " blocks");
  }
  const std::uint8_t* meta = rows.scale_cache.defined() ? address(rows.scale_cache, block, slot, head) : nullptr;
  decode_row(format, address(rows.cache, block, slot, head), meta,
             side_inputs(rows.page_meta, rows.head_vector, block, head), head_size, x);
  return {};
}

Status unified_attention(const UnifiedAttentionArgs& args) {
  const Result<const ModeInfo*> known = mode_info(args.mode);
  if (!known.ok()) return known.status();
  const ModeInfo* mode = *known;
  const format::FormatId key_format = resolve_format(mode->key_format, args.cache.key_cache.dtype);
  const format::FormatId value_format = resolve_format(mode->value_format, args.cache.value_cache.dtype);
  if (key_format == format::FormatId::kNone || value_format == format::FormatId::kNone || !args.query.device.is_cpu()) {
    return unsupported("reference: mode \"" + mode->name + "\" on " + to_string(args.query.device) +
                       " cannot be read here; the oracle reads the table's formats on cpu");
  }

  const std::int64_t num_q_heads = args.query.shape[1];
  const std::int64_t num_kv_heads = args.cache.key_cache.shape[2];
  const int head_size = static_cast<int>(args.query.shape[2]);
  const int head_size_v = static_cast<int>(args.out.shape[2]);

  for (std::int64_t b = 0; b < args.seq_lens.shape[0]; ++b) {
    Sequence sequence;
    sequence.index = b;
    sequence.first_token = integer(args.cu_seqlens_q, b);
    sequence.query_len = integer(args.cu_seqlens_q, b + 1) - sequence.first_token;
    sequence.seq_len = integer(args.seq_lens, b);
    sequence.causal = args.mask.causal_per_seq.defined() ? integer(args.mask.causal_per_seq, b) != 0 : args.mask.causal;

    for (std::int64_t kv_head = 0; kv_head < num_kv_heads; ++kv_head) {
      DecodedRows keys(
          key_format,
          {args.cache.key_cache, args.cache.k_scale_cache, args.cache.k_page_meta, args.cache.k_head_vector},
          args.block_table, b, kv_head, head_size, sequence.seq_len);
      DecodedRows values(
          value_format,
          {args.cache.value_cache, args.cache.v_scale_cache, args.cache.v_page_meta, args.cache.v_head_vector},
          args.block_table, b, kv_head, head_size_v, sequence.seq_len);
      const bool fp8_query = dtype_bytes(args.query.dtype) == 1;
      const double q_scale = fp8_query ? scale_of(args.q_descale, b, kv_head) : 1.0;
      const double k_scale = scale_of(args.k_descale, b, kv_head);
      const double v_scale = scale_of(args.v_descale, b, kv_head);
      const std::int64_t group = num_q_heads / num_kv_heads;

      for (std::int64_t row = 0; row < sequence.query_len; ++row) {
        std::vector<std::int64_t> seen;
        for (std::int64_t j = 0; j < sequence.seq_len; ++j) {
          if (visible(args, sequence, sequence.position(row), j)) seen.push_back(j);
        }

        for (std::int64_t q_head = kv_head * group; q_head < (kv_head + 1) * group; ++q_head) {
          const std::int64_t token = sequence.first_token + row;
          std::vector<double> query(static_cast<std::size_t>(head_size));
          for (int i = 0; i < head_size; ++i) {
            query[static_cast<std::size_t>(i)] = q_scale * element(args.query, token, q_head, i);
          }

          std::vector<double> logits;
          const double sink = args.sinks.defined() ? element(args.sinks, q_head) : -kInfinity;
          double largest = sink;
          for (std::int64_t j : seen) {
            const double* key = keys.row(j);
            if (key == nullptr)
              return out_of_range("reference: block_table points outside the cache at key " + std::to_string(j) +
                                  " of sequence " + std::to_string(b));
            double dot = 0.0;
            for (int i = 0; i < head_size; ++i) dot += query[static_cast<std::size_t>(i)] * key[i];
            // What fp32 cannot hold is NaN: it is neither a plausible weight nor a masked key.
            double product = args.softmax_scale * k_scale * dot;
            if (!(std::fabs(product) <= std::numeric_limits<float>::max())) product = std::nan("");
            logits.push_back(adjust_logit(args, sequence, row, j, q_head, product));
            largest = std::max(largest, logits.back());
          }

          // A NaN logit leaves `largest` alone and makes the sum NaN, as it should.
          const bool empty = largest == -kInfinity &&
                             std::none_of(logits.begin(), logits.end(), [](double s) { return std::isnan(s); });
          double sum = empty ? 0.0 : std::exp(sink - largest);
          std::vector<double> result(static_cast<std::size_t>(head_size_v), 0.0);
          for (std::size_t n = 0; n < seen.size() && !empty; ++n) {
            const double* value = values.row(seen[n]);
            const double weight = std::exp(logits[n] - largest);
            sum += weight;
            for (int i = 0; i < head_size_v; ++i) {
              result[static_cast<std::size_t>(i)] += weight * v_scale * value[i];
            }
          }

          for (int i = 0; i < head_size_v; ++i) {
            double value = empty ? 0.0 : result[static_cast<std::size_t>(i)] / sum;
            if (args.output_scale.defined()) value /= element(args.output_scale, 0);
            store(args.out.dtype, address(args.out, token, q_head, i), value);
          }
          if (args.lse.defined()) {
            store(DType::kFloat32, address(args.lse, token, q_head), empty ? -kInfinity : largest + std::log(sum));
          }
        }
      }
    }
  }
  return {};
}

namespace {

// Writes the rows of one input into one cache. Head-major caches are [num_blocks, Hk, d/x, block_size, x] for keys and
// [num_blocks, Hk, d, block_size] for values.
void store_rows(format::FormatId format, const ConstTensor& input, const ConstTensor& slots, const Tensor& cache,
                const Tensor& scale_cache, const ConstTensor& page_meta, const ConstTensor& head_vector,
                const ConstTensor& tensor_scale, bool head_major) {
  const int head_size = static_cast<int>(input.shape[2]);
  const std::int64_t block_size = head_major ? cache.shape[3] : cache.shape[1];
  const std::size_t element_bytes = dtype_bytes(cache.dtype);
  const std::int64_t num_rows = std::min(input.shape[0], slots.shape[0]);

  for (std::int64_t token = 0; token < num_rows; ++token) {
    const std::int64_t slot = integer(slots, token);
    if (slot < 0) continue;
    const std::int64_t block = slot / block_size;
    const std::int64_t offset = slot % block_size;
    for (std::int64_t head = 0; head < input.shape[1]; ++head) {
      const std::uint8_t* from = address(input, token, head);
      const std::int64_t step = input.strides[2] * static_cast<std::int64_t>(dtype_bytes(input.dtype));
      std::vector<float> x(static_cast<std::size_t>(head_size));
      for (int i = 0; i < head_size; ++i) {
        x[static_cast<std::size_t>(i)] = static_cast<float>(load(input.dtype, from + i * step));
      }
      std::vector<std::uint8_t> row(static_cast<std::size_t>(format::format_info(format).row_bytes(head_size)));
      std::uint8_t unused_meta[16];
      std::uint8_t* meta = scale_cache.defined() ? address(scale_cache, block, offset, head) : unused_meta;
      format::SideInputs side = side_inputs(page_meta, head_vector, block, head);
      side.tensor_scale = static_cast<float>(scale_of(tensor_scale, 0, head));
      with_format(format, [&]<class F>() {
        if (F::kMetaPlace == format::MetaPlace::kInRow) meta = row.data() + format::code_bytes<F>(head_size);
        format::encode_row<F>(x.data(), format::row_shape(head_size), side, row.data(), meta);
      });
      if (input.dtype == cache.dtype) {  // a copy: every bit, fp8 NaNs included
        for (int i = 0; i < head_size; ++i) {
          std::memcpy(row.data() + static_cast<std::size_t>(i) * element_bytes, from + i * step, element_bytes);
        }
      }
      if (!head_major) {
        std::memcpy(address(cache, block, offset, head), row.data(), row.size());
        continue;
      }
      for (int i = 0; i < head_size; ++i) {
        std::uint8_t* to = cache.ndim == 4
                               ? address(cache, block, head, i, offset)
                               : address(cache, block, head, i / cache.shape[4], offset) +
                                     i % cache.shape[4] * cache.strides[4] * static_cast<std::int64_t>(element_bytes);
        std::memcpy(to, row.data() + static_cast<std::size_t>(i) * element_bytes, element_bytes);
      }
    }
  }
}

}  // namespace

Status reshape_and_cache(const ReshapeAndCacheArgs& args) {
  const Result<const ModeInfo*> known = mode_info(args.mode);
  if (!known.ok()) return known.status();
  const ModeInfo* mode = *known;
  const format::FormatId key_format = resolve_format(mode->key_format, args.cache.key_cache.dtype);
  const format::FormatId value_format = resolve_format(mode->value_format, args.cache.value_cache.dtype);
  if (key_format == format::FormatId::kNone || value_format == format::FormatId::kNone) {
    return unsupported("reference: mode \"" + mode->name + "\" has no format of the table");
  }
  const bool head_major = args.cache.key_cache.ndim == 5;
  const KVCacheViews& cache = args.cache;
  store_rows(key_format, args.key, args.slot_mapping, cache.key_cache, cache.k_scale_cache, cache.k_page_meta,
             cache.k_head_vector, args.k_scale, head_major);
  store_rows(value_format, args.value, args.slot_mapping, cache.value_cache, cache.v_scale_cache, cache.v_page_meta,
             cache.v_head_vector, args.v_scale, head_major);
  return {};
}

}  // namespace quire::reference
