#include "llm/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <new>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>

#include "llm/gzip.h"

static_assert(std::endian::native == std::endian::little, "safetensors files are read in place");

namespace quire::llm {
namespace {

using nlohmann::json;

constexpr std::int64_t kMaxHeaderBytes = 100'000'000;  // the limit of the format's own library

struct ElementType {
  std::string_view name;
  std::int64_t bytes;
  std::optional<DType> dtype;  // none: known, but no tensor of this library holds it
};

constexpr ElementType kElementTypes[] = {
    {"F32", 4, DType::kFloat32},        {"F16", 2, DType::kFloat16},        {"BF16", 2, DType::kBFloat16},
    {"F8_E4M3", 1, DType::kFloat8E4M3}, {"F8_E5M2", 1, DType::kFloat8E5M2}, {"I8", 1, DType::kInt8},
    {"U8", 1, DType::kUInt8},           {"I32", 4, DType::kInt32},          {"I64", 8, DType::kInt64},
    {"BOOL", 1, std::nullopt},          {"F8_E8M0", 1, std::nullopt},       {"I16", 2, std::nullopt},
    {"U16", 2, std::nullopt},           {"U32", 4, std::nullopt},           {"F64", 8, std::nullopt},
    {"U64", 8, std::nullopt},           {"C64", 8, std::nullopt},
};

const ElementType* find_element_type(std::string_view name) {
  const auto* found = std::find_if(std::begin(kElementTypes), std::end(kElementTypes),
                                   [&](const ElementType& type) { return type.name == name; });
  return found == std::end(kElementTypes) ? nullptr : found;
}

// Text from the file as it appears in a message.
std::string in_quotes(std::string_view text) {
  constexpr std::size_t kShown = 80;
  std::string out = "'";
  for (char c : text.substr(0, kShown)) out += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? '?' : c;
  return out + (text.size() > kShown ? "...'" : "'");
}

std::string system_reason() { return std::strerror(errno); }

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  ~FileDescriptor() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

// The bytes of a file, mapped for reading.
class MappedFile {
 public:
  static Result<MappedFile> open(const std::string& path) {
    // O_NONBLOCK: opening a pipe must not wait for its writer. It has no effect on a regular file.
    const FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    if (fd.get() < 0) return not_found(path + ": cannot open the file: " + system_reason());
    struct stat info = {};
    if (fstat(fd.get(), &info) != 0) return internal_error(path + ": cannot read the file's size: " + system_reason());
    if (!S_ISREG(info.st_mode)) return invalid_argument(path + ": not a regular file");
    MappedFile file;
    file.bytes_ = info.st_size;
    if (file.bytes_ == 0) return file;
    const auto bytes = static_cast<std::size_t>(file.bytes_);
    void* mapping = mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, fd.get(), 0);
    if (mapping == MAP_FAILED) return internal_error(path + ": cannot map the file: " + system_reason());
    file.data_.reset(static_cast<const std::uint8_t*>(mapping),
                     [bytes](const std::uint8_t* base) { munmap(const_cast<std::uint8_t*>(base), bytes); });
    return file;
  }

  const std::shared_ptr<const std::uint8_t>& data() const { return data_; }  // null for an empty file
  std::int64_t bytes() const { return bytes_; }

 private:
  std::shared_ptr<const std::uint8_t> data_;
  std::int64_t bytes_ = 0;
};

// A non-negative JSON integer that fits in an int64.
std::optional<std::int64_t> as_count(const json& value) {
  if (!value.is_number_unsigned()) return std::nullopt;
  const auto count = value.get<std::uint64_t>();
  if (count > static_cast<std::uint64_t>(INT64_MAX)) return std::nullopt;
  return static_cast<std::int64_t>(count);
}

std::shared_ptr<const std::uint8_t> share(std::vector<std::uint8_t> bytes) {
  auto owner = std::make_shared<std::vector<std::uint8_t>>(std::move(bytes));
  return {owner, owner->data()};
}

}  // namespace

