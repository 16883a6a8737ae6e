#include <limits>

#include "ops.h"
#include "tensor.h"

namespace Q3N_LEVEL {
namespace {

constexpr int64_t kLargestGroup = 128;
// As in reference.py.
constexpr float kSmallest = 1e-8f;
constexpr double kReaches[] = {0.97, 0.89, 0.81, 0.73};

// Sums are in as many lanes on every instruction set, and those are added in one order.
constexpr int kSumLanes = 16, kParts = kSumLanes / kLanes;
typedef uint8_t u8v __attribute__((vector_size(kLanes)));

// Adds lanes 8 apart, then 4 apart, and so on, which `sum` goes on with.
float total(f32v (&parts)[kParts]) {
  for (int half = kParts / 2; half > 0; half /= 2) {
    for (int p = 0; p < half; ++p) parts[p] += parts[p + half];
  }
  return sum(parts[0]);
}

// Weights in steps of their scale, -8 to 7; -8 for NaN.
f32v steps(f32v w, f32v inverse) {
  f32v q = w * inverse;
  q = q > -8.0f ? q : splat(-8.0f);
  q = q < 7.0f ? q : splat(7.0f);
  return nearest_integer(q);
}

// The weight of which -8 times the scale is nearest, or kSmallest; NaN if one is not finite.
float largest(const float* w, int64_t group) {
  f32v low = load(w), high = low, zero_if_finite{};
  for (int64_t i = 0; i < group; i += kLanes) {
    const f32v v = load(w + i);
    low = v < low ? v : low;
    high = v > high ? v : high;
    zero_if_finite += v - v;
  }
  if (!(sum(zero_if_finite) == 0.0f)) return std::numeric_limits<float>::quiet_NaN();
  float least = low[0], most = high[0];
  for (int i = 1; i < kLanes; ++i) least = std::min(least, low[i]), most = std::max(most, high[i]);
  const float found = most > -least ? most : least;
  return std::abs(found) < kSmallest ? kSmallest : found;
}

// The scale with the least squared error: see `quantise_int4` in quantise.py.
float best_scale(const float* w, int64_t group) {
  const float most = largest(w, group), inverse = 1.0f / most;
  float best = 0.0f, scale = most / -8.0f;
  for (const double reach : kReaches) {
    const f32v tried = splat(inverse * static_cast<float>(-8.0 / reach));
    f32v along[kParts] = {}, square[kParts] = {};
    for (int64_t i = 0; i < group; i += kSumLanes) {
      repeat<kParts>(kParts, [&](int64_t p) Q3N_INLINE {
        const f32v v = load(w + i + p * kLanes), q = steps(v, tried);
        along[p] += v * q;
        square[p] += q * q;
      });
    }
    const float of_w = total(along), of_q = total(square), saved = of_w * of_w / of_q;
    if (saved > best) best = saved, scale = of_w / of_q;
  }
  return scale;
}

// Writes the steps plus 8, two a byte, the lower nibble first.
void write_values(uint8_t* out, const float* w, int64_t group, float scale) {
  constexpr std::make_integer_sequence<int, kLanes> lanes{};
  const f32v inverse = splat(1.0f / scale);
  for (int64_t i = 0; i < group; i += 2 * kLanes) {
    const f32v first = steps(load(w + i), inverse), second = steps(load(w + i + kLanes), inverse);
    const f32v lower = every<0, 2>(first, second, lanes), upper = every<1, 2>(first, second, lanes);
    const f32v both = (lower + 8.0f) + 16.0f * (upper + 8.0f);
    const u8v bytes = __builtin_convertvector(__builtin_convertvector(both, i32v), u8v);
    std::memcpy(out + i / 2, &bytes, sizeof bytes);
  }
}

template <class T, class S>
void quantise_row(uint8_t* values, S* scales, const T* row, int64_t K, int64_t group) {
  alignas(64) float w[kLargestGroup] = {};
  for (int64_t begin = 0; begin < K; begin += group, ++scales) {
    for (int64_t i = 0; i < group; i += kLanes) store(w + i, load(row + begin + i));
    *scales = S(best_scale(w, group));
    write_values(values + begin / 2, w, group, static_cast<float>(*scales));
  }
}

std::tuple<Tensor, Tensor> quantise_int4(Tensor weight, int64_t group, ScalarType scale_dtype) {
  const int64_t N = weight.size(0), K = weight.size(1), groups = K / group;
  Tensor values = empty_as(weight, {N, K / 2}, ScalarType::Byte);
  Tensor scale = empty_as(weight, {N, groups}, scale_dtype);
  with_dtype(weight, [&]<class T>(T) {
    with_dtype(scale, [&]<class S>(S) {
      const T* rows = read<T>(weight);
      parallel(N, grain_of(K), [&](int64_t n) {
        quantise_row(write<uint8_t>(values) + n * K / 2, write<S>(scale) + n * groups, rows + n * K,
                     K, group);
      });
    });
  });
  return {values, scale};
}

}  // namespace
}  // namespace Q3N_LEVEL

Q3N_OP(quantise_int4)
