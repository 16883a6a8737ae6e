// Attention of a tile of queries to one block of positions, in vectors.
#pragma once

#include "dot_tile.h"
#include "rows.h"

namespace Q3N_LEVEL {

// How many kv heads are worth reading together, because they are contiguous in memory.
template <class T>
int64_t heads_together(const Operands<T>& in) {
  const bool contiguous = in.key.head == in.D && in.value.head == in.D;
  return contiguous ? std::clamp<int64_t>(kMaxRow<T> / in.D, 1, in.Hkv) : 1;
}

// Computes rows of one tile after another, in scratch memory of its own.
template <class T>
class BlockAttention {
 public:
  static constexpr int64_t kMostRows = 64;  // that share a pass over the keys

  // How many kv heads a tile of so many queries takes.
  static int64_t together(const Operands<T>& in, int64_t) { return heads_together(in); }

  // For tiles of at most so many rows.
  BlockAttention(const Operands<T>& in, int64_t rows)
      : in_(in),
        queries_(new const T*[rows]),
        scores_(new float[rows * kBlock]),
        weights_(new Weight<T>[kWeighed * kBlock]) {}

  // Takes the queries of a tile.
  void take(const Tile& tile) {
    const T** to = queries_.get();
    for (int64_t h = 0; h < tile.heads; ++h) {
      for (int64_t i = tile.first; i < tile.last; ++i) {
        const T* q = in_.q + (tile.sequence->begin + i) * in_.q_stride;
        for (int64_t r = 0; r < in_.share(); ++r)
          *to++ = q + ((tile.kv + h) * in_.share() + r) * in_.D;
      }
    }
  }

  // Computes `rows` for the block at `start`, for a part of the tile taken: its rows begin at row
  // `begin` of the tile. Each of its queries sees a prefix of `places`; rows of queries that see
  // nothing of it are left alone. Prefetches the values, the keys too if they are `cold`, and the
  // keys of `ahead` unless it is null.
  void run(const Tile& part, int64_t begin, int64_t start, const Places<T>& places, bool cold,
           const Places<T>* ahead, float* rows) {
    const int64_t columns = part.heads * ((in_.D + kColumns - 1) / kColumns);
    Ahead<T> keys{ahead ? ahead->key : nullptr, ahead ? ahead->count : 0, round_up(columns, 2),
                  bytes(part)};
    int64_t first = part.first;
    while (first < part.last && !places.seen(*part.sequence, first, start)) ++first;
    score(part, begin, first, places, cold);
    for (int64_t h = 0; h < part.heads; ++h) {
      weigh_rows_of(part, h, first, start, places, keys, rows);
    }
  }

  // out = o / l.
  static void write(T* out, const Partial& row, int64_t D) {
    const f32v share = row.share();
    for_vectors(D, [&](int64_t i, int64_t n) { store(out + i, load(row.o + i) * share, n); });
  }

 private:
  int64_t bytes(const Tile& part) const { return part.heads * in_.D * sizeof(T); }

  // Scores of the rows of queries from `first` on.
  void score(const Tile& part, int64_t begin, int64_t first, const Places<T>& places, bool cold) {
    const int64_t height = part.queries() * in_.share();  // rows of a kv head
    const int64_t skipped = (first - part.first) * in_.share();
    for (int64_t j = 0; j < places.count; j += kTileRows) {
      for (int64_t r = j + kSoon; cold && r < std::min(j + kSoon + kTileRows, kBlock); ++r) {
        prefetch(places.key[r], bytes(part));
      }
      for (int64_t h = 0; h < part.heads; ++h) {
        const T *key[kTileRows], *value[kTileRows];
        for (int64_t r = 0; r < kTileRows; ++r) {
          key[r] = places.key[j + r] + h * in_.D, value[r] = places.value[j + r] + h * in_.D;
        }
        const int64_t from = h * height + skipped;
        for_tiles(from, (h + 1) * height, [&](int64_t row, int64_t n) {
          const T* x[kTileTokens];
          std::copy_n(&queries_[begin + row], n, x);
          float sums[kTileTokens][kTileRows];
          dot_tile(n, key, x, row == from ? value : nullptr, in_.D, sums);
          for (int64_t k = 0; k < n; ++k) {
            std::memcpy(&scores_[(row + k) * kBlock + j], sums[k], sizeof sums[k]);
          }
        });
      }
    }
  }

  // Weighted sums of a kv head's rows, some rows that see equally many positions at a time.
  void weigh_rows_of(const Tile& part, int64_t h, int64_t first, int64_t start,
                     const Places<T>& places, Ahead<T>& keys, float* rows) {
    const int64_t share = in_.share(), height = part.queries() * share;
    const auto seen = [&](int64_t i) {
      return places.seen(*part.sequence, part.first + i / share, start);
    };
    int64_t count;
    for (int64_t i = (first - part.first) * share; i < height; i += count) {
      const int64_t n = seen(i), row = h * height + i;
      count = 1;
      while (count < kWeighed && i + count < height && seen(i + count) == n) ++count;
      for (int64_t r = 0; r < count; ++r) {
        softmax(&scores_[(row + r) * kBlock], n, in_.scale, &weights_[r * kBlock],
                row_of(in_, rows, row + r));
      }
      weigh<T>(weights_.get(), kBlock, count, places.value, n, h * in_.D, in_.D, keys,
               row_of(in_, rows, row).o, in_.row_size());
    }
  }

  const Operands<T>& in_;
  std::unique_ptr<const T*[]> queries_;
  std::unique_ptr<float[]> scores_;
  std::unique_ptr<Weight<T>[]> weights_;
};

}  // namespace Q3N_LEVEL
