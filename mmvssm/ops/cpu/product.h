// Products of the channels of every position with a matrix: the projections inside of
// the scans, for onnx_library.cpp. (In PyTorch they are products of torch.) An item of
// work is a block of positions.
#pragma once

#include "channel_block.h"
#include "panels.h"
#include "parallel.h"

namespace mmvssm {
namespace MMVSSM_ISA {

// Terms of a product that are added up in registers. The panel of a matrix that has so
// many rows stays in the cache.
constexpr int64_t kTerms = 128;

// A call, and its matrix in panels (channel, column).
struct Product {
  const ProductArgs& p;
  float* panels;
};

static bool fill_panel(const Product& product, int64_t index, Arena*) {
  const ProductArgs& p = product.p;
  const int64_t first = index * kPanel;
  load_rows(p.weight + first * p.channels, p.channels, 1,
            smaller_of(kPanel, p.columns - first), p.channels,
            product.panels + first * p.channels, kPanel);
  return false;
}

// The rows of a block with neighbouring channels: in place, or copied.
static Rows rows_of(const ProductArgs& p, int64_t batch, int64_t begin, int64_t rows,
                    float* buffer) {
  const float* x =
      (const float*)p.x.data + batch * p.x.stride[0] + begin * p.x.stride[2];
  // The last tile of rows may reach behind the end of x.
  if (p.x.stride[1] == 1 && p.rows == nullptr && rows == kBlock)
    return {x, p.x.stride[2]};
  if (p.rows != nullptr && rows == kBlock)
    buffer = p.rows + (batch * p.length + begin) * p.channels;
  load_rows(x, p.x.stride[1], p.x.stride[2], p.channels, rows, buffer, p.channels);
  if (p.rows != nullptr && rows < kBlock)
    __builtin_memcpy(p.rows + (batch * p.length + begin) * p.channels, buffer,
                     rows * p.channels * 4);
  return {buffer, p.channels};
}

static bool multiply_block(const Product& product, int64_t index, Arena* arena) {
  const ProductArgs& p = product.p;
  const int64_t blocks = (p.length + kBlock - 1) / kBlock;
  const int64_t batch = index / blocks, begin = index % blocks * kBlock;
  const int64_t rows = smaller_of(kBlock, p.length - begin);
  float* buffer = arena->take(kBlock * p.channels);
  float* sums = arena->take(kBlock * kPanel);
  // Rows that the last tile has too many are multiplied, too.
  if (rows < kBlock) __builtin_memset(buffer, 0, kBlock * p.channels * 4);
  const Rows x = rows_of(p, batch, begin, rows, buffer);
  for (int64_t first = 0; first < p.columns; first += kPanel) {
    const int64_t columns = smaller_of(kPanel, p.columns - first);
    const float* panel = product.panels + first * p.channels;
    __builtin_memset(sums, 0, kBlock * kPanel * 4);
    for (int64_t t = 0; t < p.channels; t += kTerms) {
      const int64_t terms = smaller_of(kTerms, p.channels - t);
      for (int64_t n = 0; n < columns; n += kTileVectors * kLanes)
        for (int64_t i = 0; i < rows; i += kTileRows)
          multiply_tile<true>(x.data + i * x.stride + t, x.stride, 1,
                              panel + t * kPanel + n, terms, sums + i * kPanel + n);
    }
    for (int64_t i = 0; i < rows; ++i)
      __builtin_memcpy(
          p.out + (batch * p.length + begin + i) * p.columns + first,
          sums + i * kPanel, columns * 4);
  }
  return false;
}

static int32_t product(const ProductArgs& p, const Threads& threads) {
  const int64_t columns = in_panels(p.columns);
  Arena arena(columns * p.channels);
  if (arena.failed()) return kOutOfMemory;
  const Product product = {p, arena.take(columns * p.channels)};
  const int32_t status =
      run_items(product, columns / kPanel, 16, fill_panel, threads);
  if (status != kDone) return status;
  return run_items(product, p.batch * ((p.length + kBlock - 1) / kBlock),
                   kBlock * (p.channels + kPanel) + 32, multiply_block, threads);
}

// One item of a copy: a channel block of one batch element.
static bool copy_block(const CopyArgs& p, int64_t index, Arena*) {
  const int64_t blocks = channel_blocks_of(p.channels), batch = index / blocks;
  const ChannelBlock block = channel_block_of(p.channels, index % blocks);
  store_rows(p.to + (batch * p.channels + block.first) * p.length, p.length, 1,
             block.count, p.length,
             p.from + batch * p.length * p.channels + block.first, p.channels);
  return false;
}

static int32_t copy_to_columns(const CopyArgs& p, const Threads& threads) {
  return run_items(p, p.batch * channel_blocks_of(p.channels), 16, copy_block, threads);
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
