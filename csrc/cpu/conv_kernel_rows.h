// What is done to one row of a plane of position pairs: every vector holds one pair of positions of
// width_of<T> pairs of images, so rows need no shifts and no edges in registers.
#pragma once

#include "arc_cosine.h"
#include "conv_kernel_plan.h"

namespace ddfast {
namespace DDFAST_LEVEL {

// One image of every lane; or, if `Shared`, one image for all lanes, element by element.
template <typename T> struct conv_side {
  T *pixels;          // height x width x channels
  T *inverse, *root;  // per layer and position: V^(-1/2), 0 where V = 0, and V^(1/2)
};

template <bool Shared, typename T> DDFAST_INLINE vector<T> conv_read(const T *data, int64_t index) {
  return Shared ? broadcast(data[index]) : read(data + index * width_of<T>);
}
template <bool Shared, typename T> DDFAST_INLINE const T *conv_at(const T *data, int64_t index) {
  return data + (Shared ? index : index * width_of<T>);
}

// Three neighbouring rows, of which the first or the last may be missing (a row of zeros).
template <typename T> struct conv_three {
  const vector<T> *before, *at, *after;
  DDFAST_INLINE vector<T> sum(int64_t j) const { return (before[j] + at[j]) + after[j]; }
};

// Sums over horizontal neighbours of source(j).
template <typename T, typename Source> DDFAST_INLINE void conv_neighbours(int64_t count, Source source, vector<T> *out) {
  vector<T> left = {}, here = source(0);
  for (int64_t j = 0; j + 1 < count; ++j) {
    const vector<T> right = source(j + 1);
    out[j] = (left + here) + right;
    left = here, here = right;
  }
  out[count - 1] = left + here;
}

// The same of the products of two rows of pixels. Channels: their number, or 0: `channels`.
template <int Channels, bool Shared, typename T>
inline void conv_products(const T *x, const T *y, int64_t channels, int64_t count, vector<T> *out) {
  const int64_t c = Channels ? Channels : channels;
  conv_neighbours<T>(
      count,
      [&](int64_t j) {
        vector<T> sum = conv_read<Shared>(x, j * c) * read(y + j * c * width_of<T>);
        for (int64_t k = 1; k < c; ++k) sum += conv_read<Shared>(x, j * c + k) * read(y + (j * c + k) * width_of<T>);
        return sum;
      },
      out);
}

// The correlation c of two Gaussians with covariance k: functions of it from t = 1 - |c| by one root
// and polynomials (arc_cosine.h). Where t is at most `close`, as rounding leaves it where patches of
// two images are equal, it counts as 0; then q has no derivative by k.
template <typename T> struct conv_correlation {
  vector<T> k, inverse, t, root, negative;

  static constexpr T close = T(sizeof(T) == 4 ? 0x1p-21 : 0x1p-50);

  DDFAST_INLINE conv_correlation(vector<T> covariance, vector<T> inverse_p) : k(covariance), inverse(inverse_p) {
    const vector<T> zero = {}, c = k * inverse, gap = T(1) - larger(c, -c);
    t = gap <= broadcast(close) ? zero : gap;  // NaN stays
    root = square_root(t);
  }
  // 2 S = p kappa1(c)
  DDFAST_INLINE vector<T> value(vector<T> p) const {
    const vector<T> zero = {};
    return larger(zero, k) + ((t * root) * p) * arc_cosine_fit<T>::order1(t);
  }
  // kappa0(c), the derivative of `value` by k
  DDFAST_INLINE vector<T> both() const {
    const vector<T> zero = {}, a = root * arc_cosine_fit<T>::angle(t);
    return k < zero ? a : T(1) - a;
  }
  // sqrt(1 - c^2) / pi
  DDFAST_INLINE vector<T> sine() const { return root * arc_cosine_fit<T>::sine(t); }
  // The derivative of `both` by k, 1 / (pi sqrt(p^2 - k^2)), given the sine.
  DDFAST_INLINE vector<T> slope(vector<T> sine) const {
    const vector<T> zero = {};
    return root == zero ? zero : inverse / (sine * T(9.86960440108935861883));  // pi^2
  }
};

// Where a plane's K and T lie; t is null for the NNGP.
template <typename T> struct conv_rows {
  vector<T> *k, *t;
  DDFAST_INLINE conv_rows from(int64_t index) const { return {k + index, t ? t + index : nullptr}; }
};

// What a row of position pairs is normalised by, from its first column on.
template <typename T> struct conv_norms {
  const T *inverse_x, *root_x, *inverse_y, *root_y;
};

// `count` pairs from `start` on in steps of `step` through the convolution's second half and the ReLU,
// side by side into out. First: of the network, where T is K.
template <bool First, bool Ntk, bool Shared, typename T>
inline void conv_relu(conv_three<T> k, conv_three<T> t, T scale, T bias, conv_norms<T> norms, int64_t start,
                      int64_t step, int64_t count, conv_rows<T> out) {
  for (int64_t n = 0, j = start; n < count; ++n, j += step) {
    const vector<T> inverse = conv_read<Shared>(norms.inverse_x, j) * read(norms.inverse_y + j * width_of<T>);
    const vector<T> p = conv_read<Shared>(norms.root_x, j) * read(norms.root_y + j * width_of<T>);
    const vector<T> covariance = k.sum(j) * scale + bias;
    const conv_correlation<T> c(covariance, inverse);
    out.k[n] = c.value(p);
    if (Ntk) out.t[n] = (First ? covariance : t.sum(j) * scale + covariance) * c.both();
  }
}

// The way back: from gradients g, h by the ReLU's K and T to those by the convolution's K and T before
// its bias, of `count` pairs from `start` on. Adds those by log sqrt(V V') to by_x and by_y, unless null.
template <bool First, bool Ntk, bool Shared, typename T>
inline void conv_relu_back(conv_three<T> k, conv_three<T> t, T scale, T bias, conv_norms<T> norms, int64_t start,
                           int64_t step, int64_t count, conv_rows<T> grad, conv_rows<T> out, vector<T> *by_x,
                           vector<T> *by_y) {
  for (int64_t n = 0, j = start; n < count; ++n, j += step) {
    const vector<T> inverse = conv_read<Shared>(norms.inverse_x, j) * read(norms.inverse_y + j * width_of<T>);
    const vector<T> p = conv_read<Shared>(norms.root_x, j) * read(norms.root_y + j * width_of<T>);
    const vector<T> covariance = k.sum(j) * scale + bias;
    const conv_correlation<T> c(covariance, inverse);
    const vector<T> both = c.both(), sine = c.sine();
    vector<T> by_k = grad.k[j] * both, by_p = grad.k[j] * (p * sine);
    if (Ntk) {
      const vector<T> theta = First ? covariance : t.sum(j) * scale + covariance;
      const vector<T> slope = (grad.t[j] * theta) * c.slope(sine), by_t = grad.t[j] * both;
      by_k = by_k + slope + by_t;
      by_p = by_p - slope * covariance;
      out.t[j] = by_t;
    }
    out.k[j] = by_k;
    if (by_x) by_x[j] += by_p;
    if (by_y) by_y[j] += by_p;
  }
}

// Adds the gradients by two rows of pixels, unless null, for those by their products.
template <int Channels, bool Shared, typename T>
inline void conv_products_back(const T *x, const T *y, int64_t channels, int64_t count, conv_three<T> grad, T scale,
                               vector<T> *by_x, vector<T> *by_y) {
  const int64_t c = Channels ? Channels : channels;
  for (int64_t j = 0; j < count; ++j) {
    const vector<T> g = grad.sum(j) * scale;
    if (by_x)
      for (int64_t k = 0; k < c; ++k) by_x[j * c + k] += g * read(y + (j * c + k) * width_of<T>);
    if (by_y)
      for (int64_t k = 0; k < c; ++k) by_y[j * c + k] += g * conv_read<Shared>(x, j * c + k);
  }
}

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
