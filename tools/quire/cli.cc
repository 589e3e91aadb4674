#include "quire/cli.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>
#include <iostream>
#include <new>
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
  for (char& c : sentence) {
    if (c == '\n') c = ' ';
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  }
  std::fputs(("quire: " + sentence + "\n").c_str(), stderr);  // {fmt} would throw where that cannot be written either
  return kBadInput;
}

int run(int argc, const char* const* argv) {
  CLI::App app("quire: a KV cache stored in 2 to 16 bits, and attention that reads it", "quire");
  app.set_version_flag("--version", "quire " QUIRE_VERSION);
  app.require_subcommand(0, 1);
  int exit_status = 0;
  for (AddVerb add_verb : kVerbs) add_verb(app, exit_status);
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& request) {  // --help, --version: printed on stdout
    return app.exit(request);
  } catch (const CLI::ParseError& error) {
    return report_sentence(error.what());
  }
  if (app.get_subcommands().empty()) {
    std::string verbs;
    for (const CLI::App* verb : app.get_subcommands({})) verbs += (verbs.empty() ? "" : ", ") + verb->get_name();
    return report_sentence("a verb is needed; there are " + verbs);
  }
  return exit_status;
}

}  // namespace

int report(const Status& status) { return report_sentence(status.message()); }

}  // namespace cli

int cli_main(int argc, const char* const* argv) {
  std::cout.clear();  // from an earlier call in this process
  std::clearerr(stdout);
  int exit_status = cli::kBadInput;
  std::string sentence;  // what the verb has not said itself
  try {
    exit_status = cli::run(argc, argv);
  } catch (const std::bad_alloc&) {
    sentence = "there is not enough memory";
  } catch (const std::exception& error) {  // {fmt} throws where a write fails
    sentence = error.what();
  }
  // Output that is lost is an error, whatever the verb made of it.
  errno = 0;
  const bool written = std::fflush(stdout) == 0 && std::ferror(stdout) == 0;
  if (!written && (exit_status != cli::kBadInput || !sentence.empty())) {
    sentence = "cannot write to standard output" + (errno != 0 ? std::string(": ") + std::strerror(errno) : "");
  }
  return sentence.empty() ? exit_status : cli::report_sentence(sentence);
}

}  // namespace quire
