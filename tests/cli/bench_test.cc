// quire bench: which rows it prints and what they hold. The times themselves are not tested.
#include <gtest/gtest.h>

#include <map>
#include <set>
#include <string>

#include "cli/cli.h"
#include "support/modes.h"

namespace quire::test {
namespace {

using nlohmann::json;

const std::set<std::string> kColumns = {"op",           "device",        "mode",
                                        "layout",       "batch",         "context",
                                        "q_len",        "num_q_heads",   "num_kv_heads",
                                        "head_size",    "head_size_v",   "block_size",
                                        "ms",           "cache_gbps",    "bandwidth_share",
                                        "layout_share", "product_share", "tflops",
                                        "kernel",       "host_us",       "host_us_with_plan"};

TEST(Bench, RowsOfAGrid) {
  const CliResult result = run_cli({"bench",          "decode", "--mode",        "bfloat16,float32",
                                    "--batch",        "2",      "--context",     "40,64",
                                    "--q-len",        "1,3",    "--num-q-heads", "4",
                                    "--num-kv-heads", "2",      "--head-size",   "64",
                                    "--head-size-v",  "32",     "--layout",      "nhd,hnd",
                                    "--budget-ms",    "1",      "--json"});
  ASSERT_EQ(result.exit_status, 0) << result.err;
  const json report = result.json();
  EXPECT_EQ(report["device"], "cpu");
  EXPECT_TRUE(report["driver"].is_null());
  EXPECT_GT(report["linear_read_gbps"], 0.0);
  EXPECT_GT(report["copy_gbps"], 0.0);
  ASSERT_EQ(report["rows"].size(), 2U * 2U * 2U * 2U);
  std::set<std::string> problems;
  for (const json& row : report["rows"]) {
    std::set<std::string> columns;
    for (const auto& [name, value] : row.items()) columns.insert(name);
    EXPECT_EQ(columns, kColumns);
    EXPECT_EQ(row["op"], "decode");
    EXPECT_EQ(row["head_size_v"], 32);
    EXPECT_EQ(row["block_size"], 16);
    EXPECT_TRUE(row["layout_share"].is_null());
    EXPECT_GT(row["product_share"], 0.0);
    EXPECT_GT(row["host_us"].get<double>(), 0.0);
    EXPECT_GT(row["ms"], 0.0);
    // A key and value of 64 + 32 elements, 2 heads.
    const double element = row["mode"] == "float32" ? 4.0 : 2.0;
    const double bytes = 2.0 * row["context"].get<double>() * 2.0 * 96.0 * element;
    EXPECT_NEAR(row["cache_gbps"].get<double>(), bytes / row["ms"].get<double>() * 1e-6, 1e-9);
    EXPECT_NEAR(row["bandwidth_share"].get<double>(),
                row["cache_gbps"].get<double>() / report["linear_read_gbps"].get<double>(), 1e-9);
    problems.insert(row["mode"].dump() + row["layout"].dump() + row["context"].dump() + row["q_len"].dump());
  }
  EXPECT_EQ(problems.size(), 16U);
}

// Every layout holds the same rows, so the bytes of a mode are the same in all: codes, scales where the mode has them,
// and in TurboQuant's slots the metadata (4-bit keys: 64 codes / 2 + a norm; 4-bit values: 64 / 2 + scale and minimum).
TEST(Bench, EveryLayoutCountsTheSameBytes) {
  const std::map<std::string, double> bytes_per_token_head = {{"bfloat16", 2.0 * 64 * 2},
                                                              {"fp8", 2.0 * 64},
                                                              {"int8_per_token_head", 2.0 * (64 + 4)},
                                                              {"int4_per_token_head", 2.0 * (32 + 4)},
                                                              {"turboquant_4bit_nc", 32 + 2 + 32 + 4}};
  const std::string layouts = "nhd,hnd,nhd_inline,hnd_inline,vllm,vllm_hnd";
  std::string modes;
  for (const auto& [mode, bytes] : bytes_per_token_head) {
    if (testing::modes_built({mode})) modes += (modes.empty() ? "" : ",") + mode;
  }
  const CliResult result =
      run_cli({"bench", "decode", "--mode", modes, "--batch", "2", "--context", "40", "--num-q-heads", "4",
               "--num-kv-heads", "2", "--head-size", "64", "--layout", layouts, "--budget-ms", "1", "--json"});
  ASSERT_EQ(result.exit_status, 0) << result.err;
  const json report = result.json();
  std::map<std::string, std::string> seen;  // the layouts of each mode
  for (const json& row : report["rows"]) {
    const auto mode = row["mode"].get<std::string>();
    seen[mode] += (seen[mode].empty() ? "" : ",") + row["layout"].get<std::string>();
    EXPECT_TRUE(row["layout_share"].is_null());
    const double gbps = 2.0 * 40.0 * 2.0 * bytes_per_token_head.at(mode) / row["ms"].get<double>() * 1e-6;
    EXPECT_NEAR(row["cache_gbps"].get<double>(), gbps, 1e-9 * gbps) << mode << " " << row["layout"];
    EXPECT_NEAR(row["bandwidth_share"].get<double>(), gbps / report["linear_read_gbps"].get<double>(), 1e-9);
  }
  for (const auto& [mode, bytes] : bytes_per_token_head) {
    EXPECT_EQ(seen[mode], testing::modes_built({mode}) ? layouts : "") << mode;
  }
}

// A store reads bf16 and writes rows of the mode: bf16, or 64 codes and a scale. vLLM's pages take the same bytes.
TEST(Bench, StoreIsHeldToACopy) {
  const bool int8 = testing::modes_built({"int8_per_token_head"});
  const CliResult result = run_cli({"bench", "store", "--mode", int8 ? "bfloat16,int8_per_token_head" : "bfloat16",
                                    "--layout", "nhd,vllm,vllm_hnd", "--context", "64", "--num-kv-heads", "2",
                                    "--head-size", "64", "--budget-ms", "1", "--json"});
  ASSERT_EQ(result.exit_status, 0) << result.err;
  const json report = result.json();
  ASSERT_EQ(report["rows"].size(), int8 ? 6U : 3U);
  for (const json& row : report["rows"]) {
    EXPECT_EQ(row["op"], "store");
    const double row_bytes = row["mode"] == "bfloat16" ? 64.0 * 2.0 : 64.0 + 4.0;
    const double gbps = 2.0 * 64.0 * 2.0 * (64.0 * 2.0 + row_bytes) / row["ms"].get<double>() * 1e-6;
    EXPECT_NEAR(row["cache_gbps"].get<double>(), gbps, 1e-9 * gbps);
    EXPECT_NEAR(row["bandwidth_share"].get<double>(), gbps / report["copy_gbps"].get<double>(), 1e-9);
  }
}

TEST(Bench, Refuses) {
  for (const auto& [arguments, says] : {std::pair<std::vector<std::string>, std::string>{{"bench"}, "op is required"},
                                        {{"bench", "encode"}, "encode"},
                                        {{"bench", "decode", "--mode", "int5"}, "int5"},
                                        {{"bench", "decode", "--layout", "dhn"}, "dhn"},
                                        {{"bench", "decode", "--batch", "0"}, "--batch is '0', expected"}}) {
    expect_refusal(arguments, says);
  }
}

// Values that would run as something else and problems that no memory holds are refused before anything is measured.
TEST(Bench, RefusesSizesInASentence) {
  const auto bench = [](std::vector<std::string> arguments, const std::string& says) {
    arguments.insert(arguments.begin(), "bench");
    expect_refusal(arguments, says);
  };
  for (const char* value : {"nan", "-1", "0", "inf", "", "1e400", "ten"}) {
    bench({"decode", "--budget-ms", value}, std::string("--budget-ms is '") + value + "', expected a number from ");
  }
  for (const char* value : {"1,,2", "", ",", "1,", "010", "1, 2"}) {
    bench({"decode", "--batch", value}, "--batch is '");
  }
  bench({"encode"}, "op is 'encode', supported are decode, prefill, store");
  bench({"decode", "--layout", "nhd,dhn"},
        "--layout is 'dhn', supported are nhd, hnd, nhd_inline, "
        "hnd_inline, vllm, vllm_hnd");
  bench({"decode", "--context", "9223372036854775807"}, "--context is '9223372036854775807', expected a decimal");
  bench({"decode", "--context", "2147483648"}, "--context is '2147483648', expected a decimal integer from 1 to 214");
  for (const char* op : {"decode", "prefill", "store"}) {
    bench({op, "--num-kv-heads", "2147483647"}, "auto: num_kv_heads");
    bench({op, "--context", "2147483647", "--batch", "2147483647"}, " tokens, supported are 2147483647");
    bench({op, "--context", "200000000", "--batch", "10", "--num-kv-heads", "256"}, " bytes of memory, there are ");
    bench({op, "--head-size", "2147483647"}, "head_size");
    bench({op, "--block-size", "2147483647"}, "block_size");
  }
  bench({"decode", "--num-q-heads", "2147483647", "--batch", "1024"}, " bytes of memory, there are ");
}

}  // namespace
}  // namespace quire::test
