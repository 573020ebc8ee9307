// The kernel of a pair of images and its gradient by the first one, by a block of groups of lanes.
//
// A block says how its groups run: `block.each_group(size, f)` calls f(group, number, groups) for all
// groups of `size` lanes and waits for them, `block.threads` is the number of lanes of all.
#pragma once

#include "planes.h"

namespace ddfast_cuda {

DDFAST_BOTH int lanes_of(int width) {
  int size = 1;
  while (size < width) size *= 2;
  return size;
}

// Offsets in a block's scratch memory, where every lane has a column of its own: what stands before
// each ReLU of a plane, sums of the gradients by each layer's variances, and by the image.
struct scratch_layout {
  int64_t kept, variances[most_levels], image, size;
};
DDFAST_BOTH scratch_layout layout_of(const network &net, int threads) {
  scratch_layout out{};
  int64_t kept = 0;
  for (int l = 0; l < net.count; ++l) {
    const level &at = net.levels[l];
    const int64_t rows = int64_t(2) * at.convs * at.height * threads;
    kept = kept > rows ? kept : rows;
  }
  out.size = kept;
  for (int l = 0; l < net.count; ++l) {
    out.variances[l] = out.size;
    out.size += int64_t(net.levels[l].convs) * net.levels[l].height * threads;
  }
  out.image = out.size;
  out.size += int64_t(net.channels) * net.levels[0].height * threads;
  return out;
}

// Positions that the readout takes the mean of.
DDFAST_DEVICE float positions(const network &net) {
  const level &last = net.levels[net.count - 1];
  const float one = float(last.height) * last.width;
  const bool gap = last.down || last.across;
  return gap ? one * one : one;
}

// --- forward ---

template <int convs>
DDFAST_DEVICE void pool_plane(const group &g, const network &net, const image_pair &pair, const plane &on,
                              float *state) {
  through<convs>(
      g, net, pair, on, state,
      [&](int h, const both_lanes &row) {
        add_pooled(g, net, on, h, row.k, false, state);
        if (net.ntk) add_pooled(g, net, on, h, row.t, true, state);
      },
      [](int, int, const both_lanes &) {});
}

template <int convs>
DDFAST_DEVICE void read_plane(const group &g, const network &net, const image_pair &pair, const plane &on,
                              const float *state, both_lanes *total) {
  through<convs>(
      g, net, pair, on, state,
      [&](int, const both_lanes &row) {
        g.each([&](int w) { total->k[w] += row.k[w], total->t[w] += row.t[w]; });
      },
      [](int, int, const both_lanes &) {});
}

#define DDFAST_BY_CONVS(convs, call) \
  switch (convs) {                   \
  case 0: call(0); break;            \
  case 1: call(1); break;            \
  case 2: call(2); break;            \
  default: call(3); break;           \
  }

// All planes of the pair: fills `state`. The result lies in sums[0] (K) and sums[1] (T), before the
// readout's Dense layer; `sums` has two numbers for each group.
template <typename Block>
DDFAST_DEVICE void forward_pair(Block &block, const network &net, const image_pair &pair, float *state, float *sums) {
  block.fill(state, net.state_size);
  for (int l = 0; l < net.count; ++l) {
    const level &at = net.levels[l];
    if (!at.pooled) {
      block.each_group(lanes_of(at.width), [&](const group &g, int number, int groups) {
        both_lanes total;
        g.each([&](int w) { total.k[w] = total.t[w] = 0; });
        const int across = 2 * at.across + 1, planes = (2 * at.down + 1) * across;
        for (int task = number; task < planes; task += groups) {
          const plane on = plane_of(net, l, task / across - at.down, task % across - at.across);
#define DDFAST_READ(convs) read_plane<convs>(g, net, pair, on, state, &total)
          DDFAST_BY_CONVS(at.convs, DDFAST_READ)
        }
        const float k = g.sum(total.k), t = g.sum(total.t);
        if (g.leads()) sums[2 * number] = k, sums[2 * number + 1] = t;
      });
      const int groups = block.threads / lanes_of(at.width);
      block.once([&] {
        for (int i = 1; i < groups; ++i) sums[0] += sums[2 * i], sums[1] += sums[2 * i + 1];
        sums[0] /= positions(net), sums[1] /= positions(net);
      });
      continue;
    }
    for (int phase = 0; phase < 9; ++phase) {
      const offsets down = offsets_of(at.down, phase / 3), across = offsets_of(at.across, phase % 3);
      block.each_group(lanes_of(at.width), [&](const group &g, int number, int groups) {
        for (int task = number; task < down.count * across.count; task += groups) {
          const int dh = down.first + task / across.count * down.step;
          const int dw = across.first + task % across.count * across.step;
          const plane on = plane_of(net, l, dh, dw);
#define DDFAST_POOL(convs) pool_plane<convs>(g, net, pair, on, state)
          DDFAST_BY_CONVS(at.convs, DDFAST_POOL)
        }
      });
    }
  }
}

// The kernel's entry, from what `forward_pair` left.
DDFAST_DEVICE float after_readout(const network &net, const float *sums) {
  const float k = net.weight_var * sums[0] + net.bias_var;
  return net.ntk ? net.weight_var * sums[1] + k : k;
}

// --- backward ---

// Takes the gradient back through one plane: from the next level's planes (or `readout`, that of
// each position of the readout, of K as of T) to this level's, or to the first image.
template <int convs>
DDFAST_DEVICE void backward_plane(const group &g, const network &net, const image_pair &pair, const plane &on,
                                  float readout, float *state, float *kept, float *variances, float *image,
                                  int threads, int first_lane) {
  const level &at = net.levels[on.level];
  const float scale = net.weight_var / 9;
  const bool same = pair.same && !on.dh && !on.dw;
  const auto slot = [&](int s, bool t, int h, int w) {
    return (int64_t(2 * s + t) * at.height + h) * threads + first_lane + w;
  };
  const auto give = [&](int h, int w, float k, float t) {  // to what entered the level
    if (on.level) {
      state[plane_start(at, on.dh, on.dw, false) + h * at.width + w] = k;
      if (net.ntk) state[plane_start(at, on.dh, on.dw, true) + h * at.width + w] = t;
      return;
    }
    const int size = at.height * at.width;
    const float *y = pair.y + (h + on.dh) * at.width + w + on.dw;
    for (int c = 0; c < net.channels; ++c)
      image[(int64_t(c) * at.height + h) * threads + first_lane + w] += k / net.channels * y[c * size];
  };
  if (convs == 0) {
    for (int h = on.first; h < on.last; ++h)
      g.each([&](int w) {
        if (inside(w, on.dw, at.width)) give(h, w, readout, readout);
      });
    return;
  }
  through<convs>(
      g, net, pair, on, state, [](int, const both_lanes &) {},
      [&](int s, int h, const both_lanes &row) {
        g.each([&](int w) { kept[slot(s, false, h, w)] = row.k[w], kept[slot(s, true, h, w)] = row.t[w]; });
      });
#pragma unroll
  for (int s = convs - 1; s >= 0; --s) {
    const float *r1 = pair.deviations_x + net.tables[at.layer + s];
    const float *r2 = pair.deviations_y + net.tables[at.layer + s];
    lanes before[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) g.each([&](int w) { before[i][w] = 0; });
    for (int h = on.first; h <= on.last; ++h) {
      both_lanes row;
      g.each([&](int w) {
        row.k[w] = row.t[w] = 0;
        if (h == on.last || !inside(w, on.dw, at.width)) return;
        float by_value = readout, by_t = readout;
        if (s < convs - 1) {
          by_value = kept[slot(s + 1, false, h, w)], by_t = kept[slot(s + 1, true, h, w)];
        } else if (at.pooled) {
          const level &next = net.levels[on.level + 1];
          const int64_t from = pooled_at(next, on, h, w, false);
          by_value = from < 0 ? 0.0f : state[from] * 0.0625f;
          by_t = from < 0 || !net.ntk ? 0.0f : state[pooled_at(next, on, h, w, true)] * 0.0625f;
        }
        if (!net.ntk) by_t = 0;
        const float k = kept[slot(s, false, h, w)], t = kept[slot(s, true, h, w)];
        const float a = r1[h * at.width + w], b = r2[(h + on.dh) * at.width + w + on.dw], p = a * b;
        const rectified o = rectify(k, p, same);
        float by_k = by_value * o.both;
        if (o.regular) {
          const float q = sqrtf((p - fabsf(k)) * (p + fabsf(k))), slope = by_t * t / q;
          by_k += slope / two_pi;
          variances[(int64_t(s) * at.height + h) * threads + first_lane + w] +=
              (by_value * q - slope * k) / (2 * two_pi) / (a * a);
        }
        row.t[w] = by_t * o.both;
        row.k[w] = by_k + row.t[w];
      });
      const lanes kl = g.left(row.k), kr = g.right(row.k), tl = g.left(row.t), tr = g.right(row.t);
      const int out = h - 1;
      g.each([&](int w) {
        const float k3 = kl[w] + row.k[w] + kr[w], t3 = tl[w] + row.t[w] + tr[w];
        const float k = scale * (before[0][w] + before[1][w] + k3), t = scale * (before[2][w] + before[3][w] + t3);
        before[0][w] = before[1][w], before[1][w] = k3;
        before[2][w] = before[3][w], before[3][w] = t3;
        if (out < on.first || !inside(w, on.dw, at.width)) return;
        if (s)
          kept[slot(s, false, out, w)] = k, kept[slot(s, true, out, w)] = t;
        else
          give(out, w, k, t);
      });
    }
  }
}

// Adds to `scratch` the gradient of one entry of the kernel, times `grad`.
template <typename Block>
DDFAST_DEVICE void backward_pair(Block &block, const network &net, const image_pair &pair, float grad, float *state,
                                 float *sums, float *scratch) {
  forward_pair(block, net, pair, state, sums);
  const scratch_layout layout = layout_of(net, block.threads);
  const float readout = net.weight_var * grad / positions(net);
  for (int l = net.count - 1; l >= 0; --l) {
    const level &at = net.levels[l];
    const int size = lanes_of(at.width);
    block.each_group(size, [&](const group &g, int number, int groups) {
      const int across = 2 * at.across + 1, planes = (2 * at.down + 1) * across;
      for (int task = number; task < planes; task += groups) {
        const plane on = plane_of(net, l, task / across - at.down, task % across - at.across);
#define DDFAST_BACK(convs)                                                                                   \
  backward_plane<convs>(g, net, pair, on, readout, state, scratch + layout.kept,                             \
                        scratch + layout.variances[l], scratch + layout.image, block.threads, number * size)
        DDFAST_BY_CONVS(at.convs, DDFAST_BACK)
      }
    });
  }
}

// The sum over all groups of what `backward_pair` added up: by the variances (table_size numbers),
// then by the image.
template <typename Block>
DDFAST_DEVICE void gather(Block &block, const network &net, const float *scratch, float *out) {
  const scratch_layout layout = layout_of(net, block.threads);
  const auto columns = [&](const float *rows, int count, const level &at, float *to) {
    const int size = lanes_of(at.width);
    block.spread(count * at.width, [&](int i) {
      const float *row = rows + int64_t(i / at.width) * block.threads + i % at.width;
      float sum = 0;
      for (int lane = 0; lane < block.threads; lane += size) sum += row[lane];
      to[i] = sum;
    });
  };
  for (int l = 0; l < net.count; ++l) {
    const level &at = net.levels[l];
    if (at.convs) columns(scratch + layout.variances[l], at.convs * at.height, at, out + net.tables[at.layer]);
  }
  columns(scratch + layout.image, net.channels * net.levels[0].height, net.levels[0], out + net.table_size);
}

}  // namespace ddfast_cuda
