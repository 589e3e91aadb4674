#include "llm/npy.h"

#include <cstring>
#include <string_view>

#include "llm/read_file.h"

namespace quire::llm {
namespace {

struct IntegerType {
  std::string_view descr;  // after "<" or "|"
  std::size_t bytes;
  bool is_signed;
};
constexpr IntegerType kIntegerTypes[] = {{"u2", 2, false}, {"i4", 4, true}, {"u4", 4, false}, {"i8", 8, true}};

std::int64_t read_integer(const char* bytes, const IntegerType& type) {
  std::uint64_t value = 0;
  std::memcpy(&value, bytes, type.bytes);
  if (type.is_signed && type.bytes == 4) return static_cast<std::int32_t>(value);
  return static_cast<std::int64_t>(value);
}

}  // namespace

Result<std::vector<std::int32_t>> read_npy_tokens(const std::string& path, int vocab_size) {
  const auto refuse = [&](const std::string& reason) { return invalid_argument(path + ": " + reason); };
  const Result<std::string> file = read_file(path);
  if (!file.ok()) return file.status();
  const std::string& bytes = *file;

  // Magic, version, header length (2 bytes in version 1, 4 after), a Python dict as text, then the array.
  if (bytes.size() < 12 || bytes.compare(0, 6, "\x93NUMPY") != 0) return refuse("not a .npy file");
  const int major = static_cast<unsigned char>(bytes[6]), minor = static_cast<unsigned char>(bytes[7]);
  if (major < 1 || major > 3 || minor != 0) {
    return refuse("version " + std::to_string(major) + "." + std::to_string(minor) +
                  " is not supported; supported are 1.0, 2.0 and 3.0");
  }
  const std::size_t length_bytes = major == 1 ? 2 : 4;
  std::uint32_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data() + 8, length_bytes);
  const std::size_t data_begin = 8 + length_bytes + header_bytes;
  if (data_begin > bytes.size()) return refuse("the header is longer than the file");
  const std::string_view header(bytes.data() + 8 + length_bytes, header_bytes);

  const IntegerType* type = nullptr;
  for (const IntegerType& known : kIntegerTypes) {
    if (header.find("'<" + std::string(known.descr) + "'") != std::string_view::npos) type = &known;
  }
  if (type == nullptr) return refuse("expected little-endian uint16, int32, uint32 or int64 elements");
  // One dimension is written "(65536,)"; more have a digit after the comma.
  const std::size_t open = header.find('('), comma = header.find(',', open), close = header.find(')', open);
  const bool one_dimensional = open != std::string_view::npos && comma != std::string_view::npos &&
                               close != std::string_view::npos &&
                               header.substr(comma + 1, close - comma - 1).find_first_not_of(' ') == header.npos;
  if (!one_dimensional || comma > close) return refuse("expected an array of one dimension");
  std::uint64_t count = 0;
  for (char c : header.substr(open + 1, comma - open - 1)) {
    if (c < '0' || c > '9' || count > (std::uint64_t{1} << 40)) return refuse("the shape is not a count");
    count = count * 10 + static_cast<std::uint64_t>(c - '0');
  }
  if (count * type->bytes != bytes.size() - data_begin) {
    return refuse("the header describes " + std::to_string(count * type->bytes) + " bytes of data, the file holds " +
                  std::to_string(bytes.size() - data_begin));
  }

  std::vector<std::int32_t> tokens(count);
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t id = read_integer(bytes.data() + data_begin + i * type->bytes, *type);
    if (id < 0 || id >= vocab_size) {
      return out_of_range(path + ": token id " + std::to_string(id) + " at position " + std::to_string(i) +
                          " is outside the vocabulary of " + std::to_string(vocab_size));
    }
    tokens[i] = static_cast<std::int32_t>(id);
  }
  return tokens;
}

}  // namespace quire::llm
