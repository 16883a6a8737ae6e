#include <atomic>
#include <vector>

#include "ops.h"
#include "tiles.h"

namespace Q3N_LEVEL {
namespace {

constexpr int64_t kFewPartials = 64;    // queries x heads that justify a pass over the keys
constexpr int64_t kTasksPerThread = 8;  // about, if the work can be split into as many
// Floats of scratch memory of each thread, for blocks that wait to be merged. Whatever the context,
// a call takes less than SCRATCH of __init__.py for each thread.
constexpr int64_t kKept = 1 << 19;

struct Job : Tile {
  int64_t seen;        // positions, by the query that sees most
  bool split = false;  // into tasks of some blocks
  int64_t kept = 0;    // offset of its partials among those of a block, if it is split

  int64_t blocks() const { return (seen + kBlock - 1) / kBlock; }
  int64_t block_work() const { return queries() * heads; }
};

struct Task {
  const Job* job;
  int64_t begin, end;  // blocks

  int64_t work() const { return (end - begin) * job->block_work(); }
};

// Partials of a job: fewer than a tile takes if threads would be idle.
template <class T>
int64_t partials_of_job(const Operands<T>& in, const std::vector<Sequence>& sequences) {
  int64_t partials = 0;
  for (const Sequence& s : sequences) partials += s.tokens * in.Hq;
  const int64_t tasks = torch::stable::get_num_threads() * kTasksPerThread;
  return std::clamp(partials / tasks, kFewPartials, BlockAttention<T>::kMostPartials);
}

template <class T>
std::vector<Job> jobs_of(const Operands<T>& in, const std::vector<Sequence>& sequences) {
  const int64_t partials = partials_of_job(in, sequences);
  std::vector<Job> jobs;
  for (const Sequence& s : sequences) {
    const bool alone = s.selected.blocks;  // each query, since each sees other positions
    const int64_t together = BlockAttention<T>::together(in, alone ? 1 : s.tokens);
    const int64_t height = alone ? 1 : std::max<int64_t>(1, partials / (together * in.group()));
    for (int64_t first = 0; first < s.tokens; first += height) {
      const int64_t last = std::min(first + height, s.tokens);
      int64_t seen = 0;
      for (int64_t i = first; i < last; ++i) seen = std::max(seen, s.seen(i));
      for (int64_t kv = 0; kv < in.Hkv; kv += together) {
        jobs.push_back({{&s, kv, std::min(together, in.Hkv - kv), first, last}, seen});
      }
    }
  }
  return jobs;
}

// How split jobs are computed: a window of blocks, and then the next, so that few blocks wait to be
// merged.
struct Cut {
  int64_t part = 0;    // work of a task, about
  int64_t window = 0;  // blocks
  int64_t most = 0;    // blocks of the longest split job
  int64_t block = 0;   // floats of one block of all split jobs
};

// Splits jobs that would leave threads idle.
template <class T>
Cut cut(const Operands<T>& in, std::vector<Job>& jobs) {
  const int64_t threads = torch::stable::get_num_threads(), tasks = threads * kTasksPerThread;
  int64_t work = 0, split = 0;  // of all jobs; of a block of the split ones
  for (const Job& job : jobs) work += job.blocks() * job.block_work();
  Cut found{1 + work / tasks};
  for (Job& job : jobs) {
    job.split = threads > 1 && job.blocks() * job.block_work() > 2 * found.part;
    if (!job.split) continue;
    job.kept = found.block;
    found.block += job.block_work() * in.group() * in.partial_size();
    found.most = std::max(found.most, job.blocks());
    split += job.block_work();
  }
  if (split) {
    found.window = std::clamp<int64_t>(threads * kKept / found.block - 1, 1, found.most);
    found.part = std::min(found.part, 1 + found.window * split / tasks);
  }
  return found;
}

// The tasks of split jobs in the window that begins with block `first`, and, in the first window,
// of all others; the largest first.
std::vector<Task> tasks_of(const std::vector<Job>& jobs, const Cut& cut, int64_t first) {
  std::vector<Task> tasks;
  for (const Job& job : jobs) {
    if (!job.split && !first) tasks.push_back({&job, 0, job.blocks()});
    if (!job.split) continue;
    const int64_t end = std::min(first + cut.window, job.blocks());
    const int64_t step = std::max<int64_t>(1, cut.part / job.block_work());
    for (int64_t b = first; b < end; b += step) tasks.push_back({&job, b, std::min(b + step, end)});
  }
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.work() > b.work(); });
  return tasks;
}

