// C = beta C + A B in registers: the one matrix product of the chunked form.
#pragma once

#include "simd.h"

namespace Q3N_LEVEL {

// Register budget: kTileRows x 2 accumulators, 2 of B, 1 of A; 32 registers, or 16 below AVX-512.
constexpr int kTileRows = kLanes == 16 ? 8 : 4;
constexpr int64_t kTileCols = 2 * kLanes;

// Row-major; M and N are multiples of the tile. A product of size K = 0 scales C.
inline void gemm(int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B,
                 int64_t ldb, float beta, float* C, int64_t ldc) {
  for (int64_t n = 0; n < N; n += kTileCols) {
    for (int64_t m = 0; m < M; m += kTileRows) {
      f32v c[kTileRows][2];
      float* to = C + m * ldc + n;
      const auto each_row = [](auto f) Q3N_INLINE { repeat<kTileRows>(kTileRows, f); };
      each_row([&](int64_t i) Q3N_INLINE {
        c[i][0] = beta == 0.0f ? f32v{} : beta * load(to + i * ldc);
        c[i][1] = beta == 0.0f ? f32v{} : beta * load(to + i * ldc + kLanes);
      });
      const float *a = A + m * lda, *b = B + n;
      for (int64_t k = 0; k < K; ++k) {
        const f32v b0 = load(b + k * ldb), b1 = load(b + k * ldb + kLanes);
        each_row([&](int64_t i) Q3N_INLINE {
          const f32v x = splat(a[i * lda + k]);
          c[i][0] = fma(x, b0, c[i][0]);
          c[i][1] = fma(x, b1, c[i][1]);
        });
      }
      each_row([&](int64_t i) Q3N_INLINE {
        store(to + i * ldc, c[i][0]);
        store(to + i * ldc + kLanes, c[i][1]);
      });
    }
  }
}

}  // namespace Q3N_LEVEL
