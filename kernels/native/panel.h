// Products of packed tiles with rows of activations. An output's sum has one order: even and odd
// columns of a block by themselves, each in turn; then blocks in turn. So it depends on neither the
// tiles nor the other rows.
#pragma once

#include <array>

#include "activations.h"

namespace Q3N_LEVEL {

// Rows of x in a pass, and tiles in a panel: accumulators take about half of the registers.
template <class F>
constexpr int kPassRows = (kLanes == 16  ? 8
                           : kLanes == 8 ? 4
                                         : 2) /
                          (F::kExact ? F::kWords : 2);
constexpr int kPanelTiles = kLanes == 16 ? 2 : 1;
constexpr int64_t kPanelWidth = kPanelTiles * kTileWidth;
constexpr int64_t kChunkColumns = 512;  // decoded at a time, for the first-level cache
constexpr int64_t kDirectPasses = 2;    // more decode once
constexpr int64_t kLinesAhead = 64;     // that a tile is read before it is multiplied

// The tiles of a panel, by their place in the weight; the same one again beyond the last.
using Tiles = std::array<int64_t, kPanelTiles>;

// Sums of even and odd columns, which hide the latency of additions, of T rows and each vector of a
// panel. Exact sums need no order, so more rows hide it as well.
template <class F, int T>
constexpr int kChains = F::kExact && T > 2 ? 1 : 2;

// sum[v][t] = the products of `lines` lines with the words of x, v being tile and part.
template <class F, int T>
Q3N_INLINE inline void sum_lines(typename F::Total (&sum)[kPanelTiles * kParts][T],
                                 const uint8_t* const (&line)[kPanelTiles], int64_t lines,
                                 const int32_t* const (&x)[T]) {
  constexpr int kVectors = kPanelTiles * kParts, kC = kChains<F, T>;
  typename F::Sum chain[kVectors][T][kC] = {};
  for (int64_t l = 0; l < lines; ++l) {
    typename F::Value w[kVectors][F::kSteps];
    repeat<kVectors>(kVectors, [&](int64_t v) Q3N_INLINE {
      const uint8_t* at = line[v / kParts] + l * F::kLineBytes;
      if (!F::kDecoded && v % kParts == 0) __builtin_prefetch(at + kLinesAhead * kLine);
      F::decode(at, v % kParts, w[v]);
    });
    repeat<F::kSteps>(F::kSteps, [&](int64_t s) Q3N_INLINE {
      repeat<T>(T, [&](int64_t t) Q3N_INLINE {
        const auto xs = F::spread(x[t] + l * kLineWords<F>, s);
        repeat<kVectors>(kVectors, [&](int64_t v) Q3N_INLINE {
          chain[v][t][s % kC] = F::add(w[v][s], xs, chain[v][t][s % kC]);
        });
      });
    });
  }
  repeat<kVectors>(kVectors, [&](int64_t v) Q3N_INLINE {
    repeat<T>(T, [&](int64_t t) Q3N_INLINE {
      sum[v][t] = F::total(kC == 1 ? chain[v][t][0] : chain[v][t][0] + chain[v][t][kC - 1]);
    });
  });
}

// total[t] += the products of blocks [first, last) of the tiles with T rows of x. `lines` has the
// panel's lines from block `first` on.
template <class F, int T>
void add_blocks(float* const (&total)[T], const Packed& w, const Tiles& tiles,
                const uint8_t* const (&lines)[kPanelTiles], const Activations& a,
                const int64_t (&rows)[T], int64_t first, int64_t last) {
  constexpr int kVectors = kPanelTiles * kParts;
  const int64_t block_lines = w.block / kLineColumns<F>;
  for (int64_t b = first; b < last; ++b) {
    const uint8_t* line[kPanelTiles];
    for (int p = 0; p < kPanelTiles; ++p)
      line[p] = lines[p] + (b - first) * block_lines * F::kLineBytes;
    const int32_t* x[T];
    for (int t = 0; t < T; ++t) x[t] = a.row(rows[t]) + b * w.block / F::kColumns;
    typename F::Total sum[kVectors][T];
    sum_lines<F, T>(sum, line, block_lines, x);
    repeat<kVectors>(kVectors, [&](int64_t v) Q3N_INLINE {
      const int64_t tile = tiles[v / kParts], part = v % kParts;
      const f32v scale = w.group ? w.scale(tile, b, part) : splat(1.0f);
      const i32v zero = w.zeros ? w.zero(tile, b, part) : i32v{};
      repeat<T>(T, [&](int64_t t) Q3N_INLINE {
        auto products = sum[v][t];
        if constexpr (F::kExact) {
          const int32_t of_x = a.sum(rows[t])[b];
          products -= w.zeros ? zero * of_x : w.offset * of_x + i32v{};
        }
        float* to = total[t] + v * kLanes;
        const f32v term =
            __builtin_convertvector(products, f32v) * scale * splat(a.step(rows[t])[b]);
        store(to, load(to) + term);
      });
    });
  }
}

// Calls add_blocks for `count` rows, kPassRows<F> at a time.
template <class F, int T = kPassRows<F>>
void add_rows(float* totals, const Packed& w, const Tiles& tiles,
              const uint8_t* const (&lines)[kPanelTiles], const Activations& a, const int64_t* rows,
              int64_t count, int64_t first, int64_t last) {
  for (; count >= T; count -= T, rows += T, totals += T * kPanelWidth) {
    float* total[T];
    int64_t row[T];
    for (int t = 0; t < T; ++t) total[t] = totals + t * kPanelWidth, row[t] = rows[t];
    add_blocks<F, T>(total, w, tiles, lines, a, row, first, last);
  }
  if constexpr (T > 1) {
    constexpr int kFewer = F::kDecoded ? T / 2 : T - 1;  // decoding takes time, code takes space
    if (count) add_rows<F, kFewer>(totals, w, tiles, lines, a, rows, count, first, last);
  }
}

// Decodes `lines` lines to lines of Decoded.
template <class F>
void decode_lines(uint8_t* out, const uint8_t* line, int64_t lines) {
  for (int64_t l = 0; l < lines; ++l) {
    for (int64_t part = 0; part < kParts; ++part) {
      typename F::Value values[F::kSteps];
      F::decode(line + l * kLine, part, values);
      for (int s = 0; s < F::kSteps; ++s) {
        std::memcpy(out + (l * F::kSteps + s) * kLine + 4 * kLanes * part, values + s,
                    sizeof *values);
      }
    }
  }
}

// totals[i] = the panel's products with row rows[i] of the activations: [count, kPanelWidth].
template <class F>
void multiply(float* totals, const Packed& w, const Tiles& tiles, const Activations& a,
              const int64_t* rows, int64_t count) {
  std::memset(totals, 0, count * kPanelWidth * sizeof *totals);
  const bool direct = count <= kDirectPasses * kPassRows<F>;
  const int64_t chunk = direct ? w.blocks : kChunkColumns / w.block;
  alignas(64) thread_local uint8_t decoded[kPanelTiles][kChunkColumns / F::kColumns * kLine];
  for (int64_t first = 0; first < w.blocks; first += chunk) {
    const int64_t last = std::min(first + chunk, w.blocks);
    const uint8_t* lines[kPanelTiles];
    for (int p = 0; p < kPanelTiles; ++p) {
      lines[p] = w.tile(tiles[p]) + first * (w.block / kLineColumns<F>)*kLine;
      if (direct) continue;
      decode_lines<F>(decoded[p], lines[p], (last - first) * w.block / kLineColumns<F>);
      lines[p] = decoded[p];
    }
    if (direct) {
      add_rows<F>(totals, w, tiles, lines, a, rows, count, first, last);
    } else {
      add_rows<Decoded<typename F::Family>>(totals, w, tiles, lines, a, rows, count, first, last);
    }
  }
  if (w.group || w.format == kBf16) return;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t v = 0; v < kPanelTiles * kParts; ++v) {
      float* to = totals + i * kPanelWidth + v * kLanes;
      store(to, load(to) * w.scale(tiles[v / kParts], 0, v % kParts));
    }
  }
}

}  // namespace Q3N_LEVEL
