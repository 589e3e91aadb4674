// Writes safetensors files for tests: good ones from tensors, and any others from a header and bytes.
#pragma once

#include <gtest/gtest.h>
#include <zlib.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "llm/safetensors.h"

namespace quire::test {

// A path in the tests' temporary folder that no other test of this process run uses.
inline std::string temp_path(const std::string& name) {
  const auto* test = testing::UnitTest::GetInstance()->current_test_info();
  std::string file_name = std::string(test->test_suite_name()) + "." + test->name() + "." + name;
  std::replace(file_name.begin(), file_name.end(), '/', '-');
  return testing::TempDir() + file_name;
}

inline std::string safetensors_bytes(const std::string& header, const std::string& data) {
  std::string bytes(8, '\0');
  const std::uint64_t header_bytes = header.size();
  std::memcpy(bytes.data(), &header_bytes, 8);
  return bytes + header + data;
}

inline std::string write_file(const std::string& name, const std::string& bytes) {
  const std::string path = temp_path(name);
  std::ofstream(path, std::ios::binary) << bytes;
  return path;
}

inline std::string write_gzip(const std::string& name, const std::string& bytes) {
  const std::string path = temp_path(name);
  gzFile file = gzopen(path.c_str(), "wb1");
  gzwrite(file, bytes.data(), static_cast<unsigned>(bytes.size()));
  gzclose(file);
  return path;
}

struct StoredTensor {
  DType dtype = DType::kUInt8;
  std::vector<std::int64_t> shape;
  std::string bytes;
};

// Tensors and metadata that can be edited and written again.
struct EditableFile {
  std::map<std::string, StoredTensor> tensors;
  std::map<std::string, std::string> metadata;

  // The tensors of `file` whose names begin with `prefix`, and the metadata likewise.
  static EditableFile subset_of(const llm::SafetensorsFile& file, const std::string& prefix) {
    EditableFile subset;
    for (const std::string& name : file.names()) {
      if (name.rfind(prefix, 0) != 0) continue;
      const Tensor tensor = file.tensor(name).value();
      subset.tensors[name] = {
          tensor.dtype,
          {tensor.shape, tensor.shape + tensor.ndim},
          {tensor.ptr<char>(), static_cast<std::size_t>(tensor.numel()) * dtype_bytes(tensor.dtype)}};
    }
    for (const auto& [key, text] : file.metadata()) {
      if (key.rfind(prefix, 0) == 0) subset.metadata[key] = text;
    }
    return subset;
  }

  std::string bytes() const {
    static const std::map<DType, const char*> names = {
        {DType::kFloat32, "F32"},        {DType::kFloat16, "F16"},        {DType::kBFloat16, "BF16"},
        {DType::kFloat8E4M3, "F8_E4M3"}, {DType::kFloat8E5M2, "F8_E5M2"}, {DType::kInt8, "I8"},
        {DType::kUInt8, "U8"},           {DType::kInt32, "I32"},          {DType::kInt64, "I64"},
    };
    nlohmann::ordered_json header;
    if (!metadata.empty()) header["__metadata__"] = metadata;
    std::string data;
    // Wide elements come first, so that each tensor is aligned to its own.
    for (const std::size_t element_bytes : {8, 4, 2, 1}) {
      for (const auto& [name, tensor] : tensors) {
        if (dtype_bytes(tensor.dtype) != element_bytes) continue;
        header[name] = {{"dtype", names.at(tensor.dtype)},
                        {"shape", tensor.shape},
                        {"data_offsets", {data.size(), data.size() + tensor.bytes.size()}}};
        data += tensor.bytes;
      }
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');
    return safetensors_bytes(text, data);
  }
};

}  // namespace quire::test
