#include <array>

#include "expert_gate.h"
#include "ops.h"
#include "packed_gemm.h"
#include "parts.h"
#include "routes.h"

namespace Q3N_LEVEL {
namespace {

constexpr int64_t kRun = 128;  // an expert's inner features, or outputs; a task takes a multiple
constexpr int64_t kTotals = 1 << 14;  // outputs that are multiplied at once
constexpr int64_t kSums = 1 << 14;    // outputs, of all tokens, that a task sums at once
constexpr int64_t kOuterTasks = 4;    // of a thread, for few tokens: then others can help it
constexpr int64_t kSharedRun = 256;   // tokens of the shared expert that are multiplied at once

// Inner features [begin, end) of an expert.
struct Features {
  int64_t expert, begin, end;
};

// Token i's outputs from column `column` of the tile on: the sum over its terms.
f32v output_of(const float* totals, int64_t i, int64_t terms, int64_t column) {
  f32v sum = load(totals + i * terms * kNR + column);
  for (int64_t term = 1; term < terms; ++term) {
    sum += load(totals + (i * terms + term) * kNR + column);
  }
  return sum;
}

// Experts whose weights have the same formats, and the tokens that are routed to them.
template <class T>
class Experts {
 public:
  const PackedWeight w13, w2;
  const Routes routes;
  const int64_t I;
  const bool same;  // one weight for every expert of `routes`

  // weights: of each entry of `routes`.
  Experts(PackedWeight w13, PackedWeight w2, Routes routes, const float* weights, const Tensor& x,
          int64_t I, bool same)
      : w13(w13),
        w2(w2),
        routes(std::move(routes)),
        I(I),
        same(same),
        weights_(weights),
        h_(empty_as(x, {static_cast<int64_t>(this->routes.token.size()), I})),
        in_(this->w13, read<T>(x), x.size(0), x.stride(0)) {}

  // How many tasks compute h: an expert has one for each thread. The first ones of all experts come
  // before the second ones.
  int64_t tasks(int64_t threads) const {
    return (I + share(threads) - 1) / share(threads) * routes.experts.size();
  }

  // Computes task i.
  void inner(int64_t i, int64_t threads) {
    const int64_t experts = routes.experts.size();
    const auto features = [&](int64_t task) -> Features {
      const int64_t c = task / experts * share(threads);
      return {routes.experts[task % experts], c, std::min(c + share(threads), I)};
    };
    inner(features(i), features(std::min(i + 1, tasks(threads) - 1)));
  }

  // h = silu(W1 x) * W3 x of these features, for their expert's tokens. `next`: those that this
  // thread computes then.
  void inner(const Features& of, const Features& next) {
    const int64_t begin = routes.first[of.expert], count = routes.first[of.expert + 1] - begin;
    const int64_t terms = in_.terms, size = count * terms * kNR;  // of a tile
    const int64_t both = 2 / kTilePanels * size, up = kTilePanels == 1 ? size : kPanelWidth;
    const std::span tokens(routes.token.data() + begin, count);
    const PackedA x = in_.pack_a(tokens, std::array{int64_t{0}, count});
    T* h = write<T>(h_) + begin * I;
    const int64_t at_once = tiles_at_once(count * terms), width = at_once * kPanelWidth;
    std::vector<float> totals(at_once * both);
    std::vector<Panels> tiles;
    for (int64_t i = of.begin; i < of.end; i += width) {
      const int64_t last = std::min(i + width, of.end);
      tiles.clear();
      for (int64_t j = i; j < last; j += kPanelWidth) {
        for (const Panels& tile : tiles13(of.expert, j)) tiles.push_back(tile);
      }
      const auto then =
          last == of.end ? tiles13(next.expert, next.begin) : tiles13(of.expert, last);
      in_.multiply(totals.data(), tiles, then[0], x, 0, count);
      const float* gate = totals.data();
      for (int64_t j = i; j < last; j += kPanelWidth, gate += both) {
        for (int64_t n = 0; n < count; ++n) {
          for (int64_t lane = 0; lane < kPanelWidth; lane += kLanes) {
            const f32v g = output_of(gate, n, terms, lane);
            const f32v u = output_of(gate + up, n, terms, lane);
            store(h + n * I + j + lane, silu(g) * u);
          }
        }
      }
    }
  }

