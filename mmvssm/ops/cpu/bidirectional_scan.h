// What bidirectional_scan does around its projections, forward and backward: the
// convolutions from both ends, the two scans, and the gate.
//
// Way 0 starts at the first position, way 1 at the last one. Nothing is reversed
// in memory: a scan from the end gets arrays with negative strides of positions,
// and a convolution from the end looks ahead.
#pragma once

#include "selective_scan.h"

namespace mmvssm {
namespace MMVSSM_ISA {

static bool forward_way(const ScanPair& p, int64_t item, Arena* arena) {
  const int64_t items = ScanStrip::items(p.ways[0]);
  return forward_strip(p.ways[item / items], item % items, arena);
}

static bool backward_way(const ScanPair& p, int64_t item, Arena* arena) {
  const int64_t items = ScanStrip::items(p.ways[0]);
  return backward_strip(p.ways[item / items], item % items, arena);
}

static int32_t pair_forward(const ScanPair& p, ParallelFor parallel_for) {
  return run_items(p, 2 * ScanStrip::items(p.ways[0]), scan_floats(p.ways[0], false),
                   forward_way, parallel_for);
}

static int32_t pair_backward(const ScanPair& p, ParallelFor parallel_for) {
  return run_items(p, 2 * ScanStrip::items(p.ways[0]), scan_floats(p.ways[0], true),
                   backward_way, parallel_for);
}

// (batch, strip of channels) of arrays (batch, channel, position).
template <class Problem>
struct Item {
  Item(const Problem& p, int64_t item)
      : batch(item / strips_of(p.channels)),
        strip(strip_of(p.channels, item % strips_of(p.channels))),
        width(strip.width()),
        bytes(p.batch * p.channels * p.length * 4) {}
  StripOf of(const Array& array) const { return StripOf(array, batch, strip); }

