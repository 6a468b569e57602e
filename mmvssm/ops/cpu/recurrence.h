// The recurrence h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = C_t h_t + D u_t
// over one chunk and one register block, forward and backward.
//
// A register block is V vectors of channels by N states, which are kept in registers
// over the chunk. The lanes of a vector are channels. Channels are independent of each
// other, so only the gradients of B and C are sums over lanes.
//
// Accuracy: a decay near 1, rounded to float32, loses most of its difference from 1,
// and with small dt a long sequence adds up such errors. So a slow decay is computed as
// a change of the state, h += (exp(dt A) - 1) h + dt B u. Where decays are so slow that
// the state is a sum over many positions, the rounding errors of its additions are kept
// too (compensated summation), also from chunk to chunk.
#pragma once

#include "channel_block.h"

namespace mmvssm {
namespace MMVSSM_ISA {

// How slow the decays of a register block are in a chunk, by x = |dt A log2(e)|:
// - kSlow: x is at most 1/2 everywhere.
// Else x is larger somewhere, and of its means over the chunk, one for each channel and
// state, the smallest is
// - kMixedSlowest: at most 1/1024;
// - kMixed: at most 1/32;
// - kFast: larger, so that rounding the decays costs less than 1e-6.
enum class Decay { kSlow, kMixedSlowest, kMixed, kFast };
constexpr float kSlow = 0.5f;
constexpr float kVerySlow = 1.0f / 32;
constexpr float kSlowest = 1.0f / 1024;

constexpr bool by_change(Decay decay) { return decay != Decay::kFast; }
constexpr bool compensated(Decay decay) {
  return decay == Decay::kSlow || decay == Decay::kMixedSlowest;
}

// What both passes read of a chunk and a register block. Pointers are to the first
// channel and the first state of the register block.
struct RegisterBlock {
  int64_t rows;
  int64_t width;  // of the channel block: stride of dt
  const float* dt;
  Rows u, B, C;
  const float* A;       // (state, channel), stride `width`
  const float* A_log2;  // A log2(e)
  const float* D;       // zeros if another register block adds it
};

enum class Write { kStore, kAdd, kStream };

template <int V>
static inline void load_vectors(const float* from, vfloat (&to)[V]) {
  for (int v = 0; v < V; ++v) to[v] = load(from + v * kLanes);
}

// h = decay h + input, computed as a change of h. `less_one` is decay - 1; `low` is the
// part of h that float32 could not hold.
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

// One position: h = decay h + input, with decay = 2^exponent. If decays are mixed, the
// state is first multiplied by the power of two nearest to the decay, without rounding;
// the rest of the decay is slow. Returns the decay if all are fast, else decay - 1.
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

// Runs the chunk from the state h (N, channel), which becomes the last state. Returns a
// mask of the lanes that found NaN.
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
        // Two sums, so that the chains of additions are half as long.
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

// What the backward pass recomputes of a chunk: states (rows + 1, N, V kLanes), the
// first of which is the one before the chunk, and decays (rows, N, V kLanes) as `step`
// returns them.
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

// The gradients of a register block, all float32: of y, which is read, of the state,
// and the others, which are added to (A is overwritten). Rows of B and C are
// `weights_stride` apart.
struct RegisterBlockGradients {
  const float* y;  // (row, channel)
  int64_t y_stride;
  float *carry, *low;  // of the state after the chunk; afterwards, before it
  float* A;            // (state, channel)
  float *dt, *dtu;     // of dt through the decay, and of dt u; (row, channel)
  float *B, *C;        // (row, state)
  int64_t weights_stride;
};

template <int V, int N, Decay kDecay>
static void run_backward(const RegisterBlock& k, const Recomputed& r,
                         const RegisterBlockGradients& g) {
  constexpr int64_t kRow = N * V * kLanes;
  // grad: gradient of the state. At the start of an iteration it is that of the next
  // position; unless sums are compensated, it has been multiplied by the decay between
  // the two. decay: that decay. low: the part of grad that float32 could not hold.
  vfloat grad[N][V], decay[N][V], low[N][V], grad_A[N][V];
  for (int n = 0; n < N; ++n) {
    load_vectors<V>(g.carry + n * k.width, grad[n]);
    load_vectors<V>(g.low + n * k.width, low[n]);
    for (int v = 0; v < V; ++v) {
      if constexpr (!compensated(kDecay)) low[n][v] = vfloat{};
      decay[n][v] = grad_A[n][v] = vfloat{};
    }
  }
  // With one state, rows are collected until all lanes' sums can be made at once.
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
        vfloat through = decay[n][v] * here;  // here, through the decay
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
