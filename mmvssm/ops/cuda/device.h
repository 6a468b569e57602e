// What the kernels need of CUDA. Tests give the same names for the CPU.
#pragma once

#ifndef __CUDACC__
#include "emulator.h"
#else

using int32_t = int;
using int64_t = long long;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long long;

#define MMVSSM_DEVICE __device__ __forceinline__
// By value and never copied to a thread's own memory.
#define MMVSSM_PARAMETER const __grid_constant__
// Defines a kernel of `threads` threads a CTA, of which a multiprocessor is to hold
// `ctas`; it takes one structure, by the name `p`.
#define MMVSSM_KERNEL(entry, Args, threads, ctas)            \
  extern "C" __global__ void __launch_bounds__(threads, ctas) \
      entry(MMVSSM_PARAMETER Args p)

namespace mmvssm {

// Dynamic shared memory of the CTA, aligned for copies of 16 bytes.
MMVSSM_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// Waits for all threads of the CTA, and for those of the warp. The name is for tests,
// which take one away at a time.
#define sync_cta(name) __syncthreads()
#define sync_warp(name) __syncwarp()

// What follows is not begun before, for which there would be no registers.
MMVSSM_DEVICE void in_order() { __syncwarp(); }

// Asynchronous copies from global to shared memory, both aligned to their size. Those
// up to a copy_commit are a group; copy_wait leaves the latest kGroups of this thread
// under way. Other threads see them after a sync_cta behind that.
template <int kBytes>
MMVSSM_DEVICE void copy_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "as the hardware has them");
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global),
                 "n"(kBytes)
                 : "memory");
}
// The same, or zeros where `there` is false; nothing is read then. Both addresses have
// constant parts.
template <int kBytes, int kTo = 0, int kFrom = 0>
MMVSSM_DEVICE void copy_async_or_zero(void* shared, const void* global, bool there) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "as the hardware has them");
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16)
    asm volatile(
        "{.reg .pred absent; setp.eq.s32 absent, %2, 0;"
        "cp.async.cg.shared.global [%0 + %3], [%1 + %4], 16, absent;}" ::"r"(to),
        "l"(global), "r"(static_cast<int>(there)), "n"(kTo), "n"(kFrom)
        : "memory");
  else
    asm volatile(
        "{.reg .pred absent; setp.eq.s32 absent, %2, 0;"
        "cp.async.ca.shared.global [%0 + %3], [%1 + %4], %5, absent;}" ::"r"(to),
        "l"(global), "r"(static_cast<int>(there)), "n"(kTo), "n"(kFrom), "n"(kBytes)
        : "memory");
}
MMVSSM_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
MMVSSM_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Reads up to 16 bytes in one piece, aligned to their number, of memory that no kernel
// under way writes; zeros, and nothing is read, unless `valid`.
template <int kBytes>
MMVSSM_DEVICE void load_bytes(const void* from, bool valid,
                              uint32_t (&words)[(kBytes + 3) / 4]) {
  static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16);
#define MMVSSM_LOAD_IF(moves, load) \
  "{.reg .pred p; setp.ne.s32 p, %" moves "@p ld.global.nc." load "}"
  const int flag = valid;
  if constexpr (kBytes == 16)
    asm(MMVSSM_LOAD_IF("5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; "
                       "mov.b32 %3, 0; ",
                       "v4.b32 {%0, %1, %2, %3}, [%4];")
        : "=&r"(words[0]), "=&r"(words[1]), "=&r"(words[2]), "=&r"(words[3])
        : "l"(from), "r"(flag));
  else if constexpr (kBytes == 8)
    asm(MMVSSM_LOAD_IF("3, 0; mov.b32 %0, 0; mov.b32 %1, 0; ", "v2.b32 {%0, %1}, [%2];")
        : "=&r"(words[0]), "=&r"(words[1])
        : "l"(from), "r"(flag));
  else if constexpr (kBytes == 4)
    asm(MMVSSM_LOAD_IF("2, 0; mov.b32 %0, 0; ", "b32 %0, [%1];")
        : "=&r"(words[0])
        : "l"(from), "r"(flag));
  else
    asm("{.reg .pred p; .reg .b16 x; setp.ne.s32 p, %2, 0; mov.b16 x, 0; "
        "@p ld.global.nc.b16 x, [%1]; cvt.u32.u16 %0, x;}"
        : "=&r"(words[0])
        : "l"(from), "r"(flag));
#undef MMVSSM_LOAD_IF
}
// Reads up to 16 bytes of shared memory in one piece, aligned to their number.
template <int kBytes>
MMVSSM_DEVICE void read_bytes(const void* from, uint32_t (&words)[(kBytes + 3) / 4]) {
  static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16) {
    const uint4 four = *static_cast<const uint4*>(from);
    words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
  } else if constexpr (kBytes == 8) {
    const uint2 two = *static_cast<const uint2*>(from);
    words[0] = two.x, words[1] = two.y;
  } else if constexpr (kBytes == 4) {
    words[0] = *static_cast<const uint32_t*>(from);
  } else {
    words[0] = *static_cast<const uint16_t*>(from);
  }
}
// Writes up to 16 bytes in one piece, aligned to their number, nothing unless `valid`.
template <int kBytes>
MMVSSM_DEVICE void store_bytes(void* to, bool valid,
                               const uint32_t (&words)[(kBytes + 3) / 4]) {
  static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16);
