// The micro-kernel in AMX instructions: x and weights in bf16. An output is summed over pairs of
// columns in order, so it does not depend on the other tokens. Only functions marked Q3N_AMX, here,
// in amx_fp8.h and in amx_bytes.h, use instructions that avx512bf16 lacks.
#pragma once

#include <memory>
#include <span>

#include "micro_kernel.h"
#include "ops.h"

#if defined(__AVX512BF16__)
#define Q3N_AMX __attribute__((target("amx-tile,amx-bf16,amx-int8,avx512vbmi")))

namespace Q3N_LEVEL {

constexpr int64_t kAmxRows = 16;  // tokens in a tile register, at most
constexpr int64_t kAmxK = 32;     // columns in a tile register: a slice
constexpr int64_t kAmxMR = 2 * kAmxRows;

// A packed in panels of up to 16 tokens of one run. A panel has slice 0 of all its tokens, then
// slice 1; a slice is `width` bytes of a token.
class AmxPanels {
 public:
  AmxPanels(int64_t tokens, int64_t slices, int64_t width)
      : slices(slices),
        width(width),
        lines_(std::make_unique_for_overwrite<Line[]>(tokens * slices * width / kLine)) {}

  // Where a token's slice begins; its next one is `stride` bytes behind it.
  struct Place {
    uint8_t* bytes;
    int64_t stride;
  };

  // Calls pack(place, i, s, n) for slices [s, s + n) of each token i, in parallel unless the caller
  // is. Run r is [runs[r], runs[r + 1]). A few slices of all tokens of a panel at a time: whole
  // tokens would write lines that share few sets of the cache.
  template <class Call>
  void fill(std::span<const int64_t> runs, int64_t grain, Call&& pack) {
    constexpr int64_t kAtOnce = 8;
    std::vector<int64_t> firsts;
    for (size_t r = 1; r < runs.size(); ++r) {
      for (int64_t i = runs[r - 1]; i < runs[r]; i += kAmxRows) firsts.push_back(i);
    }
    const int64_t tokens = runs.back();
    parallel(firsts.size(), grain, [&](int64_t p) {
      const int64_t first = firsts[p];
      const int64_t height = (p + 1 < std::ssize(firsts) ? firsts[p + 1] : tokens) - first;
      for (int64_t s = 0; s < slices; s += kAtOnce) {
        for (int64_t i = 0; i < height; ++i) {
          uint8_t* const to = lines_.get()->bytes + (first * slices + s * height + i) * width;
          pack(Place{to, height * width}, first + i, s, std::min(kAtOnce, slices - s));
        }
      }
    });
  }

  // The panel that starts with this token.
  const uint8_t* panel(int64_t token) const { return lines_.get()->bytes + token * slices * width; }

  const int64_t slices, width;

 private:
  struct alignas(kLine) Line {
    uint8_t bytes[kLine];
  };
  std::unique_ptr<Line[]> lines_;
};

// Copies slices of a token's x, which has K columns from there on.
inline void pack_bf16(AmxPanels::Place to, int64_t slices, const bf16* x, int64_t K) {
  for (int64_t s = 0; s < slices; ++s, x += kAmxK, K -= kAmxK, to.bytes += to.stride) {
    if (K >= kAmxK) {
      std::memcpy(to.bytes, x, kLine);
      continue;
    }
    const int64_t n = std::max<int64_t>(K, 0) * sizeof *x;
    std::memcpy(to.bytes, x, n);
    std::memset(to.bytes + n, 0, kLine - n);
  }
}

constexpr int64_t kKCSlices = kKC / kAmxK;
constexpr int64_t kTileBytes = kAmxRows * kLine;  // of a tile register
constexpr int64_t kLineBytesAhead = 2048;         // from what is read to what is prefetched

// Tile registers: 0 to 3 sums, 4 and 5 two panels of x, 6 and 7 two panels of the weight.
Q3N_AMX inline void configure_tiles(int64_t height0, int64_t height1) {
  struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  const int64_t heights[] = {height0, height0, height1,  height1,
                             height0, height1, kAmxRows, kAmxRows};
  for (int i = 0; i < 8; ++i) config.rows[i] = heights[i], config.bytes[i] = heights[i] ? kLine : 0;
  asm volatile("" ::"r"(&config) : "memory");  // _tile_loadconfig says that it reads 8 bytes
  _tile_loadconfig(&config);
}

// A tile of x in memory: its first line, and the bytes to the next slice and to the next token.
struct TileView {
  const void* first;
  int64_t slice, token;

