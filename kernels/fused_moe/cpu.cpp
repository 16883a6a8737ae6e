#include <vector>

#include "dot_tile.h"
#include "ops.h"
#include "routes.h"

namespace Q3N_LEVEL {
namespace {

constexpr int64_t kChunk = 32;  // inner features of an expert, or outputs, that one task computes
constexpr int64_t kOutputsAhead = 16;  // outputs whose weights are prefetched
constexpr int64_t kBlock = 32;  // tokens that fit in the cache together with a chunk's weights

// Inner features [c, c + kChunk) of expert e's tokens: h = silu(W1 x) * W3 x. Prefetches the next
// features' weights, at the end those of expert `ahead`.
template <class T>
void inner(T* h, const T* x, int64_t stride, const T* w13, const Routes& routes, const MoeDims& d,
           int64_t e, int64_t ahead, int64_t c) {
  const int64_t end = std::min(c + kChunk, d.I), last = routes.first[e + 1];
  float gate[kBlock][kChunk], up[kBlock][kChunk];
  for (int64_t begin = routes.first[e]; begin < last; begin += kBlock) {
    const int64_t block = std::min(begin + kBlock, last);
    for (int64_t i = c; i < end; i += 2) {
      const int64_t j = std::min(i + 1, end - 1);
      const T *w1 = w13 + (e * 2 * d.I) * d.D, *w3 = w1 + d.I * d.D;
      const T* const row[kTileRows] = {w1 + i * d.D, w1 + j * d.D, w3 + i * d.D, w3 + j * d.D};
      const T* n1 = w13 + (i + 2 < end ? e * 2 * d.I + i + 2 : ahead * 2 * d.I + c) * d.D;
      const T* const next[kTileRows] = {n1, n1 + d.D, n1 + d.I * d.D, n1 + (d.I + 1) * d.D};
      for_tiles(begin, block, [&](int64_t first, int64_t count) {
        const T* xs[kTileTokens];
        for (int64_t n = 0; n < count; ++n) xs[n] = x + routes.token[first + n] * stride;
        float sums[kTileTokens][kTileRows];
        dot_tile(count, row, xs, first == routes.first[e] ? next : nullptr, d.D, sums);
        for (int64_t n = 0; n < count; ++n) {
          gate[first - begin + n][i - c] = sums[n][0], gate[first - begin + n][j - c] = sums[n][1];
          up[first - begin + n][i - c] = sums[n][2], up[first - begin + n][j - c] = sums[n][3];
        }
      });
    }
    for (int64_t n = begin; n < block; ++n) {
      for_vectors(end - c, [&](int64_t i, int64_t lanes) {
        const f32v g = load(gate[n - begin] + i, lanes), u = load(up[n - begin] + i, lanes);
        store(h + n * d.I + c + i, silu(g) * u, lanes);
      });
    }
  }
}

// Outputs [c, c + kChunk) of all tokens, one expert after the other, in the order of their ids.
template <class T>
void outer(T* out, const T* h, const T* w2, const float* weights, const Routes& routes,
           const MoeDims& d, int64_t c) {
  const int64_t end = std::min(c + kChunk, d.D);
  std::vector<float> totals(d.T * kChunk);
  for (size_t place = 0; place < routes.experts.size(); ++place) {
    const int64_t e = routes.experts[place];
    const int64_t ahead = routes.experts[std::min(place + 1, routes.experts.size() - 1)];
    for (int64_t i = c; i < end; i += kTileRows) {
      const int64_t soon = i + kOutputsAhead < end
                               ? e * d.D + i + kOutputsAhead
                               : ahead * d.D + c + (i + kOutputsAhead - c) % kChunk;
      const T *row[kTileRows], *next[kTileRows];
      for (int64_t r = 0; r < kTileRows; ++r) {
        row[r] = w2 + (e * d.D + std::min(i + r, end - 1)) * d.I;
        next[r] = w2 + (soon + r) * d.I;
      }
      for_tiles(routes.first[e], routes.first[e + 1], [&](int64_t first, int64_t count) {
        const T* xs[kTileTokens];
        for (int64_t n = 0; n < count; ++n) xs[n] = h + (first + n) * d.I;
        float sums[kTileTokens][kTileRows];
        dot_tile(count, row, xs, first == routes.first[e] ? next : nullptr, d.I, sums);
        for (int64_t n = 0; n < count; ++n) {
          const float weight = weights[routes.entry[first + n]];
          float* total = totals.data() + routes.token[first + n] * kChunk + i - c;
          for (int64_t r = 0; r < std::min<int64_t>(kTileRows, end - i); ++r) {
            total[r] += weight * sums[n][r];
          }
        }
      });
    }
  }
  for (int64_t t = 0; t < d.T; ++t) {
    for_vectors(end - c, [&](int64_t i, int64_t lanes) {
      store(out + t * d.D + c + i, load(totals.data() + t * kChunk + i, lanes), lanes);
    });
  }
}

Tensor fused_moe(Tensor x, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids) {
  const MoeDims d{x.size(0), x.size(1), w13.size(0), w2.size(2), topk_ids.size(1)};
  const Routes routes(read<int32_t>(topk_ids), d);
  const float* weights = read<float>(topk_weights);
  Tensor out = empty_as(x, {d.T, d.D});
  const int64_t experts = routes.experts.size(), entries = routes.entry.size();
  Tensor h = empty_as(x, {entries, d.I});  // sorted by expert, as in routes
  const int64_t inner_chunks = (d.I + kChunk - 1) / kChunk;
  const int64_t outer_chunks = (d.D + kChunk - 1) / kChunk;
  with_activations(x, [&]<class A>(A) {
    const int64_t tokens = routes.tokens_per_expert();
    const int64_t bytes = experts * d.I * d.D * sizeof(A);  // of one of three matrices
    // Chunk 0 of all experts, then chunk 1: each thread gets a share of every expert's tokens.
    const int64_t tasks = inner_chunks * experts;
    parallel(tasks, grain(tasks, 2 * bytes, tokens), [&](int64_t i) {
      inner(write<A>(h), read<A>(x), x.stride(0), read<A>(w13), routes, d,
            routes.experts[i % experts], routes.experts[(i + 1) % experts], i / experts * kChunk);
    });
    parallel(outer_chunks, grain(outer_chunks, bytes, tokens), [&](int64_t i) {
      outer(write<A>(out), read<A>(h), read<A>(w2), weights, routes, d, i * kChunk);
    });
  });
  return out;
}

}  // namespace
}  // namespace Q3N_LEVEL

Q3N_OP_OF_ACTIVATIONS(fused_moe)
