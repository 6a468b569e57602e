// The product of a few rows with a matrix: the projections inside of the scans, for
// onnx_library.cpp. (In PyTorch they are products of torch.) An item of work is a block
// of rows.
#pragma once

#include "channel_block.h"
#include "panels.h"
#include "parallel.h"

namespace mmvssm {
namespace MMVSSM_ISA {

// Terms that are added up in registers. So many rows of a panel stay in the cache.
constexpr int64_t kTerms = 128;

// A call, and its matrix in panels (term, column).
struct Product {
  const ProductArgs& p;
  float* panels;
};

static bool fill_panel(const Product& product, int64_t index, Arena*) {
  const ProductArgs& p = product.p;
  const int64_t first = index * kPanel;
  load_rows(p.weight + first * p.terms, p.terms, 1,
            smaller_of(kPanel, p.columns - first), p.terms,
            product.panels + first * p.terms, kPanel);
  return false;
}

static bool multiply_block(const Product& product, int64_t index, Arena* arena) {
  const ProductArgs& p = product.p;
  const int64_t begin = index * kBlock, rows = smaller_of(kBlock, p.rows - begin);
  const float* x = p.x + begin * p.x_stride;
  int64_t stride = p.x_stride;
  if (rows < kBlock) {
    // The last tile may have more rows than x.
    float* filled = arena->take(kBlock * p.terms);
    __builtin_memset(filled, 0, kBlock * p.terms * 4);
    for (int64_t i = 0; i < rows; ++i)
      __builtin_memcpy(filled + i * p.terms, x + i * stride, p.terms * 4);
    x = filled;
    stride = p.terms;
  }
  float* sums = arena->take(kBlock * kPanel);
  for (int64_t first = 0; first < p.columns; first += kPanel) {
    const int64_t columns = smaller_of(kPanel, p.columns - first);
    const float* panel = product.panels + first * p.terms;
    __builtin_memset(sums, 0, kBlock * kPanel * 4);
    for (int64_t t = 0; t < p.terms; t += kTerms)
      for (int64_t n = 0; n < columns; n += kTileVectors * kLanes)
        for (int64_t i = 0; i < rows; i += kTileRows)
          multiply_tile<true>(x + i * stride + t, stride, 1, panel + t * kPanel + n,
                              smaller_of(kTerms, p.terms - t), sums + i * kPanel + n);
    for (int64_t i = 0; i < rows; ++i)
      __builtin_memcpy(p.y + (begin + i) * p.columns + first, sums + i * kPanel,
                       columns * 4);
  }
  return false;
}

static int32_t product(const ProductArgs& p, const Threads& threads) {
  const int64_t size = in_panels(p.columns) * p.terms;
  Arena arena(size);
  if (arena.failed()) return kOutOfMemory;
  const Product product = {p, arena.take(size)};
  const int32_t status =
      run_items(product, in_panels(p.columns) / kPanel, 16, fill_panel, threads);
  if (status != kDone) return status;
  return run_items(product, (p.rows + kBlock - 1) / kBlock,
                   kBlock * (p.terms + kPanel) + 32, multiply_block, threads);
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
