// Short rows (decode, verify): one pass over S, a few of its rows in registers at a time.
#pragma once

#include "inputs.h"

namespace Q3N_LEVEL {

constexpr int64_t kRowsAhead = 8;  // fetched while these run: their chain of products is long
constexpr int64_t kRowsOfS = 2;    // in registers together, to hide the latency of the dot products

// A short row's tokens as the recurrence takes them; heads padded with zeros to K_padded.
struct Prepared {
  int64_t K_padded;
  std::vector<float> q, k;   // [tokens, H, K_padded]
  std::vector<float> qk;     // [tokens, H]: q . k
  std::vector<float> decay;  // [tokens, HV]

  Prepared(const Dims& d, int64_t tokens)
      : K_padded(round_up(d.K, kLanes)),
        q(tokens * d.H * K_padded),
        k(tokens * d.H * K_padded),
        qk(tokens * d.H),
        decay(tokens * d.HV) {}
};

template <class T>
void prepare(const Inputs<T>& in, int64_t token, Prepared& p, int64_t i) {
  const Dims& d = in.dims;
  for_vectors(d.HV, [&](int64_t j, int64_t lanes) {
    store(p.decay.data() + i * d.HV + j, exp(load(in.g + token * d.HV + j, lanes)), lanes);
  });
  for (int64_t h = 0; h < d.H; ++h) {
    float* q = p.q.data() + (i * d.H + h) * p.K_padded;
    float* k = p.k.data() + (i * d.H + h) * p.K_padded;
    in.query(token, h, q);
    in.key(token, h, k);
    f32v dot{};
    for (int64_t j = 0; j < p.K_padded; j += kLanes) dot = fma(load(q + j), load(k + j), dot);
    p.qk[i * d.H + h] = sum(dot);
  }
}

// Rows [v, v + R) of one head's S. kVectors: vectors in a row, 0 when only known at run time.
template <int kVectors, int64_t R>
struct StateRows {
  f32v s[R][kVectors ? kVectors : kMaxDim / kLanes];
  int64_t K;

