// norm_relu_pool, and for each class the mean over its images of the activation before pooling, which
// is never stored (what CAFE matches, Wang et al., CVPR 2022).
//
// A tile of channels of all images of a class is the unit of work: its images go by one after the
// other, each in the passes of norm_relu_pool.cpp, and what they activate is added to sums that stay
// in the second cache. Images are added in blocks of block_images, and blocks pairwise, as
// class_mean.cpp does: the error grows with the logarithm of the number of images, and nothing
// depends on tiles or threads.
#include "norm_relu_pool_tiles.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

constexpr int64_t block_images = 16;

template <int activation, int pool, typename T> void forward_adding(tile<T> &t) noexcept {
  take_affine(t);
  if (t.arguments->groups) {
    statistics(t);
  } else {
    for (int64_t c = 0; c < t.padded; ++c) t[mean][c] = T(0), t[rstd][c] = T(1);
  }
  rescale(t);
  const T *x = t.x;
  T *out = t.out, *sums = t.sums;
  cell<activation, pool, T> cell_of(t);
  for_cells<pool>(t, [&](int64_t j, const segment &s) __attribute__((always_inline)) {
    cell_of.enter(t, j);
    s([&](int64_t e, int64_t q) __attribute__((always_inline)) {
      cell_of.load(x + e);
      if (activation != smooth && pool != max_pool) cell_of.activate();
#pragma GCC unroll 4
      for (int k = 0; k < cell_of.size; ++k) {
        T *sum = sums + e + cell_of.offset(k);
        write(sum, read(sum) + cell_of.a[k]);
      }
      t.put(out + q, cell_of.pooled(cell_of.a));
    });
  });
  cell<activation, no_pool, T> single(t);
  for_leftovers<pool>(t, [&](int64_t j, int64_t e) __attribute__((always_inline)) {
    single.enter(t, j);
    single.load(x + e);
    if (activation != smooth) single.activate();
    write(sums + e, read(sums + e) + single.a[0]);
  });
}

template <typename T> using operation = void (*)(tile<T> &) noexcept;

// Sums of a tile: those at work lie strided as the images do, those of earlier blocks side by side.
// As in a binary counter, earlier sum l is that of 2^l blocks when digit l of the number of blocks
// so far is one.
template <typename T> struct class_sums {
  T *sums, *earlier;
  int64_t pixels, stride, width, blocks = 0;

  // f(sums, earlier) for each vector of earlier sum l.
  template <typename F> DDFAST_INLINE void each(int64_t l, F &&f) {
    T *other = earlier + l * pixels * width;
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t j = 0; j < width; j += width_of<T>) f(sums + p * stride + j, other + p * width + j);
  }
  void clear() {
    for (int64_t p = 0; p < pixels; ++p) memset(sums + p * stride, 0, size_t(width) * sizeof(T));
  }
  void add(T *to, const T *from) { write(to, read(from) + read(to)); }
  // The block at work is complete, and more follow.
  void put_away() {
    int64_t l = 0;
    for (int64_t digits = blocks++; digits & 1; digits >>= 1, ++l)
      each(l, [&](T *sum, T *other) { add(sum, other); });
    each(l, [&](T *sum, T *other) { write(other, read(sum)); });
    clear();
  }
  void finish(int64_t count) {
    int64_t l = 0;
    for (int64_t digits = blocks; digits; digits >>= 1, ++l)
      if (digits & 1) each(l, [&](T *sum, T *other) { add(sum, other); });
    const T divisor = T(count > 0 ? count : 1);
    each(0, [&](T *sum, T *) { write(sum, read(sum) / divisor); });
  }
};

int64_t levels(int64_t images) {
  int64_t l = 0;
  for (int64_t blocks = (images + block_images - 1) / block_images - 1; blocks > 0; blocks /= 2) ++l;
  return l;
}

