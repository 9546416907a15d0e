// How the heads of an attention op are cut, given to threads, and brought together again.
#pragma once

#include <omp.h>

#include "heads.h"
#include "kernels.h"

namespace bertkd {
namespace BERTKD_ISA {
namespace {

// Both sides' scores in flight, in floats: together with the packed keys they stay in an L2 of 512
// KiB.
constexpr int64_t kScoreFloats = 1 << 16;

// Starting threads costs some microseconds: below about a million operations one thread is done
// sooner.
inline int worth_threads(int threads, double operations) {
  return operations < 1 << 20 ? 1 : threads;
}

// How many scores a head has.
template <class Args>
inline double pairs_of_head(const Args& args) {
  const double length = static_cast<double>(args.length);
  const double band = 2. * static_cast<double>(args.window) + 1.;
  return length * (args.window < 0 || band > length ? length : band);
}

// The next odd number of cache lines: walking down a column must not fall on few cache sets.
inline int64_t odd_lines(int64_t floats) {
  const int64_t lines = (floats + 15) / 16;
  return (lines % 2 ? lines : lines + 1) * 16;
}

// Rows of scores per block, as equal as possible and a multiple of the register tile.
inline int64_t block_rows(int64_t length, int64_t ld_score) {
  int64_t rows = kScoreFloats / (2 * ld_score);
  // Very long rows leave L2 anyway; then a block amortises reading and writing the keys' gradient.
  if (rows < 4 * kTileRows) rows = 4 * kTileRows;
  const int64_t blocks = (length + rows - 1) / rows;
  return round_up((length + blocks - 1) / blocks, kTileRows);
}

inline void fill_zero(float* to, int64_t count) {
  __builtin_memset(to, 0, static_cast<std::size_t>(count) * sizeof(float));
}

// How the rows of a head are cut into blocks: up to `rows` of them, less than `reach` positions
// apart, whose scores lie `ld_score` floats apart.
struct Cut {
  int64_t rows, reach, ld_score;
  int64_t blocks;  // of a head whose rows all count

  Cut(int64_t length, int64_t window) {
    const int64_t keys = round_up(length, kPanel);
    if (window < 0) {
      ld_score = odd_lines(keys + kTileRows);
      rows = block_rows(length, ld_score);
      reach = length;
    } else {
      // The higher a block, the more of its scores lie outside of its rows' windows.
      reach = rows = 2 * kTileRows;
      const int64_t band = round_up(rows + 2 * window + kPanel, kPanel);
      ld_score = odd_lines((band < keys ? band : keys) + kTileRows);
    }
    blocks = (length + rows - 1) / rows;
  }
};

// A block of the rows of a head that has n real keys.
struct Block {
  int64_t b, h, n;
  const int32_t* rows;     // where its rows stand
  const KeyRange* ranges;  // what each of them compares
  int64_t m, tall;         // how many they are, and padded

  // The packed keys that any of them compares. A row of scores begins with their first panel.
  KeyRange keys() const { return {ranges[0].first, ranges[m - 1].last}; }
  int64_t begin() const { return keys().begin(); }
  int64_t panels() const { return (keys().end() - begin()) / kPanel; }

