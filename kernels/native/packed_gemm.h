// C = A W^T with a packed weight, in three steps: convert x, pack A, multiply a few tiles of W.
#pragma once

#include <numeric>
#include <optional>
#include <span>
#include <vector>

#include "amx_bytes.h"
#include "amx_fp8.h"

namespace Q3N_LEVEL {

// A: tokens of x in the order of `pack_a`, in the form that the micro-kernel reads.
struct PackedA {
  std::vector<int64_t> terms;  // vector kernels: indices into Activations
#if defined(Q3N_AMX)
  std::optional<AmxPanels> panels;     // AMX, bf16: instead of terms
  std::optional<AmxBytePanels> bytes;  // AMX, int8 and int4: runs of many terms
#endif
};

inline std::vector<int64_t> all_tokens(int64_t count) {
  std::vector<int64_t> tokens(count);
  std::iota(tokens.begin(), tokens.end(), 0);
  return tokens;
}

template <class T>
class PackedGemm {
 public:
  // x [M, K], tokens `stride` apart.
  PackedGemm(const PackedWeight& w, const T* x, int64_t M, int64_t stride);

  // Packs these tokens of x, in parallel unless the caller is. Run r, one expert's tokens for
  // example, is [runs[r], runs[r + 1]); `multiply` takes tokens of one run.
  PackedA pack_a(std::span<const int64_t> tokens, std::span<const int64_t> runs) const;

  // totals [tiles, count, terms, kNR] = these tiles of W times tokens [begin, begin + count) of x.
  // `next`: the tile that this thread multiplies then, whose first lines are prefetched.
  void multiply(float* totals, std::span<const Panels> tiles, const Panels& next, const PackedA& x,
                int64_t begin, int64_t count) const;

  int64_t terms = 1;         // of a token: the caller adds their totals
  int64_t mc = 256, nc = 1;  // tokens, and tiles, that a task should multiply at once

 private:
  const PackedWeight& w_;
  const T* x_;
  const int64_t stride_;
  bool amx_bf16_ = false;
  Activations activations_;
};

}  // namespace Q3N_LEVEL