  // Between `inner` and `add_outputs`.
  void pack_h() { second_.emplace(w2, h_, routes.first); }

  // sums [tokens, width] += outputs [c, end), one expert after the other, in the order of their
  // ids.
  void add_outputs(float* sums, int64_t width, int64_t c, int64_t end) const {
    const int64_t terms = second_->gemm.terms;
    std::vector<float> totals;
    std::vector<Panels> tiles;
    for (size_t r = 0; r < routes.experts.size(); ++r) {
      const int64_t e = routes.experts[r], next = routes.experts[(r + 1) % routes.experts.size()];
      const int64_t begin = routes.first[e], last = routes.first[e + 1];
      const int64_t count = (last - begin) * terms, columns = tiles_at_once(count) * kNR;
      for (int64_t i = c; i < end; i += columns) {
        const int64_t until = std::min(i + columns, end);
        tiles.clear();
        for (int64_t j = i; j < until; j += kNR) tiles.push_back(tile2(e, j));
        totals.resize(tiles.size() * count * kNR);
        const Panels then = until < end ? tile2(e, until) : tile2(next, c);
        second_->gemm.multiply(totals.data(), tiles, then, second_->a, begin, last - begin);
        for (int64_t n = begin; n < last; ++n) {
          const f32v weight = splat(weights_[routes.entry[n]]);
          const float* total = totals.data();
          float* sum = sums + routes.token[n] * width;
          for (int64_t j = i; j < until; j += kNR, total += count * kNR) {
            for (int64_t lane = 0; lane < kNR; lane += kLanes) {
              float* to = sum + j - c + lane;
              store(to, load(to) + weight * output_of(total, n - begin, terms, lane));
            }
          }
        }
      }
    }
  }

 private:
  // The second product's operand.
  struct Second {
    const PackedGemm<T> gemm;
    const PackedA a;

    Second(const PackedWeight& w, const Tensor& h, const std::vector<int64_t>& first)
        : gemm(w, read<T>(h), h.size(0), h.stride(0)),
          a(gemm.pack_a(all_tokens(h.size(0)), first)) {}
  };

  // Tiles to multiply at once, so that totals of so many terms stay in the cache.
  static int64_t tiles_at_once(int64_t terms) {
    return std::clamp<int64_t>(kTotals / (terms * kNR), 1, 8);
  }

  int64_t share(int64_t threads) const { return round_up((I + threads - 1) / threads, kRun); }
  int64_t first_panel(const PackedWeight& w, int64_t e) const { return same ? 0 : e * w.panels; }

  // Gate and up of inner features from i on: the panels of one tile, or two tiles of one panel.
  std::array<Panels, 2 / kTilePanels> tiles13(int64_t e, int64_t i) const {
    std::array<Panels, 2 / kTilePanels> tiles;
    tiles.front().front() = first_panel(w13, e) + i / kPanelWidth;
    tiles.back().back() = tiles.front().front() + I / kPanelWidth;
    return tiles;
  }

  // Of outputs from i on; beyond the end the last panel is repeated.
  Panels tile2(int64_t e, int64_t i) const {
    Panels tile;
    for (int p = 0; p < kTilePanels; ++p) {
      tile[p] = first_panel(w2, e) + std::min(i / kPanelWidth + p, w2.panels - 1);
    }
    return tile;
  }

