// The recurrence over the chunks of one channel block: its parameters, its state, and
// the choice of a kernel for each register block.
#pragma once

#include "parallel.h"
#include "recurrence.h"

namespace mmvssm {
namespace MMVSSM_ISA {

// How many states a register block has. With one state a register block has all
// vectors of the channel block, with more states one vector and as many states as the
// registers hold.
static inline int64_t forward_state_block(int64_t states) {
  return states > 8 ? 16 : states > 4 ? 8 : states > 2 ? 4 : states;
}
static inline int64_t backward_state_block(int64_t states) {
  return states > 4 ? 8 : forward_state_block(states);
}
static inline int64_t padded_states(int64_t states) {
  const int64_t block = forward_state_block(states);
  return (states + block - 1) / block * block;
}

template <int V, int N, Decay kDecay>
static inline vint forward_as(Write write, const RegisterBlock& k, float* h, float* low,
                              float* y, int64_t y_stride) {
  switch (write) {
    case Write::kAdd:
      return run_forward<V, N, kDecay, Write::kAdd>(k, h, low, y, y_stride);
    case Write::kStream:
      return run_forward<V, N, kDecay, Write::kStream>(k, h, low, y, y_stride);
    default:
      return run_forward<V, N, kDecay, Write::kStore>(k, h, low, y, y_stride);
  }
}

template <int V, int N, Decay kDecay>
static inline void backward_with(const RegisterBlock& k, const float* h,
                                 const Recomputed& r, const RegisterBlockGradients& g) {
  recompute<V, N, kDecay>(k, h, r);
  run_backward<V, N, kDecay>(k, r, g);
}

template <int V, int N>
static inline void backward_as(Decay decay, const RegisterBlock& k, const float* h,
                               const Recomputed& r, const RegisterBlockGradients& g) {
  switch (decay) {
    case Decay::kSlow:
      return backward_with<V, N, Decay::kSlow>(k, h, r, g);
    case Decay::kMixedSlowest:
      return backward_with<V, N, Decay::kMixedSlowest>(k, h, r, g);
    case Decay::kMixed:
      return backward_with<V, N, Decay::kMixed>(k, h, r, g);
    default:
      return backward_with<V, N, Decay::kFast>(k, h, r, g);
  }
}

// y += C h, of the recomputed states of a register block with `count` states.
static inline void add_readout(const RegisterBlock& k, const float* states, int vectors,
                               int64_t count, float* y, int64_t y_stride) {
  const int64_t row = count * vectors * kLanes;
  for (int64_t t = 0; t < k.rows; ++t) {
    for (int v = 0; v < vectors; ++v) {
      vfloat sum = load(y + t * y_stride + v * kLanes);
      for (int64_t n = 0; n < count; ++n)
        sum += load(states + (t + 1) * row + (n * vectors + v) * kLanes) *
               broadcast(k.C.data[t * k.C.stride + n]);
      store(y + t * y_stride + v * kLanes, sum);
    }
  }
}

// Inputs of a chunk. dt is (row, width).
struct Chunk {
  int64_t rows;
  const float* dt;
  Rows u, B, C;
};

// Gradients of a chunk: of y, which is read, and the others, which are added to. dt and
// dtu are (row, width).
struct ChunkGradients {
  const float* y;
  int64_t y_stride;
  float *dt, *dtu, *B, *C;
  int64_t weights_stride;
};

class ChannelBlockRecurrence {
 public:
  static int64_t floats(int64_t states, bool backward) {
    const int64_t width = kMaxVectors * kLanes;
    const int64_t padded = padded_states(states);
    int64_t total = (6 * padded + 2) * width;
    if (backward) total += (2 * padded + backward_state_block(states)) * width;
    return total + 16 * 16;
  }
  // Those of the states of one chunk, which backward() recomputes.
  static int64_t recomputed_floats(int64_t states) {
    return (2 * kChunk + 1) * recomputed_row(states) + 2 * 16;
  }
  static Recomputed take_recomputed(Arena* arena, int64_t states) {
    const int64_t row = recomputed_row(states);
    return {arena->take((kChunk + 1) * row), arena->take(kChunk * row)};
  }

  ChannelBlockRecurrence(Arena* arena, int64_t states, const ChannelBlock& block,
                         bool backward)
      : states_(states),
        padded_(padded_states(states)),
        state_block_(backward ? backward_state_block(states)
                              : forward_state_block(states)),
        vectors_(block.vectors),
        together_(states == 1 ? block.vectors : 1),
        width_(block.width()),
        block_(block) {
    A_ = arena->take(padded_ * width_);
    A_log2_ = arena->take(padded_ * width_);
    fastest_ = arena->take(padded_ / state_block_ * width_);
    slowest_ = arena->take(padded_ / state_block_ * width_);
    D_ = arena->take(width_);
    zeros_ = arena->take(width_);
    state = arena->take(padded_ * width_);
    state_low_ = arena->take(padded_ * width_);
    if (backward) {
      grad_A_ = arena->take(padded_ * width_);
      grad_A_rest_ = arena->take(padded_ * width_);
      chunk_grad_A_ = arena->take(state_block_ * width_);
    }
  }

