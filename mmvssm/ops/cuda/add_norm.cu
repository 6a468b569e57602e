// Residual addition and RMS norm of rows, and their gradients.
//
// LANES neighbouring threads have a row, of which each holds HELD times VECTOR
// neighbouring channels; with WHOLE that is all of it. A longer row is read twice, in
// blocks of as many channels.
//
// Constants: those, THREADS of a CTA, and the dtypes of all arrays, -1 for none.
#include "vectors.h"

namespace mmvssm {

constexpr int kGroups = THREADS / LANES;  // rows at once
constexpr int kBlock = LANES * HELD * VECTOR;

// An array (row, channel) of channels that are next to each other; the stride is in
// bytes.
struct Matrix {
  char* data;
  int64_t of_row;
};

MMVSSM_DEVICE int lane() { return threadIdx.x % LANES; }
MMVSSM_DEVICE int group() { return threadIdx.x / LANES; }

// The first channel of a thread's vector number i in the block that begins at `block`.
MMVSSM_DEVICE int column(int block, int i) {
  return block + (i * LANES + lane()) * VECTOR;
}

// What a thread has of a block of a row, as it is in memory.
template <int kDtype>
struct Part {
  Vector<kDtype, VECTOR> vectors[HELD];

  MMVSSM_DEVICE void load(const Matrix& from, int64_t row, int block, int channels,
                          bool valid) {
    const char* const data = from.data + row * from.of_row;
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int64_t c = column(block, i);
      vectors[i].load(data + c * kBytesOf<kDtype>, valid && c < channels);
    }
  }
  MMVSSM_DEVICE float get(int i, int v) const { return vectors[i][v]; }
};

template <>
struct Part<kAbsent> {
  MMVSSM_DEVICE void load(const Matrix&, int64_t, int, int, bool) {}
  MMVSSM_DEVICE float get(int, int) const { return 0.0f; }
};

// Stores one of a thread's vectors of a row.
template <int kDtype>
MMVSSM_DEVICE void store(const Matrix& to, int64_t row, int c, bool valid,
                         const float (&values)[VECTOR]) {
  if constexpr (kDtype != kAbsent)
    Vector<kDtype, VECTOR>::of(values).store(
        to.data + row * to.of_row + static_cast<int64_t>(c) * kBytesOf<kDtype>, valid);
}

// Adds up each of the values over the lanes of a row. `turn` is another one than in the
// call before, 0 or 1: warps may still read what that one exchanged.
template <int kCount>
MMVSSM_DEVICE void add_lanes(float (&values)[kCount], int turn) {
  constexpr int kLanes = LANES < kWarp ? LANES : kWarp;
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2)
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += shuffle_xor(values[i], mask);
  if constexpr (LANES > kWarp) {
    constexpr int kWarps = LANES / kWarp;
    auto* const shared = reinterpret_cast<float*>(shared_memory()) +
                         (turn * kGroups + group()) * (kWarps * kCount);
    if (threadIdx.x % kWarp == 0)
#pragma unroll
      for (int i = 0; i < kCount; ++i) shared[lane() / kWarp * kCount + i] = values[i];
    sync_cta("sums of the warps of a row");
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) values[i] += shared[warp * kCount + i];
    }
  }
}

MMVSSM_DEVICE void load_weight(const float* weight, int c, int channels,
                               Vector<kFloat32, VECTOR>& to) {
  to.load(reinterpret_cast<const char*>(weight + c), c < channels);
}

#ifndef GRAD_X_DTYPE

struct ForwardArgs {
  Matrix x, residual, total, out;
  const float* weight;
  int64_t rows;
  int32_t channels;
  float mean;  // times a sum of all channels: 1 / channels
  float eps;
};

// The sum of both terms, of a block.
struct Total {
  Part<X_DTYPE> x;
  Part<RESIDUAL_DTYPE> residual;

  MMVSSM_DEVICE void load(const ForwardArgs& p, int64_t row, int block, bool valid) {
    x.load(p.x, row, block, p.channels, valid);
    residual.load(p.residual, row, block, p.channels, valid);
  }
  MMVSSM_DEVICE float get(int i, int v) const { return x.get(i, v) + residual.get(i, v); }
};

}  // namespace mmvssm

MMVSSM_KERNEL(add_norm, mmvssm::ForwardArgs, THREADS, 1024 / THREADS) {
  using namespace mmvssm;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kGroups + group();
  const bool valid = row < p.rows;
  Total total;
  float squares[1] = {0.0f};
#pragma unroll 1
  for (int block = 0; block < p.channels; block += kBlock) {
    total.load(p, row, block, valid);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int c = column(block, i);
      float values[VECTOR];
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) {
        values[v] = total.get(i, v);
        squares[0] += values[v] * values[v];
      }
      store<TOTAL_DTYPE>(p.total, row, c, valid && c < p.channels, values);
    }
    if (WHOLE) break;
  }
  add_lanes(squares, 0);
  const float inverse = inverse_root(squares[0] * p.mean + p.eps);
#pragma unroll 1
  for (int block = 0; block < p.channels; block += kBlock) {
    if (!WHOLE) total.load(p, row, block, valid);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int c = column(block, i);
      Vector<kFloat32, VECTOR> weight;
      load_weight(p.weight, c, p.channels, weight);
      float values[VECTOR];
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) values[v] = total.get(i, v) * inverse * weight[v];
      store<X_DTYPE>(p.out, row, c, valid && c < p.channels, values);
    }
    if (WHOLE) break;
  }
}

