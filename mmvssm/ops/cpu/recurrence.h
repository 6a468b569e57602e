// The recurrence h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = C_t h_t + D u_t
// over one chunk, forward and backward.
//
// Lanes are channels; N states of each are registers. A vector of channels is
// independent of the others, so nothing is summed over lanes but the gradients
// of B and C.
//
// A decay near 1 rounded to float32 loses its small difference from 1, and a
// long sequence with small steps its accuracy. So where a decay is slow the state
// moves by its change, h += (exp(dt A) - 1) h + dt B u; and where it is so slow that
// many additions follow each other before the state forgets them, their rounding
// errors are carried along, from chunk to chunk, too.
#pragma once

#include "channel_block.h"

namespace mmvssm {
namespace MMVSSM_ISA {

// How a block of channels and states goes through a chunk, by |dt A log2(e)|: it is
// at most 1/2 everywhere; or above that somewhere and in the mean of a channel and
// state at most 1/1024; or at most 1/32; or neither, so that rounding decays costs
// less than 1e-6.
enum class Decay { kSlow, kMixedSlowest, kMixed, kFast };
constexpr float kSlow = 0.5f;
constexpr float kVerySlow = 1.0f / 32;
constexpr float kSlowest = 1.0f / 1024;

constexpr bool by_change(Decay decay) { return decay != Decay::kFast; }
constexpr bool compensated(Decay decay) {
  return decay == Decay::kSlow || decay == Decay::kMixedSlowest;
}

// What both passes over a chunk read. Pointers are those of the first channel
// and the first state of a block.
struct RegisterBlock {
  int64_t rows;
  int64_t width;  // channels of the block: stride of dt
  const float* dt;
  Rows u, B, C;
  const float* A;       // (state, channel), `width` apart
  const float* A_log2;  // A log2(e)
  const float* D;       // zeros where it is added elsewhere
};

enum class Write { kStore, kAdd, kStream };

template <int V>
static inline void load_vectors(const float* from, vfloat (&to)[V]) {
  for (int v = 0; v < V; ++v) to[v] = load(from + v * kLanes);
}

// h = decay h + input by the change of h, where `low` is the part of h that did not
// fit and `less_one` the decay less 1.
template <Decay kDecay>
static inline void change(vfloat less_one, vfloat input, vfloat* h, vfloat* low) {
  vfloat added = less_one * *h + input;
  if constexpr (compensated(kDecay)) {
    added += *low;
    const vfloat before = *h;
    *h = before + added;
    *low = added - (*h - before);
  } else {
    *h += added;
  }
}

// One step of the state. In a mixture the power of two nearest to the decay is taken
// out of the state first; what is left is a slow decay. Returns the decay, less 1
// unless all are fast.
template <Decay kDecay>
static inline vfloat step(vfloat exponent, vfloat input, vfloat* h, vfloat* low) {
  if constexpr (kDecay == Decay::kFast) {
    const vfloat decay = exp2(exponent);
    *h = decay * *h + input;
    return decay;
  }
  if constexpr (kDecay == Decay::kSlow) {
    const vfloat less_one = exp2m1_small(exponent);
    change<kDecay>(less_one, input, h, low);
    return less_one;
  }
  vfloat rest;
  const vfloat k = integral_part(exponent, &rest);
  const vfloat less_one = exp2m1_small(rest);
  *h = scale_by_power(*h, k);
  *low = scale_by_power(*low, k);
  change<kDecay>(less_one, input, h, low);
  return times_power_less_one(less_one, k);
}

// Runs the chunk from the state h (N, channel) and leaves the last state there;
// returns a mask of the lanes that met NaN.
template <int V, int N, Decay kDecay, Write kWrite>
static vint run_forward(const RegisterBlock& k, float* h_memory, float* low_memory,
                        float* y, int64_t y_stride) {
  vfloat h[N][V], low[N][V], D[V];
  for (int n = 0; n < N; ++n) {
    load_vectors<V>(h_memory + n * k.width, h[n]);
    load_vectors<V>(low_memory + n * k.width, low[n]);
    if constexpr (!compensated(kDecay))
      for (int v = 0; v < V; ++v) low[n][v] = vfloat{};
  }
  load_vectors<V>(k.D, D);
  vint nan = {};
  for (int64_t t = 0; t < k.rows; ++t) {
    vfloat dt[V], u[V], dtu[V], sum[V], sum2[V];
    load_vectors<V>(k.dt + t * k.width, dt);
    load_vectors<V>(k.u.data + t * k.u.stride, u);
    for (int v = 0; v < V; ++v) {
      dtu[v] = dt[v] * u[v];
      sum[v] = D[v] * u[v];
      if constexpr (kWrite == Write::kAdd)
        sum[v] += load(y + t * y_stride + v * kLanes);
      sum2[v] = vfloat{};
    }
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      const vfloat B = broadcast(k.B.data[t * k.B.stride + n]);
      const vfloat C = broadcast(k.C.data[t * k.C.stride + n]);
      for (int v = 0; v < V; ++v) {
        const vfloat A = load(k.A_log2 + n * k.width + v * kLanes);
        step<kDecay>(dt[v] * A, dtu[v] * B, &h[n][v], &low[n][v]);
        // Two sums, for two chains of additions.
        if (n % 2) {
          sum2[v] += h[n][v] * C;
        } else {
          sum[v] += h[n][v] * C;
        }
      }
    }
    for (int v = 0; v < V; ++v) {
      const vfloat result = N > 1 ? sum[v] + sum2[v] : sum[v];
      nan |= result != result;
      if constexpr (kWrite == Write::kStream) {
        stream(y + t * y_stride + v * kLanes, result);
      } else {
        store(y + t * y_stride + v * kLanes, result);
      }
    }
  }
  for (int n = 0; n < N; ++n) {
    for (int v = 0; v < V; ++v) {
      store(h_memory + n * k.width + v * kLanes, h[n][v]);
      store(low_memory + n * k.width + v * kLanes, low[n][v]);
    }
  }
  return nan;
}

// What the backward pass recomputes of a chunk: states (rows + 1, N, V kLanes),
// the first one being that before the chunk, and decays (rows, N, V kLanes) as
// `step` returns them.
struct Recomputed {
  float *states, *decays;
};

template <int V, int N, Decay kDecay>
static void recompute(const RegisterBlock& k, const float* h_memory,
                      const Recomputed& r) {
  constexpr int64_t kRow = N * V * kLanes;
  vfloat h[N][V], low[N][V];
  for (int n = 0; n < N; ++n) {
    load_vectors<V>(h_memory + n * k.width, h[n]);
    for (int v = 0; v < V; ++v) {
      low[n][v] = vfloat{};
      store(r.states + (n * V + v) * kLanes, h[n][v]);
    }
  }
  for (int64_t t = 0; t < k.rows; ++t) {
    vfloat dt[V], u[V];
    load_vectors<V>(k.dt + t * k.width, dt);
    load_vectors<V>(k.u.data + t * k.u.stride, u);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      const vfloat B = broadcast(k.B.data[t * k.B.stride + n]);
      for (int v = 0; v < V; ++v) {
        const vfloat A = load(k.A_log2 + n * k.width + v * kLanes);
        const int64_t at = t * kRow + (n * V + v) * kLanes;
        store(r.decays + at,
              step<kDecay>(dt[v] * A, dt[v] * u[v] * B, &h[n][v], &low[n][v]));
        store(r.states + kRow + at, h[n][v]);
      }
    }
  }
}

