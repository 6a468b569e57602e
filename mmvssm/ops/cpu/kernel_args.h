// Kernel args: what Python gives the kernels. library.py has the same structures.
#pragma once

#include <cstdint>

namespace mmvssm {

enum Dtype : int64_t { kFloat32 = 0, kBfloat16 = 1 };

// A tensor of up to four axes. Strides are in elements.
struct Array {
  void* data;
  int64_t dtype;
  int64_t stride[4];
};

// selective_scan and its gradients. Plain pointers are to contiguous float32. What a
// call does not have is null.
struct ScanArgs {
  int64_t batch, channels, length, states, groups, softplus;
  Array u, delta, z;             // (batch, channel, position)
  Array B, C;                    // (batch, group, state, position)
  const float *A, *D, *bias;     // (channel, state), (channel), (channel)
  Array out;                     // like u
  float* last_state;             // (batch, channel, state)
  float* saved;                  // (chunks - 1, batch, state, channel) or null
  Array grad_out;                // like u
  const float* grad_last_state;  // like last_state
  Array grad_u, grad_delta, grad_z;
  float *grad_B, *grad_C;              // (channel block, batch, group, position, state)
  float *grad_A, *grad_D, *grad_bias;  // (batch, ...) of A transposed, D, bias
};

// ss2d_scan and its gradients. Everything is float32. Maps are contiguous (batch,
// height, width, channel). "Order" means one row of a scan order: for each position
// of the scan a place of the map, given by its raster index.
// - routes (order): the number of VMamba's route that the order is: 0 row by row, 1
//   column by column, 2 and 3 the same from the end. -1: the table has the order.
// - table (order, position): places, -1 for a padded one. Null if no order needs it.
// - projected: dt_low_rank (rank), B and C (states each).
struct Ss2dArgs {
  int64_t batch, channels, height, width, states, rank;
  int64_t orders, positions;  // how many; positions of the longest order
  const int32_t *routes, *table;
  const float* x;
  const float* projected;    // (batch, place, order, rank + 2 states)
  int64_t projected_stride;  // from place to place
  const float* dt_weight;    // (order, channel, rank)
  const float* dt_bias;      // (order, channel)
  const float *A, *D;        // (order, channel, state), (order, channel)
  float* out;                // like x
  float* saved;              // (order, chunks - 1, batch, state, channel) or null
  const float* grad_out;
  float* grad_x;
  float* grad_projected;   // (channel block, batch, place, order, rank + 2 states)
  float* grad_dt_weight;   // (batch, order, rank, channel)
  float* grad_dt_bias;     // (batch, order, channel)
  float *grad_A, *grad_D;  // (batch, order, state, channel), (batch, order, channel)
};

// Two scans of the same shape, which run at the same time.
struct PairArgs {
  ScanArgs directions[2];
};

// The depthwise convolutions of bidirectional_scan, one from each end, each followed by
// SiLU, and their gradients. Plain pointers are to contiguous float32.
struct ConvDirection {
  const float *weight, *bias;      // (channel, tap), (channel)
  Array out;                       // (batch, channel, position)
  Array grad_scan, grad_rest;      // like out; the gradient of out is their sum
  float *grad_weight, *grad_bias;  // (batch, tap, channel), (batch, channel)
};
struct ConvArgs {
  int64_t batch, channels, length, taps;
  Array x, grad_x;  // (batch, channel, position)
  ConvDirection directions[2];
};

// out = (y + y_from_end) SiLU(z) scale, and its gradients. The forward pass leaves
// y + y_from_end in y, for the backward pass. Arrays are (batch, channel, position).
struct GateArgs {
  int64_t batch, channels, length;
  float scale;
  Array y, y_from_end, z, out;
  Array grad_out, grad_y, grad_z;
};

// add_rms_norm and its gradients. Arrays are (row, channel), channels contiguous. What
// a call does not have is null.
struct NormArgs {
  int64_t rows, channels;
  float eps;
  Array x, residual, total, out;
  const float* weight;  // (channel)
  Array grad_out, grad_total, grad_x, grad_residual;
  float* grad_weight;  // (row block, channel)
};

// linear_attention and its gradients. Channels are contiguous, and `keys` and `values`
// are those of a head.
struct AttentionArgs {
  int64_t batch, heads, length, keys, values, normalise;
  float eps;
  Array q, k, v, out;          // (batch, position, channel)
  const float *cosine, *sine;  // (position, pair of key channels) or null
  float *sums, *grad_sums;     // (batch, head, ...), see linear_attention.h
  Array grad_out, grad_q, grad_k, grad_v;
  float* parts;  // (split, batch, head, ...), memory of the kernel itself
};

// y = x W^T. Rows of x are as far apart as its stride says.
struct ProductArgs {
  int64_t rows, columns, terms;
  const float* x;  // (row, term)
  int64_t x_stride;
  const float* weight;  // (column, term)
  float* y;             // (row, column)
};

// The threads of a call. `run` calls the function for ranges that are [0, items)
// together, and returns when all of them are done.
typedef void (*RangeFunction)(int64_t begin, int64_t end, void* context);
struct Threads {
  void (*run)(void* pool, int64_t items, RangeFunction function, void* context);
  void* pool;
};

// parallel_for of torch's stable C interface.
typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain,
                               RangeFunction function, void* context);

enum Status : int32_t { kDone = 0, kFoundNaN = 1, kOutOfMemory = 2 };

// The kernels of one instruction set.
struct Kernels {
  int32_t lanes;
  int64_t (*channel_blocks)(int64_t channels);  // how many there are
  int32_t (*scan_forward)(const ScanArgs&, const Threads&);
  int32_t (*scan_backward)(const ScanArgs&, const Threads&);
  int32_t (*ss2d_forward)(const Ss2dArgs&, const Threads&);
  int32_t (*ss2d_backward)(const Ss2dArgs&, const Threads&);
  int32_t (*pair_forward)(const PairArgs&, const Threads&);
  int32_t (*pair_backward)(const PairArgs&, const Threads&);
  int32_t (*conv_forward)(const ConvArgs&, const Threads&);
  int32_t (*conv_backward)(const ConvArgs&, const Threads&);
  int32_t (*gate_forward)(const GateArgs&, const Threads&);
  int32_t (*gate_backward)(const GateArgs&, const Threads&);
  int32_t (*norm_forward)(const NormArgs&, const Threads&);
  int32_t (*norm_backward)(const NormArgs&, const Threads&);
  int32_t (*attention_forward)(const AttentionArgs&, const Threads&);
  int32_t (*attention_backward)(const AttentionArgs&, const Threads&);
  int32_t (*product)(const ProductArgs&, const Threads&);
};

// Those of 0 baseline, 1 AVX2, 2 AVX-512; null if this machine does not have it.
const Kernels* find_kernels(int32_t isa);

// Positions of a chunk: a kernel works on one chunk at a time, and the states between
// chunks are saved for the backward pass.
constexpr int64_t kChunk = 32;

// Rows of a row block of add_rms_norm: one item of its work.
constexpr int64_t kNormRows = 32;

// Columns of a panel, of which linear_attention makes its matrices.
constexpr int64_t kPanel = 32;

}  // namespace mmvssm
