// Runs every test on the GPU, those of tests/ops included. Without a device it runs none and prints the driver's
// reason.
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
  // The ops are set before the parameters of the suites are made. 16-bit queries are the ones that tensor cores serve.
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
