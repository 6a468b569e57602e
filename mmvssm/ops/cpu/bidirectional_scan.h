// bidirectional_scan without its projections, forward and backward: the convolutions
// from both ends, the two scans, and the gate.
//
// Direction 0 starts at the first position, direction 1 at the last one. Nothing is
// reversed in memory: the scan from the end gets arrays with negative strides, and the
// convolution from the end weighs the positions that follow.
#pragma once

#include "selective_scan.h"

namespace mmvssm {
namespace MMVSSM_ISA {

static bool forward_pair(const PairArgs& p, int64_t item, Arena* arena) {
  const int64_t items = ScanBlock::items(p.directions[0]);
  const int64_t block = item % items;
  return forward_scans(p.directions[item / items], block, block + 1, arena);
}

static bool backward_pair(const PairArgs& p, int64_t item, Arena* arena) {
  const int64_t items = ScanBlock::items(p.directions[0]);
  const int64_t block = item % items;
  return backward_scans(p.directions[item / items], block, block + 1, arena);
}

static int32_t pair_forward(const PairArgs& p, const Threads& threads) {
  return run_items(p, 2 * ScanBlock::items(p.directions[0]),
                   scan_floats(p.directions[0], false, 1), forward_pair, threads);
}

static int32_t pair_backward(const PairArgs& p, const Threads& threads) {
  return run_items(p, 2 * ScanBlock::items(p.directions[0]),
                   scan_floats(p.directions[0], true, 1), backward_pair, threads);
}

// One item: a channel block of one batch element of arrays (batch, channel, position).
template <class Args>
struct Item {
  Item(const Args& p, int64_t item)
      : batch(item / channel_blocks_of(p.channels)),
        block(channel_block_of(p.channels, item % channel_blocks_of(p.channels))),
        width(block.width()),
        bytes(p.batch * p.channels * p.length * 4) {}
  ArrayBlock of(const Array& array) const { return ArrayBlock(array, batch, block); }

  const int64_t batch;
  const ChannelBlock block;
  const int64_t width, bytes;
};

static inline int64_t rows_from(int64_t start, int64_t length) {
  return length - start < kChunk ? length - start : kChunk;
}

// Copies the positions [begin, end) of a channel block to rows. Rows of positions
// outside of the sequence are zero.
static void read_padded(const ArrayBlock& from, int64_t begin, int64_t end,
                        int64_t length, int64_t width, float* to) {
  const int64_t first = begin < 0 ? 0 : begin, last = end < length ? end : length;
  float* inside = to + (first - begin) * width;
  __builtin_memset(to, 0, (first - begin) * width * 4);
  __builtin_memset(to + (last - begin) * width, 0, (end - last) * width * 4);
  const Rows rows = from.read(first, last - first, inside);
  if (rows.data == inside) return;
  for (int64_t t = 0; t < last - first; ++t)
    for (int64_t c = 0; c < width; c += kLanes)
      store(inside + t * width + c, load(rows.data + t * rows.stride + c));
}

// The taps of one direction (tap, channel), in the order of the positions that they
// weigh, and after them the biases.
static void read_taps(const ConvArgs& p, int direction, const ChannelBlock& block,
                      float* taps) {
  const int64_t width = block.width();
  for (int64_t c = 0; c < width; ++c) {
    const bool inside = c < block.count;
    const float* weight = p.directions[direction].weight + (block.first + c) * p.taps;
    for (int64_t k = 0; k < p.taps; ++k)
      taps[k * width + c] = inside ? weight[direction == 0 ? k : p.taps - 1 - k] : 0.0f;
    taps[p.taps * width + c] =
        inside ? p.directions[direction].bias[block.first + c] : 0.0f;
  }
}

// The convolution at one position, for a vector of channels. The first tap weighs x.
static inline vfloat convolve(const float* x, const float* taps, int64_t count,
                              int64_t width) {
  vfloat sum = load(taps + count * width);
  for (int64_t k = 0; k < count; ++k)
    sum += load(x + k * width) * load(taps + k * width);
  return sum;
}

static bool forward_conv(const ConvArgs& p, int64_t index, Arena* arena) {
  const Item<ConvArgs> item(p, index);
  const int64_t width = item.width, halo = p.taps - 1;
  float* x = arena->take((kChunk + 2 * halo) * width);
  float* out = arena->take(kChunk * width);
  float* taps[2];
  for (int direction = 0; direction < 2; ++direction) {
    taps[direction] = arena->take((p.taps + 1) * width);
    read_taps(p, direction, item.block, taps[direction]);
  }
  for (int64_t start = 0; start < p.length; start += kChunk) {
    const int64_t rows = rows_from(start, p.length);
    read_padded(item.of(p.x), start - halo, start + rows + halo, p.length, width, x);
    for (int direction = 0; direction < 2; ++direction) {
      const ArrayBlock to = item.of(p.directions[direction].out);
      const Target target = to.target(start, out, item.bytes);
      const float* first = x + direction * halo * width;
      for (int64_t t = 0; t < rows; ++t) {
        for (int64_t c = 0; c < width; c += kLanes) {
          const vfloat sum =
              convolve(first + t * width + c, taps[direction] + c, p.taps, width);
          target.put(t, c, sum * sigmoid(sum));
        }
      }
      to.write_back(start, rows, out);
    }
  }
  stream_fence();
  return false;
}

// The backward convolutions of one channel block. The buffers of a chunk have `halo`
// more rows at each end. Of these, the outputs that read positions of the chunk are at
// the end for direction 0 and at the start for direction 1.
class ConvGradients {
 public:
  static int64_t floats(const ConvArgs& p) {
    const int64_t width = kMaxVectors * kLanes, halo = p.taps - 1;
    return (5 * (kChunk + 2 * halo) + kChunk + 6 * (p.taps + 1)) * width + 16 * 16;
  }

