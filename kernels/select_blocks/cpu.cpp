#include "dot_tile.h"
#include "ops.h"
#include "sequences.h"

namespace Q3N_LEVEL {
namespace {

constexpr int64_t kQueries = 32;      // that share a pass over the keys
constexpr int64_t kRun = 512;         // blocks that one task scores
constexpr int64_t kScores = 1 << 22;  // of all queries that are scored at once, about

// Queries [first, last) of a sequence, all of which choose; `at`: their scores, `blocks` of each.
struct Group {
  const Sequence* sequence;
  int64_t first, last, blocks, at = 0;

  int64_t scores() const { return (last - first) * blocks; }
};

template <class T>
struct Index {
  const T* q;
  int64_t q_stride, heads, d;
  const T* keys;  // of blocks
  int64_t page_stride, key_stride, block_size;

  int64_t complete(const Sequence& s, int64_t query) const {
    return (s.context + query + 1) / block_size;
  }

  // A block's key, in the page of its last position.
  const T* key(const Sequence& s, int64_t block) const {
    const int64_t last = (block + 1) * block_size - 1;
    return keys + s.pages[last / s.page] * page_stride + last % s.page / block_size * key_stride;
  }

  // Scores of blocks [begin, end) for a group's queries.
  void score(const Group& group, int64_t begin, int64_t end, float* scores) const {
    const Sequence& s = *group.sequence;
    for (int64_t b = begin; b < end; b += kTileRows) {
      const T *row[kTileRows], *next[kTileRows];
      for (int64_t r = 0; r < kTileRows; ++r) {
        row[r] = key(s, std::min(b + r, end - 1));
        next[r] = key(s, std::min(b + r + kTileRows, end - 1));
      }
      for (int64_t i = group.first; i < group.last; ++i) {
        const T* query = q + (s.begin + i) * q_stride;
        float totals[kTileRows] = {};
        for_tiles(0, heads, [&](int64_t h, int64_t count) {
          const T* x[kTileTokens];
          for (int64_t n = 0; n < count; ++n) x[n] = query + (h + n) * d;
          float sums[kTileTokens][kTileRows];
          dot_tile(count, row, x, h == 0 && i == group.first ? next : nullptr, d, sums);
          for (int64_t n = 0; n < count; ++n) {
            for (int64_t r = 0; r < kTileRows; ++r) totals[r] += std::max(0.0f, sums[n][r]);
          }
        });
        std::copy_n(totals, std::min<int64_t>(kTileRows, end - b),
                    scores + (i - group.first) * group.blocks + b);
      }
    }
  }
};

// The k highest of n scores, none of which is negative or NaN: their places, rising. Of equal ones
// the lower place comes first.
void choose(int32_t* out, const float* scores, int64_t n, int64_t k) {
  thread_local std::vector<uint64_t> order;  // inverted score, then place
  order.resize(n);
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, scores + i, sizeof bits);
    order[i] = static_cast<uint64_t>(~bits) << 32 | static_cast<uint64_t>(i);
  }
  std::nth_element(order.begin(), order.begin() + k - 1, order.end());
  for (int64_t i = 0; i < k; ++i) out[i] = static_cast<int32_t>(order[i]);
  std::sort(out, out + k);
}

// The queries of each sequence that have more than k complete blocks, in waves of about kScores.
template <class T>
std::vector<std::vector<Group>> waves_of(const Index<T>& in, const std::vector<Sequence>& sequences,
                                         int64_t k) {
  std::vector<std::vector<Group>> waves;
  int64_t scores = kScores;  // of the last wave
  for (const Sequence& s : sequences) {
    if (in.complete(s, s.tokens - 1) <= k) continue;
    const int64_t from = std::max<int64_t>(0, (k + 1) * in.block_size - s.context - 1);
    for (int64_t first = from; first < s.tokens; first += kQueries) {
      const int64_t last = std::min(first + kQueries, s.tokens);
      Group group{&s, first, last, in.complete(s, last - 1)};
      if (scores + group.scores() > kScores) waves.emplace_back(), scores = 0;
      group.at = scores, scores += group.scores();
      waves.back().push_back(group);
    }
  }
  return waves;
}

template <class T>
void select_in(const Index<T>& in, const std::vector<Group>& wave, int64_t k, int32_t* blocks,
               int32_t* tail) {
  struct Task {
    const Group* group;
    int64_t first;  // block, or query
  };
  std::vector<Task> runs, queries;
  for (const Group& group : wave) {
    for (int64_t b = 0; b < group.blocks; b += kRun) runs.push_back({&group, b});
    for (int64_t i = group.first; i < group.last; ++i) queries.push_back({&group, i});
  }
  std::vector<float> scores(wave.back().at + wave.back().scores());
  parallel(runs.size(), 1, [&](int64_t i) {
    const auto [group, first] = runs[i];
    in.score(*group, first, std::min(first + kRun, group->blocks), scores.data() + group->at);
  });
  parallel(queries.size(), 1, [&](int64_t i) {
    const auto [group, query] = queries[i];
    const int64_t t = group->sequence->begin + query, n = in.complete(*group->sequence, query);
    choose(blocks + t * k, scores.data() + group->at + (query - group->first) * group->blocks, n,
           k);
    tail[t] = static_cast<int32_t>(n * in.block_size);
  });
}

std::tuple<Tensor, Tensor> select_blocks(Tensor q, Tensor block_cache, Tensor token_table,
                                         Tensor table_row, Tensor query_start_loc, Tensor seq_lens,
                                         int64_t block_size, int64_t top_k) {
  const int64_t T = q.size(0);
  const bool of_pages = block_cache.dim() == 3;
  const auto at_most = [](int64_t n) { return std::min(n, kMostPositions); };
  const int64_t page = of_pages ? at_most(block_cache.size(1)) * at_most(block_size) : 1;
  const Paging paging{block_cache.size(0), at_most(page)};
  const std::vector<Sequence> sequences =
      checked_sequences(token_table, table_row, query_start_loc, seq_lens, std::nullopt, T, paging);
  Tensor blocks = empty_as(q, {T, top_k}, ScalarType::Int);
  Tensor tail = empty_as(q, {T}, ScalarType::Int);
  std::fill_n(write<int32_t>(blocks), T * top_k, -1);
  std::fill_n(write<int32_t>(tail), T, 0);
  with_activations(q, [&]<class A>(A) {
    const Index<A> in{read<A>(q),
                      q.stride(0),
                      q.size(1),
                      q.size(2),
                      read<A>(block_cache),
                      block_cache.stride(0),
                      of_pages ? block_cache.stride(1) : 0,
                      block_size};
    for (const std::vector<Group>& wave : waves_of(in, sequences, top_k)) {
      select_in(in, wave, top_k, write<int32_t>(blocks), write<int32_t>(tail));
    }
  });
  return {blocks, tail};
}

}  // namespace
}  // namespace Q3N_LEVEL

Q3N_OP_OF_ACTIVATIONS(select_blocks)
