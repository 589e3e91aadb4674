// Replays golden files: caches and outputs that other code computed once and that this library must reproduce.
//
// A file is a set of cases. The tensors of case C are named C/<tensor>; the file's metadata maps C to a JSON object of
// its parameters. The first part of C says what to do with it:
//
//   write/*             key, value, slot_mapping -> caches and scale caches
//   attn/*, diffkv/*    caches and query -> out; where key, value and slot_mapping are there, also as write/*
//   rht_signs/<d>       the sign vector of the randomized Hadamard transform
//   e4b15/float16       e4b15's code of every float16
//   turboquant/*        as write/* and attn/*, one query per sequence, K and V in one slot
//   tq_centroids/<d>_<bits>  the Lloyd-Max codebook of N(0, 1 / d)
//
// tests/golden/README.md describes the files and states every gate.
#pragma once

#include <string>
#include <vector>

#include "quire/status.h"
#include "quire/tensor.h"

namespace quire::cli {

// One number held against its gate.
struct Measure {
  std::string what;
  double error = 0.0;
  double tolerance = 0.0;
  bool pass() const { return error <= tolerance; }  // NaN does not pass
};

struct CaseResult {
  std::string name;
  bool skipped = false;
  std::string reason;  // why it was skipped, or the sentence with which an op refused the case
  std::vector<Measure> measures;

  bool pass() const;
  // The measure that comes closest to its tolerance or exceeds it most, or null where nothing was measured.
  const Measure* worst() const;
};

// Replays every case of a file, ordered by name. The file is refused as a whole if it or a case in it does not have the
// form above; an op's refusal is that case's failure.
Result<std::vector<CaseResult>> replay_golden_file(const std::string& path, Device device);

}  // namespace quire::cli
