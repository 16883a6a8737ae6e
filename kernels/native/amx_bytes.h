// The micro-kernel in AMX instructions for int8 and int4 weights: x's int16 are multiplied as upper
// and lower bytes, each summed exactly in int32. So the bits are those of micro_kernel.h, which few
// tokens use.
#pragma once

#include <optional>

#include "amx.h"

#if defined(Q3N_AMX)

namespace Q3N_LEVEL {

constexpr int64_t kAmxByteK = 64;  // columns in a tile register, at most

// Whether so many terms are multiplied here. FP4's groups would fill a quarter or half of a tile.
inline bool use_amx_bytes(const PackedWeight& w, int64_t terms) {
  constexpr int64_t kFewest = 9;
  return native::use_amx && terms >= kFewest && is_integer(w.encoding) && !is_fp4(w.encoding);
}

inline int64_t byte_slice(const PackedWeight& w) { return std::min(w.block, kAmxByteK); }

// The index of the upper byte of x for column j of the weight as unpack_bytes orders it, and the
// lower byte's distance from it: see `split`.
constexpr int upper_at(Encoding encoding, int j) {
  return encoding == kInt4 ? j / 8 * 16 + j % 8 : 2 * j + 1;
}
constexpr int lower_after(Encoding encoding) { return encoding == kInt4 ? 8 : -1; }

// The byte order of a slice, upper bytes then lower bytes, of `columns` integers.
template <Encoding kEncoding, int kColumns>
struct ByteOrder {
  alignas(64) uint8_t upper[64], lower[64];

  constexpr ByteOrder() : upper(), lower() {
    for (int j = 0; j < 64; ++j) {
      const int at = upper_at(kEncoding, j % kColumns), after = lower_after(kEncoding);
      upper[j] = at + (j < kColumns ? 0 : after), lower[j] = at + after;
    }
  }
};

// Packs slices of a term's int16; a slice has `columns` of them.
template <Encoding kEncoding>
Q3N_AMX void pack_bytes(AmxPanels::Place to, int64_t slices, int64_t columns,
                        const int32_t* words) {
  static constexpr ByteOrder<kEncoding, 64> kWide;
  static constexpr ByteOrder<kEncoding, 32> kNarrow;
  const auto* x = reinterpret_cast<const uint8_t*>(words);
  const __m512i both = _mm512_load_si512(kNarrow.upper);
  const __m512i upper = _mm512_load_si512(kWide.upper), lower = _mm512_load_si512(kWide.lower);
  for (int64_t s = 0; s < slices; ++s, x += 2 * columns, to.bytes += to.stride) {
    const __m512i first = _mm512_loadu_si512(x);
    if (columns < kAmxByteK) {
      _mm512_store_si512(to.bytes, _mm512_permutexvar_epi8(both, first));
    } else {
      const __m512i second = _mm512_loadu_si512(x + kLine);
      _mm512_store_si512(to.bytes, _mm512_permutex2var_epi8(first, upper, second));
      _mm512_store_si512(to.bytes + kLine, _mm512_permutex2var_epi8(first, lower, second));
    }
  }
}

// Terms of the activations, packed as bytes.
struct AmxBytePanels {
  AmxPanels panels;
  std::vector<float> scales;  // of a panel: block by block, those of all its terms

