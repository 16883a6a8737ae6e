#include "arguments.h"
#include "convolution.h"
#include "ops.h"
#include "parts.h"
#include "step.h"

namespace Q3N_LEVEL {
namespace {

// Elements of a tensor from `start` on, under other sizes and strides. It must outlive the view.
Tensor view(const Tensor& t, int64_t start, std::vector<int64_t> sizes,
            std::vector<int64_t> strides) {
  char* data = static_cast<char*>(t.mutable_data_ptr()) + start * t.element_size();
  return torch::stable::from_blob(data, sizes, strides, t.device(), t.scalar_type());
}

void gated_delta_net(Tensor qkvz, Tensor ba, int64_t H, int64_t HV, int64_t K, int64_t V, bool flat,
                     Tensor weight, Tensor A_log, Tensor dt_bias, Tensor norm, double norm_eps,
                     bool sigmoid_gate, Tensor state_, Tensor key_, Tensor u_, Tensor g_,
                     Tensor span_, Tensor conv_, Tensor query_start_loc, Tensor slot,
                     Tensor context_len, Tensor out_) {
  const Arguments arguments{"gated_delta_net"};
  arguments.require(H > 0 && HV % H == 0, "cannot serve ", H, " key heads with ", HV,
                    " value heads");
  arguments.expect_dims("qkvz", qkvz, 2);
  const int64_t T = qkvz.size(0), R = HV / H, C = 2 * H * K + HV * V;
  const ScalarType dtype = qkvz.scalar_type(), fp32 = ScalarType::Float;
  arguments.expect("qkvz", qkvz, {T, C + HV * V}, {ScalarType::BFloat16, ScalarType::Half, fp32});
  arguments.expect("ba", ba, {T, 2 * HV}, {dtype});
  arguments.expect("norm", norm, {V}, {dtype, fp32});
  arguments.expect("out_", out_, {T, HV * V}, {dtype});
  arguments.require(T <= 1 || out_.stride(0) == HV * V, "out_ is not contiguous: strides ",
                    listed(out_.strides()));
  arguments.expect_dims("conv_", conv_, 3);
  arguments.expect_dims("key_", key_, 4);
  arguments.require(conv_.size(1) - kWidth == key_.size(1) - kGrid, "conv_ rolls back ",
                    conv_.size(1) - kWidth, " tokens, key_ ", key_.size(1) - kGrid);
  // Parts of a token's row, where the first head's begins: of a head, or all heads' one by one.
  const int64_t row = qkvz.stride(0), ba_row = ba.stride(0), all = flat ? H : 1;
  const auto part = [&](int64_t start, int64_t width) {
    return view(qkvz, start * all, {T, H, width}, {row, flat ? width : 2 * (K + R * V), 1});
  };
  const auto gate = [&](int64_t start) {
    return view(ba, start * all, {T, H, R}, {ba_row, flat ? R : 2 * R, 1});
  };
  const Tensor in = causal_conv1d(part(0, K), part(K, K), part(2 * K, R * V), weight, conv_, span_,
                                  query_start_loc, slot, context_len);
  const Tensor out =
      gated_delta_rule(view(in, 0, {T, H, K}, {C, K, 1}), view(in, H * K, {T, H, K}, {C, K, 1}),
                       view(in, 2 * H * K, {T, HV, V}, {C, V, 1}), gate(R), gate(0), A_log, dt_bias,
                       state_, key_, u_, g_, span_, query_start_loc, slot, context_len);
  const Tensor z = part(2 * K + R * V, R * V);
  rms_norm_gated_to(out_, view(out, 0, {T, H, R, V}, {HV * V, R * V, V, 1}),
                    view(z, 0, {T, H, R, V}, {row, z.stride(1), V, 1}), norm, norm_eps,
                    sigmoid_gate);
}

}  // namespace
}  // namespace Q3N_LEVEL

Q3N_OP_OF_ACTIVATIONS(gated_delta_net)
