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
    const Result<const ModeInfo*> mode = mode_info(*id);
    ASSERT_TRUE(mode.ok());
    EXPECT_EQ((*mode)->id, *id);
    EXPECT_EQ((*mode)->name, expected.name);
    EXPECT_EQ((*mode)->kv_quant_mode, std::optional(expected.value));
    EXPECT_EQ((*mode)->key_format, expected.format);
    EXPECT_EQ((*mode)->value_format, expected.format);
    EXPECT_FALSE((*mode)->shared_slot);
    EXPECT_FALSE((*mode)->registered);
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
  const ModeInfo mode = **mode_info(*alias);
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
    const Result<const ModeInfo*> mode = mode_info(static_cast<ModeId>(id));
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
      EXPECT_EQ((*mode_info(*mode))->name, expected.name);
    }
  }
  const Result<ModeId> none = mode_from_kv_quant_mode(static_cast<KVQuantMode>(77));
  EXPECT_EQ(none.status().code(), StatusCode::kNotFound);
  EXPECT_NE(none.status().message().find("INT2_PER_TOKEN_HEAD"), std::string::npos) << none.status().message();
}

// The names and properties of vLLM's enum, as its pull request 39074 defines them.
TEST(KVQuantMode, NamesAndProperties) {
  const struct {
    KVQuantMode value;
    const char* name;
    bool per_token_head;
    int packing_factor;
  } expected[] = {
      {KVQuantMode::kNone, "NONE", false, 1},
      {KVQuantMode::kFp8PerTensor, "FP8_PER_TENSOR", false, 1},
      {KVQuantMode::kInt8PerTokenHead, "INT8_PER_TOKEN_HEAD", true, 1},
      {KVQuantMode::kFp8PerTokenHead, "FP8_PER_TOKEN_HEAD", true, 1},
      {KVQuantMode::kInt4PerTokenHead, "INT4_PER_TOKEN_HEAD", true, 2},
      {KVQuantMode::kInt2PerTokenHead, "INT2_PER_TOKEN_HEAD", true, 4},
  };
  for (const auto& mode : expected) {
    EXPECT_EQ(kv_quant_mode_name(mode.value), mode.name);
    EXPECT_EQ(*kv_quant_mode_from_name(mode.name), mode.value);
    EXPECT_EQ(is_per_token_head(mode.value), mode.per_token_head) << mode.name;
    EXPECT_EQ(*packing_factor(mode.value), mode.packing_factor) << mode.name;
    EXPECT_EQ(*packed_head_size(mode.value, 128), 128 / mode.packing_factor) << mode.name;
    EXPECT_FALSE(packed_head_size(mode.value, 0).ok());
  }
  EXPECT_EQ(packed_head_size(KVQuantMode::kInt4PerTokenHead, 127).status().message(),
            "head_size is 127; KVQuantMode INT4_PER_TOKEN_HEAD packs multiples of 2");
  const auto outside = static_cast<KVQuantMode>(6);
  EXPECT_EQ(kv_quant_mode_name(outside), "unknown");
  EXPECT_FALSE(is_per_token_head(outside));
  EXPECT_EQ(packing_factor(outside).status().message(),
            "the KVQuantMode is outside the enum; supported: NONE, FP8_PER_TENSOR, INT8_PER_TOKEN_HEAD, "
            "FP8_PER_TOKEN_HEAD, INT4_PER_TOKEN_HEAD, INT2_PER_TOKEN_HEAD");
  EXPECT_EQ(packed_head_size(outside, 128).status().code(), StatusCode::kNotFound);
  for (const char* name : {"NVFP4", "int4_per_token_head", ""}) {
    const Result<KVQuantMode> value = kv_quant_mode_from_name(name);
    ASSERT_FALSE(value.ok());
    EXPECT_EQ(value.status().code(), StatusCode::kNotFound);
    EXPECT_NE(value.status().message().find("'" + std::string(name) + "'"), std::string::npos);
  }
}

// The cases of the pull request's TestIsQuantizedKvCache, and vLLM's rule for everything else.
TEST(KVQuantMode, OfAKvCacheDtype) {
  for (const Expected& expected : kTable) EXPECT_EQ(get_kv_quant_mode(expected.name), expected.value) << expected.name;
  for (const char* name : {"fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc", "fp8_ds_mla"}) {
    EXPECT_EQ(get_kv_quant_mode(name), KVQuantMode::kFp8PerTensor) << name;
    EXPECT_TRUE(is_quantized_kv_cache(name)) << name;
    EXPECT_FALSE(kv_cache_uses_per_token_head_scales(name)) << name;
  }
  for (const char* name : {"int8_per_token_head", "fp8_per_token_head", "int4_per_token_head", "int2_per_token_head"}) {
    EXPECT_TRUE(is_quantized_kv_cache(name)) << name;
    EXPECT_TRUE(kv_cache_uses_per_token_head_scales(name)) << name;
  }
  for (const char* name : {"auto", "bfloat16", "half", "", "int3_per_token_head", "turboquant_k8v4",
                           "turboquant_3bit_nc", "k=int8_per_token_head,v=int4_per_token_head"}) {
    EXPECT_EQ(get_kv_quant_mode(name), KVQuantMode::kNone) << name;
    EXPECT_FALSE(is_quantized_kv_cache(name)) << name;
    EXPECT_FALSE(kv_cache_uses_per_token_head_scales(name)) << name;
  }
}

