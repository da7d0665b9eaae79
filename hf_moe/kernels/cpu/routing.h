// Rows sorted by expert, tasks over threads, and memory.
#pragma once

#include "panels.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hf_moe {

using at::Tensor;

// Large fresh memory is dear to touch first: one fault for 2 MiB instead of one for 4 KiB.
inline void ask_for_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHuge - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: may be refused
#endif
}

inline Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor tensor = at::empty(sizes, options);
  ask_for_huge_pages(tensor.data_ptr(), tensor.nbytes());
  return tensor;
}

enum Slot { kLeft, kRight, kOut, kSum, kLine, kLow, kNumSlots };

// A thread's working memory, kept from call to call; `slot` tells the buffers of one task apart.
template <class E>
E* scratch(int slot, int64_t count) {
  struct Buffer {
    std::unique_ptr<void, decltype(&std::free)> data{nullptr, &std::free};
    int64_t bytes = 0;
  };
  static thread_local Buffer buffers[kNumSlots];
  Buffer& buffer = buffers[slot];
  const int64_t bytes = round_up(count * sizeof(E), 4096);
  if (bytes > buffer.bytes) {
    buffer.data.reset(std::aligned_alloc(4096, bytes));
    TORCH_CHECK(buffer.data, "out of memory: ", bytes, " bytes of working memory for the experts");
    buffer.bytes = bytes;
    ask_for_huge_pages(buffer.data.get(), bytes);
  }
  return static_cast<E*>(buffer.data.get());
}

// Runs task 0..count-1, each on one thread; whoever is free takes the next. No task may depend on another.
template <class F>
void run_tasks(int64_t count, const F& task) {
  if (count == 0) return;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), count), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
  });
}

// Rows of an expert: `begin..end` of the sorted rows; panels of 16 from row `padded` of a left operand.
struct ExpertRows {
  int64_t expert, begin, end, padded;
  int64_t count() const { return end - begin; }
};

struct Routing {
  Routing() = default;
  Routing(Routing&&) = default;  // `active` points into `experts`: moving keeps that, copying would not

  std::vector<int64_t> slot;   // of each sorted row; sentinels left out
  std::vector<int64_t> token;  // of each sorted row
  std::vector<int64_t> panel_row;  // of each sorted row: where it stands in a left operand of all rows
  std::vector<ExpertRows> experts;  // all of them, in order
  std::vector<const ExpertRows*> active;  // those with rows
  int64_t padded_rows = 0;
  int64_t rows() const { return static_cast<int64_t>(slot.size()); }
};

inline void lay_out(Routing& routing, const std::vector<int64_t>& counts) {
  int64_t begin = 0;
  for (size_t e = 0; e < counts.size(); ++e) {
    routing.experts.push_back({static_cast<int64_t>(e), begin, begin + counts[e], routing.padded_rows});
    routing.padded_rows += round_up(counts[e], kRows);
    for (int64_t r = 0; r < counts[e]; ++r) routing.panel_row.push_back(routing.experts.back().padded + r);
    begin += counts[e];
  }
  for (const ExpertRows& of : routing.experts)
    if (of.count()) routing.active.push_back(&of);
  routing.padded_rows += kRows;  // 32-row kernels may read one panel further
}

// Stable counting sort of the ids [T, K]; ids from `num_experts` on compute nothing.
inline Routing sort_rows(const Tensor& index_TK, int64_t num_experts, int64_t num_ids) {
  const int64_t* ids = index_TK.const_data_ptr<int64_t>();
  const int64_t num_slots = index_TK.numel(), top_k = std::max<int64_t>(index_TK.size(1), 1);
  std::vector<int64_t> counts(num_experts, 0);
  for (int64_t n = 0; n < num_slots; ++n) {
    TORCH_CHECK_INDEX(
        ids[n] >= 0 && ids[n] < num_ids, "expert id ", ids[n], " of token ", n / top_k, " is not in [0, ", num_ids,
        "): the layer has ", num_experts, " experts",
        num_ids > num_experts ? " and one id for slots that another rank computes" : "", ". Check the router.");
    if (ids[n] < num_experts) ++counts[ids[n]];
  }
  Routing routing;
  lay_out(routing, counts);
  std::vector<int64_t> next(num_experts);
  for (int64_t e = 0; e < num_experts; ++e) next[e] = routing.experts[e].begin;
  routing.slot.resize(num_experts ? routing.experts.back().end : 0);
  routing.token.resize(routing.slot.size());
  for (int64_t n = 0; n < num_slots; ++n) {
    if (ids[n] >= num_experts) continue;
    const int64_t row = next[ids[n]]++;
    routing.slot[row] = n;
    routing.token[row] = n / top_k;
  }
  return routing;
}

// A weight [E, n, k] (or [E, k, n]) as strides in elements.
template <class T>
struct ExpertWeights {
  const T* base;
  int64_t e_step, n_step, k_step, n, k;
  Weight<T> of(int64_t expert, int64_t column = 0) const {
    return {base + expert * e_step + column * n_step, n_step, k_step};
  }
  ExpertWeights swapped() const { return {base, e_step, k_step, n_step, k, n}; }
};

template <class T>
ExpertWeights<T> weights_of(const Tensor& w, bool transposed) {
  // tasks divide by both
  TORCH_CHECK_VALUE(
      w.size(1) > 0 && w.size(2) > 0, "the matrices of experts must have at least one row and one column, got ", w.sizes(),
      ". Give the layer a hidden size, a width and a rank of at least 1.");
  const int n = transposed ? 2 : 1, k = transposed ? 1 : 2;
  return {w.const_data_ptr<T>(), w.stride(0), w.stride(n), w.stride(k), w.size(n), w.size(k)};
}

// A piece of work: `rows` sorted rows from `first` of an expert, output columns c0..c1, the chunk's number.
struct Task {
  const ExpertRows* of;
  int64_t first, rows, c0, c1, chunk;
};

constexpr int64_t kRowsPerTask = 256;  // their left operand stays in the second-level cache

// Tasks over row blocks and, where those are too few to keep the threads busy, column chunks; largest first. Chunks are
// not narrower than `run` columns, which lie together in memory, unless threads would stand idle.
inline std::vector<Task> plan_tasks(
    const Routing& routing, int64_t columns, int64_t run, int64_t* num_chunks, int64_t per_thread = 6) {
  int64_t blocks = 0;
  for (const ExpertRows* of : routing.active) blocks += (of->count() + kRowsPerTask - 1) / kRowsPerTask;
  const int64_t threads = at::get_num_threads(), wanted = per_thread * threads;
  const int64_t narrowest = std::max<int64_t>(blocks < 2 * threads ? 64 : run, 64);
  const int64_t most = std::max<int64_t>(columns / narrowest, 1);
  const int64_t chunks = std::clamp<int64_t>(blocks ? (wanted + blocks - 1) / blocks : 1, 1, most);
  const int64_t width = round_up((columns + chunks - 1) / chunks, 64);
  *num_chunks = (columns + width - 1) / width;
  std::vector<Task> tasks;
  for (const ExpertRows& of : routing.experts)
    for (int64_t r = of.begin; r < of.end; r += kRowsPerTask)
      for (int64_t c = 0; c < columns; c += width)
        tasks.push_back({&of, r, std::min(kRowsPerTask, of.end - r), c, std::min(columns, c + width), c / width});
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.rows > b.rows; });
  return tasks;
}

}  // namespace hf_moe
