// Torch's interfaces for a device: allocators, streams and events, hooks.
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "lock.h"
#include "tensors.h"

namespace sim {
namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::Stream;

const Device kDevice(kDeviceType, 0);

Stream as_torch(int stream) { return Stream(Stream::UNSAFE, kDevice, stream); }
int as_ours(const Stream& stream) { return static_cast<int>(stream.id()); }

void free_memory(void* begin) {
  if (!begin) return;
  Lock lock;
  simulator().free(begin);
}

int64_t free_bytes() { return simulator().device_memory_bytes - simulator().memory.device_bytes; }

at::DataPtr allocate(size_t nbytes, Kind kind, Device device) {
  Lock lock;
  TORCH_CHECK_WITH(OutOfMemoryError, kind != Kind::device || static_cast<int64_t>(nbytes) <= free_bytes(),
                   "the simulated device is out of memory: ", nbytes, " bytes are wanted, ", free_bytes(), " are free");
  void* begin = simulator().allocate(nbytes, kind, current_stream());
  return {begin, begin, &free_memory, device};
}

// ---- memory

struct DeviceAllocator final : c10::DeviceAllocator {
  at::DataPtr allocate(size_t nbytes) override { return sim::allocate(nbytes, Kind::device, kDevice); }
  at::DeleterFnPtr raw_deleter() const override { return &free_memory; }
  void copy_data(void* to, const void* from, size_t nbytes) const override { std::memcpy(to, from, nbytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr& memory, Stream stream) override {
    Lock lock;
    simulator().use_on(memory.get(), as_ours(stream));
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex) override {
    Lock lock;
    c10::CachingDeviceAllocator::DeviceStats stats;
    stats.allocated_bytes[0].current = simulator().memory.device_bytes;
    stats.allocated_bytes[0].peak = simulator().memory.device_peak_bytes;
    return stats;
  }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex) override {  // free, total
    Lock lock;
    return {static_cast<size_t>(free_bytes()), static_cast<size_t>(simulator().device_memory_bytes)};
  }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex) override {
    Lock lock;
    simulator().memory.device_peak_bytes = simulator().memory.device_bytes;
  }
} device_allocator;

struct HostAllocator final : at::HostAllocator {
  at::DataPtr allocate(size_t nbytes) override { return sim::allocate(nbytes, Kind::pinned, Device(at::kCPU)); }
  at::DeleterFnPtr raw_deleter() const override { return &free_memory; }
  void copy_data(void* to, const void* from, size_t nbytes) const override { std::memcpy(to, from, nbytes); }
  bool record_event(void* memory, void*, Stream stream) override {
    Lock lock;
    simulator().use_on(memory, as_ours(stream));
    return true;
  }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
} host_allocator;

constexpr auto PrivateUse1 = kDeviceType;
REGISTER_ALLOCATOR(PrivateUse1, &device_allocator);
REGISTER_HOST_ALLOCATOR(PrivateUse1, &host_allocator);

// ---- streams and events

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static Moment& moment_of(void* event) { return *static_cast<Moment*>(event); }

  c10::DeviceType type() const override { return kDeviceType; }
  Device exchangeDevice(Device) const override { return kDevice; }
  Device getDevice() const override { return kDevice; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  DeviceIndex deviceCount() const noexcept override { return 1; }

  Stream getStream(Device) const override { return as_torch(current_stream()); }
  Stream getDefaultStream(Device) const override { return as_torch(0); }
  Stream getStreamFromGlobalPool(Device, bool) const override {
    Lock lock;
    return as_torch(simulator().streams.next_from_pool());
  }
  Stream getNewStream(Device device, int) const override { return getStreamFromGlobalPool(device, false); }
  Stream exchangeStream(Stream stream) const override {
    return as_torch(std::exchange(current_stream(), as_ours(stream)));
  }
  bool queryStream(const Stream& stream) const override {
    Lock lock;
    return simulator().streams.poll(simulator().streams.record(as_ours(stream)));
  }
  void synchronizeStream(const Stream& stream) const override {
    Lock lock;
    simulator().drain(as_ours(stream), "stream");
  }
  void synchronizeDevice(DeviceIndex) const override {
    Lock lock;
    simulator().drain_all("device");
  }
  void recordDataPtrOnStream(const c10::DataPtr& memory, const Stream& stream) const override {
    device_allocator.recordStream(memory, stream);
  }

  void record(void** event, const Stream& stream, DeviceIndex, c10::EventFlag) const override {
    Lock lock;
    if (!*event) *event = new Moment;
    moment_of(*event) = simulator().streams.record(as_ours(stream));
  }
  void block(void* event, const Stream& stream) const override {
    Lock lock;
    if (event) simulator().streams.wait(as_ours(stream), moment_of(event));
  }
  bool queryEvent(void* event) const override {
    Lock lock;
    return !event || simulator().streams.poll(moment_of(event));
  }
  void synchronizeEvent(void* event) const override {
    Lock lock;
    if (event) simulator().host_wait(moment_of(event), "event");
  }
  void destroyEvent(void* event, DeviceIndex) const noexcept override { delete static_cast<Moment*>(event); }
  double elapsedTime(void* from, void* to, DeviceIndex) const override {  // milliseconds of the virtual clock
    return (moment_of(to).us - moment_of(from).us) / 1000;
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// ---- hooks

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  Device getDeviceFromPtr(void*) const override { return kDevice; }
  bool isPinnedPtr(const void* address) const override {
    Lock lock;
    return simulator().pinned(address);
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return &host_allocator; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const override {
    // Only operators with out= come here, with storages that hold nothing yet.
    TORCH_CHECK(storage.nbytes() == 0, "the simulated device does not resize a storage that holds something");
    storage.set_data_ptr(device_allocator.allocate(nbytes));
    storage.set_nbytes(nbytes);
  }
};

const bool hooks_are_registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

}  // namespace
}  // namespace sim
