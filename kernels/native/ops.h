// One instruction set's implementations of the native ops, in the form that torch calls them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
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

// Whether packed weights may be multiplied by AMX. Their code is compiled at level avx512bf16,
// which level amx uses.
namespace native {
extern std::atomic<bool> use_amx;
}

namespace Q3N_LEVEL {

#define OP(name, schema) void name##_op(StableIValue* stack, uint64_t inputs, uint64_t outputs);
#include "ops.def"
#undef OP

inline bool first_is_bf16(const StableIValue* stack) {
  int32_t dtype = 0;
  const auto tensor = torch::stable::detail::to<AtenTensorHandle>(stack[0]);
  return aoti_torch_get_dtype(tensor, &dtype) == AOTI_TORCH_SUCCESS &&
         dtype == aoti_torch_dtype_bfloat16();
}

}  // namespace Q3N_LEVEL

// Implements an op of ops.def with the function of that name in Q3N_LEVEL. Last line of a cpu.cpp.
// Without it the library does not link; without the line in ops.def this does not compile.
#define Q3N_OP(name)                                                                  \
  void Q3N_LEVEL::name##_op(StableIValue* stack, uint64_t inputs, uint64_t outputs) { \
    TORCH_BOX (&name)(stack, inputs, outputs);                                        \
  }

// The same for an op that calls with_activations on its first argument. At level avx512bf16 it is
// called with bf16 only; other dtypes would get the code of avx512, and so run there.
#if defined(__AVX512BF16__)
#define Q3N_OP_OF_ACTIVATIONS(name)                                                   \
  namespace avx512 {                                                                  \
  void name##_op(StableIValue* stack, uint64_t inputs, uint64_t outputs);             \
  }                                                                                   \
  void Q3N_LEVEL::name##_op(StableIValue* stack, uint64_t inputs, uint64_t outputs) { \
    if (!first_is_bf16(stack)) return avx512::name##_op(stack, inputs, outputs);      \
    TORCH_BOX (&name)(stack, inputs, outputs);                                        \
  }
#else
#define Q3N_OP_OF_ACTIVATIONS Q3N_OP
#endif
