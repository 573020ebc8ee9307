// What conv_kernel.cu offers; all pointers are the device's, all numbers float.
#pragma once

#include "planes.h"

namespace ddfast_cuda {

struct image_set {
  const float *images;      // (count, channels, H, W)
  const float *deviations;  // (count, table_size): square roots of the variances before each ReLU
  int64_t count;
};

// A thread block's memory besides what it has in shared memory, and how many blocks run at once.
struct plan {
  int blocks;
  int64_t bytes_of_block;
};
const char *plan_of(const network &net, bool backward, plan *out);  // null, or what went wrong

// out (n, m). With `symmetric` x and y are one set, and the entries below the diagonal are copied.
const char *forward(const network &net, const image_set &x, const image_set &y, bool symmetric, float *out,
                    float *memory, const plan &how, void *stream);

// out (chunks, n, table_size + C * H * W): gradients of the sum of grad (n, m) times the kernel by
// the variances and images of x; chunk c has the sum over the images c, c + chunks, ... of y.
const char *backward(const network &net, const image_set &x, const image_set &y, bool symmetric, const float *grad,
                     int chunks, float *out, float *memory, const plan &how, void *stream);

}  // namespace ddfast_cuda
