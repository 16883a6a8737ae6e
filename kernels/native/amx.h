// Products of weights in bf16, or FP8, with rows of x in bf16, by AMX. An output has one sum, of
// pairs of columns in turn, whatever the rows beside it. These functions, and those for integers,
// alone use instructions beyond those of avx512bf16, and say so by a target attribute.
#pragma once

#include <memory>
#include <span>

#include "ops.h"
#include "panel.h"

#if defined(__AVX512BF16__)
#define Q3N_TILES __attribute__((target("amx-tile,amx-bf16,amx-int8,avx512vbmi")))

namespace Q3N_LEVEL {

constexpr int64_t kHeight = 16;       // rows of x in a tile, at most
constexpr int64_t kStepColumns = 32;  // that an instruction multiplies
constexpr int64_t kPairHeight = 2 * kHeight;

// Rows of x, gathered in runs and cut in steps, each of `width` bytes of a row. A run is cut into
// tiles; a tile has all its rows of the first step, then those of the next.
class TileRows {
 public:
  TileRows(int64_t rows, int64_t steps, int64_t width)
      : steps(steps),
        width(width),
        lines_(std::make_unique_for_overwrite<Line[]>(rows * steps * width / kLine)) {}

  // Where row i of the run of `count` rows that starts at row `begin` is, in the first step; the
  // next step's part is `stride` bytes on.
  struct Row {
    uint8_t* bytes;
    int64_t stride;
  };
  Row row(int64_t begin, int64_t count, int64_t i) {
    const int64_t first = i / kHeight * kHeight, height = std::min(count - first, kHeight);
    return {lines_.get()->bytes + ((begin + first) * steps + i - first) * width, height * width};
  }

  // The tile that starts with this row.
  const uint8_t* tile(int64_t row) const { return lines_.get()->bytes + row * steps * width; }

  const int64_t steps, width;

 private:
  struct alignas(kLine) Line {
    uint8_t bytes[kLine];
  };
  std::unique_ptr<Line[]> lines_;
};

// Copies a row [K] in bf16, `steps` steps, to such a place.
inline void set_floats(TileRows::Row to, int64_t steps, const bf16* x, int64_t K) {
  for (int64_t s = 0; s < steps; ++s, x += kStepColumns, K -= kStepColumns, to.bytes += to.stride) {
    const int64_t n = std::clamp<int64_t>(K, 0, kStepColumns) * sizeof *x;
    std::memcpy(to.bytes, x, n);
    std::memset(to.bytes + n, 0, kLine - n);
  }
}

constexpr int64_t kChunkSteps = kChunkColumns / kStepColumns;
constexpr int64_t kTileBytes = kHeight * kLine;  // of a step's columns of the weight
constexpr int64_t kAhead = 2048;                 // bytes by which FP8 is read before it is decoded

// Tiles 0 to 3 are sums: of two tiles of x, 4 and 5, with two of the weight, 6 and 7.
Q3N_TILES inline void configure(int64_t height0, int64_t height1) {
  struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  const int64_t rows[] = {height0, height0, height1, height1, height0, height1, kHeight, kHeight};
  for (int i = 0; i < 8; ++i) config.rows[i] = rows[i], config.bytes[i] = rows[i] ? kLine : 0;
  asm volatile("" ::"r"(&config) : "memory");  // _tile_loadconfig says that it reads 8 bytes
  _tile_loadconfig(&config);
}

// Where the rows of a tile of x are: its first line, and bytes to the next step and the next row.
struct TileLines {
  const void* first;
  int64_t step, row;

