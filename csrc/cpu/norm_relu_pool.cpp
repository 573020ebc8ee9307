// Normalisation, activation and 2x2 pooling in one operator, with its gradient, its derivative along
// a tangent, and the derivative of the gradient along a tangent; ddfast/reference/norm_relu_pool.py
// has the formulas.
//
// Everything is computed on tiles of pixels x channels, a vector of channels at a time. A tile of
// channels_last memory is worked on in place; one of contiguous memory, or of channels that do not
// fill a vector, is transposed or copied to a buffer first. A tile stays in the second cache for
// the two or three passes over it: sums, then results. Sums are taken over blocks of at most 32
// pixels, deviations from the block's own mean, and blocks are added with their rounding errors: a
// mask flips where a sum is off by a few units. No sum depends on tiles or threads.
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

// --- the four operators on a tile ---------------------------------------------------------------

template <int activation, int pool, typename T> void forward(tile<T> &t) {
  take_affine(t);
  if (t.arguments->groups) {
    statistics(t);
  } else {
    for (int64_t c = 0; c < t.padded; ++c) t[mean][c] = T(0), t[rstd][c] = T(1);
  }
  rescale(t);
  cell<activation, pool, T> cell(t);
  const T *x = t.x;
  T *out = t.out;
  for_cells<pool>(t, [&](int64_t j, const segment &s) __attribute__((always_inline)) {
    cell.enter(t, j);
    t.look_ahead(s.pixels(cell.size));
    s([&](int64_t e, int64_t q) __attribute__((always_inline)) {
      cell.load(x + e);
      if (activation != smooth && pool != max_pool) cell.activate();
      t.put(out + q, cell.pooled(cell.a));
    });
  });
}

template <int activation, int pool, typename T> void backward(tile<T> &t) {
  using V = vector<T>;
  take_all(t);
  cell<activation, pool, T> cell(t);
  constexpr int size = cell_pixels<pool>;
  const T *x = t.x, *grad = t.grad;
  T *out = t.out;
  for_cells<pool>(t, [&](int64_t j, const segment &s) __attribute__((always_inline)) {
    cell.enter(t, j);
    t.look_ahead(s.pixels(cell.size));
    V sum{}, product{};
    s([&](int64_t e, int64_t q) __attribute__((always_inline)) {
      cell.load(x + e);
      const V g = read(grad + q);
      V gy[size], products[size];
#pragma GCC unroll 4
      for (int k = 0; k < size; ++k) {
        gy[k] = cell.through(cell.unpooled(g, k), k);
        products[k] = gy[k] * cell.apart[k];
      }
      sum += cell.total(gy);
      product += cell.total(products);
    });
    add_exactly(t[sum_a] + j, t[low_a] + j, sum);
    add_exactly(t[sum_b] + j, t[low_b] + j, product);
  });
  finish(t, sum_a);
  finish(t, sum_b);
  give(t, t[sum_a], t.arguments->out_bias);
  for (int64_t c = 0; c < t.padded; ++c) {
    t[sum_b][c] *= t[rstd][c];
    t[sum_c][c] = t[weight][c] * t[sum_a][c];
    t[sum_d][c] = t[weight][c] * t[sum_b][c];
  }
  give(t, t[sum_b], t.arguments->out_weight);
  average(t, t[sum_c], t[factor_a]);
  average(t, t[sum_d], t[factor_b]);
  for (int64_t c = 0; c < t.padded; ++c) {
    t[factor_a][c] *= t[rstd][c];
    t[factor_b][c] *= t[rstd][c] * t[rstd][c];
  }
  // grad_x = scale gy - factor_a - (x - mean) factor_b
  for_cells<pool>(t, [&](int64_t j, const segment &s) __attribute__((always_inline)) {
    cell.enter(t, j);
    t.look_ahead(s.pixels(cell.size));
    const V constant = read(t[factor_a] + j), along = read(t[factor_b] + j);
    s([&](int64_t e, int64_t q) __attribute__((always_inline)) {
      cell.load(x + e);
      const V g = read(grad + q);
#pragma GCC unroll 4
      for (int k = 0; k < size; ++k) {
        const V gy = cell.through(cell.unpooled(g, k), k);
        t.put(out + e + cell.offset(k), cell.steep * gy - (cell.apart[k] * along + constant));
      }
    });
  });
  for_leftovers<pool>(t, [&](int64_t j, int64_t e) __attribute__((always_inline)) {
    const V apart = read(x + e) - read(t[mean] + j);
    t.put(out + e, -(apart * read(t[factor_b] + j) + read(t[factor_a] + j)));
  });
}