  const void* at(int64_t s) const { return static_cast<const uint8_t*>(first) + s * slice; }
  TileView after(int64_t slices) const { return {at(slices), slice, token}; }
  TileView below(int64_t tokens) const {
    return {static_cast<const uint8_t*>(first) + tokens * token, slice, token};
  }
};

// sums [height0 + height1, kNR], `stride` floats apart, += `slices` slices of x times those of w;
// = if they are the first. kTwo: height1 > 0. kStream: loads x past L1, where the weight's chunk
// stays for all tokens. `meanwhile`: called for each slice, while AMX multiplies.
template <bool kTwo, bool kStream, class Call>
Q3N_AMX inline void multiply_slices(float* sums, int64_t stride, const Lines& w, const TileView& x0,
                                    const TileView& x1, int64_t slices, bool first,
                                    Call&& meanwhile) {
  const int64_t row = stride * sizeof(float);
  float* const lower = sums + kAmxRows * stride;
  asm volatile("" ::: "memory");  // _tile_loadd does not say that it reads memory
  // Macros, each a statement.
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTwo) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, sums, row);
    _tile_loadd(1, sums + kPanelWidth, row);
    if constexpr (kTwo) {
      _tile_loadd(2, lower, row);
      _tile_loadd(3, lower + kPanelWidth, row);
    }
  }
  for (int64_t s = 0; s < slices; ++s) {
    if constexpr (kStream) {
      _tile_stream_loadd(4, x0.at(s), x0.token);
    } else {
      _tile_loadd(4, x0.at(s), x0.token);
    }
    _tile_loadd(6, w[0] + s * kTileBytes, kLine);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w[1] + s * kTileBytes, kLine);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwo) {
      if constexpr (kStream) {
        _tile_stream_loadd(5, x1.at(s), x1.token);
      } else {
        _tile_loadd(5, x1.at(s), x1.token);
      }
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    meanwhile(s);
  }
  _tile_stored(0, sums, row);
  _tile_stored(1, sums + kPanelWidth, row);
  if constexpr (kTwo) {
    _tile_stored(2, lower, row);
    _tile_stored(3, lower + kPanelWidth, row);
  }
  asm volatile("" ::: "memory");  // nor _tile_stored that it writes it
}

// sums = all slices of x times those of w. What is `ahead` bytes beyond a line of w is prefetched
// into L2, unless 0.
template <bool kTwo>
Q3N_AMX void micro_kernel_bf16(float* sums, int64_t stride, const Lines& w, const TileView& x0,
                               const TileView& x1, int64_t slices, int64_t ahead) {
  multiply_slices<kTwo, false>(sums, stride, w, x0, x1, slices, true, [&](int64_t s) Q3N_AMX {
    for (int64_t l = 0; ahead && l < kTileBytes; l += kLine) {
      for (const uint8_t* panel : w) __builtin_prefetch(panel + s * kTileBytes + l + ahead, 0, 2);
    }
  });
}

// Tokens of one run of A.
struct Run {
  const AmxPanels& x;
  int64_t begin, count;
};

// Up to 32 tokens of a run, from token i on: two tiles.
struct TokenTiles {
  const int64_t height0, height1;
  const TileView x0, x1;

  TokenTiles(const Run& run, int64_t i)
      : height0(std::min(kAmxRows, run.count - i)),
        height1(std::clamp<int64_t>(run.count - i - kAmxRows, 0, kAmxRows)),
        x0{run.x.panel(run.begin + i), height0 * kLine, kLine},
        x1{run.x.panel(run.begin + i + height0), height1 * kLine, kLine} {}
};

// The heights that tile registers are configured for.
class TileHeights {
 public:
  Q3N_AMX void configure(const TokenTiles& x) {
    if (height0_ == x.height0 && height1_ == x.height1) return;
    configure_tiles(height0_ = x.height0, height1_ = x.height1);
  }

 private:
  int64_t height0_ = 0, height1_ = 0;
};

// Chunks of K of some tiles, in the order in which they are multiplied: each chunk of all tiles, so
// that x's chunk stays in the cache.
struct Steps {
  struct Step {
    const Panels& panels;
    int64_t first, last;  // blocks or slices of K
    float* totals;        // of the tile
  };

  float* totals;
  int64_t stride;  // floats of a tile
  std::span<const Panels> tiles;
  int64_t of_chunk, of_all;  // blocks or slices

