// Rows of x prepared for products with a packed weight, and those products, a few panels at a time.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "amx_integers.h"

namespace Q3N_LEVEL {

// Rows of x, gathered: entry i is row entries[i]. Entries are multiplied in runs: run r is
// [runs[r], runs[r + 1]).
struct Gathered {
  std::vector<int64_t> rows;  // of the activations
#if defined(Q3N_TILES)
  std::optional<TileRows> tiles;  // in place of them
  std::optional<ByteRows> bytes;  // for runs of many rows
#endif
};

template <class T>
class Products {
 public:
  // x [M, K], rows `stride` apart.
  Products(const Packed& w, const T* x, int64_t M, int64_t stride);

  // In parallel, unless the caller is.
  Gathered gather(std::span<const int64_t> entries, std::span<const int64_t> runs) const;

  // totals [panels, count, terms, kPanelWidth] = the panels' products with entries of one run.
  void multiply(float* totals, std::span<const Tiles> panels, const Gathered& x, int64_t begin,
                int64_t count) const;

  int64_t terms = 1;                   // of each entry, to be added
  int64_t best_rows = 256, group = 1;  // entries and panels that are best multiplied at once, of M

 private:
  const Packed& w_;
  const T* x_;
  const int64_t stride_;
  bool floats_by_tiles_ = false;
  Activations activations_;
};

}  // namespace Q3N_LEVEL