// y' = scale (x' - factor_a) + (x - mean) factor_d + bias'
template <typename T> void prepare_tangent(tile<T> &t) {
  take_all(t);
  tangent_statistics(t);
  for (int64_t c = 0; c < t.padded; ++c)
    t[factor_d][c] = t[weight_tangent][c] * t[rstd][c] - t[weight][c] * t[factor_c][c];
}

template <int activation, int pool, typename T> void tangent(tile<T> &t) {
  using V = vector<T>;
  prepare_tangent(t);
  moved_cell<activation, pool, T> cell(t);
  constexpr int size = cell_pixels<pool>;
  const T *x = t.x, *tangent = t.tangent;
  T *out = t.out;
  for_cells<pool>(t, [&](int64_t j, const segment &s) __attribute__((always_inline)) {
    cell.enter(t, j);
    t.look_ahead(s.pixels(cell.size));
    s([&](int64_t e, int64_t q) __attribute__((always_inline)) {
      cell.load(x + e);
      cell.load_moved(tangent + e);
      V values[size];
#pragma GCC unroll 4
      for (int k = 0; k < size; ++k) values[k] = cell.through(cell.y_moved(k), k);
      t.put(out + q, cell.pooled(values));
    });
  });
}

template <int activation, int pool, typename T> void tangent_backward(tile<T> &t) {
  using V = vector<T>;
  prepare_tangent(t);
  moved_cell<activation, pool, T> cell(t);
  constexpr int size = cell_pixels<pool>;
  const T *x = t.x, *tangent = t.tangent, *grad = t.grad, *grad_tangent = t.grad_tangent;
  T *out = t.out;
  for_cells<pool>(t, [&](int64_t j, const segment &s) __attribute__((always_inline)) {
    cell.enter(t, j);
    t.look_ahead(s.pixels(cell.size));
    V sum{}, product{}, sum_moved{}, product_moved{}, product_x{};
    s([&](int64_t e, int64_t q) __attribute__((always_inline)) {
      cell.load(x + e);
      cell.load_moved(tangent + e);
      cell.load_gradients(read(grad + q), grad_tangent ? read(grad_tangent + q) : V{});
      V a[size], b[size], c[size];
#pragma GCC unroll 4
      for (int k = 0; k < size; ++k) {
        a[k] = cell.gy[k] * cell.apart[k];
        b[k] = cell.gy_moved[k] * cell.apart[k];
        c[k] = cell.gy[k] * cell.x_moved[k];
      }
      sum += cell.total(cell.gy);
      product += cell.total(a);
      sum_moved += cell.total(cell.gy_moved);
      product_moved += cell.total(b);
      product_x += cell.total(c);
    });
    add_exactly(t[sum_a] + j, t[low_a] + j, sum);
    add_exactly(t[sum_b] + j, t[low_b] + j, product);
    add_exactly(t[sum_c] + j, t[low_c] + j, sum_moved);
    add_exactly(t[sum_d] + j, t[low_d] + j, product_moved);
    add_exactly(t[sum_e] + j, t[low_e] + j, product_x);
  });
  for (int sum = sum_a; sum <= sum_e; sum += 2) finish(t, sum);
  give(t, t[sum_c], t.arguments->out_bias);
  for (int64_t c = 0; c < t.padded; ++c) {
    const T r = t[rstd][c], w = t[weight][c], w_moved = t[weight_tangent][c], gy_xh = r * t[sum_b][c];
    const T by_weight = r * t[sum_d][c] + (r * t[sum_e][c] - t[factor_c][c] * t[sum_b][c]);
    t[low_a][c] = w * t[sum_a][c];                          // gxh
    t[low_b][c] = w * gy_xh;                                // gxh xh
    t[low_c][c] = w * t[sum_c][c] + w_moved * t[sum_a][c];  // gxh'
    t[low_d][c] = w * by_weight + w_moved * gy_xh;          // gxh' xh + gxh xh'
    t[low_e][c] = by_weight;
  }
  give(t, t[low_e], t.arguments->out_weight);
  average(t, t[low_a], t[sum_a]);
  average(t, t[low_b], t[sum_b]);
  average(t, t[low_c], t[sum_c]);
  average(t, t[low_d], t[sum_d]);
  // grad_x' = factor_e gy + scale gy' - low_a (x' - mean(x')) - low_b (x - mean) - low_c
  for (int64_t c = 0; c < t.padded; ++c) {
    const T r = t[rstd][c], less = t[factor_c][c];  // rstd' = -factor_c
    t[factor_e][c] = r * t[weight_tangent][c] - less * t[weight][c];
    t[low_a][c] = r * r * t[sum_b][c];
    t[low_b][c] = r * r * t[sum_d][c] - 2 * less * r * t[sum_b][c];
    t[low_c][c] = r * t[sum_c][c] - less * t[sum_a][c];
  }
  for_cells<pool>(t, [&](int64_t j, const segment &s) __attribute__((always_inline)) {
    cell.enter(t, j);
    const V of_gy = read(t[factor_e] + j), of_moved = read(t[low_a] + j);
    const V of_apart = read(t[low_b] + j), constant = read(t[low_c] + j);
    s([&](int64_t e, int64_t q) __attribute__((always_inline)) {
      cell.load(x + e);
      cell.load_moved(tangent + e);
      cell.load_gradients(read(grad + q), grad_tangent ? read(grad_tangent + q) : V{});
#pragma GCC unroll 4
      for (int k = 0; k < size; ++k) {
        const V rest = cell.x_moved[k] * of_moved + (cell.apart[k] * of_apart + constant);
        const V result = of_gy * cell.gy[k] + (cell.steep * cell.gy_moved[k] - rest);
        t.put(out + e + cell.offset(k), result);
      }
    });
  });
  for_leftovers<pool>(t, [&](int64_t j, int64_t e) __attribute__((always_inline)) {
    const V apart = read(x + e) - read(t[mean] + j), x_moved = read(tangent + e) - read(t[factor_a] + j);
    const V rest = x_moved * read(t[low_a] + j) + (apart * read(t[low_b] + j) + read(t[low_c] + j));
    t.put(out + e, -rest);
  });
}

