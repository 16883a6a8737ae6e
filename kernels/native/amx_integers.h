// Products of weights in int8 and int4 with integers of 16 bits, by AMX: of x's upper and lower
// bytes, each summed exactly in int32. So the bits are those of panel.h, which few rows take.
#pragma once

#include "amx.h"

#if defined(Q3N_TILES)

namespace Q3N_LEVEL {

constexpr int64_t kByteColumns = 64;  // that an instruction multiplies, at most

// Whether so many rows are multiplied by tiles.
inline bool by_byte_tiles(const Packed& w, int64_t rows) {
  constexpr int64_t kFewest = 9;
  return native::use_tiles && rows >= kFewest && is_integer(w.format);
}

inline int64_t byte_columns(const Packed& w) { return std::min(w.block, kByteColumns); }

// Where the upper byte of x is that is multiplied with the weight's column j as decode_bytes leaves
// it, and how far behind it the lower one: see `split`.
constexpr int upper_at(Format format, int j) {
  return format == kInt4 ? j / 8 * 16 + j % 8 : 2 * j + 1;
}
constexpr int lower_after(Format format) { return format == kInt4 ? 8 : -1; }

// The places of a step's bytes, upper then lower, among `columns` integers.
template <Format kFormat, int kColumns>
struct BytePlaces {
  alignas(64) uint8_t upper[64], lower[64];

  constexpr BytePlaces() : upper(), lower() {
    for (int j = 0; j < 64; ++j) {
      const int at = upper_at(kFormat, j % kColumns), after = lower_after(kFormat);
      upper[j] = at + (j < kColumns ? 0 : after), lower[j] = at + after;
    }
  }
};

// Writes a row of integers, of which a step has so many columns.
template <Format kFormat>
Q3N_TILES void set_bytes(TileRows::Row to, int64_t steps, int64_t columns, const int32_t* words) {
  static constexpr BytePlaces<kFormat, 64> kWide;
  static constexpr BytePlaces<kFormat, 32> kNarrow;
  const auto* x = reinterpret_cast<const uint8_t*>(words);
  const __m512i both = _mm512_load_si512(kNarrow.upper);
  const __m512i upper = _mm512_load_si512(kWide.upper), lower = _mm512_load_si512(kWide.lower);
  for (int64_t s = 0; s < steps; ++s, x += 2 * columns, to.bytes += to.stride) {
    const __m512i first = _mm512_loadu_si512(x);
    if (columns < kByteColumns) {
      _mm512_store_si512(to.bytes, _mm512_permutexvar_epi8(both, first));
    } else {
      const __m512i second = _mm512_loadu_si512(x + kLine);
      _mm512_store_si512(to.bytes, _mm512_permutex2var_epi8(first, upper, second));
      _mm512_store_si512(to.bytes + kLine, _mm512_permutex2var_epi8(first, lower, second));
    }
  }
}

// Rows of the activations as bytes: row i of the tiles is row rows[i] of x.
struct ByteRows {
  TileRows tiles;
  std::vector<float> steps;  // of a tile: each block's, of all its rows

