// The sum of float32 arrays, in their order.
#include "device.h"

namespace mmvssm {

struct MergeArgs {
  const float* parts;  // (count, size)
  void* out;           // (size)
  int64_t size, count;
};

}  // namespace mmvssm

// A thread has WIDTH neighbouring elements, 1 or 4.
MMVSSM_KERNEL(merge, mmvssm::MergeArgs, THREADS, 1) {
  using namespace mmvssm;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  const int64_t first = thread * WIDTH;
  if (first >= p.size) return;
  float sums[WIDTH];
#pragma unroll 4
  for (int64_t k = 0; k < p.count; ++k) {
    const float* from = p.parts + k * p.size + first;
    float part[WIDTH];
    if constexpr (WIDTH == 4) {
      const float4 four = *reinterpret_cast<const float4*>(from);
      part[0] = four.x, part[1] = four.y, part[2] = four.z, part[3] = four.w;
    } else {
      part[0] = *from;
    }
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) sums[i] = k == 0 ? part[i] : sums[i] + part[i];
  }
  if constexpr (OUT_DTYPE == 0) {
    float* to = static_cast<float*>(p.out) + first;
    if constexpr (WIDTH == 4)
      *reinterpret_cast<float4*>(to) = float4{sums[0], sums[1], sums[2], sums[3]};
    else
      *to = sums[0];
  } else {
    uint16_t* to = static_cast<uint16_t*>(p.out) + first;
    if constexpr (WIDTH == 4 && OUT_DTYPE == 1)
      *reinterpret_cast<uint2*>(to) =
          uint2{to_bfloat16x2(sums[0], sums[1]), to_bfloat16x2(sums[2], sums[3])};
    else if constexpr (WIDTH == 4)
      *reinterpret_cast<uint2*>(to) =
          uint2{to_half2(sums[0], sums[1]), to_half2(sums[2], sums[3])};
    else
      *to = OUT_DTYPE == 1 ? to_bfloat16(sums[0]) : to_half(sums[0]);
  }
}
