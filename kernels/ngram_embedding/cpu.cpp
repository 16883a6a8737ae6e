#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "arguments.h"
#include "ops.h"
#include "step.h"

namespace Q3N_LEVEL {
namespace {

constexpr int64_t kMostTokens = 16;  // of an n-gram

typedef uint8_t u8v __attribute__((vector_size(kLanes)));
typedef int8_t i8v __attribute__((vector_size(kLanes)));

struct Fp8 {
  uint8_t code;  // e4m3
};

// Stored values in fp32.
template <class V>
f32v values(const V* p, int64_t lanes) {
  return load(p, lanes);
}

f32v values(const int8_t* p, int64_t lanes) {
  i8v bytes{};
  std::memcpy(&bytes, p, lanes);
  return __builtin_convertvector(bytes, f32v);
}

// Moves exponent and mantissa to where fp32 has them, and corrects the exponent's bias. The
// smallest are denormals before that.
f32v values(const Fp8* p, int64_t lanes) {
  u8v bytes{};
  std::memcpy(&bytes, p, lanes);
  const u32v code = __builtin_convertvector(bytes, u32v), rest = code & 127;
  const f32v size = (f32v)(rest << 20) * 0x1p120f;
  const u32v bits = rest == 127 ? (u32v)(0x7fc00000 + i32v{}) : (u32v)size;
  return (f32v)(bits | (code & 128) << 24);
}

struct Table {
  const int64_t* addresses;  // of the shards
  int64_t shard_rows, d;
  const float* scale;  // or null
  bool one_scale, mapped;

  template <class V>
  const V* row(int64_t r) const {
    return reinterpret_cast<const V*>(addresses[r / shard_rows]) + r % shard_rows * d;
  }

  // Asks for a row's bytes, so that they are there, or on their way, when they are read.
  template <class V>
  void ask(int64_t r) const {
    const V* first = row<V>(r);
    prefetch(first, d * sizeof(V));
#if defined(__linux__)
    if (!mapped) return;
    static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t begin = reinterpret_cast<uintptr_t>(first) / page * page;
    const uintptr_t end = reinterpret_cast<uintptr_t>(first + d);
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_WILLNEED);  // only a hint
#endif
  }

  template <class V, class T>
  void copy(T* out, int64_t r) const {
    const V* stored = row<V>(r);
    const f32v factor = splat(!scale ? 1.0f : scale[one_scale ? 0 : r]);
    for_vectors(d, [&](int64_t i, int64_t lanes) {
      store(out + i, values(stored + i, lanes) * factor, lanes);
    });
  }
};

struct Hash {
  const int64_t *multipliers, *sizes, *offsets;
  int64_t n, heads, eos;

  // Throws unless each head's part is in a table of so many rows.
  void check_parts(int64_t rows) const {
    for (int64_t h = 0; h < heads; ++h) {
      check(sizes[h] >= 1 && offsets[h] >= 0 && sizes[h] <= rows - offsets[h], "head ", h,
            ": rows ", offsets[h], " to ", offsets[h] + sizes[h], " are not a part of ", rows,
            " rows");
    }
  }

  // The row of each head, from the n-gram's tokens, the newest first.
  void rows(const int64_t (&last)[kMostTokens], int64_t* out) const {
    const int64_t each = heads / (n - 1);
    uint64_t mixed = static_cast<uint64_t>(last[0]) * static_cast<uint64_t>(multipliers[0]);
    bool ended = false;
    for (int64_t i = 1; i < n; ++i) {
      ended |= last[i] == eos;
      const uint64_t token = static_cast<uint64_t>(ended ? eos : last[i]);
      mixed ^= token * static_cast<uint64_t>(multipliers[i]);
      for (int64_t h = (i - 1) * each; h < i * each; ++h) {
        const int64_t row = static_cast<int64_t>(mixed) % sizes[h];
        out[h] = offsets[h] + (row < 0 ? row + sizes[h] : row);
      }
    }
  }
};

// A row's tokens at absolute positions: those of the step, and those that its page keeps.
template <class I>
struct History {
  const I* ids;  // [T]
  int32_t* pages;
  int64_t ring, page_stride;

  int32_t& kept(const Row& row, int64_t p) const {
    return pages[row.slot * page_stride + p % ring];
  }

