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
#include "norm_relu_pool_tiles.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

// --- the four operators on a tile ---------------------------------------------------------------

template <int activation, int pool, typename T> void forward(tile<T> &t) noexcept {
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

template <int activation, int pool, typename T> void backward(tile<T> &t) noexcept {
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

template <int activation, int pool, typename T> void tangent(tile<T> &t) noexcept {
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

template <int activation, int pool, typename T> void tangent_backward(tile<T> &t) noexcept {
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

template <typename T> using operation = void (*)(tile<T> &) noexcept;

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
      copy_out(x, t, x.out, t.image, buffer(of_out), out_pixels);
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
