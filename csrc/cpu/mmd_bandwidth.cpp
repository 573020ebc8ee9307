// Bandwidths of mmd from the pooled rows: the mean and the median of their squared distances.
#include "mmd_plan.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

// With z about the first row of x, N rows in all, sum over pairs of |z_i - z_j|^2
//   = 2 N sum |z_i|^2 - 2 |sum z_i|^2
double mean_distance(const mmd_arguments &x, int64_t c) {
  const double rows = double(x.x.rows + x.y.rows);
  double total = 0;
  for (int64_t first = 0; first < x.width; first += mmd_sum_columns) {
    const int64_t left = x.width - first, count = left < mmd_sum_columns ? left : mmd_sum_columns;
    double origin[mmd_sum_columns], sums[2][mmd_sum_columns], squares[2][mmd_sum_columns];
    mmd_load(x.x, c, 0, first, count, origin);
    mmd_column_sums(x.x, c, first, count, origin, sums[0], squares[0]);
    mmd_column_sums(x.y, c, first, count, origin, sums[1], squares[1]);
    for (int64_t k = 0; k < count; ++k) {
      const double sum = sums[0][k] + sums[1][k];
      total += 2 * rows * (squares[0][k] + squares[1][k]) - 2 * sum * sum;
    }
  }
  return total < 0 ? 0 : total / (rows * rows - rows);
}

// The bits of floats that are not negative are in the order of their values.
template <typename T> struct bits_of;
template <> struct bits_of<float> {
  typedef uint32_t type;
};
template <> struct bits_of<double> {
  typedef uint64_t type;
};

// The lower median by its digits in base 65536, the highest first: for each, all distances that
// agree with the digits found so far are counted by the next one. Exact, and without room for the
// distances, which are computed again for every digit.
template <typename T> struct median_work {
  typedef typename bits_of<T>::type bits;
  static constexpr int64_t bins = 65536;
  static constexpr int digits = int(sizeof(T)) / 2;
  const mmd_plan<T> &plan;
  const mmd_arguments &x;

  void count_pair(int64_t c, int64_t i, int64_t j, bits found, int digit, const mmd_local<T> &local,
                  int64_t *counts) const {
    mmd_tile<T> t{};
    t.left = {local.left, i == j ? local.transposed : nullptr, local.left_norms, plan.rows(i)};
    plan.pack(c, i, true, local.line, t.left);
    t.right = t.left;
    if (i != j) {
      t.right = {local.right, local.transposed, local.right_norms, plan.rows(j)};
      plan.pack(c, j, true, local.line, t.right);
    }
    plan.products(t.left, t.right, local.tile);
    t.products = local.tile;
    t.step = tile_step<T>;
    t.panels = plan.panel;
    t.width = plan.d;
    t.self = i == j;
    mmd_distances(t);
    const int shift = 16 * (digits - 1 - digit);
    for (int64_t r = 0; r < t.left.count; ++r)
      for (int64_t k = t.self ? r + 1 : 0; k < t.right.count; ++k) {
        bits value;
        memcpy(&value, t.products + r * t.step + k, sizeof value);
        // Two shifts: one of all bits would be undefined.
        if ((value >> shift >> 16) == found) ++counts[(value >> shift) & (bins - 1)];
      }
  }

  double run(int64_t c, int64_t *counts) const {
    const int64_t rows = plan.n + plan.m, blocks = plan.blocks;
    int64_t rank = (rows * (rows - 1) / 2 - 1) / 2;
    bits found = 0;
    for (int digit = 0; digit < digits; ++digit) {
      memset(counts, 0, size_t(plan.threads * bins) * sizeof(int64_t));
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) num_threads(plan.threads) if (plan.threads > 1)
#endif
      for (int64_t p = 0; p < blocks * blocks; ++p) {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        if (p / blocks <= p % blocks)
          count_pair(c, p / blocks, p % blocks, found, digit, plan.local_of(thread), counts + thread * bins);
      }
      for (int thread = 1; thread < plan.threads; ++thread)
        for (int64_t b = 0; b < bins; ++b) counts[b] += counts[thread * bins + b];
      int64_t bin = 0;
      for (; rank >= counts[bin]; ++bin) rank -= counts[bin];
      found = bits(found << 16 | bits(bin));
    }
    T median;
    memcpy(&median, &found, sizeof median);
    return double(median);
  }
};

template <typename T> void medians(const mmd_arguments &x) {
  arena memory{static_cast<char *>(x.scratch)};
  const mmd_plan<T> plan(x, memory);
  scratch<int64_t> counts(plan.threads * median_work<T>::bins);
  for (int64_t c = 0; c < x.classes; ++c) {
    for (int64_t first = 0; first < x.width; first += mmd_sum_columns)
      plan.centre(c, first, x.width - first < mmd_sum_columns ? x.width - first : mmd_sum_columns);
    x.value[c] = median_work<T>{plan, x}.run(c, counts.data);
  }
}

}  // namespace

void mmd_mean_distance(const mmd_arguments &x) {
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(x.threads) if (x.threads > 1 && x.classes > 1)
#endif
  for (int64_t c = 0; c < x.classes; ++c) x.value[c] = mean_distance(x, c);
}

void mmd_median_distance(const mmd_arguments &x) { x.wide ? medians<double>(x) : medians<float>(x); }

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
