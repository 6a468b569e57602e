// CUDA as far as the kernels need it, on the CPU, where its freedoms are used to the
// full: for tests of numbers and of races.
//
// The threads of a CTA are fibers (contexts with a stack of their own). A few CTAs are
// under way at once, and each begins when the one kWindow before it has ended or later,
// so that a CTA may wait for those of lower number, as on a GPU. Which warp goes on is
// drawn from a seed (MMVSSM_EMULATION_SEED), and it goes on until it has to wait. An
// asynchronous copy is done when it is asked for, at a wait for something else or when it
// is waited for, which is drawn, too. MMVSSM_EMULATION_WITHOUT names a sync_cta or
// sync_warp that is left out. Shared memory is full of NaN at first. Threads that wait
// for ever end the program.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#define MMVSSM_DEVICE inline
#define MMVSSM_PARAMETER const
#define __launch_bounds__(...)
#define MMVSSM_KERNEL(entry, Args, threads, ctas)                                    \
  static void entry(const Args& p);                                                  \
  extern "C" int entry##_emulated(const void* args, int64_t grid, int32_t of_cta,    \
                                  int32_t shared, uint64_t seed) {                   \
    return mmvssm::emulate([](const void* p) { entry(*static_cast<const Args*>(p)); }, \
                           args, grid, of_cta, shared, seed);                        \
  }                                                                                  \
  static void entry(const Args& p)

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace mmvssm {

constexpr int kWindow = 6, kLanesOfWarp = 32;
constexpr size_t kStack = 256 * 1024;

struct Index {
  unsigned x;
};

struct Copy {
  char* to;
  const char* from;
  int bytes, group;
};

enum State { kReady, kAtWarp, kAtCta, kEnded };

struct Fiber {
  ucontext_t context;
  jmp_buf here;
  std::vector<char> stack = std::vector<char>(kStack);
  State state;
  bool started;
  const char* at;  // the name of what it waits at
  unsigned exchanges;
  uint32_t offered[2][10];  // what its warp reads of it, in turns
  std::vector<Copy> copies;
  int group;  // of the copies that are asked for now
};

struct Cta {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<char> shared;
  unsigned number;
  bool active = false;
};

struct Machine {
  void (*kernel)(const void*) = nullptr;
  const void* args = nullptr;
  const char* without = nullptr;
  uint64_t random = 1;
  jmp_buf scheduler;
  Cta* cta = nullptr;
  Fiber* fiber = nullptr;
  Index thread, block, threads, blocks;
};

inline Machine machine;

inline uint64_t draw(uint64_t below) {
  machine.random = machine.random * 6364136223846793005ull + 1442695040888963407ull;
  return (machine.random >> 33) % below;
}

inline void enter_fiber() {
  machine.kernel(machine.args);
  machine.fiber->state = kEnded;
  _longjmp(machine.scheduler, 1);
}

inline void wait_as(State state, const char* at) {
  Fiber* fiber = machine.fiber;
  // Copies that nobody has waited for may be done by now.
  if (!fiber->copies.empty() && draw(8) == 0) {
    for (const Copy& copy : fiber->copies) memcpy(copy.to, copy.from, copy.bytes);
    fiber->copies.clear();
  }
  fiber->state = state;
  fiber->at = at;
  if (_setjmp(fiber->here) == 0) _longjmp(machine.scheduler, 1);
}

inline bool left_out(const char* name) {
  return machine.without != nullptr && strcmp(machine.without, name) == 0;
}
inline void sync_cta(const char* name) {
  if (!left_out(name)) wait_as(kAtCta, name);
}
inline void sync_warp(const char* name) {
  if (!left_out(name)) wait_as(kAtWarp, name);
}
inline void spin_pause() { wait_as(kReady, "another CTA"); }

inline void continue_fiber(Cta* cta, unsigned number) {
  machine.cta = cta;
  machine.fiber = cta->fibers[number].get();
  machine.thread.x = number;
  machine.block.x = cta->number;
  if (_setjmp(machine.scheduler) != 0) return;
  if (machine.fiber->started) _longjmp(machine.fiber->here, 1);
  machine.fiber->started = true;
  setcontext(&machine.fiber->context);
}

inline void start(Cta* cta, unsigned number, unsigned threads, int shared) {
  cta->number = number;
  cta->active = true;
  // All bits set are NaN in each floating-point type.
  cta->shared.assign(shared + 128, static_cast<char>(0xff));
  while (cta->fibers.size() < threads) cta->fibers.push_back(std::make_unique<Fiber>());
  for (unsigned i = 0; i < threads; ++i) {
    Fiber* fiber = cta->fibers[i].get();
    fiber->state = kReady;
    fiber->started = false;
    fiber->exchanges = 0;
    fiber->group = 0;
    fiber->copies.clear();
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.data();
    fiber->context.uc_stack.ss_size = fiber->stack.size();
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, enter_fiber, 0);
  }
}

