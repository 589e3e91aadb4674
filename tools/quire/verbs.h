// The verbs of the command line tool, one file each. A verb adds a subcommand whose callback does the work and sets the
// exit status (0 success, 1 a check failed, 2 bad usage or bad input). To add a verb: its file, a declaration here and
// a line in kVerbs (cli.cc) and in CMakeLists.txt.
#pragma once

#include <CLI/CLI.hpp>

#include "quire/status.h"

namespace quire::cli {

void add_modes(CLI::App& app, int& exit_status);
void add_layout(CLI::App& app, int& exit_status);
void add_bench(CLI::App& app, int& exit_status);
void add_check(CLI::App& app, int& exit_status);
void add_generate(CLI::App& app, int& exit_status);
void add_eval(CLI::App& app, int& exit_status);
void add_demo(CLI::App& app, int& exit_status);

// Prints one sentence on stderr and returns the exit status of bad input.
int report(const Status& status);

}  // namespace quire::cli
