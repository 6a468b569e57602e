// CUDA as far as the kernels need it, on the CPU: for tests of their numbers.
//
// Blocks run one after the other. The threads of a block are fibers (contexts with
// a stack of their own), each of which runs up to the next barrier; a shuffle is
// one, too. Threads that do not meet at the same barrier end the program. With
// MMVSSM_HOST_ORDER=reverse the last thread runs first: where a barrier is missing
// the results differ.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define MMVSSM_DEVICE inline
#define MMVSSM_PARAMETER const
#define __global__ static
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

enum cudaError_t {};
inline const char* cudaGetErrorString(cudaError_t) { return "no error of a CPU"; }

struct float4 {
  float x, y, z, w;
};

namespace mmvssm {

struct Index {
  unsigned x;
};

enum Wait { kNowhere, kAtBlock, kAtShuffle };

struct Fiber {
  ucontext_t context;
  jmp_buf here;
  std::vector<char> stack;
  Wait wait;
  bool started, ended;
  unsigned exchanges;
  float offered[2];  // of the last shuffles, in turns
};

struct Machine {
  static constexpr size_t kStack = 256 * 1024;
  std::vector<Fiber> fibers = std::vector<Fiber>(1024);
  Fiber* current = nullptr;
  jmp_buf scheduler;
  void (*run)(const void*, const void*) = nullptr;
  const void *kernel = nullptr, *problem = nullptr;
  Index thread, block, threads;
};

inline Machine machine;

inline void enter_fiber() {
  machine.run(machine.kernel, machine.problem);
  machine.current->ended = true;
  _longjmp(machine.scheduler, 1);
}

inline void wait_at(Wait barrier) {
  Fiber* fiber = machine.current;
  fiber->wait = barrier;
  if (_setjmp(fiber->here) == 0) _longjmp(machine.scheduler, 1);
}

inline void continue_fiber(unsigned number) {
  Fiber* fiber = machine.current = &machine.fibers[number];
  machine.thread.x = number;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber->started) _longjmp(fiber->here, 1);
  fiber->started = true;
  setcontext(&fiber->context);
}

inline void run_block(unsigned threads, bool reverse) {
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.stack.resize(Machine::kStack);
    fiber.started = fiber.ended = false;
    fiber.exchanges = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter_fiber, 0);
  }
  while (!machine.fibers[0].ended) {
    for (unsigned i = 0; i < threads; ++i)
      continue_fiber(reverse ? threads - 1 - i : i);
    for (unsigned i = 1; i < threads; ++i) {
      const Fiber &one = machine.fibers[0], &other = machine.fibers[i];
      if (one.ended != other.ended || (!one.ended && one.wait != other.wait)) {
        std::fprintf(stderr, "thread %u is not where thread 0 waits\n", i);
        std::abort();
      }
    }
  }
}

inline float exchange(float x, unsigned from) {
  Fiber* fiber = machine.current;
  const unsigned turn = fiber->exchanges++ % 2;
  fiber->offered[turn] = x;
  wait_at(kAtShuffle);
  return machine.fibers[from].offered[turn];
}

inline float shuffle(float x, int lane, int width) {
  return exchange(x, machine.thread.x / width * width + lane % width);
}
inline float shuffle_xor(float x, int mask) {
  return exchange(x, machine.thread.x ^ mask);
}

inline float exp2_fast(float x) { return exp2f(x); }
inline float divide_fast(float x, float y) { return x / y; }
inline int fresh_zero() { return 0; }
inline char* address(char* base, int x, int y) {
  return base + static_cast<int64_t>(x) * y;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_half(uint32_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float x = exponent == 0 ? ldexpf(static_cast<float>(fraction), -24)
            : exponent == 31
                ? (fraction ? NAN : INFINITY)
                : ldexpf(static_cast<float>(1024 + fraction), exponent - 25);
  return bits >> 15 ? -x : x;
}
inline uint16_t to_half(float x) {
  const uint16_t sign = bits_of(x) >> 16 & 0x8000;
  const float size = fabsf(x);
  if (x != x) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  // Below the smallest normal number the last digit is worth 2^-24.
  if (size < 6.103515625e-5f)
    return sign | static_cast<uint16_t>(nearbyintf(ldexpf(size, 24)));
  const uint32_t bits = bits_of(size) - (112u << 23);
  return sign | static_cast<uint16_t>((bits + 0xfff + (bits >> 13 & 1)) >> 13);
}

template <typename Kernel, typename Problem>
int launch(Kernel kernel, int64_t blocks, int threads, void*, const Problem& problem) {
  const char* order = std::getenv("MMVSSM_HOST_ORDER");
  machine.run = [](const void* kernel, const void* problem) {
    (*static_cast<Kernel const*>(kernel))(*static_cast<const Problem*>(problem));
  };
  machine.kernel = &kernel;
  machine.problem = &problem;
  machine.threads.x = threads;
  for (int64_t i = 0; i < blocks; ++i) {
    machine.block.x = static_cast<unsigned>(i);
    run_block(threads, order != nullptr && strcmp(order, "reverse") == 0);
  }
  return 0;
}

}  // namespace mmvssm

#define threadIdx (mmvssm::machine.thread)
#define blockIdx (mmvssm::machine.block)
#define blockDim (mmvssm::machine.threads)
#define __syncthreads() mmvssm::wait_at(mmvssm::kAtBlock)
