// The inner loops of the CPU device, compiled once per SIMD target (kernels.cc, avx512-inl.h) and chosen at run time.
// The tables have one entry per format, in the order of format::FormatId; a format left out of the build has null
// entries.
//
// Attention multiplies levels in one of three forms (Operand). fp32 levels lie in a LevelTile. 16-bit operands lie in
// pairs, as the dot-product instructions take them:
//
//     keys     [16][positions]                 a position is a level's place in a row; OperandFormat::key_order
//     columns  [positions / 2][kKeyTile][2]    keys of a tile, transposed
//     queries  [parts][rows][positions]
//     values   [pairs of keys][positions][2]   OperandFormat::value_order
//     weights  [parts][rows][kKeyTile]
#pragma once

#include <array>
#include <cstdint>

#include "attention/softmax.h"
#include "cpu/operand.h"
#include "format/formats.h"

namespace quire::cpu {

// Rows of scratch start at multiples of this many elements and are padded to it with zeros.
inline constexpr int kLaneAlign = 16;
constexpr int padded(int head_size) { return (head_size + kLaneAlign - 1) / kLaneAlign * kLaneAlign; }

// Where one stored row is.
struct RowAddress {
  const std::uint8_t* data;
  const std::uint8_t* meta;  // fp32 scale, or the end of the row's codes; null where the format has no metadata
  const std::uint8_t* page;  // metadata of the page and KV head; null where there is none
};

// The cache lines of the next keys, asked for between products at an even pace: many at once are dropped, or keep the
// loads of the keys at hand waiting. Runs of bytes, one after the other.
struct Prefetch {
  struct Run {
    const std::uint8_t* begin;
    const std::uint8_t* end;
  };
  static constexpr int kUnit = 1 << 16;

  const Run* run = nullptr;  // the one after that of `at`
  const Run* end_of_runs = nullptr;
  const std::uint8_t* at = nullptr;
  const std::uint8_t* end = nullptr;
  int pace = 0;  // lines a product of vectors, in 1 / kUnit
  int due = 0;
  bool into_l1 = false;  // or the L2

  // So many products of vectors have been made.
  void after(int products) {
    for (due += pace * products; due >= kUnit; due -= kUnit) {
      if (at >= end) {
        if (run == end_of_runs) return;
        at = run->begin;
        end = run->end;
        ++run;
      }
      if (into_l1) {
        __builtin_prefetch(at, 0, 3);
      } else {
        __builtin_prefetch(at, 0, 2);
      }
      at += 64;
    }
  }
};

// Rows of some keys: addresses of the first KV head, and the bytes from there to the KV head at hand.
struct TileRows {
  const RowAddress* rows;
  int num_rows;
  std::int64_t data_step, meta_step, page_step;
  Prefetch* prefetch = nullptr;  // moves on with every row that is decoded to fp32
  // Copies of the rows' metadata, 4 bytes each, where they have been collected (Kernels::collect_scales).
  const float* scales = nullptr;

  const std::uint8_t* data(int n) const { return rows[n].data + data_step; }
  const std::uint8_t* meta(int n) const { return rows[n].meta == nullptr ? nullptr : rows[n].meta + meta_step; }
  const std::uint8_t* page(int n) const { return rows[n].page == nullptr ? nullptr : rows[n].page + page_step; }
  TileRows from(int first, int count) const { return {rows + first, count, data_step, meta_step, page_step, prefetch}; }
};

// What decoding a row to fp32 counts for in Prefetch::after.
inline constexpr int kProductsOfRow = 16;

// Keys (or values) handled together.
inline constexpr int kKeyTile = 64;
// Keys whose 16-bit operands are made and multiplied together.
inline constexpr int kKeyGroup = 16;
// Up to so many rows meet keys as they are; for more it pays to transpose them.
inline constexpr int kFewRows = 8;

// A tile of decoded rows: value = scale[n] * levels[n][i] + offset[n].
struct LevelTile {
  float* levels;  // [kKeyTile, stride]
  int stride;     // padded(head_size)
  float scale[kKeyTile];
  float offset[kKeyTile];
  bool any_offset;  // some offset is not 0
  bool all_finite;  // no NaN or infinity anywhere: masked rows may be multiplied by 0
};

// Queries of one KV head as 16-bit operands.
struct QueryOperands {
  std::uint16_t* data;       // [parts][rows][positions], or as make_byte_queries lays them out
  float* step;               // [rows]: the query is step * operand
  float* byte_step;          // [B][4]: for products of bytes, four times each; B is Kernels::blocks
  std::int32_t* centre;      // [B][4]: what the products of bytes have too much
  std::int64_t part_stride;  // elements from a part to the next
  int parts, positions;
};

// The 16-bit operands of a format's rows on this target.
struct OperandFormat {
  Operand operand = Operand::kFloat32;  // kFloat32: the format has none
  int max_level = 0;                    // kInt16: the largest |operand|
  int per_word = 1;                     // of which head sizes must be multiples
  bool has_offset = false;              // offsets of rows may differ from 0
  bool keys_in_place = false;           // a key's codes are its operands, in order: no need to load them