// Lets go the fibers from `first` on that wait in a state, if none is elsewhere. Those
// that have ended do not count.
inline void release(Cta* cta, unsigned first, unsigned last, State state) {
  const char* at = nullptr;
  for (unsigned i = first; i < last; ++i) {
    const Fiber& fiber = *cta->fibers[i];
    if (fiber.state == kEnded) continue;
    if (fiber.state != state) return;
    if (at != nullptr && strcmp(at, fiber.at) != 0) {
      std::fprintf(stderr, "CTA %u: thread %u waits at '%s' and another at '%s'\n",
                   cta->number, i, fiber.at, at);
      std::abort();
    }
    at = fiber.at;
  }
  for (unsigned i = first; i < last; ++i)
    if (cta->fibers[i]->state == state) cta->fibers[i]->state = kReady;
}

inline bool has_ended(const Cta& cta, unsigned threads) {
  for (unsigned i = 0; i < threads; ++i)
    if (cta.fibers[i]->state != kEnded) return false;
  return true;
}

inline int emulate(void (*kernel)(const void*), const void* args, int64_t grid,
                   int32_t threads, int32_t shared, uint64_t seed) {
  machine.kernel = kernel;
  machine.args = args;
  machine.without = std::getenv("MMVSSM_EMULATION_WITHOUT");
  machine.random = seed * 2654435761u + 1;
  machine.threads.x = threads;
  machine.blocks.x = static_cast<unsigned>(grid);
  static std::vector<Cta> ctas(kWindow);
  int64_t next = 0;
  uint64_t turns_without_end = 0;
  for (;;) {
    std::vector<std::pair<Cta*, unsigned>> ready;
    bool active = false;
    for (Cta& cta : ctas) {
      if (cta.active && has_ended(cta, threads)) cta.active = false, turns_without_end = 0;
      if (!cta.active && next < grid) start(&cta, static_cast<unsigned>(next++), threads, shared);
      if (!cta.active) continue;
      active = true;
      for (unsigned first = 0; first < static_cast<unsigned>(threads); first += kLanesOfWarp)
        for (unsigned i = first; i < first + kLanesOfWarp && i < static_cast<unsigned>(threads); ++i)
          if (cta.fibers[i]->state == kReady) {
            ready.emplace_back(&cta, first);
            break;
          }
    }
    if (!active) return 0;
    if (ready.empty() || ++turns_without_end > 20000000) {
      std::fprintf(stderr, "no thread can go on\n");
      std::abort();
    }
    const auto [cta, first] = ready[draw(ready.size())];
    const unsigned last = first + kLanesOfWarp < static_cast<unsigned>(threads)
                              ? first + kLanesOfWarp
                              : threads;
    // The warp goes on through some of its own waits, and at times through all.
    for (uint64_t left = draw(4) == 0 ? 1u << 30 : 1 + draw(8); left > 0; --left) {
      const bool backwards = draw(2);
      bool went_on = false, spins = false;
      for (unsigned k = 0; k < last - first; ++k) {
        const unsigned i = backwards ? last - 1 - k : first + k;
        if (cta->fibers[i]->state != kReady) continue;
        continue_fiber(cta, i);
        went_on = true;
        spins = spins || cta->fibers[i]->state == kReady;
      }
      release(cta, first, last, kAtWarp);
      release(cta, 0, threads, kAtCta);
      if (!went_on || spins) break;
    }
  }
}

inline char* shared_memory() {
  const auto start = reinterpret_cast<uintptr_t>(machine.cta->shared.data());
  return reinterpret_cast<char*>((start + 127) / 128 * 128);
}

