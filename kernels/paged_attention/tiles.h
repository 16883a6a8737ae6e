// Attention of a tile of queries in bf16 to one block of positions, by AMX. The block's keys and
// values are packed once for all of the tile's rows.
#pragma once

#include "amx.h"
#include "block.h"

#if defined(__AMX_BF16__)

namespace Q3N_LEVEL {

constexpr int64_t kBlockSteps = kBlock / kStepColumns;  // of a weighted sum
constexpr int64_t kPackedBytes = kBlock * kMaxDim * sizeof(bf16);
// Rows of scores and weights, a vector longer than they need so that a tile's are in different sets
// of the cache.
constexpr int64_t kScoreRow = kBlock + kLanes, kWeightRow = kBlock + kStepColumns;

// Packs 32 columns of 16 keys: pairs of columns by positions.
inline void pack_keys(uint8_t* out, const bf16* const* key, int64_t column) {
  for (int64_t c = 0; c < kStepColumns; c += 8, out += 4 * kLine) {
    const auto quad = [&](int64_t i) Q3N_INLINE {  // 8 columns of keys i, i + 4, i + 8, i + 12
      const auto at = [&](int64_t k) Q3N_INLINE {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(key[i + k] + column + c));
      };
      __m512i v = _mm512_castsi128_si512(at(0));
      v = _mm512_inserti32x4(v, at(4), 1);
      v = _mm512_inserti32x4(v, at(8), 2);
      return _mm512_inserti32x4(v, at(12), 3);
    };
    const __m512i a = quad(0), b = quad(1), c2 = quad(2), d = quad(3);
    const __m512i low0 = _mm512_unpacklo_epi32(a, b), low1 = _mm512_unpacklo_epi32(c2, d);
    const __m512i high0 = _mm512_unpackhi_epi32(a, b), high1 = _mm512_unpackhi_epi32(c2, d);
    _mm512_store_si512(out, _mm512_unpacklo_epi64(low0, low1));
    _mm512_store_si512(out + kLine, _mm512_unpackhi_epi64(low0, low1));
    _mm512_store_si512(out + 2 * kLine, _mm512_unpacklo_epi64(high0, high1));
    _mm512_store_si512(out + 3 * kLine, _mm512_unpackhi_epi64(high0, high1));
  }
}

template <>
class BlockAttention<bf16> {
 public:
  static constexpr int64_t kMostRows = 256;

  // A tile of many rows takes one kv head, so that its keys and values are packed for all of them.
  static int64_t together(const Operands<bf16>& in, int64_t queries) {
    return queries * in.share() <= kHeight ? heads_together(in) : 1;
  }

  BlockAttention(const Operands<bf16>& in, int64_t rows)
      : in_(in),
        steps_((in.D + kStepColumns - 1) / kStepColumns),
        queries_(std::make_unique_for_overwrite<bf16[]>(rows * width())) {}

  void take(const Tile& tile) {
    bf16* to = queries_.get();
    for (int64_t h = tile.kv * in_.share(); h < (tile.kv + tile.heads) * in_.share();
         h += in_.share()) {
      for (int64_t i = tile.first; i < tile.last; ++i) {
        const bf16* q = in_.q + (tile.sequence->begin + i) * in_.q_stride + h * in_.D;
        for (int64_t r = 0; r < in_.share(); ++r, q += in_.D, to += width()) {
          std::memcpy(to, q, in_.D * sizeof *q);
          std::fill(to + in_.D, to + width(), bf16(0.0f));
        }
      }
    }
  }

  // Prefetches nothing: the processor sees what comes, and prefetching was slower.
  void run(const Tile& part, int64_t begin, int64_t start, const Places<bf16>& places, bool,
           const Places<bf16>*, float* rows) {
    const auto seen = [&](int64_t i) { return places.seen(*part.sequence, i, start); };
    int64_t first = part.first;
    while (first < part.last && !seen(first)) ++first;
    if (first == part.last) return;
    for (int64_t h = 0; h < part.heads; ++h) {
      const Source source{places, h * in_.D};
      const bool together = seen(first) == places.count || finite(source, seen(first));
      const int64_t height = together ? part.last - first : 1;
      for (int64_t i = first; i < part.last; i += height) {
        const int64_t row = (h * part.queries() + i - part.first) * in_.share();
        attend({part.sequence, part.kv + h, 1, i, i + height}, start, source, seen(i + height - 1),
               queries_.get() + (begin + row) * width(), rows + row * in_.row_size());
      }
    }
    _tile_release();
  }

  static void write(bf16* out, const Partial& row, int64_t D) {
    const f32v share = row.share();
    for (int64_t i = 0; i < D; i += kColumns) {
      f32v o[2] = {load(row.o + i) * share, load(row.o + i + kLanes) * share};
      Values<bf16>::in_order(o);
      for_vectors(std::min(D - i, kColumns),
                  [&](int64_t c, int64_t n) { store(out + i + c, o[c / kLanes], n); });
    }
  }

