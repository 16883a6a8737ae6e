// Online softmax: the partial result of a query and a head for one block of positions, and how
// partials are merged. For block b it is m_b = max_i s_i, l_b = sum_i exp(s_i - m_b) and
// o_b = sum_i exp(s_i - m_b) v_i. Each block is computed by itself and blocks are merged in order,
// so that no result depends on which blocks a task takes.
#pragma once

#include <limits>
#include <memory>

#include "sequences.h"
#include "values.h"

namespace Q3N_LEVEL {

constexpr int64_t kBlock = 256;  // positions
constexpr int64_t kSoon = 16;    // positions ahead for which keys are prefetched

// Keys or values [pages, positions of a page, Hkv, D], and the strides of the first three dims.
template <class T>
struct Cache {
  const T* first;
  int64_t page, position, head;

  const T* at(int64_t p, int64_t i, int64_t kv) const {
    return first + p * page + i * position + kv * head;
  }
};

template <class T>
struct Operands {
  const T* q;
  int64_t q_stride;
  Cache<T> key, value;
  int64_t Hq, Hkv, D;
  float scale;

  int64_t group() const { return Hq / Hkv; }  // query heads of a kv head
  int64_t partial_size() const { return round_up(D, kColumns) + kLanes; }
};

// Queries [first, last) of a sequence, with the query heads of kv heads [kv, kv + heads). Its
// partials are [kv head][query][query head of the kv head].
struct Tile {
  const Sequence* sequence;
  int64_t kv, heads, first, last;

  int64_t queries() const { return last - first; }
};

// Of one block, or of the blocks merged so far: o (padded), then m and l.
struct Partial {
  float* o;
  int64_t padded;

  float& m() const { return o[padded]; }
  float& l() const { return o[padded + 1]; }
  f32v inverse() const { return splat(l() == 0.0f ? 0.0f : 1.0f / l()); }
};

template <class T>
Partial partial_at(const Operands<T>& in, float* partials, int64_t i) {
  return {partials + i * in.partial_size(), in.partial_size() - kLanes};
}

inline void clear(const Partial& to) {
  std::fill(to.o, to.o + to.padded, 0.0f);
  to.m() = -std::numeric_limits<float>::infinity(), to.l() = 0.0f;
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

// weights = exp(scale s - m), zero beyond n; sets m and l.
template <class W>
void softmax(float* s, int64_t n, float scale, W* weights, const Partial& to) {
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
  to.m() = m, to.l() = sum(total);
}

// Pointers to the keys and values of a block, in the order in which a query sees them.
template <class T>
struct BlockKV {
  const T *key[kBlock], *value[kBlock];
  int64_t count = 0;

  // Finds those of the block at `start`; the last one is repeated up to a full block.
  void find(const Operands<T>& in, const Tile& tile, int64_t query, int64_t start) {
    const Sequence& s = *tile.sequence;
    const int64_t kv = tile.kv;
    count = 0;
    s.for_positions(query, start, std::min(start + kBlock, s.seen(query)),
                    [&](int64_t p, int64_t i) {
                      key[count] = in.key.at(p, i, kv), value[count++] = in.value.at(p, i, kv);
                    });
    if (count) std::fill(key + count, key + kBlock, key[count - 1]);
    if (count) std::fill(value + count, value + kBlock, value[count - 1]);
  }

  // How many of them a query of the sequence sees.
  int64_t seen(const Sequence& sequence, int64_t query, int64_t start) const {
    return std::clamp<int64_t>(sequence.seen(query) - start, 0, count);
  }
};

}  // namespace Q3N_LEVEL
