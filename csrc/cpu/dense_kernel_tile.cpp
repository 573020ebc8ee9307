// All layers of a tile of pairs, a vector of pairs at a time, in registers: no matrix per layer.
#include "arc_cosine.h"
#include "dense_kernel.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

// Variances below this count as zero: the inverses of two of them must have a product.
template <typename T> constexpr T least_variance = T(sizeof(T) == 4 ? 1e-30 : 1e-280);
// Between these, and zero, two variances have a product without overflow or loss.
template <typename T> constexpr T least_exact = T(sizeof(T) == 4 ? 1e-18 : 1e-140);
template <typename T> constexpr T most_exact = T(sizeof(T) == 4 ? 1e18 : 1e140);

// One place, so that covariances and variances are rounded alike.
template <typename T> DDFAST_INLINE vector<T> affine(vector<T> x, T factor, T constant) { return x * factor + constant; }

// The first `count` elements, zeros behind them.
template <typename T> DDFAST_INLINE vector<T> read_some(const T *from, int64_t count) {
  if (count >= width_of<T>) return read(from);
  vector<T> v = {};
  memcpy(&v, from, size_t(count) * sizeof(T));
  return v;
}
template <typename T> DDFAST_INLINE void write_some(T *to, vector<T> v, int64_t count) {
  if (count >= width_of<T>) return write(to, v);
  memcpy(to, &v, size_t(count) * sizeof(T));
}

template <typename T> struct layer_pair {
  vector<T> p, inverse;  // sqrt(q q'), 1 / p
};

// sqrt(q q) is q exactly where the product is in range; sqrt(q) sqrt(q) would be that but for rounding.
template <typename T>
DDFAST_INLINE layer_pair<T> pair_of(const dense_network<T> &f, const dense_tile<T> &t, int64_t l, int64_t i, int64_t j) {
  const T q = t.left.q[l * t.left.step + i], inverse = t.left.inverse[l * t.left.step + i];
  const vector<T> others = read(t.right.q + l * t.right.step + j);
  const vector<T> inverses = read(t.right.inverse + l * t.right.step + j);
  const vector<T> p = f.exact[l] ? square_root(others * q) : (others * inverses) * (q * inverse);
  return {p, inverses * inverse};
}

// K and T of a vector of pairs, T only where it is wanted.
template <typename T> struct moments {
  vector<T> k, tangent;
};

template <typename T> struct layer_state {
  arc_cosine<T> a;
  vector<T> p, inverse, order0, tangent;
};

template <typename T, bool ntk> DDFAST_INLINE void advance(const dense_network<T> &f, moments<T> &m, layer_state<T> &s) {
  if (ntk) s.order0 = s.a.order0();
  m.k = affine(s.a.order1(), f.half, f.bias);
  if (ntk) m.tangent = m.k + (s.order0 * f.half) * m.tangent;
}

// A row with itself: c = 1.
template <typename T> T diagonal_of(const dense_network<T> &f, const dense_tile<T> &t, int64_t i) {
  T tangent = t.left.q[i];
  for (int64_t l = 1; l <= f.depth; ++l) {
    const T k = t.left.q[l * t.left.step + i];
    tangent = f.ntk ? k + f.half * tangent : k;
  }
  return tangent;
}

template <typename T> T diagonal_slope(const dense_network<T> &f) {
  T by_k = f.ntk ? T(0) : T(1), by_tangent = f.ntk ? T(1) : T(0);
  for (int64_t l = 0; l < f.depth; ++l) {
    by_k = f.half * (by_k + by_tangent);
    by_tangent *= f.half;
  }
  return by_k + by_tangent;
}