  int64_t padded() const { return padded_; }

  // A is (channel, state), of all channels. D may be null.
  void set_parameters(const float* A, const float* D) {
    __builtin_memset(A_, 0, padded_ * width_ * 4);
    load_rows(A + block_.first * states_, states_, 1, block_.count, states_, A_,
              width_);
    for (int64_t i = 0; i < padded_ * width_; ++i) A_log2_[i] = A_[i] * kLog2e;
    for (int64_t b = 0; b < padded_ / state_block_; ++b) {
      for (int64_t c = 0; c < width_; c += kLanes) {
        vfloat most = {}, least = broadcast(1e30f);
        for (int64_t n = b * state_block_; n < (b + 1) * state_block_ && n < states_;
             ++n) {
          const vfloat rate = absolute(load(A_log2_ + n * width_ + c));
          most = larger(most, rate);
          least = smaller(least, rate);
        }
        store(fastest_ + b * width_ + c, most);
        store(slowest_ + b * width_ + c, least);
      }
      // Lanes beyond the last channel must never count as slow.
      for (int64_t c = block_.count; c < width_; ++c)
        slowest_[b * width_ + c] = __builtin_nanf("");
    }
    read_channels(D, block_, D_);
    read_channels(nullptr, block_, zeros_);
  }

  void set_state_to_zero() {
    __builtin_memset(state, 0, padded_ * width_ * 4);
    __builtin_memset(state_low_, 0, padded_ * width_ * 4);
  }

  // Saves the state in an array (state, channel) of all `channels`.
  void get_state(float* to, int64_t channels) const {
    for (int64_t n = 0; n < states_; ++n)
      write_channels(state + n * width_, block_, to + n * channels);
  }
  // Reads a saved state into (padded state, width), zeros if `from` is null, and
  // prefetches the one that will be read `next`.
  void read_state(const float* from, const float* next, int64_t channels,
                  float* to) const {
    for (int64_t n = 0; n < padded_; ++n) {
      const bool there = from != nullptr && n < states_;
      read_channels(there ? from + n * channels : nullptr, block_, to + n * width_);
    }
    if (next == nullptr) return;
    for (int64_t n = 0; n < states_; ++n)
      for (int64_t c = 0; c < block_.count; c += 16)
        __builtin_prefetch(next + n * channels + block_.first + c);
  }

  vint forward(const Chunk& chunk, Write write, float* y, int64_t y_stride) {
    vint nan = {};
    for (int64_t n = 0; n < padded_; n += state_block_) {
      for (int v = 0; v < vectors_; v += together_) {
        const RegisterBlock k = register_block(chunk, n, v);
        const Write how = n == 0 ? write : Write::kAdd;
        float* h = state + n * width_ + v * kLanes;
        float* low = state_low_ + n * width_ + v * kLanes;
        float* to = y + v * kLanes;
        switch (decay_of(chunk, n, v)) {
          case Decay::kSlow:
            nan |= choose_forward<Decay::kSlow>(how, k, h, low, to, y_stride);
            break;
          case Decay::kMixedSlowest:
            nan |= choose_forward<Decay::kMixedSlowest>(how, k, h, low, to, y_stride);
            break;
          case Decay::kMixed:
            nan |= choose_forward<Decay::kMixed>(how, k, h, low, to, y_stride);
            break;
          default:
            nan |= choose_forward<Decay::kFast>(how, k, h, low, to, y_stride);
        }
      }
    }
    return nan;
  }

  // Backward through a chunk. `before` is the state before the chunk (state, width).
  // `state` is the gradient of the state after the chunk, and afterwards of the state
  // before it. The states of the chunk are recomputed in `recomputed`. If `readout` is
  // not null, C h is added to it.
  void backward(const Chunk& chunk, const float* before, const ChunkGradients& g,
                const Recomputed& recomputed, float* readout) {
    for (int64_t n = 0; n < padded_; n += state_block_) {
      for (int v = 0; v < vectors_; v += together_) {
        const RegisterBlock k = register_block(chunk, n, v);
        const int64_t c = v * kLanes;
        const RegisterBlockGradients grads = {g.y + c,
                                              g.y_stride,
                                              state + n * width_ + c,
                                              state_low_ + n * width_ + c,
                                              chunk_grad_A_ + c,
                                              g.dt + c,
                                              g.dtu + c,
                                              g.B + n,
                                              g.C + n,
                                              g.weights_stride};
        choose_backward(decay_of(chunk, n, v), k, before + n * width_ + c, recomputed,
                        grads);
        if (readout != nullptr)
          add_readout(k, recomputed.states, together_, state_block_, readout + c,
                      width_);
      }
      for (int64_t i = 0; i < state_block_ * width_; i += kLanes)
        add_compensated(grad_A_ + n * width_ + i, grad_A_rest_ + n * width_ + i,
                        load(chunk_grad_A_ + i));
    }
  }

