// hadamard on the CPU.
#include <cstdint>
#include <cstring>

#include "attention/row_list.h"
#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/load.h"
#include "cpu/threads.h"

namespace quire::cpu {

void hadamard(const HadamardArgs& args) {
  const std::int64_t elements = args.x.numel();
  if (elements == 0) return;
  const auto head_size = static_cast<int>(args.x.shape[args.x.ndim - 1]);
  const std::int64_t num_rows = elements / head_size;
  const attention::RowList from = attention::row_list(args.x);
  const attention::RowList to = attention::row_list(args.out);
  const format::RowShape shape = format::row_shape(head_size);
  const format::Rotation rotation = args.signs ? format::Rotation::kSignedHadamard : format::Rotation::kHadamard;
  const auto rotate = args.inverse ? kernels().rotate_back : kernels().rotate;
  const auto rotate_row = [&](std::int64_t index) {
    alignas(64) float y[format::kMaxHeadSize];
    const std::uint8_t* x = args.x.ptr<const std::uint8_t>() + from.offset(index);
    for (int i = 0; i < head_size; ++i) load_floats(x + i * from.element_stride, from.dtype, 1, y + i);
    rotate(rotation, y, shape);
    std::uint8_t* out = args.out.ptr<std::uint8_t>() + to.offset(index);
    for (int i = 0; i < head_size; ++i) store_floats(y + i, 1, to.dtype, out + i * to.element_stride);
  };
  constexpr std::int64_t kRowsOfATask = 64;
  run_items(num_rows, kRowsOfATask, rotate_row);
}

}  // namespace quire::cpu
