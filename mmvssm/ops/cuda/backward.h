// Gradients of the selective scan.
#pragma once

#include "scan.h"

namespace mmvssm {

// Positions whose states the backward kernel has in registers.
template <int kStates, int kLanes>
constexpr int kBackwardPart = kLanes > 1 ? 4 : 8;

// As kForwardBlocks.
template <int kStates, int kLanes>
constexpr int kBackwardBlocks = kLanes == 1                  ? 4
                                : kLanes == 2 || kStates > 4 ? 3
                                                             : 5;
constexpr int kBackwardEndsBlocks = 8;

// Gradients of the states before the stretches, if nothing came behind them.
template <int kStates, int kLanes>
__global__ void __launch_bounds__(kThreads, kBackwardEndsBlocks)
    backward_ends_kernel(MMVSSM_PARAMETER ScanProblem p) {
  constexpr int kPart = kBackwardPart<kStates, kLanes>;
  constexpr int kWidth = kStates * kLanes;
  using Own = Share<kPart, kLanes>;
  constexpr int kOwn = Own::kOwn;
  __shared__ __align__(16) float C[kPart * kWidth];
  __shared__ int places[kPart];

  const Place<kStates, kLanes> place(p);
  const int own = Own::first(place.lane);
  const Row delta(p.delta, place), gate(p.z, place), by_out(p.grad_out, place);
  const float shift = place.parameter(p.bias);
  float rates[kStates], carry[kStates] = {}, total = 0.0f;
  place.load_rates(p, rates);

  const int parts = (place.end - place.begin + kPart - 1) / kPart;
  for (int part = parts - 1; part >= 0; --part) {
    const int first = place.begin + part * kPart;
    __syncthreads();
    if (threadIdx.x < kPart) {
      const int t = first + threadIdx.x;
      places[threadIdx.x] = t < place.end ? place_of(p, t) : 0;
    }
    stage_states<kPart, kWidth>(p, p.C, place, first, place.end, C);
    __syncthreads();

    const int count = place.valid ? place.end - first - own : 0;
    int where[kOwn];
    read_places(places + own, where);
    uint32_t delta_bits[kOwn], gate_bits[kOwn], grad_bits[kOwn];
    float raw[kOwn], dt[kOwn], grad_y[kOwn];
    fetch(delta, where, count, delta_bits);
    fetch(by_out, where, count, grad_bits);
    if (p.z.data != nullptr) fetch(gate, where, count, gate_bits);
    convert(delta.dtype, delta_bits, raw);
    finish_steps(p, shift, count, raw, dt);
    convert(by_out.dtype, grad_bits, grad_y);
    if (p.z.data != nullptr) {
      float z[kOwn];
      convert(gate.dtype, gate_bits, z);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) grad_y[i] *= z[i] * sigmoid(z[i]);
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) total += dt[i];
#pragma unroll
    for (int t = kPart - 1; t >= 0; --t) {
      float weights[kStates];
      load_vector(C + t * kWidth + place.lane * kStates, weights);
      const float step = Own::get(dt, t), grad = Own::get(grad_y, t);
#pragma unroll
      for (int i = 0; i < kStates; ++i)
        carry[i] = exp2_fast(step * rates[i]) * (carry[i] + weights[i] * grad);
    }
  }
  place.store(p, p.edges, place.stretch, carry);
  total = sum_lanes<kLanes>(Own::counts(place.lane) ? total : 0.0f);
  if (place.valid && place.lane == 0) p.steps[place.row(p, place.stretch)] = total;
}

// Sums of the gradients of B and C over the channels of a block. Each thread has
// kValues of every position: those of B, then those of C. They are added up in the
// warp, as many positions at once as keep its lanes busy, and left in shared memory
// for the sum over the warps.
template <int kPart, int kStates, int kLanes>
struct WeightGradients {
  static constexpr int kWidth = kStates * kLanes;
  static constexpr int kValues = 2 * kStates;
  static constexpr int kChannels = kWarp / kLanes;  // of a warp
  static constexpr int kFull = kChannels > kValues ? kChannels / kValues : 1;
  static constexpr int kPositions = kFull < kPart ? kFull : kPart;
  static constexpr int kCount = kPositions * kValues;
  static constexpr int kOwn = kCount > kChannels ? kCount / kChannels : 1;
  static constexpr int kCopies = kChannels > kCount ? kChannels / kCount : 1;
  static constexpr int kFloats = kThreads / kWarp * kPart * 2 * kWidth;

