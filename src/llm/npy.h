// Token ids from a NumPy .npy file: a one-dimensional little-endian integer array.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "quire/status.h"

namespace quire::llm {

// Every id lies in [0, vocab_size). A refusal is one sentence that starts with the path.
Result<std::vector<std::int32_t>> read_npy_tokens(const std::string& path, int vocab_size);

}  // namespace quire::llm
