// Dot products of rows of a matrix with vectors x, a register tile at a time. The order of a sum
// does not depend on the tile.
#pragma once

#include <algorithm>

#include "simd.h"

namespace Q3N_LEVEL {

// A tile is kTileRows rows by kTileTokens vectors x. Registers: 16 accumulators, 4 for rows, 1 for
// x where there are 32; else 8, 4 and 1.
constexpr int kTileRows = 4;
constexpr int kTileTokens = kRegisters == 32 ? 4 : 2;
constexpr int kTile = kTileRows * kTileTokens;

// sums[n][r] = row_r . x_n, for N tokens. Prefetches the rows `next`, unless that is null.
template <int N, class T>
Q3N_INLINE inline void dot_tile_of(const T* const (&row)[kTileRows],
                                   const T* const (&x)[kTileTokens], const T* const* next,
                                   int64_t width, float (&sums)[kTileTokens][kTileRows]) {
  using V = Terms<T>;
  f32v total[kTile] = {};
  const auto add = [&](int64_t i, auto... count) Q3N_INLINE {
    if (next && i * sizeof(T) % 64 == 0) {
      repeat<kTileRows>(kTileRows,
                        [&](int64_t r) Q3N_INLINE { __builtin_prefetch(next[r] + i, 0, 2); });
    }
    typename V::type w[kTileRows];
    repeat<kTileRows>(kTileRows,
                      [&](int64_t r) Q3N_INLINE { w[r] = V::load(row[r] + i, count...); });
    repeat<N>(N, [&](int64_t n) Q3N_INLINE {
      const typename V::type xs = V::load(x[n] + i, count...);
      repeat<kTileRows>(kTileRows, [&](int64_t r) Q3N_INLINE {
        total[n * kTileRows + r] = V::add(w[r], xs, total[n * kTileRows + r]);
      });
    });
  };
  int64_t i = 0;
  for (; i + V::kCount <= width; i += V::kCount) add(i);
  if (i < width) add(i, width - i);
  repeat<kTile / kLanes>(kTile / kLanes, [&](int64_t part) Q3N_INLINE {
    store(&sums[0][0] + part * kLanes, lane_sums(total + part * kLanes));
  });
}

template <class T, int N = kTileTokens>
void dot_tile(int64_t count, const T* const (&row)[kTileRows], const T* const (&x)[kTileTokens],
              const T* const* next, int64_t width, float (&sums)[kTileTokens][kTileRows]) {
  if constexpr (N > 1) {
    if (count < N) return dot_tile<T, N - 1>(count, row, x, next, width, sums);
  }
  dot_tile_of<N>(row, x, next, width, sums);
}

// Calls f(first, count) over [begin, end), at most kTileTokens vectors at a time.
template <class F>
void for_tiles(int64_t begin, int64_t end, F&& f) {
  for (int64_t i = begin; i < end; i += kTileTokens) f(i, std::min<int64_t>(kTileTokens, end - i));
}

}  // namespace Q3N_LEVEL