Result<std::int64_t> SafetensorsFile::parse_header(std::string_view text) {
  const auto refuse = [this](const std::string& reason) { return invalid_argument(path_ + ": " + reason); };

  // nlohmann::json keeps the last of two equal keys; the callback sees both.
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  std::optional<std::string> duplicate;
  const auto on_event = [&](int depth, json::parse_event_t event, json& parsed) {
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end && !keys.empty()) keys.pop_back();
    if (event == json::parse_event_t::key && !keys.empty()) {
      auto name = parsed.get<std::string>();
      if (depth == 1 && name != "__metadata__") names_.push_back(name);
      if (!keys.back().insert(name).second) duplicate = std::move(name);
    }
    return true;
  };
  const json header = json::parse(text.begin(), text.end(), on_event, /*allow_exceptions=*/false);
  if (header.is_discarded()) return refuse("the header is not JSON");
  if (!header.is_object()) return refuse("the header is not a JSON object");
  if (duplicate) return refuse("the header holds the name " + in_quotes(*duplicate) + " twice");

  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      if (!value.is_object()) return refuse("__metadata__ is not an object");
      for (const auto& [key, text_value] : value.items()) {
        if (!text_value.is_string()) return refuse("__metadata__ entry " + in_quotes(key) + " is not a string");
        metadata_.emplace(key, text_value.get<std::string>());
      }
      continue;
    }
    const std::string tensor_name = "tensor " + in_quotes(name);
    // Clang 14 captures no structured binding by its name.
    const auto has = [&fields = value](const char* key, json::value_t type) {
      return fields.contains(key) && fields[key].type() == type;
    };
    if (!value.is_object() || !has("dtype", json::value_t::string) || !has("shape", json::value_t::array) ||
        !has("data_offsets", json::value_t::array)) {
      return refuse(tensor_name + " needs a string dtype, an array shape and an array data_offsets");
    }
    Entry entry;
    entry.dtype = value["dtype"].get<std::string>();
    const ElementType* type = find_element_type(entry.dtype);
    std::int64_t bytes = type != nullptr ? type->bytes : 1;
    bool overflow = false;
    bool empty = false;
    for (const json& extent : value["shape"]) {
      const auto count = as_count(extent);
      if (!count) return refuse(tensor_name + " has a shape entry that is not a count");
      entry.shape.push_back(*count);
      empty = empty || *count == 0;
      // Zeros count as 1 here, so that strides fit too.
      overflow = overflow || __builtin_mul_overflow(bytes, std::max<std::int64_t>(*count, 1), &bytes);
    }
    if (overflow) return refuse(tensor_name + " has a shape whose size overflows 63 bits");
    if (empty) bytes = 0;
    const json& offsets = value["data_offsets"];
    entry.begin = offsets.size() == 2 ? as_count(offsets[0]).value_or(-1) : -1;
    entry.end = offsets.size() == 2 ? as_count(offsets[1]).value_or(-1) : -1;
    if (entry.begin < 0 || entry.begin > entry.end) {
      return refuse(tensor_name + " needs data_offsets [begin, end] with 0 <= begin <= end");
    }
    if (type != nullptr && entry.end - entry.begin != bytes) {
      return refuse(tensor_name + " spans " + std::to_string(entry.end - entry.begin) + " bytes, its shape and dtype " +
                    entry.dtype + " need " + std::to_string(bytes));
    }
    if (type != nullptr && entry.begin % type->bytes != 0) {
      return refuse(tensor_name + " begins at byte " + std::to_string(entry.begin) + ", not aligned to its dtype " +
                    entry.dtype);
    }
    entries_.emplace(name, std::move(entry));
  }

  std::vector<std::pair<const std::string, Entry>*> by_offset;
  for (auto& item : entries_) by_offset.push_back(&item);
  std::sort(by_offset.begin(), by_offset.end(), [](const auto* a, const auto* b) {
    return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
  });
  std::int64_t data_bytes = 0;
  for (const auto* item : by_offset) {
    if (item->second.begin != data_bytes) {
      return refuse("tensor " + in_quotes(item->first) + " begins at byte " + std::to_string(item->second.begin) +
                    (item->second.begin < data_bytes ? ", inside another tensor that ends at "
                                                     : ", after a hole that starts at ") +
                    std::to_string(data_bytes));
    }
    data_bytes = item->second.end;
  }
  return data_bytes;
}

