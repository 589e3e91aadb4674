// The public rotation, against the definition in double precision: H[i][j] = (-1)^popcount(i & j) inside blocks of b,
// and the signs of std::mt19937.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "quire/ops.h"
#include "support/owned_tensor.h"
#include "support/random.h"
#include "support/tested_ops.h"

namespace quire::testing {
namespace {

int sign_of(int i) {
  static const std::vector<int> signs = [] {
    std::mt19937 twister(0x9E3779B9U);
    std::vector<int> all(512);
    for (int& sign : all) sign = (twister() & 0xFFFFFFU) < 0x800000U ? 1 : -1;
    return all;
  }();
  return signs[static_cast<std::size_t>(i)];
}

// Row x, rotated by the definition.
std::vector<double> rotated(const std::vector<double>& x, bool inverse, bool signs) {
  const int d = static_cast<int>(x.size());
  const int block = d & -d;
  std::vector<double> y(x.size());
  for (int i = 0; i < d; ++i) {
    for (int j = i / block * block; j < (i / block + 1) * block; ++j) {
      const double entry =
          std::popcount(static_cast<unsigned>(i % block) & static_cast<unsigned>(j % block)) % 2 == 0 ? 1.0 : -1.0;
      const int sign = !signs ? 1 : sign_of(inverse ? i % block : j % block);
      y[static_cast<std::size_t>(i)] += sign * entry * x[static_cast<std::size_t>(j)];
    }
  }
  return y;
}

TEST(Hadamard, IsItsDefinition) {
  Random random(7);
  for (const int d : {1, 2, 16, 32, 48, 64, 80, 96, 128, 192, 256, 320, 512}) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      for (const bool inverse : {false, true}) {
        for (const bool signs : {false, true}) {
          OwnedTensor x(dtype, {3, 5, d}, 3), out(DType::kFloat32, {3, 5, d}, 2);
          // Integers of up to 7 bits are exact in every float, and so are their sums in fp32.
          std::vector<float> values(static_cast<std::size_t>(x.view.numel()));
          for (float& value : values) value = static_cast<float>(random.below(255)) - 127.0F;
          x.fill(values);
          const Status status = ops.hadamard({x.view, out.view, inverse, signs});
          ASSERT_TRUE(status.ok()) << status.message();
          for (std::int64_t row = 0; row < 15; ++row) {
            const auto* first = values.data() + row * d;
            const std::vector<double> expected = rotated({first, first + d}, inverse, signs);
            for (int i = 0; i < d; ++i) {
              ASSERT_EQ(out.get(row / 5, row % 5, i), expected[static_cast<std::size_t>(i)])
                  << d << " " << dtype_name(dtype) << (inverse ? " inverse" : "") << (signs ? " signs" : "");
            }
          }
        }
      }
    }
  }
}

// There and back in place gives b times what was there, rounded to the tensor's own dtype once each way.
TEST(Hadamard, TheInverseUndoesIt) {
  constexpr int kHeadSize = 96, kBlock = 32;
  OwnedTensor x(DType::kFloat32, {4, kHeadSize});
  Random random(3);
  std::vector<float> values(static_cast<std::size_t>(x.view.numel()));
  for (float& value : values) value = static_cast<float>(random.below(2001)) - 1000.0F;
  x.fill(values);
  ASSERT_TRUE(ops.hadamard({x.view, x.view, false, true}).ok());
  ASSERT_TRUE(ops.hadamard({x.view, x.view, true, true}).ok());
  for (std::int64_t t = 0; t < 4; ++t) {
    for (int i = 0; i < kHeadSize; ++i) {
      ASSERT_EQ(x.get(t, i), kBlock * values[static_cast<std::size_t>(t * kHeadSize + i)]);
    }
  }
}

