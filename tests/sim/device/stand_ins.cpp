// What accelerators have and the CPU has no kernel for, put together from what it has.
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/tanh.h>
#include <torch/library.h>

#include <tuple>

#include "operators.h"

namespace sim {
namespace {

using Bias = std::optional<at::Tensor>;

at::Tensor biased(const at::Tensor& gates, const Bias& bias) { return bias && bias->defined() ? gates + *bias : gates; }

std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell(const at::Tensor& input, const at::Tensor& hidden,
                                                         const at::Tensor& cell, const Bias& input_bias,
                                                         const Bias& hidden_bias) {
  const at::Tensor gates = biased(input, input_bias) + biased(hidden, hidden_bias);
  const auto part = gates.chunk(4, 1);  // input, forget, cell, output
  const at::Tensor next_cell = at::sigmoid(part[1]) * cell + at::sigmoid(part[0]) * at::tanh(part[2]);
  return {at::sigmoid(part[3]) * at::tanh(next_cell), next_cell, gates};
}

std::tuple<at::Tensor, at::Tensor> gru_cell(const at::Tensor& input, const at::Tensor& hidden, const at::Tensor& state,
                                            const Bias& input_bias, const Bias& hidden_bias) {
  const auto in = biased(input, input_bias).chunk(3, 1);  // reset, update, new
  const auto had = biased(hidden, hidden_bias).chunk(3, 1);
  const at::Tensor reset = at::sigmoid(in[0] + had[0]), update = at::sigmoid(in[1] + had[1]);
  const at::Tensor fresh = at::tanh(in[2] + reset * had[2]);
  return {fresh + update * (state - fresh), at::cat(std::vector<at::Tensor>{reset, update, fresh}, 1)};
}

// Torch asks foreign devices for a kernel of this name; the CPU's convolution takes the same arguments.
void convolution(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution", "");
  run_operator(op, stack);
}

// Of whole numbers, as transformers counts the tokens of each expert on an accelerator.
void histogram(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  c10::IValue& input = *(stack->end() - static_cast<int64_t>(op.schema().arguments().size()));
  const auto dtype = input.toTensor().scalar_type();
  const bool whole = c10::isIntegralType(dtype, /*includeBool=*/false);
  if (whole) input = input.toTensor().to(at::kDouble);
  run_operator(op, stack);
  if (whole) stack->back() = stack->back().toTensor().to(dtype);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution>());
  library.impl("histc", torch::CppFunction::makeFromBoxedFunction<&histogram>());
  library.impl("_thnn_fused_lstm_cell", &lstm_cell);
  library.impl("_thnn_fused_gru_cell", &gru_cell);
}

}  // namespace
}  // namespace sim