  // Calls f(r, j, offset in the row, lanes) for vector j of row r.
  template <class F>
  Q3N_INLINE void each(F&& f) {
    repeat<kVectors>((K + kLanes - 1) / kLanes, [&](int64_t j) Q3N_INLINE {
      const int64_t lanes = kVectors ? kLanes : std::min<int64_t>(kLanes, K - j * kLanes);
      repeat<R>(R, [&](int64_t r) Q3N_INLINE { f(r, j, j * kLanes, lanes); });
    });
  }
  template <class S>
  Q3N_INLINE void read(const S* from) {
    each([&](int64_t r, int64_t j, int64_t k, int64_t lanes)
             Q3N_INLINE { s[r][j] = load(from + r * K + k, lanes); });
  }
  Q3N_INLINE void clear() {
    each([&](int64_t r, int64_t j, int64_t, int64_t) Q3N_INLINE { s[r][j] = f32v{}; });
  }
  template <class S>
  Q3N_INLINE void write(S* to) {
    each([&](int64_t r, int64_t j, int64_t k, int64_t lanes)
             Q3N_INLINE { store(to + r * K + k, s[r][j], lanes); });
  }
  // S = decay S + u k^T: the one way a token enters the state, now or when it is committed.
  Q3N_INLINE void fold(float decay, const float* u, const float* key) {
    each([&](int64_t r, int64_t j, int64_t k, int64_t lanes) Q3N_INLINE {
      s[r][j] = fma(splat(u[r]), load(key + k, lanes), splat(decay) * s[r][j]);
    });
  }
  // S k and S q in one pass; key and query are padded to whole vectors.
  Q3N_INLINE void products(const float* key, const float* query, float (&Sk)[R], float (&Sq)[R]) {
    f32v with_k[R]{}, with_q[R]{};
    each([&](int64_t r, int64_t j, int64_t k, int64_t) Q3N_INLINE {
      with_k[r] = fma(s[r][j], load(key + k), with_k[r]);
      with_q[r] = fma(s[r][j], load(query + k), with_q[r]);
    });
    repeat<R>(R, [&](int64_t r) Q3N_INLINE { Sk[r] = sum(with_k[r]), Sq[r] = sum(with_q[r]); });
  }
};

// Reads R rows of S, folds the committed tokens, then runs the row's own tokens.
//   u = beta (v - d S k),  o = (d S + u k^T) q = d S q + u (k . q)
template <int kVectors, int64_t R, class T, class S>
void run_rows(const Inputs<T>& in, const Pages<S>& pages, const Prepared& p, const Row& row,
              int64_t first, int64_t hv, int64_t v) {
  const Dims& d = in.dims;
  const int64_t h = hv / d.group();
  StateRows<kVectors, R> rows;
  rows.K = d.K;
  S* state = pages.state(row, hv) + v * d.K;
  if (row.fresh()) {
    rows.clear();
  } else {
    rows.read(state);
  }
  for (int64_t i = 0; i < row.committed; ++i) {
    rows.fold(pages.decay(row, i)[hv], pages.u(row, i, hv) + v, pages.key(row, i, h));
  }
  if (row.fresh() || row.committed > 0) rows.write(state);
  for (int64_t i = 0; i < row.tokens; ++i) {
    const int64_t token = row.begin + i, at = first + i;
    const float* q = p.q.data() + (at * d.H + h) * p.K_padded;
    const float* k = p.k.data() + (at * d.H + h) * p.K_padded;
    const float decay = p.decay[at * d.HV + hv], beta = in.beta[token * d.HV + hv];
    const T* value = in.v + token * in.v_stride[0] + hv * in.v_stride[1] + v;
    float* u = pages.u(row, i, hv) + v;
    T* out = in.out + (token * d.HV + hv) * d.V + v;
    float Sk[R], Sq[R];
    rows.products(k, q, Sk, Sq);
    for (int64_t r = 0; r < R; ++r) {
      u[r] = beta * (static_cast<float>(value[r]) - decay * Sk[r]);
      out[r] = static_cast<T>(decay * Sq[r] + u[r] * p.qk[at * d.H + h]);
    }
    if (i + 1 < row.tokens) rows.fold(decay, u, k);
  }
}

template <int kVectors, class T, class S>
void run_tile(const Inputs<T>& in, const Pages<S>& pages, const Prepared& p, const Row& row,
              int64_t first, int64_t hv, int64_t v, int64_t end) {
  for (; v + kRowsOfS <= end; v += kRowsOfS) {
    run_rows<kVectors, kRowsOfS>(in, pages, p, row, first, hv, v);
  }
  for (; v < end; ++v) run_rows<kVectors, 1>(in, pages, p, row, first, hv, v);
}

// Appends the row's keys and decays to the window, once no tile reads the old ones.
template <class S>
void commit(const Pages<S>& pages, const Prepared& p, const Row& row, int64_t first) {
  const Dims& d = pages.dims;
  for (int64_t i = 0; i < row.tokens; ++i) {
    for (int64_t h = 0; h < d.H; ++h) {
      std::memcpy(pages.key(row, i, h), p.k.data() + ((first + i) * d.H + h) * p.K_padded,
                  d.K * sizeof(float));
    }
    std::memcpy(pages.decay(row, i), p.decay.data() + (first + i) * d.HV, d.HV * sizeof(float));
  }
  pages.set_span(row, row.context, row.tokens);
}

template <class T, class S>
void run_short(const Inputs<T>& in, const Pages<S>& pages, const std::vector<Row>& rows) {
  constexpr int64_t kTile = 32;  // rows of S a thread takes at a time
  const Dims& d = in.dims;
  std::vector<int64_t> first, tokens;  // of each row in Prepared; token of each entry
  for (const Row& row : rows) {
    first.push_back(tokens.size());
    for (int64_t i = 0; i < row.tokens; ++i) tokens.push_back(row.begin + i);
  }
  Prepared p(d, tokens.size());
  parallel(tokens.size(), 4, [&](int64_t i) { prepare(in, tokens[i], p, i); });
  const int64_t tiles = (d.V + kTile - 1) / kTile;
  parallel(rows.size() * d.HV * tiles, 8, [&](int64_t i) {
    const int64_t row = i / (d.HV * tiles), hv = i / tiles % d.HV, v = i % tiles * kTile;
    const int64_t end = std::min(v + kTile, d.V);
    if (d.K == 128) {
      run_tile<128 / kLanes>(in, pages, p, rows[row], first[row], hv, v, end);
    } else {
      run_tile<0>(in, pages, p, rows[row], first[row], hv, v, end);
    }
  });
  parallel(rows.size(), 4, [&](int64_t i) { commit(pages, p, rows[i], first[i]); });
}

}  // namespace Q3N_LEVEL
