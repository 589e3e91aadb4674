// Text to token ids and back, by the model folder's SentencePiece tokenizer.model.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "quire/status.h"

namespace sentencepiece {
class SentencePieceProcessor;
}

namespace quire::llm {

class Tokenizer {
 public:
  // Reads DIR/tokenizer.model; kNotFound where the folder has none.
  static Result<Tokenizer> load(const std::string& model_dir);

  std::vector<std::int32_t> encode(const std::string& text) const;  // no begin-of-sequence token
  std::string decode(const std::vector<std::int32_t>& ids) const;   // ids past the vocabulary become nothing

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

 private:
  explicit Tokenizer(std::unique_ptr<sentencepiece::SentencePieceProcessor> processor);
  std::unique_ptr<sentencepiece::SentencePieceProcessor> processor_;
};

// Turns a growing list of ids into text piece by piece: a character whose bytes are split over several tokens is held
// Turns a growing list of ids into text piece by piece. A character whose bytes are split over several tokens is held
// back until it is whole. `prompt` is the text's beginning, which is not repeated; it decides whether the first word is
// preceded by a space.
class TextStream {
 public:
  explicit TextStream(const Tokenizer& tokenizer, std::vector<std::int32_t> prompt = {});
  std::string push(std::int32_t id);  // the text that became final
  std::string finish();               // what was held back

 private:
  const Tokenizer& tokenizer_;
  std::vector<std::int32_t> ids_;
  std::size_t emitted_bytes_ = 0;
};

}  // namespace quire::llm
