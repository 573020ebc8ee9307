// A block of threads, so that the kernels' code is also plain C++, where a block is one thread: that is
// how it is tested on a machine without a GPU.
#pragma once

#include <math.h>
#include <stdint.h>

#include "../arc_cosine_fit.h"

#ifdef __CUDACC__
#define DDFAST_DEVICE __device__ __forceinline__
#define DDFAST_BOTH __host__ __device__ __forceinline__
#else
#define DDFAST_DEVICE inline
#define DDFAST_BOTH inline
#endif

namespace ddfast {
namespace cuda {

struct thread_block {
  int thread, threads;
  DDFAST_DEVICE void sync() const {
#ifdef __CUDA_ARCH__
    __syncthreads();
#endif
  }
};

// Sum over the threads of a block, in a fixed order; `room` has one element a thread.
template <typename T> DDFAST_DEVICE T block_sum(const thread_block &block, T value, T *room) {
  room[block.thread] = value;
  block.sync();
  for (int half = block.threads / 2; half > 0; half /= 2) {  // a power of two
    if (block.thread < half) room[block.thread] += room[block.thread + half];
    block.sync();
  }
  const T sum = room[0];
  block.sync();
  return sum;
}

// The constant first.
template <typename T, int count> DDFAST_DEVICE T polynomial(T t, const T (&c)[count]) {
  T sum = c[count - 1];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int i = count - 2; i >= 0; --i) sum = sum * t + c[i];
  return sum;
}

DDFAST_DEVICE float fit_angle(float t) {
  const float c[] = {DDFAST_ANGLE_FLOAT};
  return polynomial(t, c);
}
DDFAST_DEVICE double fit_angle(double t) {
  const double c[] = {DDFAST_ANGLE_DOUBLE};
  return polynomial(t, c);
}
DDFAST_DEVICE float fit_order1(float t) {
  const float c[] = {DDFAST_ORDER1_FLOAT};
  return polynomial(t, c);
}
DDFAST_DEVICE double fit_order1(double t) {
  const double c[] = {DDFAST_ORDER1_DOUBLE};
  return polynomial(t, c);
}
DDFAST_DEVICE float fit_sine(float t) {
  const float c[] = {DDFAST_SINE_FLOAT};
  return polynomial(t, c);
}
DDFAST_DEVICE double fit_sine(double t) {
  const double c[] = {DDFAST_SINE_DOUBLE};
  return polynomial(t, c);
}
DDFAST_DEVICE float root_of(float x) { return sqrtf(x); }
DDFAST_DEVICE double root_of(double x) { return sqrt(x); }
DDFAST_DEVICE float magnitude_of(float x) { return fabsf(x); }
DDFAST_DEVICE double magnitude_of(double x) { return fabs(x); }

// The arc-cosine kernels of one pair, csrc/cpu/arc_cosine.h. As in the definition of conv_kernel,
// pairs that are parallel or antiparallel but for rounding count as such, and those where p is zero
// (inverse 0) as orthogonal.
template <typename T> struct arc_cosine {
  T k, gap, t, root;

  DDFAST_DEVICE arc_cosine(T covariance, T p, T inverse) : k(covariance) {
    const T near = T(sizeof(T) == 4 ? 0x1p-21 : 0x1p-50);  // 4 eps
    gap = p - magnitude_of(k);
    t = gap * inverse;
    if (t < near) gap = t = T(0);  // a NaN stays
    if (inverse == T(0)) t = T(1);
    root = root_of(t);
  }
  DDFAST_DEVICE T order1() const { return (k < T(0) ? T(0) : k) + gap * (root * fit_order1(t)); }
  DDFAST_DEVICE T order0() const {
    const T a = root * fit_angle(t);
    return k < T(0) ? a : T(1) - a;
  }
  DDFAST_DEVICE T sine(T p) const { return p * (root * fit_sine(t)); }
  DDFAST_DEVICE T slope0(T inverse) const {
    return root == T(0) ? T(0) : inverse / (root * fit_sine(t) * T(9.86960440108935861883));
  }
};

}  // namespace cuda
}  // namespace ddfast