  const void* at(int64_t s) const { return static_cast<const uint8_t*>(first) + s * step; }
  TileLines below(int64_t rows) const {
    return {static_cast<const uint8_t*>(first) + rows * row, step, row};
  }
};

// sums [height0 + height1, kPanelWidth], rows `stride` floats apart, += the products of `steps`
// steps, or = if they are first. kTwo: whether height1 is not zero. kStream: x passes through the
// first-level cache, where a chunk of the weight stays for many rows.
template <bool kTwo, bool kStream = false>
Q3N_TILES void add_steps(float* sums, int64_t stride,
                         const std::array<const uint8_t*, kPanelTiles>& w, const TileLines& x0,
                         const TileLines& x1, int64_t steps, bool first) {
  const int64_t row = stride * sizeof(float);
  float* const lower = sums + kHeight * stride;
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
    _tile_loadd(1, sums + kTileWidth, row);
    if constexpr (kTwo) {
      _tile_loadd(2, lower, row);
      _tile_loadd(3, lower + kTileWidth, row);
    }
  }
  for (int64_t s = 0; s < steps; ++s) {
    if constexpr (kStream) {
      _tile_stream_loadd(4, x0.at(s), x0.row);
    } else {
      _tile_loadd(4, x0.at(s), x0.row);
    }
    _tile_loadd(6, w[0] + s * kTileBytes, kLine);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w[1] + s * kTileBytes, kLine);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwo) {
      if constexpr (kStream) {
        _tile_stream_loadd(5, x1.at(s), x1.row);
      } else {
        _tile_loadd(5, x1.at(s), x1.row);
      }
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, row);
  _tile_stored(1, sums + kTileWidth, row);
  if constexpr (kTwo) {
    _tile_stored(2, lower, row);
    _tile_stored(3, lower + kTileWidth, row);
  }
}

// The bytes of the 128 sizes of e4m3 in bf16. Eight have no exponent and are m 2^-9; the others'
// exponents are 120 larger.
struct Fp8Sizes {
  alignas(64) uint8_t upper[128] = {}, lower[128] = {};

  constexpr Fp8Sizes() {
    for (int size = 1; size < 128; ++size) {
      const int exponent = size >> 3, m = size & 7, top = m >= 4 ? 2 : m >= 2 ? 1 : 0;
      const int bits =
          exponent ? (exponent + 120) << 7 | m << 4 : (118 + top) << 7 | (m << (7 - top) & 0x7f);
      upper[size] = bits >> 8, lower[size] = bits & 0xff;
    }
  }
};

// Decodes lines of e4m3: two lines of bf16 each.
Q3N_TILES inline void decode_fp8(uint8_t* out, const uint8_t* line, int64_t lines) {
  constexpr int kOr = 0xf8;  // a | b & c
  static constexpr Fp8Sizes kSizes;
  const __m512i upper0 = _mm512_load_si512(kSizes.upper);
  const __m512i upper1 = _mm512_load_si512(kSizes.upper + 64);
  const __m512i lower0 = _mm512_load_si512(kSizes.lower);
  const __m512i lower1 = _mm512_load_si512(kSizes.lower + 64);
  const __m512i sign = _mm512_set1_epi8(-0x80);
  const __m512i low = _mm512_set1_epi16(0x00ff), high = _mm512_set1_epi16(-0x0100);
  for (int64_t l = 0; l < lines; ++l) {
    const __m512i values = _mm512_loadu_si512(line + l * kLine);
    _mm_prefetch(line + l * kLine + kAhead, _MM_HINT_T0);
    const __m512i sizes = _mm512_permutex2var_epi8(upper0, values, upper1);
    const __m512i upper = _mm512_ternarylogic_epi32(sizes, values, sign, kOr);
    const __m512i lower = _mm512_permutex2var_epi8(lower0, values, lower1);
    const __m512i first = _mm512_slli_epi16(upper, 8), second = _mm512_srli_epi16(lower, 8);
    _mm512_store_si512(out + 2 * l * kLine, _mm512_ternarylogic_epi32(first, lower, low, kOr));
    _mm512_store_si512(out + (2 * l + 1) * kLine,
                       _mm512_ternarylogic_epi32(second, upper, high, kOr));
  }
}