// What each lane of the warp offers, read by all of them.
template <int kCount>
const Fiber* const* exchange(const uint32_t (&values)[kCount], unsigned* turn) {
  Fiber* fiber = machine.fiber;
  *turn = fiber->exchanges++ % 2;
  memcpy(fiber->offered[*turn], values, sizeof values);
  wait_as(kAtWarp, "an exchange");
  static thread_local const Fiber* lanes[kLanesOfWarp];
  const unsigned first = machine.thread.x / kLanesOfWarp * kLanesOfWarp;
  for (unsigned i = 0; i < kLanesOfWarp; ++i)
    lanes[i] = first + i < machine.threads.x ? machine.cta->fibers[first + i].get() : nullptr;
  return lanes;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline float exchange_one(float x, unsigned lane) {
  unsigned turn;
  const uint32_t values[1] = {bits_of(x)};
  return float_of(exchange(values, &turn)[lane]->offered[turn][0]);
}
inline float shuffle(float x, int lane, int width) {
  const unsigned own = machine.thread.x % kLanesOfWarp;
  return exchange_one(x, own / width * width + lane % width);
}
inline float shuffle_xor(float x, int mask) {
  return exchange_one(x, machine.thread.x % kLanesOfWarp ^ mask);
}
inline float shuffle_up(float x, unsigned by) {
  const unsigned own = machine.thread.x % kLanesOfWarp;
  return exchange_one(x, own < by ? own : own - by);
}
inline float shuffle_down(float x, unsigned by) {
  const unsigned own = machine.thread.x % kLanesOfWarp;
  return exchange_one(x, own + by < kLanesOfWarp ? own + by : own);
}

template <int kBytes>
void check_alignment(const void* address, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % kBytes == 0) return;
  std::fprintf(stderr, "a %s of %d bytes is not aligned\n", what, kBytes);
  std::abort();
}
template <int kBytes>
void load_bytes(const void* from, bool valid, uint32_t (&words)[(kBytes + 3) / 4]) {
  memset(words, 0, sizeof words);
  if (!valid) return;
  check_alignment<kBytes>(from, "load");
  memcpy(words, from, kBytes);
}
template <int kBytes>
void read_bytes(const void* from, uint32_t (&words)[(kBytes + 3) / 4]) {
  load_bytes<kBytes>(from, true, words);
}
template <int kBytes>
void store_bytes(void* to, bool valid, const uint32_t (&words)[(kBytes + 3) / 4]) {
  if (!valid) return;
  check_alignment<kBytes>(to, "store");
  memcpy(to, words, kBytes);
}

inline bool any_lane(bool x) {
  unsigned turn;
  const uint32_t values[1] = {x};
  const Fiber* const* lanes = exchange(values, &turn);
  bool found = false;
  for (unsigned i = 0; i < kLanesOfWarp; ++i)
    found = found || lanes[i] != nullptr && lanes[i]->offered[turn][0];
  return found;
}

template <int kBytes>
void copy_async(void* to, const void* from) {
  check_alignment<kBytes>(to, "copy");
  check_alignment<kBytes>(from, "copy");
  if (draw(2)) {
    memcpy(to, from, kBytes);
    return;
  }
  Fiber* fiber = machine.fiber;
  fiber->copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), kBytes, fiber->group});
}
template <int kBytes, int kTo = 0, int kFrom = 0>
void copy_async_or_zero(void* to, const void* from, bool there) {
  alignas(16) static const char zeros[16] = {};
  copy_async<kBytes>(static_cast<char*>(to) + kTo,
                     there ? static_cast<const char*>(from) + kFrom : zeros);
}
inline void copy_commit() { ++machine.fiber->group; }
template <int kGroups>
void copy_wait() {
  Fiber* fiber = machine.fiber;
  std::vector<Copy> later;
  for (const Copy& copy : fiber->copies) {
    if (copy.group < fiber->group - kGroups)
      memcpy(copy.to, copy.from, copy.bytes);
    else
      later.push_back(copy);
  }
  fiber->copies = later;
}

inline void publish(uint64_t* to, uint64_t value) { *to = value; }
inline uint64_t read_published(const uint64_t* from) { return *from; }