  const float* weights_;
  Tensor h_;  // [tokens of routes, I]
  const PackedGemm<T> in_;
  std::optional<Second> second_;
};

// Both products of the routed experts and, if there is one, of the shared one.
template <class T>
void run(Tensor& out, Experts<T>& routed, Experts<T>* shared) {
  const int64_t threads = torch::stable::get_num_threads(), tokens = out.size(0), D = out.size(1);
  const int64_t experts = routed.routes.experts.size();
  const int64_t of_one = shared ? tokens : routed.routes.tokens_per_expert();
  const auto bytes = [&](auto weight) {
    const auto of = [&](const Experts<T>& e) {
      return (e.*weight).panels * (e.*weight).panel_bytes;
    };
    return experts * of(routed) + (shared ? of(*shared) : 0);
  };
  const int64_t bytes13 = bytes(&Experts<T>::w13), bytes2 = bytes(&Experts<T>::w2);
  const int64_t first = shared ? shared->tasks(threads) : 0;
  const int64_t tasks = first + routed.tasks(threads);
  parallel_with_denormals(tasks, grain(tasks, bytes13, of_one), [&](int64_t i) {
    i < first ? shared->inner(i, threads) : routed.inner(i - first, threads);
  });
  routed.pack_h();
  if (shared) shared->pack_h();
  // For few tokens a task reads a large piece of an expert.
  const int64_t pieces = threads * kOuterTasks, most = round_up((D + pieces - 1) / pieces, kRun);
  const int64_t run = std::clamp(kSums / (tokens + 1) / kRun * kRun, kRun, most);
  const int64_t runs = (D + run - 1) / run;
  parallel_with_denormals(runs, grain(runs, bytes2, of_one), [&](int64_t i) {
    const int64_t c = i * run, end = std::min(c + run, routed.w2.panels * kPanelWidth);
    std::vector<float> sums(tokens * run);
    routed.add_outputs(sums.data(), run, c, end);
    if (shared) shared->add_outputs(sums.data(), run, c, end);
    T* to = write<T>(out) + c;
    for (int64_t t = 0; t < tokens; ++t) {
      for_vectors(std::min(c + run, D) - c, [&](int64_t j, int64_t lanes) {
        store(to + t * D + j, load(sums.data() + t * run + j), lanes);
      });
    }
  });
}

// The shared expert's weight for each token.
template <class T>
std::vector<float> gates_of(const Tensor& x, const Tensor& weight) {
  const int64_t D = x.size(1);
  std::vector<float> gates(x.size(0));
  with_parameter<T>(weight, [&]<class W>(W) {
    parallel(gates.size(), grain_of(D), [&](int64_t t) {
      gates[t] = gate(read<T>(x) + t * x.stride(0), read<W>(weight), D)[0];
    });
  });
  return gates;
}

}  // namespace

Tensor fused_moe_packed(Tensor x, Tensor packed13, Tensor scale13, std::optional<Tensor> zero13,
                        int64_t encoding13, int64_t group13, Tensor packed2, Tensor scale2,
                        std::optional<Tensor> zero2, int64_t encoding2, int64_t group2, int64_t I,
                        Tensor topk_weights, Tensor topk_ids, std::optional<Tensor> gate,
                        std::optional<Tensor> shared13, std::optional<Tensor> shared_scale13,
                        std::optional<Tensor> shared_zero13, int64_t shared_encoding13,
                        int64_t shared_group13, std::optional<Tensor> shared2,
                        std::optional<Tensor> shared_scale2, std::optional<Tensor> shared_zero2,
                        int64_t shared_encoding2, int64_t shared_group2, int64_t shared_I) {
  const MoeDims d{x.size(0), x.size(1), packed13.size(0), I, topk_ids.size(1)};
  Tensor out = empty_as(x, {d.T, d.D});
  with_dtype(x, [&]<class T>(T) {
    Experts<T> routed({packed13, scale13, zero13, encoding13, 2 * I, d.D, group13},
                      {packed2, scale2, zero2, encoding2, d.D, I, group2},
                      {read<int32_t>(topk_ids), d}, read<float>(topk_weights), x, I, false);
    if (!gate) return run<T>(out, routed, nullptr);
    const int64_t S = shared_I;
    const std::vector<float> gates = gates_of<T>(x, *gate);
    Experts<T> shared(
        {*shared13, *shared_scale13, shared_zero13, shared_encoding13, 2 * S, d.D, shared_group13},
        {*shared2, *shared_scale2, shared_zero2, shared_encoding2, d.D, S, shared_group2},
        Routes::of_all(d.T, kSharedRun), gates.data(), x, S, true);
    run<T>(out, routed, &shared);
  });
  return out;
}

}  // namespace Q3N_LEVEL

Q3N_OP(fused_moe_packed)
