// Depthwise convolutions of a sequence from either end with SiLU, and their gradients.
//
// A warp has CHANNELS neighbouring channels and a run of rows (positions), which it
// takes one after the other; the rows that come next are being loaded meanwhile.
// Row r and the TAPS - 1 before it give both the first direction's result at r and the
// second's, which runs from the end, at r - (TAPS - 1). So a run's part of the second
// result lies TAPS - 1 rows before the run, and the last run ends TAPS - 1 rows behind
// the sequence. Rows outside the sequence are zeros.
//
// Constants: TAPS of a convolution; X_DTYPE of the sequence and the results; CHANNELS
// of a warp; THREADS of a CTA; POSITIONS, which all its warps take in one pass of the
// loop; for the gradients A_DTYPE and B_DTYPE of the two terms that come in, and STAGES
// of rows in shared memory.
#include "vectors.h"

namespace mmvssm {

constexpr int kBefore = TAPS - 1;
constexpr int kSome = kBefore > 0 ? kBefore : 1;  // C++ has no arrays of nothing
constexpr int kGroups = THREADS / kWarp;
constexpr int kVector = CHANNELS / kWarp;
constexpr int kRows = POSITIONS / kGroups;
// Sums are of products with this: exp2 then gives a sigmoid's exponential.
constexpr float kScale = -1.4426950408889634f, kUnscale = -0.6931471805599453f;

// Sizes, and how the rows are shared out.
struct Shape {
  int32_t length, channels;
  int32_t channel_blocks;  // of CHANNELS
  int32_t rows_of_run;     // a multiple of kRows
  int32_t runs;            // of one sequence
  int32_t batch;
};

MMVSSM_DEVICE int lane() { return threadIdx.x % kWarp; }

// What a thread works on: kVector channels of the rows from `first` on.
struct Place {
  int block, batch, channel, first;
  bool valid;

  MMVSSM_DEVICE explicit Place(const Shape& shape) {
    block = blockIdx.x % shape.channel_blocks;
    const unsigned item =
        blockIdx.x / shape.channel_blocks * kGroups + threadIdx.x / kWarp;
    channel = block * CHANNELS + lane() * kVector;
    batch = item / shape.runs;
    first = item % shape.runs * shape.rows_of_run;
    valid = batch < shape.batch && channel < shape.channels;
  }
};

// Where a thread's channels are in an array, going from row to row.
class Cursor {
  char* data;
  int64_t of_row;

 public:
  MMVSSM_DEVICE Cursor(const Rows& rows, const Place& place, int bytes, int row)
      : data(rows.at(place.batch, static_cast<int64_t>(place.channel) * bytes) +
             row * rows.of_row),
        of_row(rows.of_row) {}
  MMVSSM_DEVICE char* next() {
    char* const here = data;
    data = moved(data, of_row);
    return here;
  }
};

MMVSSM_DEVICE bool is_in(int row, int length) { return row >= 0 && row < length; }

// The weights (channels, TAPS) and the bias of a direction, times kScale.
struct Taps {
  float weight[TAPS][kVector], bias[kVector];

  // Zeros for channels that there are not.
  MMVSSM_DEVICE void load(const float* weights, const float* biases, int channel,
                          int channels) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const int64_t number = channel + v;
      const bool valid = number < channels;
      bias[v] = valid ? biases[number] * kScale : 0.0f;
#pragma unroll
      for (int k = 0; k < TAPS; ++k)
        weight[k][v] = valid ? weights[number * TAPS + k] * kScale : 0.0f;
    }
  }
};

// The latest TAPS rows, the newest one last.
struct Window {
  float rows[TAPS][kVector];

  MMVSSM_DEVICE void put(int k, const Vector<X_DTYPE, kVector>& row) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) rows[k][v] = row[v];
  }

  MMVSSM_DEVICE void shift() {
#pragma unroll
    for (int k = 0; k < kBefore; ++k)
#pragma unroll
      for (int v = 0; v < kVector; ++v) rows[k][v] = rows[k + 1][v];
  }

  // The convolution of a channel, times kScale, in the newest row, or from the end in
  // the oldest one.
  template <bool kFromEnd>
  MMVSSM_DEVICE float convolve(const Taps& taps, int v) const {
    float y = taps.bias[v];
#pragma unroll
    for (int k = 0; k < TAPS; ++k)
      y += taps.weight[k][v] * rows[kFromEnd ? kBefore - k : k][v];
    return y;
  }
};

