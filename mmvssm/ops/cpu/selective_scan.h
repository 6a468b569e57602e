// selective_scan over (batch, group, channel block), forward and backward.
#pragma once

#include <initializer_list>
#include <new>

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

// How many neighbouring channel blocks are scanned together, chunk by chunk. Where each
// position has its channels in a row, memory is then read in the order in which it lies.
constexpr int64_t kBlocksPerBand = 16;
static inline int64_t blocks_per_band(const ScanArgs& p) {
  return p.u.stride[1] == 1 ? kBlocksPerBand : 1;
}

// Objects for the channel blocks of a band. They are never moved: they point to each
// other's parts.
template <class Scan>
class Band {
 public:
  Band(const ScanArgs& p, int64_t first, int64_t next, Arena* arena)
      : count_(next - first) {
    for (int64_t i = 0; i < count_; ++i)
      new (memory_ + i * sizeof(Scan)) Scan(p, first + i, arena);
  }
  Band(const Band&) = delete;
  Scan* begin() { return (Scan*)memory_; }
  Scan* end() { return begin() + count_; }

 private:
  alignas(Scan) char memory_[kBlocksPerBand * sizeof(Scan)];
  const int64_t count_;
};

// The buffers of a chunk in the forward pass.
struct ForwardBuffers {
  ForwardBuffers(const ScanArgs& p, Arena* arena) {
    const int64_t rows = kChunk * kMaxVectors * kLanes;
    for (float** buffer : {&dt, &u, &z, &y}) *buffer = arena->take(rows);
    for (float** buffer : {&B, &C})
      *buffer = arena->take(kChunk * padded_states(p.states));
  }
  float *dt, *u, *z, *y, *B, *C;
};

// The forward pass over one channel block, chunk by chunk.
class ForwardScan {
 public:
  ForwardScan(const ScanArgs& p, int64_t item, Arena* arena)
      : p(p),
        s(p, item),
        width(s.block.width()),
        scan(arena, p.states, s.block, false),
        bias(arena->take(width)) {
    scan.set_parameters(p.A, p.D);
    scan.set_state_to_zero();
    read_channels(p.bias, s.block, bias);
  }

