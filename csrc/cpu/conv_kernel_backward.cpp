// The convolutional kernel, backward: every plane is computed once more from what entered its stage,
// and its gradient goes where that came from, the planes of the stage before or the pixels.
#include "conv_kernel_walk.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

template <bool Ntk, bool Shared, typename T> struct conv_backward_walk : conv_walk<Ntk, Shared, T> {
  using conv_walk<Ntk, Shared, T>::m;
  using conv_walk<Ntk, Shared, T>::plan;
  vector<T> cotangent;  // by K and by T in front of the readout
  bool variances;       // the gradient of variances, not of the readout

  conv_backward_walk(const conv_memory<T> &memory, vector<T> by_readout, bool of_variances)
      : conv_walk<Ntk, Shared, T>(memory), cotangent(by_readout), variances(of_variances) {}

  static void fill(const conv_rows<T> &row, vector<T> value, int64_t count) {
    for (int64_t j = 0; j < count; ++j) row.k[j] = value;
    if (Ntk)
      for (int64_t j = 0; j < count; ++j) row.t[j] = value;
  }

  static void spread(const vector<T> *from, const conv_phase &phase, vector<T> *row) {
    for (int64_t j = 0; j < phase.count; ++j) {
      row[phase.start + 2 * j] = from[j];
      if (phase.both) row[2 * j + 1] = from[j];
    }
  }

  // One layer of one plane. Gradients arrive from behind a pool, or from the readout, or in m.adjoint.
  void layer(int s, int l, const conv_plane &plane) {
    const conv_stage &now = plan.stage[s];
    const bool is_last = l + 1 == now.layers, is_first = s == 0 && l == 0;
    const bool own = variances && plane.a == 0 && plane.b == 0;
    const T scale = T(plan.scale(now.first + l)), bias = T(plan.bias_var);
    const int64_t position = now.position + l * now.height * now.width;
    conv_phase down[2], across[2];
    int downs = 0, acrosses = 0;
    if (is_last && now.pooled) {
      downs = conv_phases(plane.a, plan.stage[s + 1].height, plan.stage[s + 1].reach_h, down);
      acrosses = conv_phases(plane.b, plan.stage[s + 1].width, plan.stage[s + 1].reach_w, across);
    }

    // The gradient by the ReLU's row i, or false if it is zero; columns in steps from start on.
    const auto arrive = [&](int64_t i, int64_t *start, int64_t *step, int64_t *count, conv_rows<T> *grad) {
      *start = 0, *step = 1, *count = plane.columns;
      *grad = m.row2;
      if (!is_last) {
        *grad = m.adjoint.from(i * plane.columns);
        return true;
      }
      if (!now.pooled) {
        if (variances) return false;
        fill(m.row2, cotangent, plane.columns);
        return true;
      }
      const conv_phase *vertical = nullptr;
      int64_t from = 0;
      if (!conv_row(down, downs, i, &vertical, &from) || acrosses == 0) return false;
      for (const conv_phase *p = across; p < across + acrosses; ++p) {
        const conv_stage &behind = plan.stage[s + 1];
        const conv_rows<T> source = m.storage[s + 1].from(behind.plane(vertical->offset, p->offset) +
                                                          from * behind.columns(p->offset));
        spread(source.k, *p, m.row2.k);
        if (Ntk) spread(source.t, *p, m.row2.t);
      }
      if (acrosses == 2) {
        *count = across[0].count + across[1].count;
      } else {
        *start = across[0].start;
        *step = across[0].both ? 1 : 2;
        *count = across[0].both ? 2 * across[0].count : across[0].count;
      }
      return true;
    };

    // Row i on its way through the ReLU, and the sums of its neighbours.
    const auto relu = [&](int64_t i, conv_three<T> k, conv_three<T> t, conv_rows<T> out) {
      int64_t start, step, count;
      conv_rows<T> grad;
      const bool any = arrive(i, &start, &step, &count, &grad);
      if (!any || count < plane.columns) fill(m.row, vector<T>{}, plane.columns);
      const int64_t at = position + i * plane.stride;
      if (any) {
        vector<T> *by_x = m.by_norms_x ? m.by_norms_x + at + plane.x : nullptr;
        vector<T> *by_y = m.by_norms_y ? m.by_norms_y + at + plane.y : nullptr;
        const conv_norms<T> by = this->norms(s, l, plane, i);
        if (is_first)
          conv_relu_back<true, Ntk, Shared>(k, t, scale, bias, by, start, step, count, grad, m.row, by_x, by_y);
        else
          conv_relu_back<false, Ntk, Shared>(k, t, scale, bias, by, start, step, count, grad, m.row, by_x, by_y);
      }
      if (own)
        for (int64_t j = 0; j < plane.columns; ++j) {
          const vector<T> inverse = read(m.x.inverse + (at + j) * width_of<T>);
          m.row.k[j] += m.by_variance[at + j] + m.by_norms_x[at + j] * (inverse * inverse * T(0.5));
        }
      conv_neighbours<T>(plane.columns, [&](int64_t j) { return m.row.k[j]; }, out.k);
      if (Ntk && !is_first) conv_neighbours<T>(plane.columns, [&](int64_t j) { return m.row.t[j]; }, out.t);
    };

    const auto leave = [&](int64_t i, conv_three<T> k, conv_three<T> t) {
      if (is_first) {
        const int64_t c = plan.channels, x = (plane.x + i * plane.stride) * c, y = (plane.y + i * plane.stride) * c;
        const T *pixels_x = conv_at<Shared>(m.x.pixels, x), *pixels_y = conv_at<false>(m.y.pixels, y);
        vector<T> *by_x = m.by_pixels_x ? m.by_pixels_x + x : nullptr;
        vector<T> *by_y = m.by_pixels_y ? m.by_pixels_y + y : nullptr;
        if (c == 3) return conv_products_back<3, Shared>(pixels_x, pixels_y, c, plane.columns, k, scale, by_x, by_y);
        if (c == 1) return conv_products_back<1, Shared>(pixels_x, pixels_y, c, plane.columns, k, scale, by_x, by_y);
        return conv_products_back<0, Shared>(pixels_x, pixels_y, c, plane.columns, k, scale, by_x, by_y);
      }
      const conv_rows<T> out = (l == 0 ? m.storage[s].from(plane.at) : m.adjoint).from(i * plane.columns);
      for (int64_t j = 0; j < plane.columns; ++j) out.k[j] = k.sum(j) * scale;
      if (Ntk)
        for (int64_t j = 0; j < plane.columns; ++j) out.t[j] = t.sum(j) * scale;
    };

    // Two waves: a row of the way back needs three of the way forth, and leaves a row later.
    int64_t gone = 0;
    const auto three_back = [&](int64_t i) {
      const auto row = [&](int64_t r) {
        return r < 0 || r >= plane.rows ? conv_rows<T>{m.zeros, m.zeros} : m.back_ring[r % 3];
      };
      const conv_rows<T> before = row(i - 1), at = row(i), after = row(i + 1);
      leave(i, conv_three<T>{before.k, at.k, after.k}, conv_three<T>{before.t, at.t, after.t});
    };
    this->rows(
        plane, m.ring, [&](int64_t i, conv_rows<T> out) { this->enter(s, l, plane, i, out); },
        [&](int64_t i, conv_three<T> k, conv_three<T> t) {
          relu(i, k, t, m.back_ring[i % 3]);
          if (i > 0) three_back(gone++);
        });
    three_back(gone);
  }

  void plane(int s, int64_t a, int64_t b) {
    const conv_stage &now = plan.stage[s];
    const conv_plane plane = conv_plane_of(now, a, b);
    for (int l = 0; l + 1 < now.layers; ++l) this->inner(s, l, plane);
    for (int l = now.layers - 1; l >= 0; --l) layer(s, l, plane);
  }

  void stage(int s) {
    const conv_stage &now = plan.stage[s];
    const bool last = s + 1 == plan.stages;
    if (now.layers == 0) return fill(m.storage[s], cotangent, now.pairs());
    if (!(variances && last))
      for (int64_t a = -now.reach_h; a <= now.reach_h; ++a)
        for (int64_t b = -now.reach_w; b <= now.reach_w; ++b)
          if (!(variances && a == 0 && b == 0)) plane(s, a, b);
    // Where an image meets itself all that its variances receive goes on, so this comes last.
    if (variances) plane(s, 0, 0);
  }
};

template <bool Ntk, bool Shared, typename T>
void backward(const conv_memory<T> &memory, vector<T> cotangent, bool variances) {
  conv_backward_walk<Ntk, Shared, T> walk(memory, cotangent, variances);
  for (int s = memory.plan->stages - 1; s >= 0; --s) walk.stage(s);
}

}  // namespace

template <typename T> void conv_backward(const conv_memory<T> &memory, bool shared, const T *cotangents) {
  const vector<T> by_readout = read(cotangents) * T(memory.plan->readout);
  if (memory.row.t)
    shared ? backward<true, true>(memory, by_readout, false) : backward<true, false>(memory, by_readout, false);
  else
    shared ? backward<false, true>(memory, by_readout, false) : backward<false, false>(memory, by_readout, false);
}

template <typename T> void conv_variances_backward(const conv_memory<T> &memory) {
  backward<false, false>(memory, vector<T>{}, true);
}

template void conv_backward<float>(const conv_memory<float> &, bool, const float *);
template void conv_backward<double>(const conv_memory<double> &, bool, const double *);
template void conv_variances_backward<float>(const conv_memory<float> &);
template void conv_variances_backward<double>(const conv_memory<double> &);

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
