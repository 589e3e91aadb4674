// quire check: replays golden files and prints each case's worst error against its tolerance.
#include <fmt/core.h>

#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "golden.h"
#include "options.h"
#include "verbs.h"

namespace quire::cli {
namespace {

using nlohmann::ordered_json;

struct Options {
  std::vector<std::string> files;
  Device device = Device::cpu();
  bool as_json = false;
};

struct Counts {
  int passed = 0, failed = 0, skipped = 0;
};

void print_case(const CaseResult& result) {
  if (result.skipped) {
    fmt::print("skip  {:<46} {}\n", result.name, result.reason);
    return;
  }
  const char* verdict = result.pass() ? "pass" : "FAIL";
  if (!result.reason.empty()) {
    fmt::print("{}  {:<46} refused: {}\n", verdict, result.name, result.reason);
    return;
  }
  const Measure* worst = result.worst();
  fmt::print("{}  {:<46} {:>10.4g} of {:<10.4g} {}\n", verdict, result.name, worst->error, worst->tolerance,
             worst->what);
  for (const Measure& measure : result.measures) {
    if (!measure.pass() && &measure != worst) {
      fmt::print("      {:<46} {:>10.4g} of {:<10.4g} {}\n", "", measure.error, measure.tolerance, measure.what);
    }
  }
}

// JSON has no infinities: null stands for an error that is not finite.
ordered_json number(double value) { return std::isfinite(value) ? ordered_json(value) : ordered_json(); }

ordered_json describe(const CaseResult& result) {
  const Measure* worst = result.worst();
  ordered_json measures = ordered_json::array();
  for (const Measure& measure : result.measures) {
    measures.push_back(
        {{"what", measure.what}, {"error", number(measure.error)}, {"tolerance", number(measure.tolerance)}});
  }
  ordered_json row = {{"name", result.name},
                      {"pass", result.pass()},
                      {"worst_error", worst != nullptr ? number(worst->error) : ordered_json()},
                      {"tolerance", worst != nullptr ? number(worst->tolerance) : ordered_json()}};
  if (!result.reason.empty()) row["refused"] = result.reason;
  row["measures"] = std::move(measures);
  return row;
}

int run(const Options& options) {
  Counts counts;
  ordered_json cases = ordered_json::array();
  ordered_json skipped = ordered_json::array();
  for (const std::string& file : options.files) {
    auto results = replay_golden_file(file, options.device);
    if (!results.ok()) return report(results.status());
    if (results->empty()) {  // checks nothing, so it must not pass
      CaseResult none;
      none.name = file;
      none.reason = "the file holds no case";
      results->push_back(std::move(none));
    }
    for (const CaseResult& result : *results) {
      ++(result.skipped ? counts.skipped : result.pass() ? counts.passed : counts.failed);
      if (!options.as_json) {
        print_case(result);
      } else if (result.skipped) {
        skipped.push_back({{"name", result.name}, {"reason", result.reason}});
      } else {
        cases.push_back(describe(result));
      }
    }
  }
  if (options.as_json) {
    const ordered_json answer = {{"device", device_type_name(options.device.type)},
                                 {"cases", std::move(cases)},
                                 {"passed", counts.passed},
                                 {"failed", counts.failed},
                                 {"skipped", std::move(skipped)}};
    fmt::print("{}\n", answer.dump(2));
  } else {
    fmt::print("{} passed, {} failed, {} skipped on {}\n", counts.passed, counts.failed, counts.skipped,
               device_type_name(options.device.type));
  }
  return counts.failed == 0 ? 0 : 1;
}

}  // namespace

void add_check(CLI::App& app, int& exit_status) {
  CLI::App* verb = app.add_subcommand(
      "check", "Replay golden files; exit status 1 if a case misses its tolerance or a file has none");
  auto options = std::make_shared<Options>();
  verb->add_option("files", options->files, "Golden files, .safetensors or .safetensors.gz")->required();
  add_device(*verb, options->device, "Where the ops run");
  verb->add_flag("--json", options->as_json, "Print JSON");
  verb->callback([options, &exit_status] { exit_status = run(*options); });
}

}  // namespace quire::cli
