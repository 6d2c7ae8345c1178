// A build of torch for CPUs refuses tensors that say `cuda`: it knows no such device. This says that
// there is one, and does nothing on it. It is loaded before torch; tests/fake_cuda.py does the rest.
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

const Device GPU(DeviceType::CUDA, 0);
const Stream DEFAULT(Stream::DEFAULT, GPU);

struct Guard final : public c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return GPU; }
  Device exchangeDevice(Device) const override { return GPU; }
  Stream getStream(Device) const noexcept override { return DEFAULT; }
  Stream exchangeStream(Stream) const noexcept override { return DEFAULT; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct CUDAHooks final : public at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

namespace at::accelerator {
std::optional<DeviceType> getAccelerator(bool) { return DeviceType::CUDA; }
bool isAccelerator(DeviceType type) { return type == DeviceType::CUDA; }
}
