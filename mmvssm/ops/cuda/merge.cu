// The sum of float32 arrays, in their order.
#include "device.h"

namespace mmvssm {

struct MergeArgs {
  const float* parts;  // (count, size)
  void* out;           // (size)
  int64_t size, count;
};

}  // namespace mmvssm

MMVSSM_KERNEL(merge, mmvssm::MergeArgs, THREADS, 1) {
  using namespace mmvssm;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * WIDTH;
  if (first >= p.size) return;
  float sums[WIDTH] = {};
#pragma unroll 4
  for (int64_t k = 0; k < p.count; ++k) {
    const float* from = p.parts + k * p.size + first;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) sums[i] = k == 0 ? from[i] : sums[i] + from[i];
  }
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    const int64_t at = first + i;
    if constexpr (OUT_DTYPE == 0)
      static_cast<float*>(p.out)[at] = sums[i];
    else
      static_cast<uint16_t*>(p.out)[at] =
          OUT_DTYPE == 1 ? to_bfloat16(sums[i]) : to_half(sums[i]);
  }
}
