// Few rows of fp32 and rows of floats as they are stored: a vector of a row becomes fp32 in the register that it is
// loaded to, and meets all of the few rows there. A tile of fp32 levels in memory would be twice as large as the rows
// of 16 bits, and would be read once more.
#if defined(QUIRE_CPU_FLOAT_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_CPU_FLOAT_ROWS_INL_H_
#undef QUIRE_CPU_FLOAT_ROWS_INL_H_
#else
#define QUIRE_CPU_FLOAT_ROWS_INL_H_
#endif

#include "cpu/operands-inl.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu {
namespace HWY_NAMESPACE {
namespace {

#if QUIRE_CPU_HAS_PAIRS
struct Float32Products {
  using Sum = F32;
  static HWY_INLINE hn::Vec<F32> to_float(hn::Vec<F32> sum) { return sum; }
};

bool takes_float_rows(int head_size) { return head_size % kFloats == 0; }

template <class F, int kRows>
HWY_INLINE void dot_float_rows_of(const TileRows& rows, int head_size, const float* q, int q_stride, float* scores,
                                  Prefetch& prefetch) {
  constexpr int kKeys = kRows > 2 || kRowsAtOnce == 2 ? 4 : 8;
  Prefetch ahead = prefetch;
  for (int group = 0; group < rows.num_rows; group += kKeyGroup) {
    hn::Vec<F32> fours[kRows][kKeyGroup / 4];
    HWY_UNROLL(4)
    for (int first = 0; first < kKeyGroup; first += kKeys) {
      const std::uint8_t* key[kKeys];
      HWY_UNROLL(8)
      for (int k = 0; k < kKeys; ++k) {
        const int n = group + first + k;
        key[k] = rows.data(n < rows.num_rows ? n : rows.num_rows - 1);
      }
      hn::Vec<F32> acc[kRows][kKeys];
      HWY_UNROLL(4)
      for (int r = 0; r < kRows; ++r) {
        HWY_UNROLL(8)
        for (int k = 0; k < kKeys; ++k) acc[r][k] = hn::Zero(F32());
      }
      for (int i = 0; i < head_size; i += kFloats) {
        hn::Vec<F32> x[kKeys];
        HWY_UNROLL(8)
        for (int k = 0; k < kKeys; ++k) x[k] = float_elements<F>(key[k], i);
        HWY_UNROLL(4)
        for (int r = 0; r < kRows; ++r) {
          const auto query = hn::LoadU(F32(), q + r * q_stride + i);
          HWY_UNROLL(8)
          for (int k = 0; k < kKeys; ++k) acc[r][k] = hn::MulAdd(query, x[k], acc[r][k]);
        }
      }
      ahead.after(kRows * kKeys * head_size / kFloats);
      HWY_UNROLL(4)
      for (int r = 0; r < kRows; ++r) {
        HWY_UNROLL(2)
        for (int k = 0; k < kKeys; k += 4) {
          fours[r][(first + k) / 4] = reduce4<Float32Products>(acc[r][k], acc[r][k + 1], acc[r][k + 2], acc[r][k + 3]);
        }
      }
    }
    HWY_UNROLL(4)
    for (int r = 0; r < kRows; ++r) store_scores<Float32Products>(fours[r], 1.0F, scores + r * kKeyTile + group);
  }
  prefetch = ahead;
}

// kVectors vectors of a row from element `first` on: in order, or in the order of operands of values (value_order).
template <class F, bool kInOrder, int kVectors>
HWY_INLINE void float_vectors(const std::uint8_t* row, int first, hn::Vec<F32> (&x)[kVectors]) {
  if constexpr (kInOrder) {
    HWY_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) x[v] = float_elements<F>(row, first + v * kFloats);
  } else {
    static_assert(std::is_same_v<F, format::BFloat16> && kVectors % 2 == 0);
    const auto zero = hn::Zero(U16());
    HWY_UNROLL(2)
    for (int v = 0; v < kVectors; v += 2) {
      const auto words = hn::LoadU(U16(), reinterpret_cast<const std::uint16_t*>(row) + first + v * kFloats);
      x[v] = hn::BitCast(F32(), hn::InterleaveLower(U16(), zero, words));
      x[v + 1] = hn::BitCast(F32(), hn::InterleaveUpper(U16(), zero, words));
    }
  }
}

template <class F, bool kInOrder, int kRows, int kVectors>
HWY_INLINE void accumulate_float_rows_of(const TileRows& rows, int first, const float* p, float* acc, int acc_stride,
                                         Prefetch& prefetch) {
  Prefetch ahead = prefetch;
  hn::Vec<F32> sum[kRows][kVectors];
  HWY_UNROLL(4)
  for (int r = 0; r < kRows; ++r) {
    HWY_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::LoadU(F32(), acc + r * acc_stride + first + v * kFloats);
  }
  for (int n = 0; n < rows.num_rows; ++n) {
    if (n % 2 == 0) ahead.after(2 * kRows * kVectors);
    const std::uint8_t* row = rows.data(n);
    hn::Vec<F32> x[kVectors];
    float_vectors<F, kInOrder>(row, first, x);
    HWY_UNROLL(4)
    for (int r = 0; r < kRows; ++r) {
      const auto weight = hn::Set(F32(), p[r * kKeyTile + n]);
      HWY_UNROLL(4)
      for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::MulAdd(weight, x[v], sum[r][v]);
    }
  }
  prefetch = ahead;
  HWY_UNROLL(4)
  for (int r = 0; r < kRows; ++r) {
    HWY_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) hn::StoreU(sum[r][v], F32(), acc + r * acc_stride + first + v * kFloats);
  }
}

