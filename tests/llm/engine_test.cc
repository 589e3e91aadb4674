// Blocks, batches and sampling: what an engine adds around the ops must not change a result.
#include "llm/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <set>

#include "llm/models.h"
#include "llm/npy.h"

namespace quire::testing {
namespace {

using llm::BlockAllocator;
using llm::Engine;
using llm::EngineOptions;
using llm::Model;
using llm::Request;
using llm::Sequence;

std::vector<std::int32_t> iota_tokens(std::int64_t n, std::int32_t first = 0) {
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(n));
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

// ---- BlockAllocator -------------------------------------------------------------------------------------------------

TEST(BlockAllocator, ReservesAndTakesBack) {
  BlockAllocator allocator(4, 16, true);
  Sequence a{.tokens = iota_tokens(20), .blocks = {}}, b{.tokens = iota_tokens(40, 100), .blocks = {}};
  ASSERT_TRUE(allocator.reserve(a, 33));
  EXPECT_EQ(a.blocks.size(), 3U);
  EXPECT_EQ(std::set<std::int32_t>(a.blocks.begin(), a.blocks.end()).size(), 3U);
  EXPECT_FALSE(allocator.reserve(b, 17)) << "one block is free, two are needed";
  EXPECT_EQ(allocator.num_free(), 1);
  EXPECT_TRUE(b.blocks.empty());
  allocator.release(a);
  EXPECT_EQ(allocator.num_free(), 4);
  EXPECT_TRUE(allocator.reserve(b, 64));
}

// A second reservation of a sequence adds to what it holds.
TEST(BlockAllocator, ReservingMoreKeepsWhatASequenceHolds) {
  for (const bool share : {false, true}) {
    BlockAllocator allocator(10, 4, share);
    Sequence a{.tokens = iota_tokens(40), .blocks = {}};
    ASSERT_TRUE(allocator.reserve(a, 8));
    const std::vector<std::int32_t> held = a.blocks;
    a.num_stored = 8;
    allocator.publish(a);
    ASSERT_TRUE(allocator.reserve(a, 16));
    ASSERT_EQ(a.blocks.size(), 4U);
    EXPECT_TRUE(std::equal(held.begin(), held.end(), a.blocks.begin())) << "what is stored stays where it is";
    EXPECT_EQ(a.num_stored, 8);
    EXPECT_EQ(std::set<std::int32_t>(a.blocks.begin(), a.blocks.end()).size(), 4U);
    EXPECT_EQ(allocator.num_free(), 6);
    EXPECT_TRUE(allocator.reserve(a, 3)) << "it has more than that";
    EXPECT_EQ(a.blocks.size(), 4U);
    EXPECT_FALSE(allocator.reserve(a, 41)) << "eleven blocks";
    EXPECT_EQ(a.blocks.size(), 4U);
    EXPECT_EQ(allocator.num_free(), 6);
    allocator.release(a);
    EXPECT_EQ(allocator.num_free(), 10) << "none is lost";
  }
}

TEST(BlockAllocator, SharesFullStoredBlocksOfEqualPrefixes) {
  BlockAllocator allocator(8, 4, true);
  Sequence a{.tokens = iota_tokens(10), .blocks = {}};
  ASSERT_TRUE(allocator.reserve(a, 10));
  Sequence early{.tokens = iota_tokens(10), .blocks = {}};
  ASSERT_TRUE(allocator.reserve(early, 10));
  EXPECT_EQ(early.num_stored, 0) << "nothing is stored yet";
  allocator.release(early);
  a.num_stored = 10;
  allocator.publish(a);

  Sequence same{.tokens = iota_tokens(8), .blocks = {}};
  ASSERT_TRUE(allocator.reserve(same, 9));
  EXPECT_EQ(same.num_stored, 4) << "the last token is always left to compute, so its block is not shared";
  EXPECT_EQ(same.blocks[0], a.blocks[0]);
  EXPECT_NE(same.blocks[1], a.blocks[1]);
  EXPECT_EQ(allocator.use_count(a.blocks[0]), 2);

  Sequence other{.tokens = iota_tokens(10), .blocks = {}};
  other.tokens[5] = 77;
  ASSERT_TRUE(allocator.reserve(other, 8));
  EXPECT_EQ(other.num_stored, 4) << "only the first block is equal";
  allocator.release(a);
  EXPECT_EQ(allocator.use_count(other.blocks[0]), 2);
}

TEST(BlockAllocator, ReleasedPrefixesStayUntilTheirBlocksAreNeeded) {
  BlockAllocator allocator(3, 4, true);
  Sequence a{.tokens = iota_tokens(8), .blocks = {}};
  ASSERT_TRUE(allocator.reserve(a, 8));
  a.num_stored = 8;
  allocator.publish(a);
  allocator.release(a);
  EXPECT_EQ(allocator.num_free(), 3);

  Sequence again{.tokens = iota_tokens(9), .blocks = {}};
  ASSERT_TRUE(allocator.reserve(again, 9));
  EXPECT_EQ(again.num_stored, 8);
  allocator.release(again);

  Sequence other{.tokens = iota_tokens(12, 50), .blocks = {}};
  ASSERT_TRUE(allocator.reserve(other, 12));
  EXPECT_EQ(other.num_stored, 0);
  allocator.release(other);
  Sequence late{.tokens = iota_tokens(9), .blocks = {}};
  ASSERT_TRUE(allocator.reserve(late, 9));
  EXPECT_EQ(late.num_stored, 0) << "its blocks were given away";
}

// Random traffic is compared with a plain model of what must hold: no block has two owners that do not share equal
// tokens.
TEST(BlockAllocator, RandomTrafficNeverMixesSequences) {
  constexpr int kBlock = 4, kBlocks = 40;
  BlockAllocator allocator(kBlocks, kBlock, true);
  Random random(3);
  std::vector<Sequence> live;
  std::map<std::int32_t, std::vector<std::int32_t>> content;  // block -> all tokens up to its end
  std::int64_t shared_tokens = 0;
  for (int step = 0; step < 5000; ++step) {
    if (random.below(2) == 0 && !live.empty()) {
      std::swap(live[static_cast<std::size_t>(random.below(static_cast<std::int64_t>(live.size())))], live.back());
      allocator.release(live.back());
      live.pop_back();
      continue;
    }
    Sequence sequence;
    for (std::int64_t i = random.below(24) + 1; i > 0; --i) {
      sequence.tokens.push_back(static_cast<std::int32_t>(random.below(2)));
    }
    const auto n = static_cast<std::int64_t>(sequence.tokens.size());
    if (!allocator.reserve(sequence, n)) continue;
    shared_tokens += sequence.num_stored;
    for (std::size_t i = 0; i < sequence.blocks.size(); ++i) {
      const std::size_t end = std::min<std::size_t>((i + 1) * kBlock, sequence.tokens.size());
      const std::vector<std::int32_t> prefix(sequence.tokens.begin(), sequence.tokens.begin() + static_cast<long>(end));
      if (i < static_cast<std::size_t>(sequence.num_stored / kBlock)) {
        ASSERT_EQ(content[sequence.blocks[i]], prefix);
      } else {
        ASSERT_EQ(allocator.use_count(sequence.blocks[i]), 1);
        content[sequence.blocks[i]] = prefix;
      }
    }
    sequence.num_stored = n;
    allocator.publish(sequence);
    live.push_back(std::move(sequence));
  }
  EXPECT_GT(shared_tokens, 1000);
  for (Sequence& sequence : live) allocator.release(sequence);
  EXPECT_EQ(allocator.num_free(), kBlocks);
}

// ---- Engine ---------------------------------------------------------------------------------------------------------

class TinyLm : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    auto model = Model::load(tiny_lm_dir());
    ASSERT_TRUE(model.ok()) << model.status().message();
    model_ = new Model(std::move(*model));
    const auto tokens = llm::read_npy_tokens(tiny_lm_dir() + "/heldout_tokens.npy", model_->config().vocab_size);
    ASSERT_TRUE(tokens.ok()) << tokens.status().message();
    prompt_.assign(tokens->begin() + 2 * 2048, tokens->begin() + 2 * 2048 + 48);
  }
  static void TearDownTestSuite() {
    delete model_;
    model_ = nullptr;
  }

