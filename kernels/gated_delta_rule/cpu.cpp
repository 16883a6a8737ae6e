#include "arguments.h"
#include "cells.h"
#include "ops.h"
#include "parts.h"

namespace Q3N_LEVEL {
namespace {

std::vector<float> to_floats(const Tensor& t) {
  std::vector<float> values(t.numel());
  with_dtype(t, [&]<class W>(W) { std::copy_n(read<W>(t), values.size(), values.begin()); });
  return values;
}

}  // namespace

Tensor gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor A_log,
                        Tensor dt_bias, Tensor state_, Tensor key_, Tensor u_, Tensor g_,
                        Tensor span_, Tensor query_start_loc, Tensor slot, Tensor context_len) {
  const Arguments arguments{"gated_delta_rule"};
  arguments.expect_dims("q", q, 3);
  arguments.expect_dims("v", v, 3);
  arguments.expect_dims("key_", key_, 4);
  arguments.expect_dims("span_", span_, 2);
  const DeltaDims d{q.size(0), q.size(1), v.size(1), q.size(2), v.size(2), key_.size(1)};
  const ScalarType dtype = q.scalar_type(), fp32 = ScalarType::Float;
  const int64_t slots = span_.size(0);
  arguments.require(d.H > 0 && d.HV % d.H == 0 && 0 < d.K && d.K <= kMaxDim && d.V > 0,
                    "cannot serve ", d.H, " key heads of dim ", d.K, " with ", d.HV,
                    " value heads");
  arguments.require(d.W >= kGrid, "key_ holds ", d.W, " tokens, fewer than a cell of ", kGrid);
  arguments.expect("q", q, {d.T, d.H, d.K}, {ScalarType::BFloat16, ScalarType::Half, fp32});
  arguments.expect("k", k, {d.T, d.H, d.K}, {dtype});
  arguments.expect("v", v, {d.T, d.HV, d.V}, {dtype});
  arguments.expect("a", a, {d.T, d.H, d.group()}, {dtype});
  arguments.expect("b", b, {d.T, d.H, d.group()}, {dtype});
  arguments.expect("A_log", A_log, {d.HV}, {dtype, fp32});
  arguments.expect("dt_bias", dt_bias, {d.HV}, {dtype, fp32});
  arguments.expect_pages("state_", state_, slots, {d.HV, d.K, d.V}, {fp32, ScalarType::BFloat16});
  arguments.expect_pages("key_", key_, slots, {d.W, d.H, d.K}, {fp32});
  arguments.expect_pages("u_", u_, slots, {d.W, d.HV, d.V}, {fp32});
  arguments.expect_pages("g_", g_, slots, {d.W, d.HV}, {fp32});
  arguments.expect_pages("span_", span_, slots, {2}, {ScalarType::Int});
  arguments.expect_step(query_start_loc, slot, context_len);
  std::vector<Row> short_rows, long_rows;  // separate, so that every thread gets a share of each
  const auto rows = checked_rows(query_start_loc, slot, context_len, span_, d.T, d.W - kGrid);
  for (const Row& row : rows) (row.is_long ? long_rows : short_rows).push_back(row);
  std::vector<float> rate = to_floats(A_log), bias = to_floats(dt_bias);
  std::vector<float> g(d.T * d.HV), beta(d.T * d.HV);
  for (float& x : rate) x = -std::exp(x);
  Tensor out = empty_as(v, {d.T, d.HV, d.V});
  with_activations(q, [&]<class T>(T) {
    const Inputs<T> in{d,
                       read<T>(q),
                       read<T>(k),
                       read<T>(v),
                       read<T>(a),
                       read<T>(b),
                       {q.stride(0), q.stride(1)},
                       {k.stride(0), k.stride(1)},
                       {v.stride(0), v.stride(1)},
                       {a.stride(0), a.stride(1)},
                       {b.stride(0), b.stride(1)},
                       write<T>(out),
                       g.data(),
                       beta.data()};
    parallel(d.T, 16, [&](int64_t t) { gates(in, t, rate.data(), bias.data()); });
    zero_uncovered(in.out, rows, d.T, d.HV * d.V);
    const auto run = [&]<class S>(S) {
      const Pages<S> pages{d,
                           write<S>(state_),
                           write<float>(key_),
                           write<float>(u_),
                           write<float>(g_),
                           write<int32_t>(span_),
                           state_.stride(0),
                           key_.stride(0),
                           u_.stride(0),
                           g_.stride(0),
                           span_.stride(0)};
      run_rows(in, pages, short_rows);
      run_rows(in, pages, long_rows);
      parallel(rows.size(), 4, [&](int64_t i) { commit(in, pages, rows[i]); });
    };
    if (state_.scalar_type() == ScalarType::Float) {
      run(float{});
    } else {
      run(bf16{});
    }
  });
  return out;
}

}  // namespace Q3N_LEVEL

Q3N_OP_OF_ACTIVATIONS(gated_delta_rule)