// Calls run.operator()<kRows>(m) for rows from m on, up to kRowsAtOnce at a time.
template <class Run>
HWY_INLINE void for_rows(int num_rows, const Run& run) {
  int m = 0;
  for (; num_rows - m >= kRowsAtOnce; m += kRowsAtOnce) run.template operator()<kRowsAtOnce>(m);
  if constexpr (kRowsAtOnce > 2) {
    if (num_rows - m == 3) run.template operator()<3>(m);
  }
  if (num_rows - m == 2) run.template operator()<2>(m);
  if (num_rows - m == 1) run.template operator()<1>(m);
}

template <class F>
void dot_float_rows(const TileRows& rows, int head_size, const float* q, int num_rows, int q_stride, float* scores,
                    Prefetch& prefetch) {
  for_rows(num_rows, [&]<int kRows>(int m) HWY_ATTR {
    dot_float_rows_of<F, kRows>(rows, head_size, q + m * q_stride, q_stride, scores + m * kKeyTile, prefetch);
  });
}

template <class F, bool kInOrder = true>
void accumulate_float_rows(const TileRows& rows, int head_size, const float* p, int num_rows, float* acc,
                           int acc_stride, Prefetch& prefetch) {
  for_rows(num_rows, [&]<int kRows>(int m) HWY_ATTR {
    int first = 0;
    for (; first + 4 * kFloats <= head_size; first += 4 * kFloats) {
      accumulate_float_rows_of<F, kInOrder, kRows, 4>(rows, first, p + m * kKeyTile, acc + m * acc_stride, acc_stride,
                                                      prefetch);
    }
    if constexpr (kInOrder) {
      for (; first < head_size; first += kFloats) {
        accumulate_float_rows_of<F, kInOrder, kRows, 1>(rows, first, p + m * kKeyTile, acc + m * acc_stride, acc_stride,
                                                        prefetch);
      }
    }
  });
}
#endif  // QUIRE_CPU_HAS_PAIRS

template <class F>
FloatRows float_rows_if_enabled() {
#if QUIRE_CPU_HAS_PAIRS
  // Where the target has products of bf16, fp8 is better off with them.
  constexpr bool kTakes = kIsFloat<F> && !(kIsFloat8<F> && kMultipliesBFloat16);
  if constexpr (format::format_enabled<F>() && kTakes) {
    FloatRows floats{.takes = &takes_float_rows, .dot = &dot_float_rows<F>, .accumulate = &accumulate_float_rows<F>};
    if constexpr (kIsFloat8<F>) floats.load_affines = &load_affines<F>;
    if constexpr (std::is_same_v<F, format::BFloat16> && kMultipliesBFloat16) {
      floats.accumulate_operands = &accumulate_float_rows<F, false>;
    }
    return floats;
  }
#endif
  return {};
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace quire::cpu
HWY_AFTER_NAMESPACE();

#endif  // QUIRE_CPU_FLOAT_ROWS_INL_H_