  static Engine make_engine(const std::string& mode, EngineOptions options = {}) {
    options.cache.layer_modes = {mode_of(mode)};
    if (options.cache.num_blocks == 0) options.cache.num_blocks = 64;
    auto engine = Engine::create(*model_, options);
    EXPECT_TRUE(engine.ok()) << engine.status().message();
    engine->keep_logits(true);
    return std::move(*engine);
  }

  struct Stream {
    std::vector<std::int32_t> tokens;
    std::vector<std::vector<float>> logits;
  };
  // Runs until the engine is idle, and returns the streams by request id.
  static std::map<int, Stream> run(Engine& engine) {
    std::map<int, Stream> streams;
    while (engine.busy()) {
      auto outputs = engine.step();
      EXPECT_TRUE(outputs.ok()) << outputs.status().message();
      if (!outputs.ok()) break;
      for (auto& output : *outputs) {
        streams[output.request].tokens.push_back(output.token);
        streams[output.request].logits.push_back(std::move(output.logits));
      }
    }
    return streams;
  }

  static Stream generate(const std::string& mode, const Request& request, EngineOptions options = {}) {
    Engine engine = make_engine(mode, options);
    const auto id = engine.add(request);
    EXPECT_TRUE(id.ok()) << id.status().message();
    return run(engine)[*id];
  }

