// Rows of x prepared for products with a packed weight, and those products, a few panels at a time.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "amx_integers.h"

namespace Q3N_LEVEL {

// Entry i is row entries[i] of x. Entries are multiplied in runs: run r is [runs[r], runs[r + 1]).
class Products {
 public:
  // x [M, K], rows `stride` apart.
  template <class T>
  Products(const Packed& w, const T* x, int64_t M, int64_t stride,
           const std::vector<int64_t>& entries, const std::vector<int64_t>& runs);

  // totals [panels, count, terms, kPanelWidth] = the panels' products with entries of one run.
  void multiply(float* totals, std::span<const Tiles> panels, int64_t begin, int64_t count) const;

  int64_t terms = 1;                   // of each entry, to be added
  int64_t best_rows = 256, group = 1;  // entries and panels that are best multiplied at once

 private:
  const Packed& w_;
  Activations activations_;
  std::vector<int64_t> rows_;  // of the activations
#if defined(Q3N_TILES)
  std::optional<TileRows> tile_rows_;  // in place of them
  std::optional<ByteRows> byte_rows_;  // for runs of many rows
#endif
};

}  // namespace Q3N_LEVEL
