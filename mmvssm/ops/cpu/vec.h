// A SIMD vector of the instruction set that this file is compiled for.
//
// The kernels are written once, with the functions of this file, and compiled once for
// each instruction set, each time in another namespace (MMVSSM_ISA). No function here
// may be inline without being static, unless it is in that namespace: the linker would
// keep one copy of it, perhaps that of the wrong instruction set.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace mmvssm {
namespace MMVSSM_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vfloat __attribute__((vector_size(4 * kLanes)));
typedef int32_t vint __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vuint __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vhalf __attribute__((vector_size(2 * kLanes)));
// The same, at any address, in memory of any type.
typedef float vfloat_any
    __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t vhalf_any
    __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

// A bfloat16 number in memory.
struct bfloat16 {
  uint16_t bits;
};

static inline vfloat load(const float* p) { return *(const vfloat_any*)p; }
static inline void store(float* p, vfloat x) { *(vfloat_any*)p = x; }

static inline vfloat load(const bfloat16* p) {
  return (vfloat)(__builtin_convertvector(*(const vhalf_any*)p, vuint) << 16);
}

// Rounds to nearest even; NaN stays NaN.
static inline void store(bfloat16* p, vfloat x) {
  const vuint bits = (vuint)x;
  const vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vuint quiet = (bits >> 16) | 0x40;
  *(vhalf_any*)p = __builtin_convertvector(x != x ? quiet : rounded, vhalf);
}

static inline float to_float(float x) { return x; }
static inline float to_float(bfloat16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

static inline void assign(float* p, float x) { *p = x; }
static inline void assign(bfloat16* p, float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  p->bits = x != x ? (uint16_t)((bits >> 16) | 0x40)
                   : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__)
static inline vfloat broadcast(float x) { return _mm512_set1_ps(x); }
static inline void stream(float* p, vfloat x) { _mm512_stream_ps(p, x); }
static inline vfloat round_nearest(vfloat x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__AVX2__)
static inline vfloat broadcast(float x) { return _mm256_set1_ps(x); }
static inline void stream(float* p, vfloat x) { _mm256_stream_ps(p, x); }
static inline vfloat round_nearest(vfloat x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
static inline vfloat broadcast(float x) { return vfloat{x, x, x, x}; }
static inline void stream(float* p, vfloat x) {
#if defined(__SSE2__)
  _mm_stream_ps(p, x);
#else
  store(p, x);
#endif
}
// After 1.5 * 2^23 is added, float32 has no bits left for a fraction.
static inline vfloat round_nearest(vfloat x) {
  const vfloat big = broadcast(12582912.0f);
  return (x + big) - big;
}
#endif

// Streaming stores are weakly ordered: call this before another thread reads them.
static inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// p * 2^k for an integer k in [-150, 150].
static inline vfloat scale_by_power(vfloat p, vfloat k) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, k);
#else
  // In two factors, since 2^k may not be a normal number.
  const vint exponent = __builtin_convertvector(k, vint);
  const vint half = exponent >> 1;
  const vfloat first = (vfloat)((half + 127) << 23);
  const vfloat second = (vfloat)((exponent - half + 127) << 23);
  return p * first * second;
#endif
}

static inline vfloat absolute(vfloat x) { return (vfloat)((vint)x & 0x7fffffff); }
// Both return b if one of the two is NaN.
static inline vfloat larger(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
static inline vfloat smaller(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

static inline bool any(vint mask) {
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= mask[i];
  return found != 0;
}

// a0 b0 a1 b1 ..., of the lower or the upper halves of a and b.
#if defined(__clang__)
#define MMVSSM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MMVSSM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vint{__VA_ARGS__})
#endif
static inline vfloat zip_low(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return MMVSSM_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX2__)
  return MMVSSM_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return MMVSSM_SHUFFLE(a, b, 0, 4, 1, 5);
#endif
}
static inline vfloat zip_high(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return MMVSSM_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                        31);
#elif defined(__AVX2__)
  return MMVSSM_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return MMVSSM_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}
// a1 a0 a3 a2 ...
static inline vfloat swap_pairs(vfloat a) {
#if defined(__AVX512F__)
  return MMVSSM_SHUFFLE(a, a, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif defined(__AVX2__)
  return MMVSSM_SHUFFLE(a, a, 1, 0, 3, 2, 5, 4, 7, 6);
#else
  return MMVSSM_SHUFFLE(a, a, 1, 0, 3, 2);
#endif
}
#undef MMVSSM_SHUFFLE

// Transposes kLanes rows of kLanes numbers. Each round zips row i with row i + half.
static inline void transpose(vfloat (&rows)[kLanes]) {
  for (int round = 1; round < kLanes; round *= 2) {
    vfloat zipped[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      zipped[2 * i] = zip_low(rows[i], rows[i + kLanes / 2]);
      zipped[2 * i + 1] = zip_high(rows[i], rows[i + kLanes / 2]);
    }
    for (int i = 0; i < kLanes; ++i) rows[i] = zipped[i];
  }
}

// Adds the sum over the lanes of rows[i] to sums[i], for i < M. M is a power of two.
template <int M>
static inline void add_lane_sums(const vfloat* rows, float* sums) {
  if constexpr (M > kLanes) {
    add_lane_sums<M / 2>(rows, sums);
    add_lane_sums<M / 2>(rows + M / 2, sums + M / 2);
  } else {
    vfloat left[M];
    for (int i = 0; i < M; ++i) left[i] = rows[i];
    for (int half = M / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) {
        left[i] = zip_low(left[i], left[i + half]) + zip_high(left[i], left[i + half]);
      }
    }
    // Lane j holds a part of the sum of row j mod M.
    float parts[kLanes];
    store(parts, left[0]);
    for (int width = kLanes / 2; width >= M; width /= 2) {
      for (int j = 0; j < width; ++j) parts[j] += parts[j + width];
    }
    for (int i = 0; i < M; ++i) sums[i] += parts[i];
  }
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
