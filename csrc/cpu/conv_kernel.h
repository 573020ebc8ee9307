// What the files of conv_kernel share: the memory of one thread, and the walk through a network for
// as many pairs of images as a vector has lanes.
#pragma once

#include "conv_kernel_rows.h"

namespace ddfast {
namespace DDFAST_LEVEL {

// Of one thread. Planes of pairs lie in `storage`, stage after stage from the second on: the input of
// a stage, or what its gradient is.
template <typename T> struct conv_memory {
  const conv_plan *plan;
  conv_side<T> x, y;
  conv_rows<T> storage[conv_most_stages];
  conv_rows<T> between;      // the inputs of a stage's layers but the first: `inner` planes, in turn
  int64_t inner, plane;      // plane: pairs of the largest of them
  conv_rows<T> ring[3];      // sums of neighbours of three rows
  conv_rows<T> back_ring[3];
  conv_rows<T> row, row2;
  vector<T> *zeros;  // a row
  conv_rows<T> adjoint;      // of a plane between two layers
  // Gradients: by pixels as they lie in conv_side, and by log V / 2, per layer and position; null
  // where not wanted.
  vector<T> *by_pixels_x, *by_pixels_y, *by_norms_x, *by_norms_y;
  vector<T> *variances;          // per layer and position
  const vector<T> *by_variance;  // what the variances receive, per layer and position

  DDFAST_INLINE conv_rows<T> input(int l) const { return between.from((l - 1) % inner * plane); }
};

// Bytes of one thread's memory; where `data` is given, what lies where in it goes to *memory.
template <typename T>
int64_t conv_divide(const conv_plan &plan, bool ntk, bool backward, char *data, conv_memory<T> *memory);

// K and T in front of the readout, summed, of every lane's pair. shared: one x for all lanes.
template <typename T> void conv_forward(const conv_memory<T> &memory, bool shared, T *k, T *t);

// The gradients of sum of cotangents times readout, one a lane, added up. After conv_forward on the same memory,
// whose planes it overwrites.
template <typename T> void conv_backward(const conv_memory<T> &memory, bool shared, const T *cotangents);

// Inverse and root of V, V given.
template <typename T> DDFAST_INLINE void conv_norms_of(vector<T> v, T *inverse, T *root) {
  const vector<T> zero = {}, smallest = broadcast(T(sizeof(T) == 4 ? 0x1p-126 : 0x1p-1022)), r = square_root(v);
  write(root, r);
  write(inverse, v < smallest ? zero : T(1) / r);
}

// memory.variances, and the norms, of the images in memory.x, which is memory.y.
template <typename T> void conv_variances(const conv_memory<T> &memory);

// The gradients of sum of by_variance times variances, after conv_variances on the same memory.
template <typename T> void conv_variances_backward(const conv_memory<T> &memory);

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
