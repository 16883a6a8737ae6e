// The rows of a step, checked before anything is written.
#pragma once

#include <cstring>
#include <limits>
#include <vector>

#include "tensor.h"

namespace Q3N_LEVEL {

// L: S is folded at positions that are multiples of it; GRID in kernels/step.py.
constexpr int64_t kGrid = 8;

constexpr int64_t grid_point(int64_t position) { return position / kGrid * kGrid; }

struct Row {
  int64_t slot, begin, tokens;  // its state page; tokens [begin, begin + tokens) of the batch
  int64_t context;              // c: tokens before them
  int64_t p0;                   // the position of the page's S
  bool is_long;                 // more tokens than a roll-back can undo: all are final

  int64_t end() const { return context + tokens; }
  int64_t certain() const { return is_long ? end() : context; }
};

// The rows that have a page. Throws if an index is out of range, or if a page cannot continue at
// its row's context length. T: tokens in the batch.
inline std::vector<Row> checked_rows(const Tensor& query_start_loc, const Tensor& slot,
                                     const Tensor& context_len, const Tensor& span, int64_t T,
                                     int64_t num_drafts) {
  const int32_t* starts = read<int32_t>(query_start_loc);
  const int32_t* slots = read<int32_t>(slot);
  const int32_t* context = read<int32_t>(context_len);
  const int32_t* spans = read<int32_t>(span);
  const int64_t N = slot.numel(), pages = span.size(0), stride = span.stride(0);
  std::vector<Row> rows;
  rows.reserve(N);
  std::vector<bool> taken(pages);
  for (int64_t i = 0; i < N; ++i) {
    const int64_t begin = starts[i], end = starts[i + 1], c = context[i], page = slots[i];
    check(0 <= begin && begin <= end && end <= T, "row ", i, ": query_start_loc ", begin, " to ",
          end, " is not a range of ", T, " tokens");
    if (page == -1) continue;
    check(0 <= page && page < pages, "row ", i, ": slot ", page, " is not one of ", pages,
          " slots");
    check(!taken[page], "row ", i, ": slot ", page, " is used by an earlier row");
    taken[page] = true;
    const int64_t first = spans[page * stride], last = spans[page * stride + 1], n = end - begin;
    const bool continues = 0 <= first && first <= c && c <= last &&
                           last <= first + num_drafts + 1 &&
                           c + n <= std::numeric_limits<int32_t>::max();
    check(c == 0 || continues, "row ", i, ": slot ", page, " holds start=", first, " end=", last,
          " and cannot continue at context length c=", c);
    rows.push_back({page, begin, n, c, c == 0 ? 0 : grid_point(first), n > num_drafts + 1});
  }
  return rows;
}

// Zeroes the tokens [tokens, width] that no row has.
template <class T>
void zero_uncovered(T* out, const std::vector<Row>& rows, int64_t tokens, int64_t width) {
  int64_t covered = 0;
  const auto zero = [&](int64_t end) {
    std::memset(static_cast<void*>(out + covered * width), 0, (end - covered) * width * sizeof(T));
  };
  for (const Row& row : rows) {
    zero(row.begin);
    covered = row.begin + row.tokens;
  }
  zero(tokens);
}

}  // namespace Q3N_LEVEL