// --- tiles over images and channels -------------------------------------------------------------

template <typename T> using operation = void (*)(tile<T> &);

// How the channels of an image are divided into tiles.
struct division {
  int64_t width;  // channels of a tile
  int64_t whole;  // channels that are divided evenly; what is left makes one more tile
  int64_t tiles;
};

template <typename T> division divide(const norm_relu_pool_arguments &x, int64_t cells) {
  constexpr int64_t n = width_of<T>;
  if (x.groups != 0 && x.groups != x.channels) return {x.channels, x.channels, 1};  // groups stay together
  // In channels_last memory whole vectors lie in place, and only what is left must be copied.
  const int64_t whole = x.channels_last ? x.channels / n * n : x.channels, vectors = (whole + n - 1) / n;
  const int64_t values = x.height * x.width * (x.tangent ? 2 : 1) + cells * ((x.grad ? 1 : 0) + (x.grad_tangent ? 1 : 0));
  int64_t most = tile_bytes / ((values > 0 ? values : 1) * vector_bytes);
  if (!x.channels_last && most > transposed_vectors) most = transposed_vectors;
  if (most > vectors) most = vectors;
  if (most < 1) most = 1;
  while (most > 1 && x.images * ((vectors + most - 1) / most) < x.threads) most = (most + 1) / 2;
  const int64_t tiles = (vectors + most - 1) / most, width = tiles ? (vectors + tiles - 1) / tiles * n : n;
  return {width, whole, tiles + (whole < x.channels ? 1 : 0)};
}

