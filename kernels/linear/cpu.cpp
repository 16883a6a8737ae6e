#include <numeric>

#include "ops.h"
#include "panel.h"

namespace Q3N_LEVEL {
namespace {

constexpr int64_t kRows = 256;  // of x that one task multiplies a panel with

// out [M, N], rows [begin, end) and the columns of a panel.
template <class F, class T>
void panel(T* out, const Packed& w, const Activations& a, const std::vector<int64_t>& rows,
           int64_t first_tile, int64_t begin, int64_t end) {
  Tiles tiles;
  for (int p = 0; p < kPanelTiles; ++p) tiles[p] = std::min(first_tile + p, w.tiles - 1);
  std::vector<float> totals((end - begin) * a.terms * kPanelWidth);
  multiply<F>(totals.data(), w, tiles, a, rows.data() + begin * a.terms, (end - begin) * a.terms);
  const int64_t column = first_tile * kTileWidth, width = std::min(kPanelWidth, w.N - column);
  for (int64_t m = begin; m < end; ++m) {
    const float* total = totals.data() + (m - begin) * a.terms * kPanelWidth;
    for_vectors(width, [&](int64_t i, int64_t lanes) {
      f32v sum = load(total + i);
      for (int64_t term = 1; term < a.terms; ++term) sum += load(total + term * kPanelWidth + i);
      store(out + m * w.N + column + i, sum, lanes);
    });
  }
}

Tensor linear(Tensor x, Tensor packed, Tensor scale, std::optional<Tensor> zero, int64_t format,
              int64_t group, int64_t N) {
  const int64_t M = x.size(0), K = x.size(1);
  const Packed w(packed, scale, zero, format, N, K, group);
  Tensor out = torch::stable::new_empty(x, {M, N});
  const int64_t panels = (w.tiles + kPanelTiles - 1) / kPanelTiles;
  const int64_t parts = (M + kRows - 1) / kRows;
  with_dtype(x, [&]<class T>(T) {
    const Activations a = activations(read<T>(x), M, x.stride(0), w);
    std::vector<int64_t> rows(M * a.terms);
    std::iota(rows.begin(), rows.end(), 0);
    w.with_format([&]<class F>(F) {
      parallel_with_denormals(panels * parts, 1, [&](int64_t i) {
        const int64_t begin = i / panels * kRows;
        panel<F>(write<T>(out), w, a, rows, i % panels * kPanelTiles, begin,
                 std::min(begin + kRows, M));
      });
    });
  });
  return out;
}

}  // namespace
}  // namespace Q3N_LEVEL

Q3N_OP(linear)