inline float multiply_add(float x, float y, float z) { return fmaf(x, y, z); }
inline float exp2_fast(float x) { return exp2f(x); }
inline bool rarely(bool condition) { return condition; }
inline float inverse_root(float x) { return 1.0f / sqrtf(x); }
inline float rcp_fast(float x) { return 1.0f / x; }
template <typename Value>
Value* in_global(Value* x) {
  return x;
}
template <typename Value>
Value hidden(Value x) {
  return x;
}
inline char* hidden_shared(char* x) { return x; }
inline int64_t offset_of(int x, int y, int64_t z) { return int64_t{x} * y + z; }
inline int fresh_zero() { return 0; }
template <typename T>
T* global_pointer(T* x) {
  return x;
}
template <int kBytes>
const char* global_element(const char* base, uint32_t index) {
  return base + static_cast<uint64_t>(index) * kBytes;
}
inline const char* global_address(const char* base, int x, int y) {
  return base + static_cast<int64_t>(x) * y;
}
inline void in_order() {}
inline char* moved(char* at, int64_t bytes) { return at + bytes; }
inline char* address(char* base, int x, int y) {
  return base + static_cast<int64_t>(x) * y;
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
  return bits >> 15 & 1 ? -x : x;
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
inline uint32_t to_bfloat16x2(float low, float high) {
  return to_bfloat16(low) | static_cast<uint32_t>(to_bfloat16(high)) << 16;
}
inline uint32_t to_half2(float low, float high) {
  return to_half(low) | static_cast<uint32_t>(to_half(high)) << 16;
}

template <bool kIsBfloat16>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t values[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  unsigned turn;
  const Fiber* const* lanes = exchange(values, &turn);
  const auto number = [&](int lane, int place, int half) {
    const uint32_t bits = lanes[lane]->offered[turn][place] >> 16 * half & 0xffff;
    return kIsBfloat16 ? float_of(bits << 16) : from_half(bits);
  };
  const int own = machine.thread.x % kLanesOfWarp;
  for (int i = 0; i < 4; ++i) {
    const int row = own / 4 + i / 2 * 8, column = own % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int c = k % 8 / 2, upper = k / 8;
      d[i] += number(row % 8 * 4 + c, upper * 2 + row / 8, k % 2) *
              number(column * 4 + c, 4 + upper, k % 2);
    }
  }
}

template <bool kIsBfloat16>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
               const float (&c)[4]) {
  memcpy(d, c, sizeof d);
  mma_16816<kIsBfloat16>(d, a, b);
}

inline void load_here(float (&x)[4], const void* from) { memcpy(x, from, sizeof x); }

template <int kOffset = 0>
void load_matrix(uint32_t (&a)[4], const void* from) {
  const auto address = reinterpret_cast<uintptr_t>(from) + kOffset;
  if (address % 16) {
    std::fprintf(stderr, "a row of a matrix is not aligned\n");
    std::abort();
  }
  const uint32_t values[2] = {static_cast<uint32_t>(address),
                              static_cast<uint32_t>(address >> 32)};
  unsigned turn;
  const Fiber* const* lanes = exchange(values, &turn);
  const int own = machine.thread.x % kLanesOfWarp;
  for (int i = 0; i < 4; ++i) {
    const uint32_t* row = lanes[i * 8 + own / 4]->offered[turn];
    const uintptr_t start = row[0] | static_cast<uintptr_t>(row[1]) << 32;
    memcpy(&a[i], reinterpret_cast<const char*>(start) + own % 4 * 4, 4);
  }
}


// Tensor cores cut off what float32 has no room for, and so does this.
inline float toward_zero(double x) {
  const float near = static_cast<float>(x);
  return fabs(static_cast<double>(near)) > fabs(x) ? nextafterf(near, 0.0f) : near;
}
inline void mma_1688(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  const uint32_t values[6] = {bits_of(a[0]), bits_of(a[1]), bits_of(a[2]),
                              bits_of(a[3]), bits_of(b[0]), bits_of(b[1])};
  unsigned turn;
  const Fiber* const* lanes = exchange(values, &turn);
  const auto number = [&](int lane, int place) {
    return float_of(lanes[lane]->offered[turn][place] & 0xffffe000u);
  };
  const int own = machine.thread.x % kLanesOfWarp;
  for (int i = 0; i < 4; ++i) {
    const int row = own / 4 + i / 2 * 8, column = own % 4 * 2 + i % 2;
    double sum = d[i];
    for (int k = 0; k < 8; ++k)
      sum += static_cast<double>(number(row % 8 * 4 + k % 4, k / 4 * 2 + row / 8)) *
             number(column * 4 + k % 4, 4 + k / 4);
    d[i] = toward_zero(sum);
  }
}

inline void mma_1684(float (&d)[4], float upper, float lower, float b) {
  mma_1688(d, {upper, lower, 0.0f, 0.0f}, {b, 0.0f});
}

}  // namespace mmvssm

#define threadIdx (mmvssm::machine.thread)
#define blockIdx (mmvssm::machine.block)
#define blockDim (mmvssm::machine.threads)
#define gridDim (mmvssm::machine.blocks)
