// The micro-kernel in AMX instructions: x in bf16, weights in bf16 or FP8. An output is summed over
// pairs of columns in order, so it does not depend on the other tokens. Only functions marked
// Q3N_AMX, here and in amx_bytes.h, use instructions that avx512bf16 lacks.
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

  // Slice 0 of token i of the run of `count` tokens that starts at `begin`; slice 1 is `stride`
  // bytes behind it.
  struct Place {
    uint8_t* bytes;
    int64_t stride;
  };
  Place place(int64_t begin, int64_t count, int64_t i) {
    const int64_t first = i / kAmxRows * kAmxRows, height = std::min(count - first, kAmxRows);
    return {lines_.get()->bytes + ((begin + first) * slices + i - first) * width, height * width};
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

// Copies a token's x [K].
inline void pack_bf16(AmxPanels::Place to, int64_t slices, const bf16* x, int64_t K) {
  for (int64_t s = 0; s < slices; ++s, x += kAmxK, K -= kAmxK, to.bytes += to.stride) {
    const int64_t n = std::clamp<int64_t>(K, 0, kAmxK) * sizeof *x;
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
  TileView below(int64_t tokens) const {
    return {static_cast<const uint8_t*>(first) + tokens * token, slice, token};
  }
};

// sums [height0 + height1, kNR], `stride` floats apart, += `slices` slices of x times those of w;
// = if they are the first. kTwo: height1 > 0. kStream: loads x past L1, where the weight's chunk
// stays for all tokens. What is `ahead` bytes beyond a line of w is prefetched into L2, unless 0.
template <bool kTwo, bool kStream = false>
Q3N_AMX void micro_kernel_bf16(float* sums, int64_t stride,
                               const std::array<const uint8_t*, kTilePanels>& w, const TileView& x0,
                               const TileView& x1, int64_t slices, bool first, int64_t ahead) {
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
    for (int64_t l = 0; ahead && l < kTileBytes; l += kLine) {
      for (const uint8_t* panel : w) __builtin_prefetch(panel + s * kTileBytes + l + ahead, 0, 2);
    }
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
  }
  _tile_stored(0, sums, row);
  _tile_stored(1, sums + kPanelWidth, row);
  if constexpr (kTwo) {
    _tile_stored(2, lower, row);
    _tile_stored(3, lower + kPanelWidth, row);
  }
}

// The two bytes of the bf16 of each of the 128 magnitudes of e4m3: denormals are m 2^-9; the other
// exponents grow by 120.
struct Fp8Magnitudes {
  alignas(64) uint8_t upper[128] = {}, lower[128] = {};

  constexpr Fp8Magnitudes() {
    for (int size = 1; size < 128; ++size) {
      const int exponent = size >> 3, m = size & 7, top = m >= 4 ? 2 : m >= 2 ? 1 : 0;
      const int bits =
          exponent ? (exponent + 120) << 7 | m << 4 : (118 + top) << 7 | (m << (7 - top) & 0x7f);
      upper[size] = bits >> 8, lower[size] = bits & 0xff;
    }
  }
};

// Converts lines of e4m3 to bf16, two lines for each.
Q3N_AMX inline void decode_fp8(uint8_t* out, const uint8_t* line, int64_t lines) {
  constexpr int kOr = 0xf8;  // a | b & c
  static constexpr Fp8Magnitudes kMagnitudes;
  const __m512i upper0 = _mm512_load_si512(kMagnitudes.upper);
  const __m512i upper1 = _mm512_load_si512(kMagnitudes.upper + 64);
  const __m512i lower0 = _mm512_load_si512(kMagnitudes.lower);
  const __m512i lower1 = _mm512_load_si512(kMagnitudes.lower + 64);
  const __m512i sign = _mm512_set1_epi8(-0x80);
  const __m512i low = _mm512_set1_epi16(0x00ff), high = _mm512_set1_epi16(-0x0100);
  for (int64_t l = 0; l < lines; ++l) {
    const __m512i values = _mm512_loadu_si512(line + l * kLine);
    _mm_prefetch(line + l * kLine + kLineBytesAhead, _MM_HINT_T0);
    const __m512i sizes = _mm512_permutex2var_epi8(upper0, values, upper1);
    const __m512i upper = _mm512_ternarylogic_epi32(sizes, values, sign, kOr);
    const __m512i lower = _mm512_permutex2var_epi8(lower0, values, lower1);
    const __m512i first = _mm512_slli_epi16(upper, 8), second = _mm512_srli_epi16(lower, 8);
    _mm512_store_si512(out + 2 * l * kLine, _mm512_ternarylogic_epi32(first, lower, low, kOr));
    _mm512_store_si512(out + (2 * l + 1) * kLine,
                       _mm512_ternarylogic_epi32(second, upper, high, kOr));
  }
}

// totals [height, kNR] += sums times a block's scales.
inline void add_scaled(float* totals, const float* sums, int64_t height, const PackedWeight& w,
                       const Panels& panels, int64_t block) {
  const f32v scale[] = {w.scale(panels[0], block, 0), w.scale(panels[1], block, 0)};
  for (int64_t i = 0; i < height * kTilePanels; ++i) {
    float* to = totals + i * kPanelWidth;
    store(to, fma(load(sums + i * kPanelWidth), scale[i % kTilePanels], load(to)));
  }
}

// totals [tiles, count, kNR] *= the output channels' scales.
inline void multiply_by_scales(float* totals, const PackedWeight& w, std::span<const Panels> tiles,
                               int64_t count) {
  for (const Panels& panels : tiles) {
    for (int64_t i = 0; i < count * kTilePanels; ++i, totals += kPanelWidth) {
      store(totals, load(totals) * w.scale(panels[i % kTilePanels], 0, 0));
    }
  }
}

// Tokens of one run of A, the slices between two scales, and `ahead` as in micro_kernel_bf16.
struct Run {
  const AmxPanels& x;
  int64_t begin, count, block, ahead;
};

// totals [count, kNR] += slices [s, last) of x times `lines` of the weight; = if s is 0. With
// groups, each block's sum is scaled and always added.
Q3N_AMX inline void multiply_chunk(float* totals, const PackedWeight& w, const Panels& panels,
                                   const uint8_t* const (&lines)[kTilePanels], const Run& run,
                                   int64_t s, int64_t last) {
  alignas(64) float sums[kAmxMR * kNR];
  const bool many = run.count > kAmxMR;
  int64_t configured[2] = {};
  for (int64_t i = 0; i < run.count; i += kAmxMR) {
    const int64_t height0 = std::min(kAmxRows, run.count - i);
    const int64_t height1 = std::clamp<int64_t>(run.count - i - kAmxRows, 0, kAmxRows);
    if (configured[0] != height0 || configured[1] != height1) {
      configure_tiles(configured[0] = height0, configured[1] = height1);
    }
    const auto add = !height1 ? micro_kernel_bf16<false>
                     : many   ? micro_kernel_bf16<true, true>
                              : micro_kernel_bf16<true>;
    const int64_t slice0 = height0 * kLine, slice1 = height1 * kLine;
    float* to = totals + i * kNR;
    for (int64_t b = s; b < last; b += run.block) {
      const TileView x0{run.x.panel(run.begin + i) + b * slice0, slice0, kLine};
      const TileView x1{run.x.panel(run.begin + i + height0) + b * slice1, slice1, kLine};
      add(w.group ? sums : to, kNR,
          {lines[0] + (b - s) * kTileBytes, lines[1] + (b - s) * kTileBytes}, x0, x1,
          std::min(run.block, last - b), w.group || b == 0, run.ahead);
      if (w.group) add_scaled(to, sums, height0 + height1, w, panels, b / run.block);
    }
  }
}

// A slice of both panels of a tile of FP8, as bf16.
using Fp8Slice = uint8_t[kTilePanels][kTileBytes];

Q3N_AMX inline void decode_slice(Fp8Slice& out, const PackedWeight& w, const Panels& panels,
                                 int64_t s) {
  constexpr int64_t kLines = kTileBytes / 2 / kLine;
  for (int p = 0; p < kTilePanels; ++p) {
    decode_fp8(out[p], w.panel(panels[p]) + s * kLines * kLine, kLines);
  }
}

// Adds a slice's products to tile registers 0 to 3.
template <bool kTwo>
Q3N_AMX void multiply_slice(const Fp8Slice& w, const void* x0, const void* x1) {
  asm volatile("" ::: "memory");  // _tile_loadd does not say that it reads memory
  _tile_loadd(4, x0, kLine);
  _tile_loadd(6, w[0], kLine);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, w[1], kLine);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (kTwo) {
    _tile_loadd(5, x1, kLine);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  asm volatile("" ::: "memory");  // nor that the next slice is decoded after it
}

// totals [count, kNR] = a tile of FP8 times few tokens. A slice is decoded while AMX multiplies the
// one before; a block's sums are added while the next block is multiplied.
template <bool kTwo>
Q3N_AMX void macro_kernel_fp8(float* totals, const PackedWeight& w, const Panels& panels,
                              const Run& run) {
  constexpr int64_t kRow = kNR * sizeof(float);
  alignas(64) Fp8Slice decoded[2];
  alignas(64) float sums[2][kAmxMR * kNR];
  const int64_t slices = run.x.slices;
  const int64_t height0 = std::min(kAmxRows, run.count), height1 = run.count - height0;
  const uint8_t *x0 = run.x.panel(run.begin), *x1 = run.x.panel(run.begin + height0);
  configure_tiles(height0, height1);
  if (slices) decode_slice(decoded[0], w, panels, 0);
  for (int64_t s = 0; s < slices; ++s, x0 += height0 * kLine, x1 += height1 * kLine) {
    if (s % run.block == 0) {
      _tile_zero(0);
      _tile_zero(1);
      if constexpr (kTwo) {
        _tile_zero(2);
        _tile_zero(3);
      }
    }
    if (s + 1 < slices) decode_slice(decoded[(s + 1) % 2], w, panels, s + 1);
    multiply_slice<kTwo>(decoded[s % 2], x0, x1);
    if ((s + 1) % run.block) continue;
    const int64_t block = s / run.block;
    float* const to = w.group ? sums[block % 2] : totals;
    _tile_stored(0, to, kRow);
    _tile_stored(1, to + kPanelWidth, kRow);
    if constexpr (kTwo) {
      _tile_stored(2, to + kAmxRows * kNR, kRow);
      _tile_stored(3, to + kAmxRows * kNR + kPanelWidth, kRow);
    }
    asm volatile("" ::: "memory");
    if (w.group && block) add_scaled(totals, sums[1 - block % 2], run.count, w, panels, block - 1);
  }
  const int64_t last = w.blocks - 1;
  if (w.group) add_scaled(totals, sums[last % 2], run.count, w, panels, last);
}

// The same for many tokens, and for bf16 weights: chunk by chunk of K, all tiles for each chunk, so
// that x's chunk stays in L2. FP8 is decoded a chunk at a time.
Q3N_AMX inline void macro_kernel_chunks(float* totals, const PackedWeight& w,
                                        std::span<const Panels> tiles, const Run& run,
                                        int64_t chunk) {
  const bool fp8 = w.encoding == kFp8;
  alignas(64) thread_local uint8_t decoded[kTilePanels][kKCSlices * kTileBytes];
  for (int64_t s = 0; s < run.x.slices; s += chunk) {
    const int64_t last = std::min(s + chunk, run.x.slices);
    for (size_t q = 0; q < tiles.size(); ++q) {
      const uint8_t* lines[kTilePanels];
      for (int p = 0; p < kTilePanels; ++p) {
        lines[p] = w.panel(tiles[q][p]) + s * kTileBytes / (fp8 ? 2 : 1);
        if (fp8) decode_fp8(decoded[p], lines[p], (last - s) * kAmxRows / 2), lines[p] = decoded[p];
      }
      multiply_chunk(totals + q * run.count * kNR, w, tiles[q], lines, run, s, last);
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

// totals [tiles, count, kNR] = these tiles of W times tokens [begin, begin + count) of one run.
Q3N_AMX inline void multiply(float* totals, const PackedWeight& w, std::span<const Panels> tiles,
                             const AmxPanels& x, int64_t begin, int64_t count) {
  static_assert(kTilePanels == 2 && kParts == 1);
  const bool fp8 = w.encoding == kFp8;
  const bool once = count <= kAmxMR;  // the weight is read once
  const int64_t chunk = once ? x.slices : kKCSlices, size = count * kNR;
  const int64_t ahead = once && !fp8 ? bytes_ahead(w) : 0;
  const Run run{x, begin, count, w.group ? w.group / kAmxK : chunk, ahead};
  if (w.group) std::memset(totals, 0, tiles.size() * size * sizeof *totals);
  if (fp8 && once) {
    const auto multiply = count > kAmxRows ? macro_kernel_fp8<true> : macro_kernel_fp8<false>;
    for (size_t q = 0; q < tiles.size(); ++q) multiply(totals + q * size, w, tiles[q], run);
  } else {
    macro_kernel_chunks(totals, w, tiles, run, chunk);
  }
  _tile_release();
  if (fp8 && !w.group) multiply_by_scales(totals, w, tiles, count);
}

}  // namespace Q3N_LEVEL

#endif