#else

struct BackwardArgs {
  Matrix x, residual, grad_out, grad_total, grad_x, grad_residual;
  const float* weight;
  float* by_weight;  // (CTAs, channels)
  int64_t rows;
  int32_t rows_of_cta;  // a multiple of kGroups
  int32_t channels;
  float mean;  // times a sum of all channels: 1 / channels
  float eps;
};

// All that is read of a block of a row.
struct Read {
  Part<X_DTYPE> x;
  Part<RESIDUAL_DTYPE> residual;
  Part<GRAD_OUT_DTYPE> grad_out;
  Part<GRAD_TOTAL_DTYPE> grad_total;

  MMVSSM_DEVICE void load(const BackwardArgs& p, int64_t row, int block, bool valid) {
    x.load(p.x, row, block, p.channels, valid);
    residual.load(p.residual, row, block, p.channels, valid);
    grad_out.load(p.grad_out, row, block, p.channels, valid);
    grad_total.load(p.grad_total, row, block, p.channels, valid);
  }
  MMVSSM_DEVICE float total(int i, int v) const {
    return x.get(i, v) + residual.get(i, v);
  }
};

// Of a row: the sums of squares and of the products with the unit's gradient.
MMVSSM_DEVICE void add_products(const BackwardArgs& p, const Read& read, int block,
                                float (&sums)[2]) {
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    Vector<kFloat32, VECTOR> weight;
    load_weight(p.weight + fresh_zero(), column(block, i), p.channels, weight);
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
      const float total = read.total(i, v);
      sums[0] += total * total;
      sums[1] += read.grad_out.get(i, v) * weight[v] * total;
    }
  }
}

// Stores the gradients of a block, and gives each element's of the weight to `add`.
template <typename Add>
MMVSSM_DEVICE void store_gradients(const BackwardArgs& p, const Read& read, int64_t row,
                                   int block, bool valid, float inverse, float along,
                                   const Add& add) {
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    const int c = column(block, i);
    Vector<kFloat32, VECTOR> weight;
    load_weight(p.weight + fresh_zero(), c, p.channels, weight);
    float grad[VECTOR];
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
      const float grad_out = read.grad_out.get(i, v), unit = read.total(i, v) * inverse;
      grad[v] = grad_out * weight[v] * inverse + read.grad_total.get(i, v) - unit * along;
      add(i, v, grad_out * unit);
    }
    const bool stored = valid && c < p.channels;
    store<GRAD_X_DTYPE>(p.grad_x, row, c, stored, grad);
    store<GRAD_RESIDUAL_DTYPE>(p.grad_residual, row, c, stored, grad);
  }
}

}  // namespace mmvssm

MMVSSM_KERNEL(add_norm_backward, mmvssm::BackwardArgs, THREADS, 512 / THREADS) {
  using namespace mmvssm;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.rows_of_cta + group();
  float* const by_weight = p.by_weight + static_cast<int64_t>(blockIdx.x) * p.channels;
  float by_row[HELD][VECTOR];
#pragma unroll
  for (int i = 0; i < HELD; ++i)
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) by_row[i][v] = 0.0f;
#pragma unroll 1
  for (int done = 0; done < p.rows_of_cta; done += kGroups) {
    const int64_t row = first + done;
    const bool valid = row < p.rows;
    float sums[2] = {0.0f, 0.0f};
    Read read;
#pragma unroll 1
    for (int block = 0; block < p.channels; block += kBlock) {
      read.load(p, row, block, valid);
      add_products(p, read, block, sums);
      if (WHOLE) break;
    }
    add_lanes(sums, done / kGroups % 2);
    const float inverse = inverse_root(sums[0] * p.mean + p.eps);
    const float along = sums[1] * p.mean * inverse * inverse;
    if (WHOLE) {
      store_gradients(p, read, row, 0, valid, inverse, along,
                      [&](int i, int v, float grad) { by_row[i][v] += grad; });
    } else {
#pragma unroll 1
      for (int block = 0; block < p.channels; block += kBlock) {
        read.load(p, row, block, valid);
        store_gradients(p, read, row, block, valid, inverse, along,
                        [&](int i, int v, float grad) {
                          const int c = column(block, i) + v;
                          if (c < p.channels)
                            by_weight[c] = done == 0 ? grad : by_weight[c] + grad;
                        });
      }
    }
  }
  if (!WHOLE) return;
  // Rows are added up in the order of the groups that had them.
  auto* const shared = reinterpret_cast<float*>(shared_memory());
  if (LANES > kWarp) sync_cta("sums of rows are read");
#pragma unroll
  for (int i = 0; i < HELD; ++i)
#pragma unroll
    for (int v = 0; v < VECTOR; ++v)
      shared[group() * kBlock + column(0, i) + v] = by_row[i][v];
  sync_cta("gradients of the weight");
#pragma unroll
  for (int start = 0; start < kBlock; start += THREADS) {
    const int c = start + threadIdx.x;
    if (c >= p.channels) break;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) sum += shared[i * kBlock + c];
    by_weight[c] = sum;
  }
}

#endif