#define MMVSSM_STORE_IF(store) \
  "{.reg .pred p; setp.ne.s32 p, %1, 0; @p st.global." store ";}"
  const int flag = valid;
  if constexpr (kBytes == 16)
    asm volatile(MMVSSM_STORE_IF("v4.b32 [%0], {%2, %3, %4, %5}") ::"l"(to), "r"(flag),
                 "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  else if constexpr (kBytes == 8)
    asm volatile(MMVSSM_STORE_IF("v2.b32 [%0], {%2, %3}") ::"l"(to), "r"(flag),
                 "r"(words[0]), "r"(words[1])
                 : "memory");
  else if constexpr (kBytes == 4)
    asm volatile(MMVSSM_STORE_IF("b32 [%0], %2") ::"l"(to), "r"(flag), "r"(words[0])
                 : "memory");
  else
    asm volatile(MMVSSM_STORE_IF("b16 [%0], %2") ::"l"(to), "r"(flag),
                 "h"(static_cast<uint16_t>(words[0]))
                 : "memory");
#undef MMVSSM_STORE_IF
}

// d += a b for a (16, 16) and b (16, 8) in 16 bits and d (16, 8) in float32, one warp.
// With g = lane / 4 and c = lane % 4 * 2 a lane has, two columns of a or rows of b in
// a register, the lower one in the lower half:
//   a: (g, c), (g + 8, c), (g, c + 8), (g + 8, c + 8);  b: (c, g), (c + 8, g);
//   d: (g, c), (g, c + 1), (g + 8, c), (g + 8, c + 1).
template <bool kIsBfloat16>
MMVSSM_DEVICE void mma_16816(float (&d)[4], const uint32_t (&a)[4],
                             const uint32_t (&b)[2]) {
  if constexpr (kIsBfloat16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
        "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, "
        "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d = a b + c, which may be another matrix.
template <bool kIsBfloat16>
MMVSSM_DEVICE void mma_16816(float (&d)[4], const uint32_t (&a)[4],
                             const uint32_t (&b)[2], const float (&c)[4]) {
  if constexpr (kIsBfloat16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
        "{%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]),
          "f"(c[1]), "f"(c[2]), "f"(c[3]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, "
        "{%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]),
          "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// The operand a of mma_16816 from shared memory: lane i gives the address of row i % 16
// at column i / 16 * 8, aligned to 16 bytes; kOffset bytes are added.
template <int kOffset = 0>
MMVSSM_DEVICE void load_matrix(uint32_t (&a)[4], const void* shared) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4 + %5];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(from), "n"(kOffset)
               : "memory");
}

// Four numbers from shared memory, read at this place in the program.
MMVSSM_DEVICE void load_here(float (&x)[4], const void* shared) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
               : "r"(from)
               : "memory");
}

// d += a b for a (16, 8) and b (8, 8) in tf32, of whose floats the last 13 bits do not
// count, and d (16, 8) in float32, one warp. With g = lane / 4 and c = lane % 4:
//   a: (g, c), (g + 8, c), (g, c + 4), (g + 8, c + 4);  b: (c, g), (c + 4, g);
//   d: (g, 2c), (g, 2c + 1), (g + 8, 2c), (g + 8, 2c + 1).
MMVSSM_DEVICE void mma_1688(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, "
      "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])),
        "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

// The same for a (16, 4) and b (4, 8):
//   a: (g, c), (g + 8, c);  b: (c, g);  d: as above.
MMVSSM_DEVICE void mma_1684(float (&d)[4], float upper, float lower, float b) {
  asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5}, "
      "{%6}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(upper)), "r"(__float_as_uint(lower)),
        "r"(__float_as_uint(b)));
}

// A number that says by itself whether it is there: other CTAs read it until it is not
// what its memory was filled with. Each is written and read as a whole.
MMVSSM_DEVICE void publish(uint64_t* to, uint64_t value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}
MMVSSM_DEVICE uint64_t read_published(const uint64_t* from) {
  uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}
// In a loop that waits for another CTA.
MMVSSM_DEVICE void spin_pause() {}

// A condition that seldom holds, as that a chunk is the last one. Where instructions
// are counted (benchmarks/sass_model.py), what it guards is left out.
MMVSSM_DEVICE bool rarely(bool condition) { return __builtin_expect(condition, 0); }

