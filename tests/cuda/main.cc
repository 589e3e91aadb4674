// Runs every test on the GPU, those of tests/ops included; without a device none runs, and the driver's reason is
// printed.
#include "cuda/device_problem.h"

namespace {

class Device : public ::testing::Environment {
  void SetUp() override {
    const quire::Status status = quire::cuda::device_available();
    if (!status.ok()) GTEST_SKIP() << status.message();
    quire::testing::AttentionCase::run_elsewhere = quire::testing::attend_on_device;
  }
};

}  // namespace

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  ::testing::AddGlobalTestEnvironment(new Device);
  const std::string device = quire::cuda::device_description();
  if (!device.empty()) std::printf("device: %s\n", device.c_str());
  return RUN_ALL_TESTS();
}