  ConvGradients(const ConvArgs& p, int64_t index, Arena* arena)
      : p_(p), item_(p, index), width_(item_.width), halo_(p.taps - 1) {
    const int64_t all = (kChunk + 2 * halo_) * width_;
    x_ = arena->take(all);
    one_ = arena->take(all);
    other_ = arena->take(all);
    grad_x_ = arena->take(kChunk * width_);
    const int64_t weights = (p.taps + 1) * width_;
    for (int direction = 0; direction < 2; ++direction) {
      grad_[direction] = arena->take(all);
      taps_[direction] = arena->take(weights);
      sum_[direction] = arena->take(weights);
      rest_[direction] = arena->take(weights);
      __builtin_memset(sum_[direction], 0, weights * 4);
      __builtin_memset(rest_[direction], 0, weights * 4);
      read_taps(p, direction, item_.block, taps_[direction]);
    }
  }

  void run() {
    const ArrayBlock to = item_.of(p_.grad_x);
    for (int64_t start = 0; start < p_.length; start += kChunk) {
      const int64_t rows = rows_from(start, p_.length);
      read_padded(item_.of(p_.x), start - halo_, start + rows + halo_, p_.length,
                  width_, x_);
      for (int direction = 0; direction < 2; ++direction) {
        find_gradient(direction, start, rows);
        add_to_weights(direction, rows);
      }
      find_grad_x(rows, to.target(start, grad_x_, item_.bytes));
      to.write_back(start, rows, grad_x_);
    }
    for (int direction = 0; direction < 2; ++direction) write_weights(direction);
    stream_fence();
  }