  // Of the positions from t on; `sums` is of the block.
  static MMVSSM_DEVICE void add_up(float (&values)[kCount], int t, float* sums) {
    const int warp = threadIdx.x / kWarp, in_warp = threadIdx.x % kWarp;
    const int channel = in_warp / kLanes, lane = in_warp % kLanes;
    scatter_sums<kCount, kChannels, kLanes>(values, channel);
    if (channel % kCopies != 0) return;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int index = channel / kCopies * kOwn + i;
      const int position = t + index / kValues, rest = index % kValues;
      sums[((warp * kPart + position) * 2 + rest / kStates) * kWidth + lane * kStates +
           rest % kStates] = values[i];
    }
  }

  // Sums over the warps of the positions of a part, written to their places.
  template <typename Place>
  static MMVSSM_DEVICE void write(const ScanProblem& p, const Place& place, int count,
                                  const int* places, const float* sums) {
    const int warps = blockDim.x / kWarp;
    const int64_t row = static_cast<int64_t>(place.tile) * p.batch + place.batch;
    const int64_t sequence = (row * p.groups + place.group) * p.places;
#pragma unroll 1
    for (int i = threadIdx.x; i < kPart * 2 * kWidth; i += blockDim.x) {
      const int t = i / (2 * kWidth), which = i / kWidth % 2, n = i % kWidth;
      if (t >= count || n >= p.states || places[t] < 0) continue;
      float sum = sums[i];
      for (int warp = 1; warp < warps; ++warp)
        sum += sums[warp * kPart * 2 * kWidth + i];
      (which == 0 ? p.grad_B : p.grad_C)[(sequence + places[t]) * p.states + n] =
          sum;
    }
  }
};

// The states before the inner parts of a chunk, each thread's own, in shared memory
// where there is room: found on the way to the chunk's last part.
template <int kPart, int kStates, int kLanes>
struct InnerStates {
  static constexpr bool kThere = kStates * kLanes <= 64;
  static constexpr int kInner = kChunk / kPart - 1;
  static constexpr int kFloats = kThere ? kInner * kStates * kThreads : 1;

  static MMVSSM_DEVICE void load(const float* from, int part, float (&h)[kStates]) {
#pragma unroll
    for (int i = 0; i < kStates; ++i)
      h[i] = from[((part - 1) * kStates + i) * kThreads + threadIdx.x];
  }
  static MMVSSM_DEVICE void store(float* to, int part, const float (&h)[kStates]) {
    if constexpr (kThere) {
#pragma unroll
      for (int i = 0; i < kStates; ++i)
        to[((part - 1) * kStates + i) * kThreads + threadIdx.x] = h[i];
    }
  }
};

