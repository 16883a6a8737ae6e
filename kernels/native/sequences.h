// The sequences of a batch, checked before any key or value is read.
#pragma once

#include <optional>
#include <vector>

#include "tensor.h"

namespace Q3N_LEVEL {

// Positions that a selection can name: its `tail` is an int32. A block or a page with more is as
// good as one with so many, and products of two such sizes do not overflow.
constexpr int64_t kMostPositions = int64_t{1} << 31;

// What each query of a row sees of sparse attention: `count` blocks, then all from `tail` on.
struct Selected {
  const int32_t* blocks = nullptr;  // `stride` apart; null: a query sees everything
  int64_t stride = 0, size = 1;     // positions of a block
  const int32_t *tail = nullptr, *count = nullptr;

  // Positions of blocks.
  int64_t in_blocks(int64_t query) const { return count[query] * size; }

  // The i-th position that a query sees.
  int64_t position(int64_t query, int64_t i) const {
    const int64_t before = in_blocks(query);
    if (i >= before) return tail[query] + i - before;
    return blocks[query * stride + i / size] * size + i % size;
  }
};

// A row of the step: tokens [begin, begin + tokens) of the batch, after `context` earlier ones. A
// query sees the context, and then the row's tokens that its line of the mask selects (without a
// mask: those up to itself); or what is selected. What it sees is counted as [0, seen(query)).
struct Sequence {
  int64_t begin, tokens, context;
  const int32_t* pages;  // of positions [0, context + tokens); a page has `page` positions
  int64_t page;
  const uint8_t* mask;  // [tokens, tokens], or null
  Selected selected{};

  int64_t seen(int64_t query) const {
    if (selected.blocks) {
      return selected.in_blocks(query) + context + query + 1 - selected.tail[query];
    }
    if (!mask) return context + query + 1;
    const uint8_t* line = mask + query * tokens;
    return context + std::count_if(line, line + tokens, [](uint8_t sees) { return sees != 0; });
  }

  // Whether all queries that see a position below `end` see the same token there.
  bool shared(int64_t end) const { return !selected.blocks && (!mask || end <= context); }

  // Calls f(page, index in it) for a query's positions [begin, end), in order.
  template <class F>
  void for_positions(int64_t query, int64_t begin, int64_t end, F&& f) const {
    if (selected.blocks) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t position = selected.position(query, i);
        f(pages[position / page], position % page);
      }
      return;
    }
    const int64_t plain = mask ? std::min(end, context) : end;
    int64_t p = begin / page, within = begin % page;
    for (int64_t i = begin; i < plain; ++i) {
      f(pages[p], within);
      if (++within == page) ++p, within = 0;
    }
    if (plain == end) return;
    int64_t at = context;
    for (int64_t j = 0; j < tokens && at < end; ++j) {
      if (mask[query * tokens + j] && at++ >= begin) {
        f(pages[(context + j) / page], (context + j) % page);
      }
    }
  }
};

inline std::vector<int64_t> integers(const Tensor& t) {
  const int64_t n = t.numel();
  if (t.scalar_type() == ScalarType::Int) return {read<int32_t>(t), read<int32_t>(t) + n};
  return {read<int64_t>(t), read<int64_t>(t) + n};
}

// The KV cache: pages, and positions in each.
struct Paging {
  int64_t pages, page;

  int64_t of(int64_t positions) const { return (positions + page - 1) / page; }

  // Throws unless the pages of row i's S positions exist.
  void check_row(int64_t i, const int32_t* table, int64_t S) const {
    uint32_t most = 0;  // as unsigned, a negative page is large
    for (int64_t p = 0; p < of(S); ++p) most = std::max(most, static_cast<uint32_t>(table[p]));
    if (most < pages) return;
    for (int64_t p = 0; p < of(S); ++p) {
      check(0 <= table[p] && table[p] < pages, "row ", i, ": position ", p * page, " is in page ",
            table[p], ", not one of ", pages, " pages");
    }
  }
};

// The sequences that have tokens. Throws if an index is out of range. T: tokens in the batch.
inline std::vector<Sequence> checked_sequences(const Tensor& token_table, const Tensor& table_row,
                                               const Tensor& query_start_loc,
                                               const Tensor& seq_lens,
                                               const std::optional<Tensor>& tree_mask, int64_t T,
                                               const Paging& paging) {
  const int64_t R = token_table.size(0), M = token_table.size(1) * paging.page;
  const int32_t *table = read<int32_t>(token_table), *starts = read<int32_t>(query_start_loc);
  const uint8_t* mask =
      tree_mask ? static_cast<const uint8_t*>(tree_mask->const_data_ptr()) : nullptr;
  const int64_t entries = tree_mask ? tree_mask->numel() : 0;
  const std::vector<int64_t> rows = integers(table_row), lengths = integers(seq_lens);
  std::vector<Sequence> sequences;
  int64_t masked = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const int64_t begin = starts[i], end = starts[i + 1], n = end - begin, S = lengths[i];
    check(0 <= begin && begin <= end && end <= T, "row ", i, ": query_start_loc ", begin, " to ",
          end, " is not a range of ", T, " tokens");
    if (n == 0) continue;
    check(0 <= rows[i] && rows[i] < R, "row ", i, ": table_row ", rows[i], " is not one of ", R,
          " rows");
    check(n <= S && S <= M, "row ", i, ": seq_lens ", S, " is not between its ", n, " tokens and ",
          M, " positions");
    const int32_t* pages = table + rows[i] * token_table.stride(0);
    paging.check_row(i, pages, S);
    check(!tree_mask || masked + n * n <= entries, "row ", i, ": its ", n, " x ", n,
          " entries end beyond the ", entries, " of tree_mask");
    sequences.push_back({begin, n, S - n, pages, paging.page, mask ? mask + masked : nullptr});
    if (tree_mask) masked += n * n;
  }
  check(masked == entries, "tree_mask has ", entries, " entries, the rows ", masked);
  return sequences;
}

// Gives each sequence its part of a selection [T, blocks] of blocks of `block_size` positions,
// unless its queries see everything. `count` [T] is filled. Throws unless a query has what is
// selected.
inline void take_selection(std::vector<Sequence>& sequences, const Tensor& blocks,
                           const Tensor& tail, int64_t block_size, std::vector<int32_t>& count) {
  const int64_t size = std::min(block_size, kMostPositions);
  const int64_t most = blocks.size(1), stride = blocks.stride(0);
  const int32_t *all = read<int32_t>(blocks), *tails = read<int32_t>(tail);
  count.assign(blocks.size(0), 0);
  for (Sequence& s : sequences) {
    bool everything = true;
    for (int64_t t = s.begin; t < s.begin + s.tokens; ++t) {
      const int32_t* listed = all + t * stride;
      int64_t n = 0, after = 0;
      for (; n < most && listed[n] * size >= after && listed[n] >= 0; ++n) {
        after = (listed[n] + int64_t{1}) * size;
      }
      const int64_t position = s.context + t - s.begin;
      check((n == most || listed[n] < 0) && after <= tails[t] && tails[t] <= position + 1, "token ",
            t, ": at position ", position, " it cannot see ", n, " blocks before position ", after,
            " and all from ", tails[t], " on");
      count[t] = n;
      everything &= tails[t] == 0;
    }
    if (everything) continue;
    s.selected = {all + s.begin * stride, stride, size, tails + s.begin, count.data() + s.begin};
  }
}

}  // namespace Q3N_LEVEL
