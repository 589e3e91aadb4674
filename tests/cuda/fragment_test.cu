// The tensor-core kernels' way from codes to levels (cuda/format), against the format's own unpack: every word of 16
// bits at even and odd places, random bytes, and rows at every alignment, to shared memory and to registers.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/device_memory.h"
#include "cuda/format/formats.cuh"
#include "cuda/stage/levels.cuh"
#include "format/float_types.h"
#include "support/modes.h"
#include "support/random.h"

namespace quire::testing {
namespace {

constexpr int kHead = 128;
constexpr int kSkews = 16;

template <class F>
constexpr int kRowBytes = static_cast<int>(format::code_bytes<F>(kHead));

// Block r converts row r, which lies `skew` bytes from a multiple of 16 in shared memory. levels and registers are
// [rows][kHead] of 16 bits; `registers` has the elements in the order of levels_in_mma_order.
template <class F>
__global__ void convert_rows(const std::uint8_t* rows, int skew, std::uint32_t* levels, std::uint32_t* registers,
                             float* squares) {
  using cuda::Fragment;
  constexpr int kGroup = Fragment<F>::kElements;
  __shared__ alignas(16) std::uint8_t raw[kRowBytes<F> + 64];
  __shared__ alignas(16) std::uint32_t out[kHead / 2];
  __shared__ cuda::Tables<F> tables;
  cuda::FragmentTables<F>::fill(tables, static_cast<int>(threadIdx.x), 32);
  for (int i = static_cast<int>(threadIdx.x); i < kRowBytes<F> + 64; i += 32) {
    const int at = i - skew - 16;
    raw[i] = at >= 0 && at < kRowBytes<F> ? rows[blockIdx.x * kRowBytes<F> + at] : 0xA5;
  }
  __syncwarp();
  if (threadIdx.x == 0) {
    const std::uint8_t* row = raw + 16 + skew;
    float sum = 0.0F;
    cuda::convert_part<F, kHead>(row, skew == 0, reinterpret_cast<std::uint8_t*>(out), 0, kHead, tables, &sum);
    float again = 0.0F;
    cuda::sum_squares<F, kHead>(row, skew == 0, 0, kHead, tables, &again);
    squares[blockIdx.x] = F::kLevelNorm ? sum : again;
    for (int g = 0; g < kHead / kGroup; ++g) {
      cuda::Codes<F> codes;
      cuda::load_codes<F>(row, skew == 0, g, g == 0, codes);
      std::uint32_t operand[kGroup / 4][2];
      cuda::levels_in_mma_order<F>(codes, tables, operand);
      for (int s = 0; s < kGroup / 4; ++s) {
        for (int r = 0; r < 2; ++r) registers[(blockIdx.x * kHead + g * kGroup) / 2 + 2 * s + r] = operand[s][r];
      }
    }
  }
  __syncwarp();
  for (int i = static_cast<int>(threadIdx.x); i < kHead / 2; i += 32) levels[blockIdx.x * kHead / 2 + i] = out[i];
}

// Whole rows that hold every word of 16 bits at even and at odd places, then random bytes.
template <class F>
std::vector<std::uint8_t> hostile_rows() {
  std::vector<std::uint8_t> bytes;
  for (const int shift : {0, 1}) {
    for (int i = 0; i < shift; ++i) bytes.push_back(0x5A);
    for (int word = 0; word < 65536; ++word) {
      bytes.push_back(static_cast<std::uint8_t>(word));
      bytes.push_back(static_cast<std::uint8_t>(word >> 8));
    }
  }
  Random random(7);
  for (int i = 0; i < 1 << 18; ++i) bytes.push_back(static_cast<std::uint8_t>(random.below(256)));
  bytes.resize(bytes.size() / kRowBytes<F> * kRowBytes<F>);
  return bytes;
}

// Whether 16 bits are the level: the fp16 nearest to level * unit, or any NaN for a NaN.
bool is_level(std::uint16_t code, float level, float unit) {
  if (std::isnan(level)) return std::isnan(format::half_to_float(code));
  return code == format::float_to_half(level * unit);
}

template <class F>
void check_format() {
  SCOPED_TRACE(std::string(F::kName));
  const std::vector<std::uint8_t> bytes = hostile_rows<F>();
  const auto num_rows = static_cast<int>(bytes.size() / kRowBytes<F>);
  using cuda::DeviceBuffer;
  Result<DeviceBuffer> rows = DeviceBuffer::copy_of(bytes.data(), bytes.size());
  const std::size_t level_bytes = static_cast<std::size_t>(num_rows) * kHead * 2;
  Result<DeviceBuffer> levels = DeviceBuffer::allocate(level_bytes);
  Result<DeviceBuffer> registers = DeviceBuffer::allocate(level_bytes);
  Result<DeviceBuffer> squares = DeviceBuffer::allocate(static_cast<std::size_t>(num_rows) * 4);
  ASSERT_TRUE(rows.ok() && levels.ok() && registers.ok() && squares.ok());
  for (int skew = 0; skew < kSkews; ++skew) {
    convert_rows<F><<<num_rows, 32>>>(
        static_cast<const std::uint8_t*>(rows->data()), skew, static_cast<std::uint32_t*>(levels->data()),
        static_cast<std::uint32_t*>(registers->data()), static_cast<float*>(squares->data()));
    std::vector<std::uint16_t> got(static_cast<std::size_t>(num_rows) * kHead), in_registers(got.size());
    std::vector<float> norms(static_cast<std::size_t>(num_rows));
    ASSERT_TRUE(levels->copy_out(got.data(), level_bytes).ok());
    ASSERT_TRUE(registers->copy_out(in_registers.data(), level_bytes).ok());
    ASSERT_TRUE(squares->copy_out(norms.data(), norms.size() * 4).ok());
    for (int r = 0; r < num_rows; ++r) {
      // A byte of 0 before the row, for units that see it.
      std::vector<std::uint8_t> row(1 + kRowBytes<F>);
      std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(r) * kRowBytes<F>, kRowBytes<F>, row.begin() + 1);
      double norm = 0.0;
      for (int u = 0; u < kHead / F::kUnit; ++u) {
        float level[F::kUnit];
        F::unpack(row.data() + 1 + u * F::kUnitBytes, level);
        for (int j = 0; j < F::kUnit; ++j) {
          const std::size_t i = static_cast<std::size_t>(r) * kHead + u * F::kUnit + j;
          norm += static_cast<double>(level[j]) * level[j];
          ASSERT_TRUE(is_level(got[i], level[j], cuda::level_unit<F>))
              << "row " << r << " element " << u * F::kUnit + j << " skew " << skew << ": " << got[i] << " for "
              << level[j];
          ASSERT_EQ(in_registers[i], got[i]) << "row " << r << " element " << u * F::kUnit + j;
        }
      }
      // fp32 sums of 128 squares, of levels that are off by 7.4e-5 of themselves at most.
      const double expected = norm * cuda::level_unit<F> * cuda::level_unit<F>;
      if (std::isfinite(expected)) {
        ASSERT_NEAR(norms[static_cast<std::size_t>(r)], expected, expected * (2 * 7.4e-5 + 130 * 0x1p-24)) << r;
      }
    }
  }
}

struct CheckFormat {
  template <class F>
  void operator()() const {
    if constexpr (!cuda::kRaw16<F> && !std::is_same_v<F, format::Float32>) check_format<F>();
  }
};

TEST(CudaFragments, AreWhatUnpackGives) { format::for_each_format(CheckFormat{}); }

}  // namespace
}  // namespace quire::testing
