// Every format of modes.def over one row: hostile inputs, the policy for non-finite elements, the error on Gaussian
// rows, and for the quantized formats their definition, written out a second time.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#include "format/formats.h"
#include "format/row.h"
#include "reference/attention.h"
#include "support/random.h"

namespace quire::format {
namespace {

using testing::Random;
using Row = std::vector<float>;

constexpr int kHeadSizes[] = {32, 64, 80, 96, 112, 128, 192, 256, 512};

template <class... Fs>
::testing::Types<Fs...> as_types(TypeList<Fs...>);
using AllTypes = decltype(as_types(AllFormats{}));

// One encoded row in memory of exactly its size.
template <class F>
struct Encoded {
  explicit Encoded(Row x, float tensor_scale = 1.0F) : head_size(static_cast<int>(x.size())) {
    bytes.assign(static_cast<std::size_t>(row_bytes<F>(head_size)), 0xFF);
    meta.assign(16, 0xFF);
    encode_row<F>(x.data(), row_shape(head_size), {.tensor_scale = tensor_scale}, bytes.data(), meta_pointer());
  }

  std::uint8_t* meta_pointer() {
    if (F::kMetaPlace == MetaPlace::kInRow) return bytes.data() + code_bytes<F>(head_size);
    return meta.data();
  }

  std::vector<double> decode() {
    std::vector<double> x(static_cast<std::size_t>(head_size));
    reference::decode_row(format_id<F>, bytes.data(), meta_pointer(), {}, head_size, x.data());
    return x;
  }

  std::vector<float> levels() {
    std::vector<float> levels(static_cast<std::size_t>(head_size));
    decode_levels<F>(bytes.data(), meta_pointer(), row_shape(head_size), levels.data());
    return levels;
  }

