// Everything public.
#pragma once

#include "quire/backend.h"
#include "quire/layout.h"
#include "quire/mode.h"
#include "quire/ops.h"
#include "quire/status.h"
#include "quire/tensor.h"
#include "quire/turboquant.h"
