// The safetensors reader: what a good file says, and that no bad file gets past open().
#include "llm/safetensors.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "llm/safetensors_writer.h"

namespace quire::test {
namespace {

using llm::SafetensorsFile;

// Reads every byte of every tensor that can be handed out, so that a sanitizer sees a view that is too long.
std::uint64_t touch_everything(const SafetensorsFile& file) {
  std::uint64_t sum = 0;
  for (const std::string& name : file.names()) {
    const auto tensor = file.tensor(name);
    if (!tensor.ok()) {
      EXPECT_EQ(tensor.status().message().rfind(file.path() + ": ", 0), 0U) << tensor.status().message();
      continue;
    }
    const std::int64_t bytes = tensor->numel() * static_cast<std::int64_t>(dtype_bytes(tensor->dtype));
    for (std::int64_t i = 0; i < bytes; ++i) sum += tensor->ptr<std::uint8_t>()[i];
  }
  return sum;
}

const char* const kGoodHeader = R"({"b":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
                                R"("__metadata__":{"origin":"here"},)"
                                R"("a":{"dtype":"I8","shape":[4],"data_offsets":[24,28]},)"
                                R"("none":{"dtype":"BF16","shape":[0,7],"data_offsets":[28,28]},)"
                                R"("one":{"dtype":"U8","shape":[],"data_offsets":[28,29]}})";

std::string good_data() {
  std::string data(24, '\0');
  for (int i = 0; i < 6; ++i) {
    const float value = 0.5F * static_cast<float>(i);
    std::memcpy(data.data() + 4 * i, &value, 4);
  }
  return data + "\x01\x02\x03\xff" + "\x2a";
}

// A file can be mapped, copied because its header is not padded to 8 bytes, or unpacked.
class GoodFile : public testing::TestWithParam<const char*> {};

TEST_P(GoodFile, IsReadAsWritten) {
  const std::string road = GetParam();
  std::string header = kGoodHeader;
  header.resize((header.size() + 7) / 8 * 8 + (road == "copied" ? 3 : 0), ' ');
  const std::string bytes = safetensors_bytes(header, good_data());
  const std::string path = road == "unpacked" ? write_gzip("f.safetensors.gz", bytes) : write_file("f.st", bytes);
  const auto opened = SafetensorsFile::open(path);
  ASSERT_TRUE(opened.ok()) << opened.status().message();
  const SafetensorsFile file = *opened;  // a copy keeps the memory alive

  EXPECT_EQ(file.names(), (std::vector<std::string>{"b", "a", "none", "one"}));
  EXPECT_EQ(file.metadata(), (std::map<std::string, std::string>{{"origin", "here"}}));
  EXPECT_TRUE(file.contains("a"));
  EXPECT_FALSE(file.contains("__metadata__"));

  const auto b = file.tensor("b");
  ASSERT_TRUE(b.ok());
  EXPECT_EQ(to_string(*b), "[2, 3] float32");
  EXPECT_EQ(b->strides[0], 3);
  EXPECT_EQ(b->strides[1], 1);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(b->data) % 4, 0U);
  for (int i = 0; i < 6; ++i) EXPECT_EQ(b->ptr<float>()[i], 0.5F * static_cast<float>(i));
  EXPECT_EQ(file.tensor("a")->ptr<std::int8_t>()[3], -1);
  EXPECT_EQ(file.tensor("none")->numel(), 0);
  EXPECT_TRUE(file.tensor("none")->defined());
  EXPECT_EQ(file.tensor("one")->ndim, 0);
  EXPECT_EQ(*file.tensor("one")->ptr<std::uint8_t>(), 42);