template <typename T> void run(const norm_relu_pool_arguments &x, operation<T> operate) {
  constexpr int64_t n = width_of<T>;
  const int64_t pixels = x.height * x.width, cells = x.pool == no_pool ? pixels : (x.height / 2) * (x.width / 2);
  const division by = divide<T>(x, cells);
  const int64_t tasks = x.classes * by.tiles, widest = (by.width + n - 1) / n * n;
  const bool copies = !x.channels_last || x.channels % n;
  int64_t longest = 0;
  for (int64_t c = 0; c < x.classes; ++c)
    if (x.first[c + 1] - x.first[c] > longest) longest = x.first[c + 1] - x.first[c];
  const int64_t useful = 1 + x.images * x.channels * pixels / elements_per_thread;
  const int64_t most = tasks < useful ? tasks : useful;
  const int threads = most < 1 ? 1 : (most < x.threads ? int(most) : x.threads);
  (void)threads;
  const int64_t row = x.channels * int64_t(sizeof(T)), written = x.images * cells * row;
  const bool bypass = written > cached_bytes && (row | int64_t(uintptr_t(x.out))) % vector_bytes == 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
  {
    const int64_t large = copies ? pixels * widest : 0, small = copies ? cells * widest : 0;
    scratch<T> memory(quantities * widest), earlier(levels(longest) * pixels * widest);
    scratch<T> of_x(large), of_out(small), of_sums(large);
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t c = task / by.tiles, first = task % by.tiles * by.width, last = first + by.width;
      tile<T> t{};
      t.arguments = &x;
      t.first_channel = first < by.whole ? first : by.whole;
      t.channels = (first >= by.whole ? x.channels : (last < by.whole ? last : by.whole)) - t.first_channel;
      t.padded = (t.channels + n - 1) / n * n;
      t.memory = memory.data;
      const bool in_place = x.channels_last && t.channels == t.padded;
      const auto buffer = [&](scratch<T> &s) { return in_place ? nullptr : s.data; };
      t.bypass = in_place && bypass;
      t.stride = in_place ? x.channels : t.padded;
      t.image = c;
      t.sums = part(x, t, x.means, pixels, buffer(of_sums));
      class_sums<T> sums{t.sums, earlier.data, pixels, t.stride, t.padded};
      sums.clear();
      for (int64_t image = x.first[c]; image < x.first[c + 1]; ++image) {
        if (image > x.first[c] && (image - x.first[c]) % block_images == 0) sums.put_away();
        t.image = image;
        copy_in(x, t, x.x, pixels, buffer(of_x));
        t.x = part(x, t, x.x, pixels, buffer(of_x));
        t.out = part(x, t, x.out, cells, buffer(of_out));
        operate(t);
        copy_out(x, t, x.out, image, buffer(of_out), cells);
      }
      sums.finish(x.first[c + 1] - x.first[c]);
      copy_out(x, t, x.means, c, buffer(of_sums), pixels);
    }
    if (bypass) drain();
  }
}

#define DDFAST_OPERATIONS(T)                                                                                           \
  {                                                                                                                    \
    {forward_adding<relu, 0, T>, forward_adding<relu, 1, T>, forward_adding<relu, 2, T>},                              \
        {forward_adding<leaky_relu, 0, T>, forward_adding<leaky_relu, 1, T>, forward_adding<leaky_relu, 2, T>},        \
        {forward_adding<smooth, 0, T>, forward_adding<smooth, 1, T>, forward_adding<smooth, 2, T>},                    \
  }

}  // namespace

void norm_relu_pool_means(const norm_relu_pool_arguments &x) {
  static const operation<float> of_float[3][3] = DDFAST_OPERATIONS(float);
  static const operation<double> of_double[3][3] = DDFAST_OPERATIONS(double);
  const int kind = x.activation < smooth ? x.activation : smooth;
  if (x.type == float64)
    run<double>(x, of_double[kind][x.pool]);
  else
    run<float>(x, of_float[kind][x.pool]);
}

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
