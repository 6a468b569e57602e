// selective_scan over (batch, group, channel block), forward and backward.
#pragma once

#include "channel_block_recurrence.h"

namespace mmvssm {
namespace MMVSSM_ISA {

// One channel block of one batch element and group: which it is, and how its inputs are
// read.
class ScanBlock {
 public:
  static int64_t items(const ScanArgs& p) {
    return p.batch * p.groups * channel_blocks_of(p.channels / p.groups);
  }

  ScanBlock(const ScanArgs& p, int64_t item)
      : p(p),
        blocks(channel_blocks_of(p.channels / p.groups)),
        index(item % blocks),
        group(item / blocks % p.groups),
        batch(item / blocks / p.groups) {
    block = channel_block_of(p.channels / p.groups, index);
    block.first += group * (p.channels / p.groups);
  }

  // Computes dt (rows, width) of a chunk from delta. Meanwhile it prefetches the same
  // rows of the arrays that are read `soon`, and delta of the chunk that is `ahead` by
  // so many positions: the hardware does not predict the jumps from row to row.
  // Prefetching more would not fit: such rows share a few sets of the cache.
  void read_dt(int64_t position, int64_t rows, const float* bias, float* dt,
               int64_t ahead, const ArrayBlock* soon, int count) const {
    const int64_t width = block.width();
    const ArrayBlock from(p.delta, batch, block);
    const Rows delta = from.read(position, rows, dt);
    for (int64_t t = 0; t < rows; ++t) {
      for (int i = 0; i < count; ++i) soon[i].prefetch(position, t, rows);
      from.prefetch(position + ahead, t, rows);
      for (int64_t c = 0; c < width; c += kLanes) {
        const vfloat x = load(delta.data + t * delta.stride + c) + load(bias + c);
        store(dt + t * width + c, p.softplus ? softplus(x) : x);
      }
    }
  }

  Rows read_B(int64_t position, int64_t rows, int64_t padded, float* buffer) const {
    return read_weights(p.B, batch, group, p.states, padded, position, rows, buffer);
  }
  Rows read_C(int64_t position, int64_t rows, int64_t padded, float* buffer) const {
    return read_weights(p.C, batch, group, p.states, padded, position, rows, buffer);
  }

  // The saved state before a chunk; null for the first.
  float* saved(int64_t chunk) const {
    if (chunk <= 0) return nullptr;
    return p.saved + ((chunk - 1) * p.batch + batch) * p.states * p.channels;
  }

