// Attention of a tile of queries to one block of positions, and how blocks are merged. For block b
// a row (a query and a head) has m_b = max_i s_i, l_b = sum_i exp(s_i - m_b) and
// o_b = sum_i exp(s_i - m_b) v_i. Each block is computed by itself and blocks are merged in order,
// so that no result depends on which blocks a task takes.
#pragma once

#include <limits>
#include <memory>

#include "dot_tile.h"
#include "sequences.h"
#include "values.h"

namespace Q3N_LEVEL {

constexpr int64_t kBlock = 256;  // positions
constexpr int64_t kSoon = 16;    // positions ahead for which keys are prefetched

template <class T>
struct Operands {
  const T *q, *key, *value;
  int64_t q_stride, key_stride, value_stride;
  int64_t Hq, Hkv, D;
  float scale;

  int64_t share() const { return Hq / Hkv; }  // query heads of a kv head
  int64_t together() const { return std::clamp<int64_t>(kMaxRow<T> / D, 1, Hkv); }  // kv heads
  int64_t row_size() const { return round_up(D, kColumns) + kLanes; }
};

// Queries [first, last) of a sequence, with the query heads of kv heads [kv, kv + heads). Its rows
// are [query][kv head][query head of the kv head].
struct Tile {
  const Sequence* sequence;
  int64_t kv, heads, first, last;

  int64_t queries() const { return last - first; }
};

// A row of one block, or of the blocks merged so far: o (padded), then m and l.
struct Partial {
  float* o;
  int64_t padded;

  float& m() const { return o[padded]; }
  float& l() const { return o[padded + 1]; }
};

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

// Pointers to the keys and values of a block, in the order in which a query sees them.
template <class T>
struct Places {
  const T *key[kBlock], *value[kBlock];
  int64_t count = 0;

  // Finds those of the block at `start`. A block that is not full is filled up with its last one.
  void find(const Operands<T>& in, const Tile& tile, int64_t query, int64_t start) {
    const Sequence& s = *tile.sequence;
    const int64_t kv = tile.kv;
    count = 0;
    s.for_slots(query, start, std::min(start + kBlock, s.seen(query)), [&](int64_t slot) {
      key[count] = in.key + slot * in.key_stride + kv * in.D;
      value[count++] = in.value + slot * in.value_stride + kv * in.D;
    });
    if (count) std::fill(key + count, key + kBlock, key[count - 1]);
    if (count) std::fill(value + count, value + kBlock, value[count - 1]);
  }
};

// Scratch memory of one thread for a tile.
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

// Scores of a tile's rows at the places. Prefetches the values, and the keys too if they are
// `cold`.
template <class T>
void score(const Operands<T>& in, const Tile& tile, const Places<T>& places, bool cold,
           Room<T>& room) {
  const int64_t share = in.share(), width = tile.heads * share;
  for (int64_t i = 0; i < tile.queries() * width; ++i) {
    const int64_t token = tile.sequence->begin + tile.first + i / width;
    room.queries[i] = in.q + token * in.q_stride + (tile.kv * share + i % width) * in.D;
  }
  for (int64_t j = 0; j < places.count; j += kTileRows) {
    for (int64_t r = j + kSoon; cold && r < std::min(j + kSoon + kTileRows, kBlock); ++r) {
      prefetch(places.key[r], tile.heads * in.D * sizeof(T));
    }
    for (int64_t h = 0; h < tile.heads; ++h) {
      const T *key[kTileRows], *value[kTileRows];
      for (int64_t r = 0; r < kTileRows; ++r) {
        key[r] = places.key[j + r] + h * in.D, value[r] = places.value[j + r] + h * in.D;
      }
      for (int64_t i = h * share; i < tile.queries() * width; i += width) {
        for_tiles(i, i + share, [&](int64_t row, int64_t n) {
          const T* x[kTileTokens];
          std::copy_n(&room.queries[row], n, x);
          float sums[kTileTokens][kTileRows];
          dot_tile(n, key, x, row == h * share ? value : nullptr, in.D, sums);
          for (int64_t k = 0; k < n; ++k) {
            std::memcpy(&room.scores[(row + k) * kBlock + j], sums[k], sizeof sums[k]);
          }
        });
      }
    }
  }
}

// Computes the block at `start` for a tile. Each of its queries sees a prefix of `places`; `rows`
// of queries that see nothing of it are left alone. Prefetches the keys of `ahead`, unless null.
template <class T>
void attend(const Operands<T>& in, const Tile& tile, int64_t start, const Places<T>& places,
            bool cold, const Places<T>* ahead, Room<T>& room, float* rows) {
  const int64_t share = in.share(), bytes = tile.heads * in.D * sizeof(T);
  const int64_t columns = tile.heads * ((in.D + kColumns - 1) / kColumns);
  Ahead<T> keys{ahead ? ahead->key : nullptr, ahead ? ahead->count : 0, round_up(columns, 2),
                bytes};
  score(in, tile, places, cold, room);
  for (int64_t i = tile.first; i < tile.last; ++i) {
    const int64_t n = std::min(places.count, tile.sequence->seen(i) - start);
    for (int64_t h = 0; n > 0 && h < tile.heads; ++h) {
      const int64_t first = ((i - tile.first) * tile.heads + h) * share;
      for (int64_t r = 0; r < share; ++r) {
        softmax(&room.scores[(first + r) * kBlock], n, in.scale, &room.weights[r * kBlock],
                row_of(in, rows, first + r));
      }
      weigh<T>(room.weights.get(), kBlock, share, places.value, n, h * in.D, in.D, keys,
               row_of(in, rows, first).o, in.row_size());
    }
  }
}

}  // namespace Q3N_LEVEL
