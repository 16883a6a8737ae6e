// Compiled once for all ops on packed weights: there are many kinds of panels.
#include "products.h"

#include "panel.h"

namespace Q3N_LEVEL {

template <class T>
Products::Products(const Packed& w, const T* x, int64_t M, int64_t stride,
                   const std::vector<int64_t>& entries,
                   [[maybe_unused]] const std::vector<int64_t>& runs)
    : w_(w) {
#if defined(Q3N_TILES)
  if constexpr (std::is_same_v<T, bf16>) {
    if (native::use_tiles && !is_integer(w.format)) {
      tile_rows_.emplace(entries.size(), w.blocks * w.block / kStepColumns, kLine);
      best_rows = 512, group = M > kPairHeight ? 16 : 1;
      parallel(entries.size(), 1 + 16384 / (w.K + 1), [&](int64_t i) {
        const auto end = std::upper_bound(runs.begin(), runs.end(), i);
        const auto row = tile_rows_->row(end[-1], *end - end[-1], i - end[-1]);
        set_floats(row, tile_rows_->steps, x + entries[i] * stride, w.K);
      });
      return;
    }
  }
#endif
  activations_ = activations(x, M, stride, w);
  terms = activations_.terms;
  rows_.reserve(entries.size() * terms);
  for (int64_t m : entries) {
    for (int64_t term = 0; term < terms; ++term) rows_.push_back(m * terms + term);
  }
#if defined(Q3N_TILES)
  int64_t most = 0;  // rows of a run
  std::vector<int64_t> row_runs{0};
  for (size_t r = 1; r < runs.size(); ++r) {
    most = std::max(most, (runs[r] - runs[r - 1]) * terms);
    row_runs.push_back(runs[r] * terms);
  }
  if (by_byte_tiles(w, most)) {
    byte_rows_.emplace(w, activations_, rows_, row_runs);
    best_rows = 512, group = most > kPairHeight ? 16 : 1;
  }
#endif
}

template Products::Products(const Packed&, const float*, int64_t, int64_t,
                            const std::vector<int64_t>&, const std::vector<int64_t>&);
template Products::Products(const Packed&, const bf16*, int64_t, int64_t,
                            const std::vector<int64_t>&, const std::vector<int64_t>&);
template Products::Products(const Packed&, const fp16*, int64_t, int64_t,
                            const std::vector<int64_t>&, const std::vector<int64_t>&);

void Products::multiply(float* totals, std::span<const Tiles> panels, int64_t begin,
                        int64_t count) const {
#if defined(Q3N_TILES)
  if (tile_rows_) return Q3N_LEVEL::multiply(totals, w_, panels, *tile_rows_, begin, count);
#endif
#if defined(Q3N_TILES)
  if (byte_rows_ && by_byte_tiles(w_, count * terms)) {
    return Q3N_LEVEL::multiply(totals, w_, panels, *byte_rows_, begin * terms, count * terms);
  }
#endif
  const int64_t* rows = rows_.data() + begin * terms;
  w_.with_format([&]<class F>(F) {
    for (size_t q = 0; q < panels.size(); ++q) {
      Q3N_LEVEL::multiply<F>(totals + q * count * terms * kPanelWidth, w_, panels[q], activations_,
                             rows, count * terms);
    }
  });
}

}  // namespace Q3N_LEVEL