  static Model* model_;
  static std::vector<std::int32_t> prompt_;
};
Model* TinyLm::model_ = nullptr;
std::vector<std::int32_t> TinyLm::prompt_;

TEST_F(TinyLm, GreedyTextOfTheEightBitModesBeginsAsBf16s) {
  const Request request{.prompt = prompt_, .max_new_tokens = 64, .sampling = {}, .stop_at_eos = false};
  const auto expected = generate("bfloat16", request).tokens;
  ASSERT_EQ(expected.size(), 64U);
  for (const char* mode : {"fp8", "int8_per_token_head", "fp8_per_token_head"}) {
    if (!modes_built({mode})) continue;
    const auto tokens = generate(mode, request).tokens;
    ASSERT_EQ(tokens.size(), 64U);
    const auto same = std::mismatch(tokens.begin(), tokens.end(), expected.begin()).first - tokens.begin();
    EXPECT_GE(same, 16) << mode;
  }
}

// The two ways differ in the order of fp32 sums (a product over one row or over many). With an fp32 cache that is all:
// the bound of ModelVariant.MatchesTheOracle, with 6 layers of products up to 1024 long, 43 in all, and errors that add
// like a random walk instead of all one way: sqrt(1024) * 2^-24 * sqrt(43) = 1.3e-5 of the largest logit (18), 2.3e-4.
// In a quantized cache an fp32 difference can move a value across a rounding boundary: a few of the 1536 stored
// elements of a token then differ by a whole step, against which every element is off by half a step at random from the
// start. The effect on the next token must stay well below that of the quantization: a tenth of the mode's own KL.
TEST_F(TinyLm, DecodingStepByStepEqualsOneShotPrefill) {
  std::vector<std::int32_t> tokens = prompt_;
  const auto more = generate("float32", {.prompt = prompt_, .max_new_tokens = 40, .sampling = {}}).tokens;
  tokens.insert(tokens.end(), more.begin(), more.end());
  const auto vocab_size = static_cast<std::size_t>(model_->config().vocab_size);
  const auto mean_kl = [&](const std::vector<float>& p_logits, const std::vector<float>& q_logits) {
    double sum = 0.0;
    for (std::size_t row = 0; row < tokens.size(); ++row) {
      const float* p = p_logits.data() + row * vocab_size;
      const float* q = q_logits.data() + row * vocab_size;
      double p_sum = 0.0, q_sum = 0.0;
      for (std::size_t i = 0; i < vocab_size; ++i) p_sum += std::exp(p[i]), q_sum += std::exp(q[i]);
      for (std::size_t i = 0; i < vocab_size; ++i) {
        sum += std::exp(p[i]) / p_sum * ((p[i] - std::log(p_sum)) - (q[i] - std::log(q_sum)));
      }
    }
    return sum / static_cast<double>(tokens.size());
  };
  const auto exact = run_logits(*model_, tokens, "float32");
  for (const char* mode : {"float32", "bfloat16", "fp8", "int8_per_token_head", "fp8_per_token_head",
                           "int4_per_token_head", "int2_per_token_head"}) {
    if (!modes_built({mode})) continue;
    const auto at_once = run_logits(*model_, tokens, mode);
    const auto step_by_step = run_logits(*model_, tokens, mode, /*chunk=*/1);
    if (std::string(mode) == "float32") {
      for (std::size_t i = 0; i < at_once.size(); ++i) ASSERT_NEAR(at_once[i], step_by_step[i], 2.3e-4) << i;
    } else {
      EXPECT_LE(mean_kl(at_once, step_by_step), 0.1 * mean_kl(exact, at_once) + 1e-6) << mode;
    }
  }
}