  const auto missing = file.tensor("c");
  ASSERT_FALSE(missing.ok());
  EXPECT_EQ(missing.status().code(), StatusCode::kNotFound);
  EXPECT_EQ(missing.status().message(), path + ": no tensor named 'c'");
}
INSTANTIATE_TEST_SUITE_P(Safetensors, GoodFile, testing::Values("mapped", "copied", "unpacked"),
                         [](const auto& param_info) { return std::string(param_info.param); });

TEST(Safetensors, EveryElementType) {
  const struct {
    const char* name;
    int bytes;
    const char* dtype;  // null: refused
  } types[] = {
      {"F32", 4, "float32"},         {"F16", 2, "float16"}, {"BF16", 2, "bfloat16"}, {"F8_E4M3", 1, "float8_e4m3fn"},
      {"F8_E5M2", 1, "float8_e5m2"}, {"I8", 1, "int8"},     {"U8", 1, "uint8"},      {"I32", 4, "int32"},
      {"I64", 8, "int64"},           {"BOOL", 1, nullptr},  {"I16", 2, nullptr},     {"U16", 2, nullptr},
      {"U32", 4, nullptr},           {"F64", 8, nullptr},   {"U64", 8, nullptr},     {"F9_MADE_UP", 3, nullptr}};
  for (const auto& type : types) {
    const std::string header = std::string(R"({"t":{"dtype":")") + type.name + R"(","shape":[1],"data_offsets":[0,)" +
                               std::to_string(type.bytes) + "]}}";
    const auto file = SafetensorsFile::open(
        write_file("f.st", safetensors_bytes(header, std::string(static_cast<std::size_t>(type.bytes), 'x'))));
    ASSERT_TRUE(file.ok()) << file.status().message();
    const auto tensor = file->tensor("t");
    ASSERT_EQ(tensor.ok(), type.dtype != nullptr) << type.name;
    if (tensor.ok()) {
      EXPECT_EQ(dtype_name(tensor->dtype), type.dtype);
    } else {
      EXPECT_EQ(tensor.status().code(), StatusCode::kUnsupported);
      EXPECT_NE(tensor.status().message().find(type.name), std::string::npos) << tensor.status().message();
      EXPECT_NE(tensor.status().message().find("supported are F32, F16"), std::string::npos);
    }
  }
}

TEST(Safetensors, MoreDimensionsThanATensorHas) {
  const auto file = SafetensorsFile::open(write_file(
      "f.st", safetensors_bytes(R"({"t":{"dtype":"U8","shape":[1,1,1,1,1,1,1],"data_offsets":[0,1]}})", "x")));
  ASSERT_TRUE(file.ok()) << file.status().message();
  EXPECT_EQ(file->tensor("t").status().code(), StatusCode::kUnsupported);
}

struct BadHeader {
  const char* label;
  const char* header;
  int data_bytes;
  const char* sentence;  // part of the refusal
};

void PrintTo(const BadHeader& bad, std::ostream* out) { *out << bad.header; }

std::string tensor_header(const std::string& fields) { return R"({"t":{)" + fields + "}}"; }

const BadHeader kBadHeaders[] = {
    {"NotJson", "{\"t\":", 0, "not JSON"},
    {"Empty", "", 0, "not JSON"},
    {"TrailingText", "{} x", 0, "not JSON"},
    {"NotUtf8", "{\"\xff\":1}", 0, "not JSON"},
    {"Array", "[1]", 0, "not a JSON object"},
    {"DeepNesting", "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[", 0, "not JSON"},
    {"EntryIsANumber", R"({"t":1})", 0, "needs a string dtype"},
    {"NoShape", R"({"t":{"dtype":"U8","data_offsets":[0,1]}})", 1, "an array shape"},
    {"ShapeIsAString", R"({"t":{"dtype":"U8","shape":"1","data_offsets":[0,1]}})", 1, "an array shape"},
    {"NegativeExtent", R"({"t":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}})", 1, "not a count"},
    {"FractionalExtent", R"({"t":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}})", 1, "not a count"},
    {"HugeExtent", R"({"t":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,1]}})", 1, "not a count"},
    {"OverflowToOne", R"({"t":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0, "overflows"},
    {"OverflowBehindZero", R"({"t":{"dtype":"U8","shape":[0,4294967296,4294967296],"data_offsets":[0,0]}})", 0,
     "overflows"},
    {"OverflowOfBytes", R"({"t":{"dtype":"I64","shape":[2305843009213693952],"data_offsets":[0,0]}})", 0, "overflows"},
    {"OneOffset", R"({"t":{"dtype":"U8","shape":[1],"data_offsets":[0]}})", 1, "data_offsets [begin, end]"},
    {"ReversedOffsets", R"({"t":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}})", 1, "data_offsets [begin, end]"},
    {"NegativeOffset", R"({"t":{"dtype":"U8","shape":[1],"data_offsets":[-1,0]}})", 1, "data_offsets [begin, end]"},
    {"ShapeTooLarge", R"({"t":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4, "need 8"},
    {"ShapeTooSmall", R"({"t":{"dtype":"F32","shape":[],"data_offsets":[0,8]}})", 8, "need 4"},
    {"PastTheEnd", R"({"t":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}})", 8, "describes 9 bytes"},
    {"FarPastTheEnd", R"({"t":{"dtype":"U8","shape":[9000000000000000000],"data_offsets":[0,9000000000000000000]}})", 8,
     "describes 9000000000000000000 bytes"},
    {"TrailingBytes", R"({"t":{"dtype":"U8","shape":[7],"data_offsets":[0,7]}})", 8, "describes 7 bytes"},
    {"Overlap",
     R"({"t":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"u":{"dtype":"U8","shape":[4],"data_offsets":[3,7]}})", 7,
     "inside another tensor"},
    {"SameBytes",
     R"({"t":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"u":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", 4,
     "inside another tensor"},
    {"Hole",
     R"({"t":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"u":{"dtype":"U8","shape":[4],"data_offsets":[5,9]}})", 9,
     "a hole"},
    {"Unaligned",
     R"({"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"u":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}})", 5,
     "not aligned"},
    {"DuplicateName",
     R"({"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1,
     "'t' twice"},
    {"DuplicateField", R"({"t":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}})", 1, "'dtype' twice"},
    {"MetadataIsAList", R"({"__metadata__":[]})", 0, "__metadata__ is not an object"},
    {"MetadataOfNumbers", R"({"__metadata__":{"a":1}})", 0, "'a' is not a string"},
    {"ControlCharactersInAName", R"({"a\n\u0001b":1})", 0, "'a??b'"},
};

class RefusedHeader : public testing::TestWithParam<BadHeader> {};

TEST_P(RefusedHeader, InOneSentence) {
  const BadHeader& bad = GetParam();
  const std::string bytes = safetensors_bytes(bad.header, std::string(static_cast<std::size_t>(bad.data_bytes), 'x'));
  for (const std::string& path : {write_file("f.st", bytes), write_gzip("f.st.gz", bytes)}) {
    const auto file = SafetensorsFile::open(path);
    ASSERT_FALSE(file.ok());
    const std::string message = file.status().message();
    EXPECT_EQ(message.rfind(path + ": ", 0), 0U) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    // Unpacking stops one byte behind what the header describes, so it reports what is missing and not what is there.
    const bool beyond_unpacking = std::string(bad.label) == "FarPastTheEnd" && path.ends_with(".gz");
    EXPECT_NE(message.find(beyond_unpacking ? "a .gz file may hold" : bad.sentence), std::string::npos) << message;
  }
}
INSTANTIATE_TEST_SUITE_P(Safetensors, RefusedHeader, testing::ValuesIn(kBadHeaders),
                         [](const auto& param_info) { return std::string(param_info.param.label); });

TEST(Safetensors, HeaderLengthBeyondTheFile) {
  const std::string good = safetensors_bytes(tensor_header(R"("dtype":"U8","shape":[1],"data_offsets":[0,1])"), "x");
  for (const std::uint64_t claimed : {std::uint64_t{good.size()}, std::uint64_t{1} << 40, ~std::uint64_t{0}}) {
    std::string bytes = good;
    std::memcpy(bytes.data(), &claimed, 8);
    for (const std::string& path : {write_file("f.st", bytes), write_gzip("f.st.gz", bytes)}) {
      const auto file = SafetensorsFile::open(path);
      ASSERT_FALSE(file.ok());
      EXPECT_NE(file.status().message().find("the header is said to be"), std::string::npos) << file.status().message();
    }
  }
}

TEST(Safetensors, NotAFile) {
  EXPECT_EQ(SafetensorsFile::open(temp_path("missing")).status().code(), StatusCode::kNotFound);
  EXPECT_NE(SafetensorsFile::open(testing::TempDir()).status().message().find("not a regular file"), std::string::npos);
  EXPECT_FALSE(SafetensorsFile::open("/dev/null").ok());
  EXPECT_NE(SafetensorsFile::open(write_file("e.st", "")).status().message().find("too short"), std::string::npos);
  EXPECT_NE(SafetensorsFile::open(write_file("e.gz", "")).status().message().find(": "), std::string::npos);
  EXPECT_NE(SafetensorsFile::open(write_file("plain.gz", safetensors_bytes("{}", "")))
                .status()
                .message()
                .find("not a gzip file"),
            std::string::npos);
}

std::string read_bytes(const std::string& path) {
  std::ostringstream bytes;
  bytes << std::ifstream(path, std::ios::binary).rdbuf();
  return bytes.str();
}

TEST(Safetensors, TruncatedAnywhere) {
  std::string header = kGoodHeader;
  const std::string plain = safetensors_bytes(header, good_data());
  const std::string packed = read_bytes(write_gzip("whole.gz", plain));
  for (const auto& [name, bytes] : {std::pair<std::string, std::string>{"f.st", plain}, {"f.gz", packed}}) {
    for (std::size_t size = 0; size < bytes.size(); ++size) {
      const std::string path = write_file(name, bytes.substr(0, size));
      const auto file = SafetensorsFile::open(path);
      ASSERT_FALSE(file.ok()) << name << " cut to " << size << " bytes";
      ASSERT_EQ(file.status().message().rfind(path + ": ", 0), 0U);
    }
  }
}

TEST(Safetensors, DamagedGzipIsNoticed) {
  // A checksum covers the contents: a flipped bit is refused, unless it was one of those that fill deflate's last byte.
  const std::string path = write_gzip("whole.gz", safetensors_bytes(kGoodHeader, good_data()));
  const auto whole = SafetensorsFile::open(path);
  ASSERT_TRUE(whole.ok());
  const std::string packed = read_bytes(path);
  std::size_t unnoticed = 0;
  for (std::size_t bit = 8 * 10; bit < 8 * packed.size(); ++bit) {  // after gzip's header, of which nothing is read
    std::string damaged = packed;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
    const auto file = SafetensorsFile::open(write_file("f.gz", damaged));
    if (!file.ok()) continue;
    ++unnoticed;
    EXPECT_EQ(touch_everything(*file), touch_everything(*whole)) << "bit " << bit;
  }
  EXPECT_LT(unnoticed, 8U);
}

std::string golden_path(const std::string& name) {
  return std::string(QUIRE_SOURCE_DIR) + "/tests/golden/" + name + ".safetensors.gz";
}

TEST(Safetensors, GoldenFilesCutAnywhere) {
  const std::string packed = read_bytes(golden_path("turboquant"));
  std::vector<std::size_t> sizes;
  for (std::size_t lost = 1; lost <= 20; ++lost) sizes.push_back(packed.size() - lost);  // checksum and length are 8
  for (std::size_t i = 0; i < 40; ++i) sizes.push_back(packed.size() * i / 40);
  for (const std::size_t size : sizes) {
    const std::string path = write_file("f.gz", packed.substr(0, size));
    const auto file = SafetensorsFile::open(path);
    ASSERT_FALSE(file.ok()) << "cut to " << size << " of " << packed.size() << " bytes";
    EXPECT_EQ(file.status().message(), path + ": the gzip stream is truncated");
  }
}

TEST(Safetensors, GoldenFilesWithAFlippedBit) {
  const std::string packed = read_bytes(golden_path("turboquant"));
  const std::size_t header_bytes = packed.find('\0', 10) + 1;  // ends with the name of what was packed
  std::vector<std::size_t> bits;
  for (std::size_t i = 0; i < 8 * 8; ++i) bits.push_back(8 * packed.size() - 1 - i);  // checksum and length
  for (std::size_t i = 0; i < 100; ++i) {
    const std::size_t byte = header_bytes + (packed.size() - header_bytes - 9) * i / 100;
    bits.push_back(8 * byte + i % 8);
  }
  for (const std::size_t bit : bits) {
    std::string damaged = packed;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
    const std::string path = write_file("f.gz", damaged);
    const auto file = SafetensorsFile::open(path);
    ASSERT_FALSE(file.ok()) << "bit " << bit;
    EXPECT_EQ(file.status().message().rfind(path + ": ", 0), 0U) << file.status().message();
  }
}

TEST(Safetensors, WhatFollowsAGzipMember) {
  // Several members in a row are one stream, as gzip says. Anything else after the first member is refused.
  const std::string plain = safetensors_bytes(kGoodHeader, good_data());
  const std::string first = read_bytes(write_gzip("a.gz", plain.substr(0, 100)));
  const std::string second = read_bytes(write_gzip("b.gz", plain.substr(100)));
  EXPECT_TRUE(SafetensorsFile::open(write_file("both.gz", first + second)).ok());
  EXPECT_FALSE(SafetensorsFile::open(write_file("first.gz", first)).ok());
  const std::string whole = read_bytes(write_gzip("whole.gz", plain));
  for (const std::string& rest : {std::string("x"), std::string(20, '\0'), whole}) {
    EXPECT_FALSE(SafetensorsFile::open(write_file("f.gz", whole + rest)).ok()) << rest.size();
  }
}

TEST(Safetensors, UnpackingIsBounded) {
  for (const std::int64_t bytes : {(std::int64_t{1} << 30) + 1, std::int64_t{1} << 32, std::int64_t{1} << 62}) {
    const std::string count = std::to_string(bytes);
    const std::string path = write_gzip(
        "f.gz",
        safetensors_bytes(tensor_header(R"("dtype":"U8","shape":[)" + count + R"(],"data_offsets":[0,)" + count + "]"),
                          std::string(1 << 20, '\0')));
    const auto file = SafetensorsFile::open(path);
    ASSERT_FALSE(file.ok());
    EXPECT_EQ(file.status().message(), path + ": the header describes " + count +
                                           " bytes of tensors, a .gz file may hold 1073741824; larger files are read "
                                           "as plain .safetensors");
  }
}

TEST(Safetensors, MutatedBytesNeverEscape) {
  // Each byte of the length and the header takes some other values: the file is refused, or what it hands out can be
  // read.
  const std::string plain = safetensors_bytes(kGoodHeader, good_data());
  const std::size_t header_end = plain.size() - good_data().size();
  int refused = 0;
  for (std::size_t i = 0; i < header_end; ++i) {
    for (const char other : {'\0', '"', '}', ']', '-', '0', '9', ',', '\xff'}) {
      std::string mutated = plain;
      mutated[i] = other;
      const auto file = SafetensorsFile::open(write_file("f.st", mutated));
      if (file.ok()) {
        touch_everything(*file);
      } else {
        ++refused;
      }
    }
  }
  EXPECT_GT(refused, 0);
}

TEST(Safetensors, GoldenFilesAreWhole) {
  for (const char* name :
       {"write", "attention_wide", "attention_per_token_head", "diffkv", "turboquant", "vllm033_attention"}) {
    const auto file = SafetensorsFile::open(golden_path(name));
    ASSERT_TRUE(file.ok()) << file.status().message();
    EXPECT_GT(touch_everything(*file), 0U);
  }
}

}  // namespace
}  // namespace quire::test
