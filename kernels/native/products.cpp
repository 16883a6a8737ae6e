// Compiled once for all ops on packed weights: there are many kinds of panels.
#include "products.h"

#include "panel.h"

namespace Q3N_LEVEL {

template <class T>
Products<T>::Products(const Packed& w, const T* x, int64_t M, int64_t stride)
    : w_(w), x_(x), stride_(stride) {
#if defined(Q3N_TILES)
  floats_by_tiles_ = std::is_same_v<T, bf16> && native::use_tiles && !is_integer(w.format);
#endif
  if (!floats_by_tiles_) {
    activations_ = activations(x, M, stride, w);
    terms = activations_.terms;
  }
#if defined(Q3N_TILES)
  if (floats_by_tiles_ || by_byte_tiles(w, M * terms)) {
    best_rows = 512, group = M * terms > kPairHeight ? 16 : 1;
  }
#endif
}

template <class T>
Gathered Products<T>::gather(std::span<const int64_t> entries,
                             [[maybe_unused]] std::span<const int64_t> runs) const {
  Gathered to;
#if defined(Q3N_TILES)
  if constexpr (std::is_same_v<T, bf16>) {
    if (floats_by_tiles_) {
      auto& tiles = to.tiles.emplace(entries.size(), w_.blocks * w_.block / kStepColumns, kLine);
      parallel(entries.size(), 1 + 16384 / (w_.K + 1), [&](int64_t i) {
        const auto end = std::upper_bound(runs.begin(), runs.end(), i);
        const auto row = tiles.row(end[-1], *end - end[-1], i - end[-1]);
        set_floats(row, tiles.steps, x_ + entries[i] * stride_, w_.K);
      });
      return to;
    }
  }
#endif
  to.rows.reserve(entries.size() * terms);
  for (int64_t m : entries) {
    for (int64_t term = 0; term < terms; ++term) to.rows.push_back(m * terms + term);
  }
#if defined(Q3N_TILES)
  int64_t most = 0;  // rows of a run
  std::vector<int64_t> row_runs{0};
  for (size_t r = 1; r < runs.size(); ++r) {
    most = std::max(most, (runs[r] - runs[r - 1]) * terms);
    row_runs.push_back(runs[r] * terms);
  }
  if (by_byte_tiles(w_, most)) to.bytes.emplace(w_, activations_, to.rows, row_runs);
#endif
  return to;
}

template <class T>
void Products<T>::multiply(float* totals, std::span<const Tiles> panels, const Gathered& x,
                           int64_t begin, int64_t count) const {
#if defined(Q3N_TILES)
  if (x.tiles) return Q3N_LEVEL::multiply(totals, w_, panels, *x.tiles, begin, count);
  if (x.bytes && by_byte_tiles(w_, count * terms)) {
    return Q3N_LEVEL::multiply(totals, w_, panels, *x.bytes, begin * terms, count * terms);
  }
#endif
  const int64_t* rows = x.rows.data() + begin * terms;
  w_.with_format([&]<class F>(F) {
    for (size_t q = 0; q < panels.size(); ++q) {
      Q3N_LEVEL::multiply<F>(totals + q * count * terms * kPanelWidth, w_, panels[q], activations_,
                             rows, count * terms);
    }
  });
}

template class Products<float>;
template class Products<bf16>;
template class Products<fp16>;

}  // namespace Q3N_LEVEL
