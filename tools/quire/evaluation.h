// What `quire eval` and `quire demo` share beside llm/evaluate.h: the modes of a command line, the sets of a model
// folder, the progress bar and the table.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "llm/evaluate.h"
#include "quire/mode.h"
#include "quire/status.h"

namespace quire::cli {

// Parses "int8_per_token_head,k=fp8,v=turboquant_v3", or "all": every mode of this build that has formats or a backend
// of its own.
Result<std::vector<ModeInfo>> parse_modes(const std::string& list);

// A sentence about what --kv-cache-dtype-skip-layers did.
std::string skipped_layers(const std::vector<int>& layers);
inline constexpr const char* kSkipLayersHelp = "Layers that keep the model's own dtype, such as 0,1,last";

// What --device means where a model runs.
inline constexpr const char* kDeviceFooter =
    "--device cuda, or cuda:1 for another GPU: the pages of the cache are in device memory and both ops run there; the "
    "rest of the model runs on "
    "the CPU, and q, k, v and the output are copied in every layer: that shows what the kernels compute, not their "
    "speed.";

// Finds heldout_tokens.npy, recall.jsonl and arithmetic.jsonl, the last two also as .jsonl.gz, where DIR has them.
llm::EvalPaths sets_beside(const std::string& model_dir);

// A function that draws on stderr where that is a terminal, and is empty elsewhere.
std::function<void(double, const std::string&)> progress_bar();

// Prints one line per mode on stdout.
void print_scores(const std::vector<llm::EvalScore>& scores);

}  // namespace quire::cli
