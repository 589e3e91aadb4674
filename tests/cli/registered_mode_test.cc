// A mode that the library has never heard of, registered by the program that links the command line tool.
#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "cli/cli.h"
#include "quire/backend.h"
#include "quire/mode.h"

namespace quire::test {
namespace {

using nlohmann::json;

constexpr const char* kName = "sign_per_token_head";

// Stores one bit per element, its sign, and one scale per row, the mean magnitude.
class SignBackend : public QuantKVBackend {
 public:
  ModeId mode() const override { return parse_kv_cache_dtype(kName).value(); }
  Result<int> packing_factor() const override { return 8; }
  bool needs_scale_caches() const override { return true; }
  bool has_decode_row() const override { return true; }
  bool decode_row(const CacheRow& row, float* out) const override {
    for (int i = 0; i < row.head_size; ++i) out[i] = (row.data[i / 8] >> (i % 8)) & 1 ? -*row.scale : *row.scale;
    return true;
  }
};

class RegisteredMode : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    const auto id = register_mode({kName, {"sign"}});
    ASSERT_TRUE(id.ok()) << id.status().message();
    const Status status = register_backend<SignBackend>(*id);
    ASSERT_TRUE(status.ok()) << status.message();
  }
};

TEST_F(RegisteredMode, ShowsUpInModes) {
  const json answer = run_cli({"modes", "--json"}).json();
  const json& row = answer["modes"].back();
  EXPECT_EQ(row["name"], kName);
  EXPECT_EQ(row["aliases"], json({"sign"}));
  EXPECT_EQ(row["registered"], true);
  EXPECT_TRUE(row["kv_quant_mode"].is_null());
  EXPECT_EQ(row["key_bits"], 1.0);
  EXPECT_EQ(row["scale_caches"], true);
  EXPECT_EQ(row["bytes_per_token_head"], 2 * (16 + 4));
  const std::string text = run_cli({"modes"}).out;
  EXPECT_NE(text.find(kName), std::string::npos);
  EXPECT_NE(text.find("registered"), std::string::npos);
}

TEST_F(RegisteredMode, HasALayout) {
  const CliResult result = run_cli({"layout", "--mode", "sign", "--head-size", "64", "--json"});
  EXPECT_EQ(result.exit_status, 0) << result.err;
  const json answer = result.json();
  EXPECT_EQ(answer["mode"], kName);
  EXPECT_EQ(answer["k_data_bytes"], 8);
  EXPECT_EQ(answer["k_scale_bytes"], 4);
  EXPECT_EQ(answer["bytes_per_token_head"], 24);

  const CliResult odd = run_cli({"layout", "--mode", "sign", "--head-size", "68"});
  EXPECT_EQ(odd.exit_status, 2);
  EXPECT_TRUE(odd.one_sentence()) << odd.err;
}

TEST_F(RegisteredMode, IsARowOfTheByteTable) {
  const json table = run_cli({"layout", "--table", "--json"}).json();
  const json& row = table["table"].back();
  EXPECT_EQ(row["mode"], kName);
  EXPECT_EQ(row["bytes_per_token_head"]["512"], 2 * (64 + 4));
}

// Listing modes and layouts of one mode must not depend on another whose backend cannot be constructed.
TEST_F(RegisteredMode, WithoutABackendIsListedAndRefused) {
  const auto id = register_mode({"nobody_serves_this", {}});
  ASSERT_TRUE(id.ok());
  const CliResult modes = run_cli({"modes"});
  EXPECT_EQ(modes.exit_status, 0);
  EXPECT_NE(modes.out.find("nobody_serves_this"), std::string::npos);
  const CliResult layout = run_cli({"layout", "--mode", "nobody_serves_this"});
  EXPECT_EQ(layout.exit_status, 2);
  EXPECT_TRUE(layout.one_sentence()) << layout.err;
}

}  // namespace
}  // namespace quire::test
