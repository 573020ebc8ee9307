// The kernel of two images, offset plane by offset plane; what conv_kernel.cu runs on a GPU.
//
// `ddfast.reference.conv_kernel` has the maths. Position pairs (u, u + d) of the two images with the
// same offset d make a plane. Convolution and ReLU stay inside a plane; a pool takes planes 2d - 1,
// 2d and 2d + 1 (on each axis) to plane d. So a group of lanes, one for each column, takes a plane
// through all layers of a level (what lies between two pools) row by row, with three rows in
// registers, and adds the result to the planes of the next level, the block's `state`. A flatten
// readout needs plane 0 alone, and before each pool planes up to twice as far and one more.
//
// No two planes that are worked on at once add to the same numbers, and every sum has its order: the
// result does not depend on how many groups there are. What is written for one lane runs on all:
// on a GPU `lanes` is a register of each, elsewhere (for tests) an array.
#pragma once

#include <cmath>
#include <cstdint>

#include "../arc_cosine_fit.h"

#ifdef __CUDACC__
#define DDFAST_DEVICE __device__ __forceinline__
#define DDFAST_BOTH __host__ __device__ inline
#else
#define DDFAST_DEVICE inline
#define DDFAST_BOTH inline
#endif

namespace ddfast_cuda {

constexpr int most_levels = 8, most_layers = 24, most_convs = 3, most_columns = 32;

// What lies between two pools: `convs` layers, each a 3x3 convolution and a ReLU.
struct level {
  int height, width;  // of a plane
  int down, across;   // planes from -down to down and from -across to across
  int layer, convs;   // the first layer and how many
  bool pooled;
  int64_t start;  // of its planes in the state, none for level 0
};

struct network {
  level levels[most_levels];
  int count;                   // of levels
  int tables[most_layers];     // where each layer's variances begin
  int table_size, state_size;  // numbers of an image and of a pair
  int channels;
  bool ntk;
  float weight_var, bias_var;
};

// False if it is more than these kernels are made for.
inline bool describe(network &net, int channels, int height, int width, const bool *pools, int layers, bool ntk,
                     bool gap, float weight_var, float bias_var) {
  if (width > most_columns || layers > most_layers) return false;
  net = {};
  net.channels = channels, net.ntk = ntk, net.weight_var = weight_var, net.bias_var = bias_var;
  int layer = 0;
  for (bool more = true; more; ++net.count) {
    if (net.count == most_levels) return false;
    level &at = net.levels[net.count];
    at.height = height, at.width = width, at.layer = layer;
    while (layer < layers && !at.pooled) {
      net.tables[layer] = net.table_size;
      net.table_size += height * width;
      at.pooled = pools[layer++];
      ++at.convs;
    }
    if (at.convs > most_convs) return false;
    more = at.pooled;
    height /= 2, width /= 2;
  }
  for (int l = net.count - 1; l >= 0; --l) {
    level &at = net.levels[l];
    const bool last = l == net.count - 1;
    at.down = gap ? at.height - 1 : last ? 0 : 2 * net.levels[l + 1].down + 1;
    at.across = gap ? at.width - 1 : last ? 0 : 2 * net.levels[l + 1].across + 1;
    at.down = at.down < at.height ? at.down : at.height - 1;
    at.across = at.across < at.width ? at.across : at.width - 1;
  }
  for (int l = 1; l < net.count; ++l) {
    level &at = net.levels[l];
    at.start = net.state_size;
    const int64_t numbers = int64_t(2 * at.down + 1) * (2 * at.across + 1) * at.height * at.width * (ntk ? 2 : 1);
    if (net.state_size + numbers > int64_t(1) << 30) return false;
    net.state_size += int(numbers);
  }
  return true;
}

// --- lanes ---

#ifdef __CUDACC__
struct lanes {
  float value;
  DDFAST_DEVICE float &operator[](int) { return value; }
  DDFAST_DEVICE float operator[](int) const { return value; }
};
// The lanes of a group of `size`, a power of two, with one column each.
struct group {
  int column, size;
  unsigned members;
  template <typename F> DDFAST_DEVICE void each(F f) const { f(column); }
  DDFAST_DEVICE lanes left(lanes a) const {  // of the column before; zero before the first
    const float v = __shfl_up_sync(members, a.value, 1, size);
    return {column ? v : 0.0f};
  }
  DDFAST_DEVICE lanes right(lanes a) const {
    const float v = __shfl_down_sync(members, a.value, 1, size);
    return {column < size - 1 ? v : 0.0f};
  }
  DDFAST_DEVICE lanes with_neighbour(lanes a) const { return {a.value + __shfl_xor_sync(members, a.value, 1, size)}; }
  DDFAST_DEVICE float sum(lanes a) const {
    for (int step = size / 2; step; step /= 2) a.value += __shfl_xor_sync(members, a.value, step, size);
    return a.value;
  }
  DDFAST_DEVICE bool leads() const { return column == 0; }
};
#else
struct lanes {
  float values[most_columns];
  float &operator[](int w) { return values[w]; }
  float operator[](int w) const { return values[w]; }
};
struct group {
  int size;
  template <typename F> void each(F f) const {
    for (int w = 0; w < size; ++w) f(w);
  }
  lanes left(lanes a) const {
    lanes out{};
    for (int w = 1; w < size; ++w) out[w] = a[w - 1];
    return out;
  }
  lanes right(lanes a) const {
    lanes out{};
    for (int w = 0; w + 1 < size; ++w) out[w] = a[w + 1];
    return out;
  }
  lanes with_neighbour(lanes a) const {
    lanes out{};
    for (int w = 0; w < size; ++w) out[w] = a[w] + a[w ^ 1];
    return out;
  }
  float sum(lanes a) const {
    for (int step = size / 2; step; step /= 2)
      for (int w = 0; w < step; ++w) a[w] += a[w + step];
    return a[0];
  }
  bool leads() const { return true; }
};
#endif

// --- the ReLU ---

constexpr float two_pi = 6.28318530717958648f;
constexpr float parallel = 4 * 1.1920929e-7f;  // 1 - |correlation| below which the angle is 0 or pi

// The constant first.
template <int count> DDFAST_BOTH float polynomial(float t, const float (&c)[count]) {
  float sum = c[count - 1];
#pragma unroll
  for (int i = count - 2; i >= 0; --i) sum = sum * t + c[i];
  return sum;
}

// With t = 1 - |correlation|: the angle is sqrt(t) `angle(t)`, and its sine less the correlation times
// the angle is t sqrt(t) `excess(t)`; both over 2 pi here.
DDFAST_BOTH float angle(float t) {
  constexpr float c[] = {DDFAST_ANGLE_FLOAT};
  return 0.5f * polynomial(t, c);
}
DDFAST_BOTH float excess(float t) {
  constexpr float c[] = {DDFAST_ORDER1_FLOAT};
  return 0.5f * polynomial(t, c);
}

// What the ReLU makes of the covariance k of two Gaussians with standard deviations of product p:
// `value`, their covariance, and `both`, the probability that both are positive.
struct rectified {
  float value, both;
  bool regular;  // whether the angle has a derivative
};
DDFAST_BOTH rectified rectify(float k, float p, bool same) {
  if (!(p > 0)) return {k == k && p == p ? 0.0f : k + p, 0.25f, false};
  float t = (p - fabsf(k)) / p;
  const bool regular = !(t < parallel) && !same;
  t = regular ? t : 0.0f;
  const float root = sqrtf(t), of_pi = root * angle(t);
  return {p * (t * root * excess(t)) + (k > 0 ? 0.5f * k : 0.0f), k >= 0 ? 0.5f - of_pi : of_pi, regular};
}

// --- one plane ---

// Two images and the square roots of their variances before each ReLU; `same` if they are one.
struct image_pair {
  const float *x, *y, *deviations_x, *deviations_y;
  bool same;
};

// The rows of a plane whose positions lie in both images: from `first` up to but not `last`.
struct plane {
  int level, dh, dw, first, last;
};
DDFAST_DEVICE plane plane_of(const network &net, int l, int dh, int dw) {
  const int height = net.levels[l].height;
  return {l, dh, dw, dh < 0 ? -dh : 0, dh > 0 ? height - dh : height};
}
DDFAST_DEVICE bool inside(int w, int dw, int width) { return w < width && w + dw >= 0 && w + dw < width; }

// Where a plane of a level's state begins; of K, or of T.
DDFAST_DEVICE int64_t plane_start(const level &at, int dh, int dw, bool t) {
  const int planes_down = 2 * at.down + 1, planes_across = 2 * at.across + 1;
  const int64_t number = (int64_t(t ? planes_down : 0) + dh + at.down) * planes_across + dw + at.across;
  return at.start + number * at.height * at.width;
}

struct both_lanes {
  lanes k, t;
};

// A row of what enters a level.
DDFAST_DEVICE both_lanes entering(const group &g, const network &net, const image_pair &pair, const plane &on,
                                  const float *state, int h) {
  const level &at = net.levels[on.level];
  both_lanes row;
  g.each([&](int w) {
    row.k[w] = row.t[w] = 0;
    if (!inside(w, on.dw, at.width)) return;
    if (on.level) {
      row.k[w] = state[plane_start(at, on.dh, on.dw, false) + h * at.width + w];
      if (net.ntk) row.t[w] = state[plane_start(at, on.dh, on.dw, true) + h * at.width + w];
      return;
    }
    const int size = at.height * at.width;
    const float *x = pair.x + h * at.width + w, *y = pair.y + (h + on.dh) * at.width + w + on.dw;
    float sum = 0;
    for (int c = 0; c < net.channels; ++c) sum += x[c * size] * y[c * size];
    row.k[w] = sum / net.channels;
  });
  return row;
}

// Takes a plane through the level's layers; `emit(row, K and T)` gets what comes out and
// `keep(layer of the level, row, K and T)` what stands before each ReLU.
template <int convs, typename Emit, typename Keep>
DDFAST_DEVICE void through(const group &g, const network &net, const image_pair &pair, const plane &on,
                           const float *state, Emit emit, Keep keep) {
  const level &at = net.levels[on.level];
  const float scale = net.weight_var / 9;
  const bool same = pair.same && !on.dh && !on.dw;
  lanes before[convs + 1][4];  // of each layer: the last two rows' sums of three, of K and T
#pragma unroll
  for (int s = 0; s < convs; ++s)
#pragma unroll
    for (int i = 0; i < 4; ++i) g.each([&](int w) { before[s][i][w] = 0; });
  for (int h = on.first; h < on.last + convs; ++h) {
    both_lanes row;
    if (h < on.last)
      row = entering(g, net, pair, on, state, h);
    else
      g.each([&](int w) { row.k[w] = row.t[w] = 0; });
#pragma unroll
    for (int s = 0; s < convs; ++s) {
      const int out = h - s - 1;  // the row that is complete with this one
      const lanes kl = g.left(row.k), kr = g.right(row.k), tl = g.left(row.t), tr = g.right(row.t);
      const bool there = out >= on.first && out < on.last;
      const float *r1 = pair.deviations_x + net.tables[at.layer + s] + out * at.width;
      const float *r2 = pair.deviations_y + net.tables[at.layer + s] + (out + on.dh) * at.width + on.dw;
      g.each([&](int w) {
        const float k3 = kl[w] + row.k[w] + kr[w], t3 = tl[w] + row.t[w] + tr[w];
        const float k = scale * (before[s][0][w] + before[s][1][w] + k3) + net.bias_var;
        const float t = scale * (before[s][2][w] + before[s][3][w] + t3) + k;
        before[s][0][w] = before[s][1][w], before[s][1][w] = k3;
        before[s][2][w] = before[s][3][w], before[s][3][w] = t3;
        row.k[w] = k, row.t[w] = t;
      });
      if (there) keep(s, out, row);
      g.each([&](int w) {
        if (!there || !inside(w, on.dw, at.width)) {
          row.k[w] = row.t[w] = 0;
          return;
        }
        const rectified o = rectify(row.k[w], r1[w] * r2[w], same);
        row.k[w] = o.value, row.t[w] *= o.both;
      });
    }
    const int out = h - convs;
    if (out >= on.first) emit(out, row);
  }
}

// --- pools ---

// Where entry (h, w) of a plane belongs in the next level's state, or -1.
DDFAST_DEVICE int64_t pooled_at(const level &next, const plane &on, int h, int w, bool t) {
  const int i = h >> 1, j = w >> 1, dh = ((h + on.dh) >> 1) - i, dw = ((w + on.dw) >> 1) - j;
  if (i >= next.height || i + dh >= next.height || j >= next.width || j + dw >= next.width) return -1;
  if (dh < -next.down || dh > next.down || dw < -next.across || dw > next.across) return -1;
  return plane_start(next, dh, dw, t) + i * next.width + j;
}

// Adds a row to the next level, a sixteenth of each entry.
DDFAST_DEVICE void add_pooled(const group &g, const network &net, const plane &on, int h, const lanes &row, bool t,
                              float *state) {
  const level &at = net.levels[on.level], &next = net.levels[on.level + 1];
  const bool even = !(on.dw & 1);  // then the two columns of a window belong to one plane
  const lanes pair = g.with_neighbour(row);
  g.each([&](int w) {
    // A column outside is zero, and so is its share of the pair; the first of the two writes.
    const bool writes = even ? !(w & 1) && w < at.width : inside(w, on.dw, at.width);
    const int64_t to = writes ? pooled_at(next, on, h, w, t) : -1;
    if (to >= 0) state[to] += (even ? pair[w] : row[w]) * 0.0625f;
  });
}

// Planes that a pool takes to different ones, on one axis: even offsets, those of 1 modulo 4 and
// those of 3. The `number`-th offset of a class within +-radius, and how many there are.
struct offsets {
  int first, step, count;
};
DDFAST_DEVICE offsets offsets_of(int radius, int which) {
  const int step = which ? 4 : 2, rest = which == 2 ? 3 : which;
  const int first = -radius + ((rest + radius) & (step - 1));
  return {first, step, first > radius ? 0 : (radius - first) / step + 1};
}

}  // namespace ddfast_cuda