using Sequence = Vector<X_DTYPE, kVector>;

#ifndef A_DTYPE

struct ForwardDirection {
  const float *weight, *bias;
  Rows out;
};

struct ForwardArgs {
  Rows x;
  ForwardDirection directions[2];
  Shape shape;
};

// y / (1 + exp(-y)), from y times kScale.
MMVSSM_DEVICE float silu(float scaled) {
  return scaled * rcp_fast(exp2_fast(scaled) * kScale + kScale);
}

}  // namespace mmvssm

MMVSSM_KERNEL(convolve, mmvssm::ForwardArgs, THREADS, 512 / THREADS) {
  using namespace mmvssm;
  const Place place(p.shape);
  if (!place.valid) return;
  const int length = p.shape.length, last = place.first + p.shape.rows_of_run;
  int row = place.first - kBefore;
  Cursor x(p.x, place, kBytesOf<X_DTYPE>, row);
  Cursor first(p.directions[0].out, place, kBytesOf<X_DTYPE>, place.first);
  Cursor second(p.directions[1].out, place, kBytesOf<X_DTYPE>, row);
  Sequence before[kSome], next[kRows];
#pragma unroll
  for (int k = 0; k < kBefore; ++k) before[k].load(x.next(), is_in(row + k, length));
#pragma unroll
  for (int j = 0; j < kRows; ++j)
    next[j].load(x.next(), is_in(place.first + j, length));
  Taps taps[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    taps[i].load(p.directions[i].weight, p.directions[i].bias, place.channel,
                 p.shape.channels);
  Window window;
#pragma unroll
  for (int k = 0; k < kBefore; ++k) window.put(k, before[k]);
  const int end = last < length ? last : length;
#pragma unroll 1
  for (row = place.first; row < last; row += kRows) {
    const int readable = end - row, left = length - row;
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      window.put(kBefore, next[j]);
      next[j].load(x.next(), j + kRows < readable);
      float u[2][kVector];
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        u[0][v] = silu(window.convolve<false>(taps[0], v));
        u[1][v] = silu(window.convolve<true>(taps[1], v));
      }
      Sequence::of(u[0]).store(first.next(), j < left);
      Sequence::of(u[1]).store(second.next(), j - kBefore < left && row >= kBefore - j);
      window.shift();
    }
  }
}

#else  // the gradients

// Rows before a run that its gradients begin with.
constexpr int kWarmUp = (kBefore + kRows - 1) / kRows * kRows;
static_assert(STAGES >= 2, "rows are copied while others are worked on");

struct BackwardDirection {
  const float *weight, *bias;
  Rows grads[2];  // whose sum is the result's gradient
};

struct BackwardArgs {
  Rows x, grad_x;
  BackwardDirection directions[2];
  // Of the weights and, last, the bias: (parts, 2, TAPS + 1, channels), a part for the
  // CTAs of all channel blocks.
  float* sums;
  Shape shape;
};

// Rows of an array on their way to shared memory, kRows at a time, from `row` on. A
// piece of 16 bytes is a lane's; those of a channel that there is not are zeros, like
// those outside the sequence.
template <int kDtype>
class Stream {
  static constexpr int kPieces = CHANNELS * kBytesOf<kDtype> / 16;  // of a row
  static constexpr int kAtOnce = kWarp / kPieces, kTimes = kRows / kAtOnce;
  static_assert(kTimes * kAtOnce == kRows, "whole rows at once");

  char* from;
  int64_t of_row;
  int row;
  bool valid;

 public:
  static constexpr int kBytes = kRows * kPieces * 16;

  MMVSSM_DEVICE Stream(const Rows& rows, const Place& place, const Shape& shape, int row)
      : of_row(rows.of_row), row(row + lane() / kPieces) {
    const int bytes = lane() % kPieces * 16;
    const int64_t first = place.block * CHANNELS + bytes / kBytesOf<kDtype>;
    from = rows.at(place.batch, first * kBytesOf<kDtype>) + this->row * of_row;
    valid = first < shape.channels;
  }

