// A CUDA device that computes nothing, for a CPU build of torch. With this library, the autograd engine can run the
// backward pass of fake CUDA tensors: the engine asks the device for the number of devices, the current device and its
// streams. There is one device, which has one stream, and events are always complete.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <new>

namespace {

constexpr auto kind = c10::DeviceType::CUDA;
const c10::Device only(kind, 0);
const c10::Stream stream(c10::Stream::DEFAULT, only);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kind> {
  c10::Device exchangeDevice(c10::Device) const override { return only; }
  c10::Device getDevice() const override { return only; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream; }
  c10::Stream getDefaultStream(c10::Device) const override { return stream; }
  c10::Stream getNewStream(c10::Device, int) const override { return stream; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
};

// torch makes its own hooks for CUDA once, when it is imported. Those of a CPU build find no device. Neither class has
// data members, so an object of this class replaces them at the same address.
static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
const bool replaced = [] {
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks({});
  return true;
}();

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard)