 private:
  // The gradient of the convolutions' outputs, before SiLU: at the positions of the
  // chunk and at the `halo` others whose convolutions read positions of the chunk.
  void find_gradient(int direction, int64_t start, int64_t rows) {
    const ConvDirection& w = p_.directions[direction];
    const int64_t first = direction == 0 ? halo_ : 0;  // row
    const int64_t begin = start - halo_ + first, count = rows + halo_;
    const int64_t low = begin < 0 ? 0 : begin;
    const int64_t high = begin + count < p_.length ? begin + count : p_.length;
    float* grad = grad_[direction] + first * width_;
    __builtin_memset(grad, 0, count * width_ * 4);
    grad += (low - begin) * width_;
    // The row of x that the first tap weighs.
    const float* x = x_ + (first - (direction == 0 ? halo_ : 0) + low - begin) * width_;
    const Rows a = item_.of(w.grad_scan).read(low, high - low, one_);
    const Rows b = item_.of(w.grad_rest).read(low, high - low, other_);
    for (int64_t t = 0; t < high - low; ++t) {
      for (int64_t c = 0; c < width_; c += kLanes) {
        const vfloat sum =
            convolve(x + t * width_ + c, taps_[direction] + c, p_.taps, width_);
        const vfloat open = sigmoid(sum);
        const vfloat by_out =
            load(a.data + t * a.stride + c) + load(b.data + t * b.stride + c);
        store(grad + t * width_ + c, by_out * (open * (1.0f + sum * (1.0f - open))));
      }
    }
  }

  void add_to_weights(int direction, int64_t rows) {
    for (int64_t c = 0; c < width_; c += kLanes) {
      int64_t k = 0;
      for (; k + 4 <= p_.taps; k += 4) add_to_taps<4>(direction, rows, k, c);
      for (; k < p_.taps; ++k) add_to_taps<1>(direction, rows, k, c);
      vfloat sum = {};
      for (int64_t t = 0; t < rows; ++t)
        sum += load(grad_[direction] + (t + halo_) * width_ + c);
      add(direction, p_.taps, c, sum);
    }
  }

  template <int K>
  void add_to_taps(int direction, int64_t rows, int64_t k, int64_t c) {
    const float* x = x_ + (direction * halo_ + k) * width_ + c;
    vfloat sums[K] = {};
    for (int64_t t = 0; t < rows; ++t) {
      const vfloat g = load(grad_[direction] + (t + halo_) * width_ + c);
      for (int i = 0; i < K; ++i) sums[i] += g * load(x + (t + i) * width_);
    }
    for (int i = 0; i < K; ++i) add(direction, k + i, c, sums[i]);
  }

  void add(int direction, int64_t tap, int64_t c, vfloat sum) {
    const int64_t at = tap * width_ + c;
    add_compensated(sum_[direction] + at, rest_[direction] + at, sum);
  }

  void find_grad_x(int64_t rows, const Target& to) const {
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t c = 0; c < width_; c += kLanes) {
        vfloat sum = {};
        for (int direction = 0; direction < 2; ++direction) {
          const float* last =
              grad_[direction] + (t + (2 - direction) * halo_) * width_ + c;
          for (int64_t k = 0; k < p_.taps; ++k)
            sum += load(last - k * width_) * load(taps_[direction] + k * width_ + c);
        }
        to.put(t, c, sum);
      }
    }
  }

  void write_weights(int direction) const {
    const ConvDirection& w = p_.directions[direction];
    for (int64_t k = 0; k < p_.taps; ++k) {
      const int64_t tap = direction == 0 ? k : p_.taps - 1 - k;
      write_channels(sum_[direction] + k * width_, item_.block,
                     w.grad_weight + (item_.batch * p_.taps + tap) * p_.channels);
    }
    write_channels(sum_[direction] + p_.taps * width_, item_.block,
                   w.grad_bias + item_.batch * p_.channels);
  }

  const ConvArgs& p_;
  const Item<ConvArgs> item_;
  const int64_t width_, halo_;
  float *x_, *one_, *other_, *grad_x_;
  float *grad_[2], *taps_[2], *sum_[2], *rest_[2];
};

static bool backward_conv(const ConvArgs& p, int64_t item, Arena* arena) {
  ConvGradients(p, item, arena).run();
  return false;
}

