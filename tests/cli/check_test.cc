// quire check passes every golden case, and it notices damage: a file changed in one place fails or is refused.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cli/cli.h"
#include "llm/safetensors.h"
#include "llm/safetensors_writer.h"
#include "quire/mode.h"

namespace quire::test {
namespace {

using llm::SafetensorsFile;
using nlohmann::json;

std::string golden_path(const std::string& name) { return source_path("tests/golden/" + name + ".safetensors.gz"); }

// ---- every case passes ----------------------------------------------------------------------------------------------

struct GoldenFile {
  const char* name;
  int passed, skipped;
  int written;  // of those passed: the cases that are written too
};

constexpr const char* kUnwritten = "K bytes of unwritten slots that changed";

class Check : public testing::TestWithParam<GoldenFile> {};

// Cases of modes that QUIRE_MODES leaves out of this build.
int left_out(const json& answer) {
  int count = 0;
  for (const json& row : answer["skipped"]) {
    if (row["reason"].get<std::string>().find("left out of this build") != std::string::npos) ++count;
  }
  return count;
}

TEST_P(Check, EveryCasePasses) {
  const GoldenFile& golden = GetParam();
  const CliResult result = run_cli({"check", "--json", golden_path(golden.name)});
  const json answer = result.json();
  ASSERT_TRUE(answer.is_object()) << result.out << result.err;
  EXPECT_EQ(result.exit_status, 0);
  const int missing = left_out(answer);
  EXPECT_EQ(answer["passed"], golden.passed - missing);
  EXPECT_EQ(answer["failed"], 0);
  EXPECT_EQ(answer["skipped"].size(), static_cast<std::size_t>(golden.skipped + missing));
  EXPECT_EQ(answer["cases"].size(), static_cast<std::size_t>(golden.passed - missing));
  const auto modes = list_modes();
  const bool all_modes = std::all_of(modes.begin(), modes.end(), [](const ModeInfo& mode) { return mode.compiled; });
  EXPECT_TRUE(missing == 0 || !all_modes);
  int written = 0;
  for (const json& row : answer["cases"]) {
    EXPECT_TRUE(row["pass"].get<bool>()) << row.dump(2);
    EXPECT_TRUE(row["name"].is_string());
    EXPECT_TRUE(row["worst_error"].is_number()) << row.dump(2);
    EXPECT_TRUE(row["tolerance"].is_number()) << row.dump(2);
    EXPECT_LE(row["worst_error"].get<double>(), row["tolerance"].get<double>());
    for (const json& measure : row["measures"]) written += measure["what"] == kUnwritten ? 1 : 0;
  }
  EXPECT_TRUE(written == golden.written || missing > 0) << written;
  for (const json& row : answer["skipped"]) EXPECT_NE(row["name"].get<std::string>(), "");
}
INSTANTIATE_TEST_SUITE_P(Golden, Check,
                         testing::Values(GoldenFile{"write", 40, 0, 26}, GoldenFile{"attention_wide", 42, 0, 10},
                                         GoldenFile{"attention_per_token_head", 45, 0, 10},
                                         GoldenFile{"diffkv", 21, 0, 6}, GoldenFile{"turboquant", 12, 0, 12},
                                         GoldenFile{"vllm033_write", 42, 0, 42},
                                         GoldenFile{"vllm033_attention", 39, 0, 39},
                                         GoldenFile{"vllm033_diffkv", 3, 0, 3}, GoldenFile{"vllm033_ties", 7, 0, 7}),
                         [](const auto& param_info) { return std::string(param_info.param.name); });

// The comparisons that a case must have gone through.
TEST(CheckMeasures, EveryGateIsApplied) {
  for (const ModeInfo& mode : list_modes()) {
    if (!mode.compiled) GTEST_SKIP() << "this build leaves out " << mode.name;
  }
  const auto measures_of = [](const json& answer, const std::string& name) {
    std::set<std::string> measures;
    for (const json& row : answer["cases"]) {
      if (row["name"] != name) continue;
      for (const json& measure : row["measures"]) measures.insert(measure["what"].get<std::string>());
    }
    return measures;
  };
  const std::set<std::string> equal = {"K bytes of unwritten slots that changed", "K bytes that differ",
                                       "V bytes of unwritten slots that changed", "V bytes that differ"};
  const std::set<std::string> close = {"K bytes of unwritten slots that changed", "K codes, share that differs",
                                       "K decoded error over the file's",         "K scales, relative difference",
                                       "V bytes of unwritten slots that changed", "V codes, share that differs",
                                       "V decoded error over the file's",         "V scales, relative difference"};
  const std::set<std::string> reading = {"LSE against the oracle", "bfloat16 output against the oracle",
                                         "output against the file", "output against the oracle"};
  const std::set<std::string> nearest = {
      "K bytes of unwritten slots that changed",          "K codes, share that differs",
      "K element farther from the input than the file's", "K scales, relative difference",
      "V bytes of unwritten slots that changed",          "V codes, share that differs",
      "V element farther from the input than the file's", "V scales, relative difference"};
  const json write = run_cli({"check", "--json", golden_path("write"), golden_path("vllm033_write")}).json();
  EXPECT_EQ(measures_of(write, "write/fp8/d80/float16"), equal);
  EXPECT_EQ(measures_of(write, "write/fp8_per_token_head/d80/float16"), nearest);
  EXPECT_EQ(measures_of(write, "write/int8_per_token_head/d64/bfloat16"), nearest);
  EXPECT_EQ(measures_of(write, "write/int4_per_token_head/d256/float16"), close);
  EXPECT_EQ(measures_of(write, "write/int2_per_token_head/d128/bfloat16"), close);
  EXPECT_EQ(measures_of(write, "rht_signs/512"), std::set<std::string>{"signs that differ"});
  EXPECT_EQ(measures_of(write, "tq_centroids/96_3"), std::set<std::string>{"centroids, relative difference"});

  const json diffkv = run_cli({"check", "--json", golden_path("diffkv")}).json();
  std::set<std::string> both = equal;
  both.insert(reading.begin(), reading.end());
  EXPECT_EQ(measures_of(diffkv, "diffkv/k192v128/mixed"), both);
  EXPECT_EQ(measures_of(diffkv, "diffkv/k64v128/sinks"), reading);

  // A slot's key half is compared byte by byte, its value half by scale, minimum and codes.
  const json turboquant = run_cli({"check", "--json", golden_path("turboquant")}).json();
  std::set<std::string> slot = reading;
  slot.insert({"K bytes of unwritten slots that changed", "K bytes that differ",
               "V bytes of unwritten slots that changed", "V codes, share that differs",
               "V decoded error over the file's", "V minima, difference", "V scales, relative difference"});
  EXPECT_EQ(measures_of(turboquant, "turboquant/turboquant_3bit_nc/d64"), slot);
}

// ---- files with one change ------------------------------------------------------------------------------------------

// One golden case as a file of its own, opened for changes.
class OneCase {
 public:
  OneCase(const std::string& golden, const std::string& name) : name_(name) {
    static std::map<std::string, SafetensorsFile> opened;  // unpacking takes a while
    auto found = opened.find(golden);
    if (found == opened.end()) found = opened.emplace(golden, SafetensorsFile::open(golden_path(golden)).value()).first;
    file = EditableFile::subset_of(found->second, name + "/");
    const auto text = found->second.metadata().find(name);
    if (text != found->second.metadata().end()) file.metadata[name] = text->second;
  }

