#include <limits>
#include <vector>

#include "ops.h"
#include "tensor.h"

namespace Q3N_LEVEL {
namespace {

// A tile of scores is kTileRows of the head by kTileBatch of x, in registers: 16 accumulators, 4
// weights, 1 of x; below AVX-512 8, 4 and 1, with one more for the products.
constexpr int kTileRows = 4;
constexpr int kTileBatch = kLanes == 16 ? 4 : 2;
constexpr int64_t kPairs = 2 * kLanes;    // integers in a vector
constexpr int64_t kBlockBytes = 1 << 17;  // of weight, which the batch goes over from the cache

struct Best {
  int64_t row;
  float score;
};

// x in integers of at most `limit`, zeros beyond D. Returns the step between them: zero for a row
// of zeros, NaN for one that is not finite, whose integers are zeros too.
template <class T>
float quantise(int16_t* out, const T* x, int64_t D, int64_t width, int64_t limit) {
  f32v largest{}, nonfinite{};
  for_vectors(D, [&](int64_t i, int64_t lanes) {
    const f32v v = load(x + i, lanes), size = v < 0.0f ? -v : v;
    largest = size > largest ? size : largest;
    nonfinite += v - v;
  });
  float most = 0.0f;
  for (int i = 0; i < kLanes; ++i) most = std::max(most, largest[i]);
  const bool finite = sum(nonfinite) == 0.0f;
  if (!finite || most < 1e-30f) {
    std::memset(out, 0, width * sizeof *out);
    return finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  const float step = most / limit;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer
  for (int64_t i = 0; i < width; i += kLanes) {
    const f32v v = load(x + i, std::clamp<int64_t>(D - i, 0, kLanes)) / splat(step);
    store(out + i, __builtin_convertvector((v + kRound) - kRound, i32v));
  }
  return step;
}

// sums[n][r] = weight_r · x_n, exactly. x is padded with zeros to `width`.
template <int kBatch>
void tile(int32_t (&sums)[kTileBatch][kTileRows], const int8_t* const (&weight)[kTileRows],
          const int16_t* x, int64_t width, int64_t D) {
  i32v total[kBatch][kTileRows] = {};
  const auto add = [&](int64_t d, int64_t count) Q3N_INLINE {
    i16v w[kTileRows];
    repeat<kTileRows>(kTileRows, [&](int64_t r) Q3N_INLINE { w[r] = widen(weight[r] + d, count); });
    repeat<kBatch>(kBatch, [&](int64_t n) Q3N_INLINE {
      const i16v xs = load(x + n * width + d);
      repeat<kTileRows>(kTileRows, [&](int64_t r) Q3N_INLINE {
        total[n][r] = add_products(xs, w[r], total[n][r]);
      });
    });
  };
  int64_t d = 0;
  for (; d + kPairs <= D; d += kPairs) add(d, kPairs);
  if (d < D) add(d, D - d);
  repeat<kBatch>(kBatch, [&](int64_t n) Q3N_INLINE {
    repeat<kTileRows>(kTileRows, [&](int64_t r) Q3N_INLINE { sums[n][r] = sum(total[n][r]); });
  });
}

// A tile of at most kBatch of x.
template <int kBatch = kTileBatch>
void tile_of(int64_t batch, int32_t (&sums)[kTileBatch][kTileRows],
             const int8_t* const (&weight)[kTileRows], const int16_t* x, int64_t width, int64_t D) {
  if constexpr (kBatch > 1) {
    if (batch < kBatch) return tile_of<kBatch - 1>(batch, sums, weight, x, width, D);
  }
  tile<kBatch>(sums, weight, x, width, D);
}

}  // namespace

std::tuple<Tensor, Tensor> draft_head(Tensor x, Tensor weight, Tensor scale) {
  const int64_t N = x.size(0), D = x.size(1), R = weight.size(0);
  const int64_t x_stride = x.stride(0), stride = weight.stride(0), width = round_up(D, kPairs);
  const int64_t exact = std::numeric_limits<int32_t>::max() / (128 * std::max<int64_t>(1, D));
  const int64_t limit = std::min<int64_t>(std::numeric_limits<int16_t>::max(), exact);
  std::vector<int16_t> integers(N * width);
  std::vector<float> steps(N);
  with_dtype(x, [&]<class A>(A) {
    const A* xs = read<A>(x);
    parallel(N, 1 + 16384 / (D + 1), [&](int64_t n) {
      steps[n] = quantise(integers.data() + n * width, xs + n * x_stride, D, width, limit);
    });
  });

  const int8_t* weights = read<int8_t>(weight);
  const float* scales = read<float>(scale);
  const int64_t block = round_up(1 + kBlockBytes / (D + 1), kTileRows);
  const int64_t blocks = (R + block - 1) / block;
  std::vector<Best> best(N * blocks, {0, -std::numeric_limits<float>::infinity()});
  parallel(blocks, 1, [&](int64_t b) {
    const int64_t end = std::min(R, (b + 1) * block);
    for (int64_t n = 0; n < N; n += kTileBatch) {
      const int64_t batch = std::min<int64_t>(kTileBatch, N - n);
      for (int64_t r = b * block; r < end; r += kTileRows) {
        const int8_t* rows[kTileRows];
        for (int64_t i = 0; i < kTileRows; ++i)
          rows[i] = weights + std::min(r + i, end - 1) * stride;
        int32_t sums[kTileBatch][kTileRows];
        tile_of(batch, sums, rows, integers.data() + n * width, width, D);
        for (int64_t i = 0; i < batch; ++i) {
          Best& so_far = best[b * N + n + i];
          for (int64_t j = 0; j < std::min<int64_t>(kTileRows, end - r); ++j) {
            const float score = static_cast<float>(sums[i][j]) * scales[r + j];
            if (score > so_far.score) so_far = {r + j, score};
          }
        }
      }
    }
  });

  Tensor rows = torch::stable::new_empty(x, {N}, ScalarType::Long);
  Tensor values = torch::stable::new_empty(x, {N}, ScalarType::Float);
  int64_t* row = write<int64_t>(rows);
  float* value = write<float>(values);
  for (int64_t n = 0; n < N; ++n) {
    Best found = best[n];
    for (int64_t b = 1; b < blocks; ++b) {
      if (best[b * N + n].score > found.score) found = best[b * N + n];
    }
    row[n] = found.row;
    value[n] = found.score * steps[n];
  }
  return {rows, values};
}

}  // namespace Q3N_LEVEL
