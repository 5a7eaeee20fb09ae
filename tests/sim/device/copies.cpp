// Copies between host and device, with the rules of CUDA about which of them the host waits for.
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/resize_native.h>
#include <torch/library.h>

#include "lock.h"
#include "tensors.h"

namespace sim {
namespace {

enum Link { kToDevice = 0, kToHost = 1 };

uint64_t hash(const Span& span) {
  uint64_t value = 0xcbf29ce484222325ull;  // FNV-1a
  for (const char* byte = span.begin; byte < span.end; ++byte)
    value = (value ^ static_cast<unsigned char>(*byte)) * 0x100000001b3ull;
  return value;
}

struct Copy {
  at::Tensor from, to;  // as the caller gave them
  bool non_blocking;
  int stream = current_stream();

  at::Tensor& host_side() { return from.is_cpu() ? from : to; }
  bool pinned() { return simulator().pinned(host_side().storage().data()); }
  double us() const { return static_cast<double>(to.nbytes()) / simulator().costs.bytes_per_us; }

  // A transfer is asynchronous from and to pinned memory only, and only if it is one piece; anything else goes through a
  // pageable temporary of the driver or of torch, and the host waits.
  bool asynchronous() { return non_blocking && pinned() && (host_side().is_contiguous() || laid_out_alike()); }
  bool laid_out_alike() const {
    return from.scalar_type() == to.scalar_type() && from.strides() == to.strides() && to.is_non_overlapping_and_dense();
  }

  void complain_if_it_blocks(const char* direction) {
    if (!non_blocking || asynchronous() || to.numel() <= 1) return;
    simulator().find("not pinned", "a non-blocking copy of " + std::to_string(to.nbytes()) + " bytes " + direction +
                                       " memory that is not pinned, or not one piece, blocks the host");
  }

  void to_device();
  void to_host();
  void on_device();
};

void Copy::to_device() {
  complain_if_it_blocks("from");
  if (!asynchronous()) {
    at::Tensor staged = from.clone();
    simulator().submit(stream, "copy to the device", {span_of(to, true)}, {us(), kToDevice},
                       [staged, to = as_cpu(to)]() mutable {
                         BelowEverything guard;
                         to.copy_(staged);
                       });
    return simulator().drain(stream, "copy to the device");
  }
  const Span source = span_of(from, false);
  simulator().use_on(source.begin, stream);
  simulator().counters["asynchronous bytes to the device"] += static_cast<int64_t>(to.nbytes());
  simulator().submit(stream, "copy to the device", {source, span_of(to, true)}, {us(), kToDevice},
                     [source, before = hash(source), from = as_cpu(from), to = as_cpu(to)]() mutable {
                       if (hash(source) != before)
                         simulator().find("overwritten", "the pinned source of an asynchronous copy of " +
                                                             std::to_string(source.end - source.begin) +
                                                             " bytes was changed before the copy ran");
                       BelowEverything guard;
                       to.copy_(from);
                     });
}

void Copy::to_host() {
  complain_if_it_blocks("to");
  const Span target = span_of(to, true);
  if (pinned()) simulator().use_on(target.begin, stream);
  if (asynchronous()) poison(target.begin, target.end - target.begin);  // whoever reads it too early gets NaN
  simulator().submit(stream, "copy to the host", {span_of(from, false), target}, {us(), kToHost},
                     [from = as_cpu(from), to = as_cpu(to)]() mutable {
                       BelowEverything guard;
                       to.copy_(from);
                     });
  if (!asynchronous()) simulator().drain(stream, "copy to the host");
}

void Copy::on_device() {
  constexpr double device_is_faster = 10;
  simulator().submit(stream, "copy", {span_of(from, false), span_of(to, true)}, {us() / device_is_faster},
                     [from = as_cpu(from), to = as_cpu(to)]() mutable {
                       BelowEverything guard;
                       to.copy_(from);
                     });
}

// ---- what torch calls

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  Lock lock;
  BelowEverything guard;
  Copy copy{from.sizes() == to.sizes() ? from : from.expand(to.sizes()), to, non_blocking};
  if (to.numel() == 0) return to;
  if (from.is_cpu()) copy.to_device();
  else if (to.is_cpu()) copy.to_host();
  else copy.on_device();
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) at::native::resize_(to, from.sizes());
  return copy_from(from, to, false);
}

at::Scalar item(const at::Tensor& tensor) {
  Lock lock;
  simulator().submit(current_stream(), "item", {span_of(tensor, false)}, {}, [] {});
  simulator().drain(current_stream(), "item");
  return at::native::_local_scalar_dense_cpu(as_cpu(tensor));
}

void record_stream(at::Tensor& tensor, c10::Stream stream) {
  Lock lock;
  simulator().use_on(tensor.storage().mutable_data(), static_cast<int>(stream.id()));
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &item);
  library.impl("record_stream", &record_stream);
}

// A copy resolves these bits itself; torch's own way to resolve them is a copy.
TORCH_LIBRARY_IMPL(aten, Conjugate, library) { library.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, library) { library.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

}  // namespace
}  // namespace sim
