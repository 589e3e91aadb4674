#include "llm/tokenizer.h"

#include <sentencepiece_processor.h>

#include <filesystem>

namespace quire::llm {

Tokenizer::Tokenizer(std::unique_ptr<sentencepiece::SentencePieceProcessor> processor)
    : processor_(std::move(processor)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Result<Tokenizer> Tokenizer::load(const std::string& model_dir) {
  const std::string path = model_dir + "/tokenizer.model";
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) {
    return not_found(path + ": no such file; without a SentencePiece tokenizer, give token ids");
  }
  auto processor = std::make_unique<sentencepiece::SentencePieceProcessor>();
  if (const auto status = processor->Load(path); !status.ok()) {
    return invalid_argument(path + ": not a SentencePiece model");
  }
  return Tokenizer(std::move(processor));
}

std::vector<std::int32_t> Tokenizer::encode(const std::string& text) const { return processor_->EncodeAsIds(text); }

std::string Tokenizer::decode(const std::vector<std::int32_t>& ids) const {
  std::vector<int> known;
  for (std::int32_t id : ids) {
    if (id >= 0 && id < processor_->GetPieceSize()) known.push_back(id);
  }
  return processor_->DecodeIds(known);
}

namespace {
// U+FFFD, what SentencePiece decodes the bytes of an unfinished character to.
constexpr std::string_view kReplacement = "\xef\xbf\xbd";
}  // namespace

TextStream::TextStream(const Tokenizer& tokenizer, std::vector<std::int32_t> prompt)
    : tokenizer_(tokenizer), ids_(std::move(prompt)), emitted_bytes_(tokenizer.decode(ids_).size()) {}

std::string TextStream::push(std::int32_t id) {
  ids_.push_back(id);
  std::string text = tokenizer_.decode(ids_);
  // At most three bytes of a character can be waiting for the fourth.
  std::size_t final_bytes = text.size();
  for (int held = 0; held < 3; ++held) {
    const bool unfinished = final_bytes >= kReplacement.size() &&
                            text.compare(final_bytes - kReplacement.size(), kReplacement.size(), kReplacement) == 0;
    if (!unfinished) break;
    final_bytes -= kReplacement.size();
  }
  if (final_bytes <= emitted_bytes_) return {};
  std::string piece = text.substr(emitted_bytes_, final_bytes - emitted_bytes_);
  emitted_bytes_ = final_bytes;
  return piece;
}

std::string TextStream::finish() {
  const std::string text = tokenizer_.decode(ids_);
  return text.size() > emitted_bytes_ ? text.substr(emitted_bytes_) : std::string();
}

}  // namespace quire::llm
