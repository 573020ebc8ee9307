// The transforms of Winograd's F(4x4, 3x3) over vectors of channels.
//
// Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016, with evaluation
// points 0, a, -a, b, -b and infinity. A tile of 4x4 results needs 36 products in place of 144:
//
//   result           = At [ (G w Gt) * (Bt d B) ] A     d: 6x6 inputs, w: 3x3 weights
//   weight gradient  = Gt [ (Bt d B) * (A g At) ] G     g: 4x4 gradients of the result
#pragma once

#include "conv.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

// With 3/4 and 3/2 the rounding error is half of that with the usual 1 and 2: they and their squares
// are exact, and the factors are closer to each other.
constexpr double point_a = 0.75, point_b = 1.5;
constexpr double a2 = point_a * point_a, b2 = point_b * point_b;
// The factors of G: one over the product of a point's differences to the others.
constexpr double norm_0 = 1 / (a2 * b2), norm_a = 1 / (2 * a2 * (a2 - b2)), norm_b = 1 / (2 * b2 * (b2 - a2));

// Bt: six inputs.
template <typename T, typename V> inline void input_transform(const V *d, int64_t step, V *to) {
  const T A = T(point_a), B = T(point_b), A2 = T(a2), B2 = T(b2), S = T(a2 + b2), P = T(a2 * b2);
  const V d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step];
  const V even_a = d4 - d2 * B2, odd_a = (d3 - d1 * B2) * A;
  const V even_b = d4 - d2 * A2, odd_b = (d3 - d1 * A2) * B;
  to[0] = d[0] * P + (d4 - d2 * S);
  to[1] = even_a + odd_a;
  to[2] = even_a - odd_a;
  to[3] = even_b + odd_b;
  to[4] = even_b - odd_b;
  to[5] = d1 * P + (d[5 * step] - d3 * S);
}

// At: six products to four results.
template <typename T, typename V> inline void output_transform(const V *m, int64_t step, V *to) {
  const T A = T(point_a), B = T(point_b), A2 = T(a2), B2 = T(b2), A3 = T(a2 * point_a), B3 = T(b2 * point_b);
  const V sum_a = m[step] + m[2 * step], difference_a = m[step] - m[2 * step];
  const V sum_b = m[3 * step] + m[4 * step], difference_b = m[3 * step] - m[4 * step];
  to[0] = m[0] + sum_a + sum_b;
  to[1] = difference_a * A + difference_b * B;
  to[2] = sum_a * A2 + sum_b * B2;
  to[3] = difference_a * A3 + (difference_b * B3 + m[5 * step]);
}

// A: four gradients of results to six.
template <typename T, typename V> inline void gradient_transform(const V *g, int64_t step, V *to) {
  const T A = T(point_a), B = T(point_b), A2 = T(a2), B2 = T(b2), A3 = T(a2 * point_a), B3 = T(b2 * point_b);
  const V g1 = g[step], g2 = g[2 * step], g3 = g[3 * step];
  const V even_a = g[0] + g2 * A2, odd_a = g1 * A + g3 * A3;
  const V even_b = g[0] + g2 * B2, odd_b = g1 * B + g3 * B3;
  to[0] = g[0];
  to[1] = even_a + odd_a;
  to[2] = even_a - odd_a;
  to[3] = even_b + odd_b;
  to[4] = even_b - odd_b;
  to[5] = g3;
}

// G: three weights to six.
template <typename T, typename V> inline void weight_transform(const V *w, int64_t step, V *to) {
  const T N0 = T(norm_0), NA = T(norm_a), NB = T(norm_b);
  const V w1 = w[step], w2 = w[2 * step];
  const V even_a = (w[0] + w2 * T(a2)) * NA, odd_a = w1 * (T(point_a) * NA);
  const V even_b = (w[0] + w2 * T(b2)) * NB, odd_b = w1 * (T(point_b) * NB);
  to[0] = w[0] * N0;
  to[1] = even_a + odd_a;
  to[2] = even_a - odd_a;
  to[3] = even_b + odd_b;
  to[4] = even_b - odd_b;
  to[5] = w2;
}

// Gt: six sums to three gradients of weights.
template <typename T, typename V> inline void weight_gradient_transform(const V *u, int64_t step, V *to) {
  const T N0 = T(norm_0), NA = T(norm_a), NB = T(norm_b);
  const V sum_a = (u[step] + u[2 * step]) * NA, difference_a = (u[step] - u[2 * step]) * NA;
  const V sum_b = (u[3 * step] + u[4 * step]) * NB, difference_b = (u[3 * step] - u[4 * step]) * NB;
  to[0] = u[0] * N0 + (sum_a + sum_b);
  to[1] = difference_a * T(point_a) + difference_b * T(point_b);
  to[2] = sum_a * T(a2) + (sum_b * T(b2) + u[5 * step]);
}

