// A plan as the facade makes it.
#pragma once

#include "call/plan_data.h"
#include "quire/status.h"

namespace quire::core {

// Validates the problem and has its device plan. Allocates nothing where it succeeds.
Status make_plan(const AttentionProblem& problem, PlanData& plan);

}  // namespace quire::core
