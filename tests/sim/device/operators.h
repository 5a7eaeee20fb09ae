// How an operator runs that has no kernel of its own here.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace sim {

void run_operator(const c10::OperatorHandle& op, torch::jit::Stack* stack);

}  // namespace sim
