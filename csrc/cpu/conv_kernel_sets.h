// The two sets of images, what is kept of every image, and the way of some of them into and out of
// the lanes of vectors.
#pragma once

#include "conv_kernel.h"

namespace ddfast {
namespace DDFAST_LEVEL {

// Pairs of images, one a lane. Lanes from `count` on repeat the last pair and come to nothing.
template <typename T> struct conv_tile {
  int64_t count;
  int64_t i[width_of<T>], j[width_of<T>];
};

template <typename T> struct conv_sets {
  static constexpr int64_t lanes = width_of<T>;
  const conv_kernel_arguments &x;
  int64_t positions;
  T *variances[2], *by_variances[2];  // per image, layer and position; without y the second is the first

  int64_t images(int side) const { return side == 0 ? x.n : x.m; }
  int64_t area() const { return x.height * x.width; }
  int64_t pixels() const { return x.channels * area(); }
  const T *image(int side, int64_t i) const {
    return static_cast<const T *>(side == 1 && x.y ? x.y : x.x) + i * pixels();
  }
  // Where the gradient by a set goes, or null.
  T *gradient(int side) const { return static_cast<T *>(side == 1 && x.y ? x.by_y : x.by_x); }

  void pack_pixels(int side, const int64_t *which, T *out) const {
    for (int64_t k = 0; k < lanes; ++k) {
      const T *from = image(side, which[k]);
      for (int64_t c = 0; c < x.channels; ++c)
        for (int64_t p = 0; p < area(); ++p) out[(p * x.channels + c) * lanes + k] = from[c * area() + p];
    }
  }

  void pack(int side, const int64_t *which, const conv_side<T> &out) const {
    pack_pixels(side, which, out.pixels);
    for (int64_t p = 0; p < positions; ++p) {
      vector<T> v = {};
      for (int64_t k = 0; k < lanes; ++k) v[k] = variances[side][which[k] * positions + p];
      conv_norms_of(v, out.inverse + p * lanes, out.root + p * lanes);
    }
  }

  // One image for all lanes.
  void pack_shared(int64_t i, const conv_side<T> &out) const {
    const T *from = image(0, i), *v = variances[0] + i * positions;
    for (int64_t c = 0; c < x.channels; ++c)
      for (int64_t p = 0; p < area(); ++p) out.pixels[p * x.channels + c] = from[c * area() + p];
    for (int64_t p = 0; p < positions; p += lanes) {
      vector<T> part = {};
      const int64_t left = positions - p < lanes ? positions - p : lanes;
      memcpy(&part, v + p, size_t(left) * sizeof(T));
      conv_norms_of(part, out.inverse + p, out.root + p);
    }
  }

  // Adds what `count` images receive, lane by lane, or all lanes from one image's numbers (`stride` 1).
  void add_pixels(int side, const int64_t *which, int64_t count, const T *from, int64_t stride) const {
    for (int64_t k = 0; k < count; ++k) {
      T *to = gradient(side) + which[k] * pixels();
      for (int64_t c = 0; c < x.channels; ++c)
        for (int64_t p = 0; p < area(); ++p) to[c * area() + p] += from[(p * x.channels + c) * stride + k];
    }
  }
  void add_norms(int side, const int64_t *which, int64_t count, const T *from, int64_t stride) const {
    for (int64_t k = 0; k < count; ++k) {
      T *to = by_variances[side] + which[k] * positions;
      for (int64_t p = 0; p < positions; ++p) to[p] += from[p * stride + k];
    }
  }

  void write_entries(const conv_tile<T> &tile, vector<T> values) const {
    T *out = static_cast<T *>(x.out);
    for (int64_t k = 0; k < tile.count; ++k) {
      out[tile.i[k] * x.m + tile.j[k]] = values[k];
      if (!x.y) out[tile.j[k] * x.m + tile.i[k]] = values[k];
    }
  }

  // Without y an entry stands for its mirror image too.
  void cotangents_of(const conv_tile<T> &tile, T *found) const {
    const T *grad = static_cast<const T *>(x.grad);
    for (int64_t k = 0; k < lanes; ++k) {
      const int64_t i = tile.i[k], j = tile.j[k];
      found[k] = k < tile.count ? grad[i * x.m + j] : T(0);
      if (k < tile.count && !x.y && i != j) found[k] += grad[j * x.m + i];
    }
  }
};

// The pairs that are computed: blocks of columns as wide as a vector against rows, and what is left,
// pair by pair. Without y, those on and above the diagonal.
struct conv_pairs {
  int64_t n, m, lanes;
  bool symmetric;

  int64_t blocks() const { return m / lanes; }
  int64_t rest_columns() const { return m % lanes; }
  // Rows that all columns of a block are paired with.
  int64_t rows(int64_t block) const { return symmetric ? block * lanes : n; }
  static int64_t triangle(int64_t size) { return size * (size + 1) / 2; }
  int64_t left() const {
    if (!symmetric) return n * rest_columns();
    return blocks() * triangle(lanes) + blocks() * lanes * rest_columns() + triangle(rest_columns());
  }
  void left_pair(int64_t p, int64_t *i, int64_t *j) const {
    const int64_t first = blocks() * lanes, rest = rest_columns();
    if (!symmetric) {
      *i = p / rest, *j = first + p % rest;
      return;
    }
    const int64_t diagonal = blocks() * triangle(lanes);
    int64_t base;
    if (p < diagonal) {
      base = p / triangle(lanes) * lanes;
      p %= triangle(lanes);
    } else if (p - diagonal < first * rest) {
      *i = (p - diagonal) / rest, *j = first + (p - diagonal) % rest;
      return;
    } else {
      base = first;
      p -= diagonal + first * rest;
    }
    int64_t column = 0;
    while (p > column) p -= ++column;
    *i = base + p, *j = base + column;
  }
};

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
