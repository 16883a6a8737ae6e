// Long rows (prefill): the WY form over chunks of 64 tokens. Within a chunk, with D_ij the decay
// from token j to i, e_i the decay from the chunk's start to i, and S the state before it:
//   (I + tril(beta_i D_ij k_i.k_j, -1)) U = beta_i (v_i - e_i S k_i)
//   O = e_i S q_i + tril(D_ij q_i.k_j) U,   S = e_last S + sum_j D_last,j u_j k_j^T
#pragma once

#include "gemm.h"
#include "recurrent.h"

namespace Q3N_LEVEL {

constexpr int64_t kChunk = 64;

// Scratch of one (row, key head): inputs and state padded with zeros to whole gemm tiles.
struct Chunk {
  int64_t K, V, M = 0;                       // padded dims, padded tokens of this chunk
  std::vector<float> q, k, kt, v, o;         // [M, K] [M, K] [K, kChunk] [M, V] [M, V]
  std::vector<float> kk, qk, decay, system;  // [kChunk, kChunk]
  std::vector<float> state;                  // [group, K, V]: S transposed

  explicit Chunk(const Dims& d)
      : K(round_up(d.K, kTileRows)),
        V(round_up(d.V, kTileCols)),
        q(kChunk * K),
        k(kChunk * K),
        kt(K * kChunk),
        v(kChunk * V),
        o(kChunk * V),
        kk(kChunk * kChunk),
        qk(kChunk * kChunk),
        decay(kChunk * kChunk),
        system(kChunk * kChunk),
        state(d.group() * K * V) {}
};

// S with the committed tokens folded in, transposed into the scratch.
template <class S>
void read_state(const Pages<S>& pages, const Row& row, int64_t hv, int64_t v, float* state,
                int64_t ld) {
  const Dims& d = pages.dims;
  StateRows<0, 1> s;
  s.K = d.K;
  if (row.fresh()) {
    s.clear();
  } else {
    s.read(pages.state(row, hv) + v * d.K);
  }
  for (int64_t i = 0; i < row.committed; ++i) {
    s.fold(pages.decay(row, i)[hv], pages.u(row, i, hv) + v, pages.key(row, i, hv / d.group()));
  }
  for (int64_t k = 0; k < d.K; ++k) state[k * ld + v] = s.s[0][k / kLanes][k % kLanes];
}

template <class S>
void write_state(const Pages<S>& pages, const Row& row, int64_t hv, int64_t v, const float* state,
                 int64_t ld) {
  S* to = pages.state(row, hv) + v * pages.dims.K;
  for (int64_t k = 0; k < pages.dims.K; ++k) to[k] = static_cast<S>(state[k * ld + v]);
}

// Keys, queries and gates of tokens [token, token + m), and the products all value heads share.
template <class T>
void load_chunk(const Inputs<T>& in, int64_t token, int64_t m, int64_t h, Chunk& c) {
  c.M = round_up(m, kTileCols);
  std::fill(c.q.begin(), c.q.end(), 0.0f);
  std::fill(c.k.begin(), c.k.end(), 0.0f);
  for (int64_t i = 0; i < m; ++i) {
    in.query(token + i, h, c.q.data() + i * c.K);
    in.key(token + i, h, c.k.data() + i * c.K);
  }
  for (int64_t i = 0; i < c.M; ++i)
    for (int64_t k = 0; k < c.K; ++k) c.kt[k * kChunk + i] = c.k[i * c.K + k];
  gemm(c.M, c.M, c.K, c.k.data(), c.K, c.kt.data(), kChunk, 0.0f, c.kk.data(), kChunk);
  gemm(c.M, c.M, c.K, c.q.data(), c.K, c.kt.data(), kChunk, 0.0f, c.qk.data(), kChunk);
}

// decay [i, j] = exp(g_j+1 + ... + g_i) up to the diagonal, zero above; from_start [i].
inline void decays(const float* g, int64_t stride, int64_t m, Chunk& c, float* from_start) {
  alignas(64) float sums[kChunk] = {};
  float total = 0.0f;
  for (int64_t i = 0; i < c.M; ++i) {
    const float step = i < m ? g[i * stride] : 0.0f;
    total += step;
    from_start[i] = total;
    for (int64_t j = 0; j < i; ++j) sums[j] += step;
    float* row = c.decay.data() + i * kChunk;
    for (int64_t j = 0; j < kChunk; j += kLanes) store(row + j, exp(load(sums + j)));
    for (int64_t j = i + 1; j < kChunk; ++j) row[j] = 0.0f;
  }
  for (int64_t i = 0; i < c.M; i += kLanes) store(from_start + i, exp(load(from_start + i)));
}

// U from its right-hand side, in place: forward substitution, a tile of rows at a time.
inline void solve(Chunk& c) {
  for (int64_t b = 0; b < c.M; b += kTileRows) {
    float* rows = c.v.data() + b * c.V;
    const float* system = c.system.data() + b * kChunk;  // minus the strict lower triangle
    gemm(kTileRows, c.V, b, system, kChunk, c.v.data(), c.V, 1.0f, rows, c.V);
    for (int64_t i = 1; i < kTileRows; ++i) {
      for (int64_t v = 0; v < c.V; v += kLanes) {
        f32v x = load(rows + i * c.V + v);
        for (int64_t j = 0; j < i; ++j) {
          x = fma(splat(system[i * kChunk + b + j]), load(rows + j * c.V + v), x);
        }
        store(rows + i * c.V + v, x);
      }
    }
  }
}

template <class T>
void run_chunk(const Inputs<T>& in, int64_t token, int64_t m, int64_t hv, Chunk& c, float* state) {
  const Dims& d = in.dims;
  alignas(64) float from_start[kChunk];
  decays(in.g + token * d.HV + hv, d.HV, m, c, from_start);
  gemm(c.M, c.V, c.K, c.k.data(), c.K, state, c.V, 0.0f, c.v.data(), c.V);
  gemm(c.M, c.V, c.K, c.q.data(), c.K, state, c.V, 0.0f, c.o.data(), c.V);
  for (int64_t i = 0; i < c.M; ++i) {
    const float beta = i < m ? in.beta[(token + i) * d.HV + hv] : 0.0f;
    const T* value = in.v + (token + i) * in.v_stride[0] + hv * in.v_stride[1];
    float *u = c.v.data() + i * c.V, *o = c.o.data() + i * c.V;
    if (i < m) {
      for_vectors(d.V, [&](int64_t v, int64_t lanes) {
        store(u + v, beta * (load(value + v, lanes) - from_start[i] * load(u + v)), kLanes);
      });
    }
    for (int64_t v = 0; v < c.V; v += kLanes) store(o + v, from_start[i] * load(o + v));
    const float* decay = c.decay.data() + i * kChunk;
    for (int64_t j = 0; j < kChunk; j += kLanes) {
      const f32v with_k = load(decay + j) * load(c.kk.data() + i * kChunk + j);
      store(c.system.data() + i * kChunk + j, -beta * with_k);
    }
  }
  solve(c);
  // The system is spent: the scores of the queries take its place.
  for (int64_t i = 0; i < c.M * kChunk; i += kLanes) {
    store(c.system.data() + i, load(c.decay.data() + i) * load(c.qk.data() + i));
  }
  for (int64_t b = 0; b < c.M; b += kTileRows) {
    gemm(kTileRows, c.V, b + kTileRows, c.system.data() + b * kChunk, kChunk, c.v.data(), c.V, 1.0f,
         c.o.data() + b * c.V, c.V);
  }
  for (int64_t i = 0; i < m; ++i) {
    T* out = in.out + ((token + i) * d.HV + hv) * d.V;
    for_vectors(d.V, [&](int64_t v, int64_t lanes) {
      store(out + v, load(c.o.data() + i * c.V + v), lanes);
    });
  }
  const float* to_end = c.decay.data() + (m - 1) * kChunk;
  for (int64_t i = 0; i < c.M; ++i) {
    for (int64_t v = 0; v < c.V; v += kLanes) {
      store(c.v.data() + i * c.V + v, to_end[i] * load(c.v.data() + i * c.V + v));
    }
  }
  gemm(c.K, c.V, c.M, c.kt.data(), kChunk, c.v.data(), c.V, from_start[m - 1], state, c.V);
}

template <class T, class S>
void run_long(const Inputs<T>& in, const Pages<S>& pages, const std::vector<Row>& rows) {
  const Dims& d = in.dims;
  parallel(rows.size() * d.H, 1, [&](int64_t i) {
    const Row& row = rows[i / d.H];
    const int64_t h = i % d.H;
    Chunk c(d);
    const auto each_state_row = [&](auto f) {
      for (int64_t j = 0; j < d.group(); ++j)
        for (int64_t v = 0; v < d.V; ++v)
          f(pages, row, h * d.group() + j, v, c.state.data() + j * c.K * c.V, c.V);
    };
    each_state_row(read_state<S>);
    for (int64_t t = 0; t < row.tokens; t += kChunk) {
      const int64_t m = std::min(kChunk, row.tokens - t);
      load_chunk(in, row.begin + t, m, h, c);
      for (int64_t j = 0; j < d.group(); ++j) {
        run_chunk(in, row.begin + t, m, h * d.group() + j, c, c.state.data() + j * c.K * c.V);
      }
    }
    each_state_row(write_state<S>);
  });
  for (const Row& row : rows) pages.set_span(row, row.context + row.tokens, 0);
}

}  // namespace Q3N_LEVEL