// Calls f(i, scratch) for i in [0, n). A thread that is free takes the next i.
template <class F, class MakeScratch>
void parallel_dynamic(int64_t n, MakeScratch&& make_scratch, F&& f) {
  std::atomic<int64_t> next{0};
  parallel(std::min<int64_t>(n, torch::stable::get_num_threads()), 1, [&](int64_t) {
    auto scratch = make_scratch();
    for (int64_t i = next++; i < n; i = next++) f(i, scratch);
  });
}

// Scratch memory of one thread, for jobs of at most so many partials.
template <class T>
struct Scratch {
  BlockKV<T> kv[2];
  BlockAttention<T> attention;
  std::unique_ptr<float[]> block, state;  // partials: of one block, and merged so far

  Scratch(const Operands<T>& in, int64_t partials)
      : attention(in, partials),
        block(new float[partials * in.partial_size()]),
        state(new float[partials * in.partial_size()]) {}
};

template <class T>
struct Attention {
  const Operands<T>& in;
  T* out;
  const Cut& cut;
  float* kept;        // partials of split jobs: merged so far, then of each block of the window
  int64_t first = 0;  // block of the window

  int64_t partials(const Job& job) const { return job.block_work() * in.group(); }
  int64_t query_of(const Job& job, int64_t partial) const {
    return job.first + partial / in.group() % job.queries();
  }

  float* merged(const Job& job) const { return kept + job.kept; }
  float* waiting(const Job& job, int64_t block) const {
    return merged(job) + (1 + block - first) * cut.block;
  }

  // Computes the partials of one block of a task into `to`. The task's previous block, if any, has
  // found this block's positions and prefetched the keys.
  void block(const Task& task, int64_t b, Scratch<T>& scratch, float* to) const {
    const Job& job = *task.job;
    const int64_t start = b * kBlock;
    if (job.queries() > 1 && !job.sequence->shared(start + kBlock)) {
      return block_by_query(job, start, scratch, to);
    }
    BlockKV<T>&now = scratch.kv[b % 2], &next = scratch.kv[(b + 1) % 2];
    const bool cold = b == task.begin, more = b + 1 < task.end;
    if (cold) now.find(in, job, job.last - 1, start);
    if (more) next.find(in, job, job.last - 1, start + kBlock);
    scratch.attention.run(job, 0, start, now, cold, more ? &next : nullptr, to);
  }

  // The same where each query sees positions of its own.
  void block_by_query(const Job& job, int64_t start, Scratch<T>& scratch, float* to) const {
    for (int64_t partial = 0; partial < partials(job); partial += in.group()) {
      const int64_t query = query_of(job, partial),
                    kv = job.kv + partial / in.group() / job.queries();
      const Tile one{job.sequence, kv, 1, query, query + 1};
      scratch.kv[0].find(in, one, query, start);
      scratch.attention.run(one, partial, start, scratch.kv[0], false, nullptr,
                            to + partial * in.partial_size());
    }
  }

  // Merges a block's partials into those of the blocks before it.
  void merge_block(const Job& job, int64_t b, float* state, float* block) const {
    for (int64_t i = 0; i < partials(job); ++i) {
      if (job.sequence->seen(query_of(job, i)) <= b * kBlock) continue;
      merge(partial_at(in, state, i), partial_at(in, block, i));
    }
  }

  void clear_partials(const Job& job, float* state) const {
    for (int64_t i = 0; i < partials(job); ++i) clear(partial_at(in, state, i));
  }

  void write(const Job& job, float* state) const {
    for (int64_t i = 0; i < partials(job); ++i) {
      const int64_t token = job.sequence->begin + query_of(job, i);
      const int64_t kv = job.kv + i / in.group() / job.queries();
      const int64_t head = kv * in.group() + i % in.group();
      BlockAttention<T>::write(out + (token * in.Hq + head) * in.D, partial_at(in, state, i), in.D);
    }
  }

