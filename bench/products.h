#pragma once

#include "cpu/operand.h"

namespace quire::bench {

// Makes many products in registers and returns how many; bf16 ones in fp32 where the target has no others.
using Multiply = double (*)(cpu::Operand operand, int rounds);

// With the instructions of src/cpu/vnni.cc and zen4.cc; null where they are not compiled in.
Multiply vnni_multiply();
Multiply zen4_multiply();

}  // namespace quire::bench
