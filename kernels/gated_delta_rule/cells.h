// The recurrence of one value head, one cell of the grid at a time. S is the state at the cell's
// start, G_i the sum of the log decays g of tokens up to i, G_ij that of tokens after j up to i:
//   u_i = beta_i (v_i - exp(G_i) S^T k_i) - sum_{j<i} beta_i exp(G_ij) (k_i . k_j) u_j
//   o_i = exp(G_i) S^T q_i + sum_{j<=i} exp(G_ij) (q_i . k_j) u_j
// and, when the cell is complete, S = exp(G_last) S + sum_j k_j (exp(G_last,j) u_j)^T.
#pragma once

#include <memory>

#include "inputs.h"

namespace Q3N_LEVEL {

// One value for each token and one for the start.
constexpr int64_t kPad = round_up(kGrid + 1, kLanes);

// The tokens of a cell. The first `known` are in the page's window, those up to `count` are new.
struct Cell {
  int64_t known, count;
  const float* key[kGrid];
  alignas(64) float x[2 * kGrid][kMaxDim];  // keys of the new tokens, then their queries
  alignas(64) float kk[kGrid][kPad] = {};   // k_i . k_j of new tokens i
  alignas(64) float qk[kGrid][kPad] = {};

  int64_t fresh() const { return count - known; }
};

// Looks up the keys in the window, computes the new ones, and all products of keys and queries.
template <class T, class S>
void prepare(const Inputs<T>& in, const Pages<S>& pages, const Row& row, int64_t start, int64_t h,
             Cell& cell) {
  cell.known = std::clamp<int64_t>(row.context - start, 0, kGrid);
  cell.count = std::min(kGrid, row.end() - start);
  for (int64_t i = 0; i < cell.known; ++i) cell.key[i] = pages.key(row, start + i, h);
  for (int64_t i = cell.known; i < cell.count; ++i) {
    const int64_t token = row.begin + start + i - row.context;
    float *key = cell.x[i - cell.known], *query = key + cell.fresh() * kMaxDim;
    in.key(token, h, key);
    in.query(token, h, query);
    cell.key[i] = key;
    for (int64_t j = 0; j < i; ++j) cell.kk[i][j] = dot(key, cell.key[j], in.dims.K);
    for (int64_t j = 0; j <= i; ++j) cell.qk[i][j] = dot(query, cell.key[j], in.dims.K);
  }
}

// exp(G_ij) at [i][j] and exp(G_i) at [i][kGrid], for new tokens i and the last token. Each sum is
// computed by itself, from j + 1 to i: the difference of two sums would cancel small ones.
struct Decays {
  alignas(64) float to[kGrid][kPad];

  template <class G>
  Decays(const Cell& cell, G&& g) {
    alignas(64) float sums[kPad] = {};
    for (int64_t i = 0; i < cell.count; ++i) {
      const float step = g(i);
      for (int64_t j = 0; j < i; ++j) sums[j] += step;
      sums[kGrid] += step;
      if (i < cell.known && i + 1 < kGrid) continue;
      for (int64_t j = 0; j < kPad; j += kLanes) store(to[i] + j, exp(load(sums + j)));
    }
  }
};

// Columns [v, v + columns) of one value head of a row.
template <class T, class S>
struct Head {
  const Inputs<T>& in;
  const Pages<S>& pages;
  const Row& row;
  int64_t hv, v, columns;
  const S* state;  // S so far; null while it is zero
  std::unique_ptr<S[]> tentative = nullptr;
  Fold pending = {};  // the last complete cell; until it is complete, w holds u
  int64_t pending_end = 0;
  alignas(64) float product[2 * kGrid][kColumns] = {};

  // Where to write S at the end of the pending cell: to the page if all its tokens are final, else
  // to a copy.
  S* target() {
    if (pending_end <= row.certain()) return pages.state(row, hv) + v;
    if (!tentative) tentative.reset(new S[in.dims.K * in.dims.V]);
    return tentative.get();
  }

  // One pass over S: folds the pending cell and multiplies S by the rows of x.
  void pass(const float* x, int64_t rows) {
    const int64_t K = in.dims.K, V = in.dims.V;
    std::memset(product, 0, rows * sizeof product[0]);
    S* to = pending_end ? target() : nullptr;
    if (!to && !state) return;
    // Only short rows find S in memory: they prefetch the next block, at the end the next head's.
    const S* soon = row.is_long || !state ? nullptr : state + kBlock * V;
    for (int64_t k = 0; k < K; k += kBlock) {
      const int64_t end = std::min(k + kBlock, K);
      if (to) fold(pending, k, end, columns, state, to, V);
      multiply(x, rows, k, end, columns, to ? to : state, soon, V, product[0]);
    }
    if (to) state = to, pending_end = 0;
  }

