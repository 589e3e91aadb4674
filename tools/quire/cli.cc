#include "quire/cli.h"

#include <fmt/core.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <map>
#include <string>

#include "verbs.h"

namespace quire {
namespace cli {
namespace {

constexpr int kBadInput = 2;

using AddVerb = void (*)(CLI::App& app, int& exit_status);
constexpr AddVerb kVerbs[] = {
    add_modes, add_layout, add_check, add_generate, add_eval, add_demo, add_bench,
};

int report_sentence(std::string sentence) {
  std::replace(sentence.begin(), sentence.end(), '\n', ' ');
  fmt::print(stderr, "quire: {}\n", sentence);
  return kBadInput;
}

}  // namespace

int report(const Status& status) { return report_sentence(status.message()); }

CLI::Option* add_device(CLI::App& verb, Device& device, const std::string& description) {
  static const std::map<std::string, Device> devices = {{"cpu", Device::kCpu}, {"cuda", Device::kCuda}};
  return verb.add_option("--device", device, description)
      ->transform(CLI::CheckedTransformer(devices, CLI::ignore_case).description(""))
      ->type_name("cpu|cuda");
}

}  // namespace cli

int cli_main(int argc, const char* const* argv) try {
  CLI::App app("quire: a KV cache stored in 2 to 16 bits, and attention that reads it", "quire");
  app.set_version_flag("--version", "quire " QUIRE_VERSION);
  app.require_subcommand(0, 1);
  int exit_status = 0;
  for (cli::AddVerb add_verb : cli::kVerbs) add_verb(app, exit_status);
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& request) {  // --help, --version: printed on stdout
    return app.exit(request);
  } catch (const CLI::ParseError& error) {
    return cli::report_sentence(error.what());
  }
  if (app.get_subcommands().empty()) {
    std::string verbs;
    for (const CLI::App* verb : app.get_subcommands({})) verbs += (verbs.empty() ? "" : ", ") + verb->get_name();
    return cli::report_sentence("a verb is needed; there are " + verbs);
  }
  return exit_status;
} catch (const std::exception& error) {
  return cli::report_sentence(error.what());
}

}  // namespace quire
