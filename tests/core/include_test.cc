// Which room may include which. A room is a folder; what it may use lies below it:
//
//   include/quire/{export,status,tensor,mode}.h   <-   format   <-   attention   <-   call   <-   reference, cpu, cuda
//   <-   core   <-   llm, tools, python, tests
//
// The other public headers are the shapes of the ops and of backends: everything above attention may include them.
// format/modes.def is a list, not code, and may be included anywhere; format/build_config.h is generated.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <regex>
#include <set>
#include <string>
#include <vector>

namespace quire {
namespace {

namespace fs = std::filesystem;

const std::set<std::string> kBottom = {"quire/export.h", "quire/status.h", "quire/tensor.h", "quire/mode.h"};

// The rooms of src whose headers a room may include, besides its own, and whether it may include the ops' public
// headers.
struct Rule {
  std::set<std::string> rooms;
  bool ops;
};
const std::map<std::string, Rule> kRules = {
    {"format", {{}, false}},
    {"attention", {{"format"}, false}},
    {"call", {{"format", "attention"}, true}},
    {"capi", {{}, true}},
    {"reference", {{"format", "attention"}, true}},
    {"cpu", {{"format", "attention", "call"}, true}},
    {"cuda", {{"format", "attention", "call"}, true}},
    {"core", {{"format", "attention", "call", "cpu", "cuda"}, true}},
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
      if (included == "format/modes.def") return;
      // The list names the headers of the formats it lists.
      const std::string from = included.substr(0, included.find('/'));
      const bool allowed =
          from == "quire" ? kBottom.contains(included) || rule.ops : from == room || rule.rooms.contains(from);
      EXPECT_TRUE(allowed) << path << " includes " << included;
    });
  }
  EXPECT_GT(num_includes, 50) << "the test no longer finds the sources";
}

// The rooms of src/cuda, lowest first, and the headers beside them that each may include.
const std::vector<std::string> kCudaRooms = {"ptx", "lane", "format", "work", "stage", "softmax", "output", "kernel"};
const std::set<std::string> kCudaData = {"attention_params.h", "store_params.h"};
const std::set<std::string> kCudaHost = {"cuda.h", "kernels.h", "launch.h",
                                         "store_kernels.h"};  // for kernels' launchers

TEST(Includes, RoomsOfCudaUseOnlyWhatLiesBelow) {
  int num_includes = 0;
  for (std::size_t room = 0; room < kCudaRooms.size(); ++room) {
    for_each_include(kRoot / "src/cuda" / kCudaRooms[room], [&](const std::string& path, const std::string& included) {
      if (!included.starts_with("cuda/")) return;
      ++num_includes;
      const std::string name = included.substr(5);
      if (name.find('/') == std::string::npos) {
        const bool allowed =
            (kCudaData.contains(name) && room >= 3) || (kCudaHost.contains(name) && kCudaRooms[room] == "kernel");
        EXPECT_TRUE(allowed) << path << " includes " << included;
        return;
      }
      const auto other = std::find(kCudaRooms.begin(), kCudaRooms.end(), name.substr(0, name.find('/')));
      EXPECT_TRUE(other - kCudaRooms.begin() <= static_cast<std::ptrdiff_t>(room)) << path << " includes " << included;
    });
  }
  EXPECT_GT(num_includes, 100) << "the test no longer finds the sources";
}

// A kernel is one folder, and what several kernels share lies in the rooms below. There is one exception:
// prefill_split's code for sm_90a leaves out what prefill_sm90 serves.
TEST(Includes, KernelsDoNotIncludeEachOther) {
  for (const fs::directory_entry& entry : fs::directory_iterator(kRoot / "src/cuda/kernel")) {
    if (!entry.is_directory()) continue;
    const std::string own = "cuda/kernel/" + entry.path().filename().string() + "/";
    for_each_include(entry.path(), [&](const std::string& path, const std::string& included) {
      if (!included.starts_with("cuda/kernel/") || included == "cuda/kernel/prefill_sm90/config.h") return;
      EXPECT_TRUE(included.starts_with(own)) << path << " includes " << included;
    });
  }
}

// Helpers receive a lane, a warp or a thread: only the __global__ function, which ends at a brace in the first column,
// reads where it is in the grid.
TEST(Includes, OnlyGlobalFunctionsReadTheirPlaceInTheGrid) {
  const std::regex place("(threadIdx|blockIdx|blockDim|gridDim)");
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(kRoot / "src/cuda")) {
    if (!entry.is_regular_file()) continue;
    std::ifstream file(entry.path());
    std::string line;
    bool in_global = false;
    for (int number = 1; std::getline(file, line); ++number) {
      if (line.find("__global__") != std::string::npos) in_global = true;
      const std::string code = line.substr(0, line.find("//"));
      EXPECT_TRUE(in_global || !std::regex_search(code, place)) << entry.path() << ":" << number << ": " << line;
      if (line.starts_with("}")) in_global = false;
    }
  }
}

TEST(Includes, NoFileOfTheLibraryIsLong) {
  for (const char* folder : {"src", "python"}) {
    for (const fs::directory_entry& entry : fs::recursive_directory_iterator(kRoot / folder)) {
      if (!entry.is_regular_file()) continue;
      std::ifstream file(entry.path());
      const auto lines = std::count(std::istreambuf_iterator<char>(file), {}, '\n');
      EXPECT_LE(lines, 500) << entry.path();
    }
  }
}

// What Python needs of the library, anybody's binding has: the public headers. docs.h is generated.
TEST(Includes, PythonUsesThePublicHeaders) {
  int num_includes = 0;
  for_each_include(kRoot / "python", [&](const std::string& path, const std::string& included) {
    ++num_includes;
    const bool own = fs::exists(kRoot / "python/src" / included) || included == "docs.h";
    const bool is_public = included.starts_with("quire/") && included != "quire/cli.h";
    EXPECT_TRUE(own || is_public) << path << " includes " << included;
  });
  EXPECT_GT(num_includes, 30) << "the test no longer finds the sources";
}

TEST(Includes, ARoomNobodyHasRulesForIsAnError) {
  for (const fs::directory_entry& entry : fs::directory_iterator(kRoot / "src")) {
    if (!entry.is_directory()) continue;
    EXPECT_TRUE(kRules.contains(entry.path().filename().string())) << entry.path();
  }
  for (const fs::directory_entry& entry : fs::directory_iterator(kRoot / "src/cuda")) {
    const std::string name = entry.path().filename().string();
    if (!entry.is_directory()) continue;
    EXPECT_TRUE(std::find(kCudaRooms.begin(), kCudaRooms.end(), name) != kCudaRooms.end()) << entry.path();
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

// The public headers include nothing of CUDA or of a third party, and no templates over formats.
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