  StoredTensor& tensor(const std::string& tensor_name) { return file.tensors.at(name_ + "/" + tensor_name); }
  void drop(const std::string& tensor_name) { file.tensors.erase(name_ + "/" + tensor_name); }
  void rename(const std::string& tensor_name, const std::string& other) {
    file.tensors[name_ + "/" + other] = tensor(tensor_name);
    drop(tensor_name);
  }
  void set(const char* parameter, const json& value) {
    json params = json::parse(file.metadata.at(name_));
    params[parameter] = value;
    file.metadata[name_] = params.dump();
  }
  CliResult check() const { return run_cli({"check", "--json", write_file("case.safetensors", file.bytes())}); }

  EditableFile file;

 private:
  std::string name_;
};

template <class T>
T get(const StoredTensor& tensor, std::size_t i) {
  T value;
  std::memcpy(&value, tensor.bytes.data() + i * sizeof(T), sizeof(T));
  return value;
}

template <class T>
void put(StoredTensor& tensor, std::size_t i, T value) {
  std::memcpy(tensor.bytes.data() + i * sizeof(T), &value, sizeof(T));
}

// The place of byte 0 of the row that the first token of sequence b has in a cache.
std::size_t first_row(OneCase& golden, const std::string& cache, std::size_t sequence) {
  const StoredTensor& table = golden.tensor("block_table");
  const auto block =
      static_cast<std::size_t>(get<std::int32_t>(table, sequence * static_cast<std::size_t>(table.shape[1])));
  const StoredTensor& tensor = golden.tensor(cache);
  return block * tensor.bytes.size() / static_cast<std::size_t>(tensor.shape[0]);
}

// The place of byte 0 of the row that token 0 was written to.
std::size_t written_row(OneCase& golden, const std::string& cache) {
  const StoredTensor& tensor = golden.tensor(cache);
  const StoredTensor& slots = golden.tensor("slot_mapping");
  const auto slot = static_cast<std::size_t>(slots.dtype == DType::kInt64 ? get<std::int64_t>(slots, 0)
                                                                          : get<std::int32_t>(slots, 0));
  return slot * tensor.bytes.size() / static_cast<std::size_t>(tensor.shape[0] * tensor.shape[1]);
}

void flip(StoredTensor& tensor, std::size_t byte, int bits) {
  tensor.bytes[byte] = static_cast<char>(tensor.bytes[byte] ^ bits);
}

struct Change {
  const char* label;
  const char* golden;
  const char* name;
  std::function<void(OneCase&)> apply;
  int exit_status;       // 0: it makes no difference; 1: the case fails; 2: the file is refused
  const char* sentence;  // a part of the sentence, for 2 and where an op refuses
};

void PrintTo(const Change& change, std::ostream* out) { *out << change.label; }

const Change kChanges[] = {
    {"Nothing", "diffkv", "diffkv/k64v128/mixed", [](OneCase&) {}, 0, ""},

    // Stored bytes.
    {"FloatByte", "write", "write/auto/d64/float16",
     [](OneCase& c) { flip(c.tensor("key_cache"), written_row(c, "key_cache"), 1); }, 1, ""},
    {"Fp8Byte", "write", "write/fp8/d80/bfloat16",
     [](OneCase& c) { flip(c.tensor("value_cache"), written_row(c, "value_cache") + 79, 1); }, 1, ""},
    {"Fp8PerTokenHeadScaleBit", "vllm033_write", "write/fp8_per_token_head/d96/float16",
     [](OneCase& c) { flip(c.tensor("v_scale_cache"), written_row(c, "v_scale_cache"), 1); }, 1, ""},
    {"Int8ScaleBit", "vllm033_write", "write/int8_per_token_head/d64/bfloat16",
     [](OneCase& c) { flip(c.tensor("k_scale_cache"), written_row(c, "k_scale_cache"), 1); }, 1, ""},
    {"Int8CodeByFour", "vllm033_write", "write/int8_per_token_head/d64/bfloat16",
     [](OneCase& c) { flip(c.tensor("key_cache"), written_row(c, "key_cache") + 5, 4); }, 1, ""},
    {"Int4ZeroPoint", "vllm033_write", "write/int4_per_token_head/d64/bfloat16",
     [](OneCase& c) {
       StoredTensor& scales = c.tensor("k_scale_cache");
       for (std::size_t i = 0; i < scales.bytes.size(); i += 4) flip(scales, i, 1);
     },
     1, ""},
    {"Int4NibblesSwapped", "vllm033_write", "write/int4_per_token_head/d64/bfloat16",
     [](OneCase& c) {
       for (char& byte : c.tensor("key_cache").bytes) {
         byte = static_cast<char>(((byte & 15) << 4) | ((byte >> 4) & 15));
       }
     },
     1, ""},
    {"Int2ScaleExponent", "write", "write/int2_per_token_head/d64/float16",
     [](OneCase& c) { flip(c.tensor("v_scale_cache"), written_row(c, "v_scale_cache") + 2, 0x80); }, 1, ""},
    {"DiffkvValueByte", "diffkv", "diffkv/k64v128/mixed",
     [](OneCase& c) { flip(c.tensor("kv_cache"), written_row(c, "kv_cache") + 2 * 64 + 1, 1); }, 1, ""},
    {"TurboQuantKeyNorm", "turboquant", "turboquant/turboquant_k3v4_nc/d128",
     [](OneCase& c) { flip(c.tensor("kv_cache"), written_row(c, "kv_cache") + 48, 1); }, 1, ""},
    {"TurboQuantValueMinimum", "turboquant", "turboquant/turboquant_k3v4_nc/d128",
     [](OneCase& c) { flip(c.tensor("kv_cache"), written_row(c, "kv_cache") + 50 + 64 + 2, 1); }, 1, ""},
    {"TurboQuantSlotSize", "turboquant", "turboquant/turboquant_k3v4_nc/d128",
     [](OneCase& c) { c.set("slot_size_aligned", 120); }, 2, "'slot_size_aligned'"},
    {"Centroid", "write", "tq_centroids/128_4",
     [](OneCase& c) { put<float>(c.tensor("centroids"), 3, 1.00001F * get<float>(c.tensor("centroids"), 3)); }, 1, ""},
    {"Sign", "write", "rht_signs/32", [](OneCase& c) { flip(c.tensor("signs"), 4 * 31 + 3, 0x80); }, 1, ""},
    {"SlotNoLongerSkipped", "write", "write/auto/d64/float16",
     [](OneCase& c) {
       StoredTensor& slots = c.tensor("slot_mapping");
       for (std::size_t i = 0; i < static_cast<std::size_t>(slots.shape[0]); ++i) {
         if (get<std::int64_t>(slots, i) < 0) return put<std::int64_t>(slots, i, 47);
       }
     },
     1, ""},
    {"SlotOutsideTheCache", "write", "write/auto/d64/float16",
     [](OneCase& c) { put<std::int64_t>(c.tensor("slot_mapping"), 3, 48); }, 1, "slot_mapping"},

    // What attention reads. The first sequence has a single token in most cases, so its row is its whole answer.
    {"KeyExponent", "attention_wide", "attn/auto/mixed",
     [](OneCase& c) {
       for (const char* name : {"key", "value", "slot_mapping"}) c.drop(name);
       flip(c.tensor("key_cache"), first_row(c, "key_cache", 0) + 1, 0x04);
     },
     1, ""},
    {"Int4ValueCode", "attention_per_token_head", "attn/int4_per_token_head/block32",
     [](OneCase& c) { flip(c.tensor("value_cache"), first_row(c, "value_cache", 0), 8); }, 1, ""},
    {"Int4ValueScale", "attention_per_token_head", "attn/int4_per_token_head/block32",
     [](OneCase& c) { flip(c.tensor("v_scale_cache"), first_row(c, "v_scale_cache", 0) + 2, 0x40); }, 1, ""},
    {"Int2ValueCode", "attention_per_token_head", "attn/int2_per_token_head/decode_3d",
     [](OneCase& c) { flip(c.tensor("value_cache"), first_row(c, "value_cache", 0), 2); }, 1, ""},
    {"OutputByte", "attention_wide", "attn/fp8/block32", [](OneCase& c) { flip(c.tensor("out"), 1, 0x20); }, 1, ""},
    {"OutputNaN", "attention_wide", "attn/fp8/block32",
     [](OneCase& c) { put<std::uint16_t>(c.tensor("out"), 0, 0x7fc0); }, 1, ""},
    {"Fp8OutputCode", "attention_wide", "attn/auto/fp8_out", [](OneCase& c) { flip(c.tensor("out"), 0, 0x10); }, 1, ""},
    // The last page of the pool is no sequence's; what it holds must not matter.
    {"UnreadPageIsGarbage", "attention_per_token_head", "attn/int2_per_token_head/window",
     [](OneCase& c) {
       std::set<std::int32_t> used;
       const StoredTensor& table = c.tensor("block_table");
       for (std::size_t i = 0; i < table.bytes.size() / 4; ++i) used.insert(get<std::int32_t>(table, i));
       const std::int64_t num_blocks = c.tensor("key_cache").shape[0];
       for (std::int32_t block = 0; block < num_blocks; ++block) {
         if (used.count(block) > 0) continue;
         for (const char* name : {"key_cache", "value_cache", "k_scale_cache", "v_scale_cache"}) {
           std::string& bytes = c.tensor(name).bytes;
           const std::size_t page = bytes.size() / static_cast<std::size_t>(num_blocks);
           std::fill_n(bytes.begin() + static_cast<std::ptrdiff_t>(page * static_cast<std::size_t>(block)), page,
                       '\xff');
         }
       }
       EXPECT_LT(used.size(), static_cast<std::size_t>(num_blocks));
     },
     0, ""},

    // Parameters and optional inputs: each feature shows in the output.
    {"Scale", "attention_wide", "attn/auto/decode", [](OneCase& c) { c.set("softmax_scale", 0.12); }, 1, ""},
    {"Window", "attention_wide", "attn/auto/window", [](OneCase& c) { c.set("sliding_window", 11); }, 1, ""},
    {"NoWindow", "diffkv", "diffkv/k128v64/window", [](OneCase& c) { c.set("sliding_window", -1); }, 1, ""},
    {"NoSoftcap", "attention_wide", "attn/auto/softcap", [](OneCase& c) { c.set("softcap", 0.0); }, 1, ""},
    {"Lookback", "attention_wide", "attn/auto/chunk", [](OneCase& c) { c.set("chunk_lookback", 0); }, 1, ""},
    {"AlibiSqrt", "attention_wide", "attn/auto/alibi_sqrt", [](OneCase& c) { c.set("use_alibi_sqrt", false); }, 1, ""},
    {"NoAlibi", "attention_wide", "attn/auto/alibi", [](OneCase& c) { c.drop("alibi_slopes"); }, 1, ""},
    {"NoSinks", "attention_wide", "attn/auto/sinks", [](OneCase& c) { c.drop("sinks"); }, 1, ""},
    {"NoBias", "attention_wide", "attn/auto/qq_bias", [](OneCase& c) { c.drop("qq_bias"); }, 1, ""},
    {"NoPrefix", "attention_wide", "attn/auto/mm_prefix", [](OneCase& c) { c.drop("mm_prefix_range"); }, 1, ""},
    {"KeyScaleOfTheTensor", "attention_wide", "attn/fp8/decode_3d",
     [](OneCase& c) { put<float>(c.tensor("k_scale"), 0, 2.0F * get<float>(c.tensor("k_scale"), 0)); }, 1, ""},

    // These files lie about themselves.
    {"ModeOfOtherWidth", "attention_per_token_head", "attn/int4_per_token_head/decode",
     [](OneCase& c) { c.set("mode", "int2_per_token_head"); }, 1, "reshape_and_cache: "},
    {"ModeOfOtherCodes", "attention_per_token_head", "attn/int8_per_token_head/block32",
     [](OneCase& c) { c.set("mode", "fp8_per_token_head"); }, 1, "unified_attention: "},
    {"LengthBeyondTheTable", "attention_wide", "attn/auto/window",
     [](OneCase& c) { put<std::int32_t>(c.tensor("seq_lens"), 2, 1000000); }, 1, "unified_attention: "},
    {"BlockOutsideThePool", "attention_wide", "attn/auto/window",
     [](OneCase& c) { put<std::int32_t>(c.tensor("block_table"), 0, 7); }, 1, "unified_attention: "},
    {"NegativeQueryLength", "attention_wide", "attn/auto/window",
     [](OneCase& c) { put<std::int32_t>(c.tensor("cu_seqlens_q"), 1, -5); }, 1, "unified_attention: "},
    {"NoScaleCache", "attention_per_token_head", "attn/int8_per_token_head/block32",
     [](OneCase& c) { c.drop("k_scale_cache"); }, 1, "unified_attention: "},
    {"SequenceLengthParameter", "attention_wide", "attn/auto/window",
     [](OneCase& c) {
       c.set("seq_lens", json::array({1, 2, 3}));
     },
     2, "'seq_lens'"},
    {"HeadSizeParameter", "write", "write/auto/d64/float16", [](OneCase& c) { c.set("head_size", 65); }, 2,
     "'head_size'"},
    {"ParameterOfWrongType", "attention_wide", "attn/auto/window", [](OneCase& c) { c.set("sliding_window", "12"); }, 2,
     "'sliding_window'"},
    {"ParameterOutOfRange", "attention_wide", "attn/auto/window",
     [](OneCase& c) { c.set("sliding_window", 99999999999); }, 2, "'sliding_window'"},

    // Tensors that are lost or misnamed, where the rest alone would pass.
    {"NoQuery", "attention_wide", "attn/auto/window", [](OneCase& c) { c.drop("query"); }, 2, "no tensor 'query'"},
    {"NoQueryButKeys", "attention_wide", "attn/auto/decode", [](OneCase& c) { c.drop("query"); }, 2,
     "no tensor 'query'"},
    {"NoBlockTable", "attention_wide", "attn/auto/window", [](OneCase& c) { c.drop("block_table"); }, 2,
     "no tensor 'block_table'"},
    {"NoQueryLengths", "attention_wide", "attn/auto/decode", [](OneCase& c) { c.drop("cu_seqlens_q"); }, 2,
     "no tensor 'cu_seqlens_q'"},
    {"NoKey", "diffkv", "diffkv/k64v128/mixed", [](OneCase& c) { c.drop("key"); }, 2, "no tensor 'key'"},
    {"NoValue", "diffkv", "diffkv/k64v128/mixed", [](OneCase& c) { c.drop("value"); }, 2, "no tensor 'value'"},
    {"NoSlotMapping", "attention_wide", "attn/auto/decode", [](OneCase& c) { c.drop("slot_mapping"); }, 2,
     "no tensor 'slot_mapping'"},
    {"OnlySlotMapping", "attention_wide", "attn/auto/decode",
     [](OneCase& c) {
       c.drop("key");
       c.drop("value");
     },
     2, "no tensor 'key'"},
    {"NoCacheOfAWrite", "write", "write/auto/d64/float16", [](OneCase& c) { c.drop("value_cache"); }, 2,
     "no tensor 'value_cache'"},
    {"NoKeyScale", "write", "write/fp8/d64/float16", [](OneCase& c) { c.drop("k_scale"); }, 2, "no tensor 'k_scale'"},
    {"NoCentroids", "turboquant", "turboquant/turboquant_k8v4/d64", [](OneCase& c) { c.drop("centroids"); }, 2,
     "no tensor 'centroids'"},
    {"KeyRenamed", "diffkv", "diffkv/k64v128/mixed", [](OneCase& c) { c.rename("key", "kex"); }, 2, "'kex'"},
    {"SinksRenamed", "attention_wide", "attn/auto/sinks", [](OneCase& c) { c.rename("sinks", "sink"); }, 2, "'sink'"},
    {"SinksOfAWrite", "write", "write/auto/d64/float16",
     [](OneCase& c) {
       c.file.tensors["write/auto/d64/float16/sinks"] = {DType::kFloat32, {1}, std::string(4, 'x')};
     },
     2, "'sinks'"},
    {"NoParameters", "write", "write/auto/d64/float16", [](OneCase& c) { c.file.metadata.clear(); }, 2,
     "no parameter 'mode'"},
    {"NoPreset", "turboquant", "turboquant/turboquant_k8v4/d64", [](OneCase& c) { c.file.metadata.clear(); }, 2,
     "no parameter 'preset'"},

    // Shapes and names.
    {"FlatCache", "attention_wide", "attn/auto/window",
     [](OneCase& c) {
       StoredTensor& cache = c.tensor("key_cache");
       cache.shape = {static_cast<std::int64_t>(cache.bytes.size()) / 2};
     },
     2, "'key_cache'"},
    {"PackedCacheTooNarrow", "diffkv", "diffkv/k64v128/mixed",
     [](OneCase& c) {
       StoredTensor& cache = c.tensor("kv_cache");
       cache.shape[2] *= 2;
       cache.shape[3] /= 2;
     },
     2, "'kv_cache'"},
    {"ParametersAreNotJson", "write", "write/auto/d64/float16",
     [](OneCase& c) { c.file.metadata["write/auto/d64/float16"] = std::string("{"); }, 2, "not a JSON object"},
    {"MetadataOfNoCase", "write", "write/auto/d64/float16", [](OneCase& c) { c.file.metadata["write/x"] = "{}"; }, 2,
     "'write/x'"},
    {"TensorOfNoCase", "write", "rht_signs/32",
     [](OneCase& c) {
       c.file.tensors["loose"] = {DType::kUInt8, {1}, "x"};
     },
     2, "'loose'"},
    {"CaseOfNoKind", "write", "rht_signs/32",
     [](OneCase& c) {
       c.file.tensors["signs_rht/32/x"] = {DType::kUInt8, {1}, "x"};
     },
     2, "'signs_rht/32'"},
};

class ChangedFile : public testing::TestWithParam<Change> {};

TEST_P(ChangedFile, IsNoticed) {
  const Change& change = GetParam();
  OneCase golden(change.golden, change.name);
  change.apply(golden);
  const CliResult result = golden.check();
  if (result.exit_status == 0 && left_out(result.json()) > 0) {
    GTEST_SKIP() << "this build leaves out the mode of " << change.name;
  }
  EXPECT_EQ(result.exit_status, change.exit_status) << result.out << result.err;
  if (change.exit_status == 2) {
    EXPECT_TRUE(result.one_sentence()) << result.err;
    EXPECT_EQ(result.out, "");
    EXPECT_NE(result.err.find(change.sentence), std::string::npos) << result.err;
    return;
  }
  const json answer = result.json();
  ASSERT_EQ(answer["cases"].size(), 1U) << result.out;
  EXPECT_EQ(answer["failed"], change.exit_status);
  EXPECT_EQ(answer["cases"][0]["pass"], change.exit_status == 0);
  const std::string refusal = answer["cases"][0].value("refused", "");
  EXPECT_NE(refusal.find(change.sentence), std::string::npos) << refusal;
  EXPECT_EQ(refusal.empty(), std::string(change.sentence).empty()) << refusal;
}
INSTANTIATE_TEST_SUITE_P(Check, ChangedFile, testing::ValuesIn(kChanges),
                         [](const auto& param_info) { return std::string(param_info.param.label); });

TEST(CheckFiles, UnknownModeIsSkippedByName) {
  OneCase golden("vllm033_write", "write/int8_per_token_head/d64/bfloat16");
  golden.set("mode", "int3_per_token_head");
  const CliResult result = golden.check();
  EXPECT_EQ(result.exit_status, 0) << result.out << result.err;
  const json answer = result.json();
  ASSERT_EQ(answer["skipped"].size(), 1U);
  EXPECT_EQ(answer["skipped"][0]["name"], "write/int8_per_token_head/d64/bfloat16");
  EXPECT_NE(answer["skipped"][0]["reason"].get<std::string>().find("int3_per_token_head"), std::string::npos);
}

TEST(CheckFiles, TruncatedFileIsRefused) {
  const std::string whole = [] {
    std::ostringstream bytes;
    bytes << std::ifstream(golden_path("diffkv"), std::ios::binary).rdbuf();
    return bytes.str();
  }();
  for (const std::size_t lost : {1U, 8U, 1000U}) {
    const std::string path = write_file("cut.safetensors.gz", whole.substr(0, whole.size() - lost));
    const CliResult result = run_cli({"check", path});
    EXPECT_EQ(result.exit_status, 2) << lost;
    EXPECT_TRUE(result.one_sentence()) << result.err;
    EXPECT_NE(result.err.find(path + ": the gzip stream is truncated"), std::string::npos) << result.err;
  }
}

TEST(CheckFiles, FileWithoutACaseFails) {
  const std::string empty = write_file("empty.safetensors", safetensors_bytes("{}", ""));
  const OneCase good("write", "rht_signs/32");
  const std::string beside = write_file("good.safetensors", good.file.bytes());
  const CliResult result = run_cli({"check", "--json", empty, beside});
  EXPECT_EQ(result.exit_status, 1) << result.out << result.err;
  const json answer = result.json();
  EXPECT_EQ(answer["failed"], 1);
  EXPECT_EQ(answer["passed"], 1);
  EXPECT_EQ(answer["cases"][0]["name"], empty);
  EXPECT_EQ(answer["cases"][0]["pass"], false);
  EXPECT_EQ(answer["cases"][0]["refused"], "the file holds no case");
  const std::string text = run_cli({"check", empty}).out;
  EXPECT_NE(text.find(empty), std::string::npos) << text;
  EXPECT_NE(text.find("the file holds no case"), std::string::npos) << text;
  EXPECT_NE(text.find("0 passed, 1 failed, 0 skipped"), std::string::npos) << text;
}

TEST(CheckFiles, TextNamesTheMiss) {
  OneCase golden("write", "write/auto/d64/float16");
  flip(golden.tensor("key_cache"), written_row(golden, "key_cache"), 1);
  const CliResult result = run_cli({"check", write_file("case.safetensors", golden.file.bytes())});
  EXPECT_EQ(result.exit_status, 1);
  EXPECT_EQ(result.out.rfind("FAIL  write/auto/d64/float16", 0), 0U) << result.out;
  EXPECT_NE(result.out.find("K bytes that differ"), std::string::npos) << result.out;
  EXPECT_NE(result.out.find("0 passed, 1 failed, 0 skipped"), std::string::npos) << result.out;
}

// Bytes are changed at random in the header and in the integers that steer both ops. Whatever they say, the check ends
// with a verdict or a sentence.
TEST(CheckFiles, RandomBytesGetAVerdict) {
  const OneCase golden("diffkv", "diffkv/k64v128/mixed");
  const std::string whole = golden.file.bytes();
  // The writer puts wide elements first, so slot_mapping, block_table and the lengths follow the header.
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, whole.data(), 8);
  const std::size_t steering = 8 + header_bytes + 50 * 8 + (6 + 4 + 3) * 4;  // slots, block table, lengths
  std::mt19937 random(7);
  std::set<int> verdicts;
  for (int trial = 0; trial < 300; ++trial) {
    std::string bytes = whole;
    const std::size_t first = trial % 2 == 0 ? 8 : 8 + header_bytes;
    bytes[first + random() % ((trial % 2 == 0 ? 8 + header_bytes : steering) - first)] = static_cast<char>(random());
    const CliResult result = run_cli({"check", write_file("case.safetensors", bytes)});
    verdicts.insert(result.exit_status);
    EXPECT_TRUE(result.exit_status != 2 || result.one_sentence()) << result.err;
  }
  EXPECT_EQ(verdicts, (std::set<int>{0, 1, 2}));
}

// Where there is no CUDA the refusal is a sentence; where there is, the cases pass.
TEST(CheckFiles, OnCudaOrRefused) {
  const CliResult result = run_cli({"check", "--device", "cuda", golden_path("write")});
  if (result.exit_status == 0) return;
  EXPECT_EQ(result.exit_status, 2) << result.out;
  EXPECT_TRUE(result.one_sentence()) << result.err;
}

// A GPU whose number no machine has: the sentence says how many this one has, or why it has none.
TEST(CheckFiles, OnAGpuThatIsNotThere) {
  const bool has_cuda = run_cli({"check", "--device", "CUDA:0", golden_path("write")}).exit_status == 0;
  expect_refusal({"check", "--device", "cuda:4096", golden_path("write")},
                 has_cuda ? "device is cuda:4096; this process sees" : "CUDA");
}

}  // namespace
}  // namespace quire::test
