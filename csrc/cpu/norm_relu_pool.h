// Tiles, statistics and cells of norm_relu_pool.cpp, which has the plan.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

enum { average_pool = 0, max_pool = 1, no_pool = 2 };                  // as in kernels.h
enum { relu = 0, leaky_relu = 1, sigmoid = 2, swish = 3, smooth = 2 };  // smooth: the last two
constexpr double slope = 0.01;                                          // of leaky_relu

constexpr int64_t block_pixels = 32;
constexpr int64_t tile_bytes = 1 << 20;  // of what a tile reads more than once
constexpr int64_t transposed_vectors = 2;   // channels of a tile of contiguous memory, in vectors
constexpr int64_t cached_bytes = 4 << 20;   // larger results do not stay in the second cache anyway
constexpr int64_t bytes_ahead = 1 << 15;  // that are asked for behind the tile at work
constexpr int64_t elements_per_thread = 32768;

// What is known of each channel of a tile.
enum quantity : int {
  mean, rstd, weight, bias, weight_tangent, bias_tangent, scale,
  sum_a, low_a, sum_b, low_b, sum_c, low_c, sum_d, low_d, sum_e, low_e,
  factor_a, factor_b, factor_c, factor_d, factor_e, quantities
};

template <typename T> struct tile {
  const norm_relu_pool_arguments *arguments;
  int64_t image, first_channel, channels;  // those that exist
  int64_t padded;                          // a multiple of the vector
  const T *x, *tangent, *grad, *grad_tangent;
  T *out;
  T *sums;         // of the activation before pooling, strided as x; norm_relu_pool_means.cpp only
  int64_t stride;  // the value of pixel p in channel c is x[p * stride + c], and so for the others
  T *memory;       // quantities x padded
  bool bypass;     // write results past the caches
  stream next_x, next_tangent;  // memory of this tile and the following ones

  // Asks for so many vectors of what comes next, to keep memory busy in every pass.
  void look_ahead(int64_t count) {
    next_x.fetch(count * vector_bytes / line_bytes);
    next_tangent.fetch(count * vector_bytes / line_bytes);
  }
  DDFAST_INLINE void put(T *target, vector<T> value) const {
    if (can_bypass && bypass)
      write_through(target, value);
    else
      write(target, value);
  }
  T *operator[](int q) const { return memory + q * padded; }
  int64_t pixels() const { return arguments->height * arguments->width; }
};

// --- per channel --------------------------------------------------------------------------------

// result = mean over the group, of values that are sums over the channel's plane.
template <typename T> void average(tile<T> &t, const T *values, T *result) {
  const int64_t groups = t.arguments->groups, channels = t.arguments->channels;
  if (groups == 0) {
    memset(result, 0, size_t(t.padded) * sizeof(T));
  } else if (groups == channels) {
    const T count = T(t.pixels());
    for (int64_t c = 0; c < t.padded; ++c) result[c] = values[c] / count;
  } else {
    const int64_t size = channels / groups;
    for (int64_t g = 0; g < groups; ++g) {
      double sum = 0;
      for (int64_t c = g * size; c < (g + 1) * size; ++c) sum += double(values[c]);
      for (int64_t c = g * size; c < (g + 1) * size; ++c) result[c] = T(sum / double(size * t.pixels()));
    }
  }
}

template <typename T> void take(tile<T> &t, int q, const void *source, int64_t offset, T otherwise) {
  T *target = t[q];
  const T *from = static_cast<const T *>(source);
  for (int64_t c = 0; c < t.padded; ++c)
    target[c] = from && c < t.channels ? from[offset + t.first_channel + c] : otherwise;
}

template <typename T> void take_affine(tile<T> &t) {
  const norm_relu_pool_arguments &x = *t.arguments;
  take(t, weight, x.weight, 0, T(1));
  take(t, bias, x.bias, 0, T(0));
  take(t, weight_tangent, x.weight_tangent, t.image * x.weight_tangent_stride, T(0));
  take(t, bias_tangent, x.bias_tangent, t.image * x.bias_tangent_stride, T(0));
}

template <typename T> void rescale(tile<T> &t) {
  for (int64_t c = 0; c < t.padded; ++c) t[scale][c] = t[weight][c] * t[rstd][c];
}

// Everything the forward pass left behind.
template <typename T> void take_all(tile<T> &t) {
  const norm_relu_pool_arguments &x = *t.arguments;
  take_affine(t);
  const T *means = static_cast<const T *>(x.mean) + t.image * x.groups;
  const T *rstds = static_cast<const T *>(x.rstd) + t.image * x.groups;
  for (int64_t c = 0; c < t.padded; ++c) {
    const bool there = x.groups && c < t.channels;
    const int64_t group = there ? (t.first_channel + c) / (x.channels / x.groups) : 0;
    t[mean][c] = there ? means[group] : T(0);
    t[rstd][c] = there ? rstds[group] : T(1);
  }
  rescale(t);
  memset(t[sum_a], 0, size_t(t.padded * (factor_a - sum_a)) * sizeof(T));
}

