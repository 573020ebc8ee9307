// The CUDA kernels of conv_kernel as plain C++: every block is one thread, one after the other. Built by
// tests/ops/test_conv_kernel_cuda.py.
#include <stdlib.h>

#include "../../../csrc/cuda/conv_tasks.h"

namespace {

using namespace ddfast::cuda;

template <typename T> int run(conv_arguments a, int64_t shared) {
  conv_layout<T> layout;
  if (!layout.plan(a, shared, 3)) return 1;
  a.scratch = malloc(size_t(layout.elements) * sizeof(T));
  // What has not been written must not be read.
  for (int64_t i = 0; i < layout.elements; ++i) static_cast<T *>(a.scratch)[i] = T(NAN);
  layout.plan(a, shared, 3);
  const thread_block block{0, 1};
  const int64_t count = layout.fast_elements(a.grad != nullptr);
  T *fast = static_cast<T *>(malloc(size_t(count) * sizeof(T))), room[1];
  for (int64_t i = 0; i < count; ++i) fast[i] = T(NAN);
  const conv_call<T> call = layout.call, turned = layout.turned();
  for (int64_t i = 0; i < call.n; ++i) call.variances(block, i % layout.blocks, i, fast, room);
  for (int64_t i = 0; !call.symmetric && i < turned.n; ++i) turned.variances(block, i % layout.blocks, i, fast, room);
  for (int64_t t = 0; a.out && t < call.n * call.m; ++t) call.forward(block, t % layout.blocks, t, fast, room);
  for (int side = 0; side < 2; ++side) {
    conv_call<T> of = side ? turned : call;
    of.by_x = static_cast<T *>(side ? a.by_y : a.by_x);
    if (!of.by_x) continue;
    for (int64_t t = 0; t < of.n * of.chunks; ++t) of.backward(block, t % layout.blocks, t, fast, room);
    for (int64_t i = 0; i < of.n; ++i) of.finish(block, i % layout.blocks, i, fast, room);
  }
  free(fast);
  free(a.scratch);
  return 0;
}

}  // namespace

// sizes: n, m, channels, height, width. tensors: x, y, out, grad, by_x, by_y.
extern "C" int conv_kernel_on_host(int wide, const int64_t *sizes, int ntk, const unsigned char *pools, int layers,
                                   int gap, double weight_var, double bias_var, void *const *tensors, int64_t shared) {
  conv_arguments a{};
  a.wide = wide != 0;
  a.n = sizes[0], a.m = sizes[1], a.channels = sizes[2], a.height = sizes[3], a.width = sizes[4];
  a.ntk = ntk != 0, a.gap = gap != 0;
  a.pools = pools;
  a.layers = layers;
  a.weight_var = weight_var, a.bias_var = bias_var;
  a.x = tensors[0], a.y = tensors[1], a.out = tensors[2], a.grad = tensors[3];
  a.by_x = tensors[4], a.by_y = tensors[5];
  return a.wide ? run<double>(a, shared) : run<float>(a, shared);
}
