#include "llm/read_file.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>

namespace quire::llm {

Result<std::string> read_file(const std::string& path) try {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rbe"), &std::fclose);
  if (file == nullptr) return not_found(path + ": cannot open the file: " + std::strerror(errno));
  std::string text;
  char piece[1 << 14];
  while (const std::size_t count = std::fread(piece, 1, sizeof(piece), file.get())) text.append(piece, count);
  if (std::ferror(file.get()) != 0) {
    return invalid_argument(path + ": cannot read the file: " + std::strerror(errno));
  }
  return text;
} catch (const std::bad_alloc&) {
  return internal_error(path + ": there is not enough memory to read the file");
}

}  // namespace quire::llm