template <typename T> void give(tile<T> &t, const T *values, void *target) {
  T *to = static_cast<T *>(target) + t.image * t.arguments->channels + t.first_channel;
  memcpy(to, values, size_t(t.channels) * sizeof(T));
}

template <typename T> void finish(tile<T> &t, int sum) {
  for (int64_t c = 0; c < t.padded; ++c) t[sum][c] += t[sum + 1][c];
}

// --- statistics ---------------------------------------------------------------------------------

// mean and rstd, from sum_a = sums of x - factor_b, sum_b = sums of squared deviations.
template <typename T> void finish_statistics(tile<T> &t) {
  const norm_relu_pool_arguments &x = *t.arguments;
  const T eps = T(x.eps), pixels = T(t.pixels());
  T *squares = t[sum_b], *means = t[factor_a];
  finish(t, sum_a);
  finish(t, sum_b);
  for (int64_t c = 0; c < t.padded; ++c) means[c] = t[factor_b][c] + t[sum_a][c] / pixels;
  if (x.groups == x.channels) {
    memcpy(t[mean], means, size_t(t.padded) * sizeof(T));
  } else {
    for (int64_t c = 0; c < t.padded; ++c) t[sum_a][c] = means[c] * pixels;
    average(t, t[sum_a], t[mean]);
    for (int64_t c = 0; c < t.channels; ++c) {
      const T apart = means[c] - t[mean][c];
      squares[c] += pixels * apart * apart;
    }
  }
  average(t, squares, t[factor_a]);
  for (int64_t c = 0; c < t.padded; ++c) t[rstd][c] = T(1) / root(t[factor_a][c] + eps);
  const int64_t size = x.channels / x.groups;
  T *to_mean = static_cast<T *>(x.mean) + t.image * x.groups, *to_rstd = static_cast<T *>(x.rstd) + t.image * x.groups;
  for (int64_t c = 0; c < t.channels; c += size) {
    to_mean[(t.first_channel + c) / size] = t[mean][c];
    to_rstd[(t.first_channel + c) / size] = t[rstd][c];
  }
}

template <typename T> void statistics(tile<T> &t) {
  using V = vector<T>;
  const int64_t pixels = t.pixels(), stride = t.stride;
  memset(t[sum_a], 0, size_t(t.padded * (factor_b - sum_a)) * sizeof(T));
  // The mean of the first block, and that of all blocks so far less it: small and so exact, where a
  // mean far from zero would drown what the blocks differ by.
  T *origin = t[factor_b], *so_far = t[factor_a];
  for (int64_t first = 0; first < pixels; first += block_pixels) {
    const int64_t count = pixels - first < block_pixels ? pixels - first : block_pixels;
    // Two sets of `first` and `count` values with these means differ by this much more.
    const T inverse = T(1) / T(count), share = T(count) / T(first + count), both = T(first) * share;
    for (int64_t j = 0; j < t.padded; j += width_of<T>) {
      t.look_ahead(count);
      const T *x = t.x + first * stride + j;
      V a{}, b{}, c{}, d{};
      int64_t p = 0;
      for (; p + 4 <= count; p += 4) {
        a += read(x + p * stride);
        b += read(x + (p + 1) * stride);
        c += read(x + (p + 2) * stride);
        d += read(x + (p + 3) * stride);
      }
      for (; p < count; ++p) a += read(x + p * stride);
      const V centre = ((a + b) + (c + d)) * inverse;
      if (first == 0) write(origin + j, centre);
      V rest{}, more{};  // what rounding left of the sum of deviations
      a = b = V{};
      for (p = 0; p + 2 <= count; p += 2) {
        const V e = read(x + p * stride) - centre, f = read(x + (p + 1) * stride) - centre;
        rest += e;
        more += f;
        a += e * e;
        b += f * f;
      }
      if (p < count) {
        const V e = read(x + p * stride) - centre;
        rest += e;
        a += e * e;
      }
      rest += more;
      const V middle = (centre - read(origin + j)) + rest * inverse, apart = middle - read(so_far + j);
      write(so_far + j, read(so_far + j) + apart * share);
      add_exactly(t[sum_a] + j, t[low_a] + j, middle * T(count));
      add_exactly(t[sum_b] + j, t[low_b] + j, ((a + b) - rest * rest * inverse) + apart * apart * both);
    }
  }
  finish_statistics(t);
}

