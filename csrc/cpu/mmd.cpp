// Squared maximum mean discrepancy of two sets of rows, and its gradient, in one pass over tiles.
//
//   MMD^2 = mean K(x, x') - 2 mean K(x, y) + mean K(y, y')
//
// For a kernel of the squared distance s with derivative K', c the weight of a block of pairs,
//
//   gradient of z_i = (sum_j w_ij) z_i - sum_j w_ij z_j,   w_ij = c K'(s_ij)
//
// so a tile of pairs is a matrix product, the kernel in cache, and one or two more products. No n x m
// matrix is ever stored. Rows are centred at the pooled mean, which changes no distance and keeps
// |a|^2 + |b|^2 - 2 <a, b> accurate.
#include "mmd_plan.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

// What depends on the class and on the sets of a pair.
struct weights {
  double value, gradient;
};

template <typename T> struct mmd_work {
  mmd_plan<T> plan;
  const mmd_arguments &x;
  double *sums;      // classes x blocks x blocks: of the kernel over each pair
  double *row_sums;  // classes x (n + m)
  T *rates;          // classes x bandwidths
  mmd_kernel<T> *kernels;
  int32_t *met;  // of a round: the first block of each pair

  mmd_work(const mmd_arguments &arguments, arena &memory) : plan(arguments, memory), x(arguments) {
    sums = memory.take<double>(x.classes * plan.pairs);
    row_sums = memory.take<double>(x.classes * (plan.n + plan.m));
    rates = memory.take<T>(x.classes * x.bandwidths);
    kernels = memory.take<mmd_kernel<T>>(x.classes);
    met = memory.take<int32_t>(plan.blocks);
  }

  bool distances() const { return x.kind != mmd_polynomial; }

  // Where the sum of a pair of blocks goes.
  int64_t pair_index(int64_t i, int64_t j) const { return j * (j + 1) / 2 + i; }

  // A bandwidth of zero leaves its term out; one that is no number makes everything so.
  mmd_kernel<T> kernel_of(int64_t c) const {
    mmd_kernel<T> f{x.kind, x.degree, 0, rates + c * x.bandwidths, true, T(0)};
    T *rate = rates + c * x.bandwidths;
    double smallest = 0;
    for (int64_t b = 0; b < x.bandwidths; ++b) {
      const double h = x.bandwidth[c * x.bandwidths + b];
      if (h == 0) continue;
      const T value = h > 0 ? T(1 / h) : T(NAN);
      int64_t at = f.count++;
      for (; at > 0 && rate[at - 1] > value; --at) rate[at] = rate[at - 1];
      rate[at] = value;
      smallest = smallest == 0 || h < smallest ? h : smallest;
    }
    for (int64_t b = 1; b < f.count; ++b) f.doubling = f.doubling && rate[b] == 2 * rate[b - 1];
    // A Gaussian feels an error of the distance only next to its bandwidth.
    if (x.kind == mmd_gaussian) f.exact_from = T(256 * smallest);
    return f;
  }

  // Of a pair of blocks: what the sum of its kernel values counts, and what their gradients do.
  weights weights_of(int64_t i, int64_t j) const {
    const double n = double(plan.n), m = double(plan.m), less = x.unbiased ? 1 : 0;
    const double slope = distances() ? 4 : 2;
    if (plan.of_x(i) != plan.of_x(j)) return {-2 / (n * m), -slope / (n * m)};
    const double own = plan.of_x(i) ? 1 / (n * (n - less)) : 1 / (m * (m - less));
    return {i == j ? own : 2 * own, slope * own};
  }

  T *gradient_of(int64_t c, int64_t block) const {
    T *of = static_cast<T *>(plan.of_x(block) ? x.by_x : x.by_y);
    return of ? of + (c * (plan.of_x(block) ? plan.n : plan.m) + plan.first_row(block)) * plan.d : nullptr;
  }
  double *row_sums_of(int64_t c, int64_t block) const {
    return row_sums + c * (plan.n + plan.m) + (plan.of_x(block) ? 0 : plan.n) + plan.first_row(block);
  }

  void pair(int64_t c, int64_t i, int64_t j, const mmd_local<T> &local) const {
    const bool self = i == j;
    const weights w = weights_of(i, j);
    T *by_left = gradient_of(c, i), *by_right = self ? nullptr : gradient_of(c, j);
    row_block<T> left{local.left, self ? local.transposed : nullptr, local.left_norms, plan.rows(i)};
    row_block<T> right = left;
    plan.pack(c, i, distances(), local.line, left);
    if (!self) {
      right = {local.right, local.transposed, local.right_norms, plan.rows(j)};
      plan.pack(c, j, distances(), local.line, right);
    }
    plan.products(left, right, local.tile);
    mmd_tile<T> t{};
    t.products = local.tile;
    t.step = tile_step<T>;
    t.left = left;
    t.right = right;
    t.panels = plan.panel;
    t.width = plan.d;
    t.self = self;
    t.line = local.line;
    t.factor = T(w.gradient);
    t.row_gradient = by_left;
    t.column_gradient = by_right;
    t.row_sums = by_left || by_right ? row_sums_of(c, i) : nullptr;
    t.column_sums = by_right ? row_sums_of(c, j) : nullptr;
    double sum = mmd_apply(t, kernels[c]);
    if (self && !x.unbiased) sum += diagonal(t, kernels[c]);
    sums[c * plan.pairs + pair_index(i, j)] = sum * w.value;
    if (by_left) add_rows(plan.d, local.tile, left.count, right, local.edge, by_left);
    if (by_right) add_columns(plan.d, plan.identity, local.tile, left, right.count, local.edge, by_right);
  }

  // The pairs of a row with itself, which have no rounding: K(0), or for the polynomial a factor of
  // the gradient too.
  double diagonal(const mmd_tile<T> &t, const mmd_kernel<T> &f) const {
    if (x.kind == mmd_energy) return 0;
    if (distances()) return double(f.count) * double(t.left.count);
    double sum = 0;
    for (int64_t i = 0; i < t.left.count; ++i) {
      T below = 1;
      for (int p = 1; p < f.degree; ++p) below *= t.left.norms[i] + T(1);
      sum += double(below * (t.left.norms[i] + T(1)));
      t.products[i * t.step + i] = t.factor * below * T(f.degree);
    }
    return sum;
  }

  // What is left of a row's gradient: its own share, and the cotangent.
  void finish(int64_t c, int64_t block) const {
    T *gradient = gradient_of(c, block);
    if (!gradient) return;
    const double *shares = row_sums_of(c, block);
    const T scale = T(x.scale ? x.scale[c] : 1);
    double z[mmd_sum_columns];
    for (int64_t r = 0; r < plan.rows(block); ++r, gradient += plan.d)
      for (int64_t first = 0; first < plan.d; first += mmd_sum_columns) {
        const int64_t count = plan.d - first < mmd_sum_columns ? plan.d - first : mmd_sum_columns;
        T *to = gradient + first;
        if (distances()) {
          mmd_load(plan.of_x(block) ? x.x : x.y, c, plan.first_row(block) + r, first, count, z);
          const T *centre = plan.centres + c * plan.d + first, share = T(shares[r]);
          for (int64_t k = 0; k < count; ++k) to[k] += share * (T(z[k]) - centre[k]);
        }
        if (x.scale)
          for (int64_t k = 0; k < count; ++k) to[k] *= scale;
      }
  }

  void run() const {
    const int64_t classes = x.classes, blocks = plan.blocks, tiles = ceiling(plan.d, mmd_sum_columns);
    for (int64_t c = 0; c < classes; ++c) kernels[c] = kernel_of(c);
    memset(row_sums, 0, size_t(classes * (plan.n + plan.m)) * sizeof(double));
#ifdef _OPENMP
#pragma omp parallel num_threads(plan.threads) if (plan.threads > 1)
#endif
    {
      int thread = 0;
#ifdef _OPENMP
      thread = omp_get_thread_num();
#endif
      const mmd_local<T> local = plan.local_of(thread);
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
      for (int64_t i = 0; i < classes * tiles; ++i) {
        const int64_t first = i % tiles * mmd_sum_columns, left = plan.d - first;
        if (distances()) plan.centre(i / tiles, first, left < mmd_sum_columns ? left : mmd_sum_columns);
      }
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
      for (int64_t i = 0; i < classes * blocks; ++i) {
        const int64_t c = i / blocks, block = i % blocks;
        if (T *gradient = gradient_of(c, block))
          memset(gradient, 0, size_t(plan.rows(block) * plan.d) * sizeof(T));
      }
      for (int64_t round = 0; round < blocks; ++round) {
        int64_t count = 0;
        for (int64_t i = 0; i < blocks; ++i) count += i <= plan.partner(round, i);
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
        for (int64_t task = 0; task < classes * count; ++task) {
          int64_t left = task % count, i = 0;
          while (i > plan.partner(round, i) || left-- > 0) ++i;
          pair(task / count, i, plan.partner(round, i), local);
        }
      }
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
      for (int64_t i = 0; i < classes * blocks; ++i) finish(i / blocks, i % blocks);
    }
    for (int64_t c = 0; c < classes; ++c) {
      x.value[c] = 0;
      for (int64_t p = 0; p < plan.pairs; ++p) x.value[c] += sums[c * plan.pairs + p];
    }
  }
};

