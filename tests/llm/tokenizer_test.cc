// Text to ids and back, and text that arrives token by token.
#include "llm/tokenizer.h"

#include <gtest/gtest.h>

#include "llm/models.h"

namespace quire::testing {
namespace {

TEST(Tokenizer, RoundTripsAndStreams) {
  const auto tokenizer = llm::Tokenizer::load(tiny_lm_dir());
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().message();
  // The last two are outside of the vocabulary. They come as single bytes, several tokens to a character.
  for (const std::string text : {"The kernel keeps a list.", "12 + 30 = ", "naïve café", "日本語 and 🙂."}) {
    const auto ids = tokenizer->encode(text);
    EXPECT_GT(ids.size(), 1U);
    EXPECT_EQ(tokenizer->decode(ids), text);
    llm::TextStream stream(*tokenizer);
    std::string streamed;
    for (std::int32_t id : ids) {
      const std::string piece = stream.push(id);
      EXPECT_EQ(piece.find("\xef\xbf\xbd"), std::string::npos) << "half a character was shown";
      streamed += piece;
    }
    EXPECT_EQ(streamed + stream.finish(), text);
  }
  llm::TextStream after(*tokenizer, tokenizer->encode("The kernel"));
  EXPECT_EQ(after.push(tokenizer->encode("of").at(0)), " of") << "a word after a prompt keeps its space";
  EXPECT_EQ(tokenizer->decode({1, 1000000, -3}), "");
}

TEST(Tokenizer, RefusesWhatIsNotThereOrNotAModel) {
  const TempDir dir;
  EXPECT_NE(llm::Tokenizer::load(dir.path()).status().message().find("no such file"), std::string::npos);
  dir.write("tokenizer.model", "not a model");
  EXPECT_NE(llm::Tokenizer::load(dir.path()).status().message().find("not a SentencePiece model"), std::string::npos);
}

}  // namespace
}  // namespace quire::testing
