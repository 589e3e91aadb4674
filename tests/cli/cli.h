// Runs the command line tool inside the test's process and keeps what it prints.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
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

inline std::string source_path(const std::string& relative) { return std::string(QUIRE_SOURCE_DIR) + "/" + relative; }

}  // namespace quire::test
