// The command line tool as a function, so that a program can link its own main around it after registering modes.
#pragma once

namespace quire {

// Returns the process exit status: 0 success, 1 a check failed, 2 bad usage or bad input (one sentence on stderr).
int cli_main(int argc, const char* const* argv);

}  // namespace quire