  int64_t count() const { return (of_all + of_chunk - 1) / of_chunk * tiles.size(); }
  Step operator[](int64_t i) const {
    const int64_t tile = i % tiles.size(), first = i / tiles.size() * of_chunk;
    return {tiles[tile], first, std::min(first + of_chunk, of_all), totals + tile * stride};
  }
};

// totals [tiles, count, kNR] *= the output channels' scales.
inline void multiply_by_scales(float* totals, const PackedWeight& w, std::span<const Panels> tiles,
                               int64_t count) {
  for (const Panels& panels : tiles) {
    for (int64_t i = 0; i < count * kTilePanels; ++i, totals += kPanelWidth) {
      store(totals, load(totals) * w.scale(panels[i % kTilePanels], 0, 0));
    }
  }
}

// From a line of a weight that is read once to the line to prefetch: the next tile's, where a small
// weight's tiles follow each other.
inline int64_t bytes_ahead(const PackedWeight& w) {
  constexpr int64_t kNear = 1 << 16;
  const int64_t tile = kTilePanels * w.panel_bytes;
  return tile <= kNear ? tile : kBytesAhead;
}

// Prefetches a step's lines of bf16 into L2, some at a time.
class Prefetching {
 public:
  Prefetching(const PackedWeight& w, const Steps::Step& step)
      : lines_((step.last - step.first) * kAmxRows) {
    for (int p = 0; p < kTilePanels; ++p) {
      next_[p] = w.panel(step.panels[p]) + step.first * kTileBytes;
    }
  }

  int64_t lines() const { return lines_; }  // of a panel

  // Prefetches up to `count` lines more of each panel.
  void prefetch(int64_t count) {
    for (const int64_t end = std::max<int64_t>(lines_ - count, 0); lines_ > end; --lines_) {
      for (const uint8_t*& line : next_) __builtin_prefetch(line, 0, 2), line += kLine;
    }
  }

 private:
  int64_t lines_;
  Lines next_;
};

// totals [tiles, count, kNR] = these tiles of W times many tokens. While AMX multiplies a step, the
// lines of the next one are prefetched, at the end those of tile `next`.
Q3N_AMX inline void macro_kernel_bf16_chunks(float* totals, const PackedWeight& w,
                                             std::span<const Panels> tiles, const Panels& next,
                                             const Run& run) {
  const Steps steps{totals, run.count * kNR, tiles, kKCSlices, run.x.slices};
  const Steps::Step then{next, 0, std::min(kKCSlices, run.x.slices), nullptr};
  const int64_t heights_of_all = (run.count + kAmxMR - 1) / kAmxMR;
  TileHeights heights;
  for (int64_t now = 0; now < steps.count(); ++now) {
    const auto [panels, first, last, of_tile] = steps[now];
    const int64_t at = first * kTileBytes, slices = last - first;
    const Lines lines{w.panel(panels[0]) + at, w.panel(panels[1]) + at};
    Prefetching ahead(w, now + 1 < steps.count() ? steps[now + 1] : then);
    const int64_t share = (ahead.lines() + heights_of_all * slices - 1) / (heights_of_all * slices);
    const auto meanwhile = [&](int64_t) Q3N_AMX { ahead.prefetch(share); };
    for (int64_t i = 0; i < run.count; i += kAmxMR) {
      const TokenTiles x(run, i);
      heights.configure(x);
      const auto multiply = [&]<bool kTwo>(std::bool_constant<kTwo>) Q3N_AMX {
        multiply_slices<kTwo, true>(of_tile + i * kNR, kNR, lines, x.x0.after(first),
                                    x.x1.after(first), slices, first == 0, meanwhile);
      };
      x.height1 ? multiply(std::true_type{}) : multiply(std::false_type{});
    }
  }
}

// totals [tiles, count, kNR] = these tiles of W, in bf16, times a run.
Q3N_AMX inline void multiply_bf16(float* totals, const PackedWeight& w,
                                  std::span<const Panels> tiles, const Panels& next,
                                  const Run& run) {
  if (run.count > kAmxMR) return macro_kernel_bf16_chunks(totals, w, tiles, next, run);
  const TokenTiles x(run, 0);
  const auto multiply = x.height1 ? micro_kernel_bf16<true> : micro_kernel_bf16<false>;
  const int64_t ahead = bytes_ahead(w);
  configure_tiles(x.height0, x.height1);
  for (const Panels& tile : tiles) {
    multiply(totals, kNR, {w.panel(tile[0]), w.panel(tile[1])}, x.x0, x.x1, run.x.slices, ahead);
    totals += run.count * kNR;
  }
}

}  // namespace Q3N_LEVEL

#endif
