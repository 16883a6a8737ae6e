#include <limits>
#include <vector>

#include "integers.h"
#include "ops.h"
#include "tensor.h"

namespace Q3N_LEVEL {
namespace {

// A register tile is kTileTokens tokens of the vocabulary by kTileBatch vectors x. Registers: 16
// accumulators, 4 for weights, 1 for x with AVX-512; 8, 4 and 1 below it, and 1 for products.
constexpr int kTileTokens = 4;
constexpr int kTileBatch = kLanes == 16 ? 4 : 2;
constexpr int64_t kBlockBytes = 1 << 16;  // of weights: a block, which all its tiles read from L2

struct Head {
  const int8_t* weight;
  const float* scales;
  const int32_t* token_ids;  // [R], the tokens to score
  int64_t R, D, stride;
  const int8_t* weights(int64_t i) const { return weight + token_ids[i] * stride; }
  float scale(int64_t i) const { return scales[token_ids[i]]; }
};

// x as integers, padded with zeros to whole vectors.
struct Batch {
  std::vector<int16_t> integers;
  std::vector<float> scale;
  int64_t N, width;
};

struct Best {
  int64_t index = 0;  // into token_ids
  float score = -std::numeric_limits<float>::infinity();
  void update(int64_t i, float s) {
    if (s > score) index = i, score = s;
  }
};

// Rounds x [D] to integers of at most `limit` and returns their scale: zero if x is zero; NaN, with
// integers of zero, if x is not finite.
template <class T>
float quantise(int16_t* out, const T* x, int64_t D, int64_t width, int64_t limit) {
  f32v largest{}, zero_if_finite{};
  for_vectors(D, [&](int64_t i, int64_t lanes) {
    const f32v v = load(x + i, lanes), size = v < 0.0f ? -v : v;
    largest = size > largest ? size : largest;
    zero_if_finite += v - v;
  });
  float most = 0.0f;
  for (int i = 0; i < kLanes; ++i) most = std::max(most, largest[i]);
  const bool finite = sum(zero_if_finite) == 0.0f;
  if (!finite || most < 1e-30f) {  // a smaller scale would be a denormal
    std::memset(out, 0, width * sizeof *out);
    return finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  const float scale = most / limit;
  for (int64_t i = 0; i < width; i += kLanes) {
    const f32v v = load(x + i, std::clamp<int64_t>(D - i, 0, kLanes)) / splat(scale);
    store(out + i, __builtin_convertvector(nearest_integer(v), i32v));
  }
  return scale;
}

// x as integers so small that every sum of products with int8 weights is exact in int32.
Batch quantised(const Tensor& x) {
  const int64_t N = x.size(0), D = x.size(1), stride = x.stride(0),
                width = round_up(D, IntegerTerms::kCount);
  const int64_t exact = std::numeric_limits<int32_t>::max() / (128 * std::max<int64_t>(1, D));
  const int64_t limit = std::min<int64_t>(std::numeric_limits<int16_t>::max(), exact);
  Batch batch{std::vector<int16_t>(N * width), std::vector<float>(N), N, width};
  with_dtype(x, [&]<class T>(T) {
    const T* xs = read<T>(x);
    parallel(N, grain_of(D), [&](int64_t n) {
      batch.scale[n] =
          quantise(batch.integers.data() + n * width, xs + n * stride, D, width, limit);
    });
  });
  return batch;
}

// sums[n][r] = weight_r · x_n, exact.
template <int kBatch>
void tile(int32_t (&sums)[kTileBatch][kTileTokens], const int8_t* const (&weight)[kTileTokens],
          const int16_t* x, int64_t width, int64_t D) {
  using V = IntegerTerms;
  V::Sum total[kBatch][kTileTokens] = {};
  const auto add = [&](int64_t d, int64_t count) Q3N_INLINE {
    V::Weight w[kTileTokens];
    repeat<kTileTokens>(kTileTokens,
                        [&](int64_t r) Q3N_INLINE { w[r] = V::weight(weight[r] + d, count); });
    repeat<kBatch>(kBatch, [&](int64_t n) Q3N_INLINE {
      const V::Vector xs = V::vector(x + n * width + d);
      repeat<kTileTokens>(
          kTileTokens, [&](int64_t r) Q3N_INLINE { total[n][r] = V::add(w[r], xs, total[n][r]); });
    });
  };
  int64_t d = 0;
  for (; d + V::kCount <= D; d += V::kCount) add(d, V::kCount);
  if (d < D) add(d, D - d);
  repeat<kBatch>(kBatch, [&](int64_t n) Q3N_INLINE {
    repeat<kTileTokens>(kTileTokens,
                        [&](int64_t r) Q3N_INLINE { sums[n][r] = V::total(total[n][r]); });
  });
}

// `tile` for `count` vectors x, at most kBatch.
template <int kBatch = kTileBatch>
void tile_of(int64_t count, int32_t (&sums)[kTileBatch][kTileTokens],
             const int8_t* const (&weight)[kTileTokens], const int16_t* x, int64_t width,
             int64_t D) {
  if constexpr (kBatch > 1) {
    if (count < kBatch) return tile_of<kBatch - 1>(count, sums, weight, x, width, D);
  }
  tile<kBatch>(sums, weight, x, width, D);
}

// Updates each x's best of token_ids [begin, end). Each pass over the block also prefetches a part
// of the next block.
void best_of_block(Best* best, const Head& head, const Batch& batch, int64_t begin, int64_t end) {
  const int64_t passes = (batch.N + kTileBatch - 1) / kTileBatch;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t first = pass * kTileBatch, count = std::min<int64_t>(kTileBatch, batch.N - first);
    for (int64_t r = begin; r < end; r += kTileTokens) {
      const int64_t ahead = r + end - begin;
      for (int64_t i = pass * kTileTokens / passes; i < (pass + 1) * kTileTokens / passes; ++i) {
        if (ahead + i < head.R) prefetch(head.weights(ahead + i), head.D);
      }
      const int8_t* weights[kTileTokens];
      for (int64_t i = 0; i < kTileTokens; ++i) weights[i] = head.weights(std::min(r + i, end - 1));
      int32_t sums[kTileBatch][kTileTokens];
      tile_of(count, sums, weights, batch.integers.data() + first * batch.width, batch.width,
              head.D);
      for (int64_t n = 0; n < count; ++n) {
        for (int64_t i = 0; i < std::min<int64_t>(kTileTokens, end - r); ++i) {
          best[first + n].update(r + i, static_cast<float>(sums[n][i]) * head.scale(r + i));
        }
      }
    }
  }
}

std::tuple<Tensor, Tensor> draft_head(Tensor x, Tensor weight, Tensor scale, Tensor token_ids) {
  const int64_t N = x.size(0), D = x.size(1), R = token_ids.size(0);
  const Head head{read<int8_t>(weight), read<float>(scale), read<int32_t>(token_ids), R, D,
                  weight.stride(0)};
  for (int64_t i = 0; i < R; ++i) {
    check(0 <= head.token_ids[i] && head.token_ids[i] < weight.size(0), "draft_head: token_ids[", i,
          "] = ", head.token_ids[i], " is not one of ", weight.size(0), " rows");
  }
  const Batch batch = quantised(x);

  const int64_t block = round_up(1 + kBlockBytes / (D + 1), kTileTokens);
  const int64_t blocks = (R + block - 1) / block;
  std::vector<Best> best(blocks * N);
  parallel(blocks, grain(blocks, R * D, N), [&](int64_t b) {
    best_of_block(best.data() + b * N, head, batch, b * block, std::min(R, (b + 1) * block));
  });

  Tensor tokens = empty_as(x, {N}, ScalarType::Long);
  Tensor values = empty_as(x, {N}, ScalarType::Float);
  int64_t* token = write<int64_t>(tokens);
  float* value = write<float>(values);
  for (int64_t n = 0; n < N; ++n) {
    Best found;
    for (int64_t b = 0; b < blocks; ++b) found.update(best[b * N + n].index, best[b * N + n].score);
    token[n] = head.token_ids[found.index];
    value[n] = found.score * batch.scale[n];
  }
  return {tokens, values};
}

}  // namespace
}  // namespace Q3N_LEVEL

Q3N_OP(draft_head)
