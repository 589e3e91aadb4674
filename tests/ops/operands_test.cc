// What the CPU's kernels make of each code, on every SIMD target: 16-bit operands, whatever the order that rows are taken
// apart in, fp32 levels, and floats in registers.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "format/float_types.h"
#include "format/row.h"
#include "support/random.h"

namespace quire::testing {
namespace {

using cpu::FloatRows;
using cpu::Kernels;
using cpu::kKeyTile;
using cpu::LevelTile;
using cpu::Operand;
using cpu::OperandFormat;
using cpu::Prefetch;
using cpu::RowAddress;
using cpu::TileRows;

class Operands : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { ASSERT_TRUE(cpu::use_simd_target(GetParam()).ok()); }
  void TearDown() override { ASSERT_TRUE(cpu::use_simd_target("").ok()); }
};

double operand_value(Operand operand, std::uint16_t code) {
  if (operand == Operand::kBFloat16) return format::bfloat16_to_float(code);
  return static_cast<std::int16_t>(code);
}

// Rows of random bytes, the last one ending where its memory does.
template <class F>
struct Rows {
  static constexpr int kCount = 13;
  std::vector<std::uint8_t> bytes;
  std::vector<RowAddress> addresses;
  explicit Rows(int head_size) {
    const std::int64_t size = format::row_bytes<F>(head_size);
    Random random(static_cast<std::uint64_t>(head_size));
    bytes.resize(static_cast<std::size_t>(kCount * size));
    for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random.below(256));
    for (int n = 0; n < kCount; ++n) addresses.push_back({bytes.data() + n * size, nullptr, nullptr});
  }
  TileRows tile() const { return {addresses.data(), kCount, 0, 0, 0}; }
};

// The operands of a row times one factor, here that of the largest, are its levels: exactly but for TurboQuant's keys,
// whose levels are 2.7e-4 from the integers in the best unit.
template <class F>
void check_row(const std::uint8_t* row, format::RowShape shape, const OperandFormat& format,
               const std::vector<std::int16_t>& element_of, const auto& operand_at) {
  std::vector<float> levels(format::kMaxHeadSize);
  for (int u = 0; u < shape.head_size / F::kUnit; ++u) {
    F::unpack(row + u * F::kUnitBytes, levels.data() + u * F::kUnit);
  }
  double largest_level = 0.0, largest_operand = 0.0;
  for (int code = 0; code < 256; ++code) {  // the codebook's ends, from all codes there are
    std::uint8_t bytes[8] = {static_cast<std::uint8_t>(code)};
    float unit[8];
    F::unpack(bytes, unit);
    if (F::kUnit > 1 || format.operand == Operand::kInt16) {
      largest_level = std::max(largest_level, std::fabs(static_cast<double>(unit[0])));
    }
  }
  largest_operand = format.max_level;
  const double factor = format.operand == Operand::kBFloat16 ? 1.0 : largest_level / largest_operand;
  const double slack = F::kLevelNorm ? 4e-4 : 1e-6 * largest_level;
  std::vector<int> seen(static_cast<std::size_t>(shape.head_size), 0);
  for (std::size_t p = 0; p < element_of.size(); ++p) {
    const int element = element_of[p];
    if (element < 0) continue;
    ++seen[static_cast<std::size_t>(element)];
    const double expected = levels[static_cast<std::size_t>(element)];
    const double got = factor * operand_value(format.operand, operand_at(static_cast<int>(p)));
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(got)) << F::kName << " element " << element;
    } else if (std::isinf(expected)) {
      ASSERT_EQ(got, expected);
    } else {
      ASSERT_NEAR(got, expected, slack) << F::kName << " d " << shape.head_size << " element " << element;
    }
  }
  for (const int times : seen) ASSERT_EQ(times, 1) << F::kName << " d " << shape.head_size;
}

