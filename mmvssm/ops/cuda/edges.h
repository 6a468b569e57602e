// Stretches that are walked side by side: what each one starts from.
#pragma once

#include "scan.h"

namespace mmvssm {

// Turns what each stretch adds to a zero state into what it starts from, in place
// of p.edges, one stretch after the other; with kReverse the other way round. A
// thread has one state of one channel.
template <bool kReverse>
__global__ void __launch_bounds__(kThreads)
    join_kernel(MMVSSM_PARAMETER ScanProblem p) {
  const int64_t rows = static_cast<int64_t>(p.batch) * p.groups * p.group_size;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= rows * p.states) return;
  const int64_t row = index / p.states;
  const int64_t channel = row % (static_cast<int64_t>(p.groups) * p.group_size);
  const float rate = p.A[channel * p.states + index % p.states] * kLog2E;
  const float* first = kReverse ? p.grad_last_state : nullptr;
  float h = first == nullptr ? 0.0f : first[index];
  for (int i = 0; i < p.stretches; ++i) {
    const int64_t stretch = kReverse ? p.stretches - 1 - i : i;
    float* edge = p.edges + stretch * rows * p.states + index;
    // An overflowing growth must not turn a zero state into NaN.
    const float decay =
        fminf(exp2_fast(p.steps[stretch * rows + row] * rate), kLargest);
    const float added = *edge;
    *edge = h;
    h = decay * h + added;
  }
}

template <bool kReverse>
int launch_join(const ScanProblem& p, void* stream) {
  const int64_t states =
      static_cast<int64_t>(p.batch) * p.groups * p.group_size * p.states;
  return launch(join_kernel<kReverse>, (states + kThreads - 1) / kThreads, kThreads,
                stream, p);
}

}  // namespace mmvssm
