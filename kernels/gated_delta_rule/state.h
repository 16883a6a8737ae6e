// The two operations on S [K, V]: multiplying it by rows, and folding a cell into it. Both use
// vectors along V and a fixed order of sums, so that no bit depends on tiles or on how tokens are
// grouped into rows.
#pragma once

#include "step.h"

namespace Q3N_LEVEL {

// Register budget: kRows x vectors_beside(kRows) accumulators, vectors_beside(kRows) operands and 1
// broadcast.
constexpr int kRows = kRegisters == 32 ? 8 : 4;
constexpr int vectors_beside(int rows) {
  return kRegisters == 32 ? (rows > 6 ? 2 : rows > 2 ? 4 : 8) : (rows > 2 ? 2 : 4);
}
constexpr int64_t kMaxDim = 256;   // of a key head
constexpr int64_t kColumns = 128;  // columns of S that one task takes
// Rows of S folded and then multiplied while they are in the nearest cache.
constexpr int64_t kBlock = 32;

// Calls f(constant C, v, lanes) over [0, n): C vectors at a time, then single vectors, the last of
// them masked.
template <int C, class F>
void for_columns(int64_t n, F&& f) {
  int64_t v = 0;
  for (; v + C * kLanes <= n; v += C * kLanes) {
    f(std::integral_constant<int, C>{}, v, static_cast<int64_t>(kLanes));
  }
  for (; v < n; v += kLanes) {
    f(std::integral_constant<int, 1>{}, v, std::min<int64_t>(kLanes, n - v));
  }
}

// A complete cell that is not yet in S: S = decay S + sum_j key_j w_j^T, w_j = u_j decayed to the
// cell's end.
struct Fold {
  float decay;
  const float* key[kGrid];  // [K] each
  alignas(64) float w[kGrid][kColumns];
};

template <int R, int C, class S>
Q3N_INLINE inline void fold_tile(const Fold& cell, int64_t k, const float* w, const S* from, S* to,
                                 int64_t ld, int64_t lanes) {
  f32v s[R][C];
  const auto each = [](auto f) Q3N_INLINE {
    repeat<R>(R,
              [&](int64_t r) Q3N_INLINE { repeat<C>(C, [&](int64_t c) Q3N_INLINE { f(r, c); }); });
  };
  each([&](int64_t r, int64_t c) Q3N_INLINE {
    s[r][c] = from ? cell.decay * load(from + r * ld + c * kLanes, lanes) : f32v{};
  });
  for (int64_t j = 0; j < kGrid; ++j) {
    f32v u[C];
    repeat<C>(C, [&](int64_t c) Q3N_INLINE { u[c] = load(w + j * kColumns + c * kLanes); });
    const float* key = cell.key[j] + k;
    each([&](int64_t r, int64_t c) Q3N_INLINE { s[r][c] = fma(splat(key[r]), u[c], s[r][c]); });
  }
  each([&](int64_t r, int64_t c) Q3N_INLINE { store(to + r * ld + c * kLanes, s[r][c], lanes); });
}

// Not inlined, as `multiply`: they are large, and callers are compiled for each dtype of inputs.
//
// Computes rows [k, end) of `to` from rows of `from`, which may be `to` itself, or null for S = 0.
template <class S>
[[gnu::noinline]] void fold(const Fold& cell, int64_t k, int64_t end, int64_t V, const S* from,
                            S* to, int64_t ld) {
  constexpr int R = 4;
  const auto rows = [&]<int N>(std::integral_constant<int, N>) {
    for_columns<vectors_beside(R)>(
        V, [&]<int C>(std::integral_constant<int, C>, int64_t v, int64_t lanes) {
          fold_tile<N, C>(cell, k, &cell.w[0][v], from ? from + k * ld + v : nullptr,
                          to + k * ld + v, ld, lanes);
        });
  };
  for (; k + R <= end; k += R) rows(std::integral_constant<int, R>{});
  for (; k < end; ++k) rows(std::integral_constant<int, 1>{});
}

template <int R, int C, class S>
Q3N_INLINE inline void multiply_tile(const float* x, int64_t k, int64_t end, const S* s,
                                     const S* soon, int64_t ld, float* product, int64_t lanes) {
  f32v p[R][C];
  const auto each = [](auto f) Q3N_INLINE {
    repeat<R>(R,
              [&](int64_t r) Q3N_INLINE { repeat<C>(C, [&](int64_t c) Q3N_INLINE { f(r, c); }); });
  };
  each([&](int64_t r, int64_t c)
           Q3N_INLINE { p[r][c] = load(product + r * kColumns + c * kLanes); });
  for (; k < end; ++k) {
    f32v row[C];
    repeat<C>(C, [&](int64_t c) Q3N_INLINE {
      if (soon) __builtin_prefetch(soon + k * ld + c * kLanes, 0, 2);
      row[c] = load(s + k * ld + c * kLanes, lanes);
    });
    each([&](int64_t r, int64_t c)
             Q3N_INLINE { p[r][c] = fma(splat(x[r * kMaxDim + k]), row[c], p[r][c]); });
  }
  each([&](int64_t r, int64_t c)
           Q3N_INLINE { store(product + r * kColumns + c * kLanes, p[r][c]); });
}

// product [rows, V] += x [rows, K] S over rows [k, end) of S. `rows` is even. Rows [k, end) of
// `soon` are prefetched, unless it is null.
template <class S>
[[gnu::noinline]] void multiply(const float* x, int64_t rows, int64_t k, int64_t end, int64_t V,
                                const S* s, const S* soon, int64_t ld, float* product) {
  const auto some = [&]<int R>(std::integral_constant<int, R>) {
    for_columns<vectors_beside(R)>(
        V, [&]<int C>(std::integral_constant<int, C>, int64_t v, int64_t lanes) {
          multiply_tile<R, C>(x, k, end, s + v, soon ? soon + v : nullptr, ld, product + v, lanes);
        });
    rows -= R, x += R * kMaxDim, product += R * kColumns, soon = nullptr;
  };
  while (rows >= kRows) some(std::integral_constant<int, kRows>{});
  if (rows == 6) some(std::integral_constant<int, 6>{});
  if (rows == 4) some(std::integral_constant<int, 4>{});
  if (rows == 2) some(std::integral_constant<int, 2>{});
}

}  // namespace Q3N_LEVEL
