// Making tensors and views of them. None of it touches memory, so none of it is queued.
#include "tensors.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/is_set_to_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <torch/library.h>

namespace sim {
namespace {

char* first_byte(const at::Tensor& tensor) {
  auto* storage = static_cast<char*>(const_cast<void*>(tensor.storage().data()));
  return storage + tensor.storage_offset() * static_cast<int64_t>(tensor.element_size());
}

c10::Allocator* allocator() { return c10::GetAllocator(kDeviceType); }
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

}  // namespace

Span span_of(const at::Tensor& tensor, bool write) {
  char* begin = first_byte(tensor);
  if (tensor.numel() == 0) return {begin, begin, write};
  int64_t elements = 1;
  for (int64_t d = 0; d < tensor.dim(); ++d) elements += (tensor.size(d) - 1) * tensor.stride(d);
  return {begin, begin + elements * static_cast<int64_t>(tensor.element_size()), write};
}

at::Tensor as_cpu(const at::Tensor& tensor) {
  at::Tensor seen = at::from_blob(first_byte(tensor), tensor.sizes(), tensor.strides(),
                                  at::TensorOptions().dtype(tensor.scalar_type()));
  seen._set_conj(tensor.is_conj());
  seen._set_neg(tensor.is_neg());
  return seen;
}

at::Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides, c10::ScalarType dtype) {
  return at::detail::empty_strided_generic(sizes, strides, allocator(), kKeys, dtype);
}

namespace {

at::Tensor make_empty(c10::IntArrayRef sizes, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                      std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(sizes, allocator(), kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor make_empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<c10::ScalarType> dtype,
                              std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  return empty_strided(sizes, strides, c10::dtype_or_default(dtype));
}

at::Tensor as_strided(const at::Tensor& tensor, c10::IntArrayRef sizes, c10::IntArrayRef strides,
                      std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(tensor, sizes, strides, offset);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &make_empty);
  library.impl("empty_strided", &make_empty_strided);
  library.impl("as_strided", &as_strided);
  library.impl("view", &at::native::view);
  library.impl("_reshape_alias", &at::native::_reshape_alias);
  library.impl("unfold", &at::native::unfold);
  library.impl("view_as_real", &at::native::view_as_real);
  library.impl("view_as_complex", &at::native::view_as_complex);
  library.impl("resize_", &at::native::resize_);
  library.impl("is_set_to", &at::native::is_set_to);
  library.impl("set_.source_Tensor", &at::native::set_tensor_);
  library.impl("set_.source_Storage", static_cast<at::Tensor& (*)(at::Tensor&, at::Storage)>(&at::native::set_));
  library.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
}

}  // namespace
}  // namespace sim
