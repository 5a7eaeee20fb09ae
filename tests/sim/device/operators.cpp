// Every other operator: run by the CPU's kernel when the schedule says so, its output's shape found beforehand with
// meta tensors. An operator whose output depends on values makes the host wait, as on a real device.
#include "operators.h"

#include <ATen/ops/empty_strided.h>
#include <ATen/ops/resize_native.h>
#include <torch/library.h>

#include <optional>

#include "lock.h"
#include "tensors.h"

namespace sim {
namespace {

using c10::IValue;
using torch::jit::Stack;

// Applies `change` to every defined tensor in an argument or a result.
template <class Change>
IValue map_tensors(const IValue& value, Change change) {
  if (value.isTensor()) return value.toTensor().defined() ? IValue(change(value.toTensor())) : value;
  if (value.isTensorList()) {
    c10::List<at::Tensor> changed;
    for (const at::Tensor& tensor : value.toTensorVector()) changed.push_back(change(tensor));
    return changed;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> changed;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector())
      changed.push_back(tensor ? std::optional(change(*tensor)) : std::nullopt);
    return changed;
  }
  return value;
}

IValue with_device(const IValue& value, c10::DeviceType type) {
  return value.isDevice() && value.toDevice().type() == kDeviceType ? IValue(c10::Device(type)) : value;
}

bool writes(const c10::Argument& argument) { return argument.alias_info() && argument.alias_info()->isWrite(); }

// One call of an operator. `infer` may run Python and wants no lock; all else wants it.
class Call {
 public:
  Call(const c10::OperatorHandle& op, const Stack& arguments) : op_(op), schema_(op.schema()), arguments_(arguments) {}

  void infer();
  void bind();
  Stack queue();
  Stack run_now();
  bool waits() const { return waits_; }

 private:
  const IValue& argument_that_is(const c10::Argument& result) const;
  at::Tensor bind_tensor(const at::Tensor& tensor, bool write);
  at::Tensor fresh(const at::Tensor& like);
  bool chance_or_value() const;
  bool writes_only() const;

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  Stack arguments_;
  Stack inferred_;             // results as meta tensors; empty when nothing is to be inferred
  Stack bound_;                // arguments as the CPU sees them
  std::vector<Span> spans_;
  bool waits_ = false;         // its output's shape depends on values, or it returns a value
};

// Random numbers are drawn as the operator is called, so that all schedules draw the same.
bool Call::chance_or_value() const {
  for (const c10::Argument& argument : schema_.arguments())
    if (argument.type()->str().find("Generator") != std::string::npos) return true;
  for (const c10::Argument& result : schema_.returns()) {
    const auto kind = result.type()->kind();
    if (kind != c10::TypeKind::TensorType && kind != c10::TypeKind::ListType) return true;
  }
  return false;
}

// An operator in place, or with an out= that has its shape already. Nothing is to be inferred for it.
bool Call::writes_only() const {
  for (const c10::Argument& result : schema_.returns())
    if (!writes(result)) return false;
  for (size_t i = 0; i < arguments_.size(); ++i)
    if (writes(schema_.arguments()[i]) && !(arguments_[i].isTensor() && arguments_[i].toTensor().numel() > 0))
      return false;
  return true;
}

void Call::infer() {
  waits_ = chance_or_value();
  if (waits_ || writes_only()) return;
  for (const IValue& argument : arguments_)
    inferred_.push_back(with_device(map_tensors(argument, [](const at::Tensor& tensor) {
      if (tensor.is_cpu() && tensor.dim() == 0) return tensor;
      return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kMeta));
    }), at::kMeta));
  try {
    op_.callBoxed(&inferred_);
  } catch (const std::exception&) {  // no kernel for meta tensors, or an error that the CPU's kernel will raise as well
    waits_ = true;
  }
}

void Call::bind() {
  if (!waits_)
    for (size_t r = 0; r < inferred_.size(); ++r) {  // an out= that was empty
      if (!writes(schema_.returns()[r]) || !inferred_[r].isTensor()) continue;
      const at::Tensor& target = argument_that_is(schema_.returns()[r]).toTensor();
      if (target.sizes() != inferred_[r].toTensor().sizes())
        at::native::resize_(target, inferred_[r].toTensor().sizes());
    }
  for (size_t i = 0; i < arguments_.size(); ++i) {
    const bool write = writes(schema_.arguments()[i]);
    bound_.push_back(with_device(
        map_tensors(arguments_[i], [&](const at::Tensor& tensor) { return bind_tensor(tensor, write); }), at::kCPU));
  }
}

