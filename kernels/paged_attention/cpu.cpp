#include <atomic>
#include <vector>

#include "block.h"
#include "ops.h"

namespace Q3N_LEVEL {
namespace {

constexpr int64_t kTileQueryRows = 64;  // queries times heads that share a pass over the keys
constexpr int64_t kTasksPerThread = 8;  // at least, where the work can be cut so far

// Queries [first, last) of a sequence and the query heads of one kv head.
struct Tile {
  const Sequence* sequence;
  int64_t kv, first, last;
  int64_t seen;       // by that of its queries that sees most
  int64_t split = 0;  // blocks of a task; 0: one task takes all of them
  int64_t kept = 0;   // where its blocks' rows are kept, if it is split

  int64_t queries() const { return last - first; }
  int64_t blocks() const { return (seen + kBlock - 1) / kBlock; }
  int64_t work() const { return blocks() * queries(); }
};

struct Task {
  const Tile* tile;
  int64_t begin, end;  // blocks
};

std::vector<Tile> tiles_of(const std::vector<Sequence>& sequences, int64_t Hkv, int64_t share) {
  const int64_t height = std::max<int64_t>(1, kTileQueryRows / share);
  std::vector<Tile> tiles;
  for (const Sequence& s : sequences) {
    for (int64_t first = 0; first < s.tokens; first += height) {
      const int64_t last = std::min(first + height, s.tokens);
      int64_t seen = 0;
      for (int64_t i = first; i < last; ++i) seen = std::max(seen, s.seen(i));
      for (int64_t kv = 0; kv < Hkv; ++kv) tiles.push_back({&s, kv, first, last, seen});
    }
  }
  return tiles;
}

// Cuts the tiles into tasks, none larger than it need be to keep all threads busy; the largest
// first. Returns how many floats the rows of the split tiles take.
template <class T>
int64_t cut(const Operands<T>& in, std::vector<Tile>& tiles, std::vector<Task>& tasks) {
  int64_t work = 0, kept = 0;
  for (const Tile& tile : tiles) work += tile.work();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t most = 1 + work / (threads * kTasksPerThread);
  for (Tile& tile : tiles) {
    if (threads > 1 && tile.work() > most) {
      tile.split = std::max<int64_t>(1, most / tile.queries());
      tile.kept = kept;
      kept += tile.blocks() * tile.queries() * in.share() * in.row_size();
    }
    const int64_t step = tile.split ? tile.split : std::max<int64_t>(1, tile.blocks());
    for (int64_t b = 0; b < std::max<int64_t>(1, tile.blocks()); b += step) {
      tasks.push_back({&tile, b, std::min(b + step, tile.blocks())});
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) {
    return (a.end - a.begin) * a.tile->queries() > (b.end - b.begin) * b.tile->queries();
  });
  return kept;
}

// Calls f(i, room) for i in [0, n), in that order, each thread the next one when it is free.
template <class F, class MakeRoom>
void in_turn(int64_t n, MakeRoom&& make_room, F&& f) {
  std::atomic<int64_t> next{0};
  parallel(std::min<int64_t>(n, torch::stable::get_num_threads()), 1, [&](int64_t) {
    auto room = make_room();
    for (int64_t i = next++; i < n; i = next++) f(i, room);
  });
}

template <class T>
struct Attention {
  const Operands<T>& in;
  T* out;
  float* kept;  // rows of the blocks of split tiles

  int64_t rows(const Tile& t) const { return t.queries() * in.share(); }

  float* kept_rows(const Tile& t, int64_t block) const {
    return kept + t.kept + block * rows(t) * in.row_size();
  }

  // A task's block's rows, into `to`. Of blocks that are shared, the one before has found the
  // places.
  void block(const Task& task, int64_t b, Room<T>& room, float* to) const {
    const Tile& t = *task.tile;
    const Sequence& s = *t.sequence;
    const int64_t start = b * kBlock;
    if (!s.shared(start + kBlock)) {
      for (int64_t i = t.first; i < t.last; ++i) {
        room.places[0].find(in, s, i, start, t.kv);
        attend<T>(in, s, i, i + 1, t.kv, start, room.places[0], nullptr, room,
                  to + (i - t.first) * in.share() * in.row_size());
      }
      return;
    }
    Places<T>&now = room.places[b % 2], &ahead = room.places[(b + 1) % 2];
    if (b == task.begin) now.find(in, s, t.last - 1, start, t.kv);
    const bool more = b + 1 < task.end;
    if (more) ahead.find(in, s, t.last - 1, start + kBlock, t.kv);
    attend<T>(in, s, t.first, t.last, t.kv, start, now, more ? &ahead : nullptr, room, to);
  }

