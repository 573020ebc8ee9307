// From inner products to kernel values, their sum, and the factors of the gradient, row by row while
// the tile is in cache.
//
// |a|^2 + |b|^2 - 2 <a, b> loses what a and b have in common. Where little is left of it, the pair is
// computed from the difference of its rows, and so is its gradient; in the tile it then counts as a
// pair at distance zero, which has the kernel's largest value and no gradient.
#include "mmd.h"
#include "vector.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

// Below this part of the norms a distance is taken from the difference.
template <typename T> constexpr T near_part = T(1) / 1024;

// Kernel values of a vector of squared distances (or, for the polynomial, of inner products), and
// the factors of the gradient but for those of the whole tile.
template <typename T> struct pair_values {
  vector<T> kernel, slope;
};

// e^-x for x >= 0, zero where it would be next to nothing: `exponential` stops at its smallest value.
template <typename T> constexpr T longest = T(sizeof(T) == 4 ? 87 : 700);
template <typename T> DDFAST_INLINE vector<T> decay(vector<T> x) {
  return x > broadcast(longest<T>) ? vector<T>{} : exponential(-x);
}

template <typename T, int kind>
DDFAST_INLINE pair_values<T> values_of(const mmd_kernel<T> &f, vector<T> s, vector<T> root_of_s) {
  const vector<T> zero = {}, one = broadcast(T(1));
  if (kind == mmd_polynomial) {
    vector<T> below = one;
    for (int p = 1; p < f.degree; ++p) below *= s + T(1);
    return {below * (s + T(1)), below * T(f.degree)};
  }
  if (kind == mmd_energy) return {-root_of_s, s > zero ? T(0.5) / root_of_s : zero};
  const vector<T> at = kind == mmd_laplace ? root_of_s : s;
  pair_values<T> sum = {zero, zero};
  if (f.count > 0) {
    vector<T> e = decay<T>(at * f.rate[0]);
    sum = {e, e * f.rate[0]};
    for (int64_t b = 1; b < f.count; ++b) {
      e = f.doubling ? e * e : decay<T>(at * f.rate[b]);
      sum.kernel += e;
      sum.slope += e * f.rate[b];
    }
  }
  if (kind == mmd_laplace) sum.slope = sum.slope * T(0.5) / root_of_s;
  sum.slope = s > zero ? sum.slope : (s == zero ? zero : s);  // a NaN stays
  return sum;
}

template <typename T> struct row_result {
  T kernel, slope;  // of one pair
};
template <typename T, int kind> row_result<T> value_of(const mmd_kernel<T> &f, T s) {
  const pair_values<T> v = values_of<T, kind>(f, broadcast(s), broadcast(s > 0 ? root(s) : T(0)));
  return {v.kernel[0], v.slope[0]};
}

// Element k of row r of a packed block.
template <typename T> struct packed_row {
  const mmd_tile<T> &t;
  const T *rows;
  int64_t r;
  // f(element, first column, columns) for each piece that lies side by side
  template <typename F> DDFAST_INLINE void pieces(const F &f) const {
    for (int64_t p = 0; p < t.panels.count(t.width); ++p) {
      const int64_t first = p * t.panels.panel, step = t.panels.columns(t.width, p);
      const int64_t left = t.width - first;
      f(rows + first * block_rows + r * step, first, left < step ? left : step);
    }
  }
};

template <typename T> T difference(const mmd_tile<T> &t, int64_t i, int64_t j) {
  T partial[lanes] = {};
  const T *right = t.right.rows;
  packed_row<T>{t, t.left.rows, i}.pieces([&](const T *a, int64_t first, int64_t count) {
    const T *b = right + first * block_rows + j * t.panels.columns(t.width, first / t.panels.panel);
    int64_t k = 0;
    for (; k + lanes <= count; k += lanes)
      for (int64_t l = 0; l < lanes; ++l) partial[l] += (a[k + l] - b[k + l]) * (a[k + l] - b[k + l]);
    for (int64_t l = 0; k + l < count; ++l) partial[l] += (a[k + l] - b[k + l]) * (a[k + l] - b[k + l]);
  });
  return fold(partial);
}

// The gradient of one pair, added directly.
template <typename T> void add_pair(const mmd_tile<T> &t, int64_t i, int64_t j, T slope) {
  T *to = t.row_gradient ? t.row_gradient + i * t.width : nullptr;
  T *other = t.column_gradient ? t.column_gradient + j * t.width : nullptr;
  const T *right = t.right.rows;
  packed_row<T>{t, t.left.rows, i}.pieces([&](const T *a, int64_t first, int64_t count) {
    const T *b = right + first * block_rows + j * t.panels.columns(t.width, first / t.panels.panel);
    for (int64_t k = 0; k < count; ++k) {
      const T step = slope * (b[k] - a[k]);
      if (to) to[first + k] += step;
      if (other) other[first + k] -= step;
    }
  });
}

