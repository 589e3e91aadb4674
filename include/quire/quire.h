// Everything public in C++; quire_c.h has it for C.
#pragma once

#include "quire/backend.h"
#include "quire/executor.h"
#include "quire/layout.h"
#include "quire/mode.h"
#include "quire/ops.h"
#include "quire/plan.h"
#include "quire/status.h"
#include "quire/tensor.h"
#include "quire/turboquant.h"
#include "quire/version.h"