// A column of a matrix is a row like any other, and gaps stay as they were.
TEST(Hadamard, StridesAreRead) {
  OwnedTensor x(DType::kFloat32, {64, 3}), out(DType::kBFloat16, {64, 3}, 1);
  std::vector<float> values(static_cast<std::size_t>(x.view.numel()));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i % 7) - 3.0F;
  x.fill(values);
  const auto columns = [](const OwnedTensor& tensor) {
    return Tensor::strided(tensor.view.data, tensor.view.dtype, {3, 64},
                           {tensor.view.strides[1], tensor.view.strides[0]});
  };
  ASSERT_TRUE(ops.hadamard({columns(x), columns(out), false, true}).ok());
  for (int column = 0; column < 3; ++column) {
    std::vector<double> row;
    for (std::int64_t i = 0; i < 64; ++i) row.push_back(x.get(i, column));
    const std::vector<double> expected = rotated(row, false, true);
    for (std::int64_t i = 0; i < 64; ++i) {
      ASSERT_EQ(out.get(i, column), expected[static_cast<std::size_t>(i)]);  // below 2^8: bfloat16 holds them
    }
  }
  for (std::int64_t i = 0; i + 1 < 64; ++i) {  // the gap behind each row of the matrix
    ASSERT_EQ(out.bytes[static_cast<std::size_t>(i * 4 + 3) * 2], 0xFF);
  }
}

TEST(Hadamard, NoRowsAreNoWork) {
  OwnedTensor x(DType::kFloat32, {0, 64}), out(DType::kFloat32, {0, 64});
  EXPECT_TRUE(ops.hadamard({x.view, out.view}).ok());
}

TEST(Hadamard, RefusesInASentence) {
  const struct {
    const char* words;
    void (*spoil)(HadamardArgs& args);
  } cases[] = {
      {"x is not given; it must be [any, head_size]", [](HadamardArgs& a) { a.x = {}; }},
      {"out is not given", [](HadamardArgs& a) { a.out = {}; }},
      {"x is int8; supported: float32, float16, bfloat16", [](HadamardArgs& a) { a.x.dtype = DType::kInt8; }},
      {"out is float8_e4m3fn; supported", [](HadamardArgs& a) { a.out.dtype = DType::kFloat8E4M3; }},
      {"out is [2, 32] float32 and x is [2, 64] float32; they must have one shape",
       [](HadamardArgs& a) { a.out.shape[1] = 32; }},
      {"they must have one shape", [](HadamardArgs& a) { a.out.ndim = 1; }},
      {"it must have 1 to 6 dimensions", [](HadamardArgs& a) { a.x.ndim = a.out.ndim = 0; }},
      {"x has 7 dimensions", [](HadamardArgs& a) { a.x.ndim = 7; }},
      {"rows of 1 to 512 elements are supported",
       [](HadamardArgs& a) {
         a.x.ndim = a.out.ndim = 1;
         a.x.shape[0] = a.out.shape[0] = 1024;
         a.x.strides[0] = a.out.strides[0] = 1;
       }},
      {"where elements overlap", [](HadamardArgs& a) { a.out.strides[0] = 1; }},
      {"x is a null pointer", [](HadamardArgs& a) { a.x.data = nullptr; }},
      {"out is not aligned", [](HadamardArgs& a) { a.out.data = static_cast<std::uint8_t*>(a.out.data) + 1; }},
      {"out is on cuda:0, but x is on cpu", [](HadamardArgs& a) { a.out.device = Device::cuda(); }},
  };
  for (const auto& entry : cases) {
    OwnedTensor x(DType::kFloat32, {2, 64}), out(DType::kFloat32, {2, 64});
    HadamardArgs args{x.view, out.view};
    entry.spoil(args);
    const Status status = hadamard(args, nullptr);
    ASSERT_FALSE(status.ok()) << entry.words;
    EXPECT_NE(status.message().find(entry.words), std::string::npos) << status.message();
    for (const std::uint8_t byte : out.bytes) ASSERT_EQ(byte, 0xFF) << "a refused call wrote";
  }
}

}  // namespace
}  // namespace quire::testing
