// A whole file as a string: config.json, tokens, prompts.
#pragma once

#include <string>

#include "quire/status.h"

namespace quire::llm {

// Reads a file. What cannot be read (no such file, a folder, a failing disk) is refused in one sentence that starts
// with the path.
Result<std::string> read_file(const std::string& path);

}  // namespace quire::llm