// factor_a = mean(x'), factor_b = mean(x' (x - mean)), factor_c = rstd^3 factor_b.
template <typename T> void tangent_statistics(tile<T> &t) {
  using V = vector<T>;
  const int64_t pixels = t.arguments->groups ? t.pixels() : 0, stride = t.stride;
  for (int64_t first = 0; first < pixels; first += block_pixels) {
    const int64_t last = pixels - first < block_pixels ? pixels : first + block_pixels;
    for (int64_t j = 0; j < t.padded; j += width_of<T>) {
      t.look_ahead(last - first);
      const T *x = t.x + j, *tangent = t.tangent + j;
      const V centre = read(t[mean] + j);
      V a{}, b{}, c{}, d{};
      int64_t p = first;
      for (; p + 2 <= last; p += 2) {
        const V e = read(tangent + p * stride), f = read(tangent + (p + 1) * stride);
        a += e;
        b += f;
        c += e * (read(x + p * stride) - centre);
        d += f * (read(x + (p + 1) * stride) - centre);
      }
      for (; p < last; ++p) {
        const V e = read(tangent + p * stride);
        a += e;
        c += e * (read(x + p * stride) - centre);
      }
      add_exactly(t[sum_a] + j, t[low_a] + j, a + b);
      add_exactly(t[sum_b] + j, t[low_b] + j, c + d);
    }
  }
  finish(t, sum_a);
  finish(t, sum_b);
  average(t, t[sum_a], t[factor_a]);
  average(t, t[sum_b], t[factor_b]);
  for (int64_t c = 0; c < t.padded; ++c)
    t[factor_c][c] = t[rstd][c] * t[rstd][c] * t[rstd][c] * t[factor_b][c];
  memset(t[sum_a], 0, size_t(t.padded * (factor_a - sum_a)) * sizeof(T));
}

// --- cells --------------------------------------------------------------------------------------

// What is pooled to one result: 2x2 pixels, or one where nothing is pooled.
template <int pool> constexpr int cell_pixels = pool == no_pool ? 1 : 4;

// Calls f(j, segment) for each vector of channels of each segment of neighbouring cells, and
// segment(g) calls g(e, q) for each cell: where its first pixel and its result lie. The segments
// keep parameters and sums of a vector in registers while their pixels stay in the first cache.
struct segment {
  int64_t rows, columns, first, pixel_row, pixel_step, result, result_row, result_step;
  int64_t pixels(int64_t in_cell) const { return rows * columns * in_cell; }
  template <typename G> DDFAST_INLINE void operator()(G &&g) const {
    for (int64_t r = 0; r < rows; ++r) {
      int64_t e = first + r * pixel_row, q = result + r * result_row;
      for (int64_t c = 0; c < columns; ++c, e += pixel_step, q += result_step) g(e, q);
    }
  }
};

template <int pool, typename T, typename F> DDFAST_INLINE void for_cells(tile<T> &t, F &&f) {
  constexpr int64_t side = pool == no_pool ? 1 : 2, most = block_pixels / (side * side);
  const int64_t height = t.arguments->height, width = t.arguments->width, stride = t.stride, padded = t.padded;
  // Without pooling the plane is as good as one long row.
  const int64_t rows = pool == no_pool ? 1 : height / side, columns = pool == no_pool ? height * width : width / side;
  const int64_t wide = columns < most ? columns : most, tall = columns > 0 && most / columns > 1 ? most / columns : 1;
  for (int64_t r = 0; r < rows; r += tall)
    for (int64_t c = 0; c < columns; c += wide) {
      const int64_t down = rows - r < tall ? rows - r : tall, right = columns - c < wide ? columns - c : wide;
      for (int64_t j = 0; j < padded; j += width_of<T>)
        f(j, segment{down, right, (r * width + c) * side * stride + j, side * width * stride, side * stride,
                     (r * columns + c) * stride + j, columns * stride, stride});
    }
}

// Calls f(j, e) for each pixel that no cell holds: the last row or column of an odd plane.
template <int pool, typename T, typename F> DDFAST_INLINE void for_leftovers(tile<T> &t, F &&f) {
  if (pool == no_pool) return;
  const int64_t height = t.arguments->height, width = t.arguments->width;
  for (int64_t r = 0; r < height; ++r)
    for (int64_t c = r < height / 2 * 2 ? width / 2 * 2 : 0; c < width; ++c)
      for (int64_t j = 0; j < t.padded; j += width_of<T>) f(j, (r * width + c) * t.stride + j);
}

