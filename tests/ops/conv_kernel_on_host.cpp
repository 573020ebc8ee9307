// The GPU's kernels of a pair of images, compiled for the host: one group of lanes after another.
#include <algorithm>
#include <vector>

#include "pairs.h"

using namespace ddfast_cuda;

namespace {

struct host_block {
  int threads;
  template <typename F> void each_group(int size, F f) {
    for (int number = 0; number < threads / size; ++number) f(group{size}, number, threads / size);
  }
  template <typename F> void once(F f) { f(); }
  template <typename F> void spread(int count, F f) {
    for (int i = 0; i < count; ++i) f(i);
  }
  void fill(float *to, int count) {
    for (int i = 0; i < count; ++i) to[i] = 0;
  }
};

}  // namespace

extern "C" {

// The size of an image's table of variances and where each layer's begins, or -1.
int table_of(int channels, int height, int width, const bool *pools, int layers, bool gap, int *tables) {
  network net;
  if (!describe(net, channels, height, width, pools, layers, true, gap, 2, 0)) return -1;
  for (int l = 0; l < layers; ++l) tables[l] = net.tables[l];
  return net.table_size;
}

// out (n, m), and where grad (n, m) is given also by_x (n, table + image).
void kernel_on_host(int channels, int height, int width, const bool *pools, int layers, bool ntk, bool gap,
                    float weight_var, float bias_var, const float *x, const float *y, const float *rx, const float *ry,
                    int n, int m, bool symmetric, int threads, float *out, const float *grad, float *by_x) {
  network net;
  describe(net, channels, height, width, pools, layers, ntk, gap, weight_var, bias_var);
  const int size = channels * height * width;
  host_block block{threads};
  const scratch_layout layout = layout_of(net, threads);
  std::vector<float> state(net.state_size + 1), sums(2 * threads), scratch(layout.size);
  for (int i = 0; i < n; ++i) {
    std::fill(scratch.begin(), scratch.end(), 0.0f);
    for (int j = 0; j < m; ++j) {
      const image_pair pair{x + i * size, y + j * size, rx + i * net.table_size, ry + j * net.table_size,
                            symmetric && i == j};
      forward_pair(block, net, pair, state.data(), sums.data());
      out[i * m + j] = after_readout(net, sums.data());
      if (grad) backward_pair(block, net, pair, grad[i * m + j], state.data(), sums.data(), scratch.data());
    }
    if (grad) gather(block, net, scratch.data(), by_x + i * (net.table_size + size));
  }
}
}
