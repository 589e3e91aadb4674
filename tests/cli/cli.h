// Runs the command line tool inside the test's process and keeps what it prints.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "quire/cli.h"

namespace quire::test {

struct CliResult {
  int exit_status = 0;
  std::string out, err;

  nlohmann::json json() const { return nlohmann::json::parse(out, nullptr, /*allow_exceptions=*/false); }
  // Whether stderr holds exactly one line, in the tool's name.
  bool one_sentence() const {
    return err.rfind("quire: ", 0) == 0 && std::count(err.begin(), err.end(), '\n') == 1 && err.back() == '\n';
  }
};

inline CliResult run_cli(const std::vector<std::string>& arguments) {
  std::vector<const char*> argv = {"quire"};
  for (const std::string& argument : arguments) argv.push_back(argument.c_str());
  testing::internal::CaptureStdout();
  testing::internal::CaptureStderr();
  CliResult result;
  result.exit_status = cli_main(static_cast<int>(argv.size()), argv.data());
  result.out = testing::internal::GetCapturedStdout();
  result.err = testing::internal::GetCapturedStderr();
  return result;
}

// Runs it with its output going to a file, such as /dev/full; `out` stays empty.
inline CliResult run_cli_into(const std::string& path, const std::vector<std::string>& arguments) {
  std::fflush(stdout);
  const int old_stdout = dup(STDOUT_FILENO);
  const int file = open(path.c_str(), O_WRONLY);
  dup2(file, STDOUT_FILENO);
  close(file);
  std::vector<const char*> argv = {"quire"};
  for (const std::string& argument : arguments) argv.push_back(argument.c_str());
  testing::internal::CaptureStderr();
  CliResult result;
  result.exit_status = cli_main(static_cast<int>(argv.size()), argv.data());
  result.err = testing::internal::GetCapturedStderr();
  dup2(old_stdout, STDOUT_FILENO);
  close(old_stdout);
  return result;
}

// Expects exit status 2, one sentence that contains `says`, and nothing on stdout.
inline void expect_refusal(const std::vector<std::string>& arguments, const std::string& says) {
  const CliResult result = run_cli(arguments);
  EXPECT_EQ(result.exit_status, 2) << says;
  EXPECT_TRUE(result.one_sentence()) << says << ": " << result.err;
  EXPECT_NE(result.err.find(says), std::string::npos) << says << ": " << result.err;
  EXPECT_EQ(result.out, "") << says;
}

inline std::string source_path(const std::string& relative) { return std::string(QUIRE_SOURCE_DIR) + "/" + relative; }

}  // namespace quire::test
