#include <atomic>
#include <vector>

#include "ops.h"
#include "tiles.h"

namespace Q3N_LEVEL {
namespace {

constexpr int64_t kFewPartials = 64;    // queries x heads that justify a pass over the keys
constexpr int64_t kTasksPerThread = 8;  // about, if the work can be split into as many

struct Job : Tile {
  int64_t seen;       // positions, by the query that sees most
  int64_t split = 0;  // blocks of a task; 0: one task takes them all
  int64_t kept = 0;   // offset of its blocks' partials in scratch memory, if it is split

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
    const int64_t together = BlockAttention<T>::together(in, s.tokens);
    const int64_t height = std::max<int64_t>(1, partials / (together * in.group()));
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

// Splits jobs that would leave threads idle into tasks, and sorts all tasks by size, largest first.
// Returns how many floats the partials of the split jobs take.
template <class T>
int64_t cut(const Operands<T>& in, std::vector<Job>& jobs, std::vector<Task>& tasks) {
  int64_t work = 0, kept = 0;
  for (const Job& job : jobs) work += job.blocks() * job.block_work();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t part = 1 + work / (threads * kTasksPerThread);
  for (Job& job : jobs) {
    const int64_t blocks = job.blocks();
    if (threads > 1 && blocks * job.block_work() > 2 * part) {
      job.split = std::max<int64_t>(1, part / job.block_work());
      job.kept = kept;
      kept += blocks * job.block_work() * in.group() * in.partial_size();
    }
    int64_t b = 0;
    do {  // also if no position is seen: the result is zero
      const int64_t end = job.split ? std::min(b + job.split, blocks) : blocks;
      tasks.push_back({&job, b, end});
      b = end;
    } while (b < blocks);
  }
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.work() > b.work(); });
  return kept;
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
  float* kept;  // partials of the blocks of split jobs

  int64_t partials(const Job& job) const { return job.block_work() * in.group(); }
  int64_t query_of(const Job& job, int64_t partial) const {
    return job.first + partial / in.group() % job.queries();
  }

  float* kept_partials(const Job& job, int64_t block) const {
    return kept + job.kept + block * partials(job) * in.partial_size();
  }

  // Computes the partials of one block of a task into `to`. The task's previous block, if any, has
  // found this block's positions and prefetched the keys.
  void block(const Task& task, int64_t b, Scratch<T>& scratch, float* to) const {
    const Job& job = *task.job;
    const int64_t start = b * kBlock;
    if (!job.sequence->shared(start + kBlock)) return block_by_query(job, start, scratch, to);
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
      for (int64_t b = task.begin; b < task.end; ++b)
        block(task, b, scratch, kept_partials(job, b));
      return;
    }
    clear_partials(job, scratch.state.get());
    for (int64_t b = task.begin; b < task.end; ++b) {
      block(task, b, scratch, scratch.block.get());
      merge_block(job, b, scratch.state.get(), scratch.block.get());
    }
    write(job, scratch.state.get());
  }

  // Merges a split job's blocks, when all of them are done.
  void finish(const Job& job, float* state) const {
    clear_partials(job, state);
    for (int64_t b = 0; b < job.blocks(); ++b) merge_block(job, b, state, kept_partials(job, b));
    write(job, state);
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
                       std::optional<Tensor> tree_mask) {
  const int64_t T = q.size(0), Hq = q.size(1), D = q.size(2), n = key_cache.dim();
  const Paging paging{key_cache.size(0), n == 4 ? key_cache.size(1) : 1};
  const std::vector<Sequence> sequences =
      checked_sequences(token_table, table_row, query_start_loc, seq_lens, tree_mask, T, paging);
  Tensor out = torch::stable::new_empty(q, {T, Hq, D});
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
    std::vector<Task> tasks;
    const std::unique_ptr<float[]> kept(new float[cut(in, jobs, tasks)]);
    const Attention<A> attention{in, write<A>(out), kept.get()};
    int64_t height = 0;  // partials of the largest job
    for (const Job& job : jobs) height = std::max(height, attention.partials(job));
    const auto scratch = [&] { return Scratch<A>(in, height); };
    parallel_dynamic(tasks.size(), scratch,
                     [&](int64_t i, Scratch<A>& r) { attention.run(tasks[i], r); });
    std::erase_if(jobs, [](const Job& job) { return !job.split; });
    parallel_dynamic(jobs.size(), scratch,
                     [&](int64_t i, Scratch<A>& r) { attention.finish(jobs[i], r.state.get()); });
  });
  return out;
}

}  // namespace
}  // namespace Q3N_LEVEL

Q3N_OP_OF_ACTIVATIONS(paged_attention)