// What the backward pass adds to, all of it in float32. Rows of grad_B and
// grad_C are `weights_stride` apart.
struct RegisterBlockGradients {
  const float* y;  // gradient of y, (row, channel)
  int64_t y_stride;
  float *carry, *low;  // of the state behind the chunk, then before it
  float* A;            // (state, channel)
  float *dt, *dtu;     // of dt through the decay, of dt u; (row, channel)
  float *B, *C;        // (row, state)
  int64_t weights_stride;
};

template <int V, int N, Decay kDecay>
static void run_backward(const RegisterBlock& k, const Recomputed& r,
                         const RegisterBlockGradients& g) {
  constexpr int64_t kRow = N * V * kLanes;
  // Gradient of the state, of one position later to begin with and, unless it is
  // compensated, already through the decay between the two; that decay; and the
  // part of the gradient that did not fit.
  vfloat grad[N][V], decay[N][V], low[N][V], grad_A[N][V];
  for (int n = 0; n < N; ++n) {
    load_vectors<V>(g.carry + n * k.width, grad[n]);
    load_vectors<V>(g.low + n * k.width, low[n]);
    for (int v = 0; v < V; ++v) {
      if constexpr (!compensated(kDecay)) low[n][v] = vfloat{};
      decay[n][v] = grad_A[n][v] = vfloat{};
    }
  }
  // One state: rows wait until there are enough to sum over the lanes at once.
  vfloat waiting_B[kLanes], waiting_C[kLanes];
  for (int64_t t = k.rows - 1; t >= 0; --t) {
    vfloat dt[V], u[V], y[V], grad_dt[V], grad_dtu[V];
    load_vectors<V>(k.dt + t * k.width, dt);
    load_vectors<V>(k.u.data + t * k.u.stride, u);
    load_vectors<V>(g.y + t * g.y_stride, y);
    load_vectors<V>(g.dt + t * k.width, grad_dt);
    load_vectors<V>(g.dtu + t * k.width, grad_dtu);
    vfloat sum_B[N], sum_C[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const vfloat B = broadcast(k.B.data[t * k.B.stride + n]);
      const vfloat C = broadcast(k.C.data[t * k.C.stride + n]);
      sum_B[n] = sum_C[n] = vfloat{};
      for (int v = 0; v < V; ++v) {
        const int64_t at = t * kRow + (n * V + v) * kLanes;
        if constexpr (compensated(kDecay)) {
          change<kDecay>(decay[n][v], y[v] * C, &grad[n][v], &low[n][v]);
        } else {
          grad[n][v] += y[v] * C;
        }
        const vfloat here = grad[n][v];
        decay[n][v] = load(r.decays + at);
        vfloat through = decay[n][v] * here;  // the decay
        if constexpr (by_change(kDecay)) through += here;
        if constexpr (!compensated(kDecay)) grad[n][v] = through;
        sum_C[n] += y[v] * load(r.states + kRow + at);
        sum_B[n] += here * (dt[v] * u[v]);
        grad_dtu[v] += here * B;
        const vfloat exponent = through * load(r.states + at);
        grad_dt[v] += exponent * load(k.A + n * k.width + v * kLanes);
        grad_A[n][v] += exponent * dt[v];
      }
    }
    for (int v = 0; v < V; ++v) {
      store(g.dt + t * k.width + v * kLanes, grad_dt[v]);
      store(g.dtu + t * k.width + v * kLanes, grad_dtu[v]);
    }
    if constexpr (N > 1) {
      add_lane_sums<N>(sum_B, g.B + t * g.weights_stride);
      add_lane_sums<N>(sum_C, g.C + t * g.weights_stride);
    } else {
      const int64_t slot = t % kLanes;
      waiting_B[slot] = sum_B[0];
      waiting_C[slot] = sum_C[0];
      if (slot == 0) {
        const int64_t ready = k.rows - t < kLanes ? k.rows - t : kLanes;
        for (int64_t i = ready; i < kLanes; ++i) waiting_B[i] = waiting_C[i] = vfloat{};
        float sums_B[kLanes] = {}, sums_C[kLanes] = {};
        add_lane_sums<kLanes>(waiting_B, sums_B);
        add_lane_sums<kLanes>(waiting_C, sums_C);
        for (int64_t i = 0; i < ready; ++i) {
          g.B[(t + i) * g.weights_stride] += sums_B[i];
          g.C[(t + i) * g.weights_stride] += sums_C[i];
        }
      }
    }
  }
  for (int n = 0; n < N; ++n) {
    for (int v = 0; v < V; ++v) {
      const int64_t at = n * k.width + v * kLanes;
      if constexpr (compensated(kDecay))
        change<kDecay>(decay[n][v], vfloat{}, &grad[n][v], &low[n][v]);
      store(g.carry + at, grad[n][v]);
      store(g.low + at, low[n][v]);
      store(g.A + at, grad_A[n][v]);
    }
  }
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