  const ScanArgs& p;
  const int64_t blocks, index, group, batch;
  ChannelBlock block;
};

static bool forward_scan(const ScanArgs& p, int64_t item, Arena* arena) {
  const ScanBlock s(p, item);
  const int64_t width = s.block.width();
  ChannelBlockRecurrence scan(arena, p.states, s.block, false);
  scan.set_parameters(p.A, p.D);
  scan.set_state_to_zero();
  float* bias = arena->take(width);
  read_channels(p.bias, s.block, bias);
  float* dt = arena->take(kChunk * width);
  float* u = arena->take(kChunk * width);
  float* z = arena->take(kChunk * width);
  float* y = arena->take(kChunk * width);
  float* B = arena->take(kChunk * scan.padded());
  float* C = arena->take(kChunk * scan.padded());

  const ArrayBlock inputs(p.u, s.batch, s.block), out(p.out, s.batch, s.block);
  const int64_t bytes = p.batch * p.channels * p.length * 4;

  vint nan = {};
  for (int64_t start = 0; start < p.length; start += kChunk) {
    const int64_t rows = p.length - start < kChunk ? p.length - start : kChunk;
    if (start > 0 && p.saved != nullptr)
      scan.get_state(s.saved(start / kChunk), p.channels);
    s.read_dt(start, rows, bias, dt, kChunk, &inputs, 1);
    const Chunk chunk = {rows, dt, inputs.read(start, rows, u),
                         s.read_B(start, rows, scan.padded(), B),
                         s.read_C(start, rows, scan.padded(), C)};
    const Target to = out.target(start, y, bytes);
    if (p.z.data != nullptr) {
      scan.forward(chunk, Write::kStore, y, width);
      const Rows gate = ArrayBlock(p.z, s.batch, s.block).read(start, rows, z);
      for (int64_t t = 0; t < rows; ++t) {
        for (int64_t c = 0; c < width; c += kLanes) {
          const vfloat x = load(gate.data + t * gate.stride + c);
          const vfloat gated = load(y + t * width + c) * (x * sigmoid(x));
          nan |= gated != gated;
          to.put(t, c, gated);
        }
      }
    } else {
      // With more states, the next register block adds to what this one writes.
      const bool streams = to.streams && scan.padded() <= 16;
      nan |= scan.forward(chunk, streams ? Write::kStream : Write::kStore, to.data,
                          to.stride);
    }
    out.write_back(start, rows, y);
  }
  for (int64_t n = 0; n < p.states; ++n) {
    for (int64_t c = 0; c < s.block.count; ++c)
      p.last_state[(s.batch * p.channels + s.block.first + c) * p.states + n] =
          scan.state[n * width + c];
    for (int64_t c = 0; c < width; c += kLanes) {
      const vfloat h = load(scan.state + n * width + c);
      nan |= h != h;
    }
  }
  stream_fence();
  return any(nan);
}

// Sums over positions: plain within a chunk, compensated over the chunks.
struct ChannelSum {
  float *sum, *rest;
  ChannelSum(Arena* arena, int64_t width)
      : sum(arena->take(width)), rest(arena->take(width)) {
    set_to_zero(width);
  }
  void set_to_zero(int64_t width) const {
    __builtin_memset(sum, 0, width * 4);
    __builtin_memset(rest, 0, width * 4);
  }
};

// Computes the gradients of u and delta from those of dt u (`grad_dtu`) and of dt
// through the decay (`grad_dt`). They may be written over these.
static void finish_chunk(const Chunk& chunk, int64_t width, const float* D,
                         const Rows& grad_y, bool softplus, const float* grad_dtu,
                         const float* grad_dt, const Target& to_u,
                         const Target& to_delta, const ChannelSum& grad_D,
                         const ChannelSum& grad_bias) {
  for (int64_t c = 0; c < width; c += kLanes) {
    const vfloat skip = load(D + c);
    vfloat sum_D = {}, sum_bias = {};
    for (int64_t t = 0; t < chunk.rows; ++t) {
      const vfloat dt = load(chunk.dt + t * width + c);
      const vfloat u = load(chunk.u.data + t * chunk.u.stride + c);
      const vfloat g = load(grad_y.data + t * grad_y.stride + c);
      const vfloat by_dtu = load(grad_dtu + t * width + c);
      vfloat by_dt = load(grad_dt + t * width + c) + by_dtu * u;
      if (softplus) by_dt *= one_minus_exp_of_minus(dt);
      to_delta.put(t, c, by_dt);
      to_u.put(t, c, by_dtu * dt + skip * g);
      sum_D += g * u;
      sum_bias += by_dt;
    }
    add_compensated(grad_D.sum + c, grad_D.rest + c, sum_D);
    add_compensated(grad_bias.sum + c, grad_bias.rest + c, sum_bias);
  }
}

// Copies rows with a stride to contiguous rows.
static void copy_rows(const float* from, int64_t stride, int64_t rows, int64_t columns,
                      float* to) {
  if (stride == columns) {
    __builtin_memcpy(to, from, rows * columns * 4);
  } else {
    for (int64_t t = 0; t < rows; ++t)
      __builtin_memcpy(to + t * columns, from + t * stride, columns * 4);
  }
}

// Returns false: only the forward pass looks for NaN.
static bool backward_scan(const ScanArgs& p, int64_t item, Arena* arena) {
  const ScanBlock s(p, item);
  const int64_t width = s.block.width();
  ChannelBlockRecurrence scan(arena, p.states, s.block, true);
  const int64_t padded = scan.padded();
  scan.set_parameters(p.A, p.D);
  scan.set_gradients_to_zero();
  scan.set_state_to_zero();
  if (p.grad_last_state != nullptr) {
    const float* from = p.grad_last_state + s.batch * p.channels * p.states;
    for (int64_t n = 0; n < p.states; ++n)
      for (int64_t c = 0; c < s.block.count; ++c)
        scan.state[n * width + c] = from[(s.block.first + c) * p.states + n];
  }
  float* bias = arena->take(width);
  read_channels(p.bias, s.block, bias);
  const ChannelSum grad_D(arena, width), grad_bias(arena, width);
  float* before = arena->take(padded * width);
  float* dt = arena->take(kChunk * width);
  float* u = arena->take(kChunk * width);
  float* z = arena->take(kChunk * width);
  float* y = arena->take(kChunk * width);
  float* grad_out = arena->take(kChunk * width);
  float* grad_y = arena->take(kChunk * width);
  float* grad_dt = arena->take(kChunk * width);
  float* grad_dtu = arena->take(kChunk * width);
  float* B = arena->take(kChunk * padded);
  float* C = arena->take(kChunk * padded);
  float* grad_B = arena->take(kChunk * padded);
  float* grad_C = arena->take(kChunk * padded);
  const ArrayBlock inputs(p.u, s.batch, s.block), gates(p.z, s.batch, s.block),
      grads(p.grad_out, s.batch, s.block);
  const ArrayBlock to_u(p.grad_u, s.batch, s.block),
      to_delta(p.grad_delta, s.batch, s.block), to_z(p.grad_z, s.batch, s.block);
  const int64_t bytes = p.batch * p.channels * p.length * 4;
  const ArrayBlock soon[] = {inputs, grads};

  const int64_t chunks = (p.length + kChunk - 1) / kChunk;
  for (int64_t index = chunks - 1; index >= 0; --index) {
    const int64_t start = index * kChunk;
    const int64_t rows = p.length - start < kChunk ? p.length - start : kChunk;
    s.read_dt(start, rows, bias, dt, -kChunk, soon, 2);
    const Chunk chunk = {rows, dt, inputs.read(start, rows, u),
                         s.read_B(start, rows, padded, B),
                         s.read_C(start, rows, padded, C)};
    scan.read_state(s.saved(index), s.saved(index - 1), p.channels, before);
    const Rows g = grads.read(start, rows, grad_out);
    Rows gate = {}, by_y = g;
    if (p.z.data != nullptr) {
      gate = gates.read(start, rows, z);
      by_y = {grad_y, width};
      for (int64_t t = 0; t < rows; ++t) {
        for (int64_t c = 0; c < width; c += kLanes) {
          const vfloat x = load(gate.data + t * gate.stride + c);
          store(grad_y + t * width + c,
                load(g.data + t * g.stride + c) * (x * sigmoid(x)));
          store(y + t * width + c,
                load(scan.D() + c) * load(chunk.u.data + t * chunk.u.stride + c));
        }
      }
    }
    __builtin_memset(grad_dt, 0, rows * width * 4);
    __builtin_memset(grad_dtu, 0, rows * width * 4);
    __builtin_memset(grad_B, 0, rows * padded * 4);
    __builtin_memset(grad_C, 0, rows * padded * 4);
    scan.backward(chunk, before,
                  {by_y.data, by_y.stride, grad_dt, grad_dtu, grad_B, grad_C, padded},
                  p.z.data != nullptr ? y : nullptr);
    finish_chunk(chunk, width, scan.D(), by_y, p.softplus, grad_dtu, grad_dt,
                 to_u.target(start, grad_dtu, bytes),
                 to_delta.target(start, grad_dt, bytes), grad_D, grad_bias);
    to_u.write_back(start, rows, grad_dtu);
    to_delta.write_back(start, rows, grad_dt);
    if (p.z.data != nullptr) {
      const Target to = to_z.target(start, y, bytes);
      for (int64_t t = 0; t < rows; ++t) {
        for (int64_t c = 0; c < width; c += kLanes) {
          const vfloat x = load(gate.data + t * gate.stride + c);
          const vfloat open = sigmoid(x);
          to.put(t, c,
                 load(g.data + t * g.stride + c) * load(y + t * width + c) *
                     (open * (1.0f + x * (1.0f - open))));
        }
      }
      to_z.write_back(start, rows, y);
    }
    const int64_t at =
        ((s.index * p.batch + s.batch) * p.groups + s.group) * p.length * p.states +
        start * p.states;
    copy_rows(grad_B, padded, rows, p.states, p.grad_B + at);
    copy_rows(grad_C, padded, rows, p.states, p.grad_C + at);
  }
  scan.get_grad_A(p.grad_A + s.batch * p.states * p.channels, p.channels);
  write_channels(grad_D.sum, s.block, p.grad_D + s.batch * p.channels);
  write_channels(grad_bias.sum, s.block, p.grad_bias + s.batch * p.channels);
  stream_fence();
  return false;
}

// The floats of all buffers of one item.
static int64_t scan_floats(const ScanArgs& p, bool backward) {
  const int64_t width = kMaxVectors * kLanes;
  const int64_t padded = padded_states(p.states);
  return ChannelBlockRecurrence::floats(p.states, backward) +
         (backward ? (8 * kChunk + padded + 5) * width + 4 * kChunk * padded
                   : (4 * kChunk + 1) * width + 2 * kChunk * padded) +
         32 * 16;
}

static int32_t scan_forward(const ScanArgs& p, const Threads& threads) {
  return run_items(p, ScanBlock::items(p), scan_floats(p, false), forward_scan,
                   threads);
}

static int32_t scan_backward(const ScanArgs& p, const Threads& threads) {
  return run_items(p, ScanBlock::items(p), scan_floats(p, true), backward_scan,
                   threads);
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