template <typename T, bool ntk> void forward(const dense_network<T> &f, const dense_tile<T> &t) {
  for (int64_t i = 0; i < t.rows; ++i) {
    const T *products = t.tile + i * t.tile_step;
    for (int64_t j = 0; j < t.columns; j += width_of<T>) {
      moments<T> m;
      m.tangent = m.k = affine(read(products + j), f.scale, f.bias);
      if (t.gram) write_some(t.gram + i * t.step + j, m.k, t.columns - j);
      for (int64_t l = 0; l < f.depth; ++l) {
        const layer_pair<T> pair = pair_of(f, t, l, i, j);
        layer_state<T> s{arc_cosine<T>(m.k, pair.p, pair.inverse), {}, {}, {}, {}};
        advance<T, ntk>(f, m, s);
      }
      write_some(t.out + i * t.step + j, ntk ? m.tangent : m.k, t.columns - j);
    }
    const int64_t own = i - t.diagonal;
    if (own < 0 || own >= t.columns) continue;
    t.out[i * t.step + own] = diagonal_of(f, t, i);
    if (t.gram) t.gram[i * t.step + own] = t.left.q[i];
  }
}

// From the cotangent of one vector of pairs to that of K of layer 0; `logarithm` collects what each
// layer's p, times p, weighs in the gradient of q of layer 0.
template <typename T, bool ntk, bool by_rows>
DDFAST_INLINE vector<T> backward(const dense_network<T> &f, const dense_tile<T> &t, int64_t i, int64_t j, vector<T> k,
                                 vector<T> grad, vector<T> &logarithm) {
  const vector<T> zero = {};
  layer_state<T> *states = reinterpret_cast<layer_state<T> *>(t.state);
  moments<T> m{k, k};
  for (int64_t l = 0; l < f.depth; ++l) {
    const layer_pair<T> pair = pair_of(f, t, l, i, j);
    layer_state<T> s{arc_cosine<T>(m.k, pair.p, pair.inverse), pair.p, pair.inverse, {}, m.tangent};
    if (!ntk) s.order0 = s.a.order0();
    advance<T, ntk>(f, m, s);
    states[l] = s;
  }
  vector<T> by_k = ntk ? zero : grad, by_tangent = ntk ? grad : zero;
  for (int64_t l = f.depth - 1; l >= 0; --l) {
    const layer_state<T> &s = states[l];
    if (ntk) by_k += by_tangent;
    const vector<T> across = ntk ? by_tangent * s.tangent * s.a.slope0(s.inverse) : zero;
    vector<T> by_p = by_k * s.a.sine(s.p);
    if (ntk) by_p -= across * s.a.k;
    by_p *= f.half;
    logarithm += by_rows ? by_p * t.left.share[l * t.left.step + i] : by_p * read(t.right.share + l * t.right.step + j);
    const vector<T> slope = s.order0 * f.half;
    by_k = by_k * slope;
    if (ntk) by_k += across * f.half, by_tangent *= slope;
  }
  return by_k + by_tangent;
}

template <typename T, bool ntk, bool by_rows>
void backward(const dense_network<T> &f, const dense_tile<T> &t, double *by_q) {
  // In double: what cancels in these sums need not cancel in their rounding.
  double of_columns[block_rows + width_of<T>] = {};
  const T slope = diagonal_slope(f);
  for (int64_t i = 0; i < t.rows; ++i) {
    double of_row = 0;
    const int64_t own = i - t.diagonal;
    for (int64_t j = 0; j < t.columns; j += width_of<T>) {
      const int64_t left = t.columns - j;
      vector<T> grad = read_some(t.grad + i * t.step + j, left);
      if (t.grad_transposed) grad += read_some(t.grad_transposed + i * t.tile_step + j, left);
      T own_grad = 0;
      const bool meets = j <= own && own < j + width_of<T> && own < t.columns;
      if (meets) own_grad = grad[own - j], grad[own - j] = 0;
      vector<T> sum = {};
      vector<T> by_k =
          backward<T, ntk, by_rows>(f, t, i, j, read_some<T>(t.gram + i * t.step + j, left), grad, sum);
      if (meets) by_k[own - j] = own_grad * slope, sum[own - j] = 0;
      write(t.tile + i * t.tile_step + j, by_k);
      if (by_rows)
        for (int64_t k = 0; k < width_of<T> && k < left; ++k) of_row += double(sum[k]);
      else
        for (int64_t k = 0; k < width_of<T>; ++k) of_columns[j + k] += double(sum[k]);
    }
    if (by_rows) by_q[i] += of_row;
  }
  for (int64_t j = 0; !by_rows && j < t.columns; ++j) by_q[j] += of_columns[j];
}

}  // namespace