 private:
  // A head's keys and values: from a column of the places on.
  struct Source {
    const Places<bf16>& places;
    int64_t column;
  };

  // Rows that are computed together.
  struct Strip {
    const bf16* q;
    float* rows;
    int64_t begin, n;
  };

  struct alignas(kLine) Scratch {
    uint8_t keys[kPackedBytes], values[kPackedBytes];
    uint8_t queries[kHeight * kMaxDim * sizeof(bf16)];
    alignas(kLine) float scores[kPairHeight * kScoreRow];
    alignas(kLine) bf16 weights[kPairHeight * kWeightRow];
  };
  static Scratch& mine() {
    thread_local Scratch scratch;
    return scratch;
  }
  static inline const bf16 kZeros[kMaxDim] = {};

  int64_t width() const { return steps_ * kStepColumns; }
  static int64_t steps_of(int64_t count) { return (count + kStepColumns - 1) / kStepColumns; }

  // Whether the values from the place `first` on are: only then their product with 0 is 0.
  bool finite(const Source& source, int64_t first) const {
    const i32v exponent = i32v{} + 0x7f800000;
    i32v holds{};
    for (int64_t i = first; i < source.places.count; ++i) {
      const bf16* value = source.places.value[i] + source.column;
      for_vectors(in_.D, [&](int64_t c, int64_t n) {
        holds |= ((i32v)load(value + c, n) & exponent) == exponent;
      });
    }
    return !lane_mask(holds);
  }

  // Computes the rows of these queries, the last of which sees `count` places.
  void attend(const Tile& tile, int64_t start, const Source& source, int64_t count, const bf16* q,
              float* rows) const {
    Scratch& scratch = mine();
    const int64_t height = tile.queries() * in_.share(), steps = steps_of(count);
    const auto strip = [&](int64_t i) {
      return Strip{q + i * width(), rows + i * in_.row_size(), i,
                   std::min(height - i, kPairHeight)};
    };
    const auto weights = [&](const Strip& s) {
      for (int64_t r = 0; r < s.n; ++r) {
        const int64_t query = tile.first + (s.begin + r) / in_.share();
        const int64_t n = std::min(count, source.places.seen(*tile.sequence, query, start));
        bf16* to = scratch.weights + r * kWeightRow;
        softmax(scratch.scores + r * kScoreRow, n, in_.scale, to, row_of(in_, s.rows, r));
        std::fill(to + round_up(n, kLanes), to + steps * kStepColumns, bf16(0.0f));
      }
    };
    const bool few = height <= kHeight;
    if (few) {
      score_few(strip(0), source, count);
    } else {
      pack_all_keys(source, count);
    }
    pack_values(source, count);
    for (int64_t i = 0; i < height; i += kPairHeight) {
      const Strip now = strip(i);
      if (!i || now.n < kPairHeight) {
        configure(std::min(now.n, kHeight), std::max<int64_t>(now.n - kHeight, 0));
      }
      if (!few) score(now, steps);
      weights(now);
      weigh(now, steps);
    }
  }

  // Packs the first `count` keys.
  void pack_all_keys(const Source& source, int64_t count) const {
    for (int64_t j = 0; j < steps_of(count) * kStepColumns; j += kTileWidth) {
      pack_tiles(mine().keys + j / kTileWidth * steps_ * kTileBytes, source.places.key + j,
                 source.column);
    }
  }

  void pack_tiles(uint8_t* out, const bf16* const* key, int64_t column) const {
    const int64_t whole = in_.D / kStepColumns, tail = in_.D % kStepColumns;
    for (int64_t s = 0; s < whole; ++s) {
      pack_keys(out + s * kTileBytes, key, column + s * kStepColumns);
    }
    if (!tail) return;
    bf16 padded[kTileWidth][kStepColumns] = {};
    const bf16* rows[kTileWidth];
    for (int64_t i = 0; i < kTileWidth; ++i) {
      std::memcpy(padded[i], key[i] + column + whole * kStepColumns, tail * sizeof(bf16));
      rows[i] = padded[i];
    }
    pack_keys(out + whole * kTileBytes, rows, 0);
  }

  // Packs the first `count` values; the next ones' weights are zero.
  void pack_values(const Source& source, int64_t count) const {
    const auto value = [&](int64_t i) {
      return i < count ? source.places.value[i] + source.column : kZeros;
    };
    for (int64_t i = 0; i < steps_of(count) * kStepColumns; i += 2) {
      pack_pair(mine().values + i / kStepColumns * kTileBytes + i % kStepColumns / 2 * kLine,
                value(i), value(i + 1));
    }
  }

  // Packs the values of two positions, in a line of each of the tiles of a step.
  void pack_pair(uint8_t* out, const bf16* even, const bf16* odd) const {
    const bf16* const rows[] = {even, odd};
    for (int64_t c = 0; c < in_.D; c += kColumns, out += 2 * kBlockSteps * kTileBytes) {
      __m512bh v[2];
      if (c + kColumns <= in_.D) {
        Values<bf16>::load(rows, c, v);
      } else {
        Values<bf16>::load(rows, c, v, in_.D - c);
      }
      _mm512_store_si512(out, (__m512i)v[0]);
      _mm512_store_si512(out + kBlockSteps * kTileBytes, (__m512i)v[1]);
    }
  }

