// attend_any in the table of kernels.
#pragma once

#include "cuda/kernels.h"

namespace quire::cuda {

KernelDesc attend_any_row();

}  // namespace quire::cuda
