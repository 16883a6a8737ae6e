#include "ops.h"
#include "panel.h"
#include "routes.h"

namespace Q3N_LEVEL {
namespace {

constexpr int64_t kRun = 128;  // inner features, or outputs, of an expert that one task computes

// Rows of the activations for entries [begin, end), whose tokens are `token`.
std::vector<int64_t> rows_of(const int64_t* token, int64_t begin, int64_t end, int64_t terms) {
  std::vector<int64_t> rows;
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t term = 0; term < terms; ++term) {
      rows.push_back((token ? token[i] : i) * terms + term);
    }
  }
  return rows;
}

// The sum of the terms of row i of `totals`, of the panel's columns from `column` on.
f32v whole(const float* totals, int64_t i, int64_t terms, int64_t column) {
  f32v sum = load(totals + i * terms * kPanelWidth + column);
  for (int64_t term = 1; term < terms; ++term) {
    sum += load(totals + (i * terms + term) * kPanelWidth + column);
  }
  return sum;
}

// h = silu(W1 x) * W3 x of inner features [c, c + kRun) of expert e's tokens. Gate and up are the
// tiles of one panel, or of two where a panel has one tile.
template <class F, class T>
void inner(T* h, const Packed& w13, const Activations& a, const Routes& routes, const Dims& d,
           int64_t e, int64_t c) {
  const int64_t begin = routes.first[e], count = routes.first[e + 1] - begin;
  const auto rows = rows_of(routes.token.data(), begin, begin + count, a.terms);
  const int64_t up_tiles = d.I / kTileWidth, size = rows.size() * kPanelWidth;
  std::vector<float> totals(2 * size);
  for (int64_t i = c; i < std::min(c + kRun, d.I); i += kTileWidth) {
    const int64_t gate_tile = e * w13.tiles + i / kTileWidth;
    const float *gate = totals.data(), *up = gate + (kPanelTiles == 1 ? size : kTileWidth);
    if constexpr (kPanelTiles == 1) {
      multiply<F>(totals.data(), w13, {gate_tile}, a, rows.data(), rows.size());
      multiply<F>(totals.data() + size, w13, {gate_tile + up_tiles}, a, rows.data(), rows.size());
    } else {
      multiply<F>(totals.data(), w13, {gate_tile, gate_tile + up_tiles}, a, rows.data(),
                  rows.size());
    }
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t lane = 0; lane < kTileWidth; lane += kLanes) {
        const f32v g = whole(gate, n, a.terms, lane), u = whole(up, n, a.terms, lane);
        store(h + (begin + n) * d.I + i + lane, silu(g) * u);
      }
    }
  }
}

// Outputs [c, c + kRun) of all tokens, one expert after the other, in the order of their ids.
template <class F, class T>
void outer(T* out, const Packed& w2, const Activations& a, const float* weights,
           const Routes& routes, const Dims& d, int64_t c) {
  std::vector<float> sums(d.T * kRun);
  const int64_t end = std::min(c + kRun, w2.tiles * kTileWidth);
  for (int64_t e : routes.experts) {
    const int64_t begin = routes.first[e], last = routes.first[e + 1];
    const auto rows = rows_of(nullptr, begin, last, a.terms);
    std::vector<float> totals(rows.size() * kPanelWidth);
    for (int64_t i = c; i < end; i += kPanelWidth) {
      Tiles tiles;
      for (int p = 0; p < kPanelTiles; ++p) {
        tiles[p] = e * w2.tiles + std::min(i / kTileWidth + p, w2.tiles - 1);
      }
      multiply<F>(totals.data(), w2, tiles, a, rows.data(), rows.size());
      for (int64_t n = begin; n < last; ++n) {
        const f32v weight = splat(weights[routes.slot[n]]);
        float* sum = sums.data() + routes.token[n] * kRun + i - c;
        for (int64_t lane = 0; lane < kPanelWidth; lane += kLanes) {
          store(sum + lane,
                load(sum + lane) + weight * whole(totals.data(), n - begin, a.terms, lane));
        }
      }
    }
  }
  for (int64_t t = 0; t < d.T; ++t) {
    for_vectors(std::min(c + kRun, d.D) - c, [&](int64_t i, int64_t lanes) {
      store(out + t * d.D + c + i, load(sums.data() + t * kRun + i), lanes);
    });
  }
}

Tensor fused_moe_packed(Tensor x, Tensor packed13, Tensor scale13, std::optional<Tensor> zero13,
                        int64_t format13, int64_t group13, Tensor packed2, Tensor scale2,
                        std::optional<Tensor> zero2, int64_t format2, int64_t group2, int64_t I,
                        Tensor topk_weights, Tensor topk_ids) {
  const Dims d{x.size(0), x.size(1), packed13.size(0), I, topk_ids.size(1)};
  const Routes routes(read<int32_t>(topk_ids), d);
  const Packed w13(packed13, scale13, zero13, format13, 2 * I, d.D, group13);
  const Packed w2(packed2, scale2, zero2, format2, d.D, I, group2);
  const float* weights = read<float>(topk_weights);
  Tensor out = torch::stable::new_empty(x, {d.T, d.D});
  Tensor h = torch::stable::new_empty(x, {d.T * d.k, d.I});  // sorted by expert, as in routes
  const int64_t experts = routes.experts.size();
  with_dtype(x, [&]<class T>(T) {
    const Activations xs = activations(read<T>(x), d.T, x.stride(0), w13);
    w13.with_format([&]<class F>(F) {
      // Run 0 of all experts, then run 1: each thread gets a share of every expert's tokens.
      parallel_with_denormals((d.I + kRun - 1) / kRun * experts, 1, [&](int64_t i) {
        inner<F>(write<T>(h), w13, xs, routes, d, routes.experts[i % experts], i / experts * kRun);
      });
    });
    const Activations hs = activations(read<T>(h), d.T * d.k, d.I, w2);
    w2.with_format([&]<class F>(F) {
      parallel_with_denormals((d.D + kRun - 1) / kRun, 1, [&](int64_t i) {
        outer<F>(write<T>(out), w2, hs, weights, routes, d, i * kRun);
      });
    });
  });
  return out;
}

}  // namespace
}  // namespace Q3N_LEVEL

Q3N_OP(fused_moe_packed)