  const int64_t batch;
  const Strip strip;
  const int64_t width, bytes;
};

static inline int64_t rows_from(int64_t start, int64_t length) {
  return length - start < kTile ? length - start : kTile;
}

// Copies the positions [begin, end) of a strip into rows, zeros where there are
// none.
static void read_padded(const StripOf& from, int64_t begin, int64_t end, int64_t length,
                        int64_t width, float* to) {
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

// Taps (tap, channel) of one way in the order of the positions they weigh, and the
// biases behind them.
static void read_taps(const ConvProblem& p, int way, const Strip& strip, float* taps) {
  const int64_t width = strip.width();
  for (int64_t c = 0; c < width; ++c) {
    const bool inside = c < strip.count;
    const float* weight = p.ways[way].weight + (strip.first + c) * p.taps;
    for (int64_t k = 0; k < p.taps; ++k)
      taps[k * width + c] = inside ? weight[way == 0 ? k : p.taps - 1 - k] : 0.0f;
    taps[p.taps * width + c] = inside ? p.ways[way].bias[strip.first + c] : 0.0f;
  }
}

// One position of the convolution of a vector of channels, whose first tap is at x.
static inline vfloat convolve(const float* x, const float* taps, int64_t count,
                              int64_t width) {
  vfloat sum = load(taps + count * width);
  for (int64_t k = 0; k < count; ++k)
    sum += load(x + k * width) * load(taps + k * width);
  return sum;
}

static bool forward_conv(const ConvProblem& p, int64_t index, Arena* arena) {
  const Item<ConvProblem> item(p, index);
  const int64_t width = item.width, halo = p.taps - 1;
  float* x = arena->take((kTile + 2 * halo) * width);
  float* out = arena->take(kTile * width);
  float* taps[2];
  for (int way = 0; way < 2; ++way) {
    taps[way] = arena->take((p.taps + 1) * width);
    read_taps(p, way, item.strip, taps[way]);
  }
  for (int64_t start = 0; start < p.length; start += kTile) {
    const int64_t rows = rows_from(start, p.length);
    read_padded(item.of(p.x), start - halo, start + rows + halo, p.length, width, x);
    for (int way = 0; way < 2; ++way) {
      const StripOf to = item.of(p.ways[way].out);
      const Target target = to.target(start, out, item.bytes);
      const float* first = x + way * halo * width;
      for (int64_t t = 0; t < rows; ++t) {
        for (int64_t c = 0; c < width; c += kLanes) {
          const vfloat sum =
              convolve(first + t * width + c, taps[way] + c, p.taps, width);
          target.put(t, c, sum * sigmoid(sum));
        }
      }
      to.write_back(start, rows, out);
    }
  }
  stream_fence();
  return false;
}

// Work of the backward convolution on a strip. Rows of a tile have `halo` more on
// either side, of which each way needs one.
class ConvGradients {
 public:
  static int64_t floats(const ConvProblem& p) {
    const int64_t width = kMaxVectors * kLanes, halo = p.taps - 1;
    return (5 * (kTile + 2 * halo) + kTile + 6 * (p.taps + 1)) * width + 16 * 16;
  }

  ConvGradients(const ConvProblem& p, int64_t index, Arena* arena)
      : p_(p), item_(p, index), width_(item_.width), halo_(p.taps - 1) {
    const int64_t all = (kTile + 2 * halo_) * width_;
    x_ = arena->take(all);
    one_ = arena->take(all);
    other_ = arena->take(all);
    grad_x_ = arena->take(kTile * width_);
    const int64_t weights = (p.taps + 1) * width_;
    for (int way = 0; way < 2; ++way) {
      grad_[way] = arena->take(all);
      taps_[way] = arena->take(weights);
      sum_[way] = arena->take(weights);
      rest_[way] = arena->take(weights);
      __builtin_memset(sum_[way], 0, weights * 4);
      __builtin_memset(rest_[way], 0, weights * 4);
      read_taps(p, way, item_.strip, taps_[way]);
    }
  }

  void run() {
    const StripOf to = item_.of(p_.grad_x);
    for (int64_t start = 0; start < p_.length; start += kTile) {
      const int64_t rows = rows_from(start, p_.length);
      read_padded(item_.of(p_.x), start - halo_, start + rows + halo_, p_.length,
                  width_, x_);
      for (int way = 0; way < 2; ++way) {
        find_gradient(way, start, rows);
        add_to_weights(way, rows);
      }
      find_grad_x(rows, to.target(start, grad_x_, item_.bytes));
      to.write_back(start, rows, grad_x_);
    }
    for (int way = 0; way < 2; ++way) write_weights(way);
    stream_fence();
  }

 private:
  // Gradient of what enters SiLU, at the tile and at the `halo` positions whose
  // convolutions reach into it.
  void find_gradient(int way, int64_t start, int64_t rows) {
    const ConvWay& w = p_.ways[way];
    const int64_t first = way == 0 ? halo_ : 0;  // row
    const int64_t begin = start - halo_ + first, count = rows + halo_;
    const int64_t low = begin < 0 ? 0 : begin;
    const int64_t high = begin + count < p_.length ? begin + count : p_.length;
    float* grad = grad_[way] + first * width_;
    __builtin_memset(grad, 0, count * width_ * 4);
    grad += (low - begin) * width_;
    // The row of x of the first tap.
    const float* x = x_ + (first - (way == 0 ? halo_ : 0) + low - begin) * width_;
    const Rows a = item_.of(w.grad_scan).read(low, high - low, one_);
    const Rows b = item_.of(w.grad_rest).read(low, high - low, other_);
    for (int64_t t = 0; t < high - low; ++t) {
      for (int64_t c = 0; c < width_; c += kLanes) {
        const vfloat sum =
            convolve(x + t * width_ + c, taps_[way] + c, p_.taps, width_);
        const vfloat open = sigmoid(sum);
        const vfloat by_out =
            load(a.data + t * a.stride + c) + load(b.data + t * b.stride + c);
        store(grad + t * width_ + c, by_out * (open * (1.0f + sum * (1.0f - open))));
      }
    }
  }

  void add_to_weights(int way, int64_t rows) {
    for (int64_t c = 0; c < width_; c += kLanes) {
      int64_t k = 0;
      for (; k + 4 <= p_.taps; k += 4) add_to_taps<4>(way, rows, k, c);
      for (; k < p_.taps; ++k) add_to_taps<1>(way, rows, k, c);
      vfloat sum = {};
      for (int64_t t = 0; t < rows; ++t)
        sum += load(grad_[way] + (t + halo_) * width_ + c);
      add(way, p_.taps, c, sum);
    }
  }

  template <int K>
  void add_to_taps(int way, int64_t rows, int64_t k, int64_t c) {
    const float* x = x_ + (way * halo_ + k) * width_ + c;
    vfloat sums[K] = {};
    for (int64_t t = 0; t < rows; ++t) {
      const vfloat g = load(grad_[way] + (t + halo_) * width_ + c);
      for (int i = 0; i < K; ++i) sums[i] += g * load(x + (t + i) * width_);
    }
    for (int i = 0; i < K; ++i) add(way, k + i, c, sums[i]);
  }

  void add(int way, int64_t tap, int64_t c, vfloat sum) {
    const int64_t at = tap * width_ + c;
    add_compensated(sum_[way] + at, rest_[way] + at, sum);
  }

  void find_grad_x(int64_t rows, const Target& to) const {
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t c = 0; c < width_; c += kLanes) {
        vfloat sum = {};
        for (int way = 0; way < 2; ++way) {
          const float* last = grad_[way] + (t + (2 - way) * halo_) * width_ + c;
          for (int64_t k = 0; k < p_.taps; ++k)
            sum += load(last - k * width_) * load(taps_[way] + k * width_ + c);
        }
        to.put(t, c, sum);
      }
    }
  }

