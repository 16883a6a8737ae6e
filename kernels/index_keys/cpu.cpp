#include "norm.h"
#include "ops.h"
#include "positions.h"
#include "sequences.h"

namespace Q3N_LEVEL {
namespace {

// Keys [pages, d], or [pages, keys of a page, d].
template <class T>
struct Keys {
  T* first;
  int64_t page, key;

  explicit Keys(const Tensor& t)
      : first(write<T>(t)), page(t.stride(0)), key(t.dim() == 3 ? t.stride(1) : 0) {}
  T* at(int64_t p, int64_t i) const { return first + p * page + i * key; }
};

// A token of a row, and its position.
struct Place {
  int64_t token, position;
  const Sequence* sequence;

  int64_t page() const { return sequence->pages[position / sequence->page]; }
};

std::vector<Place> places_of(const std::vector<Sequence>& sequences) {
  std::vector<Place> places;
  for (const Sequence& s : sequences) {
    for (int64_t i = 0; i < s.tokens; ++i) places.push_back({s.begin + i, s.context + i, &s});
  }
  return places;
}

// The mean of the keys of the block that ends at a place, rounded. Shapes: mean [d]
template <class T>
void average(T* mean, const Keys<T>& keys, const Place& last, int64_t block_size, int64_t d) {
  const Sequence& s = *last.sequence;
  const f32v count = splat(static_cast<float>(block_size));
  for_vectors(d, [&](int64_t i, int64_t lanes) {
    f32v sum{};
    for (int64_t p = last.position + 1 - block_size; p <= last.position; ++p) {
      sum += load(keys.at(s.pages[p / s.page], p % s.page) + i, lanes);
    }
    store(mean + i, sum / count, lanes);
  });
}

Tensor index_keys(Tensor qk, Tensor q_weight, Tensor k_weight, Tensor cos_sin, Tensor positions,
                  Tensor block_positions, Tensor key_cache_, Tensor block_cache_,
                  Tensor token_table, Tensor table_row, Tensor query_start_loc, Tensor seq_lens,
                  int64_t block_size, double eps) {
  const int64_t T = qk.size(0), d = q_weight.numel(), Hi = qk.size(1) / d - 1;
  const int64_t rotary = cos_sin.size(1), line = cos_sin.stride(0);
  const Paging paging{key_cache_.size(0), key_cache_.dim() == 3 ? key_cache_.size(1) : 1};
  const std::vector<Sequence> sequences =
      checked_sequences(token_table, table_row, query_start_loc, seq_lens, std::nullopt, T, paging);
  check_positions("position", positions, cos_sin);
  check_positions("block position", block_positions, cos_sin);
  const std::vector<Place> places = places_of(sequences);
  Tensor q = empty_as(qk, {T, Hi, d});
  with_dtypes(qk, q_weight, [&]<class A, class W>(A, W) {
    with_parameter<A>(cos_sin, [&]<class C>(C) {
      const Keys<A> keys(key_cache_), blocks(block_cache_);
      const auto rotated = [&](A* out, const A* x, const Tensor& weight, const Tensor& at,
                               int64_t t) {
        const C* angles = read<C>(cos_sin) + read<int64_t>(at)[t] * line;
        normalise_rotate(out, x, read<W>(weight), angles, d, rotary, static_cast<float>(eps));
      };
      if (static_cast<int64_t>(places.size()) < T) {
        std::memset(static_cast<void*>(write<A>(q)), 0, T * Hi * d * sizeof(A));
      }
      parallel(places.size(), grain_of(qk.size(1)), [&](int64_t i) {
        const Place& place = places[i];
        const A* row = read<A>(qk) + place.token * qk.stride(0);
        for (int64_t h = 0; h < Hi; ++h) {
          rotated(write<A>(q) + (place.token * Hi + h) * d, row + h * d, q_weight, positions,
                  place.token);
        }
        A* key = keys.at(place.page(), place.position % place.sequence->page);
        std::memcpy(static_cast<void*>(key), row + Hi * d, d * sizeof(A));
      });
      parallel(places.size(), grain_of(d), [&](int64_t i) {
        const Place& last = places[i];
        if ((last.position + 1) % block_size) return;
        thread_local std::vector<A> mean;
        mean.resize(d);
        average(mean.data(), keys, last, block_size, d);
        const int64_t in_page = last.position % last.sequence->page / block_size;
        rotated(blocks.at(last.page(), in_page), mean.data(), k_weight, block_positions,
                last.token);
      });
    });
  });
  return q;
}

}  // namespace
}  // namespace Q3N_LEVEL

Q3N_OP_OF_ACTIVATIONS(index_keys)