static int32_t conv_forward(const ConvArgs& p, const Threads& threads) {
  const int64_t rows = 2 * kChunk + 2 * (p.taps - 1) + 2 * (p.taps + 1);
  return run_items(p, p.batch * channel_blocks_of(p.channels),
                   rows * kMaxVectors * kLanes + 4 * 16, forward_conv, threads);
}

static int32_t conv_backward(const ConvArgs& p, const Threads& threads) {
  return run_items(p, p.batch * channel_blocks_of(p.channels), ConvGradients::floats(p),
                   backward_conv, threads);
}

static bool forward_gate(const GateArgs& p, int64_t index, Arena* arena) {
  const Item<GateArgs> item(p, index);
  const int64_t width = item.width;
  float* buffers[4];
  for (float*& buffer : buffers) buffer = arena->take(kChunk * width);
  const ArrayBlock sums = item.of(p.y), out = item.of(p.out);
  vint nan = {};
  for (int64_t start = 0; start < p.length; start += kChunk) {
    const int64_t rows = rows_from(start, p.length);
    const Rows y = sums.read(start, rows, buffers[0]);
    const Rows more = item.of(p.y_from_end).read(start, rows, buffers[1]);
    const Rows z = item.of(p.z).read(start, rows, buffers[2]);
    const Target to = out.target(start, buffers[3], item.bytes);
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t c = 0; c < width; c += kLanes) {
        float* at = const_cast<float*>(y.data) + t * y.stride + c;
        const vfloat sum = load(at) + load(more.data + t * more.stride + c);
        const vfloat x = load(z.data + t * z.stride + c);
        const vfloat gated = sum * (x * sigmoid(x) * p.scale);
        nan |= gated != gated;
        store(at, sum);
        to.put(t, c, gated);
      }
    }
    sums.write_back(start, rows, buffers[0]);
    out.write_back(start, rows, buffers[3]);
  }
  stream_fence();
  return any(nan);
}

static bool backward_gate(const GateArgs& p, int64_t index, Arena* arena) {
  const Item<GateArgs> item(p, index);
  const int64_t width = item.width;
  float* buffers[5];
  for (float*& buffer : buffers) buffer = arena->take(kChunk * width);
  const ArrayBlock grad_y = item.of(p.grad_y), grad_z = item.of(p.grad_z);
  for (int64_t start = 0; start < p.length; start += kChunk) {
    const int64_t rows = rows_from(start, p.length);
    const Rows y = item.of(p.y).read(start, rows, buffers[0]);
    const Rows z = item.of(p.z).read(start, rows, buffers[1]);
    const Rows grad = item.of(p.grad_out).read(start, rows, buffers[2]);
    const Target to_y = grad_y.target(start, buffers[3], item.bytes);
    const Target to_z = grad_z.target(start, buffers[4], item.bytes);
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t c = 0; c < width; c += kLanes) {
        const vfloat x = load(z.data + t * z.stride + c);
        const vfloat open = sigmoid(x);
        const vfloat g = load(grad.data + t * grad.stride + c) * p.scale;
        to_y.put(t, c, g * (x * open));
        to_z.put(
            t, c,
            g * load(y.data + t * y.stride + c) * (open * (1.0f + x * (1.0f - open))));
      }
    }
    grad_y.write_back(start, rows, buffers[3]);
    grad_z.write_back(start, rows, buffers[4]);
  }
  stream_fence();
  return false;
}

static int32_t run_gate(const GateArgs& p,
                        bool (*work)(const GateArgs&, int64_t, Arena*),
                        const Threads& threads) {
  return run_items(p, p.batch * channel_blocks_of(p.channels),
                   5 * kChunk * kMaxVectors * kLanes, work, threads);
}

static int32_t gate_forward(const GateArgs& p, const Threads& threads) {
  return run_gate(p, forward_gate, threads);
}

static int32_t gate_backward(const GateArgs& p, const Threads& threads) {
  return run_gate(p, backward_gate, threads);
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
