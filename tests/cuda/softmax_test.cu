// The softmax of the tensor-core kernels in both orientations, against double precision: the same logits, tile by tile,
// with masks, biases, offsets and a poisoned value.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cuda/device_memory.h"
#include "cuda/softmax/softmax.cuh"
#include "format/int4_per_token_head.h"
#include "support/random.h"

namespace quire::testing {
namespace {

using cuda::KeysOnM;
using cuda::RowInfo;
using cuda::RowsOnM;

constexpr int kRows = 16, kTileKeys = 32, kTiles = 5, kKeys = kTileKeys * kTiles;
using F = format::Int4PerTokenHead;  // scales and offsets on both sides

struct Input {
  float product[kRows][kKeys];  // of the 16-bit query with levels
  float key_scale[kKeys], key_offset[kKeys], value_scale[kKeys], value_offset[kKeys];
  float value[kKeys];  // one column of levels
  RowInfo row[kRows];
  float factor;
};
struct Output {
  float max[kRows], sum[kRows], result[kRows];
};

template <class Orientation>
__global__ void run_softmax(cuda::AttentionParams p, const Input* input, Output* output) {
  constexpr int kRowTiles = kRows / Orientation::kTileRows;
  constexpr int kFragments = kTileKeys / Orientation::kTileKeys;
  __shared__ alignas(16) Input in;
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < static_cast<int>(sizeof(Input) / 4); i += 32) {
    reinterpret_cast<std::uint32_t*>(&in)[i] = reinterpret_cast<const std::uint32_t*>(input)[i];
  }
  __syncwarp();
  cuda::TileRows tile{};
  tile.sequence.context_len = 3;
  cuda::RunningSoftmax<Orientation, kRowTiles> state(p, in.factor * cuda::kLog2E, in.row, lane, 0.0F);
  float acc[kRowTiles][1][4] = {};
  for (int first = 0; first < kKeys; first += kTileKeys) {
    float s[kRowTiles][kFragments][4];
    std::uint32_t largest = 0;
    for (int n = 0; n < kTileKeys; ++n) {
      largest = ::max(largest, __float_as_uint(fabsf(in.value_scale[first + n])));
    }
    for (int m = 0; m < kRowTiles; ++m) {
      for (int t = 0; t < kFragments; ++t) {
        for (int i = 0; i < 4; ++i) {
          s[m][t][i] = in.product[state.at.row(m, state.at.row_of(i))][first + state.at.key(t, state.at.key_of(i))];
        }
      }
    }
    const std::uint32_t readable = first == kTileKeys ? 0xfffffffbU : 0xffffffffU;  // the third key of the second tile
    float correction[kRowTiles][2];
    state.template scale_logits<F>(s, in.key_scale + first, in.key_offset + first);
    if (state.biased) state.bias_logits(s, p, tile, in.row, first);
    state.mask_logits(s, in.row, &readable, first);
    bool moved = state.exponentials(s, correction);
    moved |= state.template weigh_values<F>(s, in.value_scale + first, in.value_offset + first, largest, correction);
    if (__any_sync(~0U, moved)) state.rescale(acc, correction);
    for (int m = 0; m < kRowTiles; ++m) {
      for (int t = 0; t < kFragments; ++t) {
        for (int i = 0; i < 4; ++i) {
          if (s[m][t][i] != 0.0F) acc[m][0][i] += s[m][t][i] * in.value[first + state.at.key(t, state.at.key_of(i))];
        }
      }
    }
  }
  state.finish();
  for (int m = 0; m < kRowTiles; ++m) {
    for (int r = 0; r < 2; ++r) {
      float own = 0.0F;
      for (int i = 0; i < 4; ++i) own += state.at.row_of(i) == r ? acc[m][0][i] : 0.0F;
      const float total = state.at.over_row(own, [](float a, float b) { return a + b; });
      if (!state.at.leads()) continue;
      const int row = state.at.row(m, r);
      output->max[row] = state.max[m][r];
      output->sum[row] = state.sum[m][r];
      output->result[row] = total * state.unit + state.offset[m][r];
    }
  }
}

struct Options {
  bool biased, poisoned;
};

Input make_input(const Options& options) {
  Random random(options.biased ? 5 : 6);
  Input input{};
  input.factor = 0.09F;
  for (auto& row : input.product) {
    for (float& x : row) x = 20.0F * static_cast<float>(random.normal());
  }
  for (int n = 0; n < kKeys; ++n) {
    input.key_scale[n] = std::exp(static_cast<float>(random.normal()) * 0.5F);
    input.key_offset[n] = static_cast<float>(random.normal());
    input.value_scale[n] = std::exp(3.0F * static_cast<float>(random.normal()));
    input.value_offset[n] = static_cast<float>(random.normal());
    input.value[n] = static_cast<float>(random.below(16)) - 8.0F;
  }
  for (int r = 0; r < kRows; ++r) {
    RowInfo& row = input.row[r];
    row.query = r / 2;
    row.position = 3 + r / 2;
    row.head = r % 2;
    row.begin = 5 * r;  // starts in the middle of tiles
    row.end = r == 4 ? row.begin : std::min(kKeys, 40 + 9 * r);
    if (r == 3 || r == 7) row.prefix_end = 2 * r;  // a gap in one tile, and one that ends in the next
    row.scale = 1.0F + 0.125F * static_cast<float>(r);
    row.sum = static_cast<float>(random.normal());
  }
  if (options.poisoned) input.value_scale[70] = std::nanf("");
  return input;
}

template <class Orientation>
void check(const Options& options) {
  const Input input = make_input(options);
  cuda::AttentionParams p;
  float slopes[2] = {0.03F, 0.1F};
  Result<cuda::DeviceBuffer> alibi = cuda::DeviceBuffer::copy_of(slopes, sizeof(slopes));
  Result<cuda::DeviceBuffer> in = cuda::DeviceBuffer::copy_of(&input, sizeof(input));
  Result<cuda::DeviceBuffer> out = cuda::DeviceBuffer::allocate(sizeof(Output));
  ASSERT_TRUE(alibi.ok() && in.ok() && out.ok() && out->poison().ok());
  if (options.biased) {
    p.softcap = 30.0F;
    p.alibi_slopes = static_cast<const float*>(alibi->data());
  }
  run_softmax<Orientation><<<1, 32>>>(p, static_cast<const Input*>(in->data()), static_cast<Output*>(out->data()));
  Output got;
  ASSERT_TRUE(out->copy_out(&got, sizeof(got)).ok());
  for (int r = 0; r < kRows; ++r) {
    const RowInfo& row = input.row[r];
    double max = -INFINITY, sum = 0.0, result = 0.0, magnitude = 0.0;
    std::vector<double> logits(kKeys, -INFINITY);
    for (int n = 0; n < row.end; ++n) {
      if ((n >= row.prefix_end && n < row.begin) || n == kTileKeys + 2) continue;
      double s = static_cast<double>(input.factor) * row.scale *
                 (static_cast<double>(input.key_scale[n]) * input.product[r][n] +
                  static_cast<double>(input.key_offset[n]) * row.sum);
      if (options.biased) s = p.softcap * std::tanh(s / p.softcap) + slopes[row.head] * (n - 3);
      logits[n] = s;
      max = std::max(max, s);
    }
    bool nan = false;
    for (int n = 0; n < kKeys; ++n) {
      if (logits[n] == -INFINITY) continue;
      const double weight = std::exp(logits[n] - max);
      const double value = static_cast<double>(input.value_scale[n]) * input.value[n] + input.value_offset[n];
      nan = nan || std::isnan(value);
      sum += weight;
      result += weight * value;
      magnitude += weight * std::fabs(value);
    }
    SCOPED_TRACE(r);
    if (row.begin >= row.end) {
      EXPECT_EQ(got.max[r], -INFINITY);
      EXPECT_EQ(got.sum[r], 0.0F);
      continue;
    }
    // A logit of magnitude up to 300 in fp32, times log2(e), is off by 2^-24 of it a few times over; ex2 adds 2 ulp,
    // and there are 160 summands.
    const double tolerance = 300 * 6 * 0x1p-24 + (160 + 4) * 0x1p-23;
    EXPECT_NEAR(got.max[r], max, 300 * 6 * 0x1p-24);
    EXPECT_NEAR(got.sum[r], sum, sum * tolerance);
    if (nan) {
      EXPECT_TRUE(std::isnan(got.result[r]));
    } else {
      EXPECT_NEAR(got.result[r], result, magnitude * tolerance);
    }
  }
}

TEST(CudaSoftmax, BothOrientationsAreTheSoftmax) {
  for (const Options& options : {Options{false, false}, Options{true, false}, Options{false, true}}) {
    SCOPED_TRACE(options.biased ? "biased" : options.poisoned ? "poisoned" : "plain");
    check<RowsOnM>(options);
    check<KeysOnM>(options);
  }
}

}  // namespace
}  // namespace quire::testing