  // The keys of row r, counted from begin().
  KeyRange of_row(int64_t r) const {
    const auto begin_of_all = static_cast<int32_t>(begin());
    return {ranges[r].first - begin_of_all, ranges[r].last - begin_of_all};
  }
};

// Cuts listed rows of a head into blocks.
template <class Visit>
inline void visit_blocks(const Cut& cut, int64_t b, int64_t h, int64_t n, const int32_t* rows,
                         const KeyRange* ranges, int64_t count, const Visit& visit) {
  for (int64_t r = 0, m; r < count; r += m) {
    m = count - r < cut.rows ? count - r : cut.rows;
    while (rows[r + m - 1] - rows[r] >= cut.reach) --m;
    visit(Block{b, h, n, rows + r, ranges + r, m, round_up(m, kTileRows)});
  }
}

// Sets the scores of row r of a block that are not its own to 0, for the products that turn the
// block's into gradients. A row of all keys has none: what it has beyond them reaches no gradient.
inline void clear_outside(const Block& at, int64_t r, float* scores) {
  const KeyRange own = at.of_row(r);
  if (own.last - own.first == at.n) return;
  fill_zero(scores, own.first);
  // add_transposed reads up to a tile more than there are keys.
  fill_zero(scores + own.last, at.panels() * kPanel + kTileRows - own.last);
}

// Into how many parts the rows of a head are cut, so that every thread has some.
inline int64_t head_parts(const Attention& args, int threads, int64_t blocks) {
  const int64_t heads = args.batch * args.heads, pieces = threads == 1 ? 1 : 2 * threads;
  const int64_t parts = (pieces + heads - 1) / heads;
  return parts < blocks ? parts : blocks;
}

// Heads from one of a thread's to its next, if all last equally long; past the last where heads are
// cut.
inline int64_t head_step(const Attention& args, int threads, int64_t parts) {
  return parts > 1 ? args.batch * args.heads : threads;
}

inline void add_scaled(const float* from, float factor, int64_t count, float* to) {
  for (int64_t d = 0; d < count; d += kLanes)
    store(to + d, fma(load(from + d), splat(factor), load(to + d)));
}

inline void zero_row(const Heads& to, int64_t b, int64_t h, int64_t i) {
  __builtin_memset(row_to(to, b, h, i), 0, static_cast<std::size_t>(to.width * bytes_of(to.dtype)));
}

// Rows that no block visits: all but the `count` that are listed.
template <class Visit>
inline void visit_skipped_rows(int64_t length, const int32_t* rows, int64_t count,
                               const Visit& visit) {
  for (int64_t i = 0, next = 0; i < length; ++i)
    if (next < count && rows[next] == i)
      ++next;
    else
      visit(i);
}

inline void zero_skipped_rows(const Attention& args, int64_t b, int64_t h, const int32_t* rows,
                              int64_t count, bool gradient_is_summed) {
  visit_skipped_rows(args.length, rows, count, [&](int64_t i) {
    if (!args.weights.data)
      args.rows[(b * args.heads + h) * args.length + i] = 0.f;
    else if (!gradient_is_summed)
      zero_row(args.grad_a, b, h, i);
  });
}

// The n packed rows of a head, times factor, to the places that `keys` names; the others get 0.
inline void place_rows(const Heads& to, int64_t b, int64_t h, int64_t length, const int32_t* keys,
                       int64_t n, const float* rows, int64_t ld, float factor) {
  int64_t next = 0;
  for (int64_t j = 0; j < length; ++j)
    if (next < n && keys[next] == j)
      narrow(rows + next++ * ld, factor, to.width, to.dtype, row_to(to, b, h, j));
    else
      zero_row(to, b, h, j);
}

// The gradient of the n packed keys of a head, times factor: added to `sum` by position, or, where
// there is none, written to its place.
inline void deliver_keys(const Attention& args, int64_t b, int64_t h, const int32_t* keys,
                         int64_t n, const float* grad, int64_t ld, float factor, float* sum) {
  if (!sum) return place_rows(args.grad_b, b, h, args.length, keys, n, grad, ld, factor);
  for (int64_t r = 0; r < n; ++r) add_scaled(grad + r * ld, factor, ld, sum + keys[r] * ld);
}

// The gradient of a head from the sums of its parts, added in order.
inline void write_head(const Attention& args, int64_t head, float* sums, int64_t parts, int64_t ld,
                       const Heads& to) {
  const int64_t size = args.length * ld;
  for (int64_t part = 1; part < parts; ++part) add_scaled(sums + part * size, 1.f, size, sums);
  for (int64_t i = 0; i < args.length; ++i)
    narrow(sums + i * ld, 1.f, args.a_s.width, to.dtype,
           row_to(to, head / args.heads, head % args.heads, i));
}

// How the heads of a call are worked on.
struct HeadJob {
  int threads;
  int64_t parts;  // pieces of a head
  bool summed;    // whether its gradient is summed by position before it is written
  Heads to;       // where to
  int64_t ld;     // width of a row of sums
};

// Runs visit(buffers, head, part) -> loss for every part of every head and writes the loss and the
// summed gradients. `carve` lays a thread's buffers out in an arena; their `sum` is set here.
template <class Carve, class Visit>
void run_heads(const Attention& args, const HeadJob& job, const Carve& carve, const Visit& visit) {
  const int64_t heads = args.batch * args.heads, items = heads * job.parts;
  const int threads = job.threads < items ? job.threads : static_cast<int>(items);
  const int64_t size = job.summed ? args.length * job.ld : 0;
  // Where a head has one part its sum lives as long as the visit and belongs to the thread.
  const bool split = job.parts > 1;
  Arena layout;
  carve(layout);
  if (!split) layout.take<float>(size);
  const int64_t each = layout.used;
  layout.used = each * threads;
  layout.take<double>(items);
  if (split) layout.take<float>(items * size);
  Arena shared{static_cast<char*>(allocate(layout.used)), each * threads};
  double* losses = shared.take<double>(items);
  float* sums = split ? shared.take<float>(items * size) : nullptr;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Arena mine{shared.base + omp_get_thread_num() * each, 0};
    auto buffers = carve(mine);
    float* own = split ? nullptr : mine.take<float>(size);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items; ++item) {
      buffers.sum = !job.summed ? nullptr : split ? sums + item * size : own;
      if (job.summed) fill_zero(buffers.sum, size);
      losses[item] = visit(buffers, item / job.parts, item % job.parts);
      if (job.summed && !split) write_head(args, item, own, 1, job.ld, job.to);
    }
    if (job.summed && split) {
#pragma omp for schedule(static)
      for (int64_t head = 0; head < heads; ++head)
        write_head(args, head, sums + head * job.parts * size, job.parts, job.ld, job.to);
    }
  }
  double loss = 0.;
  for (int64_t item = 0; item < items; ++item) loss += losses[item];
  if (args.weights.data) *args.loss = static_cast<float>(loss);
  release(shared.base);
}

}  // namespace
}  // namespace BERTKD_ISA
}  // namespace bertkd