  // Computes u and o of the cell's new tokens.
  void solve(const Cell& cell, int64_t start, const Decays& decays) {
    const DeltaDims& d = in.dims;
    alignas(64) float with_k[kGrid][kPad], with_q[kGrid][kPad];
    for (int64_t i = cell.known; i < cell.count; ++i) {
      const float beta = in.beta[(row.begin + start + i - row.context) * d.HV + hv];
      for (int64_t j = 0; j < kPad; j += kLanes) {
        const f32v decay = load(decays.to[i] + j);
        store(with_k[i] + j, -beta * (decay * load(cell.kk[i] + j)));
        store(with_q[i] + j, decay * load(cell.qk[i] + j));
      }
    }
    const int64_t kept = pages.first_kept(row) - start;
    for_vectors(columns, [&](int64_t c, int64_t lanes) {
      f32v u[kGrid];
      for (int64_t i = 0; i < cell.known; ++i) u[i] = load(pending.w[i] + c);
      for (int64_t i = cell.known; i < cell.count; ++i) {
        const int64_t token = row.begin + start + i - row.context, r = i - cell.known;
        const T* value = in.v + token * in.v_stride[0] + hv * in.v_stride[1] + v + c;
        const float beta = in.beta[token * d.HV + hv], decay = decays.to[i][kGrid];
        f32v ui = beta * (load(value, lanes) - decay * load(product[r] + c));
        f32v o = decay * load(product[cell.fresh() + r] + c);
        for (int64_t j = 0; j < i; ++j) {
          ui = fma(splat(with_k[i][j]), u[j], ui);
          o = fma(splat(with_q[i][j]), u[j], o);
        }
        u[i] = ui;
        store(pending.w[i] + c, ui);
        if (i >= kept) store(pages.u(row, start + i, hv) + v + c, ui, lanes);
        T* out = in.out + (token * d.HV + hv) * d.V + v + c;
        store(out, fma(splat(with_q[i][i]), ui, o), lanes);
      }
    });
  }

  void run_cell(const Cell& cell, int64_t start) {
    pass(cell.x[0], 2 * cell.fresh());
    for (int64_t i = 0; i < cell.known; ++i) {
      const float* u = pages.u(row, start + i, hv) + v;
      for_vectors(columns,
                  [&](int64_t c, int64_t lanes) { store(pending.w[i] + c, load(u + c, lanes)); });
    }
    const Decays decays(cell, [&](int64_t i) {
      const int64_t token = row.begin + start + i - row.context;
      return i < cell.known ? pages.g(row, start + i)[hv] : in.g[token * in.dims.HV + hv];
    });
    if (cell.fresh() > 0) solve(cell, start, decays);
    if (cell.count < kGrid) return;
    const float* to_end = decays.to[kGrid - 1];
    for (int64_t i = 0; i + 1 < kGrid; ++i) {
      for (int64_t c = 0; c < columns; c += kLanes) {
        store(pending.w[i] + c, to_end[i] * load(pending.w[i] + c));
      }
    }
    std::copy_n(cell.key, kGrid, pending.key);
    pending.decay = to_end[kGrid];
    pending_end = start + kGrid;
  }
};

template <class T, class S>
void run_head(const Inputs<T>& in, const Pages<S>& pages, const Row& row, int64_t hv, int64_t v) {
  const int64_t columns = std::min(kColumns, in.dims.V - v);
  const S* state = row.p0 ? pages.state(row, hv) + v : nullptr;
  Head<T, S> head{in, pages, row, hv, v, columns, state};
  Cell cells[2];  // one being folded, and the next, whose keys are multiplied in the same pass
  for (int64_t start = row.p0; start < row.end(); start += kGrid) {
    Cell& cell = cells[start / kGrid % 2];
    prepare(in, pages, row, start, hv / in.dims.group(), cell);
    if (cell.fresh() > 0 || cell.count == kGrid) head.run_cell(cell, start);
  }
  if (head.pending_end && head.pending_end <= row.certain()) head.pass(nullptr, 0);
}

template <class T, class S>
void run_rows(const Inputs<T>& in, const Pages<S>& pages, const std::vector<Row>& rows) {
  constexpr int64_t kElements = 1 << 15;  // elements of S that a thread takes, at least
  const DeltaDims& d = in.dims;
  const int64_t tiles = (d.V + kColumns - 1) / kColumns, tasks = rows.size() * d.HV * tiles;
  const int64_t elements = d.K * std::min(d.V, kColumns);
  parallel(tasks, std::max<int64_t>(1, kElements / elements), [&](int64_t i) {
    run_head(in, pages, rows[i / tiles / d.HV], i / tiles % d.HV, i % tiles * kColumns);
  });
}

// Writes keys and log decays of the tokens that are not in S, and the span. Runs last, because the
// heads still read what these replace.
template <class T, class S>
void commit(const Inputs<T>& in, const Pages<S>& pages, const Row& row) {
  const DeltaDims& d = in.dims;
  for (int64_t p = pages.first_kept(row); p < row.end(); ++p) {
    const int64_t token = row.begin + p - row.context;
    for (int64_t h = 0; h < d.H; ++h) in.key(token, h, pages.key(row, p, h));
    std::memcpy(pages.g(row, p), in.g + token * d.HV, d.HV * sizeof(float));
  }
  pages.set_span(row);
}

}  // namespace Q3N_LEVEL