  // Merges a block's rows into those of the blocks before it.
  void merge_block(const Tile& t, int64_t b, float* state, float* block) const {
    for (int64_t i = 0; i < rows(t); ++i) {
      if (t.sequence->seen(t.first + i / in.share()) <= b * kBlock) continue;
      merge(row_of(in, state, i), row_of(in, block, i));
    }
  }

  void write(const Tile& t, float* state) const {
    for (int64_t i = 0; i < rows(t); ++i) {
      const int64_t token = t.sequence->begin + t.first + i / in.share();
      const int64_t head = t.kv * in.share() + i % in.share();
      write_out(out + (token * in.Hq + head) * in.D, row_of(in, state, i), in.D);
    }
  }

  void clear_rows(const Tile& t, float* state) const {
    for (int64_t i = 0; i < rows(t); ++i) clear(row_of(in, state, i));
  }

  void run(const Task& task, Room<T>& room) const {
    const Tile& t = *task.tile;
    if (t.split) {
      for (int64_t b = task.begin; b < task.end; ++b) block(task, b, room, kept_rows(t, b));
      return;
    }
    clear_rows(t, room.state.get());
    for (int64_t b = task.begin; b < task.end; ++b) {
      block(task, b, room, room.block.get());
      merge_block(t, b, room.state.get(), room.block.get());
    }
    write(t, room.state.get());
  }

  // What is left of a split tile when all of its blocks are there.
  void finish(const Tile& t, float* state) const {
    clear_rows(t, state);
    for (int64_t b = 0; b < t.blocks(); ++b) merge_block(t, b, state, kept_rows(t, b));
    write(t, state);
  }
};

// Zeros where no sequence has tokens: before the first and after the last.
template <class T>
void clear_others(T* out, const std::vector<Sequence>& sequences, int64_t tokens, int64_t width) {
  const int64_t first = sequences.empty() ? tokens : sequences.front().begin;
  const int64_t last =
      sequences.empty() ? tokens : sequences.back().begin + sequences.back().tokens;
  std::fill(out, out + first * width, T(0.0f));
  std::fill(out + last * width, out + tokens * width, T(0.0f));
}

}  // namespace

Tensor paged_attention(Tensor q, Tensor key_cache, Tensor value_cache, Tensor token_table,
                       Tensor table_row, Tensor query_start_loc, Tensor seq_lens, double scale,
                       std::optional<Tensor> tree_mask) {
  const int64_t T = q.size(0), Hq = q.size(1), D = q.size(2), Hkv = key_cache.size(1);
  const std::vector<Sequence> sequences = checked_sequences(
      token_table, table_row, query_start_loc, seq_lens, tree_mask, T, key_cache.size(0));
  Tensor out = torch::stable::new_empty(q, {T, Hq, D});
  with_dtype(q, [&]<class A>(A) {
    const Operands<A> in{read<A>(q),
                         read<A>(key_cache),
                         read<A>(value_cache),
                         q.stride(0),
                         key_cache.stride(0),
                         value_cache.stride(0),
                         Hq,
                         Hkv,
                         D,
                         static_cast<float>(scale)};
    clear_others(write<A>(out), sequences, T, Hq * D);
    std::vector<Tile> tiles = tiles_of(sequences, Hkv, in.share());
    std::vector<Task> tasks;
    const std::unique_ptr<float[]> kept(new float[cut(in, tiles, tasks)]);
    const Attention<A> attention{in, write<A>(out), kept.get()};
    int64_t height = 0;  // rows of the largest tile
    for (const Tile& tile : tiles) height = std::max(height, attention.rows(tile));
    const auto room = [&] { return Room<A>(in, height); };
    in_turn(tasks.size(), room, [&](int64_t i, Room<A>& r) { attention.run(tasks[i], r); });
    std::erase_if(tiles, [](const Tile& tile) { return !tile.split; });
    in_turn(tiles.size(), room,
            [&](int64_t i, Room<A>& r) { attention.finish(tiles[i], r.state.get()); });
  });
  return out;
}

}  // namespace Q3N_LEVEL
