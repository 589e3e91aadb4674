// One test per group of probes. A failing probe's name can be run alone:
//   quire_hostile_tests --probe=store/int4/key.shape[0]=2^62
// runs every probe whose name begins so and prints what came of it; --list prints all names.
#include <gtest/gtest.h>
#include <omp.h>

#include <cstdio>
#include <map>
#include <ostream>
#include <set>
#include <string>
#include <vector>

#include "hostile/probe.h"
#include "support/modes.h"

namespace quire::testing {

// The parameter of a test, as gtest and ctest print it.
void PrintTo(const Group& group, std::ostream* out) { *out << group.name; }

namespace {

const std::vector<Group>& groups() {
  static const std::vector<Group> all = [] {
    std::vector<Group> groups;
    for (auto* make : {store_groups, attention_groups, plan_groups, merge_groups, turboquant_groups, layout_groups,
                       mode_groups, backend_groups, random_groups}) {
      for (Group& group : make()) groups.push_back(std::move(group));
    }
    return groups;
  }();
  return all;
}

bool built(const Group& group) {
  for (const std::string& mode : group.modes) {
    if (!modes_built({mode})) return false;
  }
  return true;
}

class Hostile : public ::testing::TestWithParam<Group> {};

TEST_P(Hostile, Probes) {
  const Group& group = GetParam();
  if (!built(group)) GTEST_SKIP() << "this build leaves out a mode of " << group.name;
  Call call = group.make();
  int refused = 0;
  int accepted = 0;
  for (const Probe& probe : call.probes) {
    const Outcome outcome = run_probe(call, probe);
    refused += outcome.kind == Outcome::kRefusedOk ? 1 : 0;
    accepted += outcome.kind == Outcome::kAcceptedOk ? 1 : 0;
    if (outcome.kind == Outcome::kFailed) ADD_FAILURE() << group.name << "/" << probe.name << ": " << outcome.text;
  }
  std::printf("%s: %zu probes, %d refused, %d accepted\n", group.name.c_str(), call.probes.size(), refused, accepted);
  EXPECT_GE(refused, group.min_refused);
  EXPECT_GE(accepted, group.min_accepted);
}

INSTANTIATE_TEST_SUITE_P(All, Hostile, ::testing::ValuesIn(groups()),
                         [](const auto& entry) { return test_name(entry.param.name); });

// A table that became empty would still pass. (The test of a group counts what came of its probes.)
TEST(HostileTables, AreFull) {
  std::map<Expect, int> count;
  int probes = 0;
  bool all_built = true;
  for (const Group& group : groups()) {
    all_built = all_built && built(group);
    if (!built(group)) continue;
    std::set<std::string> names;
    for (const Probe& probe : group.make().probes) {
      ++count[probe.expect];
      ++probes;
      EXPECT_TRUE(names.insert(probe.name).second) << group.name << "/" << probe.name << " is there twice";
    }
  }
  std::printf("%d probes in %zu groups: %d must be refused, %d must be done, the others may be either\n", probes,
              groups().size(), count[Expect::kRefused], count[Expect::kAccepted]);
  if (!all_built) GTEST_SKIP() << "this build leaves out modes";
  EXPECT_GE(probes, 12000);
  EXPECT_GE(count[Expect::kRefused], 5500);
  EXPECT_GE(count[Expect::kAccepted], 850);
}

// --probe and --list.
void run_by_name(const std::string& wanted, bool only_list) {
  for (const Group& group : groups()) {
    const std::string prefix = group.name + "/";
    if (!built(group) || (!wanted.starts_with(prefix) && !prefix.starts_with(wanted))) continue;
    Call call = group.make();
    for (const Probe& probe : call.probes) {
      const std::string name = prefix + probe.name;
      if (!name.starts_with(wanted)) continue;
      if (only_list) {
        std::printf("%s\n", name.c_str());
        continue;
      }
      const Outcome outcome = run_probe(call, probe);
      const char* const kinds[] = {"refused", "accepted", "FAILED"};
      std::printf("%s  %s  %s\n", kinds[outcome.kind], name.c_str(), outcome.text.c_str());
    }
  }
}

}  // namespace
}  // namespace quire::testing

int main(int argc, char** argv) {
  omp_set_num_threads(1);  // a process that forks must not have started threads
  ::testing::InitGoogleTest(&argc, argv);
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--list" || argument.starts_with("--probe=")) {
      quire::testing::run_by_name(argument == "--list" ? "" : argument.substr(8), argument == "--list");
      return 0;
    }
  }
  return RUN_ALL_TESTS();
}
