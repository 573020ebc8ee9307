// One layer over one plane of position pairs, row by row: what enters it is read, or made of pixels,
// row by row too, so that three rows at a time are in the first cache.
#pragma once

#include "conv_kernel.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

template <bool Ntk, bool Shared, typename T> struct conv_walk {
  const conv_memory<T> &m;
  const conv_plan &plan;

  explicit conv_walk(const conv_memory<T> &memory) : m(memory), plan(*memory.plan) {}

  // Sums of neighbours of row i of what enters layer `l` of stage `s`.
  DDFAST_INLINE void enter(int s, int l, const conv_plane &plane, int64_t i, conv_rows<T> out) const {
    if (s == 0 && l == 0) {
      const int64_t c = plan.channels;
      const T *x = conv_at<Shared>(m.x.pixels, (plane.x + i * plane.stride) * c);
      const T *y = conv_at<false>(m.y.pixels, (plane.y + i * plane.stride) * c);
      if (c == 3) return conv_products<3, Shared>(x, y, c, plane.columns, out.k);
      if (c == 1) return conv_products<1, Shared>(x, y, c, plane.columns, out.k);
      return conv_products<0, Shared>(x, y, c, plane.columns, out.k);
    }
    const conv_rows<T> in = (l == 0 ? m.storage[s].from(plane.at) : m.input(l)).from(i * plane.columns);
    conv_neighbours<T>(plane.columns, [&](int64_t j) { return in.k[j]; }, out.k);
    if (Ntk) conv_neighbours<T>(plane.columns, [&](int64_t j) { return in.t[j]; }, out.t);
  }

  // fill(i, row) for every row i, and use(i, k, t) as soon as its neighbours are there.
  template <typename Fill, typename Use>
  DDFAST_INLINE void rows(const conv_plane &plane, const conv_rows<T> *ring, Fill fill, Use use) const {
    const auto three = [&](int64_t i) {
      const auto row = [&](int64_t r) { return r < 0 || r >= plane.rows ? conv_rows<T>{m.zeros, m.zeros} : ring[r % 3]; };
      const conv_rows<T> before = row(i - 1), at = row(i), after = row(i + 1);
      use(i, conv_three<T>{before.k, at.k, after.k}, conv_three<T>{before.t, at.t, after.t});
    };
    for (int64_t i = 0; i < plane.rows; ++i) {
      fill(i, ring[i % 3]);
      if (i > 0) three(i - 1);
    }
    three(plane.rows - 1);
  }

  // What row i of a plane is normalised by in layer `l` of stage `s`.
  DDFAST_INLINE conv_norms<T> norms(int s, int l, const conv_plane &plane, int64_t i) const {
    const conv_stage &stage = plan.stage[s];
    const int64_t first = stage.position + l * stage.height * stage.width + i * plane.stride;
    const int64_t x = first + plane.x, y = first + plane.y;
    return {conv_at<Shared>(m.x.inverse, x), conv_at<Shared>(m.x.root, x), conv_at<false>(m.y.inverse, y),
            conv_at<false>(m.y.root, y)};
  }

  DDFAST_INLINE void relu(int s, int l, const conv_plane &plane, int64_t i, conv_three<T> k, conv_three<T> t,
                          int64_t start, int64_t step, int64_t count, conv_rows<T> out) const {
    const T scale = T(plan.scale(plan.stage[s].first + l)), bias = T(plan.bias_var);
    const conv_norms<T> by = norms(s, l, plane, i);
    if (s == 0 && l == 0)
      conv_relu<true, Ntk, Shared>(k, t, scale, bias, by, start, step, count, out);
    else
      conv_relu<false, Ntk, Shared>(k, t, scale, bias, by, start, step, count, out);
  }

  // Layer `l`, which another one follows in its stage.
  void inner(int s, int l, const conv_plane &plane) const {
    rows(
        plane, m.ring, [&](int64_t i, conv_rows<T> out) { enter(s, l, plane, i, out); },
        [&](int64_t i, conv_three<T> k, conv_three<T> t) {
          relu(s, l, plane, i, k, t, 0, 1, plane.columns, m.input(l + 1).from(i * plane.columns));
        });
  }
};

}  // namespace
}  // namespace DDFAST_LEVEL
}  // namespace ddfast
