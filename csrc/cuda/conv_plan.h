// The geometry of a convolutional kernel, as csrc/cpu/conv_kernel_plan.h has it: planes of pairs of
// positions of equal offset, which convolution and ReLU keep and pools mix; only those that the readout
// needs.
#pragma once

#include "block.h"

namespace ddfast {
namespace cuda {

constexpr int most_stages = 12, most_layers = 64;

struct conv_stage {
  int height, width;
  int reach_h, reach_w;  // offsets from -reach to reach are needed
  int first, layers;     // of the network
  bool pooled;           // a pool follows
  int64_t position;      // of its first layer among all positions of an image
  int64_t at;            // of its planes in storage; the first stage has none there
};

struct conv_plan {
  conv_stage stage[most_stages];
  int stages, layers, channels;
  int64_t positions, storage;  // of one image, summed over layers; of all stages but the first
  bool pools[most_layers];
  double weight_var, bias_var, readout;

  // Pools and ReLUs hand on sums of twice their values; what the next convolution multiplies by.
  DDFAST_BOTH double scale(int layer) const {
    return layer == 0 ? weight_var / (9.0 * channels) : weight_var / (pools[layer - 1] ? 288.0 : 18.0);
  }
};

DDFAST_BOTH int most_of(int a, int b) { return a > b ? a : b; }
DDFAST_BOTH int size_of(int size, int offset) { return size - most_of(offset, -offset); }

// The pairs in front of plane `offset` along one axis, planes from -reach on.
DDFAST_BOTH int64_t pairs_before(int64_t size, int64_t reach, int64_t offset) {
  const int64_t negative = offset < 0 ? -offset : 0, positive = offset > 0 ? offset : 0;
  return size * (offset + reach) -
         (reach * (reach + 1) - negative * (negative + 1) + positive * (positive - 1)) / 2;
}

struct conv_plane {
  int a, b, rows, columns, width;
  int x, y;    // the positions of its first pair
  int64_t at;  // in storage

  DDFAST_DEVICE conv_plane(const conv_stage &s, int a_, int b_)
      : a(a_), b(b_), rows(size_of(s.height, a_)), columns(size_of(s.width, b_)), width(s.width),
        x(most_of(a_, 0) * s.width + most_of(b_, 0)), y(most_of(-a_, 0) * s.width + most_of(-b_, 0)),
        at(s.at + pairs_before(s.height, s.reach_h, a_) * pairs_before(s.width, s.reach_w, s.reach_w + 1) +
           rows * pairs_before(s.width, s.reach_w, b_)) {}
  DDFAST_DEVICE int pairs() const { return rows * columns; }
};

// Along one axis: pairs start, start + 2, ... of a plane, and the next one of each if `both`, go to
// `count` pairs of the plane `offset` behind the pool.
struct conv_phase {
  int start, offset, count;
  bool both;
};
DDFAST_DEVICE int phases_of(int offset, int size, int reach, conv_phase *phases) {
  int found = 0;
  const int below = offset % 2 == 0 ? offset / 2 : (offset - 1) / 2;
  for (int to = below; to <= below + (offset % 2 != 0); ++to) {
    const bool upper = (to > below) == (offset > 0);
    const int start = offset % 2 == 0 || !upper ? 0 : 1, count = size_of(size, to);
    if (most_of(to, -to) <= reach && count > 0) phases[found++] = {start, to, count, offset % 2 == 0};
  }
  return found;
}

// variances: what the variances of the last layer need, which is no readout. False: too many layers.
inline bool conv_plan_of(conv_plan *plan, int height, int width, int channels, const unsigned char *pools, int layers,
                         bool gap, double weight_var, double bias_var, bool variances) {
  *plan = conv_plan{};
  if (layers < 1 || layers > most_layers) return false;
  plan->layers = layers;
  plan->channels = channels;
  plan->weight_var = weight_var, plan->bias_var = bias_var;
  plan->stages = 1;
  plan->stage[0].height = height, plan->stage[0].width = width;
  for (int layer = 0; layer < layers; ++layer) {
    conv_stage &now = plan->stage[plan->stages - 1];
    plan->pools[layer] = pools[layer] != 0;
    ++now.layers;
    plan->positions += int64_t(height) * width;
    if (!plan->pools[layer] || (variances && layer + 1 == layers)) continue;
    if (plan->stages == most_stages) return false;
    now.pooled = true;
    height /= 2, width /= 2;
    conv_stage &next = plan->stage[plan->stages++];
    next.height = height, next.width = width;
    next.first = layer + 1;
    next.position = plan->positions;
  }
  const bool all = gap && !variances;
  int reach_h = all ? height - 1 : 0, reach_w = all ? width - 1 : 0;
  for (int s = plan->stages - 1; s >= 0; --s) {
    conv_stage &now = plan->stage[s];
    now.reach_h = reach_h < now.height ? reach_h : now.height - 1;
    now.reach_w = reach_w < now.width ? reach_w : now.width - 1;
    reach_h = 2 * now.reach_h + 1, reach_w = 2 * now.reach_w + 1;
    if (s == 0) break;
    now.at = plan->storage;
    plan->storage += pairs_before(now.height, now.reach_h, now.reach_h + 1) *
                     pairs_before(now.width, now.reach_w, now.reach_w + 1);
  }
  const double count = double(height) * width;
  plan->readout = weight_var / (all ? count * count : count) / (plan->pools[layers - 1] ? 32 : 2);
  return true;
}

}  // namespace cuda
}  // namespace ddfast