  int64_t token(const Row& row, int64_t p, int64_t eos) const {
    if (p < 0) return eos;
    return p < row.context ? kept(row, p) : ids[row.begin + p - row.context];
  }
};

template <class I>
std::vector<int64_t> rows_of_tokens(const Hash& hash, const History<I>& history,
                                    const std::vector<Row>& rows, int64_t T) {
  std::vector<int64_t> found(T * hash.heads, -1);
  for (const Row& row : rows) {
    parallel(row.tokens, 256, [&](int64_t i) {
      int64_t last[kMostTokens];
      for (int64_t j = 0; j < hash.n; ++j) {
        last[j] = history.token(row, row.context + i - j, hash.eos);
      }
      hash.rows(last, found.data() + (row.begin + i) * hash.heads);
    });
  }
  for (const Row& row : rows) {
    for (int64_t i = std::max<int64_t>(0, row.tokens - history.ring); i < row.tokens; ++i) {
      history.kept(row, row.context + i) = static_cast<int32_t>(history.ids[row.begin + i]);
    }
  }
  return found;
}

// Calls f with a value of the type in which the table has its values.
template <class F>
void with_stored(ScalarType stored, F&& f) {
  switch (stored) {
    case ScalarType::Float8_e4m3fn:
      return f(Fp8{});
    case ScalarType::Char:
      return f(int8_t{});
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(bf16{});
    default:
      return f(fp16{});
  }
}

template <class F>
void with_token_ids(const Tensor& ids, F&& f) {
  if (ids.scalar_type() == ScalarType::Int) return f(int32_t{});
  f(int64_t{});
}

Tensor ngram_embedding(Tensor token_ids, Tensor addresses, int64_t rows, int64_t shard_rows,
                       int64_t d, ScalarType stored, std::optional<Tensor> scale, bool mapped,
                       Tensor multipliers, Tensor sizes, Tensor offsets, int64_t eos,
                       Tensor tokens_, Tensor span, Tensor query_start_loc, Tensor slot,
                       Tensor context_len, ScalarType out_dtype) {
  const Arguments arguments{"ngram_embedding"};
  arguments.expect_dims("tokens_", tokens_, 2);
  const int64_t T = token_ids.numel(), ring = tokens_.size(1), slots = tokens_.size(0);
  const Hash hash{read<int64_t>(multipliers), read<int64_t>(sizes), read<int64_t>(offsets),
                  multipliers.numel(),        sizes.numel(),        eos};
  arguments.require(
      hash.n >= 2 && hash.n <= kMostTokens && hash.heads > 0 && hash.heads % (hash.n - 1) == 0,
      hash.heads, " heads for n-grams of 2 to ", hash.n, " tokens");
  arguments.require(ring >= hash.n, "tokens_ holds ", ring, " tokens, fewer than an n-gram of ",
                    hash.n);
  arguments.expect("token_ids", token_ids, {T}, {ScalarType::Int, ScalarType::Long});
  arguments.expect("multipliers", multipliers, {hash.n}, {ScalarType::Long});
  arguments.expect("sizes", sizes, {hash.heads}, {ScalarType::Long});
  arguments.expect("offsets", offsets, {hash.heads}, {ScalarType::Long});
  arguments.expect_pages("tokens_", tokens_, slots, {ring}, {ScalarType::Int});
  arguments.expect_pages("span", span, slots, {2}, {ScalarType::Int});
  arguments.expect_step(query_start_loc, slot, context_len);
  hash.check_parts(rows);
  const auto of_step = checked_rows(query_start_loc, slot, context_len, span, T, ring - hash.n);
  const Table table{
      read<int64_t>(addresses),     shard_rows, d, scale ? read<float>(*scale) : nullptr,
      scale && scale->numel() == 1, mapped};
  Tensor out = empty_as(token_ids, {T, hash.heads * d}, out_dtype);
  std::vector<int64_t> found;
  with_token_ids(token_ids, [&]<class I>(I) {
    const History<I> history{read<I>(token_ids), write<int32_t>(tokens_), ring, tokens_.stride(0)};
    found = rows_of_tokens(hash, history, of_step, T);
  });
  with_stored(stored, [&]<class V>(V) {
    const int64_t n = found.size();
    parallel(n, 1024, [&](int64_t i) {
      if (found[i] >= 0) table.template ask<V>(found[i]);
    });
    with_dtype(out, [&]<class A>(A) {
      parallel_with_denormals(n, 64, [&](int64_t i) {
        A* to = write<A>(out) + i * d;
        if (found[i] >= 0) return table.template copy<V>(to, found[i]);
        std::memset(static_cast<void*>(to), 0, d * sizeof(A));
      });
    });
  });
  return out;
}

}  // namespace
}  // namespace Q3N_LEVEL

Q3N_OP(ngram_embedding)
