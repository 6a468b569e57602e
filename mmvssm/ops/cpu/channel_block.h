// Channel blocks: how channels are cut into them, and how the rows of one chunk of a
// block are read and written. A row has the channels of one position, as float32.
#pragma once

#include "functions.h"
#include "kernel_args.h"

namespace mmvssm {
namespace MMVSSM_ISA {

// Arrays larger than this are written past the cache, which they would only fill.
constexpr int64_t kStreamBytes = 8 << 20;

// The most vectors of channels that a channel block has: a row is a few cache lines.
constexpr int kMaxVectors = 4;

// The channels that one thread works on at a time. The cut into channel blocks follows
// from the shapes alone, so sums over blocks have the same bits on any machine with the
// same instruction set.
struct ChannelBlock {
  int64_t first;  // channel
  int64_t count;  // channels
  int vectors;    // that hold them; the last one may not be full
  int64_t width() const { return (int64_t)vectors * kLanes; }
  bool full() const { return count == width(); }
};

static inline int64_t channel_blocks_of(int64_t channels) {
  const int64_t vectors = (channels + kLanes - 1) / kLanes;
  const int64_t blocks = (vectors + kMaxVectors - 1) / kMaxVectors;
  // An even number is easier to divide between threads.
  return blocks > 1 && blocks % 2 && blocks < vectors ? blocks + 1 : blocks;
}

static inline ChannelBlock channel_block_of(int64_t channels, int64_t index) {
  const int64_t vectors = (channels + kLanes - 1) / kLanes;
  const int64_t blocks = channel_blocks_of(channels);
  const int64_t begin = vectors * index / blocks;
  const int64_t end = vectors * (index + 1) / blocks;
  const int64_t first = begin * kLanes;
  const int64_t last = end * kLanes < channels ? end * kLanes : channels;
  return {first, last - first, (int)(end - begin)};
}

// Rows of a chunk to read, in place or in a buffer.
struct Rows {
  const float* data;
  int64_t stride;
};

// Rows of a chunk to write, past the cache if `streams`.
struct Target {
  float* data;
  int64_t stride;
  bool streams;
  void put(int64_t row, int64_t channel, vfloat x) const {
    float* to = data + row * stride + channel;
    if (streams) {
      stream(to, x);
    } else {
      store(to, x);
    }
  }
};

template <class E>
static inline void load_columns(const E* from, int64_t channel_stride, int64_t channels,
                                int64_t rows, float* to, int64_t width) {
  int64_t t = 0;
  for (; t + kLanes <= rows; t += kLanes) {
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
      vfloat square[kLanes];
      for (int i = 0; i < kLanes; ++i)
        square[i] = load(from + (c + i) * channel_stride + t);
      transpose(square);
      for (int i = 0; i < kLanes; ++i) store(to + (t + i) * width + c, square[i]);
    }
    for (; c < channels; ++c)
      for (int i = 0; i < kLanes; ++i)
        to[(t + i) * width + c] = to_float(from[c * channel_stride + t + i]);
  }
  for (; t < rows; ++t)
    for (int64_t c = 0; c < channels; ++c)
      to[t * width + c] = to_float(from[c * channel_stride + t]);
}

template <class E>
static inline void load_rows(const E* from, int64_t channel_stride, int64_t row_stride,
                             int64_t channels, int64_t rows, float* to, int64_t width) {
  if (row_stride == 1 && channel_stride != 1) {
    load_columns(from, channel_stride, channels, rows, to, width);
  } else {
    for (int64_t t = 0; t < rows; ++t) {
      const E* row = from + t * row_stride;
      int64_t c = 0;
      if (channel_stride == 1)
        for (; c + kLanes <= channels; c += kLanes)
          store(to + t * width + c, load(row + c));
      for (; c < channels; ++c) to[t * width + c] = to_float(row[c * channel_stride]);
    }
  }
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t c = channels; c < width; ++c) to[t * width + c] = 0;
}

template <class E>
static inline void store_columns(E* to, int64_t channel_stride, int64_t channels,
                                 int64_t rows, const float* from, int64_t width) {
  int64_t t = 0;
  for (; t + kLanes <= rows; t += kLanes) {
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
      vfloat square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = load(from + (t + i) * width + c);
      transpose(square);
      for (int i = 0; i < kLanes; ++i)
        store(to + (c + i) * channel_stride + t, square[i]);
    }
    for (; c < channels; ++c)
      for (int i = 0; i < kLanes; ++i)
        assign(to + c * channel_stride + t + i, from[(t + i) * width + c]);
  }
  for (; t < rows; ++t)
    for (int64_t c = 0; c < channels; ++c)
      assign(to + c * channel_stride + t, from[t * width + c]);
}

