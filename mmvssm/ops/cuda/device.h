// What the kernels need of CUDA. Tests give the same names for the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define MMVSSM_DEVICE __device__ __forceinline__
// By value and never copied to a thread's own memory.
#define MMVSSM_PARAMETER const __grid_constant__

namespace mmvssm {

MMVSSM_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// For divisors far from the limits of float32.
MMVSSM_DEVICE float divide_fast(float x, float y) { return __fdividef(x, y); }

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

// base + x y bytes, in one instruction.
MMVSSM_DEVICE char* address(char* base, int x, int y) {
  uint64_t found;
  asm("mad.wide.s32 %0, %1, %2, %3;"
      : "=l"(found)
      : "r"(x), "r"(y), "l"(reinterpret_cast<uint64_t>(base)));
  return reinterpret_cast<char*>(found);
}

// A zero that the compiler does not know of. What is made of it in a loop is worked
// out where it is needed, and takes no register between.
MMVSSM_DEVICE int fresh_zero() {
  int zero;
  asm volatile("mov.b32 %0, 0;" : "=r"(zero));
  return zero;
}

// The value of a lane among `width` neighbours, and of the one whose number
// differs in the bits of `mask`. All threads of a warp take part.
MMVSSM_DEVICE float shuffle(float x, int lane, int width) {
  return __shfl_sync(0xffffffffu, x, lane, width);
}
MMVSSM_DEVICE float shuffle_xor(float x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

template <typename Kernel, typename Problem>
int launch(Kernel kernel, int64_t blocks, int threads, void* stream,
           const Problem& problem) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  // This library has a runtime of its own, which must be told of torch's device.
  const cudaError_t error = cudaSetDevice(problem.device);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), threads, 0,
           static_cast<cudaStream_t>(stream)>>>(problem);
  return cudaGetLastError();
}

}  // namespace mmvssm