// As on CUDA, a tensor of the CPU may be a scalar or an index, nothing else.
at::Tensor Call::bind_tensor(const at::Tensor& tensor, bool write) {
  if (on_device(tensor)) {
    spans_.push_back(span_of(tensor, write));
    return as_cpu(tensor);
  }
  const bool allowed = tensor.dim() == 0 || schema_.name().find("index") != std::string::npos;
  TORCH_CHECK(allowed && !write, "expected all tensors to be on the same device, but ", schema_.name(), " got one on ",
              tensor.device(), " and others on ", c10::Device(kDeviceType, 0));
  return tensor.clone();
}

const IValue& Call::argument_that_is(const c10::Argument& result) const {
  for (size_t i = 0; i < arguments_.size(); ++i) {
    const c10::Argument& argument = schema_.arguments()[i];
    if (writes(argument) && argument.alias_info()->beforeSets() == result.alias_info()->beforeSets())
      return arguments_[i];
  }
  TORCH_CHECK(false, "the simulated device does not know which argument ", schema_.name(), " returns");
}

at::Tensor Call::fresh(const at::Tensor& like) {
  at::Tensor tensor = empty_strided(like.sizes(), like.strides(), like.scalar_type());
  spans_.push_back(span_of(tensor, true));
  return tensor;
}

Stack Call::queue() {
  Stack results;
  std::vector<at::Tensor> outputs;
  for (size_t r = 0; r < schema_.returns().size(); ++r) {
    const c10::Argument& result = schema_.returns()[r];
    TORCH_CHECK(!result.alias_info() || writes(result), "the simulated device has no kernel for ", schema_.name(),
                ", which returns a view");
    results.push_back(writes(result) ? argument_that_is(result)
                                     : map_tensors(inferred_[r], [&](const at::Tensor& like) {
                                         at::Tensor output = fresh(like);
                                         outputs.push_back(as_cpu(output));
                                         return output;
                                       }));
  }
  simulator().submit(current_stream(), schema_.name(), spans_, {simulator().costs.operator_us},
                     [op = op_, arguments = std::move(bound_), outputs = std::move(outputs)]() mutable {
    BelowEverything guard;
    op.callBoxed(&arguments);  // now it holds the results
    size_t next = 0;
    for (size_t r = 0; r < arguments.size(); ++r) {
      if (writes(op.schema().returns()[r])) continue;
      map_tensors(arguments[r], [&](const at::Tensor& computed) {
        at::Tensor& output = outputs.at(next++);
        if (r > 0 && computed.numel() == 0) return computed;  // statistics that only training needs; they stay NaN
        TORCH_CHECK(output.sizes() == computed.sizes(), op.schema().name(), " was expected to give ", output.sizes(),
                    " and gave ", computed.sizes());
        output.copy_(computed);
        return computed;
      });
    }
  });
  return results;
}

Stack Call::run_now() {
  const int stream = current_stream();
  simulator().submit(stream, schema_.name(), spans_, {simulator().costs.operator_us}, [] {});
  simulator().drain(stream, schema_.name());
  op_.callBoxed(&bound_);  // now it holds the results
  Stack results;
  spans_.clear();
  std::vector<std::pair<at::Tensor, at::Tensor>> outputs;
  for (size_t r = 0; r < schema_.returns().size(); ++r) {
    const c10::Argument& result = schema_.returns()[r];
    results.push_back(writes(result) ? argument_that_is(result)
                                     : map_tensors(bound_[r], [&](const at::Tensor& computed) {
                                         at::Tensor output = fresh(computed);
                                         outputs.emplace_back(as_cpu(output), computed);
                                         return output;
                                       }));
  }
  if (!outputs.empty())
    simulator().submit(stream, schema_.name(), spans_, {}, [outputs = std::move(outputs)]() mutable {
      BelowEverything guard;
      for (auto& [output, computed] : outputs) output.copy_(computed);
    });
  return results;
}

}  // namespace

void run_operator(const c10::OperatorHandle& op, Stack* stack) {
  BelowEverything guard;
  const size_t count = op.schema().arguments().size();
  Call call(op, Stack(stack->end() - static_cast<int64_t>(count), stack->end()));
  torch::jit::drop(*stack, count);
  call.infer();
  Lock lock;
  call.bind();
  for (IValue& result : call.waits() ? call.run_now() : call.queue()) stack->push_back(std::move(result));
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_operator>());
}

}  // namespace sim
