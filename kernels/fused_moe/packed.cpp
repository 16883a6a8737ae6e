#include <array>
#include <numeric>

#include "ops.h"
#include "packed_gemm.h"
#include "routes.h"

namespace Q3N_LEVEL {
namespace {

constexpr int64_t kRun = 128;  // an expert's inner features, or outputs; a task takes a multiple

// Token i's outputs from column `column` of the tile on: the sum over its terms.
f32v output_of(const float* totals, int64_t i, int64_t terms, int64_t column) {
  f32v sum = load(totals + i * terms * kNR + column);
  for (int64_t term = 1; term < terms; ++term) {
    sum += load(totals + (i * terms + term) * kNR + column);
  }
  return sum;
}

// h = silu(W1 x) * W3 x of inner features [c, end) of expert e's tokens. Gate and up are the panels
// of one tile, or of two where a tile has one panel.
template <class T>
void inner(T* h, const PackedWeight& w13, const PackedGemm<T>& gemm, const Routes& routes,
           const Dims& d, int64_t e, int64_t c, int64_t end) {
  const int64_t begin = routes.first[e], count = routes.first[e + 1] - begin;
  const int64_t terms = gemm.terms, size = count * terms * kNR;
  const int64_t up_panels = d.I / kPanelWidth;
  const std::span tokens(routes.token.data() + begin, count);
  const PackedA x = gemm.pack_a(tokens, std::array{int64_t{0}, count});
  std::vector<float> totals(2 * size);
  for (int64_t i = c; i < end; i += kPanelWidth) {
    const int64_t gate_panel = e * w13.panels + i / kPanelWidth;
    const float *gate = totals.data(), *up = gate + (kTilePanels == 1 ? size : kPanelWidth);
    Panels panels{gate_panel};
    if (kTilePanels > 1) panels.back() = gate_panel + up_panels;
    gemm.multiply(totals.data(), {&panels, 1}, x, 0, count);
    if (kTilePanels == 1) {
      panels[0] += up_panels;
      gemm.multiply(totals.data() + size, {&panels, 1}, x, 0, count);
    }
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t lane = 0; lane < kPanelWidth; lane += kLanes) {
        const f32v g = output_of(gate, n, terms, lane), u = output_of(up, n, terms, lane);
        store(h + (begin + n) * d.I + i + lane, silu(g) * u);
      }
    }
  }
}

// Outputs [c, c + kRun) of all tokens, one expert after the other, in the order of their ids.
template <class T>
void outer(T* out, const PackedWeight& w2, const PackedGemm<T>& gemm, const PackedA& h,
           const float* weights, const Routes& routes, const Dims& d, int64_t c) {
  const int64_t terms = gemm.terms;
  std::vector<float> sums(d.T * kRun);
  const int64_t end = std::min(c + kRun, w2.panels * kPanelWidth);
  for (int64_t e : routes.experts) {
    const int64_t begin = routes.first[e], last = routes.first[e + 1];
    std::vector<float> totals((last - begin) * terms * kNR);
    for (int64_t i = c; i < end; i += kNR) {
      Panels panels;
      for (int p = 0; p < kTilePanels; ++p) {
        panels[p] = e * w2.panels + std::min(i / kPanelWidth + p, w2.panels - 1);
      }
      gemm.multiply(totals.data(), {&panels, 1}, h, begin, last - begin);
      for (int64_t n = begin; n < last; ++n) {
        const f32v weight = splat(weights[routes.entry[n]]);
        float* sum = sums.data() + routes.token[n] * kRun + i - c;
        for (int64_t lane = 0; lane < kNR; lane += kLanes) {
          store(sum + lane,
                load(sum + lane) + weight * output_of(totals.data(), n - begin, terms, lane));
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
                        int64_t encoding13, int64_t group13, Tensor packed2, Tensor scale2,
                        std::optional<Tensor> zero2, int64_t encoding2, int64_t group2, int64_t I,
                        Tensor topk_weights, Tensor topk_ids) {
  const Dims d{x.size(0), x.size(1), packed13.size(0), I, topk_ids.size(1)};
  const Routes routes(read<int32_t>(topk_ids), d);
  const PackedWeight w13(packed13, scale13, zero13, encoding13, 2 * I, d.D, group13);
  const PackedWeight w2(packed2, scale2, zero2, encoding2, d.D, I, group2);
  const float* weights = read<float>(topk_weights);
  Tensor out = torch::stable::new_empty(x, {d.T, d.D});
  Tensor h = torch::stable::new_empty(x, {d.T * d.top_k, d.I});  // sorted by expert, as in routes
  const int64_t experts = routes.experts.size();
  std::vector<int64_t> pairs(d.T * d.top_k);
  std::iota(pairs.begin(), pairs.end(), 0);
  with_dtype(x, [&]<class T>(T) {
    const PackedGemm in(w13, read<T>(x), d.T, x.stride(0));
    // Each thread gets a share of every expert's features.
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t share = round_up((d.I + threads - 1) / threads, kRun);
    const int64_t tokens = routes.tokens_per_expert();
    const int64_t shares = (d.I + share - 1) / share * experts, runs = (d.D + kRun - 1) / kRun;
    const int64_t bytes13 = experts * w13.panels * w13.panel_bytes;
    parallel_with_denormals(shares, grain(shares, bytes13, tokens), [&](int64_t i) {
      const int64_t c = i / experts * share, end = std::min(c + share, d.I);
      inner(write<T>(h), w13, in, routes, d, routes.experts[i % experts], c, end);
    });
    const PackedGemm of_h(w2, read<T>(h), d.T * d.top_k, d.I);
    const PackedA packed_h = of_h.pack_a(pairs, routes.first);
    const int64_t bytes2 = experts * w2.panels * w2.panel_bytes;
    parallel_with_denormals(runs, grain(runs, bytes2, tokens), [&](int64_t i) {
      outer(write<T>(out), w2, of_h, packed_h, weights, routes, d, i * kRun);
    });
  });
  return out;
}

}  // namespace
}  // namespace Q3N_LEVEL

Q3N_OP(fused_moe_packed)