  ByteRows(const Packed& w, const Activations& a, const std::vector<int64_t>& rows,
           const std::vector<int64_t>& runs)
      : tiles(rows.size(), w.blocks * w.block / byte_columns(w), 2 * byte_columns(w)),
        steps(rows.size() * w.blocks) {
    parallel(rows.size(), 1 + 16384 / (w.K + 1), [&](int64_t i) {
      const auto end = std::upper_bound(runs.begin(), runs.end(), i);
      const int64_t begin = end[-1], count = *end - begin, at = i - begin;
      const int64_t first = at / kHeight * kHeight, height = std::min(count - first, kHeight);
      const auto set = w.format == kInt4 ? set_bytes<kInt4> : set_bytes<kInt8>;
      set(tiles.row(begin, count, at), tiles.steps, byte_columns(w), a.row(rows[i]));
      for (int64_t b = 0; b < w.blocks; ++b) {
        steps[(begin + first) * w.blocks + b * height + at - first] = a.step(rows[i])[b];
      }
    });
  }
};

// Decodes blocks [first, last) of a tile of the weight, minus zero points: lines of four columns.
Q3N_TILES inline void decode_bytes(uint8_t* out, const Packed& w, int64_t tile, int64_t first,
                                   int64_t last) {
  struct Places {
    alignas(64) uint16_t words[32];
    constexpr Places() : words() {
      for (int i = 0; i < 32; ++i) words[i] = i / 2 + i % 2 * 16;
    }
  };
  static constexpr Places kPlaces;
  const __m512i places = _mm512_load_si512(kPlaces.words), nibble = _mm512_set1_epi8(15);
  const int64_t lines = w.block / (w.format == kInt4 ? 8 : 4);
  const uint8_t* line = w.tile(tile) + first * lines * kLine;
  for (int64_t b = first; b < last; ++b) {
    if (w.format == kInt8) {
      for (int64_t l = 0; l < lines; ++l, line += kLine, out += kLine) {
        const __m512i pairs = _mm512_loadu_si512(line);
        _mm_prefetch(line + kAhead, _MM_HINT_T0);
        _mm512_store_si512(out, _mm512_permutexvar_epi16(places, pairs));
      }
    } else {
      const __m512i zero = (__m512i)(w.zero(tile, b, 0) * 0x01010101);
      for (int64_t l = 0; l < lines; ++l, line += kLine, out += 2 * kLine) {
        const __m512i nibbles = _mm512_loadu_si512(line);
        _mm_prefetch(line + kAhead, _MM_HINT_T0);
        const __m512i low = _mm512_and_si512(nibbles, nibble);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(nibbles, 4), nibble);
        _mm512_store_si512(out, _mm512_sub_epi8(low, zero));
        _mm512_store_si512(out + kLine, _mm512_sub_epi8(high, zero));
      }
    }
  }
}

// Tiles 0 and 1 are sums of x's upper bytes, 2 and 3 of its lower ones, with the weight's tiles 6
// and 7; x is in 4 and 5.
Q3N_TILES inline void configure_bytes(int64_t height, int64_t columns) {
  struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {kLine, kLine, kLine, kLine, 0, 0, kLine, kLine};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 6; ++i) config.rows[i] = height;
  config.rows[6] = config.rows[7] = columns / 4;
  config.bytes[4] = config.bytes[5] = columns;
  asm volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// The products of a block with a tile of x, and where they are to be added.
struct BlockSums {
  alignas(64) int32_t upper[kHeight][kPanelWidth], lower[kHeight][kPanelWidth];
  float* totals = nullptr;  // [height, kPanelWidth]
  const float* steps = nullptr;
  const f32v* scale = nullptr;
  int64_t height = 0;
};

// Adds rows [begin, end) to their totals, as add_blocks does.
template <bool kScaled>
void add_products(const BlockSums& sums, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < std::min(end, sums.height); ++i) {
    const f32v step = splat(sums.steps[i]);
    for (int p = 0; p < kPanelTiles; ++p) {
      i32v upper, lower;
      std::memcpy(&upper, sums.upper[i] + p * kTileWidth, sizeof upper);
      std::memcpy(&lower, sums.lower[i] + p * kTileWidth, sizeof lower);
      f32v term = __builtin_convertvector((upper << 8) + lower, f32v);
      if constexpr (kScaled) term *= sums.scale[p];
      float* to = sums.totals + i * kPanelWidth + p * kTileWidth;
      store(to, load(to) + term * step);
    }
  }
}

