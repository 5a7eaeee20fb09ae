// What copies and operators share: tensors of the device as the CPU sees them.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "simulator.h"

namespace sim {

constexpr auto kDeviceType = c10::DeviceType::PrivateUse1;

// While it lives, operators of this thread go to the kernels of the CPU or of meta tensors: queued work runs in whatever
// thread waits, inside whatever autograd, autocast or Python mode that thread is in just then. On as many processors as
// torch was told to use: a thread that was never in a parallel region would multiply matrices with others, in another
// order of sums.
class BelowEverything {
 public:
  BelowEverything() {
    static thread_local const bool told = (at::init_num_threads(), true);
    (void)told;
  }

 private:
  c10::impl::ExcludeDispatchKeyGuard guard_{
      c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset |
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot,
                           c10::DispatchKey::PythonDispatcher})};
};

inline bool on_device(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == kDeviceType; }

Span span_of(const at::Tensor& tensor, bool write);

// The same bytes as a tensor of the CPU. It keeps nothing alive: memory of the simulator stays mapped when it is freed.
at::Tensor as_cpu(const at::Tensor& tensor);

at::Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides, c10::ScalarType dtype);

}  // namespace sim