template <typename T>
void dense_variances(const dense_network<T> &f, const row_panels &panels, int64_t d, const T *transposed, int64_t count,
                     T *q) {
  const int64_t whole = d / panels.panel * panels.panel;
  for (int64_t r = 0; r < count; r += width_of<T>) {
    const int64_t panel = r / panels.panel, columns = panels.columns(count, panel);
    const T *rows = transposed + panel * panels.panel * d + r % panels.panel;
    vector<T> total = {};
    for (int64_t k = 0; k < d;) {
      // As block_products: whole panels, product_depth at a time, then what is left.
      const int64_t end = k >= whole ? d : (whole - k < product_depth ? whole : k + product_depth);
      vector<T> sum = {};
      for (; k < end; ++k) {
        const vector<T> x = read(rows + k * columns);
        sum += x * x;
      }
      total = total + sum;
    }
    write(q + r, affine(total, f.scale, f.bias));
  }
}

template <typename T> void dense_layers(const dense_network<T> &f, const dense_rows<T> &rows, int64_t count) {
  const vector<T> zero = {};
  T power = T(0.5);
  for (int64_t l = 0; l <= f.depth; ++l, power *= f.half)
    for (int64_t i = 0; i < count; i += width_of<T>) {
      const vector<T> q = read(rows.q + l * rows.step + i);
      const vector_mask<T> small = q < broadcast(least_variance<T>);  // not a NaN
      write(rows.inverse + l * rows.step + i, small ? zero : T(1) / square_root(q));
      write(rows.share + l * rows.step + i, small ? zero : power / q);
      if (l < f.depth) write(rows.q + (l + 1) * rows.step + i, affine(q, f.half, f.bias));
    }
}

template <typename T>
void dense_ranges(const dense_network<T> &f, const dense_rows<T> &rows, int64_t count, bool *exact) {
  for (int64_t l = 0; l < f.depth; ++l)
    for (int64_t i = 0; i < count; ++i) {
      const T q = rows.q[l * rows.step + i];
      // What is not finite spoils no other row.
      exact[l] = exact[l] && !(q > most_exact<T> && q - q == 0) && !(q < least_exact<T> && q != 0);
    }
}

template <typename T> int64_t dense_state_bytes(int64_t depth) { return depth * int64_t(sizeof(layer_state<T>)); }

template <typename T> void dense_forward(const dense_network<T> &f, const dense_tile<T> &t) {
  f.ntk ? forward<T, true>(f, t) : forward<T, false>(f, t);
}

template <typename T>
void dense_backward(const dense_network<T> &f, const dense_tile<T> &t, bool by_rows, double *by_q) {
  if (f.ntk)
    by_rows ? backward<T, true, true>(f, t, by_q) : backward<T, true, false>(f, t, by_q);
  else
    by_rows ? backward<T, false, true>(f, t, by_q) : backward<T, false, false>(f, t, by_q);
}

template <typename T>
void dense_transpose(const T *source, int64_t source_row, int64_t rows, int64_t columns, T *target,
                     int64_t target_row) {
  transpose(source, source_row, rows, columns, target, target_row);
}

#define DDFAST_INSTANCES(T)                                                                                       \
  template void dense_variances<T>(const dense_network<T> &, const row_panels &, int64_t, const T *, int64_t, T *); \
  template void dense_layers<T>(const dense_network<T> &, const dense_rows<T> &, int64_t);                         \
  template void dense_ranges<T>(const dense_network<T> &, const dense_rows<T> &, int64_t, bool *);                 \
  template int64_t dense_state_bytes<T>(int64_t);                                                                  \
  template void dense_forward<T>(const dense_network<T> &, const dense_tile<T> &);                                 \
  template void dense_backward<T>(const dense_network<T> &, const dense_tile<T> &, bool, double *);                \
  template void dense_transpose<T>(const T *, int64_t, int64_t, int64_t, T *, int64_t);
DDFAST_INSTANCES(float)
DDFAST_INSTANCES(double)

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
