// The mode table: names and numbers are vLLM's, and what is not there is refused by name.
#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <set>
#include <string>

#include "quire/mode.h"

namespace quire {
namespace {

struct Expected {
  const char* name;
  KVQuantMode value;
  const char* format;
};
constexpr Expected kTable[] = {
    {"auto", KVQuantMode::kNone, "auto"},
    {"bfloat16", KVQuantMode::kNone, "bfloat16"},
    {"float16", KVQuantMode::kNone, "float16"},
    {"float32", KVQuantMode::kNone, "float32"},
    {"fp8", KVQuantMode::kFp8PerTensor, "fp8"},
    {"fp8_e5m2", KVQuantMode::kFp8PerTensor, "fp8_e5m2"},
    {"int8_per_token_head", KVQuantMode::kInt8PerTokenHead, "int8_per_token_head"},
    {"fp8_per_token_head", KVQuantMode::kFp8PerTokenHead, "fp8_per_token_head"},
    {"int4_per_token_head", KVQuantMode::kInt4PerTokenHead, "int4_per_token_head"},
    {"int2_per_token_head", KVQuantMode::kInt2PerTokenHead, "int2_per_token_head"},
};

TEST(ModeTable, HoldsTheModesOfTheEnum) {
  for (const Expected& expected : kTable) {
    const Result<ModeId> id = parse_kv_cache_dtype(expected.name);
    ASSERT_TRUE(id.ok()) << id.status().message();
    const Result<ModeInfo> mode = mode_info(*id);
    ASSERT_TRUE(mode.ok());
    EXPECT_EQ(mode->id, *id);
    EXPECT_EQ(mode->name, expected.name);
    EXPECT_EQ(mode->kv_quant_mode, std::optional(expected.value));
    EXPECT_EQ(mode->key_format, expected.format);
    EXPECT_EQ(mode->value_format, expected.format);
    EXPECT_FALSE(mode->shared_slot);
    EXPECT_FALSE(mode->registered);
  }
}

TEST(ModeTable, NumbersAreVllms) {
  EXPECT_EQ(static_cast<int>(KVQuantMode::kNone), 0);
  EXPECT_EQ(static_cast<int>(KVQuantMode::kFp8PerTensor), 1);
  EXPECT_EQ(static_cast<int>(KVQuantMode::kInt8PerTokenHead), 2);
  EXPECT_EQ(static_cast<int>(KVQuantMode::kFp8PerTokenHead), 3);
  EXPECT_EQ(static_cast<int>(KVQuantMode::kInt4PerTokenHead), 4);
  EXPECT_EQ(static_cast<int>(KVQuantMode::kInt2PerTokenHead), 5);
}

TEST(ModeTable, AliasesNameTheSameMode) {
  const Result<ModeId> alias = parse_kv_cache_dtype("fp8_e4m3");
  ASSERT_TRUE(alias.ok());
  EXPECT_EQ(*alias, *parse_kv_cache_dtype("fp8"));
  const ModeInfo mode = *mode_info(*alias);
  EXPECT_EQ(mode.name, "fp8");
  EXPECT_NE(std::ranges::find(mode.aliases, "fp8_e4m3"), mode.aliases.end());
}

TEST(ModeTable, ListsEveryModeOnceInOrder) {
  const std::vector<ModeInfo> modes = list_modes();
  std::set<std::string> names;
  for (std::size_t i = 0; i < modes.size(); ++i) {
    EXPECT_EQ(static_cast<std::size_t>(modes[i].id), i);
    EXPECT_TRUE(names.insert(modes[i].name).second) << modes[i].name;
    EXPECT_EQ(*parse_kv_cache_dtype(modes[i].name), modes[i].id);
  }
  for (std::size_t i = 0; i < std::size(kTable); ++i) EXPECT_EQ(modes[i].name, kTable[i].name);
}

TEST(ModeTable, RefusesWhatIsNotThere) {
  for (const char* name : {"", "int3_per_token_head", "INT4_PER_TOKEN_HEAD", "fp8 ", "nvfp4"}) {
    const Result<ModeId> mode = parse_kv_cache_dtype(name);
    ASSERT_FALSE(mode.ok()) << name;
    EXPECT_EQ(mode.status().code(), StatusCode::kNotFound);
    const std::string message = mode.status().message();
    EXPECT_NE(message.find("kv_cache_dtype '" + std::string(name) + "'"), std::string::npos) << message;
    for (const Expected& expected : kTable) {
      EXPECT_NE(message.find(expected.name), std::string::npos) << message;
    }
  }
  for (int id : {-1, 100000, std::numeric_limits<int>::min()}) {
    const Result<ModeInfo> mode = mode_info(static_cast<ModeId>(id));
    ASSERT_FALSE(mode.ok());
    EXPECT_EQ(mode.status().code(), StatusCode::kNotFound);
    EXPECT_NE(mode.status().message().find(std::to_string(id)), std::string::npos) << mode.status().message();
  }
}

TEST(ModeTable, EnumValuesAreModesWhereTheyAreUnique) {
  for (const Expected& expected : kTable) {
    const Result<ModeId> mode = mode_from_kv_quant_mode(expected.value);
    if (expected.value == KVQuantMode::kNone || expected.value == KVQuantMode::kFp8PerTensor) {
      ASSERT_FALSE(mode.ok());
      EXPECT_EQ(mode.status().code(), StatusCode::kInvalidArgument);
      EXPECT_NE(mode.status().message().find(expected.name), std::string::npos) << mode.status().message();
    } else {
      ASSERT_TRUE(mode.ok()) << mode.status().message();
      EXPECT_EQ(mode_info(*mode)->name, expected.name);
    }
  }
  const Result<ModeId> none = mode_from_kv_quant_mode(static_cast<KVQuantMode>(77));
  EXPECT_EQ(none.status().code(), StatusCode::kNotFound);
  EXPECT_NE(none.status().message().find("77"), std::string::npos) << none.status().message();
}

TEST(RegisterMode, AddsANameThatIsNew) {
  const Result<ModeId> mode = register_mode({.name = "mode_test_a", .aliases = {"mode_test_a1", "mode_test_a2"}});
  ASSERT_TRUE(mode.ok()) << mode.status().message();
  for (const char* name : {"mode_test_a", "mode_test_a1", "mode_test_a2"}) {
    EXPECT_EQ(*parse_kv_cache_dtype(name), *mode);
  }
  const ModeInfo info = *mode_info(*mode);
  EXPECT_TRUE(info.registered);
  EXPECT_FALSE(info.kv_quant_mode.has_value());
  EXPECT_EQ(info.key_format, "");

  for (const ModeSpec& taken :
       {ModeSpec{.name = "mode_test_a", .aliases = {}}, ModeSpec{.name = "mode_test_a1", .aliases = {}},
        ModeSpec{.name = "int4_per_token_head", .aliases = {}}, ModeSpec{.name = "fp8_e4m3", .aliases = {}},
        ModeSpec{.name = "mode_test_b", .aliases = {"auto"}}}) {
    const Result<ModeId> again = register_mode(taken);
    ASSERT_FALSE(again.ok()) << taken.name;
    EXPECT_EQ(again.status().code(), StatusCode::kAlreadyExists);
    EXPECT_NE(again.status().message().find("exists already"), std::string::npos) << again.status().message();
  }
  EXPECT_FALSE(parse_kv_cache_dtype("mode_test_b").ok()) << "a refused registration left its name behind";
  EXPECT_EQ(register_mode({.name = "", .aliases = {}}).status().code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace quire