// Squared distances of row i in place; true if there are near pairs among them.
template <typename T> bool distances_of_row(const mmd_tile<T> &t, int64_t i, T exact_from) {
  T *row = t.products + i * t.step;
  const vector<T> zero = {}, norm = broadcast(t.left.norms[i]), from = broadcast(exact_from);
  vector_mask<T> near = {};
  for (int64_t j = 0; j < t.right.count; j += width_of<T>) {
    const vector<T> norms = norm + read(t.right.norms + j);
    vector<T> s = norms - T(2) * read(row + j);
    s = s < zero ? zero : s;
    near |= (s < norms * near_part<T>) & (norms > from);
    write(row + j, s);
  }
  if (t.self) row[i] = 0;
  vector_mask<T> any = near;
  for (int64_t k = 1; k < width_of<T>; ++k) any[0] |= any[k];
  return any[0] != 0;
}

template <typename T> bool is_near(const mmd_tile<T> &t, int64_t i, int64_t j, T exact_from) {
  const T norms = t.left.norms[i] + t.right.norms[j];
  return t.products[i * t.step + j] < norms * near_part<T> && norms > exact_from && !(t.self && i == j);
}

template <typename T> DDFAST_INLINE vector<T> first_lanes(vector<T> value, int64_t count) {
  for (int64_t k = count; k < width_of<T>; ++k) value[k] = 0;
  return value;
}

template <typename T, int kind, bool weights> double apply(const mmd_tile<T> &t, const mmd_kernel<T> &f) {
  constexpr bool distances = kind != mmd_polynomial;
  double lane_sums[width_of<T>] = {}, sum = 0;
  const row_result<T> at_zero = value_of<T, kind>(f, T(0));
  T *roots = t.line, *near_values = t.line + block_rows, *column_sums = t.line + 2 * block_rows;
  int32_t near_columns[block_rows];
  for (int64_t j = 0; j < block_rows; ++j) column_sums[j] = roots[j] = 0;
  for (int64_t i = 0; i < t.left.count; ++i) {
    T *row = t.products + i * t.step;
    int64_t near = 0;
    if (distances && distances_of_row(t, i, f.exact_from))
      for (int64_t j = 0; j < t.right.count; ++j)
        if (is_near(t, i, j, f.exact_from)) {
          near_values[near] = difference(t, i, j);
          row[j] = 0;
          near_columns[near++] = int32_t(j);
        }
    if (kind == mmd_energy || kind == mmd_laplace)
      for (int64_t j = 0; j < t.right.count; ++j) roots[j] = root(row[j]);
    vector<T> kernels = {}, slopes = {};
    for (int64_t j = 0; j < t.right.count; j += width_of<T>) {
      pair_values<T> v = values_of<T, kind>(f, read(row + j), read(roots + j));
      if (j + width_of<T> > t.right.count)
        v = {first_lanes<T>(v.kernel, t.right.count - j), first_lanes<T>(v.slope, t.right.count - j)};
      if (t.self && j <= i && i < j + width_of<T>) v.kernel[i - j] = v.slope[i - j] = 0;
      kernels += v.kernel;
      if (!weights) continue;
      v.slope *= t.factor;
      write(row + j, v.slope);
      if (!distances) continue;
      slopes += v.slope;
      if (t.column_sums) write(column_sums + j, read(column_sums + j) + v.slope);
    }
    for (int64_t k = 0; k < width_of<T>; ++k) lane_sums[k] += double(kernels[k]);
    if (weights && distances) {
      double slope = 0;
      for (int64_t k = 0; k < width_of<T>; ++k) slope += double(slopes[k]);
      t.row_sums[i] -= slope;
    }
    for (int64_t k = 0; k < near; ++k) {
      const row_result<T> v = value_of<T, kind>(f, near_values[k]);
      sum += double(v.kernel) - double(at_zero.kernel);
      if (weights) add_pair(t, i, near_columns[k], v.slope * t.factor);
    }
  }
  for (int64_t j = 0; weights && t.column_sums && j < t.right.count; ++j) t.column_sums[j] -= double(column_sums[j]);
  for (int64_t k = 0; k < width_of<T>; ++k) sum += lane_sums[k];
  return sum;
}

template <typename T, int kind> double apply(const mmd_tile<T> &t, const mmd_kernel<T> &f) {
  return t.row_sums ? apply<T, kind, true>(t, f) : apply<T, kind, false>(t, f);
}

}  // namespace

template <typename T> double mmd_apply(const mmd_tile<T> &t, const mmd_kernel<T> &f) {
  switch (f.kind) {
  case mmd_gaussian: return apply<T, mmd_gaussian>(t, f);
  case mmd_laplace: return apply<T, mmd_laplace>(t, f);
  case mmd_energy: return apply<T, mmd_energy>(t, f);
  default: return apply<T, mmd_polynomial>(t, f);
  }
}

template <typename T> void mmd_distances(const mmd_tile<T> &t) {
  for (int64_t i = 0; i < t.left.count; ++i)
    if (distances_of_row(t, i, T(0)))
      for (int64_t j = 0; j < t.right.count; ++j)
        if (is_near(t, i, j, T(0))) t.products[i * t.step + j] = difference(t, i, j);
}

template double mmd_apply<float>(const mmd_tile<float> &, const mmd_kernel<float> &);
template double mmd_apply<double>(const mmd_tile<double> &, const mmd_kernel<double> &);
template void mmd_distances<float>(const mmd_tile<float> &);
template void mmd_distances<double>(const mmd_tile<double> &);

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