  AmxBytePanels(const PackedWeight& w, const Activations& a, const std::vector<int64_t>& terms,
                const std::vector<int64_t>& runs)
      : panels(terms.size(), w.blocks * w.block / byte_slice(w), 2 * byte_slice(w)),
        scales(terms.size() * w.blocks) {
    const int64_t columns = byte_slice(w);
    const auto set = w.encoding == kInt4 ? pack_bytes<kInt4> : pack_bytes<kInt8>;
    panels.fill(runs, grain_of(kAmxRows * w.K), [&](auto place, int64_t i, int64_t s, int64_t n) {
      set(place, n, columns, a.term(terms[i]) + s * columns / 2);
    });
    for (size_t r = 1; r < runs.size(); ++r) {
      for (int64_t i = runs[r - 1]; i < runs[r]; ++i) {
        const int64_t at = (i - runs[r - 1]) % kAmxRows, first = i - at;
        const int64_t height = std::min(runs[r] - first, kAmxRows);
        for (int64_t b = 0; b < w.blocks; ++b) {
          scales[first * w.blocks + b * height + at] = a.scale(terms[i])[b];
        }
      }
    }
  }
};

// Up to kKC columns of a tile's panels, unpacked to lines of four columns minus zero points.
using ByteChunk = uint8_t[kTilePanels][kKC * kPanelWidth];

// Unpacks `count` lines, each of 8 columns in int4 or 4 in int8. `zero`: of int4.
Q3N_AMX inline void unpack_bytes(uint8_t* out, const uint8_t* line, int64_t count,
                                 Encoding encoding, __m512i zero) {
  struct PairOrder {
    alignas(64) uint16_t words[32];
    constexpr PairOrder() : words() {
      for (int i = 0; i < 32; ++i) words[i] = i / 2 + i % 2 * 16;
    }
  };
  static constexpr PairOrder kPairs;
  const __m512i places = _mm512_load_si512(kPairs.words), nibble = _mm512_set1_epi8(15);
  for (const uint8_t* const end = line + count * kLine; line < end; line += kLine) {
    const __m512i bytes = _mm512_loadu_si512(line);
    _mm_prefetch(line + kLineBytesAhead, _MM_HINT_T0);
    if (encoding == kInt8) {
      _mm512_store_si512(out, _mm512_permutexvar_epi16(places, bytes));
      out += kLine;
    } else {
      const __m512i low = _mm512_and_si512(bytes, nibble);
      const __m512i high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
      _mm512_store_si512(out, _mm512_sub_epi8(low, zero));
      _mm512_store_si512(out + kLine, _mm512_sub_epi8(high, zero));
      out += 2 * kLine;
    }
  }
}

// Unpacks blocks [first, last) of a tile's panels, some lines at a time.
class ByteUnpacking {
 public:
  ByteUnpacking(const PackedWeight& w, ByteChunk& out, const Panels& panels, int64_t first,
                int64_t last)
      : w_(w), out_(out), panels_(panels), first_(first), last_(last) {
    start_panel();
  }

  // The lines of all its blocks.
  int64_t lines() const { return kTilePanels * (last_ - first_) * of_block_; }

  // Unpacks up to `count` lines more.
  Q3N_AMX void unpack(int64_t count) {
    while (count && panel_ < kTilePanels) {
      const int64_t n = std::min(count, of_block_ - line_);
      unpack_bytes(to_, from_, n, w_.encoding, zero_);
      count -= n, line_ += n, from_ += n * kLine;
      to_ += n * (w_.encoding == kInt4 ? 2 : 1) * kLine;
      if (line_ < of_block_) continue;
      line_ = 0;
      if (++block_ < last_) {
        set_zero();
      } else if (++panel_ < kTilePanels) {
        start_panel();
      }
    }
  }

 private:
  void start_panel() {
    block_ = first_;
    from_ = w_.panel(panels_[panel_]) + first_ * of_block_ * kLine, to_ = out_[panel_];
    set_zero();
  }
  void set_zero() {
    if (w_.encoding == kInt4) zero_ = (__m512i)(w_.zero(panels_[panel_], block_, 0) * 0x01010101);
  }

