// The convolutional kernel, forward: every plane of position pairs goes through the layers of its
// stage without leaving the caches and is added to the planes behind the pool.
#include "conv_kernel_walk.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

// A sum that keeps what rounding takes from it.
template <typename T> struct conv_total {
  vector<T> sum = {}, low = {};
  void add(vector<T> value) {
    const vector<T> after = sum + value, added = after - sum;
    low += (sum - (after - added)) + (value - added);
    sum = after;
  }
  vector<T> value() const { return sum + low; }
};

template <typename T> vector<T> row_sum(const vector<T> *row, int64_t count) {
  vector<T> sum = {};
  for (int64_t j = 0; j < count; ++j) sum += row[j];
  return sum;
}

template <bool Ntk, bool Shared, typename T> struct conv_forward_walk : conv_walk<Ntk, Shared, T> {
  using conv_walk<Ntk, Shared, T>::m;
  using conv_walk<Ntk, Shared, T>::plan;
  using conv_walk<Ntk, Shared, T>::conv_walk;
  conv_total<T> k_total, t_total;

  // A row behind a pool receives `count` pairs, or sums of two.
  static DDFAST_INLINE void receive(const vector<T> *row, bool two, bool opens, int64_t count, vector<T> *out) {
    if (two)
      for (int64_t j = 0; j < count; ++j) out[j] += row[2 * j] + row[2 * j + 1];
    else if (opens)
      for (int64_t j = 0; j < count; ++j) out[j] = row[j];
    else
      for (int64_t j = 0; j < count; ++j) out[j] += row[j];
  }

  // The last layer of a stage that a pool follows.
  void pooled(int s, int l, const conv_plane &plane) {
    const conv_stage &behind = plan.stage[s + 1];
    conv_phase down[2], across[2];
    const int downs = conv_phases(plane.a, behind.height, behind.reach_h, down);
    const int acrosses = conv_phases(plane.b, behind.width, behind.reach_w, across);
    this->rows(
        plane, m.ring, [&](int64_t i, conv_rows<T> out) { this->enter(s, l, plane, i, out); },
        [&](int64_t i, conv_three<T> k, conv_three<T> t) {
          const conv_phase *vertical = nullptr;
          int64_t to = 0;
          if (!conv_row(down, downs, i, &vertical, &to)) return;
          for (const conv_phase *p = across; p < across + acrosses; ++p) {
            this->relu(s, l, plane, i, k, t, p->start, p->both ? 1 : 2, p->both ? 2 * p->count : p->count, m.row);
            const conv_rows<T> out = m.storage[s + 1].from(behind.plane(vertical->offset, p->offset) +
                                                           to * behind.columns(p->offset));
            const bool opens = vertical->opens && p->opens;
            receive(m.row.k, p->both, opens, p->count, out.k);
            if (Ntk) receive(m.row.t, p->both, opens, p->count, out.t);
          }
        });
  }

  void read(const conv_rows<T> &row, int64_t count, vector<T> *k, vector<T> *t) {
    *k += row_sum<T>(row.k, count);
    if (Ntk) *t += row_sum<T>(row.t, count);
  }

  // The last layer of the last stage, or its input if it has none.
  void last(int s, int l, const conv_plane &plane) {
    vector<T> k_sum = {}, t_sum = {};
    if (l < 0) {
      for (int64_t i = 0; i < plane.rows; ++i)
        read(m.storage[s].from(plane.at + i * plane.columns), plane.columns, &k_sum, &t_sum);
    } else {
      this->rows(
          plane, m.ring, [&](int64_t i, conv_rows<T> out) { this->enter(s, l, plane, i, out); },
          [&](int64_t i, conv_three<T> k, conv_three<T> t) {
            this->relu(s, l, plane, i, k, t, 0, 1, plane.columns, m.row);
            read(m.row, plane.columns, &k_sum, &t_sum);
          });
    }
    k_total.add(k_sum);
    if (Ntk) t_total.add(t_sum);
  }

  void stage(int s) {
    const conv_stage &now = plan.stage[s];
    for (int64_t a = -now.reach_h; a <= now.reach_h; ++a)
      for (int64_t b = -now.reach_w; b <= now.reach_w; ++b) {
        const conv_plane plane = conv_plane_of(now, a, b);
        for (int l = 0; l + 1 < now.layers; ++l) this->inner(s, l, plane);
        now.pooled ? pooled(s, now.layers - 1, plane) : last(s, now.layers - 1, plane);
      }
  }

  // Variances before each layer of a stage, which are the K of the plane of offset 0.
  void norms_of(int s) {
    const conv_stage &now = plan.stage[s];
    const conv_plane plane = conv_plane_of(now, 0, 0);
    for (int l = 0; l < now.layers; ++l) {
      const T scale = T(plan.scale(now.first + l)), bias = T(plan.bias_var);
      const int64_t first = now.position + l * now.height * now.width;
      this->rows(
          plane, m.ring, [&](int64_t i, conv_rows<T> out) { this->enter(s, l, plane, i, out); },
          [&](int64_t i, conv_three<T> k, conv_three<T>) {
            for (int64_t j = 0; j < plane.columns; ++j) {
              const int64_t at = i * plane.columns + j;
              const vector<T> v = k.sum(j) * scale + bias;
              m.variances[first + at] = v;
              conv_norms_of(v, m.x.inverse + (first + at) * width_of<T>, m.x.root + (first + at) * width_of<T>);
              if (l + 1 < now.layers) m.input(l + 1).k[at] = v;  // 2 S = V
            }
          });
    }
  }
};

template <bool Ntk, bool Shared, typename T> void forward(const conv_memory<T> &memory, T *k, T *t) {
  conv_forward_walk<Ntk, Shared, T> walk(memory);
  for (int s = 0; s < memory.plan->stages; ++s) walk.stage(s);
  write(k, walk.k_total.value());
  write(t, walk.t_total.value());
}

}  // namespace

template <typename T> void conv_forward(const conv_memory<T> &memory, bool shared, T *k, T *t) {
  if (memory.row.t)
    shared ? forward<true, true>(memory, k, t) : forward<true, false>(memory, k, t);
  else
    shared ? forward<false, true>(memory, k, t) : forward<false, false>(memory, k, t);
}

template <typename T> void conv_variances(const conv_memory<T> &memory) {
  conv_forward_walk<false, false, T> walk(memory);
  for (int s = 0; s < memory.plan->stages; ++s) {
    walk.norms_of(s);
    if (s + 1 < memory.plan->stages) walk.stage(s);
  }
}

template void conv_forward<float>(const conv_memory<float> &, bool, float *, float *);
template void conv_forward<double>(const conv_memory<double> &, bool, double *, double *);
template void conv_variances<float>(const conv_memory<float> &);
template void conv_variances<double>(const conv_memory<double> &);

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
