// What torch asks of a CUDA device besides kernels: which device and stream is current, events, and whether there is one.
//
// It answers for one device that does nothing. With it torch's fake tensors can be on "cuda" where there is no GPU: their
// operators run without kernels, and autograd gives their backward passes a thread of the device, as on a real one.
// Streams are numbers, current by thread. Whoever waits for the device is counted.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <cstdint>

namespace {

thread_local c10::StreamId current_stream = 0;
std::atomic<c10::StreamId> streams{0};
std::atomic<std::int64_t> waits{0};

c10::Device device() {
  return c10::Device(c10::DeviceType::CUDA, 0);
}

c10::Stream stream(c10::StreamId id) {
  return c10::Stream(c10::Stream::UNSAFE, device(), id);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device getDevice() const override { return device(); }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}

  c10::Stream getStream(c10::Device) const override { return stream(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(++streams); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(++streams); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    const auto before = current_stream;
    current_stream = next.id();
    return stream(before);
  }
  bool queryStream(const c10::Stream&) const override { return true; }

  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    static int any;
    *event = &any;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}

  void synchronizeStream(const c10::Stream&) const override { ++waits; }
  void synchronizeEvent(void*) const override { ++waits; }
  void synchronizeDevice(const c10::DeviceIndex) const override { ++waits; }
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};

} // namespace

// The stream that is current in the calling thread.
extern "C" std::int64_t current_stream_id() {
  return current_stream;
}

// How often anybody has waited for the device, a stream or an event.
extern "C" std::int64_t host_waits() {
  return waits;
}

// A torch that is built for CUDA brings its own of both, which find no device here. Of guards the last one counts, so this
// is to be called once torch is imported; of hooks those of the highest priority, which torch asks for as it starts, so
// the library is to be loaded before.
extern "C" void become_the_device() {
  static const c10::impl::DeviceGuardImplRegistrar registered(c10::DeviceType::CUDA, new Guard());
}

namespace at {
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, ::Hooks)
}
