// Arc-cosine kernels of order 0 and 1 (Cho and Saul, NeurIPS 2009) without an arc cosine: one square
// root and a polynomial each. For Gaussian pairs (u, v) with covariance k and p = sqrt(k11 k22), and
// c = k / p:
//
//   kappa1(c) = (sqrt(1 - c^2) + (pi - arccos c) c) / pi      E relu(u) relu(v) = p kappa1 / 2
//   kappa0(c) = (pi - arccos c) / pi                          E relu'(u) relu'(v) = kappa0 / 2
//
// Both are 1 at c = 1 and 0 at c = -1. With t = 1 - |c|, taken from p - |k| because that is exact,
//
//   kappa1 = max(c, 0) + t sqrt(t) order1(t),    kappa0 = c >= 0 ? 1 - a : a,  a = sqrt(t) angle(t)
//
// Absolute error of both less than 1.3e-7 (float) and 4e-16 (double) given c; relative to the value
// for c < 0, where they tend to zero. A |c| beyond 1, which rounding may give, counts as 1; NaN stays.
#pragma once

#include "../arc_cosine_fit.h"
#include "vector.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

DDFAST_INLINE vector<float> square_root(vector<float> x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(__mmask16(-1), x);
#elif defined(__AVX__)
  return _mm256_sqrt_ps(x);
#elif defined(__SSE2__)
  return _mm_sqrt_ps(x);
#else
  for (int64_t k = 0; k < width_of<float>; ++k) x[k] = sqrtf(x[k]);
  return x;
#endif
}
DDFAST_INLINE vector<double> square_root(vector<double> x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_pd(__mmask8(-1), x);
#elif defined(__AVX__)
  return _mm256_sqrt_pd(x);
#elif defined(__SSE2__)
  return _mm_sqrt_pd(x);
#else
  for (int64_t k = 0; k < width_of<double>; ++k) x[k] = sqrt(x[k]);
  return x;
#endif
}

// The constant first.
template <typename T, int count> DDFAST_INLINE vector<T> polynomial(vector<T> t, const T (&c)[count]) {
  vector<T> sum = broadcast(c[count - 1]);
#pragma GCC unroll 24
  for (int i = count - 2; i >= 0; --i) sum = sum * t + c[i];
  return sum;
}

template <typename T> struct arc_cosine_fit;
template <> struct arc_cosine_fit<float> {
  static DDFAST_INLINE vector<float> angle(vector<float> t) {
    constexpr float c[] = {DDFAST_ANGLE_FLOAT};
    return polynomial(t, c);
  }
  static DDFAST_INLINE vector<float> order1(vector<float> t) {
    constexpr float c[] = {DDFAST_ORDER1_FLOAT};
    return polynomial(t, c);
  }
  static DDFAST_INLINE vector<float> sine(vector<float> t) {
    constexpr float c[] = {DDFAST_SINE_FLOAT};
    return polynomial(t, c);
  }
};
template <> struct arc_cosine_fit<double> {
  static DDFAST_INLINE vector<double> angle(vector<double> t) {
    constexpr double c[] = {DDFAST_ANGLE_DOUBLE};
    return polynomial(t, c);
  }
  static DDFAST_INLINE vector<double> order1(vector<double> t) {
    constexpr double c[] = {DDFAST_ORDER1_DOUBLE};
    return polynomial(t, c);
  }
  static DDFAST_INLINE vector<double> sine(vector<double> t) {
    constexpr double c[] = {DDFAST_SINE_DOUBLE};
    return polynomial(t, c);
  }
};

DDFAST_INLINE vector<float> absolute(vector<float> x) {
  return vector<float>(vector_mask<float>(x) & int32_t(0x7fffffff));
}
DDFAST_INLINE vector<double> absolute(vector<double> x) {
  return vector<double>(vector_mask<double>(x) & int64_t(0x7fffffffffffffff));
}

// Of a vector of pairs. `inverse` is 1 / p, finite; where p = 0, give 0: then |c| counts as 1.
template <typename T> struct arc_cosine {
  vector<T> k, gap, t, root;  // gap = p - |k|, t = gap / p, root = sqrt(t)

  DDFAST_INLINE arc_cosine(vector<T> covariance, vector<T> p, vector<T> inverse) : k(covariance) {
    gap = larger(vector<T>{}, p - absolute(k));  // in this order NaN stays
    t = gap * inverse;
    root = square_root(t);
  }

  // p kappa1(c); its derivative by k is kappa0.
  DDFAST_INLINE vector<T> order1() const {
    const vector<T> zero = {};
    return larger(zero, k) + gap * (root * arc_cosine_fit<T>::order1(t));
  }
  // kappa0(c)
  DDFAST_INLINE vector<T> order0() const {
    const vector<T> zero = {}, a = root * arc_cosine_fit<T>::angle(t);
    return k < zero ? a : T(1) - a;
  }
  // p (kappa1 - c kappa0) = p sqrt(1 - c^2) / pi: the derivative of p kappa1 by p, times p.
  DDFAST_INLINE vector<T> sine(vector<T> p) const { return p * (root * arc_cosine_fit<T>::sine(t)); }
  // The derivative of kappa0 by k, 1 / (pi sqrt(p^2 - k^2)); zero at c = +-1, where it has none. Times
  // -k it is the derivative by p, times p.
  DDFAST_INLINE vector<T> slope0(vector<T> inverse) const {
    const vector<T> zero = {}, below = root * arc_cosine_fit<T>::sine(t) * T(9.86960440108935861883);  // pi^2
    return root == zero ? zero : inverse / below;
  }
};

}  // namespace
}  // namespace DDFAST_LEVEL
}  // namespace ddfast
