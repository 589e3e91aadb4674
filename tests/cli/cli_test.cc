// The verbs modes and layout, and what the tool does with bad usage.
#include <gtest/gtest.h>

#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "cli/cli.h"
#include "quire/layout.h"
#include "quire/mode.h"

namespace quire::test {
namespace {

using nlohmann::json;

TEST(Cli, BadUsageIsOneSentence) {
  const struct {
    std::vector<std::string> arguments;
    const char* names;  // what the sentence must name
  } calls[] = {
      {{}, "there are modes, layout, check"},
      {{"fly"}, "fly"},
      {{"modes", "--xml"}, "--xml"},
      {{"layout"}, "--mode"},
      {{"layout", "--mode", "int5_per_token_head"}, "int5_per_token_head"},
      {{"layout", "--mode", "int2_per_token_head", "--head-size", "66"}, "66"},
      {{"layout", "--mode", "auto", "--head-size", "many"}, "many"},
      {{"layout", "--mode", "auto", "--head-size", "0"}, "head_size"},
      {{"layout", "--mode", "auto", "--head-size", "99999999999"}, "99999999999"},
      {{"layout", "--mode", "auto", "--block-size", "-16"}, "block_size"},
      {{"layout", "--mode", "auto", "--block-size", "2147483647"}, "block_size"},
      {{"layout", "--mode", "auto", "--num-kv-heads", "2147483647"}, "num_kv_heads"},
      {{"layout", "--mode", "auto", "--num-layers", "2147483647"}, "num_layers"},
      {{"layout", "--mode", "auto", "--page-alignment", "9223372036854775807"}, "page_alignment"},
      {{"layout", "--mode", "auto", "--order", "dhn"}, "dhn"},
      {{"layout", "--mode", "auto", "--packing", "tight"}, "tight"},
      {{"layout", "--mode", "auto", "--scales", "none"}, "none"},
      {{"layout", "--mode", "auto", "--model-dtype", "int8"}, "int8"},
      {{"layout", "--mode", "auto", "--table"}, "--table"},
      {{"layout", "--mode", "auto", "--markdown"}, "--markdown"},
      {{"check"}, "files"},
      {{"check", "/nowhere/golden.safetensors"}, "/nowhere/golden.safetensors"},
      {{"check", "--device", "tpu", "x"}, "tpu"},
  };
  for (const auto& call : calls) expect_refusal(call.arguments, call.names);
}

// What the values of options may look like; the sentence names the option, the value and what is supported.
TEST(Cli, ValuesAreTakenAsWritten) {
  const auto layout = [](const std::string& option, const std::string& value, const std::string& says) {
    expect_refusal({"layout", "--mode", "auto", option, value}, says);
    if (!value.empty()) expect_refusal({"layout", "--mode", "auto", option + "=" + value}, says);
  };
  const std::string integer = "expected a decimal integer from -2147483648 to 2147483647";
  for (const char* value : {"010", "0x10", "", " 8", "8 ", "+8", "8.0", "8e0", "1,2", "eight", "2147483648",
                            "-2147483649", "99999999999999999999", "--8", "00", "-0"}) {
    layout("--num-kv-heads", value, std::string("--num-kv-heads is '") + value + "', " + integer);
  }
  layout("--head-size-v", "", "--head-size-v is '', " + integer);
  layout("--page-alignment", "9223372036854775808", "--page-alignment is '9223372036854775808', expected a decimal");
  layout("--order", "zzz", "--order is 'zzz', supported are nhd, hnd");
  layout("--order", "1", "--order is '1', supported are nhd, hnd");
  layout("--order", "", "--order is '', supported are nhd, hnd");
  layout("--packing", "2", "--packing is '2', supported are separate, kv_in_block, kv_in_row");
  layout("--scales", "0", "--scales is '0', supported are separate, inline");
  layout("--model-dtype", "fp16", "--model-dtype is 'fp16', supported are float32, float16, bfloat16");
  for (const char* value : {"0", "tpu", "", "cuda:", "cuda:-1", "cuda:01", "cuda:+1", "cuda: 1", "cuda:1 ", "cuda:x",
                            "cuda1", "cpu:0", "cuda:0x1", "cuda:99999999999"}) {
    expect_refusal(
        {"check", "--device", value, "x"},
        std::string("--device is '") + value + "', supported are cpu, cuda and cuda:N, N the number of a GPU");
  }
  expect_refusal({"layout", "--mode", "auto", "--order", "n\nhd\t"}, "--order is 'n?hd?', supported");
  expect_refusal({"layout", "--mode", "auto", "--order", std::string(1000, 'n')},
                 "--order is '" + std::string(80, 'n') + "...', supported");

  EXPECT_EQ(run_cli({"layout", "--mode", "auto", "--order", "HND", "--json"}).json()["order"], "hnd");
  EXPECT_EQ(run_cli({"layout", "--mode", "auto", "--num-kv-heads", "10", "--json"}).json()["num_kv_heads"], 10);
  EXPECT_EQ(run_cli({"layout", "--mode", "auto", "--head-size-v", "0", "--json"}).json()["head_size_v"], 128);
}

TEST(Cli, OutputThatCannotBeWrittenIsAnError) {
  const std::vector<std::vector<std::string>> calls = {
      {"--help"},
      {"--version"},
      {"layout", "--help"},
      {"modes"},
      {"modes", "--json"},
      {"layout", "--mode", "fp8"},
      {"layout", "--mode", "fp8", "--json"},
      {"layout", "--table"},
      {"layout", "--table", "--markdown"},
      {"layout", "--table", "--json"},
      {"check", source_path("tests/golden/turboquant.safetensors.gz")},
      {"check", "--json", source_path("tests/golden/turboquant.safetensors.gz")},
  };
  for (const auto& call : calls) {
    const CliResult result = run_cli_into("/dev/full", call);
    EXPECT_EQ(result.exit_status, 2) << call.back();
    EXPECT_TRUE(result.one_sentence()) << result.err;
    EXPECT_EQ(result.err.rfind("quire: cannot write to standard output", 0), 0U) << call.back() << result.err;
  }
  // Where the sentence cannot be written either, the exit status tells.
  const int old_stderr = dup(STDERR_FILENO);
  const int full = open("/dev/full", O_WRONLY);
  dup2(full, STDERR_FILENO);
  close(full);
  const char* const argv[] = {"quire", "fly"};
  const int exit_status = cli_main(2, argv);
  dup2(old_stderr, STDERR_FILENO);
  close(old_stderr);
  EXPECT_EQ(exit_status, 2);
  // The next call starts afresh.
  EXPECT_EQ(run_cli({"--version"}).exit_status, 0);
  // Where the call is refused anyway, there is one sentence and not two.
  const CliResult refused = run_cli_into("/dev/full", {"layout", "--mode", "int5"});
  EXPECT_EQ(refused.exit_status, 2);
  EXPECT_TRUE(refused.one_sentence()) << refused.err;
}

TEST(Cli, HelpAndVersion) {
  const CliResult help = run_cli({"--help"});
  EXPECT_EQ(help.exit_status, 0);
  EXPECT_EQ(help.err, "");
  for (const char* verb : {"modes", "layout", "check"}) EXPECT_NE(help.out.find(verb), std::string::npos) << verb;
  EXPECT_EQ(run_cli({"layout", "--help"}).exit_status, 0);
  EXPECT_EQ(run_cli({"--version"}).out.rfind("quire ", 0), 0U);
}

TEST(Cli, ModesListsTheTable) {
  const CliResult result = run_cli({"modes", "--json"});
  EXPECT_EQ(result.exit_status, 0);
  const json answer = result.json();
  ASSERT_TRUE(answer.is_object()) << result.out;
  EXPECT_EQ(answer["head_size"], 128);
  const auto modes = list_modes();
  ASSERT_EQ(answer["modes"].size(), modes.size());
  const std::string text = run_cli({"modes"}).out;
  for (std::size_t i = 0; i < modes.size(); ++i) {
    const json& row = answer["modes"][i];
    for (const char* key : {"name", "aliases", "kv_quant_mode", "key_format", "value_format", "key_bits", "value_bits",
                            "scale_caches", "bytes_per_token_head", "shared_slot", "compiled", "registered"}) {
      EXPECT_TRUE(row.contains(key)) << key;
    }
    EXPECT_EQ(row["name"], modes[i].name);
    EXPECT_EQ(row["aliases"], json(modes[i].aliases));
    EXPECT_EQ(row["key_format"], modes[i].key_format);
    EXPECT_EQ(row["compiled"], modes[i].compiled);
    EXPECT_NE(text.find("\n" + modes[i].name + " "), std::string::npos) << modes[i].name;
  }
}

// Widths, scales and costs as FORMATS fixes them, written down here a second time.
TEST(Cli, ModesKnowsWhatAModeCosts) {
  const struct {
    const char* name;
    const char* kv_quant_mode;
    double bits;
    bool scale_caches;
    int bytes;  // of K, V and scales, head size 128
  } expected[] = {
      {"auto", "NONE", 16, false, 512},
      {"float32", "NONE", 32, false, 1024},
      {"fp8", "FP8_PER_TENSOR", 8, false, 256},
      {"int8_per_token_head", "INT8_PER_TOKEN_HEAD", 8, true, 264},
      {"fp8_per_token_head", "FP8_PER_TOKEN_HEAD", 8, true, 264},
      {"int4_per_token_head", "INT4_PER_TOKEN_HEAD", 4, true, 136},
      {"int2_per_token_head", "INT2_PER_TOKEN_HEAD", 2, true, 72},
  };
  const json answer = run_cli({"modes", "--json"}).json();
  for (const auto& mode : expected) {
    bool found = false;
    for (const json& row : answer["modes"]) {
      if (row["name"] != mode.name) continue;
      found = true;
      EXPECT_EQ(row["kv_quant_mode"], mode.kv_quant_mode) << mode.name;
      EXPECT_EQ(row["key_bits"], mode.bits) << mode.name;
      EXPECT_EQ(row["value_bits"], mode.bits) << mode.name;
      EXPECT_EQ(row["scale_caches"], mode.scale_caches) << mode.name;
      EXPECT_EQ(row["bytes_per_token_head"], mode.bytes) << mode.name;
    }
    EXPECT_TRUE(found) << mode.name;
  }
}

TEST(Cli, LayoutPrintsWhatMakeLayoutAnswers) {
  const CliResult result = run_cli({"layout",
                                    "--mode",
                                    "int4_per_token_head",
                                    "--head-size",
                                    "192",
                                    "--head-size-v",
                                    "128",
                                    "--num-kv-heads",
                                    "4",
                                    "--num-layers",
                                    "3",
                                    "--block-size",
                                    "32",
                                    "--order",
                                    "hnd",
                                    "--packing",
                                    "kv_in_block",
                                    "--scales",
                                    "inline",
                                    "--page-alignment",
                                    "4096",
                                    "--model-dtype",
                                    "float16",
                                    "--json"});
  EXPECT_EQ(result.exit_status, 0) << result.err;
  const json answer = result.json();
  ASSERT_TRUE(answer.is_object()) << result.out;

  KVCacheSpec spec;
  spec.mode = parse_kv_cache_dtype("int4_per_token_head").value();
  spec.head_size = 192;
  spec.head_size_v = 128;
  spec.num_kv_heads = 4;
  spec.num_layers = 3;
  spec.block_size = 32;
  spec.order = CacheOrder::kHND;
  spec.packing = KVPacking::kKVInBlock;
  spec.scales = ScalePlacement::kInline;
  spec.page_alignment = 4096;
  spec.model_dtype = DType::kFloat16;
  const KVCacheLayout layout = make_layout(spec).value();
  const json expected = {{"mode", "int4_per_token_head"},
                         {"head_size", 192},
                         {"head_size_v", 128},
                         {"num_kv_heads", 4},
                         {"num_layers", 3},
                         {"block_size", 32},
                         {"model_dtype", "float16"},
                         {"order", "hnd"},
                         {"packing", "kv_in_block"},
                         {"scales", "inline"},
                         {"page_alignment", 4096},
                         {"key_cache_dtype", "uint8"},
                         {"value_cache_dtype", "uint8"},
                         {"k_data_bytes", 96},
                         {"v_data_bytes", 64},
                         {"k_scale_bytes", 4},
                         {"v_scale_bytes", 4},
                         {"k_row_bytes", 100},
                         {"v_row_bytes", 68},
                         {"bytes_per_token_head", 168},
                         {"bytes_per_token", 168 * 4 * 3},
                         {"bytes_per_block", 24576},  // 168 * 4 * 32 = 21504, padded to 4096
                         {"tokens_per_gib", layout.tokens_per_gib},
                         {"k_block_stride", 24576},
                         {"k_slot_stride", 100},
                         {"k_head_stride", 3200},
                         {"v_block_stride", 24576},
                         {"v_slot_stride", 68},
                         {"v_head_stride", 2176},
                         {"v_offset", 12800},
                         {"k_scale_offset", 96},
                         {"v_scale_offset", 64},
                         {"effective_head_size", 96},
                         {"effective_head_size_v", 64},
                         {"padded_head_size", 100},
                         {"padded_head_size_v", 68}};
  EXPECT_EQ(answer, expected);
}

TEST(Cli, LayoutTakesAnAlias) {
  const json answer = run_cli({"layout", "--mode", "fp8_e4m3", "--json"}).json();
  EXPECT_EQ(answer["mode"], "fp8");
}

TEST(Cli, ByteTableIsTheOneInTheDocs) {
  if (parse_kv_cache_dtype("guest_int6").ok()) GTEST_SKIP() << "this build has modes that the page does not";
  const CliResult table = run_cli({"layout", "--table", "--markdown"});
  EXPECT_EQ(table.exit_status, 0);
  std::ostringstream page;
  page << std::ifstream(source_path("docs/formats/bytes.md")).rdbuf();
  EXPECT_NE(page.str().find("\n" + table.out), std::string::npos)
      << "docs/formats/bytes.md does not hold what `quire layout --table --markdown` prints:\n"
      << table.out;
}

TEST(Cli, ByteTableAgreesWithLayout) {
  const json table = run_cli({"layout", "--table", "--json"}).json();
  ASSERT_EQ(table["table"].size(), list_modes().size());
  const std::set<std::string> columns = {"64", "80", "96", "112", "128", "192", "256", "512", "192/128"};
  for (const json& row : table["table"]) {
    const std::string mode = row["mode"];
    std::set<std::string> names;
    for (const auto& [name, bytes] : row["bytes_per_token_head"].items()) names.insert(name);
    EXPECT_EQ(names, columns);
    const CliResult one = run_cli({"layout", "--mode", mode, "--head-size", "192", "--head-size-v", "128", "--json"});
    if (one.exit_status == 0) {
      EXPECT_EQ(row["bytes_per_token_head"]["192/128"], one.json()["bytes_per_token_head"]) << mode;
    } else {
      EXPECT_TRUE(row["bytes_per_token_head"]["192/128"].is_null()) << mode;
    }
  }
}

}  // namespace
}  // namespace quire::test