// The 36 inputs of the tile at (y, x): where each pixel's channels begin, `zeros` outside.
template <typename T>
inline void find_inputs(const T *image, int64_t height, int64_t columns, int64_t channels, int64_t y, int64_t x,
                        const T *zeros, const T **to) {
  for (int64_t r = 0; r < 6; ++r)
    for (int64_t i = 0; i < 6; ++i) {
      const int64_t yy = y - 1 + r, xx = x - 1 + i;
      const bool inside = yy >= 0 && yy < height && xx >= 0 && xx < columns;
      to[r * 6 + i] = inside ? image + (yy * columns + xx) * channels : zeros;
    }
}

// The inputs of one tile and vector of channels, transformed; element p goes to to[p * step].
template <typename T, bool whole>
inline void transform_input_tile(const T *const *from, int64_t k, int64_t count, T *to, int64_t step) {
  typedef vec<T> V;
  V half[36];
  for (int x = 0; x < 6; ++x) {
    V d[6], column[6];
    for (int r = 0; r < 6; ++r) {
      const T *at = from[r * 6 + x] + k;
      d[r] = whole ? read(at) : read_some(at, count);
    }
    input_transform<T>(d, 1, column);
    for (int r = 0; r < 6; ++r) half[r * 6 + x] = column[r];
  }
  for (int r = 0; r < 6; ++r) {
    V row[6];
    input_transform<T>(half + r * 6, 1, row);
    for (int x = 0; x < 6; ++x) write(to + (r * 6 + x) * step, row[x]);
  }
}

// 36 products of one tile to its 4x4 results.
template <typename T>
inline void transform_output_tile(const T *from, int64_t step, T *image, int64_t columns, int64_t channels, int64_t y,
                                  int64_t px, int64_t count) {
  typedef vec<T> V;
  V half[24];
  for (int x = 0; x < 6; ++x) {
    V m[6], column[4];
    for (int r = 0; r < 6; ++r) m[r] = read(from + (r * 6 + x) * step);
    output_transform<T>(m, 1, column);
    for (int r = 0; r < 4; ++r) half[r * 6 + x] = column[r];
  }
  for (int r = 0; r < 4; ++r) {
    V row[4];
    output_transform<T>(half + r * 6, 1, row);
    for (int x = 0; x < 4; ++x) write_some(image + ((y + r) * columns + px + x) * channels, row[x], count);
  }
}

// The 4x4 gradients of one tile, transformed.
template <typename T>
inline void transform_gradient_tile(const T *image, int64_t columns, int64_t channels, int64_t y, int64_t px,
                                    int64_t count, T *to, int64_t step) {
  typedef vec<T> V;
  V half[24];
  for (int x = 0; x < 4; ++x) {
    V g[4], column[6];
    for (int r = 0; r < 4; ++r) g[r] = read_some(image + ((y + r) * columns + px + x) * channels, count);
    gradient_transform<T>(g, 1, column);
    for (int r = 0; r < 6; ++r) half[r * 4 + x] = column[r];
  }
  for (int r = 0; r < 6; ++r) {
    V row[6];
    gradient_transform<T>(half + r * 4, 1, row);
    for (int x = 0; x < 6; ++x) write(to + (r * 6 + x) * step, row[x]);
  }
}

// One vector of weights, 9 taps `from_step` apart, to 36.
template <typename T> inline void transform_weight(const T *from, int64_t from_step, T *to, int64_t step) {
  typedef vec<T> V;
  V half[18];
  for (int x = 0; x < 3; ++x) {
    V w[3], column[6];
    for (int r = 0; r < 3; ++r) w[r] = read(from + (r * 3 + x) * from_step);
    weight_transform<T>(w, 1, column);
    for (int r = 0; r < 6; ++r) half[r * 3 + x] = column[r];
  }
  for (int r = 0; r < 6; ++r) {
    V row[6];
    weight_transform<T>(half + r * 3, 1, row);
    for (int x = 0; x < 6; ++x) write(to + (r * 6 + x) * step, row[x]);
  }
}

// 36 sums to the gradients of 9 taps.
template <typename T> inline void transform_weight_gradient(const T *from, int64_t step, T *to, int64_t to_step) {
  typedef vec<T> V;
  V half[18];
  for (int x = 0; x < 6; ++x) {
    V u[6], column[3];
    for (int r = 0; r < 6; ++r) u[r] = read(from + (r * 6 + x) * step);
    weight_gradient_transform<T>(u, 1, column);
    for (int r = 0; r < 3; ++r) half[r * 6 + x] = column[r];
  }
  for (int r = 0; r < 3; ++r) {
    V row[3];
    weight_gradient_transform<T>(half + r * 6, 1, row);
    for (int x = 0; x < 3; ++x) write(to + (r * 3 + x) * to_step, row[x]);
  }
}

}  // namespace
}  // namespace DDFAST_LEVEL
}  // namespace ddfast
