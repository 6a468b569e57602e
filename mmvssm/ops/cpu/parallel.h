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

// Runs the items of a kernel call. `run_one` does one of them, with an arena of `floats`,
// and returns whether it found NaN.
template <class Args>
static int32_t run_items(const Args& args, int64_t items, int64_t floats,
                         bool (*run_one)(const Args&, int64_t, Arena*),
                         const Threads& threads) {
  struct Task {
    const Args& args;
    int64_t floats;
    bool (*run_one)(const Args&, int64_t, Arena*);
    int32_t status;
  } task = {args, floats, run_one, kDone};
  const RangeFunction run = [](int64_t begin, int64_t end, void* context) {
    Task* task = (Task*)context;
    for (int64_t item = begin; item < end; ++item) {
      Arena arena(task->floats);
      if (arena.failed()) {
        __atomic_store_n(&task->status, (int32_t)kOutOfMemory, __ATOMIC_RELAXED);
        return;
      }
      int32_t none = kDone;
      if (task->run_one(task->args, item, &arena))
        __atomic_compare_exchange_n(&task->status, &none, (int32_t)kFoundNaN, false,
                                    __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    }
  };
  threads.run(threads.pool, items, run, &task);
  return task.status;
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
