// The micro-kernel in vector instructions: a register tile of kMR terms of A by kNR output
// channels, and the macro-kernel around it. An output is summed in one order: within a block even
// and odd columns separately, then block by block; with pairs of bf16, chunk by chunk. So it
// depends on neither the tile nor the other tokens.
#pragma once

#include <array>

#include "activations.h"

namespace Q3N_LEVEL {

// Terms, and panels, of a register tile: accumulators take about half of the registers.
constexpr bool kNeon = kLanes == 4 && kRegisters == 32;
constexpr int kMostTerms = kLanes == 16 ? 8 : kLanes == 8 ? 4 : 2;
template <class F>
constexpr int kMR = kNeon ? kMostTerms : kMostTerms / F::kAccumulators;
constexpr int kTilePanels = kLanes == 16 ? 2 : 1;
constexpr int64_t kNR = kTilePanels * kPanelWidth;
constexpr int64_t kKC = 512;         // columns of a chunk: unpacked, a tile's fit in L1
constexpr int64_t kDirectTiles = 2;  // up to so many tiles of terms unpack lines as they read them

constexpr int64_t kBytesAhead = 4096;  // of a panel that are prefetched into L2

// Indices of a tile's panels; the last one is repeated beyond the end.
using Panels = std::array<int64_t, kTilePanels>;
// Where lines of them begin.
using Lines = std::array<const uint8_t*, kTilePanels>;

// Prefetches into L2 what comes far later, because a core can wait for more lines there than in L1,
// and into L1 what comes soon.
template <class F>
Q3N_INLINE inline void prefetch_lines(const uint8_t* soon, const uint8_t* later) {
  constexpr int64_t kLinesAhead = 8;
  repeat<F::kLineBytes / kLine>(F::kLineBytes / kLine, [&](int64_t l) Q3N_INLINE {
    __builtin_prefetch(soon + (l + kLinesAhead) * kLine);
    __builtin_prefetch(later + l * kLine, 0, 2);
  });
}

// Accumulators per output: even and odd columns separately, to hide the latency of additions. Exact
// sums have no order, so there several terms hide it.
template <class F, int T>
constexpr int kChains = F::kExact ? (T > (kNeon ? 1 : 2) ? 1 : 2) : F::kAccumulators;

#if defined(__ARM_FEATURE_MATMUL_INT8)
// From four columns of four channels in each of two vectors to eight of two.
inline void pair_channels(i32v (&w)[2]) {
  const int32x4_t first = (int32x4_t)w[0], second = (int32x4_t)w[1];
  w[0] = (i32v)vzip1q_s32(first, second), w[1] = (i32v)vzip2q_s32(first, second);
}

// micro_kernel for lines of paired channels: one instruction multiplies eight columns of two of
// them with two terms.
template <int T>
Q3N_INLINE inline void paired_kernel(i32v (&sum)[kParts][T], const uint8_t* line, int64_t lines,
                                     const int32_t* const (&x)[T]) {
  int32x4_t upper[kParts][2] = {}, lower[kParts][2] = {};
  for (int64_t l = 0; l < lines; ++l, line += 2 * kLine) {
    const int32x4_t first = vld1q_s32(x[0] + 4 * l), second = vld1q_s32(x[T - 1] + 4 * l);
    const int8x16_t x_upper = vreinterpretq_s8_s32(vuzp1q_s32(first, second));
    const uint8x16_t x_lower = vreinterpretq_u8_s32(vuzp2q_s32(first, second));
    repeat<kParts>(kParts, [&](int64_t v) Q3N_INLINE {
      repeat<2>(2, [&](int64_t half) Q3N_INLINE {
        const int8x16_t w = vreinterpretq_s8_u8(vld1q_u8(line + half * kLine + 4 * kLanes * v));
        upper[v][half] = vmmlaq_s32(upper[v][half], x_upper, w);
        lower[v][half] = vusmmlaq_s32(lower[v][half], x_lower, w);
      });
    });
  }
  repeat<kParts>(kParts, [&](int64_t v) Q3N_INLINE {
    int64x2_t total[2];  // of two channels: those of a term, those of the other
    repeat<2>(2, [&](int64_t half) Q3N_INLINE {
      total[half] = (int64x2_t)vaddq_s32(vshlq_n_s32(upper[v][half], 8), lower[v][half]);
    });
    sum[v][0] = (i32v)vzip1q_s64(total[0], total[1]);
    if constexpr (T == 2) sum[v][1] = (i32v)vzip2q_s64(total[0], total[1]);
  });
}
#endif

#if defined(__AVX512VNNI__)
// micro_kernel for a block of kLines lines, few enough for registers: the sums with x's upper bytes
// are where those with its lower bytes begin.
template <class F, int T, int kLines>
Q3N_INLINE inline void short_kernel(i32v (&sum)[kTilePanels * kParts][T], const Lines& line,
                                    const Lines& later, const int32_t* const (&x)[T]) {
  constexpr int kVectors = kTilePanels * kParts, kOfLine = F::kLineVectors;
  i32v w[kVectors][kLines][kOfLine];
  repeat<kVectors>(kVectors, [&](int64_t v) Q3N_INLINE {
    repeat<kLines>(kLines, [&](int64_t l) Q3N_INLINE {
      const uint8_t* at = line[v / kParts] + l * F::kLineBytes;
      if (!F::kUnpacked && v % kParts == 0) {
        prefetch_lines<F>(at, later[v / kParts] + l * F::kLineBytes);
      }
      F::unpack(at, v % kParts, w[v][l]);
    });
  });
  const auto add = [&](int64_t lower, auto&& product) Q3N_INLINE {
    repeat<kLines * kOfLine>(kLines * kOfLine, [&](int64_t i) Q3N_INLINE {
      const int64_t l = i / kOfLine, s = i % kOfLine;
      repeat<T>(T, [&](int64_t t) Q3N_INLINE {
        const __m512i xs = (__m512i)(x[t][l * kLineWords<F> + lower + s] + i32v{});
        repeat<kVectors>(kVectors, [&](int64_t v) Q3N_INLINE {
          sum[v][t] = (i32v)product((__m512i)sum[v][t], (__m512i)w[v][l][s], xs);
        });
      });
    });
  };
  const auto each = [&](auto&& f) Q3N_INLINE {
    repeat<kVectors>(kVectors, [&](int64_t v) Q3N_INLINE {
      repeat<T>(T, [&](int64_t t) Q3N_INLINE { sum[v][t] = f(sum[v][t]); });
    });
  };
  each([](i32v) Q3N_INLINE { return i32v{}; });
  add(0, [](__m512i c, __m512i w, __m512i x) Q3N_INLINE { return _mm512_dpbusd_epi32(c, w, x); });
  each([](i32v upper) Q3N_INLINE { return upper << 8; });
  add(2, [](__m512i c, __m512i w, __m512i x) Q3N_INLINE { return _mm512_dpbusd_epi32(c, x, w); });
}
#endif

// sum[v][t] = `lines` lines times the words of x; v: vector of the tile's channels, t: term.
template <class F, int T>
Q3N_INLINE inline void micro_kernel(typename F::Total (&sum)[kTilePanels * kParts][T],
                                    const Lines& line, const Lines& later, int64_t lines,
                                    const int32_t* const (&x)[T]) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  if constexpr (F::kUnpacked && F::kExact) return paired_kernel(sum, line[0], lines, x);
#endif
  constexpr int kVectors = kTilePanels * kParts, kC = kChains<F, T>;
  typename F::Sum chain[kVectors][T][kC] = {};
  for (int64_t l = 0; l < lines; ++l) {
    typename F::Value w[kVectors][F::kLineVectors];
    repeat<kVectors>(kVectors, [&](int64_t v) Q3N_INLINE {
      const uint8_t* at = line[v / kParts] + l * F::kLineBytes;
      if (!F::kUnpacked && v % kParts == 0) {
        prefetch_lines<F>(at, later[v / kParts] + l * F::kLineBytes);
      }
      F::unpack(at, v % kParts, w[v]);
    });
    repeat<F::kLineVectors>(F::kLineVectors, [&](int64_t s) Q3N_INLINE {
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

// total[t] += blocks [first, last) of a tile times T terms. `lines` start at block `first`. A block
// has kShort lines, or any number if that is 0.
template <class F, int T, int kShort>
void add_blocks_of(float* const (&total)[T], const PackedWeight& weight, const Panels& panels,
                   const Lines& lines, const Lines& next, const Activations& a,
                   const int64_t (&terms)[T], int64_t first, int64_t last) {
  constexpr int kVectors = kTilePanels * kParts;
  // Copies, which gcc can keep in registers: stores to totals might change what references name.
  const PackedWeight w = weight;
  const int64_t run = F::kReady ? last - first : 1;  // blocks whose sums need no scales in between
  const int64_t runs = (last - first) / run, run_lines = run * w.block / kLineColumns<F>;
  const int64_t run_words = run * w.block / F::kColumns, run_bytes = run_lines * F::kLineBytes;
  const int64_t ahead = std::clamp<int64_t>(kBytesAhead / run_bytes, 1, runs);
  Lines line = lines, later;
  const int32_t *x[T], *sums[T];
  const float* scales[T];
  float* to[T];
  for (int t = 0; t < T; ++t) {
    x[t] = a.term(terms[t]) + first * w.block / F::kColumns, to[t] = total[t];
    sums[t] = a.sum(terms[t]), scales[t] = a.scale(terms[t]);
  }
  for (int64_t r = 0; r < runs; ++r) {
    const int64_t b = first + r * run, beyond = r + ahead - runs;
    typename F::Total sum[kVectors][T];
    for (int p = 0; p < kTilePanels; ++p) {
      later[p] = (beyond < 0 ? line[p] + ahead * run_bytes : next[p] + beyond * run_bytes);
    }
#if defined(__AVX512VNNI__)
    if constexpr (kShort > 0) {
      short_kernel<F, T, kShort>(sum, line, later, x);
    } else  // NOLINT
#endif
      micro_kernel<F, T>(sum, line, later, run_lines, x);
    repeat<kVectors>(kVectors, [&](int64_t v) Q3N_INLINE {
      const int64_t panel = panels[v / kParts], part = v % kParts;
      const f32v scale = w.group ? w.scale(panel, b, part) : splat(1.0f);
      const i32v zero = w.zeros ? w.zero(panel, b, part) : i32v{};
      repeat<T>(T, [&](int64_t t) Q3N_INLINE {
        auto products = sum[v][t];
        if constexpr (F::kExact) {
          const int32_t of_x = sums[t][b];
          products -= w.zeros ? zero * of_x : w.offset * of_x + i32v{};
        }
        float* const at = to[t] + v * kLanes;
        const f32v scaled = __builtin_convertvector(products, f32v) * scale;
        store(at, fma(scaled, splat(scales[t][b]), load(at)));  // x's scale is a power of two
      });
    });
    for (int p = 0; p < kTilePanels; ++p) line[p] += run_bytes;
    for (int t = 0; t < T; ++t) x[t] += run_words;
  }
}

template <class F, int T>
void add_blocks(float* const (&total)[T], const PackedWeight& w, const Panels& panels,
                const Lines& lines, const Lines& next, const Activations& a,
                const int64_t (&terms)[T], int64_t first, int64_t last) {
  auto* add = add_blocks_of<F, T, 0>;
#if defined(__AVX512VNNI__)
  if constexpr (std::is_same_v<typename F::Family, Bytes>) {
    if (w.block == 2 * kLineColumns<F>) add = add_blocks_of<F, T, 2>;
    if (w.block == 4 * kLineColumns<F>) add = add_blocks_of<F, T, 4>;
  }
#endif
  add(total, w, panels, lines, next, a, terms, first, last);
}

// add_blocks for `count` terms, kMR<F> at a time.
template <class F, int T = kMR<F>>
void add_terms(float* totals, const PackedWeight& w, const Panels& panels, const Lines& lines,
               const Lines& next, const Activations& a, const int64_t* terms, int64_t count,
               int64_t first, int64_t last) {
  for (; count >= T; count -= T, terms += T, totals += T * kNR) {
    float* total[T];
    int64_t index[T];
    for (int t = 0; t < T; ++t) total[t] = totals + t * kNR, index[t] = terms[t];
    add_blocks<F, T>(total, w, panels, lines, next, a, index, first, last);
  }
  if constexpr (T > 1) {
    constexpr int kFewer = F::kUnpacked ? T / 2 : T - 1;  // one more pass would unpack again
    if (count) add_terms<F, kFewer>(totals, w, panels, lines, next, a, terms, count, first, last);
  }
}

// Unpacks `lines` lines for Unpacked.
template <class F>
void unpack_lines(uint8_t* out, const uint8_t* line, int64_t lines) {
  for (int64_t l = 0; l < lines; ++l) {
    for (int64_t part = 0; part < kParts; ++part) {
      typename F::Value values[F::kLineVectors];
      F::unpack(line + l * F::kLineBytes, part, values);
#if defined(__ARM_FEATURE_MATMUL_INT8)
      if constexpr (F::kExact) pair_channels(values);
#endif
      for (int s = 0; s < F::kLineVectors; ++s) {
        std::memcpy(out + (l * F::kLineVectors + s) * kLine + 4 * kLanes * part, values + s,
                    sizeof *values);
      }
    }
  }
}

// totals [count, kNR] = a tile times the terms of A with these indices.
template <class F>
void macro_kernel(float* totals, const PackedWeight& w, const Panels& panels, const Panels& then,
                  const Activations& a, const int64_t* terms, int64_t count) {
  std::memset(totals, 0, count * kNR * sizeof *totals);
  const bool direct = F::kReady || count <= kDirectTiles * kMR<F>;
  // kReady lines are multiplied chunk by chunk, too, so that a chunk stays in L1 for all terms; few
  // terms, too, because a sum's order follows from the chunks.
  const int64_t chunk = direct && !F::kReady ? w.blocks : kKC / w.block;
  alignas(64) thread_local uint8_t unpacked[kTilePanels][kKC / F::kColumns * kLine];
  const int64_t block_bytes = w.block / kLineColumns<F> * F::kLineBytes;
  for (int64_t first = 0; first < w.blocks; first += chunk) {
    const int64_t last = std::min(first + chunk, w.blocks);
    Lines lines, next;
    for (int p = 0; p < kTilePanels; ++p) {
      lines[p] = w.panel(panels[p]) + first * block_bytes;
      next[p] = last < w.blocks ? lines[p] + chunk * block_bytes : w.panel(then[p]);
      if (direct) continue;
      unpack_lines<F>(unpacked[p], lines[p], (last - first) * w.block / kLineColumns<F>);
      lines[p] = unpacked[p];
    }
    if (direct) {
      add_terms<F>(totals, w, panels, lines, next, a, terms, count, first, last);
    } else {
      add_terms<Unpacked<typename F::Family>>(totals, w, panels, lines, lines, a, terms, count,
                                              first, last);
    }
  }
  if (!w.ends_with_scale()) return;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t v = 0; v < kTilePanels * kParts; ++v) {
      float* to = totals + i * kNR + v * kLanes;
      store(to, load(to) * w.last_scale(panels[v / kParts], v % kParts));
    }
  }
}

}  // namespace Q3N_LEVEL
