// Compiled once for all ops on packed weights, because there are many micro-kernels.
#include "packed_gemm.h"

#include "micro_kernel.h"

namespace Q3N_LEVEL {

template <class T>
PackedGemm<T>::PackedGemm(const PackedWeight& w, const T* x, int64_t M, int64_t stride)
    : w_(w), x_(x), stride_(stride) {
#if defined(Q3N_AMX)
  amx_bf16_ = std::is_same_v<T, bf16> && native::use_amx && !is_integer(w.encoding);
#endif
  if (!amx_bf16_) {
    activations_ = activations(x, M, stride, w);
    terms = activations_.terms;
  }
#if defined(Q3N_AMX)
  if (amx_bf16_ || use_amx_bytes(w, M * terms)) {
    mc = 512, nc = M * terms > kAmxMR ? 16 : 1;
  }
#endif
}

template <class T>
PackedA PackedGemm<T>::pack_a(std::span<const int64_t> tokens,
                              [[maybe_unused]] std::span<const int64_t> runs) const {
  PackedA to;
#if defined(Q3N_AMX)
  if constexpr (std::is_same_v<T, bf16>) {
    if (amx_bf16_) {
      auto& panels = to.panels.emplace(tokens.size(), w_.blocks * w_.block / kAmxK, kLine);
      panels.fill(runs, grain_of(kAmxRows * w_.K),
                  [&](auto place, int64_t i, int64_t s, int64_t n) {
                    pack_bf16(place, n, x_ + tokens[i] * stride_ + s * kAmxK, w_.K - s * kAmxK);
                  });
      return to;
    }
  }
#endif
  to.terms.reserve(tokens.size() * terms);
  for (int64_t m : tokens) {
    for (int64_t term = 0; term < terms; ++term) to.terms.push_back(m * terms + term);
  }
#if defined(Q3N_AMX)
  int64_t most = 0;  // terms of a run
  std::vector<int64_t> term_runs{0};
  for (size_t r = 1; r < runs.size(); ++r) {
    most = std::max(most, (runs[r] - runs[r - 1]) * terms);
    term_runs.push_back(runs[r] * terms);
  }
  if (use_amx_bytes(w_, most)) to.bytes.emplace(w_, activations_, to.terms, term_runs);
#endif
  return to;
}

template <class T>
void PackedGemm<T>::multiply(float* totals, std::span<const Panels> tiles, const Panels& next,
                             const PackedA& x, int64_t begin, int64_t count) const {
#if defined(Q3N_AMX)
  if (x.panels) return Q3N_LEVEL::multiply(totals, w_, tiles, next, *x.panels, begin, count);
  if (x.bytes && use_amx_bytes(w_, count * terms)) {
    return Q3N_LEVEL::multiply(totals, w_, tiles, *x.bytes, begin * terms, count * terms);
  }
#endif
  const int64_t* a = x.terms.data() + begin * terms;
  w_.template with_format<T>([&]<class F>(F) {
    for (size_t q = 0; q < tiles.size(); ++q) {
      macro_kernel<F>(totals + q * count * terms * kNR, w_, tiles[q],
                      q + 1 < tiles.size() ? tiles[q + 1] : next, activations_, a, count * terms);
    }
  });
}

template class PackedGemm<float>;
template class PackedGemm<bf16>;
template class PackedGemm<fp16>;

}  // namespace Q3N_LEVEL
