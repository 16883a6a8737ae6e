#include <array>
#include <numeric>

#include "ops.h"
#include "products.h"

namespace Q3N_LEVEL {
namespace {

constexpr int64_t kTasks = 4;    // of each thread, at least, where there are as many panels
constexpr int64_t kWritten = 8;  // rows that are written at once: more take too many pages

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

// A task multiplies a group of panels, as large as leaves each thread kTasks tasks.
template <class T>
void multiply_rows(T* out, const T* x, int64_t M, int64_t stride, const Packed& w) {
  std::vector<int64_t> rows(M);
  std::iota(rows.begin(), rows.end(), 0);
  const Products products(w, x, M, stride);
  const Gathered gathered = products.gather(rows, std::array{int64_t{0}, M});
  const int64_t panels = (w.tiles + kPanelTiles - 1) / kPanelTiles;
  const int64_t runs = (M + products.best_rows - 1) / products.best_rows;
  const int64_t share = panels * runs / (torch::stable::get_num_threads() * kTasks);
  const int64_t group = std::clamp<int64_t>(share, 1, products.group);
  const int64_t groups = (panels + group - 1) / group;
  const int64_t tasks = groups * runs, bytes = w.tiles * w.tile_bytes;
  parallel_with_denormals(tasks, grain(tasks, bytes, M), [&](int64_t i) {
    const int64_t first = i % groups * group, last = std::min(first + group, panels);
    const int64_t begin = i / groups * products.best_rows;
    const int64_t end = std::min(begin + products.best_rows, M);
    const int64_t size = (end - begin) * products.terms * kPanelWidth;
    thread_local std::vector<Tiles> tiles;
    tiles.clear();
    for (int64_t q = first; q < last; ++q) tiles.push_back(panel_tiles(w, q * kPanelTiles));
    thread_local std::vector<float> totals;
    totals.resize(group * size);
    products.multiply(totals.data(), tiles, gathered, begin, end - begin);
    for (int64_t m = begin; m < end; m += kWritten) {
      for (int64_t q = first; q < last; ++q) {
        const int64_t row = (m - begin) * products.terms * kPanelWidth;
        write_panel(out, w, totals.data() + (q - first) * size + row, products.terms,
                    q * kPanelTiles, m, std::min(m + kWritten, end));
      }
    }
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