// Without a tile: what the linear kernel's sums come to,
//
//   |mean x - mean y|^2, less the variances of both means if unbiased
template <typename T> struct linear_work {
  const mmd_arguments &x;

  struct columns {
    double origin[mmd_sum_columns], sums[2][mmd_sum_columns], squares[2][mmd_sum_columns];
  };

  void by_set(int64_t c, int64_t first, int64_t count, int side, const columns &s) const {
    const class_rows &set = side ? x.y : x.x;
    T *to = static_cast<T *>(side ? x.by_y : x.by_x);
    if (!to) return;
    const double n = double(x.x.rows), m = double(x.y.rows), rows = double(set.rows), sign = side ? -1 : 1;
    const double scale = x.scale ? x.scale[c] : 1, spread = x.unbiased ? 2 / (rows * (rows - 1)) : 0;
    double row[mmd_sum_columns];
    for (int64_t r = 0; r < set.rows; ++r) {
      if (x.unbiased) mmd_load(set, c, r, first, count, row);
      T *out = to + (c * set.rows + r) * x.width + first;
      for (int64_t k = 0; k < count; ++k) {
        const double by_mean = sign * 2 / rows * (s.sums[0][k] / n - s.sums[1][k] / m);
        const double own = x.unbiased ? spread * (row[k] - s.origin[k] - s.sums[side][k] / rows) : 0;
        out[k] = T(scale * (by_mean - own));
      }
    }
  }

  void run() const {
    for (int64_t c = 0; c < x.classes; ++c) x.value[c] = 0;
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(x.threads) if (x.threads > 1 && x.classes > 1)
#endif
    for (int64_t c = 0; c < x.classes; ++c)
      for (int64_t first = 0; first < x.width; first += mmd_sum_columns) {
        const int64_t left = x.width - first, count = left < mmd_sum_columns ? left : mmd_sum_columns;
        const double n = double(x.x.rows), m = double(x.y.rows);
        columns s;
        mmd_load(x.x, c, 0, first, count, s.origin);
        mmd_column_sums(x.x, c, first, count, s.origin, s.sums[0], s.squares[0]);
        mmd_column_sums(x.y, c, first, count, s.origin, s.sums[1], s.squares[1]);
        for (int64_t k = 0; k < count; ++k) {
          const double p = s.sums[0][k] / n, q = s.sums[1][k] / m, difference = p - q;
          x.value[c] += difference * difference;
          if (!x.unbiased) continue;
          x.value[c] -= (s.squares[0][k] - n * p * p) / (n * (n - 1)) + (s.squares[1][k] - m * q * q) / (m * (m - 1));
        }
        by_set(c, first, count, 0, s);
        by_set(c, first, count, 1, s);
      }
  }
};

template <typename T> int64_t scratch_of(const mmd_arguments &x) {
  arena memory{nullptr};
  mmd_work<T> work(x, memory);
  return memory.used;
}

template <typename T> void run(const mmd_arguments &x) {
  if (x.kind == mmd_linear) return linear_work<T>{x}.run();
  arena memory{static_cast<char *>(x.scratch)};
  mmd_work<T>(x, memory).run();
}

}  // namespace

int64_t mmd_scratch(const mmd_arguments &x) { return x.wide ? scratch_of<double>(x) : scratch_of<float>(x); }

void mmd(const mmd_arguments &x) { x.wide ? run<double>(x) : run<float>(x); }

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
