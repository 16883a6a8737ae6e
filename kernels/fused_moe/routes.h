// Tokens sorted by the experts that they are routed to.
#pragma once

#include <numeric>
#include <vector>

#include "tensor.h"

namespace Q3N_LEVEL {

struct MoeDims {
  int64_t T, D, E, I, top_k;
};

// Expert e has the elements [first[e], first[e + 1]) of `token` and `entry`. An id of -1 has none.
struct Routes {
  std::vector<int64_t> first, token, entry;  // entry: index into topk_ids [T * top_k]
  std::vector<int64_t> experts;              // experts that have tokens, ascending

  Routes() : first(1) {}

  Routes(const int32_t* ids, const MoeDims& d) : first(d.E + 1) {
    for (int64_t i = 0; i < d.T * d.top_k; ++i) {
      if (ids[i] == -1) continue;
      check(0 <= ids[i] && ids[i] < d.E, "fused_moe: topk_ids[", i / d.top_k, ", ", i % d.top_k,
            "] = ", ids[i], " is not one of ", d.E, " experts");
      ++first[ids[i] + 1];
    }
    for (int64_t e = 0; e < d.E; ++e) {
      if (first[e + 1]) experts.push_back(e);
      first[e + 1] += first[e];
    }
    token.resize(first.back()), entry.resize(first.back());
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t i = 0; i < d.T * d.top_k; ++i) {
      if (ids[i] == -1) continue;
      const int64_t at = next[ids[i]]++;
      token[at] = i / d.top_k, entry[at] = i;
    }
  }

  // All tokens, each an entry; `run` of them at a time have the same expert.
  static Routes of_all(int64_t T, int64_t run) {
    Routes routes;
    for (std::vector<int64_t>* each : {&routes.token, &routes.entry}) {
      each->resize(T);
      std::iota(each->begin(), each->end(), 0);
    }
    for (int64_t begin = 0; begin < T; begin += run) {
      routes.experts.push_back(begin / run);
      routes.first.push_back(std::min(begin + run, T));
    }
    return routes;
  }

  // The mean over experts that have tokens, rounded down.
  int64_t tokens_per_expert() const { return experts.empty() ? 0 : token.size() / experts.size(); }
};

}  // namespace Q3N_LEVEL
