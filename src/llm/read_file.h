// A whole file as a string: config.json, tokens, prompts.
#pragma once

#include <string>

#include "quire/status.h"

namespace quire::llm {

// A refusal is one sentence that starts with the path: a file that cannot be opened, a folder, a failing disk.
Result<std::string> read_file(const std::string& path);

}  // namespace quire::llm