// The pixels of a cell, and what its result owes to each.
template <int activation, int pool, typename T> struct cell {
  using V = vector<T>;
  static constexpr int size = cell_pixels<pool>;
  const bool is_swish;
  const int64_t row, column;  // from a pixel to the one below, to its right
  V centre, steep, shift;     // of the channels: y = (x - centre) steep + shift
  V apart[size];              // x - mean
  V y[size], a[size], first[size], second[size];
  vector_mask<T> chosen;  // which pixel is the maximum

  DDFAST_INLINE explicit cell(tile<T> &t)
      : is_swish(t.arguments->activation == swish), row(t.arguments->width * t.stride), column(t.stride) {}
  DDFAST_INLINE void enter(tile<T> &t, int64_t j) {
    centre = read(t[mean] + j);
    steep = read(t[scale] + j);
    shift = read(t[bias] + j);
  }
  DDFAST_INLINE int64_t offset(int k) const { return (k >> 1) * row + (k & 1) * column; }
  DDFAST_INLINE void load(const T *x) {
#pragma GCC unroll 4
    for (int k = 0; k < size; ++k) {
      apart[k] = read(x + offset(k)) - centre;
      y[k] = apart[k] * steep + shift;
    }
    if (activation == smooth || pool == max_pool) activate();
  }
  // a, and for the smooth ones its derivatives; what is not used, the compiler drops.
  DDFAST_INLINE void activate() {
    const V zero{};
#pragma GCC unroll 4
    for (int k = 0; k < size; ++k) {
      if (activation == relu) a[k] = larger(zero, y[k]);
      if (activation == leaky_relu) a[k] = y[k] > zero ? y[k] : y[k] * T(slope);
      if (activation == smooth) {
        const V e = exponential(-y[k]), s = T(1) / (T(1) + e), rest = e * s, rise = s * rest;  // rest = 1 - s
        a[k] = is_swish ? y[k] * s : s;
        first[k] = is_swish ? s + y[k] * rise : rise;
        second[k] = is_swish ? rise * (T(2) + y[k] * (rest - s)) : rise * (rest - s);
      }
    }
    if (pool != max_pool) return;
    V best = a[0];
    chosen = vector_mask<T>{};
#pragma GCC unroll 4
    for (int k = 1; k < size; ++k) {
      const vector_mask<T> better = (a[k] > best) | (a[k] != a[k]);
      best = better ? a[k] : best;
      chosen = better ? vector_mask<T>{} + k : chosen;
    }
  }
  DDFAST_INLINE V pooled(const V (&values)[size]) const {
    if (pool == no_pool) return values[0];
    if (pool == average_pool) return total(values) * T(0.25);
    V result = values[0];
#pragma GCC unroll 4
    for (int k = 1; k < size; ++k) result = chosen == k ? values[k] : result;
    return result;
  }
  static DDFAST_INLINE V total(const V (&values)[size]) {
    return size == 1 ? values[0] : (values[0] + values[1 % size]) + (values[2 % size] + values[3 % size]);
  }
  // What reaches pixel k of the gradient g of the result, in front of the activation.
  DDFAST_INLINE V unpooled(V g, int k) const {
    if (pool == average_pool) return g * T(0.25);
    return pool == max_pool ? (chosen == k ? g : V{}) : g;
  }
  // activation'(y) v.
  DDFAST_INLINE V through(V v, int k) const {
    const V zero{};
    if (activation == relu) return y[k] > zero ? v : zero;
    if (activation == leaky_relu) return y[k] > zero ? v : v * T(slope);
    return v * first[k];
  }
};

// The same with gy, gy' and x' - mean(x').
template <int activation, int pool, typename T> struct moved_cell : cell<activation, pool, T> {
  using base = cell<activation, pool, T>;
  using V = vector<T>;
  V middle, along, moved;  // y' = steep (x' - middle) + apart along + moved
  V gy[base::size], gy_moved[base::size], x_moved[base::size];

  DDFAST_INLINE explicit moved_cell(tile<T> &t) : base(t) {}
  DDFAST_INLINE void enter(tile<T> &t, int64_t j) {
    base::enter(t, j);
    middle = read(t[factor_a] + j);
    along = read(t[factor_d] + j);
    moved = read(t[bias_tangent] + j);
  }
  DDFAST_INLINE V y_moved(int k) const { return this->steep * x_moved[k] + (this->apart[k] * along + moved); }
  DDFAST_INLINE void load_moved(const T *tangent) {
#pragma GCC unroll 4
    for (int k = 0; k < base::size; ++k) x_moved[k] = read(tangent + this->offset(k)) - middle;
  }
  DDFAST_INLINE void load_gradients(V g, V g_moved) {
#pragma GCC unroll 4
    for (int k = 0; k < base::size; ++k) {
      const V over = this->unpooled(g, k);
      gy[k] = this->through(over, k);
      gy_moved[k] = this->through(this->unpooled(g_moved, k), k);
      if (activation == smooth) gy_moved[k] += over * this->second[k] * y_moved(k);
    }
  }
};

}  // namespace
}  // namespace DDFAST_LEVEL
}  // namespace ddfast