  void score(const Strip& strip, int64_t steps) const {
    const TileLines x0{strip.q, kLine, width() * int64_t{sizeof(bf16)}}, x1 = x0.below(kHeight);
    const auto add = strip.n > kHeight ? add_steps<true> : add_steps<false>;
    for (int64_t j = 0; j < steps; ++j) {
      const uint8_t* keys = mine().keys + 2 * j * steps_ * kTileBytes;
      add(mine().scores + j * kPanelWidth, kScoreRow, {keys, keys + steps_ * kTileBytes}, x0, x1,
          steps_, true);
    }
  }

  // Weighted sums of the values.
  void weigh(const Strip& strip, int64_t steps) const {
    const Scratch& scratch = mine();
    const TileLines x0{scratch.weights, kLine, kWeightRow * int64_t{sizeof(bf16)}};
    const TileLines x1 = x0.below(kHeight);
    const auto add = strip.n > kHeight ? add_steps<true> : add_steps<false>;
    for (int64_t c = 0; c < in_.D; c += kPanelWidth) {
      const uint8_t* values = scratch.values + c / kTileWidth * kBlockSteps * kTileBytes;
      add(strip.rows + c, in_.row_size(), {values, values + kBlockSteps * kTileBytes}, x0, x1,
          steps, true);
    }
  }

  // Scores of at most 16 rows: keys as they lie in memory times packed queries. The products are
  // added in the same order as in `score`.
  void score_few(const Strip& strip, const Source& source, int64_t count) const {
    constexpr int64_t kTiles = 4, kStride = kTiles * kTileWidth;
    Scratch& scratch = mine();
    const bf16* q[kTileWidth];
    for (int64_t r = 0; r < kTileWidth; ++r) q[r] = r < strip.n ? strip.q + r * width() : kZeros;
    pack_tiles(scratch.queries, q, 0);
    configure(kHeight, kHeight);
    alignas(kLine) float sums[kStride][kTileWidth];
    for (int64_t j = 0; j < steps_of(count) * kStepColumns; j += kStride) {
      TileLines keys[kTiles];
      for (int64_t t = 0; t < kTiles; ++t) keys[t] = key_lines(source, j, t);
      add_tiles(sums[0], keys, scratch.queries);
      const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      for (int64_t r = 0; r < strip.n; ++r) {
        for (int64_t i = 0; i < kStride; i += kTileWidth) {
          store(scratch.scores + r * kScoreRow + j + i,
                (f32v)_mm512_i32gather_ps(_mm512_slli_epi32(lane, 4), sums[i] + r, sizeof(float)));
        }
      }
    }
  }

  // Tile t of the keys from place j on: in memory if they are equally far apart, else copied.
  TileLines key_lines(const Source& source, int64_t j, int64_t t) const {
    const bf16* const* key = source.places.key + j + t * kTileWidth;
    const int64_t apart = key[1] - key[0], row = width() * sizeof(bf16);
    bool even = in_.D == width();
    for (int64_t i = 2; i < kTileWidth; ++i) even = even && key[i] - key[i - 1] == apart;
    if (even) return {key[0] + source.column, kLine, apart * int64_t{sizeof(bf16)}};
    uint8_t* copy = mine().keys + t * kTileWidth * row;
    for (int64_t i = 0; i < kTileWidth; ++i) {
      std::memcpy(copy + i * row, key[i] + source.column, in_.D * sizeof(bf16));
      std::memset(copy + i * row + in_.D * sizeof(bf16), 0, row - in_.D * sizeof(bf16));
    }
    return {copy, kLine, row};
  }

  // sums [4 x 16, 16] = the products of four tiles of keys with the queries.
  void add_tiles(float* sums, const TileLines (&keys)[4], const uint8_t* queries) const {
    asm volatile("" ::: "memory");  // _tile_loadd does not say that it reads memory
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t s = 0; s < steps_; ++s) {
      _tile_loadd(6, queries + s * kTileBytes, kLine);
      _tile_loadd(4, keys[0].at(s), keys[0].row);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, keys[1].at(s), keys[1].row);
      _tile_dpbf16ps(1, 5, 6);
      _tile_loadd(4, keys[2].at(s), keys[2].row);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(5, keys[3].at(s), keys[3].row);
      _tile_dpbf16ps(3, 5, 6);
    }
    _tile_stored(0, sums, kLine);
    _tile_stored(1, sums + kHeight * kTileWidth, kLine);
    _tile_stored(2, sums + 2 * kHeight * kTileWidth, kLine);
    _tile_stored(3, sums + 3 * kHeight * kTileWidth, kLine);
  }

  const Operands<bf16>& in_;
  const int64_t steps_;  // of a score
  std::unique_ptr<bf16[]> queries_;
};

}  // namespace Q3N_LEVEL

#endif
