// Attention of a tile of queries to one block of positions, in vectors.
#pragma once

#include "dot_tile.h"
#include "partials.h"

namespace Q3N_LEVEL {

// How many kv heads are worth reading together, because they are contiguous in memory.
template <class T>
int64_t heads_together(const Operands<T>& in) {
  const bool contiguous = in.key.head == in.D && in.value.head == in.D;
  return contiguous ? std::clamp<int64_t>(kMaxRow<T> / in.D, 1, in.Hkv) : 1;
}

// Computes the partials of one tile after another, in its own scratch memory.
template <class T>
class BlockAttention {
 public:
  static constexpr int64_t kMostPartials = 64;  // that share a pass over the keys

  // The kv heads that a tile of so many queries takes.
  static int64_t together(const Operands<T>& in, int64_t) { return heads_together(in); }

  // For tiles of at most so many partials.
  BlockAttention(const Operands<T>& in, int64_t partials)
      : in_(in),
        queries_(new const T*[partials]),
        scores_(new float[partials * kBlock]),
        weights_(new Weight<T>[kWeighed * kBlock]) {}

  // Takes the queries of a tile.
  void take(const Tile& tile) {
    const T** to = queries_.get();
    for (int64_t h = 0; h < tile.heads; ++h) {
      for (int64_t i = tile.first; i < tile.last; ++i) {
        const T* q = in_.q + (tile.sequence->begin + i) * in_.q_stride;
        for (int64_t r = 0; r < in_.group(); ++r)
          *to++ = q + ((tile.kv + h) * in_.group() + r) * in_.D;
      }
    }
  }

  // Computes `partials` of the block at `start` for a part of the tile, which begins at the tile's
  // partial `begin`. Each query sees a prefix of the block; the partials of queries that see
  // nothing of it are left alone. Prefetches the values, the keys too if they are `cold`, and the
  // keys of `ahead` unless it is null.
  void run(const Tile& part, int64_t begin, int64_t start, const BlockKV<T>& block_kv, bool cold,
           const BlockKV<T>* ahead, float* partials) {
    const int64_t columns = part.heads * ((in_.D + kColumns - 1) / kColumns);
    Prefetch<T> keys{ahead ? ahead->key : nullptr, ahead ? ahead->count : 0, round_up(columns, 2),
                     bytes(part)};
    int64_t first = part.first;
    while (first < part.last && !block_kv.seen(*part.sequence, first, start)) ++first;
    score(part, begin, first, block_kv, cold);
    for (int64_t h = 0; h < part.heads; ++h) {
      weigh_head(part, h, first, start, block_kv, keys, partials);
    }
  }

  // out = o / l.
  static void write(T* out, const Partial& from, int64_t D) {
    const f32v inverse = from.inverse();
    for_vectors(D, [&](int64_t i, int64_t n) { store(out + i, load(from.o + i) * inverse, n); });
  }

 private:
  int64_t bytes(const Tile& part) const { return part.heads * in_.D * sizeof(T); }

  // Scores of queries from `first` on.
  void score(const Tile& part, int64_t begin, int64_t first, const BlockKV<T>& block_kv,
             bool cold) {
    const int64_t height = part.queries() * in_.group();  // partials of a kv head
    const int64_t skipped = (first - part.first) * in_.group();
    for (int64_t j = 0; j < block_kv.count; j += kTileRows) {
      for (int64_t r = j + kSoon; cold && r < std::min(j + kSoon + kTileRows, kBlock); ++r) {
        prefetch(block_kv.key[r], bytes(part));
      }
      for (int64_t h = 0; h < part.heads; ++h) {
        const T *key[kTileRows], *value[kTileRows];
        for (int64_t r = 0; r < kTileRows; ++r) {
          key[r] = block_kv.key[j + r] + h * in_.D, value[r] = block_kv.value[j + r] + h * in_.D;
        }
        const int64_t from = h * height + skipped;
        for_tiles(from, (h + 1) * height, [&](int64_t partial, int64_t n) {
          const T* x[kTileTokens];
          std::copy_n(&queries_[begin + partial], n, x);
          float sums[kTileTokens][kTileRows];
          dot_tile(n, key, x, partial == from ? value : nullptr, in_.D, sums);
          for (int64_t k = 0; k < n; ++k) {
            std::memcpy(&scores_[(partial + k) * kBlock + j], sums[k], sizeof sums[k]);
          }
        });
      }
    }
  }

  // Weighted sums of a kv head, for partials that see equally many positions at a time.
  void weigh_head(const Tile& part, int64_t h, int64_t first, int64_t start,
                  const BlockKV<T>& block_kv, Prefetch<T>& keys, float* partials) {
    const int64_t group = in_.group(), height = part.queries() * group;
    const auto seen = [&](int64_t i) {
      return block_kv.seen(*part.sequence, part.first + i / group, start);
    };
    int64_t count;
    for (int64_t i = (first - part.first) * group; i < height; i += count) {
      const int64_t n = seen(i), partial = h * height + i;
      count = 1;
      while (count < kWeighed && i + count < height && seen(i + count) == n) ++count;
      for (int64_t r = 0; r < count; ++r) {
        softmax(&scores_[(partial + r) * kBlock], n, in_.scale, &weights_[r * kBlock],
                partial_at(in_, partials, partial + r));
      }
      weigh<T>(weights_.get(), kBlock, count, block_kv.value, n, h * in_.D, in_.D, keys,
               partial_at(in_, partials, partial).o, in_.partial_size());
    }
  }

  const Operands<T>& in_;
  std::unique_ptr<const T*[]> queries_;
  std::unique_ptr<float[]> scores_;
  std::unique_ptr<Weight<T>[]> weights_;
};

}  // namespace Q3N_LEVEL