// All gradients; those of A, B, C, D and the bias in parts to be summed. For every
// part the states are computed once more, from the saved state before its chunk,
// and held in registers.
template <int kStates, int kLanes>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<kStates, kLanes>)
    backward_kernel(MMVSSM_PARAMETER ScanProblem p) {
  constexpr int kPart = kBackwardPart<kStates, kLanes>;
  constexpr int kWidth = kStates * kLanes;
  using Own = Share<kPart, kLanes>;
  using Weights = WeightGradients<kPart, kStates, kLanes>;
  using Inner = InnerStates<kPart, kStates, kLanes>;
  constexpr int kOwn = Own::kOwn;
  __shared__ __align__(16) float B[kPart * kWidth];
  __shared__ __align__(16) float C[kPart * kWidth];
  __shared__ float sums[Weights::kFloats];
  __shared__ float inner[Inner::kFloats];
  __shared__ int places[kPart];

  const Place<kStates, kLanes> place(p);
  const int own = Own::first(place.lane);
  const bool counts = Own::counts(place.lane), gated = p.z.data != nullptr;
  const float skip = place.parameter(p.D), shift = place.parameter(p.bias);
  float rates[kStates], carry[kStates] = {}, sum_A[kStates] = {};
  float sum_D = 0.0f, sum_bias = 0.0f;
  place.load_rates(p, rates);
  if (p.stretches > 1)
    place.load(p, p.edges, place.stretch, carry);
  else if (p.grad_last_state != nullptr)
    place.load(p, p.grad_last_state, 0, carry);

  const int parts = (place.end - place.begin + kPart - 1) / kPart;
  for (int part = parts - 1; part >= 0; --part) {
    const int last = place.begin + part * kPart;  // the part wanted begins there
    const int start = last / kChunk * kChunk;
    // The last part of a chunk is the first to be wanted.
    const bool walked =
        Inner::kThere && part < parts - 1 && (last + kPart) % kChunk != 0;
    float h[kStates] = {};
    if (walked && last > start)
      Inner::load(inner, (last - start) / kPart, h);
    else if (start > 0)
      place.load(p, p.saved, start / kChunk - 1, h);
    float history[kPart][kStates];
    float x[kOwn], raw[kOwn], dt[kOwn];
    int count = 0, where[kOwn];
    // Through the part, if need be from the saved state on.
    for (int first = walked ? last : start; first <= last; first += kPart) {
      if (!walked && first > start && first < last)
        Inner::store(inner, (first - start) / kPart, h);
      __syncthreads();
      if (threadIdx.x < kPart) {
        const int t = first + threadIdx.x;
        places[threadIdx.x] = t < place.end ? place_of(p, t) : 0;
      }
      stage_states<kPart, kWidth>(p, p.B, place, first, place.end, B);
      if (first == last)
        stage_states<kPart, kWidth>(p, p.C, place, first, place.end, C);
      __syncthreads();
      count = place.valid ? place.end - first - own : 0;
      read_places(places + own, where);
      const Row u(p.u, place, fresh_zero()), delta(p.delta, place, fresh_zero());
      uint32_t u_bits[kOwn], delta_bits[kOwn];
      fetch(u, where, count, u_bits);
      fetch(delta, where, count, delta_bits);
      convert(delta.dtype, delta_bits, raw);
      finish_steps(p, shift, count, raw, dt);
      convert(u.dtype, u_bits, x);
#pragma unroll
      for (int t = 0; t < kPart; ++t) {
        float weights[kStates];
        load_vector(B + t * kWidth + place.lane * kStates, weights);
#pragma unroll
        for (int i = 0; i < kStates; ++i) history[t][i] = h[i];
        const float step = Own::get(dt, t);
        advance(step, step * Own::get(x, t), rates, weights, h);
      }
    }

    uint32_t grad_bits[kOwn], gate_bits[kOwn];
    float grad_y[kOwn];
    const Row by_out(p.grad_out, place, fresh_zero()), gate(p.z, place, fresh_zero());
    fetch(by_out, where, count, grad_bits);
    if (gated) fetch(gate, where, count, gate_bits);
    convert(by_out.dtype, grad_bits, grad_y);
    if (gated) {
      float y[kPart], z[kOwn], grad_z[kOwn];
#pragma unroll
      for (int t = 0; t < kPart; ++t) {
        float weights[kStates];
        load_vector(C + t * kWidth + place.lane * kStates, weights);
        y[t] = 0.0f;
#pragma unroll
        for (int i = 0; i < kStates; ++i)
          y[t] += weights[i] * (t + 1 < kPart ? history[(t + 1) % kPart][i] : h[i]);
      }
      scatter_sums<kPart, kLanes, 1>(y, place.lane);
      convert(gate.dtype, gate_bits, z);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const float opened = sigmoid(z[i]);
        grad_z[i] =
            grad_y[i] * (y[i] + skip * x[i]) * opened * (1.0f + z[i] * (1.0f - opened));
        grad_y[i] *= z[i] * opened;
      }
      const Row by_gate(p.grad_z, place, fresh_zero());
      store(by_gate, where, counts ? count : 0, grad_z);
    }

    // Of the fed value dt u B, and of the exponent dt A, by position.
    float by_fed[kPart], by_exponent[kPart];
#pragma unroll
    for (int block = kPart - Weights::kPositions; block >= 0;
         block -= Weights::kPositions) {
      float by_weights[Weights::kCount];
#pragma unroll
      for (int q = Weights::kPositions - 1; q >= 0; --q) {
        const int t = block + q;
        float b[kStates], c[kStates];
        load_vector(B + t * kWidth + place.lane * kStates, b);
        load_vector(C + t * kWidth + place.lane * kStates, c);
        const float step = Own::get(dt, t), grad = Own::get(grad_y, t);
        const float feed = step * Own::get(x, t);
        by_fed[t] = by_exponent[t] = 0.0f;
#pragma unroll
        for (int i = 0; i < kStates; ++i) {
          const float grad_h = carry[i] + c[i] * grad;
          by_weights[q * Weights::kValues + i] = grad_h * feed;
          by_weights[q * Weights::kValues + kStates + i] = h[i] * grad;
          by_fed[t] += grad_h * b[i];
          h[i] = history[t][i];
          carry[i] = exp2_fast(step * rates[i]) * grad_h;
          const float grad_exponent = carry[i] * h[i];
          sum_A[i] += grad_exponent * step;
          by_exponent[t] += grad_exponent * rates[i];
        }
      }
      Weights::add_up(by_weights, block, sums);
    }
    scatter_sums<kPart, kLanes, 1>(by_fed, place.lane);
    scatter_sums<kPart, kLanes, 1>(by_exponent, place.lane);
    float grad_x[kOwn], grad_dt[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      grad_x[i] = by_fed[i] * dt[i] + skip * grad_y[i];
      grad_dt[i] = by_exponent[i] * kLn2 + by_fed[i] * x[i];
      if (p.softplus) grad_dt[i] *= sigmoid(raw[i]);
      sum_D += grad_y[i] * x[i];
      sum_bias += i < count ? grad_dt[i] : 0.0f;
    }
    const Row by_u(p.grad_u, place, fresh_zero());
    const Row by_delta(p.grad_delta, place, fresh_zero());
    if (p.add) {
      uint32_t bits[kOwn];
      float before[kOwn];
      fetch(by_u, where, count, bits);
      convert(by_u.dtype, bits, before);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) grad_x[i] += before[i];
    }
    store(by_u, where, counts ? count : 0, grad_x);
    store(by_delta, where, counts ? count : 0, grad_dt);
    __syncthreads();
    Weights::write(p, place, place.end - last, places, sums);
  }

  place.store(p, p.grad_A, place.stretch, sum_A);
  sum_D = sum_lanes<kLanes>(counts ? sum_D : 0.0f);
  sum_bias = sum_lanes<kLanes>(counts ? sum_bias : 0.0f);
  if (place.valid && place.lane == 0) {
    const int64_t row = place.row(p, place.stretch);
    if (p.grad_D != nullptr) p.grad_D[row] = sum_D;
    if (p.grad_bias != nullptr) p.grad_bias[row] = sum_bias;
  }
}

}  // namespace mmvssm
