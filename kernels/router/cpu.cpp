#include <limits>

#include "ops.h"
#include "parts.h"

namespace Q3N_LEVEL {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// The k greatest logits so far and their experts, greatest first.
struct Ranked {
  float* values;
  int32_t* experts;

  // Inserts an expert among the first `at`. Of equal values the earlier expert stays ahead.
  void insert(int64_t at, float value, int64_t expert) {
    for (; at > 0 && value > values[at - 1]; --at) {
      values[at] = values[at - 1], experts[at] = experts[at - 1];
    }
    values[at] = value, experts[at] = static_cast<int32_t>(expert);
  }
};

// Ranks a token's logits; false if they have no softmax.
template <class T>
bool rank(Ranked ranked, const T* logits, int64_t E, int64_t k) {
  bool defined = true;
  for (int64_t e = 0; e < k; ++e) {
    const float value = static_cast<float>(logits[e]);
    defined &= value < kInf;  // also false for NaN
    ranked.insert(e, value, e);
  }
  i32v undefined{};
  for_vectors(E - k, [&](int64_t i, int64_t lanes) {
    const f32v v = load(logits + k + i, lanes, T(-kInf));
    undefined |= ~(v < kInf);
    uint32_t above = lane_mask(v > ranked.values[k - 1]);
    if (!above) return;
    float values[kLanes];
    store(values, v);
    for (; above; above &= above - 1) {
      const int lane = __builtin_ctz(above);
      if (values[lane] > ranked.values[k - 1]) ranked.insert(k - 1, values[lane], k + i + lane);
    }
  });
  return defined && !lane_mask(undefined) && ranked.values[0] > -kInf;
}

// sum exp(logit - most) over a token's logits.
template <class T>
float partition(const T* logits, int64_t E, float most) {
  f32v total{};
  for_vectors(
      E, [&](int64_t e, int64_t lanes) { total += exp(load(logits + e, lanes, T(-kInf)) - most); });
  return sum(total);
}

// A token's weights and experts.
template <class T>
void route(float* weights, int32_t* experts, const T* logits, int64_t E, int64_t k,
           bool renormalise) {
  if (!rank({weights, experts}, logits, E, k)) {
    for (int64_t i = 0; i < k; ++i) {
      weights[i] = std::numeric_limits<float>::quiet_NaN(), experts[i] = static_cast<int32_t>(i);
    }
    return;
  }
  const float most = weights[0];
  for_vectors(k, [&](int64_t i, int64_t lanes) {
    store(weights + i, exp(load(weights + i, lanes) - most), lanes);
  });
  float total = 0.0f;
  for (int64_t i = 0; i < k; ++i) total += weights[i];
  if (!renormalise) total = partition(logits, E, most);
  for (int64_t i = 0; i < k; ++i) weights[i] /= total;
}

}  // namespace

std::tuple<Tensor, Tensor> router(Tensor logits, int64_t k, bool renormalise) {
  const int64_t T = logits.size(0), E = logits.size(1), stride = logits.stride(0);
  Tensor weights = empty_as(logits, {T, k}, ScalarType::Float);
  Tensor experts = empty_as(logits, {T, k}, ScalarType::Int);
  with_dtype(logits, [&]<class A>(A) {
    const A* all = read<A>(logits);
    float* weight = write<float>(weights);
    int32_t* expert = write<int32_t>(experts);
    parallel(T, grain_of(E), [&](int64_t t) {
      route(weight + t * k, expert + t * k, all + t * stride, E, k, renormalise);
    });
  });
  return {weights, experts};
}

}  // namespace Q3N_LEVEL

Q3N_OP(router)
