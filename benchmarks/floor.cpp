// How fast this machine streams and calculates, with the kernels' own
// functions. Compiled by scan_cpu_floor.py for the machine it runs on.
#include <chrono>
#include <cstddef>

#include "functions.h"
#include "kernel_args.h"

namespace isa = mmvssm::MMVSSM_ISA;
using isa::kLanes;
using isa::vfloat;

namespace {

// Values of one thread: in and out fit the fastest cache together.
constexpr int64_t kValues = 2048;

// Tells the compiler that the values are read and changed here, so that it
// neither drops nor merges the passes over them.
inline void touch(const float* values) { asm volatile("" : : "r"(values) : "memory"); }

// Seconds until all threads of torch's pool have done their work. Threads of
// its own would compete with those, which wait in a loop after every parallel
// call.
template <class Work>
double seconds(mmvssm::ParallelFor parallel_for, int threads, const Work& work) {
  const auto run = [](int64_t begin, int64_t end, void* context) {
    for (int64_t i = begin; i < end; ++i) (*(const Work*)context)((int)i);
  };
  const auto start = std::chrono::steady_clock::now();
  parallel_for(0, threads, 1, run, (void*)&work);
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
  return taken.count();
}

template <class Function>
double map_seconds(mmvssm::ParallelFor parallel_for, int threads, int64_t passes,
                   float low, float high, const Function& function) {
  return seconds(parallel_for, threads, [=](int) {
    alignas(64) float in[kValues], out[kValues];
    for (int64_t i = 0; i < kValues; ++i)
      in[i] = low + (high - low) * (float)i / kValues;
    for (int64_t pass = 0; pass < passes; ++pass) {
      for (int64_t i = 0; i < kValues; i += 4 * kLanes)
        for (int64_t v = 0; v < 4; ++v)
          isa::store(out + i + v * kLanes, function(isa::load(in + i + v * kLanes)));
      touch(in);
      touch(out);
    }
  });
}

}  // namespace

extern "C" {

int64_t floor_lanes() { return kLanes; }
int64_t floor_values() { return kValues; }

// out = a + b, `count` values (less a few if the threads do not divide them);
// `out` starts on a cache line.
double floor_stream(mmvssm::ParallelFor parallel_for, int threads, int64_t count,
                    const float* a, const float* b, float* out) {
  return seconds(parallel_for, threads, [=](int i) {
    const int64_t share = count / threads / kLanes * kLanes;
    for (int64_t j = share * i; j < share * (i + 1); j += kLanes)
      isa::stream(out + j, isa::load(a + j) + isa::load(b + j));
    isa::stream_fence();
  });
}

// `passes` times exp2 of floor_values() values in each thread.
double floor_exp2(mmvssm::ParallelFor parallel_for, int threads, int64_t passes) {
  return map_seconds(parallel_for, threads, passes, -20.0f, 0.0f,
                     [](vfloat x) { return isa::exp2(x); });
}

double floor_softplus(mmvssm::ParallelFor parallel_for, int threads, int64_t passes) {
  return map_seconds(parallel_for, threads, passes, -8.0f, 8.0f,
                     [](vfloat x) { return isa::softplus(x); });
}

// `passes` times ten independent multiply-adds of floor_lanes() values.
double floor_fma(mmvssm::ParallelFor parallel_for, int threads, int64_t passes) {
  return seconds(parallel_for, threads, [=](int i) {
    vfloat sum[10];
    for (int k = 0; k < 10; ++k) sum[k] = isa::broadcast((float)(i + k));
    const vfloat factor = isa::broadcast(0.5f), term = isa::broadcast(1.0f);
    for (int64_t pass = 0; pass < passes; ++pass) {
#pragma GCC unroll 10
      for (int k = 0; k < 10; ++k) sum[k] = sum[k] * factor + term;
    }
    float sums[10 * kLanes];
    for (int k = 0; k < 10; ++k) isa::store(sums + k * kLanes, sum[k]);
    touch(sums);
  });
}
}
