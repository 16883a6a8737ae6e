// Hyper-connections whose weights are not packed.
#include <memory>

#include "dot_tile.h"
#include "mixing.h"
#include "ops.h"

namespace Q3N_LEVEL {
namespace {

constexpr int64_t kChunk = 32;  // rows of a weight that one task multiplies
constexpr int64_t kBlock = 32;  // tokens that fit in the cache together with them

// products [count, kChunk] = rows [first, end) of the weight [N, K] times tokens of x [T, K].
template <class T>
void multiply(float (*products)[kChunk], const T* weight, int64_t first, int64_t end, const T* x,
              int64_t count, int64_t K) {
  for (int64_t i = first; i < end; i += kTileRows) {
    const T *row[kTileRows], *next[kTileRows];
    for (int64_t r = 0; r < kTileRows; ++r) {
      row[r] = weight + std::min(i + r, end - 1) * K;
      next[r] = weight + std::min(i + kTileRows + r, end - 1) * K;
    }
    for_tiles(0, count, [&](int64_t n, int64_t tile) {
      const T* xs[kTileTokens];
      for (int64_t j = 0; j < tile; ++j) xs[j] = x + (n + j) * K;
      float sums[kTileTokens][kTileRows];
      dot_tile(tile, row, xs, n == 0 ? next : nullptr, K, sums);
      for (int64_t j = 0; j < tile; ++j) {
        for (int64_t r = 0; r < kTileRows; ++r) products[n + j][i - first + r] = sums[j][r];
      }
    });
  }
}

// Calls f(begin, count, first, end) in parallel, for all blocks of tokens [begin, begin + count)
// and all chunks [first, end) of N rows.
template <class F>
void for_chunks(int64_t T, int64_t N, int64_t bytes, F&& f) {
  const int64_t chunks = (N + kChunk - 1) / kChunk, blocks = (T + kBlock - 1) / kBlock;
  parallel(chunks * blocks, grain(chunks * blocks, bytes, T), [&](int64_t i) {
    const int64_t begin = i / chunks * kBlock, first = i % chunks * kChunk;
    f(begin, std::min(kBlock, T - begin), first, std::min(first + kChunk, N));
  });
}

std::tuple<Tensor, Tensor> hyper_connection(Tensor streams_, std::optional<Tensor> block,
                                            std::optional<Tensor> injection, Tensor norm,
                                            Tensor down, Tensor up, std::optional<Tensor> inject,
                                            double eps) {
  const int64_t T = streams_.size(0), hc = streams_.size(1), D = streams_.size(2);
  const int64_t K = hc * D, L = down.size(0);
  Tensor mixed = empty_as(streams_, {T, D}), next = mixed;
  with_activations(streams_, [&]<class A>(A) {
    const Streams<A> in(streams_, block, injection);
    const Tensor x = normalise_streams(in, streams_, norm, static_cast<float>(eps));
    const Tensor hidden = empty_as(streams_, {T, L});
    next = injections(in, x, inject);
    const A *xs = read<A>(x), *hs = read<A>(hidden);
    const int64_t bytes = K * L * sizeof(A);
    for_chunks(T, L, bytes, [&](int64_t begin, int64_t count, int64_t first, int64_t end) {
      float products[kBlock][kChunk];
      multiply(products, read<A>(down), first, end, xs + begin * K, count, K);
      for (int64_t n = 0; n < count; ++n) {
        activate(write<A>(hidden) + (begin + n) * L + first, products[n], end - first, hc);
      }
    });
    for_chunks(T, D, bytes, [&](int64_t begin, int64_t count, int64_t first, int64_t end) {
      const auto gates = std::make_unique_for_overwrite<float[][kChunk]>(hc * count);
      for (int64_t s = 0; s < hc; ++s) {
        const A* weight = read<A>(up) + s * D * L;
        multiply(&gates[s * count], weight, first, end, hs + begin * L, count, L);
      }
      for (int64_t n = 0; n < count; ++n) {
        const auto gate = [&](int64_t s, int64_t i, int64_t lanes) {
          return load(gates[s * count + n] + i, lanes);
        };
        const A* x = xs + (begin + n) * K + first;
        mix(write<A>(mixed) + (begin + n) * D + first, gate, x, hc, D, end - first);
      }
    });
  });
  return {mixed, next};
}

}  // namespace
}  // namespace Q3N_LEVEL

Q3N_OP_OF_ACTIVATIONS(hyper_connection)