// Where a tensor's part of a tile lies: in place, or in `buffer`.
template <typename T> T *part(const norm_relu_pool_arguments &x, tile<T> &t, const void *tensor, int64_t pixels, T *buffer) {
  if (!tensor || buffer) return tensor ? buffer : nullptr;
  return static_cast<T *>(const_cast<void *>(tensor)) + t.image * x.channels * pixels + t.first_channel;
}

// Moves a stream to the tile at `first` of `values` values, and on from there.
template <typename T> void advance(stream &s, const void *tensor, int64_t first, int64_t values, int64_t all) {
  if (!tensor) return;
  const int64_t ahead = bytes_ahead / int64_t(sizeof(T)), last = first + values + ahead;
  const T *from = static_cast<const T *>(tensor), *start = from + first, *limit = from + (last < all ? last : all);
  if (s.line < reinterpret_cast<const char *>(start)) s.line = reinterpret_cast<const char *>(start);
  s.limit = reinterpret_cast<const char *>(limit);
}

template <typename T> void copy_in(const norm_relu_pool_arguments &x, tile<T> &t, const void *tensor, int64_t pixels, T *buffer) {
  if (!tensor || !buffer) return;
  const T *image = static_cast<const T *>(tensor) + t.image * x.channels * pixels;
  if (t.channels < t.padded) memset(buffer, 0, size_t(pixels * t.padded) * sizeof(T));
  if (!x.channels_last) return transpose(image + t.first_channel * pixels, pixels, t.channels, pixels, buffer, t.padded);
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < t.channels; ++c) buffer[p * t.padded + c] = image[p * x.channels + t.first_channel + c];
}

template <typename T> void copy_out(const norm_relu_pool_arguments &x, tile<T> &t, const T *buffer, int64_t pixels) {
  if (!buffer) return;
  T *image = static_cast<T *>(x.out) + t.image * x.channels * pixels;
  if (!x.channels_last) return transpose(buffer, t.padded, pixels, t.channels, image + t.first_channel * pixels, pixels);
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < t.channels; ++c) image[p * x.channels + t.first_channel + c] = buffer[p * t.padded + c];
}