  MMVSSM_DEVICE void copy(char* to, int end) {
#pragma unroll
    for (int i = 0; i < kTimes; ++i) {
      const int at = row + i * kAtOnce;
      copy_async_or_zero<16>(to + (i * kWarp + lane()) * 16, from + i * kAtOnce * of_row,
                             valid && at >= 0 && at < end);
    }
    from += kRows * of_row;
    row += kRows;
  }

  // What a thread's channels are in a row that was copied.
  static MMVSSM_DEVICE Vector<kDtype, kVector> get(const char* from, int row) {
    Vector<kDtype, kVector> found;
    found.read(from + (row * kWarp + lane()) * found.kBytes);
    return found;
  }
};

// All that a warp reads: x and the gradients' terms, those of the second direction
// kBefore rows earlier.
class Streams {
  Stream<X_DTYPE> x;
  Stream<A_DTYPE> first_a, second_a;
  Stream<B_DTYPE> first_b, second_b;

  static constexpr int kA = Stream<X_DTYPE>::kBytes;
  static constexpr int kB = kA + 2 * Stream<A_DTYPE>::kBytes;

 public:
  static constexpr int kBytes = kB + 2 * Stream<B_DTYPE>::kBytes;

  MMVSSM_DEVICE Streams(const BackwardArgs& p, const Place& place, int row)
      : x(p.x, place, p.shape, row),
        first_a(p.directions[0].grads[0], place, p.shape, row),
        second_a(p.directions[1].grads[0], place, p.shape, row - kBefore),
        first_b(p.directions[0].grads[1], place, p.shape, row),
        second_b(p.directions[1].grads[1], place, p.shape, row - kBefore) {}

  MMVSSM_DEVICE void copy(char* to, int end) {
    x.copy(to, end);
    first_a.copy(to + kA, end);
    second_a.copy(to + kA + first_a.kBytes, end);
    first_b.copy(to + kB, end);
    second_b.copy(to + kB + first_b.kBytes, end);
    copy_commit();
  }

  static MMVSSM_DEVICE Sequence get_x(const char* from, int row) {
    return Stream<X_DTYPE>::get(from, row);
  }
  // The gradient of a direction's result, of a channel of the thread.
  static MMVSSM_DEVICE void get_grad(const char* from, int row, int direction,
                                     float (&grad)[kVector]) {
    const auto a = Stream<A_DTYPE>::get(from + kA + direction * Stream<A_DTYPE>::kBytes, row);
    const auto b = Stream<B_DTYPE>::get(from + kB + direction * Stream<B_DTYPE>::kBytes, row);
#pragma unroll
    for (int v = 0; v < kVector; ++v) grad[v] = a[v] + b[v];
  }
};

// Of the channels of a thread.
struct Walk {
  Taps taps[2];
  Window x, grads[2];  // of the convolutions before their SiLU
  float sums[2][TAPS + 1][kVector];

  MMVSSM_DEVICE Walk() {
#pragma unroll
    for (int v = 0; v < kVector; ++v)
#pragma unroll
      for (int k = 0; k < TAPS + 1; ++k) {
        sums[0][k][v] = sums[1][k][v] = 0.0f;
        if (k < kBefore) x.rows[k][v] = grads[0].rows[k][v] = grads[1].rows[k][v] = 0.0f;
      }
  }

  // Takes in a row that was copied.
  MMVSSM_DEVICE void take(const char* from, int row) {
    x.put(kBefore, Streams::get_x(from, row));
    float grad[2][kVector];
    Streams::get_grad(from, row, 0, grad[0]);
    Streams::get_grad(from, row, 1, grad[1]);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const float y[2] = {x.convolve<false>(taps[0], v), x.convolve<true>(taps[1], v)};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float opened = rcp_fast(1.0f + exp2_fast(y[i]));
        const float slope = opened * (y[i] * (opened * -kUnscale + kUnscale) + 1.0f);
        grads[i].rows[kBefore][v] = grad[i][v] * slope;
      }
    }
  }

  // Adds the newest row to the gradients of weights and biases.
  MMVSSM_DEVICE void add_up() {
#pragma unroll
    for (int v = 0; v < kVector; ++v)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float grad = grads[i].rows[kBefore][v];
#pragma unroll
        for (int k = 0; k < TAPS; ++k)
          sums[i][k][v] += grad * x.rows[i == 1 ? kBefore - k : k][v];
        sums[i][TAPS][v] += grad;
      }
  }

  // The gradient of x, kBefore rows before the newest one.
  MMVSSM_DEVICE Sequence grad_x() const {
    float found[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      float sum = 0.0f;
#pragma unroll
      for (int k = 0; k < TAPS; ++k) {
        sum += taps[0].weight[k][v] * grads[0].rows[kBefore - k][v];
        sum += taps[1].weight[k][v] * grads[1].rows[k][v];
      }
      found[v] = sum * kUnscale;
    }
    return Sequence::of(found);
  }

  MMVSSM_DEVICE void shift() {
    x.shift();
    grads[0].shift();
    grads[1].shift();
  }
};

