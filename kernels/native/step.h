// What one engine step asks of each page, checked before anything is written.
#pragma once

#include <vector>

#include "tensor.h"

namespace Q3N_LEVEL {

struct Row {
  int64_t slot, begin, tokens;  // its page, its tokens [begin, begin + tokens)
  int64_t context, committed;   // tokens before them, and how many of those the window holds
  bool fresh() const { return context == 0; }
};

// The rows that have a page. Raises on an index out of range, and on a context length that
// the page cannot stand at. T: tokens in the batch, W: length of the window.
inline std::vector<Row> checked_rows(const Tensor& query_start_loc, const Tensor& slot,
                                     const Tensor& context_len, const Tensor& span, int64_t T,
                                     int64_t W) {
  const int32_t* start = read<int32_t>(query_start_loc);
  const int32_t* slots = read<int32_t>(slot);
  const int32_t* context = read<int32_t>(context_len);
  const int32_t* spans = read<int32_t>(span);
  const int64_t N = slot.numel(), pages = span.size(0), stride = span.stride(0);
  std::vector<Row> rows;
  rows.reserve(N);
  std::vector<bool> taken(pages);
  for (int64_t i = 0; i < N; ++i) {
    const int64_t begin = start[i], end = start[i + 1], c = context[i], page = slots[i];
    check(0 <= begin && begin <= end && end <= T, "row ", i, ": query_start_loc ", begin, " to ",
          end, " is not a range of ", T, " tokens");
    if (page == -1) continue;
    check(0 <= page && page < pages, "row ", i, ": slot ", page, " is not one of ", pages,
          " slots");
    check(!taken[page], "row ", i, ": slot ", page, " is used by an earlier row");
    taken[page] = true;
    const int64_t p0 = spans[page * stride], w = spans[page * stride + 1];
    const bool stands = c == 0 || (c > 0 && 0 <= w && w <= W && p0 <= c && c <= p0 + w);
    check(stands, "row ", i, ": slot ", page, " holds p0=", p0, " w=", w,
          " and cannot continue at context length c=", c);
    rows.push_back({page, begin, end - begin, c, c == 0 ? 0 : c - p0});
  }
  return rows;
}

}  // namespace Q3N_LEVEL
