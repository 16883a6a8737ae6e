// Attention of a tile of queries in bf16 to one block of positions, by AMX. The block's keys and
// values are packed once for the whole tile.
#pragma once

#include "amx.h"
#include "block.h"

#if defined(__AMX_BF16__)

namespace Q3N_LEVEL {

constexpr int64_t kBlockSlices = kBlock / kAmxK;  // of a weighted sum
constexpr int64_t kPackedBytes = kBlock * kMaxDim * sizeof(bf16);
// Strides of scores and weights: a vector longer than needed, so that a tile's lines fall into
// different cache sets.
constexpr int64_t kScoreStride = kBlock + kLanes, kWeightStride = kBlock + kAmxK;

// Packs 32 columns of 16 keys: pairs of columns by positions.
inline void pack_keys(uint8_t* out, const bf16* const* key, int64_t column) {
  for (int64_t c = 0; c < kAmxK; c += 8, out += 4 * kLine) {
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
  static constexpr int64_t kMostPartials = 256;

  // A tile of many queries takes one kv head, so that keys and values are packed once for all of
  // them.
  static int64_t together(const Operands<bf16>& in, int64_t queries) {
    return queries * in.group() <= kAmxRows ? heads_together(in) : 1;
  }

  BlockAttention(const Operands<bf16>& in, int64_t partials)
      : in_(in),
        slices_((in.D + kAmxK - 1) / kAmxK),
        queries_(std::make_unique_for_overwrite<bf16[]>(partials * width())) {}

  void take(const Tile& tile) {
    bf16* to = queries_.get();
    for (int64_t h = tile.kv * in_.group(); h < (tile.kv + tile.heads) * in_.group();
         h += in_.group()) {
      for (int64_t i = tile.first; i < tile.last; ++i) {
        const bf16* q = in_.q + (tile.sequence->begin + i) * in_.q_stride + h * in_.D;
        for (int64_t r = 0; r < in_.group(); ++r, q += in_.D, to += width()) {
          std::memcpy(to, q, in_.D * sizeof *q);
          std::fill(to + in_.D, to + width(), bf16(0.0f));
        }
      }
    }
  }

  // Prefetches nothing: the processor sees what comes, and prefetching was slower.
  void run(const Tile& part, int64_t begin, int64_t start, const BlockKV<bf16>& block_kv, bool,
           const BlockKV<bf16>*, float* partials) {
    const auto seen = [&](int64_t i) { return block_kv.seen(*part.sequence, i, start); };
    int64_t first = part.first;
    while (first < part.last && !seen(first)) ++first;
    if (first == part.last) return;
    for (int64_t h = 0; h < part.heads; ++h) {
      const HeadKV head{block_kv, h * in_.D};
      const bool together = seen(first) == block_kv.count || finite(head, seen(first));
      const int64_t height = together ? part.last - first : 1;
      for (int64_t i = first; i < part.last; i += height) {
        const int64_t partial = (h * part.queries() + i - part.first) * in_.group();
        attend({part.sequence, part.kv + h, 1, i, i + height}, start, head, seen(i + height - 1),
               queries_.get() + (begin + partial) * width(),
               partials + partial * in_.partial_size());
      }
    }
    _tile_release();
  }

  static void write(bf16* out, const Partial& from, int64_t D) {
    const f32v inverse = from.inverse();
    for (int64_t i = 0; i < D; i += kColumns) {
      f32v o[2] = {load(from.o + i) * inverse, load(from.o + i + kLanes) * inverse};
      Values<bf16>::in_order(o);
      for_vectors(std::min(D - i, kColumns),
                  [&](int64_t c, int64_t n) { store(out + i + c, o[c / kLanes], n); });
    }
  }

 private:
  // A head's keys and values: `column` is its first.
  struct HeadKV {
    const BlockKV<bf16>& block_kv;
    int64_t column;
  };

  // Partials that are computed together.
  struct Strip {
    const bf16* q;
    float* partials;
    int64_t begin, n;
  };

  struct alignas(kLine) Scratch {
    uint8_t keys[kPackedBytes], values[kPackedBytes];
    uint8_t queries[kAmxRows * kMaxDim * sizeof(bf16)];
    alignas(kLine) float scores[kAmxMR * kScoreStride];
    alignas(kLine) bf16 weights[kAmxMR * kWeightStride];
  };
  static Scratch& mine() {
    thread_local Scratch scratch;
    return scratch;
  }
  static inline const bf16 kZeros[kMaxDim] = {};

  int64_t width() const { return slices_ * kAmxK; }
  static int64_t slices_of(int64_t count) { return (count + kAmxK - 1) / kAmxK; }

  // Whether the values from the position `first` on are: only then their product with 0 is 0.
  bool finite(const HeadKV& head, int64_t first) const {
    const i32v exponent = i32v{} + 0x7f800000;
    i32v holds{};
    for (int64_t i = first; i < head.block_kv.count; ++i) {
      const bf16* value = head.block_kv.value[i] + head.column;
      for_vectors(in_.D, [&](int64_t c, int64_t n) {
        holds |= ((i32v)load(value + c, n) & exponent) == exponent;
      });
    }
    return !lane_mask(holds);
  }

  // Computes the partials of these queries, the last of which sees `count` positions.
  void attend(const Tile& tile, int64_t start, const HeadKV& head, int64_t count, const bf16* q,
              float* partials) const {
    Scratch& scratch = mine();
    const int64_t height = tile.queries() * in_.group(), slices = slices_of(count);
    const auto strip = [&](int64_t i) {
      return Strip{q + i * width(), partials + i * in_.partial_size(), i,
                   std::min(height - i, kAmxMR)};
    };
    const auto weights = [&](const Strip& s) {
      for (int64_t r = 0; r < s.n; ++r) {
        const int64_t query = tile.first + (s.begin + r) / in_.group();
        const int64_t n = std::min(count, head.block_kv.seen(*tile.sequence, query, start));
        bf16* to = scratch.weights + r * kWeightStride;
        softmax(scratch.scores + r * kScoreStride, n, in_.scale, to,
                partial_at(in_, s.partials, r));
        std::fill(to + round_up(n, kLanes), to + slices * kAmxK, bf16(0.0f));
      }
    };
    const bool few = height <= kAmxRows;
    if (few) {
      score_few(strip(0), head, count);
    } else {
      pack_all_keys(head, count);
    }
    pack_values(head, count);
    for (int64_t i = 0; i < height; i += kAmxMR) {
      const Strip now = strip(i);
      if (!i || now.n < kAmxMR) {
        configure_tiles(std::min(now.n, kAmxRows), std::max<int64_t>(now.n - kAmxRows, 0));
      }
      if (!few) score(now, slices);
      weights(now);
      weigh(now, slices);
    }
  }

  // Packs the first `count` keys.
  void pack_all_keys(const HeadKV& head, int64_t count) const {
    for (int64_t j = 0; j < slices_of(count) * kAmxK; j += kPanelWidth) {
      pack_tiles(mine().keys + j / kPanelWidth * slices_ * kTileBytes, head.block_kv.key + j,
                 head.column);
    }
  }

  void pack_tiles(uint8_t* out, const bf16* const* key, int64_t column) const {
    const int64_t whole = in_.D / kAmxK, tail = in_.D % kAmxK;
    for (int64_t s = 0; s < whole; ++s) {
      pack_keys(out + s * kTileBytes, key, column + s * kAmxK);
    }
    if (!tail) return;
    bf16 padded[kPanelWidth][kAmxK] = {};
    const bf16* keys[kPanelWidth];
    for (int64_t i = 0; i < kPanelWidth; ++i) {
      std::memcpy(padded[i], key[i] + column + whole * kAmxK, tail * sizeof(bf16));
      keys[i] = padded[i];
    }
    pack_keys(out + whole * kTileBytes, keys, 0);
  }

  // Packs the first `count` values; the next ones' weights are zero.
  void pack_values(const HeadKV& head, int64_t count) const {
    const auto value = [&](int64_t i) {
      return i < count ? head.block_kv.value[i] + head.column : kZeros;
    };
    for (int64_t i = 0; i < slices_of(count) * kAmxK; i += 2) {
      pack_pair(mine().values + i / kAmxK * kTileBytes + i % kAmxK / 2 * kLine, value(i),
                value(i + 1));
    }
  }

  // Packs the values of two positions, in a line of each of a slice's tiles.
  void pack_pair(uint8_t* out, const bf16* even, const bf16* odd) const {
    const bf16* const pair[] = {even, odd};
    for (int64_t c = 0; c < in_.D; c += kColumns, out += 2 * kBlockSlices * kTileBytes) {
      __m512bh v[2];
      if (c + kColumns <= in_.D) {
        Values<bf16>::load(pair, c, v);
      } else {
        Values<bf16>::load(pair, c, v, in_.D - c);
      }
      _mm512_store_si512(out, (__m512i)v[0]);
      _mm512_store_si512(out + kBlockSlices * kTileBytes, (__m512i)v[1]);
    }
  }

  void score(const Strip& strip, int64_t slices) const {
    const TileView x0{strip.q, kLine, width() * int64_t{sizeof(bf16)}}, x1 = x0.below(kAmxRows);
    const auto add = strip.n > kAmxRows ? micro_kernel_bf16<true> : micro_kernel_bf16<false>;
    for (int64_t j = 0; j < slices; ++j) {
      const uint8_t* keys = mine().keys + 2 * j * slices_ * kTileBytes;
      add(mine().scores + j * kNR, kScoreStride, {keys, keys + slices_ * kTileBytes}, x0, x1,
          slices_, 0);
    }
  }

  // Weighted sums of the values.
  void weigh(const Strip& strip, int64_t slices) const {
    const Scratch& scratch = mine();
    const TileView x0{scratch.weights, kLine, kWeightStride * int64_t{sizeof(bf16)}};
    const TileView x1 = x0.below(kAmxRows);
    const auto add = strip.n > kAmxRows ? micro_kernel_bf16<true> : micro_kernel_bf16<false>;
    for (int64_t c = 0; c < in_.D; c += kNR) {
      const uint8_t* values = scratch.values + c / kPanelWidth * kBlockSlices * kTileBytes;
      add(strip.partials + c, in_.partial_size(), {values, values + kBlockSlices * kTileBytes}, x0,
          x1, slices, 0);
    }
  }

  // Scores of at most 16 partials: keys as they lie in memory times packed queries. The products
  // are added in the same order as in `score`.
  void score_few(const Strip& strip, const HeadKV& head, int64_t count) const {
    constexpr int64_t kTiles = 4, kStride = kTiles * kPanelWidth;
    Scratch& scratch = mine();
    const bf16* q[kPanelWidth];
    for (int64_t r = 0; r < kPanelWidth; ++r) q[r] = r < strip.n ? strip.q + r * width() : kZeros;
    pack_tiles(scratch.queries, q, 0);
    configure_tiles(kAmxRows, kAmxRows);
    alignas(kLine) float sums[kStride][kPanelWidth];
    for (int64_t j = 0; j < slices_of(count) * kAmxK; j += kStride) {
      TileView keys[kTiles];
      for (int64_t t = 0; t < kTiles; ++t) keys[t] = key_lines(head, j, t);
      add_tiles(sums[0], keys, scratch.queries);
      const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      for (int64_t r = 0; r < strip.n; ++r) {
        for (int64_t i = 0; i < kStride; i += kPanelWidth) {
          store(scratch.scores + r * kScoreStride + j + i,
                (f32v)_mm512_i32gather_ps(_mm512_slli_epi32(lane, 4), sums[i] + r, sizeof(float)));
        }
      }
    }
  }

  // Tile t of the keys from position j on: in memory if they are equally far apart, else copied.
  TileView key_lines(const HeadKV& head, int64_t j, int64_t t) const {
    const bf16* const* key = head.block_kv.key + j + t * kPanelWidth;
    const int64_t apart = key[1] - key[0], size = width() * sizeof(bf16);
    bool even = in_.D == width();
    for (int64_t i = 2; i < kPanelWidth; ++i) even = even && key[i] - key[i - 1] == apart;
    if (even) return {key[0] + head.column, kLine, apart * int64_t{sizeof(bf16)}};
    uint8_t* copy = mine().keys + t * kPanelWidth * size;
    for (int64_t i = 0; i < kPanelWidth; ++i) {
      std::memcpy(copy + i * size, key[i] + head.column, in_.D * sizeof(bf16));
      std::memset(copy + i * size + in_.D * sizeof(bf16), 0, size - in_.D * sizeof(bf16));
    }
    return {copy, kLine, size};
  }

  // sums [4 x 16, 16] = the products of four tiles of keys with the queries.
  void add_tiles(float* sums, const TileView (&keys)[4], const uint8_t* queries) const {
    asm volatile("" ::: "memory");  // _tile_loadd does not say that it reads memory
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t s = 0; s < slices_; ++s) {
      _tile_loadd(6, queries + s * kTileBytes, kLine);
      _tile_loadd(4, keys[0].at(s), keys[0].token);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, keys[1].at(s), keys[1].token);
      _tile_dpbf16ps(1, 5, 6);
      _tile_loadd(4, keys[2].at(s), keys[2].token);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(5, keys[3].at(s), keys[3].token);
      _tile_dpbf16ps(3, 5, 6);
    }
    _tile_stored(0, sums, kLine);
    _tile_stored(1, sums + kAmxRows * kPanelWidth, kLine);
    _tile_stored(2, sums + 2 * kAmxRows * kPanelWidth, kLine);
    _tile_stored(3, sums + 3 * kAmxRows * kPanelWidth, kLine);
  }

  const Operands<bf16>& in_;
  const int64_t slices_;  // of a score
  std::unique_ptr<bf16[]> queries_;
};

}  // namespace Q3N_LEVEL

#endif