TEST_P(Operands, AreTheLevelsOfEveryCode) {
  const Kernels& k = cpu::kernels();
  format::for_each_format([&]<class F>() {
    const OperandFormat& format = k.operands[static_cast<std::size_t>(format::format_id<F>)];
    if (format.operand == Operand::kFloat32) return;
    for (const int head_size : {32, 40, 64, 80, 96, 112, 128, 192, 256, 512}) {
      if (head_size % format.per_word != 0 || head_size % F::kUnit != 0) continue;
      const format::RowShape shape = format::row_shape(head_size);
      const Rows<F> rows(head_size);
      const int k_positions = format.key_positions(shape);
      std::vector<std::int16_t> order(static_cast<std::size_t>(k_positions));
      format.key_order(shape, order.data());
      std::vector<std::uint16_t> keys(static_cast<std::size_t>(k_positions) * cpu::kKeyGroup);
      format.load_keys(rows.tile(), shape, keys.data());
      for (int n = 0; n < rows.kCount; ++n) {
        check_row<F>(rows.addresses[static_cast<std::size_t>(n)].data, shape, format, order,
                     [&](int p) { return keys[static_cast<std::size_t>(n * k_positions + p)]; });
        if (HasFatalFailure()) return;
      }
      const int v_positions = format.value_positions(shape);
      order.resize(static_cast<std::size_t>(v_positions));
      format.value_order(shape, order.data());
      std::vector<std::uint16_t> values(static_cast<std::size_t>(v_positions) * cpu::kKeyTile);
      format.load_values(rows.tile(), shape, values.data());
      for (int n = 0; n < rows.kCount; ++n) {
        check_row<F>(rows.addresses[static_cast<std::size_t>(n)].data, shape, format, order,
                     [&](int p) { return values[static_cast<std::size_t>((n / 2 * v_positions + p) * 2 + n % 2)]; });
        if (HasFatalFailure()) return;
      }
    }
  });
}

// Formats of one code an element, with a scale beside the row or none: the floats and fp8 among them.
template <class F>
constexpr bool kIsPlain = F::kUnit == 1 && F::kCentre == format::Centre::kNone &&
                          (F::kMetaPlace == format::MetaPlace::kNone || F::kMetaBytes == 4);

// Rows of such a format with a scale of 1. Where `finite`, codes that are not finite are made 0.
template <class F>
struct PlainRows : Rows<F> {
  float one = 1.0F;
  PlainRows(int head_size, bool finite) : Rows<F>(head_size) {
    for (RowAddress& row : this->addresses) row.meta = reinterpret_cast<const std::uint8_t*>(&one);
    if (!finite) return;
    for (int n = 0; n < this->kCount; ++n) {
      for (int i = 0; i < head_size; ++i) {
        auto* code = const_cast<std::uint8_t*>(this->addresses[static_cast<std::size_t>(n)].data) + i * F::kUnitBytes;
        if (!std::isfinite(level(n, i))) std::memset(code, 0, F::kUnitBytes);
      }
    }
  }
  float level(int n, int i) const {
    float x;
    F::unpack(this->addresses[static_cast<std::size_t>(n)].data + i * F::kUnitBytes, &x);
    return x;
  }
};

TEST_P(Operands, LevelsOfFloatsAreExact) {
  const Kernels& k = cpu::kernels();
  format::for_each_format([&]<class F>() {
    if constexpr (kIsPlain<F>) {
      for (const int head_size : {8, 40, 128, 256}) {
        for (const bool finite : {false, true}) {
          const PlainRows<F> rows(head_size, finite);
          LevelTile tile{};
          tile.stride = cpu::padded(head_size);
          std::vector<float> levels(static_cast<std::size_t>(tile.stride) * kKeyTile + 16, -1.0F);
          tile.levels = levels.data() + (64 - reinterpret_cast<std::uintptr_t>(levels.data()) % 64) % 64 / 4;
          k.load_tile[static_cast<std::size_t>(format::format_id<F>)](rows.tile(), format::row_shape(head_size),
                                                                      nullptr, tile);
          bool all_finite = true;
          for (int n = 0; n < rows.kCount; ++n) {
            EXPECT_EQ(tile.scale[n], 1.0F);
            for (int i = 0; i < tile.stride; ++i) {
              const float expected = i < head_size ? rows.level(n, i) : 0.0F;
              const float got = tile.levels[n * tile.stride + i];
              ASSERT_TRUE(got == expected || (std::isnan(got) && std::isnan(expected)))
                  << F::kName << " d " << head_size << " element " << i << ": " << got << " for " << expected;
              all_finite = all_finite && std::isfinite(expected);
            }
          }
          EXPECT_EQ(tile.all_finite, all_finite) << F::kName;
        }
      }
    }
  });
}

