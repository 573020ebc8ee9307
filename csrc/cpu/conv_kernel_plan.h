// The geometry of a convolutional kernel: which pairs of positions are needed, and where they lie.
//
// A convolution and a ReLU keep the offset between the two positions of a pair, so pairs are kept in
// planes of equal offset (a, b): position (i + max(a, 0), j + max(b, 0)) of one image with
// (i + max(-a, 0), j + max(-b, 0)) of the other. Only pools mix offsets: offset D after a pool comes
// from 2D - 1, 2D and 2D + 1 before it. Layers between two pools form a stage.
#pragma once

#include "common.h"
#include "kernels.h"

namespace ddfast {
namespace DDFAST_LEVEL {

constexpr int conv_most_stages = 64;  // a pool halves the image, whose sides are less than 2^63

// The pairs that lie before plane `offset` along one axis, of planes from -reach on.
inline int64_t conv_before(int64_t size, int64_t reach, int64_t offset) {
  const int64_t negative = offset < 0 ? -offset : 0, positive = offset > 0 ? offset : 0;
  const int64_t missing = (reach * (reach + 1) - negative * (negative + 1) + positive * (positive - 1)) / 2;
  return size * (offset + reach) - missing;
}

inline int64_t absolute(int64_t a) { return a < 0 ? -a : a; }

struct conv_stage {
  int64_t height, width;
  int64_t reach_h, reach_w;  // offsets from -reach to reach are needed
  int first, layers;         // of the network
  bool pooled;               // a pool follows
  int64_t position;          // of its first layer in what is kept per layer and position

  int64_t rows(int64_t a) const { return height - absolute(a); }
  int64_t columns(int64_t b) const { return width - absolute(b); }
  // Where the planes of this stage's input lie in its storage, and how many pairs they have.
  int64_t plane(int64_t a, int64_t b) const {
    return conv_before(height, reach_h, a) * conv_before(width, reach_w, reach_w + 1) +
           rows(a) * conv_before(width, reach_w, b);
  }
  int64_t pairs() const { return plane(reach_h + 1, -reach_w); }
};

// The plane of offset (a, b) of a stage.
struct conv_plane {
  int64_t a, b, rows, columns;
  int64_t at;      // in storage
  int64_t x, y;    // the positions of its first pair, row by row
  int64_t stride;  // from row to row in the images
};

inline conv_plane conv_plane_of(const conv_stage &stage, int64_t a, int64_t b) {
  const int64_t x = (a > 0 ? a * stage.width : 0) + (b > 0 ? b : 0);
  const int64_t y = (a < 0 ? -a * stage.width : 0) + (b < 0 ? -b : 0);
  return {a, b, stage.rows(a), stage.columns(b), stage.plane(a, b), x, y, stage.width};
}

struct conv_plan {
  conv_stage stage[conv_most_stages];
  int stages, layers;
  int64_t channels, positions;  // positions: of one image, summed over the layers
  double weight_var, bias_var, readout;  // readout: what the sums before it are multiplied by
  const unsigned char *pools;

  // The pool and the ReLU hand on sums of 2 S; what the next convolution multiplies them by.
  double scale(int layer) const {
    if (layer == 0) return weight_var / double(9 * channels);
    return weight_var / (pools[layer - 1] ? 16 * 18 : 18);
  }
};

// variances: only what the last layer's variances need, which is no readout.
inline conv_plan conv_plan_of(const conv_kernel_arguments &x, bool variances) {
  conv_plan plan{};
  plan.layers = x.layers;
  plan.channels = x.channels;
  plan.weight_var = x.weight_var, plan.bias_var = x.bias_var;
  plan.pools = x.pools;
  int64_t height = x.height, width = x.width;
  plan.stages = 1;
  plan.stage[0] = {height, width, 0, 0, 0, 0, false, 0};
  for (int layer = 0; layer < x.layers; ++layer) {
    conv_stage &now = plan.stage[plan.stages - 1];
    ++now.layers;
    plan.positions += height * width;
    if (!x.pools[layer] || (variances && layer + 1 == x.layers)) continue;
    now.pooled = true;
    height /= 2, width /= 2;
    plan.stage[plan.stages++] = {height, width, 0, 0, layer + 1, 0, false, plan.positions};
  }
  const bool all = x.gap && !variances;
  int64_t reach_h = all ? height - 1 : 0, reach_w = all ? width - 1 : 0;
  for (int s = plan.stages - 1; s >= 0; --s) {
    conv_stage &now = plan.stage[s];
    now.reach_h = reach_h < now.height ? reach_h : now.height - 1;
    now.reach_w = reach_w < now.width ? reach_w : now.width - 1;
    reach_h = 2 * now.reach_h + 1, reach_w = 2 * now.reach_w + 1;
  }
  const double count = double(height * width);
  plan.readout = x.weight_var / (all ? count * count : count);
  plan.readout /= x.pools[x.layers - 1] ? 32 : 2;
  return plan;
}

// How the pairs of a plane along one axis go into the planes behind a pool: `count` pairs of that
// plane take each a pair from start, start + 2, ..., and the next one too if `both`.
struct conv_phase {
  int64_t start, offset, count;
  bool both;
  bool opens;  // the first that the plane behind the pool receives, as offsets increase
};

inline int conv_phases(int64_t offset, int64_t size, int64_t reach, conv_phase *phases) {
  int found = 0;
  const auto add = [&](int64_t start, int64_t to, bool both, bool opens) {
    if (absolute(to) <= reach) phases[found++] = {start, to, size - absolute(to), both, opens};
  };
  if (offset % 2 == 0) {
    add(0, offset / 2, true, false);
  } else {
    // An even position is the first of its window, so the other one, at an odd position, the second.
    const int64_t below = (offset - 1) / 2;
    add(offset > 0 ? 0 : 1, below, false, false);
    add(offset > 0 ? 1 : 0, below + 1, false, true);
  }
  return found;
}

// What becomes of one row: nothing, or it goes to row `row` behind the pool.
inline bool conv_row(const conv_phase *phases, int count, int64_t i, const conv_phase **phase, int64_t *row) {
  for (int k = 0; k < count; ++k) {
    const int64_t at = phases[k].both ? i : i - phases[k].start;
    if (at < 0 || (!phases[k].both && at % 2 != 0) || at / 2 >= phases[k].count) continue;
    *phase = phases + k;
    *row = at / 2;
    return true;
  }
  return false;
}

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
