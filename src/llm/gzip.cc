#include "llm/gzip.h"

#include <algorithm>
#include <climits>
#include <new>
#include <utility>

namespace quire::llm {

GzipReader::GzipReader(std::string path, const std::uint8_t* data, std::int64_t num_bytes)
    : path_(std::move(path)), data_(data), num_bytes_(num_bytes) {
  constexpr int kGzipOnly = 16;
  ready_ = inflateInit2(&stream_, MAX_WBITS + kGzipOnly) == Z_OK;
  stream_.next_in = const_cast<Bytef*>(data_);
}

GzipReader::~GzipReader() { inflateEnd(&stream_); }

Result<std::vector<std::uint8_t>> GzipReader::read(std::int64_t size) {
  if (num_bytes_ >= 2 && (data_[0] != 0x1f || data_[1] != 0x8b)) {
    return invalid_argument(path_ + ": not a gzip file, though its name ends in .gz");
  }
  if (!ready_) return internal_error(path_ + ": zlib cannot unpack the file");
  constexpr std::int64_t kPiece = std::int64_t{1} << 20;
  std::vector<std::uint8_t> bytes;
  while (static_cast<std::int64_t>(bytes.size()) < size) {
    const std::size_t old_size = bytes.size();
    bytes.resize(static_cast<std::size_t>(std::min(static_cast<std::int64_t>(old_size) + kPiece, size)));
    stream_.next_out = bytes.data() + old_size;
    stream_.avail_out = static_cast<uInt>(bytes.size() - old_size);
    while (stream_.avail_out > 0) {
      const auto left = num_bytes_ - (stream_.next_in - data_);
      if (ended_ && left == 0) {
        bytes.resize(bytes.size() - stream_.avail_out);
        return bytes;
      }
      if (ended_) inflateReset(&stream_);  // another member follows
      stream_.avail_in = static_cast<uInt>(std::min<std::int64_t>(left, UINT_MAX));
      const int code = inflate(&stream_, Z_NO_FLUSH);
      ended_ = code == Z_STREAM_END;
      if (code == Z_OK || code == Z_STREAM_END) continue;
      if (code == Z_MEM_ERROR) throw std::bad_alloc();
      if (code == Z_BUF_ERROR) return invalid_argument(path_ + ": the gzip stream is truncated");
      return invalid_argument(path_ + ": the gzip stream is damaged");
    }
  }
  return bytes;
}

}  // namespace quire::llm
