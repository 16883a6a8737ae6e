// The micro-kernel in AMX instructions for FP8 weights: decoded to bf16 while AMX multiplies.
#pragma once

#include "amx.h"

#if defined(Q3N_AMX)

namespace Q3N_LEVEL {

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

// A block's sums, and the totals to add them to.
struct ScaledSums {
  alignas(64) float values[kAmxMR][kNR];
  f32v scales[kTilePanels] = {};  // of the weight
  float* totals = nullptr;        // [height, kNR]
  int64_t height = 0;
};

// Adds tokens [begin, end) to their totals.
Q3N_INLINE inline void add_scaled(const ScaledSums& sums, int64_t begin, int64_t end) {
  // Copies, which stay in registers: stores to totals might change what `sums` holds.
  const f32v scales[] = {sums.scales[0], sums.scales[1]};
  float* const totals = sums.totals;
  end = std::min(end, sums.height);
  for (int64_t i = begin; i < end; ++i) {
    for (int p = 0; p < kTilePanels; ++p) {
      float* const to = totals + i * kNR + p * kPanelWidth;
      store(to, fma(load(sums.values[i] + p * kPanelWidth), scales[p], load(to)));
    }
  }
}

// A slice of both panels of a tile, as bf16.
using Fp8Slice = uint8_t[kTilePanels][kTileBytes];
constexpr int64_t kFp8Lines = kTileBytes / 2 / kLine;  // of a slice of a panel

Q3N_AMX inline void decode_slice(Fp8Slice& out, const PackedWeight& w, const Panels& panels,
                                 int64_t s) {
  for (int p = 0; p < kTilePanels; ++p) {
    decode_fp8(out[p], w.panel(panels[p]) + s * kFp8Lines * kLine, kFp8Lines);
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

// totals [count, kNR] = a tile of W times up to 32 tokens. A slice is decoded while AMX multiplies
// the one before; a block's sums are added while the next block is multiplied.
template <bool kTwo>
Q3N_AMX void macro_kernel_fp8(float* totals, const PackedWeight& w, const Panels& panels,
                              const Run& run) {
  constexpr int64_t kRow = kNR * sizeof(float);
  alignas(64) Fp8Slice decoded[2];
  ScaledSums sums[2];
  const int64_t slices = run.x.slices, of_block = w.group ? w.group / kAmxK : slices;
  const TokenTiles x(run, 0);
  configure_tiles(x.height0, x.height1);
  if (slices) decode_slice(decoded[0], w, panels, 0);
  for (int64_t s = 0; s < slices; ++s) {
    if (s % of_block == 0) {
      _tile_zero(0);
      _tile_zero(1);
      if constexpr (kTwo) {
        _tile_zero(2);
        _tile_zero(3);
      }
    }
    if (s + 1 < slices) decode_slice(decoded[(s + 1) % 2], w, panels, s + 1);
    multiply_slice<kTwo>(decoded[s % 2], x.x0.at(s), x.x1.at(s));
    if ((s + 1) % of_block) continue;
    const int64_t block = s / of_block;
    ScaledSums& now = sums[block % 2];
    float* const to = w.group ? now.values[0] : totals;
    _tile_stored(0, to, kRow);
    _tile_stored(1, to + kPanelWidth, kRow);
    if constexpr (kTwo) {
      _tile_stored(2, to + kAmxRows * kNR, kRow);
      _tile_stored(3, to + kAmxRows * kNR + kPanelWidth, kRow);
    }
    asm volatile("" ::: "memory");
    if (!w.group) continue;
    add_scaled(sums[1 - block % 2], 0, kAmxMR);
    now.totals = totals, now.height = run.count;
    for (int p = 0; p < kTilePanels; ++p) now.scales[p] = w.scale(panels[p], block, 0);
  }
  if (w.group) add_scaled(sums[(w.blocks - 1) % 2], 0, kAmxMR);
}

// Two blocks of a tile's panels, decoded: with those that are decoded next they fit in L1.
constexpr int64_t kFp8Slices = 8;
using Fp8Chunk = uint8_t[kTilePanels][kFp8Slices * kTileBytes];

// Decodes slices [first, last) of a tile's panels, some lines at a time.
class Fp8Decoding {
 public:
  Fp8Decoding(const PackedWeight& w, Fp8Chunk& out, const Panels& panels, int64_t first,
              int64_t last)
      : out_(out), of_panel_((last - first) * kFp8Lines) {
    for (int p = 0; p < kTilePanels; ++p) from_[p] = w.panel(panels[p]) + first * kFp8Lines * kLine;
  }

  int64_t lines() const { return kTilePanels * of_panel_; }

  // Decodes up to `count` lines more.
  Q3N_AMX void decode(int64_t count) {
    while (count && panel_ < kTilePanels) {
      const int64_t n = std::min(count, of_panel_ - line_);
      decode_fp8(out_[panel_] + 2 * line_ * kLine, from_[panel_] + line_ * kLine, n);
      count -= n, line_ += n;
      if (line_ == of_panel_) line_ = 0, ++panel_;
    }
  }

 private:
  Fp8Chunk& out_;
  const int64_t of_panel_;
  const uint8_t* from_[kTilePanels];
  int64_t panel_ = 0, line_ = 0;
};

// The same for many tokens and some tiles. While one of `chunks` is multiplied, the other is
// decoded.
Q3N_AMX inline void macro_kernel_fp8_chunks(float* totals, const PackedWeight& w,
                                            std::span<const Panels> tiles, const Run& run) {
  alignas(64) thread_local Fp8Chunk chunks[2];
  const int64_t of_block = w.group ? w.group / kAmxK : kFp8Slices, tokens = run.count;
  const int64_t heights_of_all = (tokens + kAmxMR - 1) / kAmxMR;
  const Steps steps{totals, tokens * kNR, tiles, kFp8Slices, run.x.slices};
  const auto decoding = [&](int64_t i) -> Fp8Decoding {
    const auto [panels, first, last, to] = steps[i];
    return {w, chunks[i % 2], panels, first, last};
  };
  if (w.group) std::memset(totals, 0, tiles.size() * tokens * kNR * sizeof *totals);
  Fp8Decoding start = decoding(0);
  start.decode(start.lines());
  ScaledSums sums[2];
  TileHeights heights;
  int64_t turn = 0;
  for (int64_t now = 0; now < steps.count(); ++now) {
    const Fp8Chunk& chunk = chunks[now % 2];
    const auto [panels, first, last, of_tile] = steps[now];
    std::optional<Fp8Decoding> next;
    if (now + 1 < steps.count()) next.emplace(decoding(now + 1));
    const int64_t slices_of_all = heights_of_all * (last - first);
    const int64_t share = next ? (next->lines() + slices_of_all - 1) / slices_of_all : 0;
    for (int64_t i = 0; i < tokens; i += kAmxMR) {
      const TokenTiles x(run, i);
      heights.configure(x);
      for (int64_t s = first; s < last; s += of_block) {
        const int64_t slices = std::min(of_block, last - s), at = (s - first) * kTileBytes;
        const ScaledSums& before = sums[1 - turn];
        const auto meanwhile = [&](int64_t slice) Q3N_AMX {
          const int64_t tokens_of_slice = kAmxMR / of_block;
          add_scaled(before, slice * tokens_of_slice, (slice + 1) * tokens_of_slice);
          if (next) next->decode(share);
        };
        float* const to = of_tile + i * kNR;
        const auto multiply = [&]<bool kTwo>(std::bool_constant<kTwo>) Q3N_AMX {
          multiply_slices<kTwo, true>(w.group ? sums[turn].values[0] : to, kNR,
                                      {chunk[0] + at, chunk[1] + at}, x.x0.after(s), x.x1.after(s),
                                      slices, w.group || s == 0, meanwhile);
        };
        x.height1 ? multiply(std::true_type{}) : multiply(std::false_type{});
        if (!w.group) continue;
        ScaledSums& done = sums[turn];
        done.totals = to, done.height = x.height0 + x.height1;
        for (int p = 0; p < kTilePanels; ++p) done.scales[p] = w.scale(panels[p], s / of_block, 0);
        turn = 1 - turn;
      }
    }
  }
  if (w.group) add_scaled(sums[1 - turn], 0, kAmxMR);
}

// totals [tiles, count, kNR] = these tiles of W times a run.
Q3N_AMX inline void multiply_fp8(float* totals, const PackedWeight& w,
                                 std::span<const Panels> tiles, const Run& run) {
  if (run.count > kAmxMR) {
    macro_kernel_fp8_chunks(totals, w, tiles, run);
  } else {
    const auto multiply = run.count > kAmxRows ? macro_kernel_fp8<true> : macro_kernel_fp8<false>;
    const int64_t size = run.count * kNR;
    if (w.group) std::memset(totals, 0, tiles.size() * size * sizeof *totals);
    for (size_t q = 0; q < tiles.size(); ++q) multiply(totals + q * size, w, tiles[q], run);
  }
  if (!w.group) multiply_by_scales(totals, w, tiles, run.count);
}

// totals [tiles, count, kNR] = these tiles of W times tokens [begin, begin + count) of one run.
// `next`: the tile that this thread multiplies then.
Q3N_AMX inline void multiply(float* totals, const PackedWeight& w, std::span<const Panels> tiles,
                             const Panels& next, const AmxPanels& x, int64_t begin, int64_t count) {
  static_assert(kTilePanels == 2 && kParts == 1);
  const Run run{x, begin, count};
  if (w.encoding == kFp8) {
    multiply_fp8(totals, w, tiles, run);
  } else {
    multiply_bf16(totals, w, tiles, next, run);
  }
  _tile_release();
}

}  // namespace Q3N_LEVEL

#endif
