// One instruction set's implementations of the native ops, in the form that torch calls them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

using torch::stable::Tensor;

using Boxed = void (*)(StableIValue* stack, uint64_t inputs, uint64_t outputs);

// An instruction set: its name, and a member for each line of ops.def.
struct Level {
  const char* name;
#define OP(name, schema) Boxed name##_op;
#include "ops.def"
#undef OP
};

namespace Q3N_LEVEL {

#define OP(name, schema) void name##_op(StableIValue* stack, uint64_t inputs, uint64_t outputs);
#include "ops.def"
#undef OP

}  // namespace Q3N_LEVEL

// Implements an op of ops.def with the function of that name in Q3N_LEVEL. Last line of a cpu.cpp.
// Without it the library does not link; without the line in ops.def this does not compile.
#define Q3N_OP(name)                                                                  \
  void Q3N_LEVEL::name##_op(StableIValue* stack, uint64_t inputs, uint64_t outputs) { \
    TORCH_BOX (&name)(stack, inputs, outputs);                                        \
  }
