// Causal depthwise convolutions of width 4 over the rings of state pages.
#pragma once

#include "arguments.h"
#include "step.h"

namespace Q3N_LEVEL {

constexpr int64_t kWidth = 4;
constexpr int64_t kHistory = kWidth - 1;
constexpr int64_t kConvBlock = 64;   // tokens of a tile
constexpr int64_t kTokensAhead = 8;  // tokens ahead that are prefetched, since tokens are far apart
// Vectors of channels whose taps and past inputs fit in registers.
constexpr int kGroup = kLanes == 16 ? 4 : 2;

// What a convolution of C channels is given beside its input.
struct ConvArguments {
  Tensor weight, conv, span, query_start_loc, slot, context_len;

  // The rows of the tokens of x, [T, ...]; throws if an argument does not fit it.
  std::vector<Row> checked(const Arguments& arguments, const Tensor& x, int64_t C,
                           int64_t drafts) const {
    const ScalarType dtype = x.scalar_type();
    const int64_t slots = span.size(0);
    arguments.expect("weight", weight, {C, kWidth}, {dtype, ScalarType::Float});
    arguments.require(weight.is_contiguous(), "weight is not contiguous");
    arguments.expect_pages("conv_", conv, slots, {conv.size(1), C}, {dtype});
    arguments.expect_pages("span", span, slots, {2}, {ScalarType::Int});
    arguments.expect_step(query_start_loc, slot, context_len);
    return checked_rows(query_start_loc, slot, context_len, span, x.size(0), drafts);
  }
};

// A head of q, k or v: a contiguous run of channels in each token.
template <class T>
struct Segment {
  const T* in;
  int64_t token_stride, channel, channels;
};

template <class T>
struct Conv {
  const void* weight;  // [C, 4], fp32 or of type T
  bool fp32_weight;
  T* pages;  // [slots, ring, C]
  T* out;    // [T, C]
  int64_t C, ring, page_stride, row_stride, dilation;

  Conv(const ConvArguments& in, const Tensor& out_, int64_t dilation_)
      : weight(in.weight.const_data_ptr()),
        fp32_weight(in.weight.scalar_type() == ScalarType::Float),
        pages(write<T>(in.conv)),
        out(write<T>(out_)),
        C(out_.size(1)),
        ring(in.conv.size(1)),
        page_stride(in.conv.stride(0)),
        row_stride(in.conv.stride(1)),
        dilation(dilation_) {}

  int64_t reach() const { return kHistory * dilation; }

  // Where the page keeps the input at an absolute position.
  T* kept(const Row& row, int64_t p) const {
    return pages + row.slot * page_stride + p % ring * row_stride;
  }

  // The input at a position before the row; zero before the start of the sequence.
  f32v history(const Row& row, int64_t p, int64_t channel, int64_t lanes) const {
    return p < 0 ? f32v{} : load(kept(row, p) + channel, lanes);
  }

  // The taps of `lanes` channels from weights [C, 4].
  template <class W>
  static void load_taps(const W* weights, int64_t channel, int64_t lanes, f32v (&taps)[kWidth]) {
    f32v interleaved[kWidth];
    for (int64_t j = 0; j < kWidth; ++j) {
      const int64_t left = std::clamp<int64_t>(kWidth * lanes - j * kLanes, 0, kLanes);
      interleaved[j] = load(weights + kWidth * channel + j * kLanes, left);
    }
    deinterleave(interleaved, taps);
  }

