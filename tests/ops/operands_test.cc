// 16-bit operands of the CPU's kernels: what they are of each code, on every SIMD target, whatever the order that rows
// are taken apart in.
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

using cpu::Kernels;
using cpu::Operand;
using cpu::OperandFormat;
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

INSTANTIATE_TEST_SUITE_P(Targets, Operands, ::testing::ValuesIn(cpu::simd_targets()),
                         [](const auto& param) { return param.param; });

}  // namespace
}  // namespace quire::testing
