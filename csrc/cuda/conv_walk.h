// The walk of one block through a network for one pair of images, forwards and backwards, plane by
// plane. The planes at work lie in shared memory; what pools hand on, in memory of the block's own.
#pragma once

#include "conv_plan.h"

namespace ddfast {
namespace cuda {

// K and T of a plane.
template <typename T> struct plane_pair {
  T *k, *t;
};

template <typename T> struct conv_walk {
  thread_block block;
  const conv_plan &plan;
  bool ntk;
  bool self;  // the variances of one image: x is y, and t is not used
  const T *x, *y;                                          // channels x height x width
  T *root_x, *inverse_x;                                   // per position: written where self
  const T *root_y, *inverse_y;
  plane_pair<T> storage;   // planes of all stages but the first
  T *planes;               // forward_planes or backward_planes of the first stage's size
  T *room;                 // one element a thread
  T *by_x, *by_norms;      // backward: by pixels, and by half the logarithms of the variances of x
                           // (self: by the variances)

  static DDFAST_BOTH int forward_planes() { return 4; }
  static DDFAST_BOTH int backward_planes(int layers) { return 2 * layers + 4; }

  DDFAST_DEVICE int64_t plane_size() const { return int64_t(plan.stage[0].height) * plan.stage[0].width; }
  DDFAST_DEVICE plane_pair<T> buffer(int i) const {
    return {planes + 2 * i * plane_size(), planes + (2 * i + 1) * plane_size()};
  }
  template <typename F> DDFAST_DEVICE void each(int64_t count, const F &f) const {
    for (int64_t e = block.thread; e < count; e += block.threads) f(int(e));
    block.sync();
  }

  // f(pair, i, j, sum of k, sum of t over the nine neighbours). A thread goes down a column.
  template <typename F> DDFAST_DEVICE void each_sum(const conv_plane &p, plane_pair<T> in, bool with_t, const F &f) const {
    const int fit = block.threads / p.columns, strips = fit < 1 ? 1 : (fit < p.rows ? fit : p.rows);
    const int length = (p.rows + strips - 1) / strips;
    for (int item = block.thread; item < strips * p.columns; item += block.threads) {
      const int j = item % p.columns, first = item / p.columns * length;
      const int last = first + length < p.rows ? first + length : p.rows;
      T k0 = row_sum(p, in.k, first - 1, j), k1 = row_sum(p, in.k, first, j);
      T t0 = with_t ? row_sum(p, in.t, first - 1, j) : T(0), t1 = with_t ? row_sum(p, in.t, first, j) : T(0);
      for (int i = first; i < last; ++i) {
        const T k2 = row_sum(p, in.k, i + 1, j), t2 = with_t ? row_sum(p, in.t, i + 1, j) : T(0);
        f(i * p.columns + j, i, j, (k0 + k1) + k2, (t0 + t1) + t2);
        k0 = k1, k1 = k2, t0 = t1, t1 = t2;
      }
    }
    block.sync();
  }
  static DDFAST_DEVICE T row_sum(const conv_plane &p, const T *plane, int i, int j) {
    if (i < 0 || i >= p.rows) return T(0);
    const T *row = plane + i * p.columns;
    T sum = row[j];
    if (j > 0) sum = row[j - 1] + sum;
    if (j + 1 < p.columns) sum += row[j + 1];
    return sum;
  }

  // --- forwards ---

  // The input of a stage: products of pixels, or what the pool in front of it has collected.
  DDFAST_DEVICE void load(const conv_stage &s, const conv_plane &p, plane_pair<T> to) const {
    const int64_t image = plane_size();
    each(p.pairs(), [&](int e) {
      if (s.first > 0) {
        to.k[e] = storage.k[p.at + e];
        if (ntk) to.t[e] = storage.t[p.at + e];
        return;
      }
      const int at = e / p.columns * p.width + e % p.columns;
      T sum = x[p.x + at] * y[p.y + at];
      for (int c = 1; c < plan.channels; ++c) sum += x[c * image + p.x + at] * y[c * image + p.y + at];
      to.k[e] = sum;
      if (ntk) to.t[e] = T(0);
    });
  }

  // One convolution and ReLU of a plane.
  DDFAST_DEVICE void layer(const conv_stage &s, int l, const conv_plane &p, plane_pair<T> from, plane_pair<T> to) const {
    const T scale = T(plan.scale(l)), bias = T(plan.bias_var);
    const int64_t of_layer = s.position + int64_t(l - s.first) * s.height * s.width;
    each_sum(p, from, ntk && l > 0, [&](int e, int i, int j, T sum_k, T sum_t) {
      const T k = scale * sum_k + bias;
      const int64_t u = of_layer + p.x + i * p.width + j, v = of_layer + p.y + i * p.width + j;
      if (self && p.a == 0 && p.b == 0) {
        const T least = T(sizeof(T) == 4 ? 0x1p-126 : 0x1p-1022), r = root_of(k);
        root_x[u] = r;
        inverse_x[u] = k < least ? T(0) : T(1) / r;
        to.k[e] = k;
        return;
      }
      const T pair = root_x[u] * root_y[v], inverse = inverse_x[u] * inverse_y[v];
      const arc_cosine<T> a(k, pair, inverse);
      to.k[e] = a.order1();
      if (ntk) to.t[e] = (scale * sum_t + k) * a.order0();
    });
  }

  // f(source pair, target pair) for a plane in front of a pool; a target's sources follow each other.
  template <typename F>
  DDFAST_DEVICE void each_pooled(const conv_stage &next, const conv_plane &p, const F &f) const {
    conv_phase down[2], across[2];
    const int m = phases_of(p.a, next.height, next.reach_h, down);
    const int n = phases_of(p.b, next.width, next.reach_w, across);
    for (int q = 0; q < m * n; ++q) {
      const conv_phase &r = down[q / n], &c = across[q % n];
      const conv_plane to(next, r.offset, c.offset);
      for (int e = block.thread; e < to.pairs(); e += block.threads) {
        const int i = 2 * (e / to.columns) + r.start, j = 2 * (e % to.columns) + c.start;
        for (int di = 0; di <= r.both; ++di)
          for (int dj = 0; dj <= c.both; ++dj) f((i + di) * p.columns + j + dj, to.at + e);
      }
    }
    block.sync();
  }

  // All stages; the sums in front of the readout in *k and *t.
  DDFAST_DEVICE void forward(T *k, T *t) const {
    T sum_k = T(0), sum_t = T(0);
    each(plan.storage, [&](int e) {
      storage.k[e] = T(0);
      if (ntk) storage.t[e] = T(0);
    });
    for (int s = 0; s < plan.stages; ++s) {
      const conv_stage &stage = plan.stage[s];
      const int down = 2 * stage.reach_h + 1, across = 2 * stage.reach_w + 1;
      // The variances must be there before any other plane asks for them.
      for (int q = self ? -1 : 0; q < down * across; ++q) {
        const int a = q < 0 ? 0 : q / across - stage.reach_h, b = q < 0 ? 0 : q % across - stage.reach_w;
        if (self && q >= 0 && a == 0 && b == 0) continue;
        const conv_plane p(stage, a, b);
        int now = 0;
        load(stage, p, buffer(now));
        for (int l = stage.first; l < stage.first + stage.layers; ++l, now = 1 - now)
          layer(stage, l, p, buffer(now), buffer(1 - now));
        const plane_pair<T> out = buffer(now);
        if (stage.pooled)
          each_pooled(plan.stage[s + 1], p, [&](int from, int64_t to) {
            storage.k[to] += out.k[from];
            if (ntk) storage.t[to] += out.t[from];
          });
        else
          each(p.pairs(), [&](int e) {
            sum_k += out.k[e];
            if (ntk) sum_t += out.t[e];
          });
      }
    }
    *k = block_sum(block, sum_k, room);
    *t = ntk ? block_sum(block, sum_t, room) : T(0);
  }

  // --- backwards ---

  // What the outputs of a plane receive: from the pool, or from the readout.
  DDFAST_DEVICE void receive(int s, const conv_plane &p, T cotangent, plane_pair<T> to) const {
    const T all = plan.stage[s].pooled ? T(0) : cotangent;
    each(p.pairs(), [&](int e) {
      to.k[e] = all;
      if (ntk) to.t[e] = all;
    });
    if (!plan.stage[s].pooled) return;
    each_pooled(plan.stage[s + 1], p, [&](int from, int64_t at) {
      to.k[from] = storage.k[at];
      if (ntk) to.t[from] = storage.t[at];
    });
  }

  // From the outputs of one layer to its inputs; `over` is overwritten in between.
  DDFAST_DEVICE void layer_backward(const conv_stage &s, int l, const conv_plane &p, plane_pair<T> in,
                                    plane_pair<T> by, plane_pair<T> over) const {
    const T scale = T(plan.scale(l)), bias = T(plan.bias_var);
    const int64_t of_layer = s.position + int64_t(l - s.first) * s.height * s.width;
    const bool own = self && p.a == 0 && p.b == 0;
    each_sum(p, in, ntk && l > 0, [&](int e, int i, int j, T sum_k, T sum_t) {
      const int64_t u = of_layer + p.x + i * p.width + j, v = of_layer + p.y + i * p.width + j;
      if (own) {
        over.k[e] = by.k[e] + by_norms[u];
        return;
      }
      const T k = scale * sum_k + bias, t = scale * sum_t + k;
      const T pair = root_x[u] * root_y[v], inverse = inverse_x[u] * inverse_y[v];
      const arc_cosine<T> a(k, pair, inverse);
      const T order0 = a.order0(), by_t = ntk ? by.t[e] : T(0);
      const T across = ntk ? by_t * t * a.slope0(inverse) : T(0);
      const T by_log = by.k[e] * a.sine(pair) - across * k;
      // The plane of opposite offset has as much for the other image.
      by_norms[u] += self ? by_log * (inverse_x[u] * inverse_x[u]) : by_log;
      over.k[e] = by.k[e] * order0 + across + by_t * order0;
      if (ntk) over.t[e] = by_t * order0;
    });
    each_sum(p, over, ntk && l > 0, [&](int e, int, int, T sum_k, T sum_t) {
      by.k[e] = scale * sum_k;
      if (ntk) by.t[e] = scale * sum_t;
    });
  }

  // After forward: adds the gradients of cotangent * (K + T) to by_x and by_norms (self: of the sum of
  // by_norms * variances, with what comes from later layers, to by_x). Overwrites the storage.
  DDFAST_DEVICE void backward(T cotangent) const {
    const int64_t image = plane_size();
    for (int s = plan.stages - 1; s >= 0; --s) {
      const conv_stage &stage = plan.stage[s];
      const plane_pair<T> by = buffer(stage_buffers()), over = buffer(stage_buffers() + 1);
      const int down = 2 * stage.reach_h + 1, across = 2 * stage.reach_w + 1;
      for (int q = 0; q < down * across + (self ? 1 : 0); ++q) {
        const bool own = q == down * across;  // the last, when all others have said what they want
        const int a = own ? 0 : q / across - stage.reach_h, b = own ? 0 : q % across - stage.reach_w;
        if (self && !own && a == 0 && b == 0) continue;
        const conv_plane p(stage, a, b);
        load(stage, p, buffer(0));
        for (int l = 0; l + 1 < stage.layers; ++l) layer(stage, stage.first + l, p, buffer(l), buffer(l + 1));
        receive(s, p, cotangent, by);
        for (int l = stage.layers - 1; l >= 0; --l) layer_backward(stage, stage.first + l, p, buffer(l), by, over);
        each(p.pairs(), [&](int e) {
          if (stage.first > 0) {
            storage.k[p.at + e] = by.k[e];
            if (ntk) storage.t[p.at + e] = by.t[e];
            return;
          }
          const int at = e / p.columns * p.width + e % p.columns;
          for (int c = 0; c < plan.channels; ++c) {
            const T step = by.k[e] * y[c * image + p.y + at];
            by_x[c * image + p.x + at] += self ? T(2) * step : step;
          }
        });
      }
    }
  }
  // Of the inputs of a stage's layers.
  DDFAST_DEVICE int stage_buffers() const {
    int most = 1;
    for (int s = 0; s < plan.stages; ++s) most = most_of(most, plan.stage[s].layers);
    return most;
  }
};

}  // namespace cuda
}  // namespace ddfast