// The same chunks are computed with and without sharing, so every product and every split has the same shape and the
// results must agree in every bit: what differs is only which pages hold the prefix and who wrote them.
TEST_F(TinyLm, SharedPrefixesGiveTheSameBits) {
  for (const char* mode : {"bfloat16", "int8_per_token_head", "int4_per_token_head", "int2_per_token_head"}) {
    if (!modes_built({mode})) continue;
    std::map<bool, Stream> second;
    std::map<bool, std::int64_t> computed;
    for (const bool share : {false, true}) {
      EngineOptions options;
      options.max_tokens_per_step = 16;
      options.share_prefixes = share;
      Engine engine = make_engine(mode, options);
      std::vector<std::int32_t> first = prompt_, other = prompt_;
      first.resize(16);
      other.resize(16);
      for (std::int32_t i = 0; i < 7; ++i) first.push_back(100 + i), other.push_back(300 + i);
      ASSERT_TRUE(engine.add({.prompt = first, .max_new_tokens = 8, .sampling = {}}).ok());
      run(engine);
      const std::int64_t before = engine.tokens_computed();
      const auto id = engine.add({.prompt = other, .max_new_tokens = 24, .sampling = {}, .stop_at_eos = false});
      ASSERT_TRUE(id.ok());
      second[share] = run(engine)[*id];
      computed[share] = engine.tokens_computed() - before;
    }
    EXPECT_EQ(computed[true], computed[false] - 16) << mode << ": the prefix was not shared";
    EXPECT_EQ(second[true].tokens, second[false].tokens) << mode;
    EXPECT_EQ(second[true].logits, second[false].logits) << mode;
  }
}

TEST_F(TinyLm, RaggedBatchesGiveEachSequenceItsOwnTokens) {
  std::vector<Request> requests;
  for (std::int64_t i = 0; i < 5; ++i) {
    Request request{.prompt = prompt_, .max_new_tokens = 6 + 3 * i, .sampling = {}, .stop_at_eos = false};
    request.prompt.resize(static_cast<std::size_t>(3 + 2 * i));
    requests.push_back(request);
  }
  EngineOptions options;
  options.max_tokens_per_step = 7;  // prompts in chunks, mixed with sequences that generate
  options.cache.num_blocks = 6;     // too few for all at once: some wait
  Engine engine = make_engine("float32", options);
  for (const Request& request : requests) ASSERT_TRUE(engine.add(request).ok());
  auto streams = run(engine);
  for (int i = 0; i < 5; ++i) {
    const Request& request = requests[static_cast<std::size_t>(i)];
    const Stream& stream = streams[i];
    ASSERT_EQ(static_cast<std::int64_t>(stream.tokens.size()), request.max_new_tokens);
    std::vector<std::int32_t> tokens = request.prompt;
    tokens.insert(tokens.end(), stream.tokens.begin(), stream.tokens.end() - 1);
    const auto alone = run_logits(*model_, tokens, "float32");
    const auto vocab_size = stream.logits[0].size();
    for (std::size_t t = 0; t < stream.logits.size(); ++t) {
      const float* row = alone.data() + (request.prompt.size() - 1 + t) * vocab_size;
      // The bound of DecodingStepByStepEqualsOneShotPrefill.
      for (std::size_t v = 0; v < vocab_size; ++v) ASSERT_NEAR(stream.logits[t][v], row[v], 2.3e-4) << i << " " << t;
      EXPECT_EQ(stream.tokens[t], llm::argmax(stream.logits[t].data(), static_cast<int>(vocab_size)));
    }
  }
  EXPECT_EQ(engine.allocator().num_free(), 6);
}

TEST_F(TinyLm, SeedsDecideWhatIsSampled) {
  Request request{.prompt = prompt_, .max_new_tokens = 24, .sampling = {.temperature = 1.0F, .seed = 5}};
  const auto first = generate("bfloat16", request).tokens;
  EXPECT_EQ(generate("bfloat16", request).tokens, first);
  request.sampling.seed = 6;
  EXPECT_NE(generate("bfloat16", request).tokens, first);
}

