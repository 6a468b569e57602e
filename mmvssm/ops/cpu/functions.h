// exp2, softplus and others of vectors. Their relative error is about 1e-7. The
// polynomials minimise the largest relative error (minimax). They are evaluated in
// pairs of terms, since short chains of operations run faster.
#pragma once

#include "vec.h"

namespace mmvssm {
namespace MMVSSM_ISA {

constexpr float kLog2e = 1.44269502f;
// log(2) as a sum of two numbers. The first has so few bits that its multiples up to
// 151 are exact.
constexpr float kLn2 = 0.693145752f;
constexpr float kLn2Rest = 1.42860677e-6f;

// 2^r - 1 for |r| <= 1/2, accurate also for r near zero.
static inline vfloat exp2m1_small(vfloat r) {
  const vfloat r2 = r * r;
  const vfloat low = 0.240226492f * r + 0.693147182f;
  const vfloat middle = 0.00961823761f * r + 0.0555035733f;
  const vfloat high = 0.000154035122f * r + 0.00133907353f;
  return ((high * r2 + middle) * r2 + low) * r;
}

// Returns the integer k of x = k + r, |r| <= 1/2. x is first limited to [-150, 150]:
// 2^-150 is zero in float32, and 2^150 infinite.
static inline vfloat integral_part(vfloat x, vfloat* r) {
#if !defined(__AVX512F__)
  x = smaller(broadcast(150.0f), x);
#endif
  x = larger(broadcast(-150.0f), x);
  const vfloat k = round_nearest(x);
  *r = x - k;
  return k;
}

static inline vfloat exp2(vfloat x) {
  vfloat r;
  const vfloat k = integral_part(x, &r);
  return scale_by_power(exp2m1_small(r) + 1.0f, k);
}

// (1 + x) 2^k - 1.
static inline vfloat times_power_less_one(vfloat x, vfloat k) {
  const vfloat power = scale_by_power(broadcast(1.0f), k);
  return power * x + (power - 1.0f);
}

// 1 - exp(-x) for x >= 0, accurate also for x near zero.
static inline vfloat one_minus_exp_of_minus(vfloat x) {
  vfloat r;
  const vfloat k = integral_part(x * -kLog2e, &r);
  return -times_power_less_one(exp2m1_small(r), k);
}

// exp(r) - 1 for |r| <= log(2) / 2: the polynomial of exp2m1_small in r / log(2).
static inline vfloat expm1_small(vfloat r) {
  const vfloat r2 = r * r;
  const vfloat low = 0.499999969f * r + 1.0f;
  const vfloat middle = 0.0416671367f * r + 0.166665059f;
  const vfloat high = 0.00138888725f * r + 0.00836906845f;
  return ((high * r2 + middle) * r2 + low) * r;
}

// exp(-x) for x in [0, 104]; exp(-104) is zero in float32.
static inline vfloat exp_of_minus(vfloat x) {
  const vfloat k = round_nearest(x * -kLog2e);
  const vfloat r = ((-x - k * kLn2) - k * kLn2Rest);
  return scale_by_power(expm1_small(r) + 1.0f, k);
}

// elu(x) + 1 = max(x, 0) + exp(min(x, 0)).
static inline vfloat elu_plus_one(vfloat x) {
  const vfloat below = smaller(broadcast(104.0f), larger(vfloat{}, -x));
  return larger(vfloat{}, x) + exp_of_minus(below);
}

// log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)).
static inline vfloat softplus(vfloat x) {
  const vfloat e = exp_of_minus(smaller(broadcast(104.0f), absolute(x)));
  const vfloat e2 = e * e, e4 = e2 * e2;
  const vfloat p01 = -0.499994934f * e + 0.99999994f;
  const vfloat p23 = -0.24842982f * e + 0.333190978f;
  const vfloat p45 = -0.136632457f * e + 0.191060066f;
  const vfloat p67 = -0.0295052372f * e + 0.0782259554f;
  const vfloat low = p23 * e2 + p01;
  const vfloat high = 0.00523269409f * e4 + (p67 * e2 + p45);
  return (high * e4 + low) * e + larger(x, vfloat{});
}

static inline vfloat sigmoid(vfloat x) { return 1.0f / (1.0f + exp2(x * -kLog2e)); }

// Adds x to a sum that is kept as *sum + *rest (Kahan summation).
static inline void add_compensated(float* sum, float* rest, vfloat x) {
  const vfloat before = load(sum);
  const vfloat added = x + load(rest);
  const vfloat after = before + added;
  store(sum, after);
  store(rest, added - (after - before));
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
