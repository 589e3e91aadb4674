// Every format's CUDA side. A format without a file of its own here is served by the primary templates of fragment.cuh
// and pack.cuh.
#pragma once

#include "cuda/format/fp8.cuh"
#include "cuda/format/int2.cuh"
#include "cuda/format/int4.cuh"
#include "cuda/format/int8.cuh"
#include "cuda/format/turboquant.cuh"
#include "format/formats.h"
