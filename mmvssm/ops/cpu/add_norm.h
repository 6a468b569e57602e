// add_rms_norm over row blocks, forward and backward.
#pragma once

#include "channel_block_recurrence.h"

namespace mmvssm {
namespace MMVSSM_ISA {

// A row of an array (row, channel) as float32, copied to `buffer` if it must be; its
// last vector is filled up with zeros.
static const float* read_row(const Array& array, int64_t row, int64_t channels,
                             float* buffer) {
  const int64_t offset = row * array.stride[0];
  int64_t c = 0;
  if (array.dtype == kFloat32) {
    const float* from = (const float*)array.data + offset;
    if (channels % kLanes == 0) return from;
    for (; c + kLanes <= channels; c += kLanes) store(buffer + c, load(from + c));
    for (; c < channels; ++c) buffer[c] = from[c];
  } else {
    const bfloat16* from = (const bfloat16*)array.data + offset;
    for (; c + kLanes <= channels; c += kLanes) store(buffer + c, load(from + c));
    for (; c < channels; ++c) buffer[c] = to_float(from[c]);
  }
  for (; c % kLanes; ++c) buffer[c] = 0;
  return buffer;
}

static void write_row(const Array& array, int64_t row, int64_t channels,
                      const float* values) {
  const int64_t offset = row * array.stride[0];
  int64_t c = 0;
  if (array.dtype == kFloat32) {
    float* to = (float*)array.data + offset;
    for (; c + kLanes <= channels; c += kLanes) store(to + c, load(values + c));
    for (; c < channels; ++c) to[c] = values[c];
  } else {
    bfloat16* to = (bfloat16*)array.data + offset;
    for (; c + kLanes <= channels; c += kLanes) store(to + c, load(values + c));
    for (; c < channels; ++c) assign(to + c, values[c]);
  }
}

static inline float lane_sum(vfloat x) {
  float sum = 0;
  add_lane_sums<1>(&x, &sum);
  return sum;
}

// One row block, and buffers of one row each.
class NormRows {
 public:
  static int64_t items(const NormArgs& p) {
    return (p.rows + kNormRows - 1) / kNormRows;
  }
  static int64_t floats(const NormArgs& p) { return 6 * (p.channels + 2 * 16); }

  NormRows(const NormArgs& p, int64_t item, Arena* arena)
      : p(p),
        begin(item * kNormRows),
        end(begin + kNormRows < p.rows ? begin + kNormRows : p.rows),
        width((p.channels + kLanes - 1) / kLanes * kLanes) {
    for (float*& buffer : buffers) buffer = arena->take(width);
    const Array as_row = {(void*)p.weight, kFloat32, {}};
    weight = read_row(as_row, 0, p.channels, buffers[0]);
  }

  // Writes x + residual of a row to buffer 1 and returns 1 / sqrt(mean square + eps).
  // Four partial sums keep the chains of additions short.
  float add(int64_t row) const {
    const float* x = read_row(p.x, row, p.channels, buffers[1]);
    const float* residual = p.residual.data == nullptr
                                ? nullptr
                                : read_row(p.residual, row, p.channels, buffers[2]);
    vfloat squares[4] = {};
    for (int64_t c = 0, i = 0; c < width; c += kLanes, ++i) {
      vfloat total = load(x + c);
      if (residual != nullptr) total += load(residual + c);
      store(buffers[1] + c, total);
      squares[i % 4] += total * total;
    }
    const float square =
        lane_sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    return 1.0f / __builtin_sqrtf(square / p.channels + p.eps);
  }

  const NormArgs& p;
  const int64_t begin, end, width;
  const float* weight;
  float* buffers[6];
};

static bool forward_norm(const NormArgs& p, int64_t item, Arena* arena) {
  const NormRows rows(p, item, arena);
  float* total = rows.buffers[1];
  float* out = rows.buffers[2];
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const float scale = rows.add(row);
    for (int64_t c = 0; c < rows.width; c += kLanes)
      store(out + c, load(total + c) * scale * load(rows.weight + c));
    write_row(p.out, row, p.channels, out);
    if (p.total.data != nullptr) write_row(p.total, row, p.channels, total);
  }
  return false;
}

// With r = x + residual, s = 1 / sqrt(mean(r^2) + eps) and g = weight grad_out, the
// gradient of r is s g - r s^3 mean(g r), plus the gradient of the output `total`.
static bool backward_norm(const NormArgs& p, int64_t item, Arena* arena) {
  const NormRows rows(p, item, arena);
  const float* total = rows.buffers[1];
  float* grad = rows.buffers[2];
  float* by_weight = rows.buffers[5];
  __builtin_memset(by_weight, 0, rows.width * 4);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const float scale = rows.add(row);
    const float* by_out = p.grad_out.data == nullptr
                              ? nullptr
                              : read_row(p.grad_out, row, p.channels, rows.buffers[3]);
    const float* by_total =
        p.grad_total.data == nullptr
            ? nullptr
            : read_row(p.grad_total, row, p.channels, rows.buffers[4]);
    vfloat products[4] = {};
    for (int64_t c = 0, i = 0; by_out != nullptr && c < rows.width; c += kLanes, ++i) {
      const vfloat r = load(total + c), g = load(by_out + c);
      products[i % 4] += r * (g * load(rows.weight + c));
      store(by_weight + c, load(by_weight + c) + g * (r * scale));
    }
    const float product =
        lane_sum((products[0] + products[1]) + (products[2] + products[3]));
    const float along = scale * scale * (product / p.channels);
    for (int64_t c = 0; c < rows.width; c += kLanes) {
      vfloat sum = {};
      if (by_out != nullptr)
        sum = (load(by_out + c) * load(rows.weight + c) - load(total + c) * along) *
              scale;
      if (by_total != nullptr) sum += load(by_total + c);
      store(grad + c, sum);
    }
    write_row(p.grad_x, row, p.channels, grad);
    if (p.grad_residual.data != nullptr)
      write_row(p.grad_residual, row, p.channels, grad);
  }
  __builtin_memcpy(p.grad_weight + item * p.channels, by_weight, p.channels * 4);
  return false;
}

static int32_t norm_forward(const NormArgs& p, const Threads& threads) {
  return run_items(p, NormRows::items(p), NormRows::floats(p), forward_norm,
                   threads);
}

static int32_t norm_backward(const NormArgs& p, const Threads& threads) {
  return run_items(p, NormRows::items(p), NormRows::floats(p), backward_norm,
                   threads);
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