// Of a query or of weights that are 0 but for a 1, the product is a level.
TEST_P(Operands, FloatsInRegistersAreExact) {
  const Kernels& k = cpu::kernels();
  format::for_each_format([&]<class F>() {
    if constexpr (kIsPlain<F>) {
      const FloatRows& floats = k.float_rows[static_cast<std::size_t>(format::format_id<F>)];
      for (const int head_size : {64, 80, 128, 256}) {
        if (floats.dot == nullptr || !floats.takes(head_size)) continue;
        const PlainRows<F> rows(head_size, true);
        float scale[kKeyTile], offset[kKeyTile];
        std::fill_n(scale, kKeyTile, 1.0F);
        if (floats.load_affines != nullptr) {
          ASSERT_TRUE(floats.load_affines(rows.tile(), format::row_shape(head_size), scale, offset));
        }
        constexpr int kNumRows = 7;
        for (int first = 0; first + kNumRows <= head_size; first += kNumRows) {
          std::vector<float> q(static_cast<std::size_t>(kNumRows) * head_size), scores(kNumRows * kKeyTile);
          for (int m = 0; m < kNumRows; ++m) q[static_cast<std::size_t>(m * head_size + first + m)] = 1.0F;
          Prefetch none;
          floats.dot(rows.tile(), head_size, q.data(), kNumRows, head_size, scores.data(), none);
          for (int m = 0; m < kNumRows; ++m) {
            for (int n = 0; n < rows.kCount; ++n) {
              ASSERT_EQ(scores[static_cast<std::size_t>(m * kKeyTile + n)] * scale[n], rows.level(n, first + m))
                  << F::kName << " d " << head_size << " element " << first + m;
            }
          }
        }
        std::vector<float> p(static_cast<std::size_t>(rows.kCount) * kKeyTile);
        std::vector<float> acc(static_cast<std::size_t>(rows.kCount) * head_size);
        for (int n = 0; n < rows.kCount; ++n) p[static_cast<std::size_t>(n * kKeyTile + n)] = scale[n];
        Prefetch none;
        floats.accumulate(rows.tile(), head_size, p.data(), rows.kCount, acc.data(), head_size, none);
        for (int n = 0; n < rows.kCount; ++n) {
          for (int i = 0; i < head_size; ++i) {
            ASSERT_EQ(acc[static_cast<std::size_t>(n * head_size + i)], rows.level(n, i))
                << F::kName << " d " << head_size << " element " << i;
          }
        }
      }
    }
  });
}

TEST(SimdTargets, TheFirstIsTheDefaultAndOnIntelNotZen4s) {
  ASSERT_TRUE(cpu::use_simd_target("").ok());
  EXPECT_EQ(cpu::kernels().target, cpu::simd_targets().front());
#if defined(__x86_64__)
  if (__builtin_cpu_is("intel")) {
    EXPECT_STRNE(cpu::kernels().target, "AVX3_ZEN4");
  }
#endif
}

INSTANTIATE_TEST_SUITE_P(Targets, Operands, ::testing::ValuesIn(cpu::simd_targets()),
                         [](const auto& param) { return param.param; });

}  // namespace
}  // namespace quire::testing
