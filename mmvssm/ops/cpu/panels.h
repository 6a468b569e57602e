// Matrices of a few positions, their products, and how they are read and written.
//
// A matrix is in panels of 32 columns, one panel behind the other. A row of a panel is
// contiguous, and rows of the last panel are filled up. A block is a matrix with a row
// for each of kBlock positions, of which it may use fewer.
#pragma once

#include "kernel_args.h"
#include "vec.h"

namespace mmvssm {
namespace MMVSSM_ISA {

constexpr int64_t kBlock = 32;
// A tile of a product, in registers: so many rows, and vectors of a row.
constexpr int kTileRows = kLanes == 16 ? 8 : 4;
constexpr int kTileVectors = 2;

// GCC keeps a tile in memory unless it unrolls the loops over it; Clang does so itself.
#if defined(__clang__)
#define MMVSSM_UNROLL
#else
#define MMVSSM_UNROLL _Pragma("GCC unroll 8")
#endif

static inline int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

// The columns of all panels of a matrix.
static inline int64_t in_panels(int64_t columns) {
  return (columns + kPanel - 1) / kPanel * kPanel;
}

// c = A b, or c += A b: kTileRows rows of as many columns as a tile has. A and b have
// `terms` columns and rows. (Inlined, so that strides that are constants stay so.)
template <bool kAdd>
__attribute__((always_inline)) static inline void multiply_tile(
    const float* a, int64_t row_stride, int64_t term_stride, const float* b,
    int64_t terms, float* c) {
  vfloat sums[kTileRows][kTileVectors];
  MMVSSM_UNROLL for (int r = 0; r < kTileRows; ++r)
    MMVSSM_UNROLL for (int v = 0; v < kTileVectors; ++v) sums[r][v] = vfloat{};
  for (int64_t t = 0; t < terms; ++t) {
    vfloat right[kTileVectors];
    MMVSSM_UNROLL for (int v = 0; v < kTileVectors; ++v)
      right[v] = load(b + t * kPanel + v * kLanes);
    MMVSSM_UNROLL for (int r = 0; r < kTileRows; ++r) {
      const vfloat left = broadcast(a[r * row_stride + t * term_stride]);
      MMVSSM_UNROLL for (int v = 0; v < kTileVectors; ++v)
        sums[r][v] += left * right[v];
    }
  }
  MMVSSM_UNROLL for (int r = 0; r < kTileRows; ++r) {
    MMVSSM_UNROLL for (int v = 0; v < kTileVectors; ++v) {
      float* to = c + r * kPanel + v * kLanes;
      store(to, kAdd ? load(to) + sums[r][v] : sums[r][v]);
    }
  }
}

// C = A B for the first rows of blocks A and C. A has `terms` columns, B has `b_rows`
// rows.
static void multiply(const float* a, const float* b, int64_t rows, int64_t terms,
                     int64_t b_rows, int64_t columns, float* c) {
  for (int64_t n = 0; n < in_panels(columns); n += kTileVectors * kLanes) {
    const int64_t panel = n / kPanel * kPanel, inside = n % kPanel;
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const float* right = b + panel * b_rows + inside;
      float* to = c + panel * kBlock + i * kPanel + inside;
      for (int64_t t = 0; t < terms; t += kPanel) {
        const int64_t some = smaller_of(kPanel, terms - t);
        const float* left = a + t * kBlock + i * kPanel;
        if (t == 0)
          multiply_tile<false>(left, kPanel, 1, right, some, to);
        else
          multiply_tile<true>(left, kPanel, 1, right + t * kPanel, some, to);
      }
    }
  }
}

// C += transposed A times B, for the first rows of blocks A and B. C has a row for each
// column of A's panels.
static void add_products(const float* a, const float* b, int64_t rows,
                         int64_t a_columns, int64_t b_columns, float* c) {
  for (int64_t n = 0; n < in_panels(b_columns); n += kTileVectors * kLanes) {
    const int64_t panel = n / kPanel * kPanel, inside = n % kPanel;
    for (int64_t i = 0; i < in_panels(a_columns); i += kTileRows) {
      multiply_tile<true>(a + i / kPanel * kPanel * kBlock + i % kPanel, 1, kPanel,
                          b + panel * kBlock + inside, rows,
                          c + panel * in_panels(a_columns) + i * kPanel + inside);
    }
  }
}

// Transposes a matrix of whole panels.
static void transpose_panels(const float* from, int64_t rows, int64_t columns,
                             float* to) {
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

// sums[i] = the inner product of rows i of two blocks. With kOneRow `b` is a single
// row, which counts for all.
template <bool kOneRow>
static void inner_products(const float* a, const float* b, int64_t columns,
                           float* sums) {
  for (int64_t i = 0; i < kBlock; i += 4) {
    vfloat products[4] = {};
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int64_t panel = c / kPanel * kPanel, inside = c % kPanel;
      for (int r = 0; r < 4; ++r) {
        const int64_t at = panel * kBlock + (i + r) * kPanel + inside;
        products[r] += load(a + at) * load(kOneRow ? b + c : b + at);
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

// A whole row of a panel, from an array that has `columns` more columns: in place, or
// copied to `few` and filled up.
template <class T>
static inline const T* whole_row(const T* from, int64_t columns, float filling,
                                 T* few) {
  if (columns >= kPanel) return from;
  for (int64_t c = 0; c < kPanel; ++c) {
    if (c < columns)
      few[c] = from[c];
    else
      assign(few + c, filling);
  }
  return few;
}

// Reads `rows` positions of an array (position, channel), from `begin` on, each times
// its factor.
template <class T>
static void read_block(const Array& x, int64_t begin, int64_t rows, int64_t columns,
                       const float* factors, float* to) {
  T few[kPanel];
  for (int64_t first = 0; first < columns; first += kPanel) {
    const T* from = (const T*)x.data + begin * x.stride[0] + first;
    for (int64_t i = 0; i < rows; ++i, from += x.stride[0], to += kPanel) {
      const T* row = whole_row(from, columns - first, 0, few);
      for (int64_t c = 0; c < kPanel; c += kLanes)
        store(to + c, load(row + c) * factors[i]);
    }
    to += (kBlock - rows) * kPanel;
  }
}

// Writes them.
template <class T>
static void write_block(const float* from, int64_t begin, int64_t rows, int64_t columns,
                        const float* factors, const Array& x) {
  T few[kPanel];
  for (int64_t first = 0; first < columns; first += kPanel) {
    const int64_t left = columns - first;
    T* to = (T*)x.data + begin * x.stride[0] + first;
    for (int64_t i = 0; i < rows; ++i, to += x.stride[0], from += kPanel) {
      T* row = left < kPanel ? few : to;
      for (int64_t c = 0; c < kPanel; c += kLanes)
        store(row + c, load(from + c) * factors[i]);
      if (left < kPanel) __builtin_memcpy(to, few, left * sizeof(T));
    }
    from += (kBlock - rows) * kPanel;
  }
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