MMVSSM_DEVICE float rcp_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / sqrt(x), of denormal numbers, too.
MMVSSM_DEVICE float inverse_root(float x) {
  float y;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MMVSSM_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
MMVSSM_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
// Two floats rounded to 16 bits, the first in the lower half.
MMVSSM_DEVICE uint32_t to_bfloat16x2(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
MMVSSM_DEVICE uint32_t to_half2(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// x y + z, rounded once wherever it stands: else the compiler may choose which product
// of a sum it rounds, and so other bits in another kernel.
MMVSSM_DEVICE float multiply_add(float x, float y, float z) {
  float found;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(found) : "f"(x), "f"(y), "f"(z));
  return found;
}

MMVSSM_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

MMVSSM_DEVICE float from_half(uint32_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
  return x;
}
MMVSSM_DEVICE uint16_t to_half(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
MMVSSM_DEVICE uint16_t to_bfloat16(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// base + x y bytes, in one instruction; in global memory.
MMVSSM_DEVICE const char* global_address(const char* base, int x, int y) {
  uint64_t found;
  asm("mad.wide.s32 %0, %1, %2, %3;"
      : "=l"(found)
      : "r"(x), "r"(y), "l"(reinterpret_cast<uint64_t>(base)));
  // Generic addresses of global memory are these numbers; now the compiler knows.
  return static_cast<const char*>(__cvta_global_to_generic(found));
}

// The same pointer; now the compiler knows that it is to global memory.
template <typename T>
MMVSSM_DEVICE T* global_pointer(T* x) {
  // NVRTC 13.0 never ends if it sees that nothing happens here.
  uint64_t found;
  asm("mov.b64 %0, %1;" : "=l"(found) : "l"(reinterpret_cast<uint64_t>(x)));
  return static_cast<T*>(__cvta_global_to_generic(found));
}

// Number `index` of elements of kBytes, in one instruction.
template <int kBytes>
MMVSSM_DEVICE const char* global_element(const char* base, uint32_t index) {
  uint64_t found;
  asm("mad.wide.u32 %0, %1, %2, %3;"
      : "=l"(found)
      : "r"(index), "n"(kBytes), "l"(reinterpret_cast<uint64_t>(base)));
  return static_cast<const char*>(__cvta_global_to_generic(found));
}

// base + x y bytes, in one instruction.
MMVSSM_DEVICE char* address(char* base, int x, int y) {
  uint64_t found;
  asm("mad.wide.s32 %0, %1, %2, %3;"
      : "=l"(found)
      : "r"(x), "r"(y), "l"(reinterpret_cast<uint64_t>(base)));
  return reinterpret_cast<char*>(found);
}

// x y + z, in one instruction.
MMVSSM_DEVICE int64_t offset_of(int x, int y, int64_t z) {
  int64_t found;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(found) : "r"(x), "r"(y), "l"(z));
  return found;
}

// The same address, of which the compiler now knows that it is in global memory.
template <typename Value>
MMVSSM_DEVICE Value* in_global(Value* x) {
  __builtin_assume(__isGlobal(x));
  return x;
}

// A zero that the compiler does not know of. What is made of it in a loop is worked
// out where it is needed, and takes no register between.
MMVSSM_DEVICE int fresh_zero() {
  int zero;
  asm volatile("mov.b32 %0, 0;" : "=r"(zero));
  return zero;
}

// The same number, of which the compiler does not know what it is made of. Addresses
// that differ by constants are then one register and constants.
MMVSSM_DEVICE int hidden(int x) {
  int same;
  asm("mov.b32 %0, %1;" : "=r"(same) : "r"(x));
  return same;
}

template <typename T>
MMVSSM_DEVICE T* hidden(T* x) {
  uint64_t same;
  asm("mov.b64 %0, %1;" : "=l"(same) : "l"(reinterpret_cast<uint64_t>(x)));
  return reinterpret_cast<T*>(same);
}

// The same for a pointer to shared memory.
MMVSSM_DEVICE char* hidden_shared(char* x) {
  uint32_t same;
  asm("mov.b32 %0, %1;"
      : "=r"(same)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(x))));
  return static_cast<char*>(__cvta_shared_to_generic(same));
}

// at + bytes, for steps of an unrolled loop: what is made of them one after the other
// takes the fewest instructions.
MMVSSM_DEVICE char* moved(char* at, int64_t bytes) {
  uint64_t found;
  asm volatile("add.s64 %0, %1, %2;"
               : "=l"(found)
               : "l"(reinterpret_cast<uint64_t>(at)), "l"(bytes));
  return reinterpret_cast<char*>(found);
}

// The value of a lane among `width` neighbours, and of the one whose number
// differs in the bits of `mask`. All threads of a warp take part.
MMVSSM_DEVICE float shuffle(float x, int lane, int width) {
  return __shfl_sync(0xffffffffu, x, lane, width);
}
MMVSSM_DEVICE float shuffle_xor(float x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
// Of the lane `by` before this one, and behind it; the own value where there is none.
MMVSSM_DEVICE float shuffle_up(float x, int by) {
  return __shfl_up_sync(0xffffffffu, x, by);
}
MMVSSM_DEVICE float shuffle_down(float x, int by) {
  return __shfl_down_sync(0xffffffffu, x, by);
}
// Whether it is so in any lane of the warp.
MMVSSM_DEVICE bool any_lane(bool x) { return __any_sync(0xffffffffu, x); }

}  // namespace mmvssm

#endif  // __CUDACC__