  void write_weights(int way) const {
    const ConvWay& w = p_.ways[way];
    for (int64_t k = 0; k < p_.taps; ++k) {
      const int64_t tap = way == 0 ? k : p_.taps - 1 - k;
      write_channels(sum_[way] + k * width_, item_.strip,
                     w.grad_weight + (item_.batch * p_.taps + tap) * p_.channels);
    }
    write_channels(sum_[way] + p_.taps * width_, item_.strip,
                   w.grad_bias + item_.batch * p_.channels);
  }

  const ConvProblem& p_;
  const Item<ConvProblem> item_;
  const int64_t width_, halo_;
  float *x_, *one_, *other_, *grad_x_;
  float *grad_[2], *taps_[2], *sum_[2], *rest_[2];
};

static bool backward_conv(const ConvProblem& p, int64_t item, Arena* arena) {
  ConvGradients(p, item, arena).run();
  return false;
}

static int32_t conv_forward(const ConvProblem& p, ParallelFor parallel_for) {
  const int64_t rows = 2 * kTile + 2 * (p.taps - 1) + 2 * (p.taps + 1);
  return run_items(p, p.batch * strips_of(p.channels),
                   rows * kMaxVectors * kLanes + 4 * 16, forward_conv, parallel_for);
}

static int32_t conv_backward(const ConvProblem& p, ParallelFor parallel_for) {
  return run_items(p, p.batch * strips_of(p.channels), ConvGradients::floats(p),
                   backward_conv, parallel_for);
}

static bool forward_gate(const GateProblem& p, int64_t index, Arena* arena) {
  const Item<GateProblem> item(p, index);
  const int64_t width = item.width;
  float* buffers[4];
  for (float*& buffer : buffers) buffer = arena->take(kTile * width);
  const StripOf sums = item.of(p.y), out = item.of(p.out);
  vint nan = {};
  for (int64_t start = 0; start < p.length; start += kTile) {
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

static bool backward_gate(const GateProblem& p, int64_t index, Arena* arena) {
  const Item<GateProblem> item(p, index);
  const int64_t width = item.width;
  float* buffers[5];
  for (float*& buffer : buffers) buffer = arena->take(kTile * width);
  const StripOf grad_y = item.of(p.grad_y), grad_z = item.of(p.grad_z);
  for (int64_t start = 0; start < p.length; start += kTile) {
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

static int32_t run_gate(const GateProblem& p,
                        bool (*work)(const GateProblem&, int64_t, Arena*),
                        ParallelFor parallel_for) {
  return run_items(p, p.batch * strips_of(p.channels), 5 * kTile * kMaxVectors * kLanes,
                   work, parallel_for);
}

static int32_t gate_forward(const GateProblem& p, ParallelFor parallel_for) {
  return run_gate(p, forward_gate, parallel_for);
}

static int32_t gate_backward(const GateProblem& p, ParallelFor parallel_for) {
  return run_gate(p, backward_gate, parallel_for);
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
