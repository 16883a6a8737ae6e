// One block of positions as a tile of queries sees it, and how the blocks of a query are merged.
// Of block b a row (a query and head) has m_b = max_i s_i, l_b = sum_i exp(s_i - m_b) and
// o_b = sum_i exp(s_i - m_b) v_i; these start from nothing in each block and are merged in the
// order of the blocks, so that no result depends on which blocks one task takes.
#pragma once

#include <limits>
#include <memory>

#include "dot_tile.h"
#include "sequences.h"
#include "values.h"

namespace Q3N_LEVEL {

constexpr int64_t kBlock = 256;  // positions

template <class T>
struct Operands {
  const T *q, *key, *value;
  int64_t q_stride, key_stride, value_stride;
  int64_t Hq, Hkv, D;
  float scale;

  int64_t share() const { return Hq / Hkv; }  // query heads of a kv head
  int64_t row_size() const { return round_up(D, kColumns) + kLanes; }
};

// A row of a block, or of those merged so far: o, padded; then m and l.
struct Partial {
  float* o;
  int64_t padded;

  float& m() const { return o[padded]; }
  float& l() const { return o[padded + 1]; }
};

// Rows [query][head of the kv head].
template <class T>
Partial row_of(const Operands<T>& in, float* rows, int64_t i) {
  return {rows + i * in.row_size(), in.row_size() - kLanes};
}

inline void clear(const Partial& row) {
  std::fill(row.o, row.o + row.padded, 0.0f);
  row.m() = -std::numeric_limits<float>::infinity(), row.l() = 0.0f;
}

inline void merge(const Partial& into, const Partial& block) {
  const float m = std::max(into.m(), block.m());
  const f32v old = exp(splat(into.m() - m)), fresh = exp(splat(block.m() - m));
  for (int64_t i = 0; i < into.padded; i += kLanes) {
    store(into.o + i, fma(load(block.o + i), fresh, load(into.o + i) * old));
  }
  into.l() = into.l() * old[0] + block.l() * fresh[0];
  into.m() = m;
}

template <class T>
void write_out(T* out, const Partial& row, int64_t D) {
  const f32v share = splat(row.l() == 0.0f ? 0.0f : 1.0f / row.l());
  for_vectors(D, [&](int64_t i, int64_t lanes) { store(out + i, load(row.o + i) * share, lanes); });
}

// Where the keys and values of a block lie, in the order in which they are seen.
template <class T>
struct Places {
  const T *key[kBlock], *value[kBlock];
  int64_t count = 0;

  // Those of the block at `start`; the last one stands for what is missing of a whole block.
  void find(const Operands<T>& in, const Sequence& s, int64_t query, int64_t start, int64_t kv) {
    count = 0;
    s.for_slots(query, start, std::min(start + kBlock, s.seen(query)), [&](int64_t slot) {
      key[count] = in.key + slot * in.key_stride + kv * in.D;
      value[count++] = in.value + slot * in.value_stride + kv * in.D;
    });
    if (count) std::fill(key + count, key + kBlock, key[count - 1]);
    if (count) std::fill(value + count, value + kBlock, value[count - 1]);
  }
};

// One thread's room for a tile.
template <class T>
struct Room {
  Places<T> places[2];
  std::unique_ptr<const T*[]> queries;
  std::unique_ptr<float[]> scores;
  std::unique_ptr<Weight<T>[]> weights;
  std::unique_ptr<float[]> block, state;  // rows: of one block, and merged so far

  Room(const Operands<T>& in, int64_t height)
      : queries(new const T*[height]),
        scores(new float[height * kBlock]),
        weights(new Weight<T>[in.share() * kBlock]),
        block(new float[height * in.row_size()]),
        state(new float[height * in.row_size()]) {}
};

// weights = exp(scale s - m), zero beyond n; sets m and l.
template <class W>
void softmax(float* s, int64_t n, float scale, W* weights, const Partial& row) {
  const float lowest = -std::numeric_limits<float>::infinity();
  const int64_t padded = round_up(n, kLanes);
  std::fill(s + n, s + padded, lowest);
  f32v high = splat(lowest);
  for (int64_t i = 0; i < padded; i += kLanes) {
    const f32v x = load(s + i) * scale;
    high = x > high ? x : high;
    store(s + i, x);
  }
  float m = high[0];
  for (int64_t i = 1; i < kLanes; ++i) m = std::max(m, high[i]);
  f32v total{};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const f32v p = exp(load(s + i) - m);
    total += p;
    store(weights + i, p);
  }
  row.m() = m, row.l() = sum(total);
}

// The block at `start` for queries [first, last), all of which see a beginning of `places`.
// rows: theirs, of which those that see nothing here are left alone. The keys of the places
// `ahead`, if any, come into the cache meanwhile.
template <class T>
void attend(const Operands<T>& in, const Sequence& s, int64_t first, int64_t last, int64_t kv,
            int64_t start, const Places<T>& places, const Places<T>* ahead, Room<T>& room,
            float* rows) {
  const int64_t share = in.share(), count = places.count, height = (last - first) * share;
  for (int64_t i = 0; i < height; ++i) {
    const int64_t token = s.begin + first + i / share, head = kv * share + i % share;
    room.queries[i] = in.q + token * in.q_stride + head * in.D;
  }
  for (int64_t j = 0; j < count; j += kTileRows) {
    const T *key[kTileRows], *value[kTileRows];
    std::copy_n(places.key + j, kTileRows, key), std::copy_n(places.value + j, kTileRows, value);
    for_tiles(0, height, [&](int64_t i, int64_t n) {
      const T* x[kTileTokens];
      std::copy_n(&room.queries[i], n, x);
      float sums[kTileTokens][kTileRows];
      dot_tile(n, key, x, i == 0 ? value : nullptr, in.D, sums);
      for (int64_t k = 0; k < n; ++k) {
        std::memcpy(&room.scores[(i + k) * kBlock + j], sums[k], sizeof sums[k]);
      }
    });
  }
  for (int64_t i = first; i < last; ++i) {
    const int64_t n = std::min(count, s.seen(i) - start);
    if (n <= 0) continue;
    const int64_t at = (i - first) * share;
    for (int64_t h = 0; h < share; ++h) {
      softmax(&room.scores[(at + h) * kBlock], n, in.scale, &room.weights[h * kBlock],
              row_of(in, rows, at + h));
    }
    weigh<T>(room.weights.get(), kBlock, share, places.value, n, ahead ? ahead->key : nullptr, in.D,
             row_of(in, rows, at).o, in.row_size());
    ahead = nullptr;
  }
}

}  // namespace Q3N_LEVEL
