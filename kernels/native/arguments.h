// Checks of an op's arguments: those of kernels/checks.py, faster.
#pragma once

#include <initializer_list>
#include <utility>
#include <vector>

#include "tensor.h"

namespace Q3N_LEVEL {

using Sizes = std::initializer_list<int64_t>;
using Dtypes = std::initializer_list<ScalarType>;

// Values as a message lists them. Nothing is written unless there is a message.
template <class Values>
struct Listed {
  const Values& values;
  friend std::ostream& operator<<(std::ostream& to, const Listed& list) {
    const char* before = "(";
    for (int64_t value : list.values) to << std::exchange(before, ", ") << value;
    return to << ")";
  }
};

template <class Values>
Listed<Values> listed(const Values& values) {
  return {values};
}

// The same for dtypes.
struct ListedDtypes {
  Dtypes dtypes;
  friend std::ostream& operator<<(std::ostream& to, const ListedDtypes& list) {
    const char* before = "";
    for (ScalarType dtype : list.dtypes) to << std::exchange(before, ", ") << dtype_name(dtype);
    return to;
  }
};

inline const char* device_name(const Tensor& t) {
  return t.is_cpu() ? "cpu" : t.is_cuda() ? "cuda" : "another device";
}

// Throws std::invalid_argument, a ValueError in Python, which names the op and the argument.
struct Arguments {
  const char* op;

  template <class... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    std::ostringstream message;
    message << op << ": ";
    (message << ... << parts);
    throw std::invalid_argument(message.str());
  }

  template <class... Parts>
  void require(bool holds, const Parts&... parts) const {
    if (!holds) fail(parts...);
  }

  // Requires the shape, one of the dtypes, a CPU tensor, and a contiguous last dim.
  void expect(const char* name, const Tensor& t, const std::vector<int64_t>& shape,
              Dtypes dtypes) const {
    const ScalarType dtype = t.scalar_type();
    const auto sizes = t.sizes(), strides = t.strides();
    if (std::find(dtypes.begin(), dtypes.end(), dtype) == dtypes.end()) {
      fail(name, " is ", dtype_name(dtype), " on ", device_name(t), ", not ", ListedDtypes{dtypes});
    }
    require(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), name, " has shape ",
            listed(sizes), ", not ", listed(shape));
    if (!t.is_cpu()) fail(name, " is on ", device_name(t), ", not on cpu");
    require(sizes.back() <= 1 || strides.back() == 1, "the last dim of ", name,
            " is not contiguous: ", listed(strides));
  }

  // Requires so many dims.
  void expect_dims(const char* name, const Tensor& t, int64_t dims) const {
    require(t.dim() == dims, name, " has shape ", listed(t.sizes()), ", not ", dims, " dims");
  }

  // Requires `slots` contiguous slots of this shape, at any stride.
  void expect_pages(const char* name, const Tensor& t, int64_t slots, Sizes slot,
                    Dtypes dtypes) const {
    std::vector<int64_t> shape{slots};
    shape.insert(shape.end(), slot);
    expect(name, t, shape, dtypes);
    int64_t expected = 1;
    for (int64_t i = t.dim() - 1; i > 0; --i) {
      require(shape[i] <= 1 || t.stride(i) == expected, "a slot of ", name,
              " is not contiguous: ", listed(t.strides()));
      expected *= shape[i];
    }
  }

  void expect_step(const Tensor& query_start_loc, const Tensor& slot,
                   const Tensor& context_len) const {
    const int64_t N = slot.numel();
    expect("query_start_loc", query_start_loc, {N + 1}, {ScalarType::Int});
    expect("slot", slot, {N}, {ScalarType::Int});
    expect("context_len", context_len, {N}, {ScalarType::Int});
  }
};

}  // namespace Q3N_LEVEL
