#include <numeric>

#include "ops.h"
#include "products.h"

namespace Q3N_LEVEL {
namespace {

constexpr int64_t kRows = 256;  // of x that one task multiplies a panel with

// The panel from this tile on; the last tile again beyond the end.
Tiles panel_tiles(const Packed& w, int64_t first_tile) {
  Tiles tiles;
  for (int p = 0; p < kPanelTiles; ++p) tiles[p] = std::min(first_tile + p, w.tiles - 1);
  return tiles;
}

// out [M, N], rows [begin, end) and the columns of a panel, from `terms` totals for each row.
template <class T>
void write_panel(T* out, const Packed& w, const float* totals, int64_t terms, int64_t first_tile,
                 int64_t begin, int64_t end) {
  const int64_t column = first_tile * kTileWidth, width = std::min(kPanelWidth, w.N - column);
  for (int64_t m = begin; m < end; ++m) {
    const float* total = totals + (m - begin) * terms * kPanelWidth;
    for_vectors(width, [&](int64_t i, int64_t lanes) {
      f32v sum = load(total + i);
      for (int64_t term = 1; term < terms; ++term) sum += load(total + term * kPanelWidth + i);
      store(out + m * w.N + column + i, sum, lanes);
    });
  }
}

// Calls f(first tile of a panel, begin, end) for the panels and at most kRows rows.
template <class F>
void for_panels(const Packed& w, int64_t M, F&& f) {
  const int64_t panels = (w.tiles + kPanelTiles - 1) / kPanelTiles;
  parallel_with_denormals(panels * ((M + kRows - 1) / kRows), 1, [&](int64_t i) {
    const int64_t begin = i / panels * kRows;
    f(i % panels * kPanelTiles, begin, std::min(begin + kRows, M));
  });
}

template <class T>
void multiply_rows(T* out, const T* x, int64_t M, int64_t stride, const Packed& w) {
  std::vector<int64_t> rows(M);
  std::iota(rows.begin(), rows.end(), 0);
  const Products products(w, x, M, stride, rows, {0, M});
  for_panels(w, M, [&](int64_t tile, int64_t begin, int64_t end) {
    thread_local std::vector<float> totals;
    totals.resize(kRows * products.terms * kPanelWidth);
    products.multiply(totals.data(), panel_tiles(w, tile), begin, end - begin);
    write_panel(out, w, totals.data(), products.terms, tile, begin, end);
  });
}

Tensor linear(Tensor x, Tensor packed, Tensor scale, std::optional<Tensor> zero, int64_t format,
              int64_t group, int64_t N) {
  const int64_t M = x.size(0), K = x.size(1);
  const Packed w(packed, scale, zero, format, N, K, group);
  Tensor out = torch::stable::new_empty(x, {M, N});
  with_dtype(x, [&]<class T>(T) { multiply_rows(write<T>(out), read<T>(x), M, x.stride(0), w); });
  return out;
}

}  // namespace
}  // namespace Q3N_LEVEL

Q3N_OP(linear)
