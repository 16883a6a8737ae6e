#include "arguments.h"
#include "ops.h"

namespace Q3N_LEVEL {

// The parts, each of which is an op as well.
Tensor causal_conv1d(Tensor q, Tensor k, Tensor v, Tensor weight, Tensor conv_, Tensor span,
                     Tensor query_start_loc, Tensor slot, Tensor context_len);
Tensor gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor A_log,
                        Tensor dt_bias, Tensor state_, Tensor key_, Tensor u_, Tensor g_,
                        Tensor span_, Tensor query_start_loc, Tensor slot, Tensor context_len);
void rms_norm_gated_to(Tensor out, Tensor x, Tensor z, Tensor weight, double eps,
                       bool sigmoid_gate);

namespace {

// Elements of a tensor from `start` on, under other sizes and strides. It must outlive the view.
Tensor view(const Tensor& t, int64_t start, std::vector<int64_t> sizes,
            std::vector<int64_t> strides) {
  char* data = static_cast<char*>(t.mutable_data_ptr()) + start * t.element_size();
  return torch::stable::from_blob(data, sizes, strides, t.device(), t.scalar_type());
}

void gated_delta_net(Tensor q, Tensor k, Tensor v, Tensor z, Tensor b, Tensor a, Tensor weight,
                     Tensor A_log, Tensor dt_bias, Tensor norm, double norm_eps, bool sigmoid_gate,
                     Tensor state_, Tensor key_, Tensor u_, Tensor g_, Tensor span_, Tensor conv_,
                     Tensor query_start_loc, Tensor slot, Tensor context_len, Tensor out_) {
  const int64_t T = q.size(0), H = q.size(1), K = q.size(2), R = v.size(2), V = v.size(3);
  const int64_t C = H * (2 * K + R * V), last = v.stride(3);
  Arguments{"gated_delta_net"}.require(R == 1 || v.stride(2) == V * last,
                                       "the heads of v are not contiguous: ", listed(v.strides()));
  const Tensor in =
      causal_conv1d(q, k, view(v, 0, {T, v.size(1), R * V}, {v.stride(0), v.stride(1), last}),
                    weight, conv_, span_, query_start_loc, slot, context_len);
  const Tensor out =
      gated_delta_rule(view(in, 0, {T, H, K}, {C, K, 1}), view(in, H * K, {T, H, K}, {C, K, 1}),
                       view(in, 2 * H * K, {T, H * R, V}, {C, V, 1}), a, b, A_log, dt_bias, state_,
                       key_, u_, g_, span_, query_start_loc, slot, context_len);
  rms_norm_gated_to(out_, view(out, 0, {T, H, R, V}, {H * R * V, R * V, V, 1}), z, norm, norm_eps,
                    sigmoid_gate);
}

}  // namespace
}  // namespace Q3N_LEVEL

Q3N_OP_OF_ACTIVATIONS(gated_delta_net)