Result<SafetensorsFile> SafetensorsFile::open(const std::string& path) try {
  const auto refuse = [&](const std::string& reason) { return invalid_argument(path + ": " + reason); };
  Result<MappedFile> mapped = MappedFile::open(path);
  if (!mapped.ok()) return mapped.status();
  SafetensorsFile file;
  file.path_ = path;
  const auto check_header_bytes = [&](std::uint64_t header_bytes, std::uint64_t available) -> Status {
    if (header_bytes <= available) return {};
    return refuse("the header is said to be " + std::to_string(header_bytes) + " bytes long, at most " +
                  std::to_string(available) + " are possible");
  };
  const auto check_data_bytes = [&](std::int64_t described, std::int64_t present, const char* at_least) -> Status {
    if (described == present) return {};
    return refuse("the header describes " + std::to_string(described) + " bytes of tensors, the file holds " +
                  (present > described ? at_least : "") + std::to_string(present));
  };

  const std::uint8_t* base = mapped->data().get();
  if (is_gzip_name(path)) {
    GzipReader reader(path, base, mapped->bytes());
    auto prefix = reader.read(8);
    if (!prefix.ok()) return prefix.status();
    if (prefix->size() < 8) return refuse("too short for a safetensors file");
    std::uint64_t header_bytes = 0;
    std::memcpy(&header_bytes, prefix->data(), 8);
    if (Status status = check_header_bytes(header_bytes, kMaxHeaderBytes); !status) return status;
    auto header = reader.read(static_cast<std::int64_t>(header_bytes));
    if (!header.ok()) return header.status();
    if (Status status = check_header_bytes(header_bytes, header->size()); !status) return status;
    auto described = file.parse_header({reinterpret_cast<const char*>(header->data()), header->size()});
    if (!described.ok()) return described.status();
    if (*described > kMaxUnpackedBytes) {
      return refuse("the header describes " + std::to_string(*described) + " bytes of tensors, a .gz file may hold " +
                    std::to_string(kMaxUnpackedBytes) + "; larger files are read as plain .safetensors");
    }
    auto data = reader.read(*described);
    if (!data.ok()) return data.status();
    auto rest = reader.read(1);  // the end: a checksum that fits
    if (!rest.ok()) return rest.status();
    const auto present = static_cast<std::int64_t>(data->size() + rest->size());
    if (Status status = check_data_bytes(*described, present, "at least "); !status) return status;
    file.memory_ = share(std::move(*data));
    file.data_ = file.memory_.get();
    return file;
  }

  if (mapped->bytes() < 8) return refuse("too short for a safetensors file");
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, base, 8);
  const auto possible = static_cast<std::uint64_t>(std::min(mapped->bytes() - 8, kMaxHeaderBytes));
  if (Status status = check_header_bytes(header_bytes, possible); !status) return status;
  auto described = file.parse_header({reinterpret_cast<const char*>(base) + 8, header_bytes});
  if (!described.ok()) return described.status();
  const std::int64_t present = mapped->bytes() - 8 - static_cast<std::int64_t>(header_bytes);
  if (Status status = check_data_bytes(*described, present, ""); !status) return status;
  file.memory_ = mapped->data();
  file.data_ = base + 8 + header_bytes;
  // Writers pad the header to 8 bytes. Where one did not, an aligned copy takes the place of the mapping.
  if (header_bytes % 8 != 0) {
    file.memory_ = share(std::vector<std::uint8_t>(file.data_, file.data_ + present));
    file.data_ = file.memory_.get();
  }
  return file;
} catch (const std::bad_alloc&) {
  return internal_error(path + ": there is not enough memory to read the file");
}

Result<Tensor> SafetensorsFile::tensor(std::string_view name) const {
  const auto found = entries_.find(name);
  if (found == entries_.end()) return not_found(path_ + ": no tensor named " + in_quotes(name));
  const Entry& entry = found->second;
  const ElementType* type = find_element_type(entry.dtype);
  if (type == nullptr || !type->dtype) {
    std::string supported;
    for (const ElementType& known : kElementTypes) {
      if (known.dtype) supported += (supported.empty() ? "" : ", ") + std::string(known.name);
    }
    return unsupported(path_ + ": tensor " + in_quotes(name) + " has dtype " + in_quotes(entry.dtype) +
                       "; supported are " + supported);
  }
  if (entry.shape.size() > Tensor::kMaxDims) {
    return unsupported(path_ + ": tensor " + in_quotes(name) + " has " + std::to_string(entry.shape.size()) +
                       " dimensions; at most " + std::to_string(Tensor::kMaxDims) + " are supported");
  }
  Tensor tensor;
  tensor.data = const_cast<std::uint8_t*>(data_ + entry.begin);
  tensor.dtype = *type->dtype;
  tensor.ndim = static_cast<int>(entry.shape.size());
  std::int64_t stride = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    tensor.shape[i] = entry.shape[static_cast<std::size_t>(i)];
    tensor.strides[i] = stride;
    stride *= std::max<std::int64_t>(tensor.shape[i], 1);
  }
  return tensor;
}

}  // namespace quire::llm
