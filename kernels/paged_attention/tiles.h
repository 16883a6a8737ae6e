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

  static int64_t together(const Operands<bf16>&) { return 1; }

  BlockAttention(const Operands<bf16>& in, int64_t rows)
      : in_(in),
        steps_((in.D + kStepColumns - 1) / kStepColumns),
        queries_(std::make_unique_for_overwrite<bf16[]>(rows * width())) {}

  void take(const Tile& tile) {
    bf16* to = queries_.get();
    for (int64_t i = tile.first; i < tile.last; ++i) {
      const bf16* q = in_.q + (tile.sequence->begin + i) * in_.q_stride;
      q += tile.kv * in_.share() * in_.D;
      for (int64_t r = 0; r < in_.share(); ++r, q += in_.D, to += width()) {
        std::memcpy(to, q, in_.D * sizeof *q);
        std::fill(to + in_.D, to + width(), bf16(0.0f));
      }
    }
  }

  void run(const Tile& part, int64_t begin, int64_t start, const Places<bf16>& places, bool cold,
           const Places<bf16>* ahead, float* rows) {
    int64_t first = part.first;
    while (first < part.last && !places.seen(*part.sequence, first, start)) ++first;
    if (first == part.last) return;
    const int64_t least = places.seen(*part.sequence, first, start);
    const bool together = least == places.count || finite(places, least);
    const int64_t height = together ? part.last - first : 1;
    for (int64_t i = first; i < part.last; i += height) {
      const int64_t count = places.seen(*part.sequence, i + height - 1, start);
      pack(places, count, cold, ahead);
      const int64_t row = (i - part.first) * in_.share();
      attend({part.sequence, part.kv, 1, i, i + height}, start, count, places,
             queries_.get() + (begin + row) * width(), rows + row * in_.row_size());
    }
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
  int64_t width() const { return steps_ * kStepColumns; }
  static int64_t steps_of(int64_t count) { return (count + kStepColumns - 1) / kStepColumns; }

  // Whether the values from the place `first` on are: only then their product with 0 is 0.
  bool finite(const Places<bf16>& places, int64_t first) const {
    const i32v exponent = i32v{} + 0x7f800000;
    i32v holds{};
    for (int64_t i = first; i < places.count; ++i) {
      for_vectors(in_.D, [&](int64_t c, int64_t n) {
        holds |= ((i32v)load(places.value[i] + c, n) & exponent) == exponent;
      });
    }
    return !lane_mask(holds);
  }

  // Packs the first `count` keys and values; the next ones' weights are zero. Prefetches the
  // values while it packs keys, and the keys of `ahead` while it packs values.
  void pack(const Places<bf16>& places, int64_t count, bool cold, const Places<bf16>* ahead) const {
    const int64_t bytes = in_.D * sizeof(bf16), padded = steps_of(count) * kStepColumns;
    Scratch& scratch = mine();
    for (int64_t j = 0; j < padded; j += kTileWidth) {
      for (int64_t i = j; i < j + kTileWidth; ++i) {
        if (cold && i + kSoon < kBlock) prefetch(places.key[i + kSoon], bytes);
        prefetch(places.value[i], bytes);
      }
      pack_tiles(scratch.keys + j / kTileWidth * steps_ * kTileBytes, places.key + j);
    }
    Ahead<bf16> keys{ahead ? ahead->key : nullptr, ahead ? ahead->count : 0, 1, bytes};
    for (int64_t i = 0; i < padded; i += 2) {
      keys.next();
      keys.next();
      pack_pair(scratch.values + i / kStepColumns * kTileBytes + i % kStepColumns / 2 * kLine,
                i < count ? places.value[i] : kZeros, i + 1 < count ? places.value[i + 1] : kZeros);
    }
  }

  void pack_tiles(uint8_t* out, const bf16* const* key) const {
    const int64_t whole = in_.D / kStepColumns, tail = in_.D % kStepColumns;
    for (int64_t s = 0; s < whole; ++s) pack_keys(out + s * kTileBytes, key, s * kStepColumns);
    if (!tail) return;
    bf16 padded[kTileWidth][kStepColumns] = {};
    const bf16* rows[kTileWidth];
    for (int64_t i = 0; i < kTileWidth; ++i) {
      std::memcpy(padded[i], key[i] + whole * kStepColumns, tail * sizeof(bf16));
      rows[i] = padded[i];
    }
    pack_keys(out + whole * kTileBytes, rows, 0);
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

  // Computes the rows of these queries, with their first `count` places packed.
  void attend(const Tile& tile, int64_t start, int64_t count, const Places<bf16>& places,
              const bf16* q, float* rows) const {
    const int64_t height = tile.queries() * in_.share();
    int64_t configured = 0;
    for (int64_t i = 0; i < height; i += kPairHeight) {
      const int64_t n = std::min(kPairHeight, height - i);
      if (n != configured) {
        configure(std::min(n, kHeight), std::max<int64_t>(n - kHeight, 0));
        configured = n;
      }
      const auto seen = [&](int64_t r) {
        return std::min(count,
                        places.seen(*tile.sequence, tile.first + (i + r) / in_.share(), start));
      };
      strip(q + i * width(), n, count, seen, rows + i * in_.row_size());
    }
    _tile_release();
  }

  // Computes n rows.
  template <class Seen>
  void strip(const bf16* q, int64_t n, int64_t count, Seen&& seen, float* rows) const {
    Scratch& scratch = mine();
    const auto add = n > kHeight ? add_steps<true> : add_steps<false>;
    const int64_t steps = steps_of(count);
    const TileLines x0{q, kLine, width() * int64_t{sizeof *q}};
    const TileLines w0{scratch.weights, kLine, kWeightRow * int64_t{sizeof *q}};
    const TileLines x1 = x0.below(kHeight), w1 = w0.below(kHeight);
    for (int64_t j = 0; j < steps; ++j) {
      const uint8_t* keys = scratch.keys + 2 * j * steps_ * kTileBytes;
      add(scratch.scores + j * kPanelWidth, kScoreRow, {keys, keys + steps_ * kTileBytes}, x0, x1,
          steps_, true);
    }
    for (int64_t r = 0; r < n; ++r) {
      bf16* weights = scratch.weights + r * kWeightRow;
      softmax(scratch.scores + r * kScoreRow, seen(r), in_.scale, weights, row_of(in_, rows, r));
      std::fill(weights + round_up(seen(r), kLanes), weights + steps * kStepColumns, bf16(0.0f));
    }
    for (int64_t c = 0; c < in_.D; c += kPanelWidth) {
      const uint8_t* values = scratch.values + c / kTileWidth * kBlockSteps * kTileBytes;
      add(rows + c, in_.row_size(), {values, values + kBlockSteps * kTileBytes}, w0, w1, steps,
          true);
    }
  }

  struct alignas(kLine) Scratch {
    uint8_t keys[kPackedBytes], values[kPackedBytes];
    alignas(kLine) float scores[kPairHeight * kScoreRow];
    alignas(kLine) bf16 weights[kPairHeight * kWeightRow];
  };
  static Scratch& mine() {
    thread_local Scratch scratch;
    return scratch;
  }
  static inline const bf16 kZeros[kMaxDim] = {};

  const Operands<bf16>& in_;
  const int64_t steps_;  // of a score
  std::unique_ptr<bf16[]> queries_;
};

}  // namespace Q3N_LEVEL

#endif