  void set_gradients_to_zero() {
    __builtin_memset(grad_A_, 0, padded_ * width_ * 4);
    __builtin_memset(grad_A_rest_, 0, padded_ * width_ * 4);
  }
  // Writes it to an array (state, channel) of all `channels`.
  void get_grad_A(float* to, int64_t channels) const {
    for (int64_t n = 0; n < states_; ++n)
      write_channels(grad_A_ + n * width_, block_, to + n * channels);
  }

  const float* D() const { return D_; }

  float* state = nullptr;  // (padded states, width)

 private:
  static int64_t recomputed_row(int64_t states) {
    return backward_state_block(states) * (states == 1 ? kMaxVectors : 1) * kLanes;
  }

  RegisterBlock register_block(const Chunk& chunk, int64_t n, int v) const {
    const int64_t c = v * kLanes;
    return {chunk.rows,
            width_,
            chunk.dt + c,
            {chunk.u.data + c, chunk.u.stride},
            {chunk.B.data + n, chunk.B.stride},
            {chunk.C.data + n, chunk.C.stride},
            A_ + n * width_ + c,
            A_log2_ + n * width_ + c,
            (n == 0 ? D_ : zeros_) + c};
  }

  Decay decay_of(const Chunk& chunk, int64_t n, int v) const {
    vint fast = {}, slow = {}, slowest = {};
    for (int i = v; i < v + together_; ++i) {
      vfloat most = {}, sum = {};
      for (int64_t t = 0; t < chunk.rows; ++t) {
        const vfloat dt = absolute(load(chunk.dt + t * width_ + i * kLanes));
        most = larger(most, dt);
        sum += dt;
      }
      const int64_t at = n / state_block_ * width_ + i * kLanes;
      fast |= !(most * load(fastest_ + at) <= kSlow);
      const vfloat mean = sum * load(slowest_ + at) / (float)chunk.rows;
      slow |= mean <= kVerySlow;
      slowest |= mean <= kSlowest;
    }
    if (!any(fast)) return Decay::kSlow;
    return any(slowest) ? Decay::kMixedSlowest
           : any(slow)  ? Decay::kMixed
                        : Decay::kFast;
  }

  template <Decay kDecay>
  vint choose_forward(Write write, const RegisterBlock& k, float* h, float* low,
                      float* y, int64_t y_stride) const {
    switch (state_block_) {
      case 1:
        switch (together_) {
          case 1:
            return forward_as<1, 1, kDecay>(write, k, h, low, y, y_stride);
          case 2:
            return forward_as<2, 1, kDecay>(write, k, h, low, y, y_stride);
          case 3:
            return forward_as<3, 1, kDecay>(write, k, h, low, y, y_stride);
          default:
            return forward_as<4, 1, kDecay>(write, k, h, low, y, y_stride);
        }
      case 2:
        return forward_as<1, 2, kDecay>(write, k, h, low, y, y_stride);
      case 4:
        return forward_as<1, 4, kDecay>(write, k, h, low, y, y_stride);
      case 8:
        return forward_as<1, 8, kDecay>(write, k, h, low, y, y_stride);
      default:
        return forward_as<1, 16, kDecay>(write, k, h, low, y, y_stride);
    }
  }

  void choose_backward(Decay decay, const RegisterBlock& k, const float* h,
                       const Recomputed& r, const RegisterBlockGradients& g) const {
    switch (state_block_) {
      case 1:
        switch (together_) {
          case 1:
            return backward_as<1, 1>(decay, k, h, r, g);
          case 2:
            return backward_as<2, 1>(decay, k, h, r, g);
          case 3:
            return backward_as<3, 1>(decay, k, h, r, g);
          default:
            return backward_as<4, 1>(decay, k, h, r, g);
        }
      case 2:
        return backward_as<1, 2>(decay, k, h, r, g);
      case 4:
        return backward_as<1, 4>(decay, k, h, r, g);
      default:
        return backward_as<1, 8>(decay, k, h, r, g);
    }
  }

  const int64_t states_, padded_, state_block_;
  const int vectors_, together_;
  const int64_t width_;
  const ChannelBlock block_;
  float *A_, *A_log2_, *fastest_, *slowest_, *D_, *zeros_, *state_low_;
  float *grad_A_ = nullptr, *grad_A_rest_ = nullptr, *chunk_grad_A_ = nullptr;
};

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
