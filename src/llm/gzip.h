// Files packed by gzip, whose names end in .gz.
#pragma once

#include <zlib.h>

#include <cstdint>
#include <string>
#include <vector>

#include "quire/status.h"

namespace quire::llm {

// Of what one file unpacks to, which can be a thousand times its own size. The golden files have 9 MB.
inline constexpr std::int64_t kMaxUnpackedBytes = std::int64_t{1} << 30;

inline bool is_gzip_name(const std::string& path) {
  return path.size() > 3 && path.compare(path.size() - 3, 3, ".gz") == 0;
}

// Unpacks the bytes of a gzip file piece by piece; they stay the caller's. Memory grows with the bytes that arrive, not
// with what a header claims. The file ends where the checksum and the length of a member have been compared; before that,
// read() never reports the end.
class GzipReader {
 public:
  GzipReader(std::string path, const std::uint8_t* data, std::int64_t num_bytes);
  GzipReader(const GzipReader&) = delete;
  GzipReader& operator=(const GzipReader&) = delete;
  ~GzipReader();

  // Returns the next `size` bytes, or fewer only where the file ends in good order. A file that is no gzip file, damaged
  // or cut off is refused in a sentence that starts with the path. operator new aligns the vector to 16.
  Result<std::vector<std::uint8_t>> read(std::int64_t size);

 private:
  std::string path_;
  const std::uint8_t* data_;
  std::int64_t num_bytes_;
  z_stream stream_ = {};
  bool ready_ = false, ended_ = false;
};

}  // namespace quire::llm
