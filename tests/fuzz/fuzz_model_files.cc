// Feeds damaged model files to the readers for a given number of seconds:  fuzz_model_files SECONDS [SEED]
//
// It starts from well-formed safetensors (plain and gzip-compressed), config.json, .npy and .jsonl files and mutates
// them: bits are flipped, bytes of interest put in, numbers replaced by extreme ones, pieces cut, doubled or moved, and
// headers given a false length. A reader must answer each file with a value or a sentence. The program is built for
// AddressSanitizer and UndefinedBehaviorSanitizer, which turn anything else into an abort. The seed is printed first,
// so that a failure can be repeated.
#include <unistd.h>
#include <zlib.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "llm/config.h"
#include "llm/evaluate.h"
#include "llm/npy.h"
#include "llm/safetensors.h"
#include "support/random.h"

namespace quire {
namespace {

using testing::Random;

// Written to by what is read, so that reading it cannot be optimised away.
volatile std::uint64_t sink = 0;

std::string safetensors_seed() {
  const std::string header =
      R"({"__metadata__":{"format":"pt","note":"x"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
      R"("b.weight":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]},"empty":{"dtype":"I64","shape":[0,7],)"
      R"("data_offsets":[32,32]},"c":{"dtype":"U8","shape":[],"data_offsets":[32,33]}})";
  std::string out(8, '\0');
  const std::uint64_t size = header.size();
  std::memcpy(out.data(), &size, 8);
  return out + header + std::string(33, '\x3f');
}

std::string gzip_seed() {
  const std::string plain = safetensors_seed();
  z_stream stream = {};
  constexpr int kGzipOnly = 16;
  deflateInit2(&stream, Z_BEST_SPEED, Z_DEFLATED, MAX_WBITS + kGzipOnly, 8, Z_DEFAULT_STRATEGY);
  std::string packed(deflateBound(&stream, plain.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(plain.data()));
  stream.avail_in = static_cast<uInt>(plain.size());
  stream.next_out = reinterpret_cast<Bytef*>(packed.data());
  stream.avail_out = static_cast<uInt>(packed.size());
  deflate(&stream, Z_FINISH);
  packed.resize(stream.total_out);
  deflateEnd(&stream);
  return packed;
}

const char* const kConfigSeed =
    R"({"architectures":["LlamaForCausalLM"],"vocab_size":8192,"hidden_size":384,"intermediate_size":1024,)"
    R"("num_hidden_layers":6,"num_attention_heads":8,"num_key_value_heads":2,"head_dim":128,"hidden_act":"silu",)"
    R"("rms_norm_eps":1e-05,"rope_theta":10000.0,"max_position_embeddings":2048,"tie_word_embeddings":true,)"
    R"("rope_scaling":{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,)"
    R"("original_max_position_embeddings":8192},"attention_bias":false,"sliding_window":null,"bos_token_id":1,)"
    R"("eos_token_id":[2,3],"torch_dtype":"bfloat16","layer_types":["full_attention"]})";

std::string npy_seed() {
  const std::string header = "{'descr': '<u2', 'fortran_order': False, 'shape': (4,), }   \n";
  std::string out("\x93NUMPY\x01\x00", 8);
  out += static_cast<char>(header.size());
  out += '\0';
  return out + header + std::string("\x01\x00\x02\x00\x03\x00\xff\x1f", 8);
}

const char* const kPromptsSeed =
    "{\"prompt\":[1,278,8113],\"answer\":[8150,8169],\"context\":250}\n{\"prompt\":[5],\"answer\":[6]}\n";

std::string mutate(std::string bytes, Random& random) {
  const auto at = [&](std::size_t size) {
    return static_cast<std::size_t>(random.below(static_cast<std::int64_t>(size)));
  };
  static const char* const kNumbers[] = {"-1",
                                         "0",
                                         "1e999",
                                         "18446744073709551616",
                                         "9223372036854775807",
                                         "4294967296",
                                         "-9223372036854775808",
                                         "0.5",
                                         "null",
                                         "[]",
                                         "{}",
                                         "\"\"",
                                         "true",
                                         "[[[[["};
  for (std::int64_t round = random.below(4); round >= 0 && !bytes.empty(); --round) {
    const std::size_t i = at(bytes.size());
    switch (random.below(8)) {
      case 0:
        bytes[i] = static_cast<char>(bytes[i] ^ (1 << random.below(8)));
        break;
      case 1:
        bytes[i] = static_cast<char>(random.bits());
        break;
      case 2:
        bytes[i] = "{}[],:\"0-9e.\\\0\xff"[at(15)];
        break;
      case 3:
        bytes.erase(i, at(16) + 1);
        break;
      case 4:
        bytes.insert(i, bytes.substr(at(bytes.size()), at(32)));
        break;
      case 5:
        bytes.resize(i);
        break;
      case 6: {  // a run of digits becomes something else
        const std::size_t begin = bytes.find_first_of("0123456789", i);
        if (begin == std::string::npos) break;
        std::size_t end = bytes.find_first_not_of("0123456789.", begin);
        if (end == std::string::npos) end = bytes.size();
        bytes.replace(begin, end - begin, kNumbers[at(std::size(kNumbers))]);
        break;
      }
      default: {  // a little-endian length somewhere, most often the one at the start
        const std::uint64_t value = random.below(2) == 0 ? random.bits() >> random.below(64) : random.bits() % 1024;
        const std::size_t where = random.below(2) == 0 ? 0 : i;
        if (where + 8 <= bytes.size()) std::memcpy(bytes.data() + where, &value, 8);
      }
    }
  }
  return bytes;
}

struct Target {
  const char* name;
  std::string seed;
  std::function<bool(const std::string& path, const std::string& bytes)> read;  // true: accepted
};

bool read_safetensors(const std::string& path) {
  const auto file = llm::SafetensorsFile::open(path);
  if (!file.ok()) return false;
  for (const std::string& name : file->names()) {
    const auto tensor = file->tensor(name);
    if (!tensor.ok()) continue;
    const std::int64_t bytes = tensor->numel() * static_cast<std::int64_t>(dtype_bytes(tensor->dtype));
    for (std::int64_t i = 0; i < bytes; ++i) sink = sink + tensor->ptr<std::uint8_t>()[i];
  }
  return true;
}

int run(double seconds, std::uint64_t seed) {
  std::printf("fuzz_model_files: seed %llu\n", static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  std::string pattern = (std::filesystem::temp_directory_path() / "quire-fuzz-XXXXXX").string();
  if (mkdtemp(pattern.data()) == nullptr) {
    std::fprintf(stderr, "fuzz_model_files: cannot make a temporary folder\n");
    return 2;
  }
  llm::ModelConfig vocabulary;
  vocabulary.vocab_size = 8192;
  const std::vector<Target> targets = {
      {"safetensors", safetensors_seed(), [](const auto& path, const auto&) { return read_safetensors(path); }},
      {"gzip", gzip_seed(),
       [](const auto& path, const auto&) {
         std::filesystem::rename(path, path + ".gz");
         return read_safetensors(path + ".gz");
       }},
      {"config", kConfigSeed,
       [](const auto&, const auto& bytes) {
         const auto config = llm::parse_config(bytes, "config.json");
         if (config.ok()) sink = sink + llm::rope_frequencies(config->rope, config->head_size).size();
         return config.ok();
       }},
      {"npy", npy_seed(), [](const auto& path, const auto&) { return llm::read_npy_tokens(path, 8192).ok(); }},
      {"prompts", kPromptsSeed,
       [&](const auto& path, const auto&) { return llm::read_prompts(path, vocabulary).ok(); }},
  };
  Random random(seed);
  std::vector<std::uint64_t> tried(targets.size()), accepted(targets.size());
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  const std::string path = pattern + "/input";
  for (std::size_t round = 0; std::chrono::steady_clock::now() < end; ++round) {
    const std::size_t t = round % targets.size();
    // Every seed file goes in once as it is.
    const std::string bytes = round < targets.size() ? targets[t].seed : mutate(targets[t].seed, random);
    std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
    const bool good = targets[t].read(path, bytes);
    if (round < targets.size() && !good) {
      std::fprintf(stderr, "fuzz_model_files: the %s seed itself is refused\n", targets[t].name);
      return 1;
    }
    ++tried[t];
    accepted[t] += good ? 1 : 0;
  }
  std::filesystem::remove_all(pattern);
  for (std::size_t t = 0; t < targets.size(); ++t) {
    std::printf("%-12s %10llu inputs, %llu accepted\n", targets[t].name, static_cast<unsigned long long>(tried[t]),
                static_cast<unsigned long long>(accepted[t]));
  }
  return 0;
}

}  // namespace
}  // namespace quire

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 10.0;
  const std::uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  return quire::run(seconds, seed);
}