  void run_chunk(int64_t start, const ForwardBuffers& b) {
    const ArrayBlock inputs(p.u, s.batch, s.block), out(p.out, s.batch, s.block);
    const int64_t bytes = p.batch * p.channels * p.length * 4;
    const int64_t rows = p.length - start < kChunk ? p.length - start : kChunk;
    if (start > 0 && p.saved != nullptr)
      scan.get_state(s.saved(start / kChunk), p.channels);
    s.read_dt(start, rows, bias, b.dt, kChunk, &inputs, 1);
    const Chunk chunk = {rows, b.dt, inputs.read(start, rows, b.u),
                         s.read_B(start, rows, scan.padded(), b.B),
                         s.read_C(start, rows, scan.padded(), b.C)};
    const Target to = out.target(start, b.y, bytes);
    if (p.z.data != nullptr) {
      scan.forward(chunk, Write::kStore, b.y, width);
      const Rows gate = ArrayBlock(p.z, s.batch, s.block).read(start, rows, b.z);
      for (int64_t t = 0; t < rows; ++t) {
        for (int64_t c = 0; c < width; c += kLanes) {
          const vfloat x = load(gate.data + t * gate.stride + c);
          const vfloat gated = load(b.y + t * width + c) * (x * sigmoid(x));
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
    out.write_back(start, rows, b.y);
  }

  // Writes the last state; returns whether NaN was found.
  bool finish() {
    for (int64_t n = 0; n < p.states; ++n) {
      for (int64_t c = 0; c < s.block.count; ++c)
        p.last_state[(s.batch * p.channels + s.block.first + c) * p.states + n] =
            scan.state[n * width + c];
      for (int64_t c = 0; c < width; c += kLanes) {
        const vfloat h = load(scan.state + n * width + c);
        nan |= h != h;
      }
    }
    return any(nan);
  }

 private:
  const ScanArgs& p;
  const ScanBlock s;
  const int64_t width;
  ChannelBlockRecurrence scan;
  float* bias;
  vint nan = {};
};

static bool forward_scans(const ScanArgs& p, int64_t first, int64_t next,
                          Arena* arena) {
  const ForwardBuffers buffers(p, arena);
  Band<ForwardScan> band(p, first, next, arena);
  for (int64_t start = 0; start < p.length; start += kChunk)
    for (ForwardScan& scan : band) scan.run_chunk(start, buffers);
  bool found_nan = false;
  for (ForwardScan& scan : band) found_nan |= scan.finish();
  stream_fence();
  return found_nan;
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

// The buffers of a chunk in the backward pass.
struct BackwardBuffers {
  BackwardBuffers(const ScanArgs& p, Arena* arena)
      : recomputed(ChannelBlockRecurrence::take_recomputed(arena, p.states)) {
    const int64_t width = kMaxVectors * kLanes, padded = padded_states(p.states);
    before = arena->take(padded * width);
    for (float** buffer : {&dt, &u, &z, &y, &grad_out, &grad_y, &grad_dt, &grad_dtu})
      *buffer = arena->take(kChunk * width);
    for (float** buffer : {&B, &C, &grad_B, &grad_C})
      *buffer = arena->take(kChunk * padded);
  }
  const Recomputed recomputed;
  float *before, *dt, *u, *z, *y, *grad_out, *grad_y, *grad_dt, *grad_dtu;
  float *B, *C, *grad_B, *grad_C;
};

// The backward pass over one channel block, chunk by chunk from the last one.
class BackwardScan {
 public:
  BackwardScan(const ScanArgs& p, int64_t item, Arena* arena)
      : p(p),
        s(p, item),
        width(s.block.width()),
        scan(arena, p.states, s.block, true),
        bias(arena->take(width)),
        grad_D(arena, width),
        grad_bias(arena, width) {
    scan.set_parameters(p.A, p.D);
    scan.set_gradients_to_zero();
    scan.set_state_to_zero();
    if (p.grad_last_state != nullptr) {
      const float* from = p.grad_last_state + s.batch * p.channels * p.states;
      for (int64_t n = 0; n < p.states; ++n)
        for (int64_t c = 0; c < s.block.count; ++c)
          scan.state[n * width + c] = from[(s.block.first + c) * p.states + n];
    }
    read_channels(p.bias, s.block, bias);
  }

  void run_chunk(int64_t index, const BackwardBuffers& b) {
    const ArrayBlock inputs(p.u, s.batch, s.block), gates(p.z, s.batch, s.block),
        grads(p.grad_out, s.batch, s.block);
    const ArrayBlock to_u(p.grad_u, s.batch, s.block),
        to_delta(p.grad_delta, s.batch, s.block), to_z(p.grad_z, s.batch, s.block);
    const int64_t bytes = p.batch * p.channels * p.length * 4;
    const ArrayBlock soon[] = {inputs, grads};
    const int64_t padded = scan.padded();
    const int64_t start = index * kChunk;
    const int64_t rows = p.length - start < kChunk ? p.length - start : kChunk;
    s.read_dt(start, rows, bias, b.dt, -kChunk, soon, 2);
    const Chunk chunk = {rows, b.dt, inputs.read(start, rows, b.u),
                         s.read_B(start, rows, padded, b.B),
                         s.read_C(start, rows, padded, b.C)};
    scan.read_state(s.saved(index), s.saved(index - 1), p.channels, b.before);
    const Rows g = grads.read(start, rows, b.grad_out);
    Rows gate = {}, by_y = g;
    if (p.z.data != nullptr) {
      gate = gates.read(start, rows, b.z);
      by_y = {b.grad_y, width};
      for (int64_t t = 0; t < rows; ++t) {
        for (int64_t c = 0; c < width; c += kLanes) {
          const vfloat x = load(gate.data + t * gate.stride + c);
          store(b.grad_y + t * width + c,
                load(g.data + t * g.stride + c) * (x * sigmoid(x)));
          store(b.y + t * width + c,
                load(scan.D() + c) * load(chunk.u.data + t * chunk.u.stride + c));
        }
      }
    }
    __builtin_memset(b.grad_dt, 0, rows * width * 4);
    __builtin_memset(b.grad_dtu, 0, rows * width * 4);
    __builtin_memset(b.grad_B, 0, rows * padded * 4);
    __builtin_memset(b.grad_C, 0, rows * padded * 4);
    scan.backward(
        chunk, b.before,
        {by_y.data, by_y.stride, b.grad_dt, b.grad_dtu, b.grad_B, b.grad_C, padded},
        b.recomputed, p.z.data != nullptr ? b.y : nullptr);
    finish_chunk(chunk, width, scan.D(), by_y, p.softplus, b.grad_dtu, b.grad_dt,
                 to_u.target(start, b.grad_dtu, bytes),
                 to_delta.target(start, b.grad_dt, bytes), grad_D, grad_bias);
    to_u.write_back(start, rows, b.grad_dtu);
    to_delta.write_back(start, rows, b.grad_dt);
    if (p.z.data != nullptr) {
      const Target to = to_z.target(start, b.y, bytes);
      for (int64_t t = 0; t < rows; ++t) {
        for (int64_t c = 0; c < width; c += kLanes) {
          const vfloat x = load(gate.data + t * gate.stride + c);
          const vfloat open = sigmoid(x);
          to.put(t, c,
                 load(g.data + t * g.stride + c) * load(b.y + t * width + c) *
                     (open * (1.0f + x * (1.0f - open))));
        }
      }
      to_z.write_back(start, rows, b.y);
    }
    const int64_t at =
        ((s.index * p.batch + s.batch) * p.groups + s.group) * p.length * p.states +
        start * p.states;
    copy_rows(b.grad_B, padded, rows, p.states, p.grad_B + at);
    copy_rows(b.grad_C, padded, rows, p.states, p.grad_C + at);
  }

  // Writes the gradients of the parameters.
  void finish() {
    scan.get_grad_A(p.grad_A + s.batch * p.states * p.channels, p.channels);
    write_channels(grad_D.sum, s.block, p.grad_D + s.batch * p.channels);
    write_channels(grad_bias.sum, s.block, p.grad_bias + s.batch * p.channels);
  }

 private:
  const ScanArgs& p;
  const ScanBlock s;
  const int64_t width;
  ChannelBlockRecurrence scan;
  float* bias;
  const ChannelSum grad_D, grad_bias;
};

// Returns false: only the forward pass looks for NaN.
static bool backward_scans(const ScanArgs& p, int64_t first, int64_t next,
                           Arena* arena) {
  const BackwardBuffers buffers(p, arena);
  Band<BackwardScan> band(p, first, next, arena);
  for (int64_t index = (p.length + kChunk - 1) / kChunk - 1; index >= 0; --index)
    for (BackwardScan& scan : band) scan.run_chunk(index, buffers);
  for (BackwardScan& scan : band) scan.finish();
  stream_fence();
  return false;
}

// The floats of all buffers of a band of channel blocks.
static int64_t scan_floats(const ScanArgs& p, bool backward, int64_t blocks) {
  const int64_t width = kMaxVectors * kLanes;
  const int64_t padded = padded_states(p.states);
  const int64_t of_block =
      ChannelBlockRecurrence::floats(p.states, backward) + 5 * width + 5 * 16;
  const int64_t of_chunk =
      backward ? (8 * kChunk + padded) * width + 4 * kChunk * padded +
                     ChannelBlockRecurrence::recomputed_floats(p.states)
               : 4 * kChunk * width + 2 * kChunk * padded;
  return blocks * of_block + of_chunk + 16 * 16;
}

static int32_t scan_forward(const ScanArgs& p, const Threads& threads) {
  const int64_t blocks = blocks_per_band(p);
  return run_bands(p, ScanBlock::items(p), blocks, scan_floats(p, false, blocks),
                   forward_scans, threads);
}

static int32_t scan_backward(const ScanArgs& p, const Threads& threads) {
  const int64_t blocks = blocks_per_band(p);
  return run_bands(p, ScanBlock::items(p), blocks, scan_floats(p, true, blocks),
                   backward_scans, threads);
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
