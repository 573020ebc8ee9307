// What one block does for each of its tasks: variances of an image, a pair of images forwards, a chunk
// of an image's pairs backwards, and the end of an image's gradient. Every sum has one order, whatever
// the number of blocks.
#pragma once

#include "conv_walk.h"

namespace ddfast {
namespace cuda {

// All sizes and pointers of a call. Chunks: an image's pairs are cut into so many, whose gradients are
// added at the end.
template <typename T> struct conv_call {
  conv_plan pairs, images;  // images: for variances
  bool ntk;
  int64_t n, m, chunks;
  const T *x, *y;  // y may be x
  bool symmetric;
  T *root_x, *inverse_x, *root_y, *inverse_y;  // images x positions
  T *out;
  const T *grad;
  bool turned;                 // backward by y: grad is m x n to the roles that x and y have here
  T *part_x, *part_norms;      // n x chunks x pixels, n x chunks x positions
  T *by_x;
  T *memory;                   // of all blocks
  int64_t storage, planes;     // elements of a block: of K, and of all planes if they do not fit elsewhere
  int64_t pixels;

  DDFAST_DEVICE conv_walk<T> walk(const thread_block &block, int64_t index, const conv_plan &plan, bool self, T *fast,
                                  T *room) const {
    T *mine = memory + index * (2 * storage + planes);
    return {block, plan,  ntk && !self, self,    x, y, root_x, inverse_x, root_y, inverse_y, {mine, mine + storage},
            planes ? mine + 2 * storage : fast, room, nullptr, nullptr};
  }
  DDFAST_DEVICE void of_x(conv_walk<T> &w, int64_t i) const {
    w.x = x + i * pixels;
    w.root_x = root_x + i * pairs.positions, w.inverse_x = inverse_x + i * pairs.positions;
  }
  DDFAST_DEVICE void of_y(conv_walk<T> &w, int64_t j) const {
    w.y = y + j * pixels;
    w.root_y = root_y + j * pairs.positions, w.inverse_y = inverse_y + j * pairs.positions;
  }

  // Of image i of x.
  DDFAST_DEVICE void variances(const thread_block &block, int64_t index, int64_t i, T *fast, T *room) const {
    conv_walk<T> w = walk(block, index, images, true, fast, room);
    of_x(w, i);
    w.y = w.x, w.root_y = w.root_x, w.inverse_y = w.inverse_x;
    T k, t;
    w.forward(&k, &t);
  }

  DDFAST_DEVICE void forward(const thread_block &block, int64_t index, int64_t task, T *fast, T *room) const {
    const int64_t i = task / m, j = task % m;
    if (symmetric && j < i) return;
    conv_walk<T> w = walk(block, index, pairs, false, fast, room);
    of_x(w, i), of_y(w, j);
    T k, t;
    w.forward(&k, &t);
    if (block.thread != 0) return;
    const T value = T(pairs.readout) * (k + t) + T(pairs.bias_var);
    out[i * m + j] = value;
    if (symmetric) out[j * m + i] = value;
  }

  DDFAST_DEVICE void backward(const thread_block &block, int64_t index, int64_t task, T *fast, T *room) const {
    const int64_t i = task / chunks, chunk = task % chunks, count = (m + chunks - 1) / chunks;
    conv_walk<T> w = walk(block, index, pairs, false, fast, room);
    of_x(w, i);
    w.by_x = part_x + task * pixels, w.by_norms = part_norms + task * pairs.positions;
    w.each(pixels, [&](int e) { w.by_x[e] = T(0); });
    w.each(pairs.positions, [&](int e) { w.by_norms[e] = T(0); });
    for (int64_t j = chunk * count; j < m && j < (chunk + 1) * count; ++j) {
      of_y(w, j);
      T cotangent = turned ? grad[j * n + i] : grad[i * m + j], k, t;
      if (symmetric) cotangent += grad[j * m + i];
      w.forward(&k, &t);
      w.backward(T(pairs.readout) * cotangent);
    }
  }

  // What the chunks of image i have found, and what goes through its variances.
  DDFAST_DEVICE void finish(const thread_block &block, int64_t index, int64_t i, T *fast, T *room) const {
    conv_walk<T> w = walk(block, index, images, true, fast, room);
    of_x(w, i);
    w.y = w.x, w.root_y = w.root_x, w.inverse_y = w.inverse_x;
    w.by_x = by_x + i * pixels, w.by_norms = part_norms + i * chunks * pairs.positions;
    w.each(pixels, [&](int e) {
      T sum = T(0);
      for (int64_t c = 0; c < chunks; ++c) sum += part_x[(i * chunks + c) * pixels + e];
      w.by_x[e] = sum;
    });
    w.each(pairs.positions, [&](int e) {
      T sum = T(0);
      for (int64_t c = 0; c < chunks; ++c) sum += part_norms[(i * chunks + c) * pairs.positions + e];
      w.by_norms[e] = sum * (T(0.5) * w.inverse_x[e] * w.inverse_x[e]);
    });
    T k, t;
    w.forward(&k, &t);
    w.backward(T(0));
  }
};

// What a caller says. All memory is on the device, contiguous, of float or (wide) double.
struct conv_arguments {
  bool wide;
  int device;
  void *stream;
  int64_t n, m, channels, height, width;
  bool ntk, gap;
  const unsigned char *pools;
  int layers;
  double weight_var, bias_var;
  const void *x, *y;  // y null: x with itself
  void *out;          // forward
  const void *grad;   // backward
  void *by_x, *by_y;  // null: not wanted
  void *scratch;      // conv_scratch bytes
};

// A call's memory: where in the scratch everything lies. elements: of T in all.
template <typename T> struct conv_layout {
  conv_call<T> call;
  int64_t blocks, elements;

  // shared: bytes of fast memory that one block may use.
  bool plan(const conv_arguments &a, int64_t shared, int64_t most_blocks) {
    call = conv_call<T>{};
    const bool good = conv_plan_of(&call.pairs, int(a.height), int(a.width), int(a.channels), a.pools, a.layers, a.gap,
                                   a.weight_var, a.bias_var, false) &&
                      conv_plan_of(&call.images, int(a.height), int(a.width), int(a.channels), a.pools, a.layers, a.gap,
                                   a.weight_var, a.bias_var, true);
    if (!good) return false;
    call.ntk = a.ntk;
    call.n = a.n, call.m = a.m;
    call.symmetric = !a.y;
    call.x = static_cast<const T *>(a.x);
    call.y = static_cast<const T *>(a.y ? a.y : a.x);
    call.out = static_cast<T *>(a.out);
    call.grad = static_cast<const T *>(a.grad);
    call.pixels = a.channels * a.height * a.width;
    call.storage = call.pairs.storage > call.images.storage ? call.pairs.storage : call.images.storage;
    call.planes = fast_elements(a.grad != nullptr);
    if (call.planes * int64_t(sizeof(T)) <= shared) call.planes = 0;
    const int64_t rows = a.n > a.m ? a.n : a.m, positions = call.pairs.positions, room = int64_t(1) << 30;
    call.chunks = 512 / (rows < 1 ? 1 : rows) + 1;
    const int64_t block_bytes = (2 * call.storage + call.planes) * int64_t(sizeof(T));
    blocks = block_bytes > 0 && room / block_bytes < most_blocks ? room / block_bytes : most_blocks;
    if (blocks < 1) blocks = 1;
    T *base = static_cast<T *>(a.scratch);
    elements = 0;
    const auto take = [&](int64_t count) {
      T *at = base ? base + elements : nullptr;
      elements += (count + 63) / 64 * 64;
      return at;
    };
    call.root_x = take(a.n * positions), call.inverse_x = take(a.n * positions);
    call.root_y = call.symmetric ? call.root_x : take(a.m * positions);
    call.inverse_y = call.symmetric ? call.inverse_x : take(a.m * positions);
    if (a.grad) {
      call.part_x = take(rows * call.chunks * call.pixels);
      call.part_norms = take(rows * call.chunks * positions);
    }
    call.memory = take(blocks * (2 * call.storage + call.planes));
    return true;
  }

  int64_t fast_elements(bool backward) const {
    int most = 1;
    for (int s = 0; s < call.pairs.stages; ++s) most = most_of(most, call.pairs.stage[s].layers);
    const int count = backward ? conv_walk<T>::backward_planes(most) : conv_walk<T>::forward_planes();
    return count * int64_t(call.pairs.stage[0].height) * call.pairs.stage[0].width;
  }

  // The same with x and y in each other's place.
  conv_call<T> turned() const {
    conv_call<T> t = call;
    t.n = call.m, t.m = call.n;
    t.x = call.y, t.y = call.x;
    t.root_x = call.root_y, t.root_y = call.root_x;
    t.inverse_x = call.inverse_y, t.inverse_y = call.inverse_x;
    t.turned = true;
    return t;
  }
};

}  // namespace cuda
}  // namespace ddfast
