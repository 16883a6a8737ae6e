// Hyper-connections with packed weights.
#include <array>

#include "mixing.h"
#include "ops.h"
#include "packed_gemm.h"
#include "parts.h"

namespace Q3N_LEVEL {
namespace {

// mixed [T, D] = mean over the streams of sigmoid(up hidden) x. A task computes kNR features of
// every stream, for some tokens.
template <class A>
class Mixing {
 public:
  Mixing(const PackedWeight& up, const Tensor& hidden, const Tensor& x, int64_t hc, int64_t D)
      : up_(up),
        gemm_(up, read<A>(hidden), hidden.size(0), hidden.stride(0)),
        x_(read<A>(x)),
        T_(hidden.size(0)),
        hc_(hc),
        D_(D),
        hidden_(gemm_.pack_a(all_tokens(T_), std::array{int64_t{0}, T_})) {}

  void run(A* mixed) const {
    const int64_t columns = (D_ + kNR - 1) / kNR, runs = (T_ + kTokens - 1) / kTokens;
    const int64_t tasks = columns * runs, bytes = up_.panels * up_.panel_bytes;
    parallel_with_denormals(tasks, grain(tasks, bytes, T_), [&](int64_t i) {
      const int64_t c = i % columns, begin = i / columns * kTokens;
      features(mixed, c * kNR, std::min(c + 1, columns - 1) * kNR, begin,
               std::min(kTokens, T_ - begin));
    });
  }

 private:
  static constexpr int64_t kTokens = 256;  // of a task
  static constexpr int64_t kAhead = 8;     // x is prefetched so many tokens ahead

  // The tile of a stream's features from c on; beyond the stream the last panel is repeated.
  Panels tile(int64_t s, int64_t c) const {
    Panels panels;
    for (int p = 0; p < kTilePanels; ++p) {
      panels[p] = (s * D_ + std::min(c + p * kPanelWidth, D_ - kPanelWidth)) / kPanelWidth;
    }
    return panels;
  }

  // Features from c on of tokens [begin, begin + count); `next`: those of the next task.
  void features(A* mixed, int64_t c, int64_t next, int64_t begin, int64_t count) const {
    const int64_t size = count * gemm_.terms * kNR, width = std::min(kNR, D_ - c);
    thread_local std::vector<Panels> tiles;
    thread_local std::vector<float> totals;
    tiles.clear();
    for (int64_t s = 0; s < hc_; ++s) tiles.push_back(tile(s, c));
    totals.resize(hc_ * size);
    gemm_.multiply(totals.data(), tiles, tile(0, next), hidden_, begin, count);
    const A* x = x_ + begin * hc_ * D_ + c;
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t s = 0; s < hc_; ++s) {
        __builtin_prefetch(x + (std::min(n + kAhead, count - 1) * hc_ + s) * D_);
      }
      const float* total = totals.data() + n * gemm_.terms * kNR;
      const auto gate = [&](int64_t s, int64_t i, int64_t lanes) {
        const float* of_terms = total + s * size + i;
        f32v sum = load(of_terms, lanes);
        for (int64_t t = 1; t < gemm_.terms; ++t) sum += load(of_terms + t * kNR, lanes);
        return sum;
      };
      mix(mixed + (begin + n) * D_ + c, gate, x + n * hc_ * D_, hc_, D_, width);
    }
  }

  const PackedWeight& up_;
  const PackedGemm<A> gemm_;
  const A* x_;
  const int64_t T_, hc_, D_;
  const PackedA hidden_;
};

std::tuple<Tensor, Tensor> hyper_connection_packed(
    Tensor streams_, std::optional<Tensor> block, std::optional<Tensor> injection, Tensor norm,
    Tensor down, Tensor down_scale, std::optional<Tensor> down_zero, int64_t down_encoding,
    int64_t down_group, Tensor up, Tensor up_scale, std::optional<Tensor> up_zero,
    int64_t up_encoding, int64_t up_group, int64_t L, std::optional<Tensor> inject, double eps) {
  const int64_t T = streams_.size(0), hc = streams_.size(1), D = streams_.size(2);
  Tensor mixed = empty_as(streams_, {T, D}), next = mixed;
  with_dtype(streams_, [&]<class A>(A) {
    const Streams<A> in(streams_, block, injection);
    const Tensor x = normalise_streams(in, streams_, norm, static_cast<float>(eps));
    next = injections(in, x, inject);
    const Tensor products =
        linear(x, down, down_scale, down_zero, down_encoding, down_group, L, true);
    const Tensor hidden = empty_as(streams_, {T, L});
    activate(write<A>(hidden), read<float>(products), T * L, hc);
    const PackedWeight weight(up, up_scale, up_zero, up_encoding, hc * D, L, up_group);
    Mixing<A>(weight, hidden, x, hc, D).run(write<A>(mixed));
  });
  return {mixed, next};
}

}  // namespace
}  // namespace Q3N_LEVEL

Q3N_OP(hyper_connection_packed)