constexpr int kSums = 2 * (TAPS + 1);
constexpr int kSumBytes = kSums * CHANNELS * 4, kStageBytes = STAGES * Streams::kBytes;
// Of a warp, first for its rows and then for its sums.
constexpr int kSharedBytes = kSumBytes > kStageBytes ? kSumBytes : kStageBytes;

MMVSSM_DEVICE float* shared_sums(int group) {
  return reinterpret_cast<float*>(shared_memory() + group * kSharedBytes);
}

// Adds up what the warps of the CTA have, in their order.
MMVSSM_DEVICE void store_sums(const Walk& walk, float* to, const Shape& shape) {
  float* const own = shared_sums(threadIdx.x / kWarp) + lane() * kVector;
#pragma unroll
  for (int i = 0; i < kSums; ++i)
#pragma unroll
    for (int v = 0; v < kVector; ++v)
      own[i * CHANNELS + v] = walk.sums[i / (TAPS + 1)][i % (TAPS + 1)][v];
  sync_cta("sums of the warps");
  const int first = blockIdx.x % shape.channel_blocks * CHANNELS;
  const int64_t part = blockIdx.x / shape.channel_blocks;
  to += part * kSums * shape.channels;
#pragma unroll
  for (int start = 0; start < kSums * CHANNELS; start += THREADS) {
    const int i = start + threadIdx.x, channel = first + i % CHANNELS;
    if (i >= kSums * CHANNELS || channel >= shape.channels) continue;
    float sum = 0.0f;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) sum += shared_sums(group)[i];
    to[static_cast<int64_t>(i / CHANNELS) * shape.channels + channel] = sum;
  }
}

}  // namespace mmvssm

MMVSSM_KERNEL(convolve_backward, mmvssm::BackwardArgs, THREADS, 512 / THREADS) {
  using namespace mmvssm;
  const Place place(p.shape);
  Walk walk;
  if (place.batch < p.shape.batch) {
    const int length = p.shape.length, last = place.first + p.shape.rows_of_run;
    const int end = last < length ? last : length;
    // The rows before the run only give gradients that reach into it.
    int row = place.first - kWarmUp;
    Streams streams(p, place, row);
    char* const shared = shared_memory() + threadIdx.x / kWarp * kSharedBytes;
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i)
      streams.copy(shared + i * Streams::kBytes, end);
    Cursor x(p.x, place, kBytesOf<X_DTYPE>, row - kBefore);
#pragma unroll
    for (int k = 0; k < kBefore; ++k) {
      Sequence before;
      before.load(x.next(), place.valid && is_in(row - kBefore + k, length));
      walk.x.put(k, before);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
      walk.taps[i].load(p.directions[i].weight, p.directions[i].bias, place.channel,
                        p.shape.channels);
    Cursor grad_x(p.grad_x, place, kBytesOf<X_DTYPE>, place.first - kBefore);
    int stage = 0;
#pragma unroll 1
    for (; row < last; row += kRows) {
      copy_wait<STAGES - 2>();
      sync_warp("rows");
      const char* const rows = shared + stage * Streams::kBytes;
      stage = stage + 1 == STAGES ? 0 : stage + 1;
      streams.copy(shared + (stage + STAGES - 2) % STAGES * Streams::kBytes, end);
      if (rarely(row < place.first)) {
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          walk.take(rows, j);
          walk.shift();
        }
        continue;
      }
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        walk.take(rows, j);
        walk.add_up();
        walk.grad_x().store(grad_x.next(), place.valid && row >= kBefore - j &&
                                               j - kBefore < length - row);
        walk.shift();
      }
    }
    copy_wait<0>();
    sync_warp("rows are read");
  }
  store_sums(walk, p.sums, p.shape);
}

#endif
