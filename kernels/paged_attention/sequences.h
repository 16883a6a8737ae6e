// The sequences of a batch, checked before any key or value is read.
#pragma once

#include <optional>
#include <vector>

#include "tensor.h"

namespace Q3N_LEVEL {

// A row of the step: tokens [begin, begin + tokens) of the batch, after `context` earlier ones. A
// query sees the context, and then the row's tokens that its line of the mask selects (without a
// mask: those up to itself). What it sees is counted as positions [0, seen(query)).
struct Sequence {
  int64_t begin, tokens, context;
  const int32_t* pages;  // of positions [0, context + tokens); a page has `page` positions
  int64_t page;
  const uint8_t* mask;  // [tokens, tokens], or null

  int64_t seen(int64_t query) const {
    if (!mask) return context + query + 1;
    const uint8_t* line = mask + query * tokens;
    return context + std::count_if(line, line + tokens, [](uint8_t sees) { return sees != 0; });
  }

  // Whether all queries that see a position below `end` see the same token there.
  bool shared(int64_t end) const { return !mask || end <= context; }

  // Calls f(page, index in it) for a query's positions [begin, end), in order.
  template <class F>
  void for_positions(int64_t query, int64_t begin, int64_t end, F&& f) const {
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
    check(!mask || masked + n * n <= entries, "row ", i, ": its ", n, " x ", n,
          " entries end beyond the ", entries, " of tree_mask");
    sequences.push_back({begin, n, S - n, pages, paging.page, mask ? mask + masked : nullptr});
    if (mask) masked += n * n;
  }
  check(masked == entries, "tree_mask has ", entries, " entries, the rows ", masked);
  return sequences;
}

}  // namespace Q3N_LEVEL