  // Convolves tokens first, first + dilation, ... below last, in G vectors of channels; G = 1 also
  // handles the tail. Writes a short row's inputs to its page. Those of a long row follow in
  // keep_last, since other tiles of the row still read the page.
  template <int G>
  void convolve(const Row& row, const Segment<T>& s, int64_t i, int64_t tail, int64_t first,
                int64_t last) const {
    const int64_t lanes = G > 1 ? kLanes : tail;
    f32v taps[G][kWidth], x[G][kWidth];
    const T* in = s.in + row.begin * s.token_stride + i;
    repeat<G>(G, [&](int64_t g) Q3N_INLINE {
      const int64_t channel = s.channel + i + g * kLanes;
      if (fp32_weight) {
        load_taps(static_cast<const float*>(weight), channel, lanes, taps[g]);
      } else {
        load_taps(static_cast<const T*>(weight), channel, lanes, taps[g]);
      }
      for (int64_t j = 0; j < kHistory; ++j) {
        const int64_t t = first - (kHistory - j) * dilation;
        x[g][j] = t < 0 ? history(row, row.context + t, channel, lanes)
                        : load(in + t * s.token_stride + g * kLanes, lanes);
      }
    });
    T* result = out + (row.begin + first) * C + s.channel + i;
    for (int64_t t = first; t < last; t += dilation, result += dilation * C) {
      const T* now = in + t * s.token_stride;
      T* keep = row.is_long ? nullptr : kept(row, row.context + t) + s.channel + i;
      repeat<G>(G, [&](int64_t g) Q3N_INLINE {
        if (t + kTokensAhead < last)
          __builtin_prefetch(now + kTokensAhead * s.token_stride + g * kLanes);
        f32v(&past)[kWidth] = x[g];
        past[3] = load(now + g * kLanes, lanes);
        if (keep) store(keep + g * kLanes, past[3], lanes);
        f32v y = past[0] * taps[g][0];
        y = fma(past[1], taps[g][1], y);
        y = fma(past[2], taps[g][2], y);
        y = fma(past[3], taps[g][3], y);
        store(result + g * kLanes, silu(y), lanes);
        past[0] = past[1], past[1] = past[2], past[2] = past[3];
      });
    }
  }

  // A dilated convolution is as many plain ones, each of every dilation-th token.
  void convolve(const Row& row, const Segment<T>& s, int64_t first, int64_t last) const {
    int64_t i = 0;
    for (; i + kGroup * kLanes <= s.channels; i += kGroup * kLanes) {
      for (int64_t t = first; t < std::min(first + dilation, last); ++t) {
        convolve<kGroup>(row, s, i, kLanes, t, last);
      }
    }
    for_vectors(s.channels - i, [&](int64_t j, int64_t lanes) {
      for (int64_t t = first; t < std::min(first + dilation, last); ++t) {
        convolve<1>(row, s, i + j, lanes, t, last);
      }
    });
  }

  // Writes the last inputs of a long row to its page.
  void keep_last(const Row& row, const Segment<T>& s) const {
    for (int64_t t = std::max<int64_t>(row.tokens - reach(), 0); t < row.tokens; ++t) {
      std::memcpy(kept(row, row.context + t) + s.channel, s.in + (row.begin + t) * s.token_stride,
                  s.channels * sizeof(T));
    }
  }
};

// All tiles of a step: tokens [first, last) of a row.
struct ConvTiles {
  struct Tile {
    const Row* row;
    int64_t first, last;
  };
  std::vector<Tile> tiles;
  std::vector<const Row*> long_rows;  // their pages are written when no tile reads them any more

  explicit ConvTiles(const std::vector<Row>& rows) {
    for (const Row& row : rows) {
      const int64_t block = row.is_long ? kConvBlock : std::max<int64_t>(row.tokens, 1);
      for (int64_t t = 0; t == 0 || t < row.tokens; t += block) {
        tiles.push_back({&row, t, std::min(t + block, row.tokens)});
      }
      if (row.is_long) long_rows.push_back(&row);
    }
  }
};

// Convolves every row's segments 0 to `segments`, and keeps its last inputs.
template <class T, class F>
void convolve_rows(const Conv<T>& conv, const std::vector<Row>& rows, int64_t tokens,
                   int64_t segments, F&& segment) {
  const ConvTiles work(rows);
  zero_uncovered(conv.out, rows, tokens, conv.C);
  parallel(work.tiles.size() * segments, 8, [&](int64_t i) {
    const auto& tile = work.tiles[i / segments];
    conv.convolve(*tile.row, segment(i % segments), tile.first, tile.last);
  });
  parallel(work.long_rows.size() * segments, 64, [&](int64_t i) {
    conv.keep_last(*work.long_rows[i / segments], segment(i % segments));
  });
}

}  // namespace Q3N_LEVEL