// Multiplies a block. Those before it are added in the meantime, some rows after each step: vectors
// and tiles are then busy at once.
template <bool kScaled, bool kStream>
Q3N_TILES void multiply_block(BlockSums& sums, const BlockSums& before,
                              const std::array<const uint8_t*, kPanelTiles>& w, const TileLines& x,
                              int64_t columns, int64_t steps) {
  constexpr int64_t kRow = sizeof *sums.upper;
  const int64_t share = kHeight / steps;
  asm volatile("" ::: "memory");  // _tile_loadd does not say that it reads memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s) {
    const uint8_t* upper = static_cast<const uint8_t*>(x.at(s));
    if constexpr (kStream) {
      _tile_stream_loadd(4, upper, x.row);
    } else {
      _tile_loadd(4, upper, x.row);
    }
    _tile_loadd(6, w[0] + s * columns * kTileWidth, kLine);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, w[1] + s * columns * kTileWidth, kLine);
    _tile_dpbssd(1, 4, 7);
    if constexpr (kStream) {
      _tile_stream_loadd(5, upper + columns, x.row);
    } else {
      _tile_loadd(5, upper + columns, x.row);
    }
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
    add_products<kScaled>(before, s * share, (s + 1) * share);
  }
  _tile_stored(0, sums.upper[0], kRow);
  _tile_stored(1, sums.upper[0] + kTileWidth, kRow);
  _tile_stored(2, sums.lower[0], kRow);
  _tile_stored(3, sums.lower[0] + kTileWidth, kRow);
  asm volatile("" ::: "memory");
}

// totals [count, kPanelWidth] += the products of blocks [first, last), whose lines of the weight
// these are.
template <bool kScaled, bool kStream>
Q3N_TILES void add_byte_chunk(float* totals, const Packed& w, const Tiles& tiles,
                              const std::array<const uint8_t*, kPanelTiles>& lines,
                              const ByteRows& x, int64_t begin, int64_t count, int64_t first,
                              int64_t last) {
  const int64_t columns = byte_columns(w), steps = w.block / columns;
  f32v scales[kChunkColumns / 32][kPanelTiles] = {};
  for (int64_t b = first; kScaled && b < last; ++b) {
    for (int p = 0; p < kPanelTiles; ++p) scales[b - first][p] = w.scale(tiles[p], b, 0);
  }
  BlockSums sums[2];
  int64_t configured = 0, turn = 0;
  for (int64_t i = 0; i < count; i += kHeight) {
    const int64_t height = std::min(kHeight, count - i), step = height * x.tiles.width;
    if (configured != height) configure_bytes(configured = height, columns);
    for (int64_t b = first; b < last; ++b, turn = 1 - turn) {
      const int64_t at = (b - first) * w.block * kTileWidth;
      const TileLines lines_of_x{x.tiles.tile(begin + i) + b * steps * step, step, x.tiles.width};
      multiply_block<kScaled, kStream>(sums[turn], sums[1 - turn], {lines[0] + at, lines[1] + at},
                                       lines_of_x, columns, steps);
      sums[turn].totals = totals + i * kPanelWidth, sums[turn].height = height;
      sums[turn].steps = x.steps.data() + (begin + i) * w.blocks + b * height;
      sums[turn].scale = scales[b - first];
    }
  }
  add_products<kScaled>(sums[1 - turn], 0, kHeight);
}

// totals [panels, count, kPanelWidth] = the panels' products with a run of x's rows.
Q3N_TILES inline void multiply(float* totals, const Packed& w, std::span<const Tiles> panels,
                               const ByteRows& x, int64_t begin, int64_t count) {
  static_assert(kPanelTiles == 2 && kParts == 1);
  const int64_t chunk = kChunkColumns / w.block, size = count * kPanelWidth;
  const bool stream = count > kPairHeight;
  const auto add = w.group  ? stream ? add_byte_chunk<true, true> : add_byte_chunk<true, false>
                   : stream ? add_byte_chunk<false, true>
                            : add_byte_chunk<false, false>;
  alignas(64) thread_local uint8_t decoded[kPanelTiles][kChunkColumns * kTileWidth];
  std::memset(totals, 0, panels.size() * size * sizeof *totals);
  for (int64_t first = 0; first < w.blocks; first += chunk) {
    const int64_t last = std::min(first + chunk, w.blocks);
    for (size_t q = 0; q < panels.size(); ++q) {
      for (int p = 0; p < kPanelTiles; ++p) decode_bytes(decoded[p], w, panels[q][p], first, last);
      add(totals + q * size, w, panels[q], {decoded[0], decoded[1]}, x, begin, count, first, last);
    }
  }
  _tile_release();
  if (!w.group) multiply_by_scales(totals, w, panels, count);
}

}  // namespace Q3N_LEVEL

#endif
