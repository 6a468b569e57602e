// The selective scan: outputs, the last state, and the states before the chunks.
#pragma once

#include "scan.h"

namespace mmvssm {

// Positions that the forward kernels work on at once.
template <int kStates, int kLanes>
constexpr int kForwardPart = kLanes > 8                   ? 16
                             : kLanes == 1 && kStates > 1 ? 4
                                                          : 8;

// Blocks that a multiprocessor has room for. It bounds the registers of a thread: as
// many blocks as go without spilling (tests/ops/test_cuda.py).
template <int kStates, int kRank>
constexpr int kForwardBlocks = kRank > 8 && kStates > 1 ? 3
                               : kRank > 0              ? 4
                               : kStates > 8            ? 5
                               : kStates > 1            ? 6
                                                        : 8;

// Step sizes of own positions from the low-rank features in shared memory.
template <int kRank, int kOwn>
MMVSSM_DEVICE void project_steps(const float* features, const float (&weight)[kRank],
                                 float (&raw)[kOwn]) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    float f[kRank];
    load_vector(features + i * kRank, f);
    raw[i] = 0.0f;
#pragma unroll
    for (int r = 0; r < kRank; ++r) raw[i] += weight[r] * f[r];
  }
}

// One walk along every stretch. With kEnds it finds only what the stretch makes of
// a zero state, and the sum of its steps. With kRank the step sizes are projected
// from features of that many values, zeros included.
template <int kStates, int kLanes, int kRank, bool kEnds>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<kStates, kRank>)
    forward_kernel(MMVSSM_PARAMETER ScanProblem p) {
  constexpr int kPart = kForwardPart<kStates, kLanes>;
  constexpr int kWidth = kStates * kLanes;
  constexpr int kFeatures = kRank == 0 ? 4 : kRank;
  using Own = Share<kPart, kLanes>;
  constexpr int kOwn = Own::kOwn;
  __shared__ __align__(16) float B[kPart * kWidth];
  __shared__ __align__(16) float C[kEnds ? 4 : kPart * kWidth];
  __shared__ __align__(16) float features[kPart * kFeatures];
  __shared__ int places[kPart];

  const Place<kStates, kLanes> place(p);
  const int own = Own::first(place.lane);
  const bool gated = p.z.data != nullptr;
  const float skip = place.parameter(p.D), shift = place.parameter(p.bias);
  float rates[kStates], h[kStates] = {}, weight[kFeatures] = {};
  place.load_rates(p, rates);
  if (!kEnds && p.stretches > 1) place.load(p, p.edges, place.stretch, h);
#pragma unroll
  for (int r = 0; r < kRank; ++r)
    if (place.valid && r < p.rank)
      weight[r] = p.weight[static_cast<int64_t>(place.channel) * p.rank + r];
  float total = 0.0f;

  for (int first = place.begin; first < place.end; first += kPart) {
    if (!kEnds && p.saved != nullptr && first % kChunk == 0 && first > 0)
      place.store(p, p.saved, first / kChunk - 1, h);
    __syncthreads();
    if (threadIdx.x < kPart) {
      const int t = first + threadIdx.x;
      places[threadIdx.x] = t < place.end ? place_of(p, t) : 0;
    }
    stage_states<kPart, kWidth>(p, p.B, place, first, place.end, B);
    if (!kEnds) stage_states<kPart, kWidth>(p, p.C, place, first, place.end, C);
    if (kRank > 0) {
      const Array& f = p.features;
      stage<kPart, kFeatures>(p, f, place.batch * f.stride[0], f.stride[1], f.stride[2],
                              p.rank, first, place.end, features);
    }
    __syncthreads();

    const int count = place.valid ? place.end - first - own : 0;
    int where[kOwn];
    read_places(places + own, where);
    const Row u(p.u, place, fresh_zero()), delta(p.delta, place, fresh_zero());
    uint32_t bits[kOwn], delta_bits[kOwn];
    float x[kOwn], raw[kOwn], dt[kOwn];
    fetch(u, where, count, bits);
    if (kRank == 0) fetch(delta, where, count, delta_bits);
    if constexpr (kRank > 0)
      project_steps<kRank>(features + own * kRank, weight, raw);
    else
      convert(delta.dtype, delta_bits, raw);
    finish_steps(p, shift, count, raw, dt);
    convert(u.dtype, bits, x);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) total += dt[i];

    float y[kPart];
#pragma unroll
    for (int t = 0; t < kPart; ++t) {
      float weights[kStates];
      load_vector(B + t * kWidth + place.lane * kStates, weights);
      const float step = Own::get(dt, t);
      advance(step, step * Own::get(x, t), rates, weights, h);
      if (!kEnds) {
        load_vector(C + t * kWidth + place.lane * kStates, weights);
        y[t] = 0.0f;
#pragma unroll
        for (int i = 0; i < kStates; ++i) y[t] += weights[i] * h[i];
      }
    }
    if (!kEnds) {
      scatter_sums<kPart, kLanes, 1>(y, place.lane);
      float result[kOwn], more[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) result[i] = y[i] + skip * x[i];
      const Row out(p.out, place, fresh_zero());
      if (gated) {
        const Row gate(p.z, place, fresh_zero());
        fetch(gate, where, count, bits);
        convert(gate.dtype, bits, more);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) result[i] *= more[i] * sigmoid(more[i]);
      }
      if (p.add) {
        fetch(out, where, count, bits);
        convert(out.dtype, bits, more);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) result[i] += more[i];
      }
      store(out, where, Own::counts(place.lane) ? count : 0, result);
    }
  }
  if (kEnds) {
    place.store(p, p.edges, place.stretch, h);
    total = sum_lanes<kLanes>(Own::counts(place.lane) ? total : 0.0f);
    if (place.valid && place.lane == 0) p.steps[place.row(p, place.stretch)] = total;
  } else if (p.last_state != nullptr && place.end == p.length) {
    place.store(p, p.last_state, 0, h);
  }
}

}  // namespace mmvssm
