// Access to tensors in a kernel: dispatch on dtype, raw pointers, loops on torch's thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "simd.h"

namespace Q3N_LEVEL {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws unless the condition holds; the parts are the whole message.
template <class... Parts>
inline void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Bool:
      return "torch.bool";
    default:
      return "of another dtype";
  }
}

// Calls f with a value of the tensor's element type.
template <class F>
inline void with_dtype(const Tensor& t, F&& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(bf16{});
    case ScalarType::Half:
      return f(fp16{});
    default:
      check(false, "values are ", dtype_name(t.scalar_type()),
            ": use float32, bfloat16 or float16");
  }
}

// The same for activations, where other dtypes run at the level below: see Q3N_OP_OF_ACTIVATIONS.
template <class F>
inline void with_activations(const Tensor& x, F&& f) {
#if defined(__AVX512BF16__)
  const ScalarType dtype = x.scalar_type();
  check(dtype == ScalarType::BFloat16, "activations are ", dtype_name(dtype),
        ", not torch.bfloat16");
  f(bf16{});
#else
  with_dtype(x, f);
#endif
}

// Calls f with a value of the parameter's element type: fp32, or the activations' type T.
template <class T, class F>
inline void with_parameter(const Tensor& parameter, F&& f) {
  if (parameter.scalar_type() == ScalarType::Float) return f(float{});
  f(T{});
}

// Calls f with a value of x's element type and one of the weight's.
template <class F>
inline void with_dtypes(const Tensor& x, const Tensor& weight, F&& f) {
  with_activations(
      x, [&]<class T>(T value) { with_parameter<T>(weight, [&](auto w) { f(value, w); }); });
}

template <class T>
inline const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
inline T* write(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// A contiguous tensor without values, of x's dtype or another. torch::stable::new_empty looks its
// operator up by name and boxes the arguments, which takes about a microsecond longer.
inline Tensor empty_as(const Tensor& x, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int32_t as_int = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  // torch's C functions keep the reason, which is memory for sizes that were checked.
  const bool failed = aoti_torch_aten_new_empty(x.get(), sizes.begin(), sizes.size(), &as_int,
                                                nullptr, nullptr, 0, nullptr, &handle);
  if (failed) {
    int64_t elements = 1;
    for (int64_t size : sizes) elements *= size;
    check(false, "can't allocate memory for ", elements, " values of ", dtype_name(dtype));
  }
  return Tensor(handle);
}

inline Tensor empty_as(const Tensor& x, std::initializer_list<int64_t> sizes) {
  return empty_as(x, sizes, x.scalar_type());
}

// Calls [next, end) of a thread's share, which no thread has taken.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

// Calls f(i) for i in [0, n). Each thread has a share of the calls, takes some at a time, and then
// helps a few others: all would wait for a thread that another process interrupts, or whose core is
// slower.
template <class Mode, class F>
inline void parallel_in(int64_t n, int64_t grain, F&& f) {
  constexpr int64_t kPieces = 16;  // of a share
  constexpr int64_t kHelped = 4;   // to look at a share takes longer the more threads do
  if (n == 0) return;
  const int64_t most = (n + grain - 1) / grain;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), most);
  const int64_t piece = std::max<int64_t>(n / (threads * kPieces), 1);
  std::vector<Share> shares(threads);
  for (int64_t t = 0; t < threads; ++t) {
    shares[t].next = n * t / threads, shares[t].end = n * (t + 1) / threads;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const Mode guard;
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t other = 0; other < std::min(threads, 1 + kHelped); ++other) {
        Share& share = shares[(t + other) % threads];
        for (int64_t i; (i = share.next.fetch_add(piece)) < share.end;) {
          for (const int64_t last = std::min(i + piece, share.end); i < last; ++i) f(i);
        }
      }
    }
  });
}

// The grain of n calls that together read so many bytes of weights, for so many tokens: all n if
// one thread reads them in less time than others take to start. Up to 16 tokens take about as long
// as one.
inline int64_t grain(int64_t n, int64_t bytes, int64_t tokens) {
  constexpr int64_t kStart = 1 << 19, kFewTokens = 16;
  return bytes * (1 + (tokens - 1) / kFewTokens) <= kStart ? n : 1;
}

// Rows of so many elements that a thread takes at least: about 16,384 elements pay for its start.
inline int64_t grain_of(int64_t elements) { return 1 + 16384 / (elements + 1); }

// Calls f(i) for i in [0, n), at least `grain` calls on each thread, with denormals flushed to
// zero: decays over many tokens produce many of them, and arithmetic on a denormal is far slower.
template <class F>
inline void parallel(int64_t n, int64_t grain, F&& f) {
  parallel_in<FlushDenormals>(n, grain, f);
}

// The same, with denormals as numbers.
template <class F>
inline void parallel_with_denormals(int64_t n, int64_t grain, F&& f) {
  parallel_in<KeepDenormals>(n, grain, f);
}

}  // namespace Q3N_LEVEL
