// Which room may include which. A room is a folder; what it may use lies below it:
//
//   include/quire/{export,status,tensor,mode}.h   <-   format   <-   attention   <-   reference, cpu, cuda   <-   core
//   <-   llm, tools, python, tests
//
// The other public headers are the shapes of the ops and of backends: everything above attention may include them.
// core/modes.def is a list, not code, and may be included anywhere; format/build_config.h is generated.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <string>

namespace quire {
namespace {

namespace fs = std::filesystem;

const std::set<std::string> kBottom = {"quire/export.h", "quire/status.h", "quire/tensor.h", "quire/mode.h"};

// Rooms of src whose headers a room may include, its own always; and whether it may include the ops' public headers.
struct Rule {
  std::set<std::string> rooms;
  bool ops;
};
const std::map<std::string, Rule> kRules = {
    {"format", {{}, false}},
    {"attention", {{"format"}, false}},
    {"reference", {{"format", "attention"}, true}},
    {"cpu", {{"format", "attention"}, true}},
    {"cuda", {{"format", "attention"}, true}},
    {"core", {{"format", "attention", "cpu", "cuda"}, true}},
    // The runner is a user of the library: it goes through the public headers, and may use the conversions and the
    // memory of a device.
    {"llm", {{"format", "cuda"}, true}},
};

// Calls visit(path, included) for every #include "..." of the C++ and CUDA files below a folder.
template <class Visit>
void for_each_include(const fs::path& folder, Visit&& visit) {
  static const std::regex pattern("^\\s*#\\s*include\\s*\"([^\"]+)\"");
  static const std::set<std::string> extensions = {".h", ".cc", ".cu", ".cuh", ".def", ".in"};
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(folder)) {
    if (!entry.is_regular_file() || !extensions.contains(entry.path().extension().string())) continue;
    std::ifstream file(entry.path());
    std::string line;
    std::smatch match;
    while (std::getline(file, line)) {
      if (std::regex_search(line, match, pattern)) visit(entry.path().string(), match[1].str());
    }
  }
}

const fs::path kRoot = QUIRE_SOURCE_DIR;

TEST(Includes, RoomsUseOnlyWhatLiesBelow) {
  int num_includes = 0;
  for (const auto& room_and_rule : kRules) {
    const std::string& room = room_and_rule.first;  // clang 14 captures no structured binding
    const Rule& rule = room_and_rule.second;
    if (!fs::exists(kRoot / "src" / room)) continue;
    for_each_include(kRoot / "src" / room, [&](const std::string& path, const std::string& included) {
      ++num_includes;
      if (included == "core/modes.def") return;
      // The list names the headers of the formats it lists.
      const std::string from = included.substr(0, included.find('/'));
      const bool allowed =
          from == "quire" ? kBottom.contains(included) || rule.ops : from == room || rule.rooms.contains(from);
      EXPECT_TRUE(allowed) << path << " includes " << included;
    });
  }
  EXPECT_GT(num_includes, 50) << "the test no longer finds the sources";
}

TEST(Includes, ARoomNobodyHasRulesForIsAnError) {
  for (const fs::directory_entry& entry : fs::directory_iterator(kRoot / "src")) {
    if (!entry.is_directory()) continue;
    EXPECT_TRUE(kRules.contains(entry.path().filename().string())) << entry.path();
  }
}

TEST(Includes, PublicHeadersIncludeOnlyPublicHeaders) {
  for_each_include(kRoot / "include", [&](const std::string& path, const std::string& included) {
    EXPECT_TRUE(included.starts_with("quire/")) << path << " includes " << included;
    const std::string name = fs::path(path).filename().string();
    if (kBottom.contains("quire/" + name)) {
      EXPECT_TRUE(kBottom.contains(included)) << path << " includes " << included;
    }
  });
}

// Nothing of CUDA or of a third party, and no templates on formats, behind the front door.
TEST(Includes, PublicHeadersNeedNothingElse) {
  const std::regex angle("^\\s*#\\s*include\\s*<([^>]+)>");
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(kRoot / "include")) {
    if (!entry.is_regular_file()) continue;
    std::ifstream file(entry.path());
    std::string line;
    std::smatch match;
    while (std::getline(file, line)) {
      if (!std::regex_search(line, match, angle)) continue;
      EXPECT_EQ(match[1].str().find('/'), std::string::npos) << entry.path() << " includes <" << match[1].str() << ">";
      EXPECT_EQ(match[1].str().find("cuda"), std::string::npos) << entry.path();
    }
  }
}

}  // namespace
}  // namespace quire