// Where a sentence needs the name of an enum value, it is the name.
TEST(KVQuantMode, SentencesShowNoNumbers) {
  for (int value = -1; value <= 77; ++value) {
    const Status status = mode_from_kv_quant_mode(static_cast<KVQuantMode>(value)).status();
    EXPECT_EQ(status.message().find("KVQuantMode " + std::to_string(value)), std::string::npos) << status.message();
  }
  const std::string shared = mode_from_kv_quant_mode(KVQuantMode::kFp8PerTensor).status().message();
  EXPECT_EQ(shared, "KVQuantMode FP8_PER_TENSOR is shared by the modes fp8, fp8_e5m2: name one of them");
}

TEST(ModeTable, APairMayNameAliasesOfFormats) {
  const Result<ModeId> alias = parse_kv_cache_dtype("k=fp8_e4m3,v=int2_per_token_head");
  ASSERT_TRUE(alias.ok()) << alias.status().message();
  EXPECT_EQ(*alias, *parse_kv_cache_dtype("k=fp8,v=int2_per_token_head"));
  EXPECT_EQ((*mode_info(*alias))->name, "k=fp8,v=int2_per_token_head");
  EXPECT_EQ(*parse_kv_cache_dtype("k=fp8_e4m3,v=fp8_e4m3"), *parse_kv_cache_dtype("fp8"));
  EXPECT_FALSE(parse_kv_cache_dtype("k=turboquant_k8v4,v=fp8").ok()) << "a mode of two formats is no format";
  EXPECT_FALSE(parse_kv_cache_dtype("k=auto,v=auto").ok());
}

// A sentence shows the beginning of what it was given, and nothing that a terminal or a log would obey.
TEST(ModeTable, SentencesQuoteNamesShortAndPrintable) {
  const std::string megabyte(1 << 20, 'x');
  for (const std::string& name : {megabyte, "k=" + megabyte + ",v=int4_per_token_head", "k=" + megabyte}) {
    const std::string message = parse_kv_cache_dtype(name).status().message();
    EXPECT_LT(message.size(), 1000U);
    EXPECT_NE(message.find("xxx' (of " + std::to_string(name.size()) + " characters)"), std::string::npos) << message;
  }
  const std::string dirty("a\nb\0c\x1b[31m\xff", 11);
  EXPECT_NE(parse_kv_cache_dtype(dirty).status().message().find("'a\\x0ab\\x00c\\x1b[31m\\xff'"), std::string::npos)
      << parse_kv_cache_dtype(dirty).status().message();
}

TEST(RegisterMode, AddsANameThatIsNew) {
  const Result<ModeId> mode = register_mode({.name = "mode_test_a", .aliases = {"mode_test_a1", "mode_test_a2"}});
  ASSERT_TRUE(mode.ok()) << mode.status().message();
  for (const char* name : {"mode_test_a", "mode_test_a1", "mode_test_a2"}) {
    EXPECT_EQ(*parse_kv_cache_dtype(name), *mode);
  }
  const ModeInfo info = **mode_info(*mode);
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

TEST(RegisterMode, NamesThatListsAndMessagesCanHold) {
  const std::string nul("mode_test_\0c", 12);
  for (const std::string& bad :
       {std::string(), std::string("mode_test_\nc"), std::string("mode_test_,c"), std::string("mode_test_\tc"),
        std::string("mode test c"), std::string("k=mode_test_c"), std::string("mode_test_\x7f"),
        std::string("mode_test_\xc3\xa9"), nul, std::string(65, 'm')}) {
    for (const bool as_alias : {false, true}) {
      const ModeSpec spec = as_alias ? ModeSpec{"mode_test_c", {bad}} : ModeSpec{bad, {"mode_test_c"}};
      const Status status = register_mode(spec).status();
      EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << bad;
      EXPECT_EQ(status.message().find(as_alias ? "alias of a registered mode is '" : "name of a registered mode is '"),
                0U)
          << status.message();
      EXPECT_NE(status.message().find("letters, digits"), std::string::npos) << status.message();
    }
  }
  for (const ModeSpec& twice :
       {ModeSpec{"mode_test_c", {"mode_test_c"}}, ModeSpec{"mode_test_c", {"mode_test_d", "mode_test_d"}}}) {
    const Status status = register_mode(twice).status();
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_NE(status.message().find("give each once"), std::string::npos) << status.message();
  }
  EXPECT_FALSE(parse_kv_cache_dtype("mode_test_c").ok()) << "a refused registration left its name behind";
  EXPECT_TRUE(register_mode({std::string(64, 'm'), {"Mode-test.c_1"}}).ok());
}

}  // namespace
}  // namespace quire