// totals [height, kPanelWidth] += sums, times the scales of a block.
inline void add_scaled(float* totals, const float* sums, int64_t height, const Packed& w,
                       const Tiles& tiles, int64_t block) {
  const f32v scale[] = {w.scale(tiles[0], block, 0), w.scale(tiles[1], block, 0)};
  for (int64_t i = 0; i < height * kPanelTiles; ++i) {
    float* to = totals + i * kTileWidth;
    store(to, fma(load(sums + i * kTileWidth), scale[i % kPanelTiles], load(to)));
  }
}

// totals [panels, count, kPanelWidth] *= the scales of rows of the weight.
inline void multiply_by_scales(float* totals, const Packed& w, std::span<const Tiles> panels,
                               int64_t count) {
  for (const Tiles& tiles : panels) {
    for (int64_t i = 0; i < count * kPanelTiles; ++i, totals += kTileWidth) {
      store(totals, load(totals) * w.scale(tiles[i % kPanelTiles], 0, 0));
    }
  }
}

// A run of x's rows, and the steps that are summed at once.
struct TileRun {
  const TileRows& x;
  int64_t begin, count, block;
};

// totals [count, kPanelWidth] += the products of steps [s, last), whose lines of the weight these
// are, or = if s is 0. Sums of blocks that have scales are multiplied by them and always added.
Q3N_TILES inline void add_chunk(float* totals, const Packed& w, const Tiles& tiles,
                                const uint8_t* const (&lines)[kPanelTiles], const TileRun& run,
                                int64_t s, int64_t last) {
  alignas(64) float sums[kPairHeight * kPanelWidth];
  const bool many = run.count > kPairHeight;
  int64_t configured[2] = {};
  for (int64_t i = 0; i < run.count; i += kPairHeight) {
    const int64_t height0 = std::min(kHeight, run.count - i);
    const int64_t height1 = std::clamp<int64_t>(run.count - i - kHeight, 0, kHeight);
    if (configured[0] != height0 || configured[1] != height1) {
      configure(configured[0] = height0, configured[1] = height1);
    }
    const auto add = !height1 ? add_steps<false> : many ? add_steps<true, true> : add_steps<true>;
    const int64_t step0 = height0 * kLine, step1 = height1 * kLine;
    float* to = totals + i * kPanelWidth;
    for (int64_t b = s; b < last; b += run.block) {
      const TileLines x0{run.x.tile(run.begin + i) + b * step0, step0, kLine};
      const TileLines x1{run.x.tile(run.begin + i + height0) + b * step1, step1, kLine};
      add(w.group ? sums : to, kPanelWidth,
          {lines[0] + (b - s) * kTileBytes, lines[1] + (b - s) * kTileBytes}, x0, x1,
          std::min(run.block, last - b), w.group || b == 0);
      if (w.group) add_scaled(to, sums, height0 + height1, w, tiles, b / run.block);
    }
  }
}

// A step of FP8 of both tiles of a panel, decoded.
using CodedStep = uint8_t[kPanelTiles][kTileBytes];

Q3N_TILES inline void decode_step(CodedStep& out, const Packed& w, const Tiles& tiles, int64_t s) {
  constexpr int64_t kLines = kTileBytes / 2 / kLine;
  for (int p = 0; p < kPanelTiles; ++p) {
    decode_fp8(out[p], w.tile(tiles[p]) + s * kLines * kLine, kLines);
  }
}

// Adds the products of a step to tiles 0 to 3.
template <bool kTwo>
Q3N_TILES void add_step(const CodedStep& w, const void* x0, const void* x1) {
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
  asm volatile("" ::: "memory");  // nor that the next step is decoded after it
}