  const PackedWeight& w_;
  ByteChunk& out_;
  const Panels panels_;
  const int64_t first_, last_, of_block_ = w_.block / (w_.encoding == kInt4 ? 8 : 4);
  int64_t panel_ = 0, block_ = 0, line_ = 0;
  const uint8_t* from_ = nullptr;
  uint8_t* to_ = nullptr;
  __m512i zero_ = {};
};

// Tile registers: 0 and 1 sums of x's upper bytes, 2 and 3 of its lower bytes; 4 and 5 those bytes
// of x; 6 and 7 the weight.
Q3N_AMX inline void configure_byte_tiles(int64_t height, int64_t columns) {
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

// A block's sums with a panel of x, and the totals to add them to.
struct BlockSums {
  alignas(64) int32_t upper[kAmxRows][kNR], lower[kAmxRows][kNR];
  f32v weight_scales[kTilePanels] = {};
  float* totals = nullptr;        // [height, kNR]
  const float* scales = nullptr;  // of x
  int64_t height = 0;
};

// Adds terms [begin, end) to their totals, as add_blocks does.
template <bool kScaled>
Q3N_INLINE inline void add_products(const BlockSums& sums, int64_t begin, int64_t end) {
  // Copies, which stay in registers: stores to totals might change what `sums` holds.
  const float* scales = sums.scales;
  const f32v weight_scales[] = {sums.weight_scales[0], sums.weight_scales[1]};
  float* const totals = sums.totals;
  end = std::min(end, sums.height);
  for (int64_t i = begin; i < end; ++i) {
    float* const to = totals + i * kNR;
    const f32v scale = splat(scales[i]);
    for (int p = 0; p < kTilePanels; ++p) {
      i32v upper, lower;
      std::memcpy(&upper, sums.upper[i] + p * kPanelWidth, sizeof upper);
      std::memcpy(&lower, sums.lower[i] + p * kPanelWidth, sizeof lower);
      f32v product = __builtin_convertvector((upper << 8) + lower, f32v);
      if constexpr (kScaled) product *= weight_scales[p];
      store(to + p * kPanelWidth, fma(product, scale, load(to + p * kPanelWidth)));
    }
  }
}

// Loads slice s of x into a register. A macro, because the register's number must be a literal.
#define Q3N_LOAD_X(tile, x, s)                  \
  if constexpr (kStream) {                      \
    _tile_stream_loadd(tile, x.at(s), x.token); \
  } else {                                      \
    _tile_loadd(tile, x.at(s), x.token);        \
  }

// Multiplies a block. In the meantime the block before is added, some terms after each slice, and
// `share` lines of the next chunk are unpacked, so that vector and AMX units are both busy.
template <bool kScaled, bool kStream>
Q3N_AMX void micro_kernel_bytes(BlockSums& sums, const BlockSums& before, ByteUnpacking* unpacking,
                                int64_t share, const std::array<const uint8_t*, kTilePanels>& w,
                                const TileView& upper, int64_t columns, int64_t slices) {
  constexpr int64_t kRow = sizeof *sums.upper;
  const int64_t terms = kAmxRows / slices;
  const TileView lower{static_cast<const uint8_t*>(upper.first) + columns, upper.slice,
                       upper.token};
  asm volatile("" ::: "memory");  // _tile_loadd does not say that it reads memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  Q3N_LOAD_X(4, upper, 0)
  _tile_loadd(6, w[0], kLine);
  _tile_loadd(7, w[1], kLine);
  Q3N_LOAD_X(5, lower, 0)
  for (int64_t s = 0; s < slices; ++s) {
    const int64_t next = s + 1, at = next * columns * kPanelWidth;
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    if (next < slices) {  // a register is loaded once it has been multiplied
      Q3N_LOAD_X(4, upper, next)
      _tile_dpbusd(2, 5, 6);
      _tile_loadd(6, w[0] + at, kLine);
      _tile_dpbusd(3, 5, 7);
      _tile_loadd(7, w[1] + at, kLine);
      Q3N_LOAD_X(5, lower, next)
    } else {
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
    add_products<kScaled>(before, s * terms, (s + 1) * terms);
    if (unpacking) unpacking->unpack(share);
  }
  _tile_stored(0, sums.upper[0], kRow);
  _tile_stored(1, sums.upper[0] + kPanelWidth, kRow);
  _tile_stored(2, sums.lower[0], kRow);
  _tile_stored(3, sums.lower[0] + kPanelWidth, kRow);
  asm volatile("" ::: "memory");
}

#undef Q3N_LOAD_X

// totals [tiles, count, kNR] += these tiles of W, without scales of whole channels, times terms
// [begin, begin + count) of one run. While one of `chunks` is multiplied, the other is unpacked.
template <bool kScaled, bool kStream>
Q3N_AMX void multiply_bytes(float* totals, const PackedWeight& w, std::span<const Panels> tiles,
                            const AmxBytePanels& x, int64_t begin, int64_t count,
                            ByteChunk (&chunks)[2]) {
  const int64_t columns = byte_slice(w), slices = w.block / columns, of_chunk = kKC / w.block;
  const Steps steps{totals, count * kNR, tiles, of_chunk, w.blocks};
  const int64_t heights = (count + kAmxRows - 1) / kAmxRows;
  const auto unpacking = [&](int64_t i) -> ByteUnpacking {
    const auto [panels, first, last, to] = steps[i];
    return {w, chunks[i % 2], panels, first, last};
  };
  ByteUnpacking start = unpacking(0);
  start.unpack(start.lines());
  BlockSums sums[2];
  int64_t configured = 0, turn = 0;
  for (int64_t now = 0; now < steps.count(); ++now) {
    const ByteChunk& lines = chunks[now % 2];
    const auto [panels, first, last, to] = steps[now];
    const int64_t slices_of_all = heights * (last - first) * slices;
    std::optional<ByteUnpacking> next;
    if (now + 1 < steps.count()) next.emplace(unpacking(now + 1));
    const int64_t share = next ? (next->lines() + slices_of_all - 1) / slices_of_all : 0;
    for (int64_t i = 0; i < count; i += kAmxRows) {
      const int64_t height = std::min(kAmxRows, count - i), slice = height * x.panels.width;
      if (configured != height) configure_byte_tiles(configured = height, columns);
      for (int64_t b = first; b < last; ++b, turn = 1 - turn) {
        const int64_t at = (b - first) * w.block * kPanelWidth;
        const TileView tile{x.panels.panel(begin + i) + b * slices * slice, slice, x.panels.width};
        micro_kernel_bytes<kScaled, kStream>(sums[turn], sums[1 - turn], next ? &*next : nullptr,
                                             share, {lines[0] + at, lines[1] + at}, tile, columns,
                                             slices);
        sums[turn].totals = to + i * kNR, sums[turn].height = height;
        sums[turn].scales = x.scales.data() + (begin + i) * w.blocks + b * height;
        for (int p = 0; kScaled && p < kTilePanels; ++p) {
          sums[turn].weight_scales[p] = w.scale(panels[p], b, 0);
        }
      }
    }
  }
  add_products<kScaled>(sums[1 - turn], 0, kAmxRows);
}

// totals [tiles, count, kNR] = these tiles of W times terms [begin, begin + count) of one run.
Q3N_AMX inline void multiply(float* totals, const PackedWeight& w, std::span<const Panels> tiles,
                             const AmxBytePanels& x, int64_t begin, int64_t count) {
  static_assert(kTilePanels == 2 && kParts == 1);
  const bool stream = count > kAmxMR;
  const auto run = w.group  ? stream ? multiply_bytes<true, true> : multiply_bytes<true, false>
                   : stream ? multiply_bytes<false, true>
                            : multiply_bytes<false, false>;
  alignas(64) thread_local ByteChunk chunks[2];
  std::memset(totals, 0, tiles.size() * count * kNR * sizeof *totals);
  run(totals, w, tiles, x, begin, count, chunks);
  _tile_release();
  if (!w.group) multiply_by_scales(totals, w, tiles, count);
}

}  // namespace Q3N_LEVEL

#endif
