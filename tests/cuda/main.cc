// Runs every test on the GPU, those of tests/ops included; without a device none runs, and the driver's reason is
// printed.
#include "cuda/device_problem.h"
#include "support/tested_ops.h"

namespace {

class GPU : public ::testing::Environment {
  void SetUp() override {
    const quire::Status status = quire::cuda::device_available();
    if (!status.ok()) GTEST_SKIP() << status.message();
  }
};

}  // namespace

int main(int argc, char** argv) {
  namespace testing = quire::testing;
  // Before the parameters of the suites are made. A 16-bit query is what tensor cores serve.
  testing::ops = {quire::Device::cuda(),      {quire::DType::kFloat32, quire::DType::kBFloat16},
                  testing::store_on_device,   testing::attend_on_device,
                  testing::merge_on_device,   testing::hadamard_on_device,
                  testing::prepare_for_device};
  ::testing::InitGoogleTest(&argc, argv);
  ::testing::AddGlobalTestEnvironment(new GPU);
  const std::string device = quire::cuda::device_description();
  if (!device.empty()) std::printf("device: %s\n", device.c_str());
  return RUN_ALL_TESTS();
}
