// Tokens' positions, checked before a kernel reads their angles.
#pragma once

#include "tensor.h"

namespace Q3N_LEVEL {

// Throws unless each is a line of cos_sin. name: of one of them.
inline void check_positions(const char* name, const Tensor& positions, const Tensor& cos_sin) {
  const int64_t* position = read<int64_t>(positions);
  const int64_t length = cos_sin.size(0);
  for (int64_t t = 0; t < positions.numel(); ++t) {
    check(0 <= position[t] && position[t] < length, "token ", t, ": ", name, " ", position[t],
          " is not one of ", length, " in cos_sin");
  }
}

}  // namespace Q3N_LEVEL