template <class E>
static inline void store_rows(E* to, int64_t channel_stride, int64_t row_stride,
                              int64_t channels, int64_t rows, const float* from,
                              int64_t width) {
  if (row_stride == 1 && channel_stride != 1) {
    store_columns(to, channel_stride, channels, rows, from, width);
    return;
  }
  for (int64_t t = 0; t < rows; ++t) {
    E* row = to + t * row_stride;
    int64_t c = 0;
    if (channel_stride == 1)
      for (; c + kLanes <= channels; c += kLanes)
        store(row + c, load(from + t * width + c));
    for (; c < channels; ++c) assign(row + c * channel_stride, from[t * width + c]);
  }
}

// A channel block of one batch element of an array (batch, channel, position).
class ArrayBlock {
 public:
  ArrayBlock(const Array& array, int64_t batch, const ChannelBlock& block)
      : array_(array),
        offset_(batch * array.stride[0] + block.first * array.stride[1]),
        block_(block) {}

  // Whether kernels may read and write the rows in place.
  bool direct() const {
    return array_.dtype == kFloat32 && array_.stride[1] == 1 && block_.full();
  }
  float* at(int64_t position) const {
    return (float*)array_.data + offset_ + position * array_.stride[2];
  }
  int64_t row_stride() const { return array_.stride[2]; }

  // Prefetches part t of `parts` of the chunk that starts at `position`.
  // (gcc drops a function that only prefetches, unless it is always inlined.)
  __attribute__((always_inline)) void prefetch(int64_t position, int64_t t,
                                               int64_t parts) const {
    const int64_t size = array_.dtype == kFloat32 ? 4 : 2;
    const char* first =
        (const char*)array_.data + (offset_ + position * array_.stride[2]) * size;
    if (array_.stride[1] == 1) {
      for (int64_t at = 0; at < block_.count * size; at += 64)
        __builtin_prefetch(first + t * array_.stride[2] * size + at);
    } else if (array_.stride[2] == 1) {
      for (int64_t c = t; c < block_.count; c += parts)
        for (int64_t at = 0; at < kChunk * size; at += 64)
          __builtin_prefetch(first + c * array_.stride[1] * size + at);
    }
  }

  // The rows from `position` on, copied to `buffer` if they must be.
  Rows read(int64_t position, int64_t rows, float* buffer) const {
    if (direct()) return {at(position), row_stride()};
    const int64_t offset = offset_ + position * array_.stride[2];
    if (array_.dtype == kFloat32) {
      load_rows((const float*)array_.data + offset, array_.stride[1], array_.stride[2],
                block_.count, rows, buffer, block_.width());
    } else {
      load_rows((const bfloat16*)array_.data + offset, array_.stride[1],
                array_.stride[2], block_.count, rows, buffer, block_.width());
    }
    return {buffer, block_.width()};
  }

  // Where to write the rows from `position` on: in place, or in `buffer`, which
  // write_back() then copies. `bytes` is the size of the whole array.
  Target target(int64_t position, float* buffer, int64_t bytes) const {
    if (!direct()) return {buffer, block_.width(), false};
    const int64_t vector = 4 * kLanes;
    const bool aligned =
        (uintptr_t)at(0) % vector == 0 && row_stride() * 4 % vector == 0;
    return {at(position), row_stride(), aligned && bytes > kStreamBytes};
  }

  void write_back(int64_t position, int64_t rows, const float* buffer) const {
    if (direct()) return;
    const int64_t offset = offset_ + position * array_.stride[2];
    if (array_.dtype == kFloat32) {
      store_rows((float*)array_.data + offset, array_.stride[1], array_.stride[2],
                 block_.count, rows, buffer, block_.width());
    } else {
      store_rows((bfloat16*)array_.data + offset, array_.stride[1], array_.stride[2],
                 block_.count, rows, buffer, block_.width());
    }
  }

 private:
  const Array& array_;
  int64_t offset_;
  const ChannelBlock& block_;
};

// Rows of `padded` states of one batch element and group of B or C (batch, group,
// state, position). States beyond the last one are zero.
static inline Rows read_weights(const Array& array, int64_t batch, int64_t group,
                                int64_t states, int64_t padded, int64_t position,
                                int64_t rows, float* buffer) {
  const int64_t offset =
      batch * array.stride[0] + group * array.stride[1] + position * array.stride[3];
  const bool is_float = array.dtype == kFloat32;
  if (is_float && states == padded && (states == 1 || array.stride[2] == 1))
    return {(const float*)array.data + offset, array.stride[3]};
  if (is_float) {
    load_rows((const float*)array.data + offset, array.stride[2], array.stride[3],
              states, rows, buffer, padded);
  } else {
    load_rows((const bfloat16*)array.data + offset, array.stride[2], array.stride[3],
              states, rows, buffer, padded);
  }
  return {buffer, padded};
}

// The channel block's part of an array (channel), then zeros up to its width.
static inline void read_channels(const float* from, const ChannelBlock& block,
                                 float* to) {
  for (int64_t c = 0; c < block.width(); ++c)
    to[c] = from != nullptr && c < block.count ? from[block.first + c] : 0.0f;
}

static inline void write_channels(const float* from, const ChannelBlock& block,
                                  float* to) {
  __builtin_memcpy(to + block.first, from, block.count * 4);
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
