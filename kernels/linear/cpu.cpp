#include <array>

#include "ops.h"
#include "packed_gemm.h"
#include "parts.h"

namespace Q3N_LEVEL {
namespace {

constexpr int64_t kTasks = 4;    // per thread, at least, if there are enough tiles
constexpr int64_t kWritten = 8;  // tokens written at once: more touch too many pages

// The tile that starts at this panel; beyond the end the last panel is repeated.
Panels tile_panels(const PackedWeight& w, int64_t first_panel) {
  Panels panels;
  for (int p = 0; p < kTilePanels; ++p) panels[p] = std::min(first_panel + p, w.panels - 1);
  return panels;
}

// Writes a tile's columns of out [M, N] for tokens [begin, end): each output sums `terms` totals.
template <class Out>
void write_tile(Out* out, const PackedWeight& w, const float* totals, int64_t terms,
                int64_t first_panel, int64_t begin, int64_t end) {
  const int64_t column = first_panel * kPanelWidth, width = std::min(kNR, w.N - column);
  for (int64_t m = begin; m < end; ++m) {
    const float* total = totals + (m - begin) * terms * kNR;
    for_vectors(width, [&](int64_t i, int64_t lanes) {
      f32v sum = load(total + i);
      for (int64_t term = 1; term < terms; ++term) sum += load(total + term * kNR + i);
      store(out + m * w.N + column + i, sum, lanes);
    });
  }
}

// A task multiplies up to nc tiles of columns; fewer, if threads would get fewer than kTasks tasks.
template <class T, class Out>
void multiply(Out* out, const T* x, int64_t M, int64_t stride, const PackedWeight& w) {
  const PackedGemm gemm(w, x, M, stride);
  const PackedA packed_x = gemm.pack_a(all_tokens(M), std::array{int64_t{0}, M});
  const int64_t tiles = (w.panels + kTilePanels - 1) / kTilePanels;
  const int64_t runs = (M + gemm.mc - 1) / gemm.mc;
  const int64_t share = tiles * runs / (torch::stable::get_num_threads() * kTasks);
  const int64_t nc = std::clamp<int64_t>(share, 1, gemm.nc);
  const int64_t groups = (tiles + nc - 1) / nc;
  const int64_t tasks = groups * runs, bytes = w.panels * w.panel_bytes;
  parallel_with_denormals(tasks, grain(tasks, bytes, M), [&](int64_t i) {
    const int64_t first = i % groups * nc, last = std::min(first + nc, tiles);
    const int64_t begin = i / groups * gemm.mc;
    const int64_t end = std::min(begin + gemm.mc, M);
    const int64_t size = (end - begin) * gemm.terms * kNR;
    thread_local std::vector<Panels> panels;
    panels.clear();
    for (int64_t q = first; q < last; ++q) panels.push_back(tile_panels(w, q * kTilePanels));
    thread_local std::vector<float> totals;
    totals.resize(nc * size);
    const Panels next = tile_panels(w, std::min(last, tiles - 1) * kTilePanels);
    gemm.multiply(totals.data(), panels, next, packed_x, begin, end - begin);
    for (int64_t m = begin; m < end; m += kWritten) {
      for (int64_t q = first; q < last; ++q) {
        const int64_t token = (m - begin) * gemm.terms * kNR;
        write_tile(out, w, totals.data() + (q - first) * size + token, gemm.terms, q * kTilePanels,
                   m, std::min(m + kWritten, end));
      }
    }
  });
}

}  // namespace

Tensor linear(Tensor x, Tensor packed, Tensor scale, std::optional<Tensor> zero, int64_t encoding,
              int64_t group, int64_t N, bool fp32) {
  const int64_t M = x.size(0), K = x.size(1);
  const PackedWeight w(packed, scale, zero, encoding, N, K, group);
  const ScalarType dtype = fp32 ? ScalarType::Float : x.scalar_type();
  Tensor out = empty_as(x, {M, N}, dtype);
  with_dtype(x, [&]<class T>(T) {
    if (fp32) return multiply(write<float>(out), read<T>(x), M, x.stride(0), w);
    multiply(write<T>(out), read<T>(x), M, x.stride(0), w);
  });
  return out;
}

}  // namespace Q3N_LEVEL

Q3N_OP(linear)