  // Positions of a row, padding included; element_of[position] is the element there, or -1.
  int (*key_positions)(format::RowShape shape) = nullptr;
  int (*value_positions)(format::RowShape shape) = nullptr;
  void (*key_order)(format::RowShape shape, std::int16_t* element_of) = nullptr;
  void (*value_order)(format::RowShape shape, std::int16_t* element_of) = nullptr;

  // Operands of up to kKeyGroup keys.
  void (*load_keys)(const TileRows& rows, format::RowShape shape, std::uint16_t* keys) = nullptr;
  // Affine maps of up to kKeyTile rows to operands; 0 from there to the next multiple of kLaneAlign. False where one is
  // NaN or infinite.
  bool (*load_affines)(const TileRows& rows, format::RowShape shape, float* scale, float* offset) = nullptr;
  // scale[n] /= the norm of the levels of the keys of a group, all of whose rows are readable; null where the format
  // has no norm correction.
  void (*divide_by_norms)(const std::uint16_t* keys, int num_keys, int positions, float* scale) = nullptr;
  // Operands of up to kKeyTile values, in pairs.
  void (*load_values)(const TileRows& rows, format::RowShape shape, std::uint16_t* values) = nullptr;

  // Tiles of no more rows than a vector has blocks (few_rows-inl.h). Keys as bytes, where the target and the shape
  // allow it: queries for them, and scores as of Kernels::dot_keys for all keys of a tile.
  bool (*takes_key_bytes)(format::RowShape shape) = nullptr;
  void (*make_byte_queries)(const float* q, int num_rows, int q_stride, format::RowShape shape, float largest,
                            QueryOperands& queries) = nullptr;
  void (*dot_key_bytes)(const TileRows& rows, format::RowShape shape, const QueryOperands& queries, float* scores,
                        Prefetch& prefetch) = nullptr;
  // accumulate_values from codes, where the shape allows it.
  bool (*takes_few_rows)(format::RowShape shape) = nullptr;
  void (*accumulate_few)(const TileRows& rows, format::RowShape shape, const std::uint16_t* weights, int num_rows,
                         const float* unit, float* acc, int acc_stride, Prefetch& prefetch) = nullptr;

  // kBFloat16: whether all operands of the pairs are finite numbers.
  bool (*values_finite)(const std::uint16_t* values, int num_pairs, int positions) = nullptr;
};

// Rows of floats, of fp8 too where the target has no products of bf16, that few rows of fp32 meet as they are stored
// (float_rows-inl.h). Null where the format is none, or the target has no vectors.
struct FloatRows {
  bool (*takes)(int head_size) = nullptr;
  // As of OperandFormat; null where all scales are 1.
  bool (*load_affines)(const TileRows& rows, format::RowShape shape, float* scale, float* offset) = nullptr;
  // Scores as of Kernels::dot_tile, and accumulate_tile, for up to kKeyTile rows; q [num_rows, q_stride].
  void (*dot)(const TileRows& rows, int head_size, const float* q, int num_rows, int q_stride, float* scores,
              Prefetch& prefetch) = nullptr;
  using Accumulate = void (*)(const TileRows& rows, int head_size, const float* p, int num_rows, float* acc,
                              int acc_stride, Prefetch& prefetch);
  Accumulate accumulate = nullptr;
  // The same with acc in the order of the format's operands of values, where takes_few_rows() says so: bf16, whose
  // operands take weights in two parts and so as many products as fp32.
  Accumulate accumulate_operands = nullptr;
};

// Softmax weights have 16 bits: an int16, or two bf16 whose sum they are.
constexpr int weight_parts(Operand operand) { return operand == Operand::kBFloat16 ? 2 : 1; }

// A row to be stored: y [padded(head_size)], aligned to 64 bytes, is overwritten; data receives the codes, meta the
// metadata.
struct EncodeJob {
  float* y;
  format::SideInputs side;
  std::uint8_t* data;
  std::uint8_t* meta;
};

struct Kernels {
  const char* target = nullptr;
  int blocks = 1;  // of 16 bytes in a vector

  // source [size] of a float dtype to fp32.
  void (*load_row)(const std::uint8_t* source, DType dtype, int size, float* y) = nullptr;

  using EncodeRows = void (*)(const EncodeJob* jobs, int num_jobs, format::RowShape shape);
  std::array<EncodeRows, format::AllFormats::kSize> encode_rows{};

