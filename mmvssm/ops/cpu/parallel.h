// How the items of a kernel call run on its threads, each with memory of its own.
#pragma once

#include <cstdlib>

#include "kernel_args.h"

namespace mmvssm {
namespace MMVSSM_ISA {

// Aligned memory for the buffers of one item, taken piece by piece, freed as a whole.
class Arena {
 public:
  explicit Arena(int64_t floats)
      : size_((floats * 4 + 63) / 64 * 64),
        memory_((char*)std::aligned_alloc(64, size_)) {}
  ~Arena() { std::free(memory_); }
  Arena(const Arena&) = delete;
  bool failed() const { return memory_ == nullptr; }
  // The next piece; each starts on a cache line of its own.
  float* take(int64_t floats) {
    float* piece = (float*)(memory_ + used_);
    used_ += rounded(floats) * 4;
    return piece;
  }
  static int64_t rounded(int64_t floats) { return (floats + 15) / 16 * 16; }

 private:
  int64_t size_;
  char* memory_;
  int64_t used_ = 0;
};

// Runs the items of a kernel call in bands: `run_band` does neighbouring items, at most
// `longest`, with an arena of `floats`, and returns whether it found NaN.
template <class Args>
static int32_t run_bands(const Args& args, int64_t items, int64_t longest,
                         int64_t floats,
                         bool (*run_band)(const Args&, int64_t, int64_t, Arena*),
                         const Threads& threads) {
  struct Task {
    const Args& args;
    int64_t longest, floats;
    bool (*run_band)(const Args&, int64_t, int64_t, Arena*);
    int32_t status;
  } task = {args, longest, floats, run_band, kDone};
  const RangeFunction run = [](int64_t begin, int64_t end, void* context) {
    Task* task = (Task*)context;
    for (int64_t first = begin; first < end; first += task->longest) {
      const int64_t next = first + task->longest;
      Arena arena(task->floats);
      if (arena.failed()) {
        __atomic_store_n(&task->status, (int32_t)kOutOfMemory, __ATOMIC_RELAXED);
        return;
      }
      int32_t none = kDone;
      if (task->run_band(task->args, first, next < end ? next : end, &arena))
        __atomic_compare_exchange_n(&task->status, &none, (int32_t)kFoundNaN, false,
                                    __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    }
  };
  threads.run(threads.pool, items, run, &task);
  return task.status;
}

// The same for items that have nothing to share.
template <class Args>
static int32_t run_items(const Args& args, int64_t items, int64_t floats,
                         bool (*run_one)(const Args&, int64_t, Arena*),
                         const Threads& threads) {
  struct Single {
    const Args& args;
    bool (*run_one)(const Args&, int64_t, Arena*);
    static bool run(const Single& s, int64_t item, int64_t, Arena* arena) {
      return s.run_one(s.args, item, arena);
    }
  } single = {args, run_one};
  return run_bands(single, items, 1, floats, Single::run, threads);
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
