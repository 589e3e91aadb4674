#pragma once

#include "cpu/operand.h"

namespace quire::cpu {

// Whether products_zen4.cc is compiled in and the processor has AVX-512 with VNNI, BF16 and VBMI.
bool zen4_runs_here();
double zen4_multiply(Operand operand, int rounds);

}  // namespace quire::cpu