// totals [count, kPanelWidth] = the panel's products with few rows, in FP8. A step is decoded while
// tiles multiply the one before; the sums of a block are added while the next one is multiplied.
template <bool kTwo>
Q3N_TILES void multiply_coded(float* totals, const Packed& w, const Tiles& tiles,
                              const TileRun& run) {
  constexpr int64_t kRow = kPanelWidth * sizeof(float);
  alignas(64) CodedStep decoded[2];
  alignas(64) float sums[2][kPairHeight * kPanelWidth];
  const int64_t steps = run.x.steps;
  const int64_t height0 = std::min(kHeight, run.count), height1 = run.count - height0;
  const uint8_t *x0 = run.x.tile(run.begin), *x1 = run.x.tile(run.begin + height0);
  configure(height0, height1);
  if (steps) decode_step(decoded[0], w, tiles, 0);
  for (int64_t s = 0; s < steps; ++s, x0 += height0 * kLine, x1 += height1 * kLine) {
    if (s % run.block == 0) {
      _tile_zero(0);
      _tile_zero(1);
      if constexpr (kTwo) {
        _tile_zero(2);
        _tile_zero(3);
      }
    }
    if (s + 1 < steps) decode_step(decoded[(s + 1) % 2], w, tiles, s + 1);
    add_step<kTwo>(decoded[s % 2], x0, x1);
    if ((s + 1) % run.block) continue;
    const int64_t block = s / run.block;
    float* const to = w.group ? sums[block % 2] : totals;
    _tile_stored(0, to, kRow);
    _tile_stored(1, to + kTileWidth, kRow);
    if constexpr (kTwo) {
      _tile_stored(2, to + kHeight * kPanelWidth, kRow);
      _tile_stored(3, to + kHeight * kPanelWidth + kTileWidth, kRow);
    }
    asm volatile("" ::: "memory");
    if (w.group && block) add_scaled(totals, sums[1 - block % 2], run.count, w, tiles, block - 1);
  }
  const int64_t last = w.blocks - 1;
  if (w.group) add_scaled(totals, sums[last % 2], run.count, w, tiles, last);
}

// The same of a run of many rows, or of weights that are not coded. All panels take a chunk of
// columns before any takes the next one, so that x's stays in the second-level cache. FP8 is
// decoded to bf16 chunk by chunk.
Q3N_TILES inline void multiply_chunks(float* totals, const Packed& w, std::span<const Tiles> panels,
                                      const TileRun& run, int64_t chunk) {
  const bool coded = w.format == kFp8;
  alignas(64) thread_local uint8_t decoded[kPanelTiles][kChunkSteps * kTileBytes];
  for (int64_t s = 0; s < run.x.steps; s += chunk) {
    const int64_t last = std::min(s + chunk, run.x.steps);
    for (size_t q = 0; q < panels.size(); ++q) {
      const uint8_t* lines[kPanelTiles];
      for (int p = 0; p < kPanelTiles; ++p) {
        lines[p] = w.tile(panels[q][p]) + s * kTileBytes / (coded ? 2 : 1);
        if (coded)
          decode_fp8(decoded[p], lines[p], (last - s) * kHeight / 2), lines[p] = decoded[p];
      }
      add_chunk(totals + q * run.count * kPanelWidth, w, panels[q], lines, run, s, last);
    }
  }
}

// totals [panels, count, kPanelWidth] = the panels' products with a run of x's rows.
Q3N_TILES inline void multiply(float* totals, const Packed& w, std::span<const Tiles> panels,
                               const TileRows& x, int64_t begin, int64_t count) {
  static_assert(kPanelTiles == 2 && kParts == 1);
  const bool coded = w.format == kFp8;
  const bool once = count <= kPairHeight;  // each step of the weight is read once
  const int64_t chunk = once ? x.steps : kChunkSteps, size = count * kPanelWidth;
  const TileRun run{x, begin, count, w.group ? w.group / kStepColumns : chunk};
  if (w.group) std::memset(totals, 0, panels.size() * size * sizeof *totals);
  if (coded && once) {
    const auto multiply = count > kHeight ? multiply_coded<true> : multiply_coded<false>;
    for (size_t q = 0; q < panels.size(); ++q) multiply(totals + q * size, w, panels[q], run);
  } else {
    multiply_chunks(totals, w, panels, run, chunk);
  }
  _tile_release();
  if (coded && !w.group) multiply_by_scales(totals, w, panels, count);
}

}  // namespace Q3N_LEVEL

#endif