  int head_size;
  std::vector<std::uint8_t> bytes, meta;
};

Row gaussian_row(Random& random, int head_size, double size = 1.0) {
  Row x(static_cast<std::size_t>(head_size));
  for (float& value : x) value = static_cast<float>(random.normal() * size);
  return x;
}

double squared(const std::vector<double>& x) {
  double sum = 0.0;
  for (double value : x) sum += value * value;
  return sum;
}

double squared_error(const std::vector<double>& got, const Row& x) {
  double sum = 0.0;
  for (std::size_t i = 0; i < x.size(); ++i) sum += (got[i] - x[i]) * (got[i] - x[i]);
  return sum;
}

// Whether a format is fp8 without a scale of the row's own.
template <class F>
constexpr bool kPlainFp8 = F::kTensorScale || std::is_same_v<F, TurboQuantK8> || std::is_same_v<F, TurboQuantK8E4B15>;

// Whether a row leaves the range that its format has by design.
template <class F>
bool saturates(const Row& x) {
  double largest = 0.0;
  double squares = 0.0;
  for (float value : x) {
    largest = std::max<double>(largest, std::abs(value));
    squares += static_cast<double>(value) * value;
  }
  if (std::is_same_v<F, TurboQuantK8E4B15>) return largest > E4B15::kMax;
  if (kPlainFp8<F>) return largest > 448.0;
  return F::kLevelNorm && std::sqrt(squares) > 65504.0;  // the norm is an fp16
}

template <class F>
class Format : public ::testing::Test {};
TYPED_TEST_SUITE(Format, AllTypes);

TYPED_TEST(Format, HeadSizesInUseArePacked) {
  for (int d : kHeadSizes) EXPECT_EQ(d % TypeParam::kUnit, 0) << TypeParam::kName << " " << d;
}

TYPED_TEST(Format, GaussianErrorIsWithinItsBound) {
  for (int d : kHeadSizes) {
    Random random(static_cast<std::uint64_t>(d));
    double error = 0.0;
    double total = 0.0;
    const int num_rows = 100000 / d;
    for (int n = 0; n < num_rows; ++n) {
      const Row x = gaussian_row(random, d);
      error += squared_error(Encoded<TypeParam>(x).decode(), x);
      total += squared(std::vector<double>(x.begin(), x.end()));
    }
    EXPECT_LE(error, TypeParam::kMaxNmse * total) << TypeParam::kName << " d" << d << ": NMSE " << error / total;
  }
}

TYPED_TEST(Format, HostileRowsStayFiniteAndClose) {
  using F = TypeParam;
  for (int d : kHeadSizes) {
    Random random(static_cast<std::uint64_t>(d) + 1);
    std::map<std::string, Row> rows;
    rows["zero"] = Row(static_cast<std::size_t>(d), 0.0F);
    rows["signed zeros"] = rows["zero"];
    for (int i = 0; i < d; i += 2) rows["signed zeros"][static_cast<std::size_t>(i)] = -0.0F;
    for (float value : {1.0F, -3.25F, 1e-30F, 1e-39F, -1e-4F, 0.01F}) {
      rows["constant " + std::to_string(value)] = Row(static_cast<std::size_t>(d), value);
    }
    for (int i : {0, 1, d / 2, d - 1}) {
      rows["one hot " + std::to_string(i)] = rows["zero"];
      rows["one hot " + std::to_string(i)][static_cast<std::size_t>(i)] = i % 2 == 0 ? 5.0F : -5.0F;
    }
    rows["subnormal"] = gaussian_row(random, d, 1e-40);
    rows["tiny"] = gaussian_row(random, d, 1e-30);
    rows["offset"] = gaussian_row(random, d, 0.3);
    for (float& value : rows["offset"]) value = 5.5F + std::min(0.5F, std::max(-0.5F, value));
    rows["mixed"] = gaussian_row(random, d);
    for (int i = 0; i < d; i += 3) rows["mixed"][static_cast<std::size_t>(i)] *= 1e-6F;
    rows["fp16 max"] = Row(static_cast<std::size_t>(d), 65504.0F);
    for (int i = 0; i < d; i += 2) rows["fp16 max"][static_cast<std::size_t>(i)] = -65504.0F;
    rows["one fp16 max"] = rows["mixed"];
    rows["one fp16 max"][static_cast<std::size_t>(d / 3)] = 65504.0F;
    for (const auto& [name, x] : rows) {
      const std::vector<double> got = Encoded<F>(x).decode();
      for (double value : got) ASSERT_TRUE(std::isfinite(value)) << F::kName << " d" << d << " " << name;
      // No row may lose more than 0.3 of its energy, but int2 rotates without signs: all of a constant row lands on one
      // element whose level is at most 1.51 / sqrt(d) of it, and the others, which are 0, cost 0.4528^2: 1.1 at most.
      // Absolute floor per element: half of the smallest step of e4m3 at scale 1, or the smallest scale.
      // With norm correction the row keeps its length and the error is 2 - 2 cos of an angle below 90 degrees.
      const double energy = squared(std::vector<double>(x.begin(), x.end()));
      if (saturates<F>(x)) continue;
      const double share = F::kLevelNorm ? 2.0 : F::kRotation == Rotation::kHadamard ? 1.1 : 0.3;
      const double floor = kPlainFp8<F> ? 0x1p-10 : 1e-6;
      EXPECT_LE(squared_error(got, x), share * energy + floor * floor * d) << F::kName << " d" << d << " " << name;
    }
  }
}

TYPED_TEST(Format, NonFiniteElements) {
  using F = TypeParam;
  const float infinity = std::numeric_limits<float>::infinity();
  for (int d : {64, 96}) {
    Random random(5);
    const Row clean = gaussian_row(random, d);
    const std::vector<double> expected = Encoded<F>(clean).decode();
    for (float bad :
         {infinity, -infinity, std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::quiet_NaN()}) {
      for (int i = 0; i < d; ++i) {
        Row x = clean;
        x[static_cast<std::size_t>(i)] = bad;
        Encoded<F> row(x);
        const std::vector<double> got = row.decode();
        if (F::kStatsOf != StatsOf::kNothing) {
          for (std::int64_t n = 0; n < code_bytes<F>(d); ++n) {
            ASSERT_EQ(row.bytes[static_cast<std::size_t>(n)], 0) << F::kName << " " << bad << " at " << i;
          }
          for (double value : got) ASSERT_TRUE(std::isnan(value)) << F::kName << " " << bad << " at " << i;
          continue;
        }
        // Without statistics only the element itself is affected.
        for (int j = 0; j < d; ++j) {
          const double value = got[static_cast<std::size_t>(j)];
          if (j != i) {
            ASSERT_EQ(value, expected[static_cast<std::size_t>(j)]);
          } else if (std::is_same_v<F, TurboQuantK8E4B15>) {  // has no NaN
            ASSERT_EQ(value, std::signbit(bad) ? -1.75 : 1.75);
          } else if (std::isnan(bad)) {
            ASSERT_TRUE(std::isnan(value)) << F::kName;
          } else {
            ASSERT_GE(std::abs(value), 448.0) << F::kName;
            ASSERT_EQ(std::signbit(value), std::signbit(bad)) << F::kName;
          }
        }
      }
    }
  }
}

TYPED_TEST(Format, EveryLevelIsReachable) {
  using F = TypeParam;
  if constexpr (F::kCacheDType == DType::kFloat32 || F::kCacheDType == DType::kFloat16 ||
                F::kCacheDType == DType::kBFloat16) {
    GTEST_SKIP() << "casts are covered code by code in conversion_test.cc";
  } else {
    Random random(6);
    // The levels that some bytes stand for.
    std::set<float> possible;
    for (int n = 0; n < 200000; ++n) {
      std::uint8_t bytes[1 + F::kUnitBytes];  // and the one before, for units that see it
      float levels[F::kUnit];
      for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random.bits());
      F::unpack(bytes + 1, levels);
      for (float level : levels) {
        if (std::isfinite(level)) possible.insert(level == 0.0F ? 0.0F : level);
      }
    }
    if (F::kCacheDType == DType::kInt8) possible.erase(-128.0F);  // the scale maps absmax to 127
    if (F::kName == "guest_int6") possible.erase(-32.0F);
    // Triton limits what it writes to 1.75.
    if (std::is_same_v<F, TurboQuantK8E4B15>) {
      possible.erase(1.875F);
      possible.erase(-1.875F);
    }
    if (F::kTensorScale && F::kCacheDType == DType::kFloat8E5M2) {
      // These are spread over 32 binades, which the wide rows below reach.
      ASSERT_EQ(possible.size(), 2U * 123 + 1);
    }

    std::set<float> seen;
    for (int n = 0; n < 4000; ++n) {
      Row x(128);
      for (float& value : x) {
        // Every third row spans the binades of the widest format; the others are Gaussian or skewed.
        const double wide = std::exp2(random.uniform(-18, 16)) * (random.below(2) == 0 ? 1 : -1);
        const double narrow = random.normal() + (n % 3 == 1 ? 2.0 : 0.0);
        value = static_cast<float>(n % 3 == 2 ? wide : narrow);
      }
      for (float level : Encoded<F>(x).levels()) seen.insert(level == 0.0F ? 0.0F : level);
    }
    for (float level : possible) EXPECT_TRUE(seen.contains(level)) << F::kName << " never stores level " << level;
  }
}

TYPED_TEST(Format, EncodingIsAFunctionOfTheRow) {
  // Bytes do not depend on what was in memory before or on where the row is.
  using F = TypeParam;
  Random random(8);
  const Row x = gaussian_row(random, 96);
  Encoded<F> first(x);
  std::vector<std::uint8_t> memory(first.bytes.size() + 2, 0x55);
  std::vector<std::uint8_t> meta(16, 0x55);
  Row y = x;
  std::uint8_t* data = memory.data() + 2;
  encode_row<F>(y.data(), row_shape(96), {}, data,
                F::kMetaPlace == MetaPlace::kInRow ? data + code_bytes<F>(96) : meta.data());
  EXPECT_TRUE(std::equal(first.bytes.begin(), first.bytes.end(), data));
  EXPECT_EQ(memory[0], 0x55);
  EXPECT_EQ(memory[1], 0x55);
}

TEST(RowBytes, AreThoseOfTheTable) {
  struct Expected {
    const char* format;
    double bytes_per_element;
    int meta_in_row;
  };
  for (const Expected& expected :
       {Expected{"float32", 4, 0}, Expected{"float16", 2, 0}, Expected{"bfloat16", 2, 0}, Expected{"fp8", 1, 0},
        Expected{"fp8_e5m2", 1, 0}, Expected{"int8_per_token_head", 1, 0}, Expected{"fp8_per_token_head", 1, 0},
        Expected{"int4_per_token_head", 0.5, 0}, Expected{"int2_per_token_head", 0.25, 0},
        Expected{"turboquant_k8", 1, 0}, Expected{"turboquant_k8_e4b15", 1, 0}, Expected{"turboquant_k4", 0.5, 2},
        Expected{"turboquant_k3", 0.375, 2}, Expected{"turboquant_v4", 0.5, 4}, Expected{"turboquant_v3", 0.375, 4}}) {
    const FormatId id = find_format(expected.format);
    ASSERT_NE(id, FormatId::kNone) << expected.format;
    for (int d : kHeadSizes) {
      EXPECT_EQ(static_cast<double>(format_info(id).row_bytes(d)),
                d * expected.bytes_per_element + expected.meta_in_row)
          << expected.format;
    }
  }
}

// ---- the definitions, once more ------------------------------------------------------------------------------------

// fp32 with one rounding per operation; `volatile` keeps a compiler from contracting two into one.
float times(float a, float b) {
  volatile float product = a * b;
  return product;
}

float abs_max(const Row& x) {
  float largest = 0.0F;
  for (float value : x) largest = std::max(largest, std::abs(value));
  return largest;
}

// H (s .* x) or H x by the matrix, which is exact for the small integers that the tests use.
Row rotated(const Row& x, bool with_signs) {
  Row y = x;
  rotate(with_signs ? Rotation::kSignedHadamard : Rotation::kHadamard, y.data(), row_shape(static_cast<int>(x.size())));
  return y;
}

class Definition : public ::testing::TestWithParam<int> {
 protected:
  // Rows of several kinds: Gaussian, one-sided, with an outlier, small integers, huge, tiny.
  std::vector<Row> rows() const {
    const int d = GetParam();
    Random random(static_cast<std::uint64_t>(d) + 100);
    std::vector<Row> all;
    for (int n = 0; n < 60; ++n) {
      Row x = gaussian_row(random, d, std::exp2(random.uniform(-20, 12)));
      if (n % 6 == 1) {
        for (float& value : x) value = std::abs(value) + 1.0F;
      }
      if (n % 6 == 2) x[static_cast<std::size_t>(random.below(d))] *= 50.0F;
      if (n % 6 == 3) {
        for (float& value : x) value = static_cast<float>(random.below(31) - 15);
      }
      if (n % 6 == 4) {
        for (float& value : x) value = -std::abs(value);
      }
      if (n % 6 == 5 && n < 30) {
        for (float& value : x) value *= 1e-9F;
      }
      all.push_back(x);
    }
    // Rows of ties. int8: multiples of a half under a scale of exactly 1. int4: a rotated row of +-7.5, whose range is
    // 15 and whose scale is 1, so that -7.5 falls between codes 0 and 1.
    Row halves(static_cast<std::size_t>(d));
    for (float& value : halves) value = static_cast<float>(random.below(509) - 254) / 2.0F;
    halves[0] = 127.0F;
    all.push_back(halves);
    Row one_hot(static_cast<std::size_t>(d), 0.0F);
    one_hot[1] = 7.5F;
    all.push_back(one_hot);
    return all;
  }
};

TEST_P(Definition, Int8) {
  for (const Row& x : rows()) {
    Encoded<Int8PerTokenHead> row(x);
    const float scale = std::max(times(abs_max(x), 1.0F / 127.0F), 1e-6F);
    ASSERT_EQ(load_as<float>(row.meta.data()), scale);
    const float inverse = 1.0F / scale;
    const std::vector<double> got = row.decode();
    for (std::size_t i = 0; i < x.size(); ++i) {
      const float code = std::nearbyint(std::clamp(times(x[i], inverse), -128.0F, 127.0F));
      ASSERT_EQ(static_cast<std::int8_t>(row.bytes[i]), code);
      ASSERT_LE(std::abs(got[i] - x[i]), 0.5001 * scale);
    }
  }
}

TEST_P(Definition, Fp8PerTokenHead) {
  for (const Row& x : rows()) {
    Encoded<Fp8PerTokenHead> row(x);
    const float scale = std::max(times(abs_max(x), 1.0F / 448.0F), 1e-6F);
    ASSERT_EQ(load_as<float>(row.meta.data()), scale);
    const std::vector<double> got = row.decode();
    for (std::size_t i = 0; i < x.size(); ++i) {
      const float scaled = std::clamp(times(x[i], 1.0F / scale), -448.0F, 448.0F);
      ASSERT_EQ(row.bytes[i], E4M3::encode(scaled));
      // Half a step is 2^-4 of the value, or half of 2^-9 below the smallest normal number.
      ASSERT_LE(std::abs(got[i] - x[i]), std::max(std::abs(x[i]) * 0x1.001p-4, scale * 0x1.001p-10));
    }
  }
}

TEST_P(Definition, Fp8PerTensorDivides) {
  for (const Row& x : rows()) {
    for (float tensor_scale : {1.0F, 0.3F, 7.1F}) {
      Encoded<Fp8PerTensor> e4m3(x, tensor_scale);
      Encoded<Fp8E5M2PerTensor> e5m2(x, tensor_scale);
      for (std::size_t i = 0; i < x.size(); ++i) {
        ASSERT_EQ(e4m3.bytes[i], E4M3::encode(x[i] / tensor_scale));
        ASSERT_EQ(e5m2.bytes[i], E5M2::encode(x[i] / tensor_scale));
      }
    }
  }
}

TEST_P(Definition, Int4) {
  const int d = GetParam();
  for (const Row& x : rows()) {
    Encoded<Int4PerTokenHead> row(x);
    const Row y = rotated(x, true);
    const float low = std::min(*std::min_element(y.begin(), y.end()), 0.0F);
    const float high = std::max(*std::max_element(y.begin(), y.end()), 0.0F);
    const float scale = std::max(times(high - low, 1.0F / 15.0F), 1e-6F);
    const float inverse = 1.0F / scale;
    const float zero = std::clamp(std::round(times(-low, inverse)), 0.0F, 15.0F);
    const std::uint32_t meta = load_as<std::uint32_t>(row.meta.data());
    ASSERT_EQ(meta, (std::bit_cast<std::uint32_t>(scale) & ~15U) | static_cast<std::uint32_t>(zero));
    const float read_scale = std::bit_cast<float>(meta & ~15U);
    const Affine affine = Int4PerTokenHead::read_meta(row.meta.data(), row_shape(d));
    const std::vector<float> levels = row.levels();
    for (int i = 0; i < d; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const float code = std::round(std::clamp(times(y[at], inverse) + zero, 0.0F, 15.0F));
      const int nibble = (row.bytes[at / 2] >> (i % 2 == 0 ? 0 : 4)) & 15;
      ASSERT_EQ(nibble, code) << i;
      ASSERT_EQ(static_cast<double>(affine.scale) * levels[at] + affine.offset,
                (static_cast<double>(code) - zero) * read_scale);
      // Half a step in the rotated domain. The reader's scale is up to 2^-19 smaller, which counts at most 15 times.
      ASSERT_LE(std::abs((code - zero) * scale - y[at]), 0.5001 * scale);
    }
    ASSERT_EQ(Int4PerTokenHead::unrotate(row_shape(d)), 1.0F / static_cast<float>(rotation_block(d)));
  }
}

TEST_P(Definition, Int2) {
  const int d = GetParam();
  for (const Row& x : rows()) {
    Encoded<Int2PerTokenHead> row(x);
    const Row y = rotated(x, false);
    // The contract's tree: element i with i + h, h ascending.
    Row squares(y.size());
    for (std::size_t i = 0; i < y.size(); ++i) squares[i] = times(y[i], y[i]);
    for (std::size_t h = 1; h < squares.size(); h *= 2) {
      for (std::size_t i = 0; i + h < squares.size(); i += 2 * h) squares[i] += squares[i + h];
    }
    const float norm = std::sqrt(squares[0] + 1e-12F);
    const float root = std::sqrt(static_cast<float>(d));
    const float scale = norm / times(static_cast<float>(rotation_block(d)), root);
    ASSERT_EQ(load_as<float>(row.meta.data()), scale);
    const float inverse = root / norm;
    const float level_of[] = {-1.5104F, -0.4528F, 0.4528F, 1.5104F};
    const std::vector<float> levels = row.levels();
    for (int i = 0; i < d; ++i) {
      const float z = times(y[static_cast<std::size_t>(i)], inverse);
      const int code = (z >= -0.9816F) + (z >= 0.0F) + (z >= 0.9816F);
      const int stored = (row.bytes[static_cast<std::size_t>(i / 4)] >> (2 * (i % 4))) & 3;
      ASSERT_EQ(stored, code) << i;
      ASSERT_EQ(levels[static_cast<std::size_t>(i)], level_of[code]);
    }
  }
}

// Code i of a row of 3- or 4-bit codes, in little-endian order.
int packed_code(const std::vector<std::uint8_t>& bytes, int bits, int i) {
  int code = 0;
  for (int b = 0; b < bits; ++b) {
    const int at = bits * i + b;
    code |= ((bytes[static_cast<std::size_t>(at / 8)] >> (at % 8)) & 1) << b;
  }
  return code;
}

float half_at(const std::vector<std::uint8_t>& bytes, std::size_t at) {
  return half_to_float(load_as<std::uint16_t>(bytes.data() + at));
}

// The keys in double precision: an orthonormal rotation of the unit vector, which sqrt(d) brings to unit variance.
template <class F, int kBits>
void expect_turboquant_key(const Row& x) {
  const auto d = static_cast<int>(x.size());
  Encoded<F> row(x);
  double squares = 0.0;
  for (float value : x) squares += static_cast<double>(value) * value;
  const double norm = std::sqrt(squares);
  const int block = rotation_block(d);
  // fp32 sums of up to 512 squares, and 9 stages of the transform, on values up to 23.
  const double tie = 1e-4;
  for (int i = 0; i < d; ++i) {
    double y = 0.0;
    for (int j = i / block * block; j < (i / block + 1) * block; ++j) {
      const bool negative = std::popcount(static_cast<unsigned>(i & j & (block - 1))) % 2 != 0;
      y += negative ? -x[static_cast<std::size_t>(j)] : x[static_cast<std::size_t>(j)];
    }
    y *= std::sqrt(static_cast<double>(d) / block) / (norm + 1e-8);
    int code = 0;
    bool near_tie = false;
    for (int n = 0; n + 1 < (1 << kBits); ++n) {
      const double middle = (static_cast<double>(centroid<kBits>(n)) + centroid<kBits>(n + 1)) / 2;
      code += y >= middle ? 1 : 0;
      near_tie = near_tie || std::abs(y - middle) < tie;
    }
    if (!near_tie) {
      ASSERT_EQ(packed_code(row.bytes, kBits, i), code) << i << " of " << d;
    }
  }
  // The norm is stored as fp16, saturated: half a unit in the last place, or of the smallest subnormal.
  const float stored = half_at(row.bytes, static_cast<std::size_t>(d * kBits / 8));
  const double limited = std::min(norm, 65504.0);
  ASSERT_LE(std::abs(stored - limited), std::max(0x1.01p-11 * limited, 0x1.01p-25));
  // With norm correction the reader's row has the stored norm, whatever the codes are.
  const std::vector<double> got = row.decode();
  ASSERT_NEAR(std::sqrt(squared(got)), stored, 1e-5 * stored);
}

TEST_P(Definition, TurboQuantKeys) {
  for (const Row& x : rows()) {
    expect_turboquant_key<TurboQuantK4, 4>(x);
    expect_turboquant_key<TurboQuantK3, 3>(x);
  }
}

template <class F, int kBits>
void expect_turboquant_value(const Row& x) {
  constexpr float kMaxCode = (1 << kBits) - 1;
  const auto d = static_cast<int>(x.size());
  Encoded<F> row(x);
  const float low = *std::min_element(x.begin(), x.end());
  const float high = *std::max_element(x.begin(), x.end());
  const float scale = std::max(times(high - low, 1.0F / kMaxCode), 1e-8F);
  const auto meta = static_cast<std::size_t>(d * kBits / 8);
  const auto half = [](float value) { return half_to_float(float_to_half(std::clamp(value, -65504.0F, 65504.0F))); };
  ASSERT_EQ(half_at(row.bytes, meta), half(scale));
  ASSERT_EQ(half_at(row.bytes, meta + 2), half(low));
  const float inverse = 1.0F / scale;
  const std::vector<double> got = row.decode();
  for (int i = 0; i < d; ++i) {
    const auto at = static_cast<std::size_t>(i);
    const int code = static_cast<int>(std::clamp(times(x[at] - low, inverse) + 0.5F, 0.0F, kMaxCode));
    ASSERT_EQ(packed_code(row.bytes, kBits, i), code) << i;
    // code * scale + min of what is stored; the reader adds half the codes' range to one and takes it off the other.
    const double exact = static_cast<double>(code) * half(scale) + half(low);
    ASSERT_NEAR(got[at], exact, 0x1p-22 * (std::abs(half(low)) + kMaxCode * half(scale)));
  }
}

TEST_P(Definition, TurboQuantValues) {
  for (const Row& x : rows()) {
    expect_turboquant_value<TurboQuantV4, 4>(x);
    expect_turboquant_value<TurboQuantV3, 3>(x);
  }
}

// e4b15 in double precision: the nearest multiple of the step at x, with ties away from zero, and at most 1.75.
double nearest_e4b15(float x) {
  const double magnitude = std::min(std::abs(static_cast<double>(x)), 1.75);
  const double step = std::ldexp(1.0, std::max(-14, magnitude == 0.0 ? -14 : std::ilogb(magnitude)) - 3);
  return std::copysign(std::floor(magnitude / step + 0.5) * step, x);
}

TEST_P(Definition, TurboQuantFp8Keys) {
  for (const Row& x : rows()) {
    Encoded<TurboQuantK8> e4m3(x);
    Encoded<TurboQuantK8E4B15> e4b15(x);
    const std::vector<double> e4b15_values = e4b15.decode();
    for (std::size_t i = 0; i < x.size(); ++i) {
      ASSERT_EQ(e4m3.bytes[i], E4M3::encode(x[i]));
      ASSERT_EQ(e4b15_values[i], nearest_e4b15(x[i]));
      ASSERT_NE(e4b15.bytes[i] & 0x7f, 0x7f);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(HeadSizes, Definition, ::testing::ValuesIn(kHeadSizes),
                         [](const auto& param) { return std::string("d").append(std::to_string(param.param)); });

}  // namespace
}  // namespace quire::format
