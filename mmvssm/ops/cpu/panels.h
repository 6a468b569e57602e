// Matrices of a few positions, their products, and how they are read and written.
//
// A matrix is in panels of 32 columns, one panel behind the other. A row of a panel is
// contiguous. What the last panel has too much is filled up. The matrix of a block of
// positions has a row for each of kBlock positions.
#pragma once

#include "kernel_args.h"
#include "vec.h"

namespace mmvssm {
namespace MMVSSM_ISA {

constexpr int64_t kPanel = 32;
constexpr int64_t kBlock = 32;
// A tile of a product, in registers: so many rows, and vectors of a row.
constexpr int kTileRows = kLanes == 16 ? 8 : 4;
constexpr int kTileVectors = 2;

// The columns of all panels of a matrix.
static inline int64_t in_panels(int64_t columns) {
  return (columns + kPanel - 1) / kPanel * kPanel;
}

// c = A b, or c += A b: kTileRows rows of as many columns as a tile has. A and b have
// `terms` columns and rows.
template <int64_t kRowStride, int64_t kTermStride>
static inline void multiply_tile(const float* a, const float* b, int64_t terms, float* c,
                                 bool add) {
  vfloat sums[kTileRows][kTileVectors] = {};
  for (int64_t t = 0; t < terms; ++t) {
    vfloat right[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) right[v] = load(b + t * kPanel + v * kLanes);
    for (int r = 0; r < kTileRows; ++r) {
      const vfloat left = broadcast(a[r * kRowStride + t * kTermStride]);
      for (int v = 0; v < kTileVectors; ++v) sums[r][v] += left * right[v];
    }
  }
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) {
      float* to = c + r * kPanel + v * kLanes;
      store(to, add ? load(to) + sums[r][v] : sums[r][v]);
    }
  }
}

// C = A B for some rows of a block; A has `terms` columns. A and C have kBlock rows in
// a panel, B has `b_rows`.
static void multiply(const float* a, const float* b, int64_t rows, int64_t terms,
                     int64_t b_rows, int64_t columns, float* c) {
  for (int64_t n = 0; n < in_panels(columns); n += kTileVectors * kLanes) {
    const int64_t panel = n / kPanel, inside = n % kPanel;
    for (int64_t i = 0; i < rows; i += kTileRows) {
      for (int64_t t = 0; t < terms; t += kPanel) {
        const int64_t some = t + kPanel < terms ? kPanel : terms - t;
        multiply_tile<kPanel, 1>(
            a + t * kBlock + i * kPanel, b + (panel * b_rows + t) * kPanel + inside,
            some, c + (panel * kBlock + i) * kPanel + inside, t > 0);
      }
    }
  }
}

// C += transposed A times B for A and B with `rows` rows of a block; A has `a_columns`
// columns, and C has all columns of A's panels as its rows.
static void add_products(const float* a, const float* b, int64_t rows,
                         int64_t a_columns, int64_t b_columns, float* c) {
  const int64_t width = in_panels(a_columns);
  for (int64_t n = 0; n < in_panels(b_columns); n += kTileVectors * kLanes) {
    const int64_t panel = n / kPanel, inside = n % kPanel;
    for (int64_t i = 0; i < width; i += kTileRows) {
      multiply_tile<1, kPanel>(a + i / kPanel * kBlock * kPanel + i % kPanel,
                               b + panel * kBlock * kPanel + inside, rows,
                               c + (panel * width + i) * kPanel + inside, true);
    }
  }
}

// Transposes a matrix of whole panels.
static void transpose_panels(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t n = 0; n < columns; n += kLanes) {
      vfloat square[kLanes];
      for (int r = 0; r < kLanes; ++r)
        square[r] = load(from + (n / kPanel * rows + i + r) * kPanel + n % kPanel);
      transpose(square);
      for (int r = 0; r < kLanes; ++r)
        store(to + (i / kPanel * columns + n + r) * kPanel + i % kPanel, square[r]);
    }
  }
}

// sums[i] = the inner product of row i of `a` with row i of `b`, for matrices of a block;
// with `same` all rows of `b` are one, its panels without other rows between them.
template <bool same>
static void inner_products(const float* a, const float* b, int64_t columns, float* sums) {
  for (int64_t i = 0; i < kBlock; i += 4) {
    vfloat products[4] = {};
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int64_t panel = c / kPanel * kPanel, inside = c % kPanel;
      for (int r = 0; r < 4; ++r) {
        const int64_t at = panel * kBlock + (i + r) * kPanel + inside;
        products[r] += load(a + at) * load(same ? b + c : b + at);
      }
    }
    for (int r = 0; r < 4; ++r) sums[i + r] = 0;
    add_lane_sums<4>(products, sums + i);
  }
}

// The channels of one head of an array (batch, position, channel).
static inline Array head_of(const Array& x, int64_t batch, int64_t head,
                            int64_t channels) {
  const int64_t size = x.dtype == kFloat32 ? 4 : 2;
  char* data = (char*)x.data + (batch * x.stride[0] + head * channels) * size;
  return {data, x.dtype, {x.stride[1]}};
}

template <class T>
static inline void read_panel_row(const T* from, int64_t columns, float filling,
                                  float* to) {
  if (columns >= kPanel) {
    for (int64_t c = 0; c < kPanel; c += kLanes) store(to + c, load(from + c));
  } else {
    for (int64_t c = 0; c < kPanel; ++c)
      to[c] = c < columns ? to_float(from[c]) : filling;
  }
}

template <class T>
static inline void write_panel_row(const float* from, int64_t columns, T* to) {
  if (columns >= kPanel) {
    for (int64_t c = 0; c < kPanel; c += kLanes) store(to + c, load(from + c));
  } else {
    for (int64_t c = 0; c < columns; ++c) assign(to + c, from[c]);
  }
}

// Reads `rows` positions of an array (position, channel), from `begin` on.
static void read_block(const Array& from, int64_t begin, int64_t rows, int64_t columns,
                       float filling, float* to) {
  for (int64_t first = 0; first < columns; first += kPanel, to += kBlock * kPanel) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = (begin + i) * from.stride[0] + first, left = columns - first;
      float* row = to + i * kPanel;
      if (from.dtype == kFloat32)
        read_panel_row((const float*)from.data + at, left, filling, row);
      else
        read_panel_row((const bfloat16*)from.data + at, left, filling, row);
    }
  }
}

static void write_block(const float* from, int64_t begin, int64_t rows, int64_t columns,
                        const Array& to) {
  for (int64_t first = 0; first < columns; first += kPanel, from += kBlock * kPanel) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = (begin + i) * to.stride[0] + first, left = columns - first;
      const float* row = from + i * kPanel;
      if (to.dtype == kFloat32)
        write_panel_row(row, left, (float*)to.data + at);
      else
        write_panel_row(row, left, (bfloat16*)to.data + at);
    }
  }
}

// Multiplies each row of a block by its factor.
static void scale_rows(float* x, int64_t rows, int64_t columns, const float* factors) {
  for (int64_t first = 0; first < columns; first += kPanel, x += kBlock * kPanel) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < kPanel; c += kLanes) {
        float* at = x + i * kPanel + c;
        store(at, load(at) * factors[i]);
      }
    }
  }
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