TEST_F(TinyLm, RefusesWhatCannotRun) {
  Engine engine = make_engine("int8_per_token_head", {.cache = {.layer_modes = {}, .num_blocks = 2}});
  const auto refusal = [&](const Request& request) {
    const auto id = engine.add(request);
    return id.ok() ? std::string("accepted") : id.status().message();
  };
  EXPECT_EQ(refusal({.prompt = {}, .sampling = {}}), "the prompt has no tokens");
  EXPECT_EQ(refusal({.prompt = {1, 8192}, .sampling = {}}),
            "token id 8192 at position 1 of the prompt is outside the vocabulary of 8192");
  EXPECT_EQ(refusal({.prompt = {-5}, .sampling = {}}),
            "token id -5 at position 0 of the prompt is outside the vocabulary of 8192");
  EXPECT_EQ(refusal({.prompt = iota_tokens(33), .max_new_tokens = 1, .sampling = {}}),
            "a prompt of 33 tokens and 1 new ones do not fit: the cache holds 32 tokens");
  EXPECT_EQ(refusal({.prompt = {1}, .max_new_tokens = INT64_MAX, .sampling = {}}),
            "a prompt of 1 tokens and 9223372036854775807 new ones do not fit: the cache holds 32 tokens");
  EXPECT_NE(refusal({.prompt = {1}, .max_new_tokens = 0, .sampling = {}}).find("max_new_tokens is 0"),
            std::string::npos);
  EXPECT_NE(refusal({.prompt = {1}, .sampling = {.temperature = -1.0F}}).find("temperature is -1"), std::string::npos);
  EXPECT_NE(refusal({.prompt = {1}, .sampling = {.top_p = 0.0F}}).find("top_p is 0"), std::string::npos);
  EXPECT_NE(refusal({.prompt = {1}, .sampling = {.temperature = NAN}}).find("temperature is"), std::string::npos);
  EXPECT_FALSE(engine.busy());

  Engine large = make_engine("fp8", {.cache = {.layer_modes = {}, .num_blocks = 200}});
  const auto too_long = large.add({.prompt = iota_tokens(2048), .max_new_tokens = 1, .sampling = {}});
  EXPECT_EQ(too_long.status().message(),
            "a prompt of 2048 tokens and 1 new ones do not fit: the model's context is 2048 tokens");
  EXPECT_FALSE(Engine::create(*model_, {.cache = {.layer_modes = {mode_of("fp8")}, .num_blocks = 0}}).ok());
  EXPECT_FALSE(Engine::create(*model_, {.cache = {.layer_modes = {}, .num_blocks = 4}}).ok());
}

TEST_F(TinyLm, EveryLayerMayHaveItsOwnMode) {
  std::vector<ModeId> modes(6, mode_of("int4_per_token_head"));
  modes.front() = modes.back() = mode_of("bfloat16");
  auto engine = Engine::create(*model_, {.cache = {.layer_modes = modes, .num_blocks = 8}});
  ASSERT_TRUE(engine.ok()) << engine.status().message();
  // K and V of 2 KV heads of size 128: 512 bytes each in bf16, 136 in int4 with its scales.
  EXPECT_EQ(engine->cache().bytes_per_token(), 2 * 2 * 512 + 4 * 2 * 136);
  ASSERT_TRUE(engine->add({.prompt = prompt_, .max_new_tokens = 4, .sampling = {}}).ok());
  EXPECT_EQ(run(*engine)[0].tokens.size(), 4U);
}

// ---- Sampler --------------------------------------------------------------------------------------------------------

TEST(Sampler, DrawsFromTheSoftmaxCutAtTopP) {
  // Probabilities 0.1, 0.4, 0.3, 0.2 at temperature 2.
  std::vector<float> logits;
  for (double p : {0.1, 0.4, 0.3, 0.2}) logits.push_back(static_cast<float>(2.0 * std::log(p)));
  constexpr int kDraws = 40000;
  const auto shares = [&](float top_p) {
    llm::Sampler sampler({.temperature = 2.0F, .top_p = top_p, .seed = 9});
    std::vector<double> share(4);
    for (int i = 0; i < kDraws; ++i) share[static_cast<std::size_t>(sampler.sample(logits.data(), 4))] += 1.0 / kDraws;
    return share;
  };
  // The tolerance is five standard deviations of a share: 5 * sqrt(0.25 / 40000).
  constexpr double kTolerance = 0.0125;
  const auto all = shares(1.0F), cut = shares(0.65F);
  const double expected[] = {0.1, 0.4, 0.3, 0.2}, expected_cut[] = {0.0, 4.0 / 7.0, 3.0 / 7.0, 0.0};
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_NEAR(all[i], expected[i], kTolerance);
    EXPECT_NEAR(cut[i], expected_cut[i], expected_cut[i] == 0.0 ? 0.0 : kTolerance);
  }
  EXPECT_EQ(llm::Sampler({.temperature = 0.0F}).sample(logits.data(), 4), 1);
  const float ties[] = {1.0F, 3.0F, 3.0F};
  EXPECT_EQ(llm::argmax(ties, 3), 1);
}

}  // namespace
}  // namespace quire::testing