  // scales[h][n] = the fp32 at rows[n].meta + 4 * h bytes, which is that of KV head h.
  void (*collect_scales)(const TileRows& rows, int num_heads, float (*scales)[kKeyTile]) = nullptr;

  // Decodes num_rows <= kKeyTile rows of a KV head into the tile, padding included. head_vector [head_size] may be
  // null.
  using LoadTile = void (*)(const TileRows& rows, format::RowShape shape, const float* head_vector, LevelTile& tile);
  std::array<LoadTile, format::AllFormats::kSize> load_tile{};

  std::array<OperandFormat, format::AllFormats::kSize> operands{};
  std::array<FloatRows, format::AllFormats::kSize> float_rows{};

  // scores[m * kKeyTile + n] = sum_i q[m][i] * levels[n][i]; q rows have the tile's stride.
  void (*dot_tile)(const float* q, int num_q, const LevelTile& tile, int num_keys, float* scores) = nullptr;

  // acc[m][i] += sum_n p[m * p_stride + n] * levels[n][i], n ascending, i < stride; acc [num_q, acc_stride]. The sum of
  // up to kKeyTile keys begins with 0.
  void (*accumulate_tile)(const float* p, std::int64_t p_stride, int num_q, const float* levels, int stride,
                          int num_keys, float* acc, int acc_stride) = nullptr;

  // Rows in the order element_of: parts of bf16, or int16 by steps of max |q| / largest. A row that is not finite has a
  // step of NaN.
  void (*make_queries)(Operand operand, const float* q, int num_rows, int q_stride, const std::int16_t* element_of,
                       float largest, QueryOperands& queries) = nullptr;

  // scores[m * kKeyTile + n] = sum of products with key n of the group, n < kKeyGroup, times the row's step. Keys are
  // rows of `bytes`, at most 2 * positions, behind which nothing is read: those that a format keeps in place, too.
  void (*dot_keys)(Operand operand, const QueryOperands& queries, int num_rows, const std::uint8_t* const* keys,
                   int bytes, float* scores, Prefetch& prefetch) = nullptr;
  // For many rows: such keys to their place in `columns`, and the scores of all columns of a tile. Rows of fp32 become
  // columns [stride][kKeyTile] in the same way, for accumulate_tile; null where the target has no vectors.
  void (*transpose_keys)(const std::uint8_t* const* keys, int bytes, std::uint16_t* columns) = nullptr;
  void (*dot_columns)(Operand operand, const QueryOperands& queries, int num_rows, const std::uint16_t* columns,
                      float* scores, Prefetch& prefetch) = nullptr;

  // scores[n] = factor * (scale[n] * scores[n]) + offset[n] * factor * q_sum, NaN where that is infinite; offset may be
  // null. Slots from num_keys to the next multiple of kLaneAlign become -inf.
  void (*make_logits)(float* scores, int num_rows, int num_keys, const float* scale, const float* offset, float factor,
                      const float* q_sum) = nullptr;

  // Logits of a tile to softmax weights, in place: p[n] = exp(p[n] - max), a NaN staying NaN and -inf giving 0, under
  // the running maximum, to which rows of acc [num_rows, acc_stride] and offset_sum are brought.
  void (*softmax_tile)(float* scores, int num_rows, int num_keys, attention::SoftmaxState* state, float* acc,
                       int acc_stride, float* offset_sum) = nullptr;

  // weights[n] = p[n] * scale[n] in the operand's form (kFloat32: in place), for num_keys keys and 0 up to the next
  // multiple of kLaneAlign; unit[m] is what the products of kInt16 are multiplied by. offset_sum[m] += sum p * offset,
  // where offset is not null.
  void (*make_weights)(Operand operand, float* scores, int num_rows, int num_keys, const float* scale,
                       const float* offset, std::uint16_t* weights, float* unit, float* offset_sum) = nullptr;

  // acc[m][position] += unit[m] * sum_n weights[m][n] * values[n][position]
  void (*accumulate_values)(Operand operand, const std::uint16_t* weights, int num_rows, int num_keys,
                            const std::uint16_t* values, int positions, const float* unit, float* acc, int acc_stride,
                            Prefetch& prefetch) = nullptr;

  // y as in EncodeJob.
  void (*rotate)(format::Rotation rotation, float* y, format::RowShape shape) = nullptr;
  void (*rotate_back)(format::Rotation rotation, float* y, format::RowShape shape) = nullptr;
};

// The table of the target in use.
const Kernels& kernels();

// Those of AVX-512 (avx512-inl.h), null where they are not compiled in: with VNNI, BF16 and VBMI, with VNNI alone, and
// with none of them.
const Kernels* zen4_kernels();
const Kernels* vnni_kernels();
const Kernels* avx3_kernels();

}  // namespace quire::cpu