template <typename T> void run(const norm_relu_pool_arguments &x, operation<T> operate, bool pooled_out) {
  constexpr int64_t n = width_of<T>;
  const int64_t pixels = x.height * x.width, cells = x.pool == no_pool ? pixels : (x.height / 2) * (x.width / 2);
  const int64_t out_pixels = pooled_out ? cells : pixels;
  const division by = divide<T>(x, cells);
  const int64_t tasks = x.images * by.tiles, widest = (by.width + n - 1) / n * n;
  const bool copies = !x.channels_last || x.channels % n;
  // Waking a thread for less than a few microseconds of work costs more than it gives.
  const int64_t useful = 1 + x.images * x.channels * pixels / elements_per_thread;
  const int64_t most = tasks < useful ? tasks : useful;
  const int threads = most < 1 ? 1 : (most < x.threads ? int(most) : x.threads);
  (void)threads;
  const int64_t row = x.channels * int64_t(sizeof(T)), written = x.images * out_pixels * row;
  const bool bypass = written > cached_bytes && (row | int64_t(uintptr_t(x.out))) % vector_bytes == 0;
  const bool linear = !x.channels_last || by.tiles == 1;  // tile after tile, memory is read in its order
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
  {
    const int64_t large = copies ? pixels * widest : 0, small = copies ? cells * widest : 0;
    stream next_x{}, next_tangent{};
    scratch<T> memory(quantities * widest);
    scratch<T> of_x(large), of_tangent(x.tangent ? large : 0), of_grad(x.grad ? small : 0);
    scratch<T> of_grad_tangent(x.grad_tangent ? small : 0), of_out(pooled_out ? small : large);
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
    for (int64_t task = 0; task < tasks; ++task) {
      tile<T> t{};
      t.arguments = &x;
      t.image = task / by.tiles;
      const int64_t first = task % by.tiles * by.width, last = first + by.width;
      t.first_channel = first < by.whole ? first : by.whole;
      t.channels = (first >= by.whole ? x.channels : (last < by.whole ? last : by.whole)) - t.first_channel;
      t.padded = (t.channels + n - 1) / n * n;
      t.memory = memory.data;
      const bool in_place = x.channels_last && t.channels == t.padded;
      const auto buffer = [&](scratch<T> &s) { return in_place ? nullptr : s.data; };
      t.bypass = in_place && bypass;
      t.stride = in_place ? x.channels : t.padded;
      const auto input = [&](const void *tensor, int64_t count, scratch<T> &s) {
        copy_in(x, t, tensor, count, buffer(s));
        return part(x, t, tensor, count, buffer(s));
      };
      if (linear) {
        const int64_t start = (t.image * x.channels + t.first_channel) * pixels;
        advance<T>(next_x, x.x, start, t.channels * pixels, x.images * x.channels * pixels);
        advance<T>(next_tangent, x.tangent, start, t.channels * pixels, x.images * x.channels * pixels);
        t.next_x = next_x;
        t.next_tangent = next_tangent;
      }
      t.x = input(x.x, pixels, of_x);
      t.tangent = input(x.tangent, pixels, of_tangent);
      t.grad = input(x.grad, cells, of_grad);
      t.grad_tangent = input(x.grad_tangent, cells, of_grad_tangent);
      t.out = part(x, t, x.out, out_pixels, buffer(of_out));
      operate(t);
      next_x = t.next_x;
      next_tangent = t.next_tangent;
      copy_out(x, t, buffer(of_out), out_pixels);
    }
    if (bypass) drain();
  }
}

#define DDFAST_OPERATIONS(name, T)                                                                                   \
  {                                                                                                                  \
    {name<relu, 0, T>, name<relu, 1, T>, name<relu, 2, T>},                                                          \
        {name<leaky_relu, 0, T>, name<leaky_relu, 1, T>, name<leaky_relu, 2, T>},                                    \
        {name<smooth, 0, T>, name<smooth, 1, T>, name<smooth, 2, T>},                                                \
  }
#define DDFAST_RUN(name, x, pooled_out)                                                                              \
  static const operation<float> of_float[3][3] = DDFAST_OPERATIONS(name, float);                                     \
  static const operation<double> of_double[3][3] = DDFAST_OPERATIONS(name, double);                                  \
  const int kind = x.activation < smooth ? x.activation : smooth;                                                    \
  if (x.type == float64)                                                                                             \
    run<double>(x, of_double[kind][x.pool], pooled_out);                                                             \
  else                                                                                                               \
    run<float>(x, of_float[kind][x.pool], pooled_out);

}  // namespace

void norm_relu_pool(const norm_relu_pool_arguments &x) { DDFAST_RUN(forward, x, true) }
void norm_relu_pool_bwd(const norm_relu_pool_arguments &x) { DDFAST_RUN(backward, x, false) }
void norm_relu_pool_tangent(const norm_relu_pool_arguments &x) { DDFAST_RUN(tangent, x, true) }
void norm_relu_pool_tangent_bwd(const norm_relu_pool_arguments &x) { DDFAST_RUN(tangent_backward, x, false) }

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
