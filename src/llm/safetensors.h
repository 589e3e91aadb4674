// Reads .safetensors files, plain (memory-mapped) or gzip-compressed (*.gz, unpacked into memory).
//
//   8 bytes   n, the header's length, little-endian
//   n bytes   JSON: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]},
//                    "__metadata__": {"key": "value"}}, and more tensors
//   the rest  the tensors' bytes, row-major; offsets count from here
//
// A file is never trusted: open() checks the whole header against the file's size before it hands anything out. A .gz
// must be whole, checksum and length at its end compared, and may hold 1 GiB of tensors. (Its own header has a name, a
// time and a system, which no checksum covers and nothing reads.)
// Invariant of an open file: the tensors tile the data section without overlaps or holes, every shape matches its
// bytes, and every tensor is aligned to its element.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "quire/status.h"
#include "quire/tensor.h"

namespace quire::llm {

class SafetensorsFile {
 public:
  // A refusal is one sentence that starts with the path.
  static Result<SafetensorsFile> open(const std::string& path);

  // In the order of the header.
  const std::vector<std::string>& names() const { return names_; }
  bool contains(std::string_view name) const { return entries_.find(name) != entries_.end(); }

  // A dense view of memory that must not be written; it lives as long as any copy of this object. The error is
  // kNotFound for a name that is not there, and kUnsupported for an element type or a rank that Tensor cannot express.
  Result<Tensor> tensor(std::string_view name) const;

  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::string& path() const { return path_; }

 private:
  struct Entry {
    std::string dtype;
    std::vector<std::int64_t> shape;
    std::int64_t begin = 0, end = 0;  // bytes, from data_
  };

  // Fills names_, entries_ and metadata_; returns the bytes of the data section that the header describes.
  Result<std::int64_t> parse_header(std::string_view json);

  std::string path_;
  std::vector<std::string> names_;
  std::map<std::string, Entry, std::less<>> entries_;
  std::map<std::string, std::string> metadata_;
  std::shared_ptr<const std::uint8_t> memory_;  // the mapping or the buffer that holds the data section
  const std::uint8_t* data_ = nullptr;          // the data section
};

}  // namespace quire::llm