  void run(const Task& task, Scratch<T>& scratch) const {
    const Job& job = *task.job;
    scratch.attention.take(job);
    if (job.split) {
      for (int64_t b = task.begin; b < task.end; ++b) block(task, b, scratch, waiting(job, b));
      return;
    }
    clear_partials(job, scratch.state.get());
    for (int64_t b = task.begin; b < task.end; ++b) {
      block(task, b, scratch, scratch.block.get());
      merge_block(job, b, scratch.state.get(), scratch.block.get());
    }
    write(job, scratch.state.get());
  }

  // Merges a split job's blocks of the window, when all of them are done.
  void merge_window(const Job& job) const {
    const int64_t end = std::min(first + cut.window, job.blocks());
    if (!first) clear_partials(job, merged(job));
    for (int64_t b = first; b < end; ++b) merge_block(job, b, merged(job), waiting(job, b));
    if (first < end && end == job.blocks()) write(job, merged(job));
  }
};

// Writes zeros for tokens of no sequence: those before the first and after the last.
template <class T>
void clear_others(T* out, const std::vector<Sequence>& sequences, int64_t tokens, int64_t width) {
  const int64_t first = sequences.empty() ? tokens : sequences.front().begin;
  const int64_t last =
      sequences.empty() ? tokens : sequences.back().begin + sequences.back().tokens;
  std::fill(out, out + first * width, T(0.0f));
  std::fill(out + last * width, out + tokens * width, T(0.0f));
}

// A cache [pages, Hkv, D], with one position in a page, or [pages, positions of a page, Hkv, D].
template <class T>
Cache<T> cache_of(const Tensor& t) {
  const int64_t n = t.dim();
  return {read<T>(t), t.stride(0), t.stride(n - 3), t.stride(n - 2)};
}

Tensor paged_attention(Tensor q, Tensor key_cache, Tensor value_cache, Tensor token_table,
                       Tensor table_row, Tensor query_start_loc, Tensor seq_lens, double scale,
                       std::optional<Tensor> tree_mask, std::optional<Tensor> blocks,
                       std::optional<Tensor> tail, int64_t block_size) {
  const int64_t T = q.size(0), Hq = q.size(1), D = q.size(2), n = key_cache.dim();
  const Paging paging{key_cache.size(0), n == 4 ? key_cache.size(1) : 1};
  std::vector<Sequence> sequences =
      checked_sequences(token_table, table_row, query_start_loc, seq_lens, tree_mask, T, paging);
  std::vector<int32_t> count;  // of each query's blocks
  if (blocks) take_selection(sequences, *blocks, *tail, block_size, count);
  Tensor out = empty_as(q, {T, Hq, D});
  with_activations(q, [&]<class A>(A) {
    const Operands<A> in{read<A>(q),
                         q.stride(0),
                         cache_of<A>(key_cache),
                         cache_of<A>(value_cache),
                         Hq,
                         key_cache.size(n - 2),
                         D,
                         static_cast<float>(scale)};
    clear_others(write<A>(out), sequences, T, Hq * D);
    std::vector<Job> jobs = jobs_of(in, sequences);
    const Cut split = cut(in, jobs);
    const std::unique_ptr<float[]> kept(new float[(1 + split.window) * split.block]);
    Attention<A> attention{in, write<A>(out), split, kept.get()};
    int64_t height = 0;  // partials of the largest job
    for (const Job& job : jobs) height = std::max(height, attention.partials(job));
    const auto scratch = [&] { return Scratch<A>(in, height); };
    do {
      const std::vector<Task> tasks = tasks_of(jobs, split, attention.first);
      parallel_dynamic(tasks.size(), scratch,
                       [&](int64_t i, Scratch<A>& r) { attention.run(tasks[i], r); });
      const auto none = [] { return 0; };
      parallel_dynamic(split.window ? jobs.size() : 0, none, [&](int64_t i, int) {
        if (jobs[i].split) attention.merge_window(jobs[i]);
      });
      attention.first += split.window;
    } while (attention.first < split.most);
  });
  return out;
}

}  // namespace
}  // namespace Q3N_LEVEL

Q3N_OP_OF_ACTIVATIONS(paged_attention)
