// Winograd convolution F(4x4, 3x3), its gradient by the input (the kernel turned around) and by the
// weights: 36 matrix products between transforms, block by block of tiles, so that a block's
// transforms stay in the second cache. Kernel 3x3, padding 1, sides divisible by 4.
//
// In float32 the result is off by 2e-6 to 3e-6 of the largest entry, where a direct sum is off by
// 3e-7 to 5e-7.
#include "winograd.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

constexpr int64_t block_tiles = 48;   // a multiple of the rows of a register tile
constexpr int64_t single_tiles = 64;  // a class of so few is one block
constexpr int64_t depth_chunk = 128;

// The distance of the 36 matrices of a block: not a power of two, or all would share cache sets.
template <typename T> int64_t matrix_step(int64_t elements) { return elements + width<T>; }

template <typename T> struct winograd_plan {
  conv_geometry g;
  int64_t across, tiles_of_image;  // tiles in a row, in an image
  int64_t tiles;                   // in a block
  int64_t panel_count, most_tiles;  // of a class
  T *zeros;  // channels of a pixel outside

  winograd_plan(const class_conv_arguments &x, int64_t parts, arena &memory)
      : g(geometry_of(x)),
        across(g.width / 4),
        tiles_of_image(g.pixels() / 16),
        panel_count(panels<T>(g.outputs)) {
    int64_t images = 0;
    for (int64_t c = 0; c < x.classes; ++c) images = most(images, x.first[c + 1] - x.first[c]);
    most_tiles = images * tiles_of_image;
    tiles = most(1, least(block_tiles, ceiling(most_tiles, parts)));
    zeros = memory.take<T>(g.channels);
  }
  void fill() const { memset(zeros, 0, size_t(g.channels) * sizeof(T)); }

  // Where panel and element p of transformed weights begin: [panel][p][channel][column].
  int64_t transformed_step(int64_t panel) const {
    return matrix_step<T>(vectors_of<T>(g.outputs, panel) * width<T> * g.channels);
  }
  int64_t transformed_at(int64_t panel, int64_t p) const {
    return 36 * panel * matrix_step<T>(panel_width<T> * g.channels) + p * transformed_step(panel);
  }
  int64_t transformed_size() const { return transformed_at(panel_count, 0); }
  int64_t input_row() const { return padded<T>(g.channels); }
  int64_t input_step() const { return matrix_step<T>(tiles * input_row()); }

  struct place {
    int64_t image, y, x;
  };
  place find(int64_t tile) const {
    const int64_t inside = tile % tiles_of_image;
    return {tile / tiles_of_image, inside / across * 4, inside % across * 4};
  }

  // Tile `tile` of a class's images, all channels, into row t of the 36 matrices.
  void transform_input(const T *images, int64_t tile, int64_t t, T *to) const {
    const place at = find(tile);
    const T *from[36];
    find_inputs(images + at.image * g.pixels() * g.channels, g.height, g.width, g.channels, at.y, at.x, zeros, from);
    to += t * input_row();
    int64_t k = 0;
    for (; k + width<T> <= g.channels; k += width<T>) transform_input_tile<T, true>(from, k, 0, to + k, input_step());
    if (k < g.channels) transform_input_tile<T, false>(from, k, g.channels - k, to + k, input_step());
  }

  // Output channels of one panel, from its 36 matrices.
  void transform_output(const T *from, int64_t step, int64_t tile, int64_t t, int64_t panel, T *images) const {
    const place at = find(tile);
    const int64_t first = panel * panel_width<T>, columns = vectors_of<T>(g.outputs, panel) * width<T>;
    T *image = images + at.image * g.pixels() * g.outputs + first;
    for (int64_t j = 0; j < columns; j += width<T>)
      transform_output_tile(from + t * columns + j, step, image + j, g.width, g.outputs, at.y, at.x,
                            g.outputs - first - j);
  }

  // Weights (O, I, 9) of one class, channels k_first to k_end of one panel, to that panel.
  void transform_weights(const T *weight, const weight_strides &s, int64_t panel, int64_t k_first, int64_t k_end,
                         T *to) const {
    const int64_t first = panel * panel_width<T>, columns = vectors_of<T>(g.outputs, panel) * width<T>;
    const int64_t step = transformed_step(panel);
    for (int64_t j = 0; j < columns; j += width<T>) {
      const int64_t count = least(width<T>, g.outputs - first - j);
      for (int64_t k = k_first; k < k_end; ++k) {
        T taps[9 * width<T>];
        const T *from = weight + s.origin + (first + j) * s.column + k * s.channel;
        for (int64_t t = 0; t < 9; ++t, from += s.tap)
          if (count == width<T>)
            for (int64_t l = 0; l < width<T>; ++l) taps[t * width<T> + l] = from[l * s.column];
          else
            for (int64_t l = 0; l < width<T>; ++l) taps[t * width<T> + l] = l < count ? from[l * s.column] : T(0);
        // 36 streams are more than the processor foresees by itself.
        for (int64_t p = 0; p < 36; ++p) __builtin_prefetch(to + p * step + (k + 4) * columns + j, 1, 2);
        transform_weight(taps, width<T>, to + k * columns + j, step);
      }
    }
  }

  // The way back for channels k_first to k_end, from a panel of sums of the weight gradient.
  void finish_weights(const T *sums, int64_t panel, int64_t k_first, int64_t k_end, T *weight) const {
    const int64_t first = panel * panel_width<T>, columns = vectors_of<T>(g.outputs, panel) * width<T>;
    for (int64_t j = 0; j < columns; j += width<T>) {
      const int64_t count = least(width<T>, g.outputs - first - j);
      for (int64_t k = k_first; k < k_end; ++k) {
        T taps[9 * width<T>];
        transform_weight_gradient(sums + k * columns + j, transformed_step(panel), taps, width<T>);
        T *to = weight + ((first + j) * g.channels + k) * 9;
        for (int64_t l = 0; l < count; ++l)
          for (int64_t t = 0; t < 9; ++t) to[l * g.channels * 9 + t] = taps[t * width<T> + l];
      }
    }
  }
};

// --- forward and gradient by the input ---------------------------------------------------------

template <typename T> struct winograd_conv_plan : winograd_plan<T> {
  using base = winograd_plan<T>;
  using base::g;
  int64_t classes_at_once, local_elements;
  bool one_block;  // in every class: each panel's weights are then used right after their transform
  T *weights, *local;

  winograd_conv_plan(const class_conv_arguments &x, arena &memory) : base(x, x.threads, memory) {
    one_block = base::most_tiles <= single_tiles && x.classes >= x.threads;
    if (one_block) base::tiles = most(1, base::most_tiles);
    classes_at_once = x.threads > 1 ? 2 * x.threads : 1;
    weights = memory.take<T>(one_block ? 0 : classes_at_once * base::transformed_size());
    local_elements = 36 * (base::input_step() + product_step());
    if (one_block) local_elements += base::transformed_at(1, 0);
    local = memory.take<T>(x.threads * local_elements);
  }
  int64_t product_step() const { return matrix_step<T>(base::tiles * panel_width<T>); }
  int64_t blocks(const class_conv_arguments &x, int64_t c) const {
    return ceiling((x.first[c + 1] - x.first[c]) * base::tiles_of_image, base::tiles);
  }

  // Tiles `first` to `first + count` of one panel; u: the panel's weights, v: transformed inputs.
  // Meanwhile the next matrix of weights is fetched into the second cache, then `later`.
  void multiply(int64_t first, int64_t count, int64_t panel, const T *u, T *v, T *out, lines_ahead<T> later) const {
    const int64_t vectors = vectors_of<T>(g.outputs, panel), columns = vectors * width<T>;
    T *products = v + 36 * base::input_step();
    times_arguments<T> t;
    t.pieces = 1;
    t.step = 0;
    for (int64_t p = 0; p < 36; ++p)
      for (int64_t k = 0; k < g.channels; k += depth_chunk) {
        t.b = u + p * base::transformed_step(panel) + k * columns;
        t.depth = least(depth_chunk, g.channels - k);
        t.add = k > 0;
        lines_ahead<T> weights = {t.b + t.depth * columns, t.depth * columns / line<T>};
        for (int64_t r = 0; r < count;) {
          const int64_t rows = next_rows(count - r, most_rows[vectors]);
          t.ahead = weights.count > 0 ? weights.take(t.depth, t.b) : later.take(t.depth, t.b);
          for (int64_t i = 0; i < rows; ++i) {
            t.a[i] = v + p * base::input_step() + (r + i) * base::input_row() + k;
            t.c[i] = products + p * product_step() + (r + i) * columns;
          }
          tile<T>(vectors, rows, t);
          r += rows;
        }
      }
    for (int64_t t = 0; t < count; ++t) base::transform_output(products, product_step(), first + t, t, panel, out);
  }

  const T *images(const class_conv_arguments &x, int64_t c) const {
    return static_cast<const T *>(x.images) + x.first[c] * g.pixels() * g.channels;
  }
  T *out(const class_conv_arguments &x, int64_t c) const {
    return static_cast<T *>(x.out) + x.first[c] * g.pixels() * g.outputs;
  }

  // A block of tiles, all panels; u: the weights of the class.
  void run_block(const class_conv_arguments &x, int64_t c, int64_t block, const T *u, T *v) const {
    const int64_t first = block * base::tiles, all = (x.first[c + 1] - x.first[c]) * base::tiles_of_image;
    const int64_t count = least(base::tiles, all - first);
    for (int64_t t = 0; t < count; ++t) base::transform_input(images(x, c), first + t, t, v);
    // Tiles are stored in order, or nearly so: fetch this block's outputs, then the next one's inputs.
    const lines_ahead<T> written = {out(x, c) + first * 16 * g.outputs, count * 16 * g.outputs / line<T>};
    const lines_ahead<T> read = {images(x, c) + (first + count) * 16 * g.channels, count * 16 * g.channels / line<T>};
    for (int64_t panel = 0; panel < base::panel_count; ++panel)
      multiply(first, count, panel, u + base::transformed_at(panel, 0), v, out(x, c), panel > 0 ? read : written);
  }

  // All tiles of a class of one block.
  void run_class(const class_conv_arguments &x, int64_t c, const weight_strides &s, T *v) const {
    const int64_t count = (x.first[c + 1] - x.first[c]) * base::tiles_of_image;
    T *u = v + 36 * (base::input_step() + product_step());
    for (int64_t t = 0; t < count; ++t) base::transform_input(images(x, c), t, t, v);
    for (int64_t panel = 0; panel < base::panel_count && count > 0; ++panel) {
      base::transform_weights(static_cast<const T *>(x.other) + c * g.outputs * g.channels * 9, s, panel, 0, g.channels,
                              u);
      multiply(0, count, panel, u, v, out(x, c), {nullptr, 0});
    }
  }
};

template <typename T> void run_conv(const class_conv_arguments &x) {
  arena memory{static_cast<char *>(x.scratch)};
  const winograd_conv_plan<T> plan(x, memory);
  plan.fill();
  const conv_geometry &g = plan.g;
  const weight_strides s = strides_of(g, x.product == conv_by_input);
  const int64_t parts = ceiling(g.channels, 16) * plan.panel_count;
#ifdef _OPENMP
#pragma omp parallel num_threads(x.threads) if (x.threads > 1)
#endif
  {
    int thread = 0;
#ifdef _OPENMP
    thread = omp_get_thread_num();
#endif
    T *local = plan.local + thread * plan.local_elements;
    if (plan.one_block) {
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
      for (int64_t c = 0; c < x.classes; ++c) plan.run_class(x, c, s, local);
    }
    for (int64_t begin = 0; begin < x.classes && !plan.one_block; begin += plan.classes_at_once) {
      const int64_t end = least(x.classes, begin + plan.classes_at_once);
      int64_t tasks = 0;
      for (int64_t c = begin; c < end; ++c) tasks += plan.blocks(x, c);
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
      for (int64_t i = 0; i < (end - begin) * parts; ++i) {
        const int64_t c = begin + i / parts, panel = i % parts % plan.panel_count, k = i % parts / plan.panel_count * 16;
        if (plan.blocks(x, c) > 0)
          plan.transform_weights(static_cast<const T *>(x.other) + c * g.outputs * g.channels * 9, s, panel, k,
                                 least(g.channels, k + 16), plan.weights + (c - begin) * plan.transformed_size() +
                                     plan.transformed_at(panel, 0));
      }
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
      for (int64_t i = 0; i < tasks; ++i) {
        int64_t c = begin, block = i;
        while (block >= plan.blocks(x, c)) block -= plan.blocks(x, c++);
        plan.run_block(x, c, block, plan.weights + (c - begin) * plan.transformed_size(), local);
      }
    }
  }
}

// --- gradient by the weights --------------------------------------------------------------------

constexpr int64_t unit_rows = 128;  // input channels of one task

template <typename T> struct winograd_weight_plan : winograd_plan<T> {
  using base = winograd_plan<T>;
  using base::g;
  bool one_block;  // in every class: each panel's sums are then transformed back while in cache
  T *sums, *input, *grad;
  int32_t *rows;

  winograd_weight_plan(const class_conv_arguments &x, arena &memory) : base(x, 1, memory) {
    one_block = base::most_tiles <= single_tiles;
    if (one_block) base::tiles = most(1, base::most_tiles);
    sums = memory.take<T>(one_block ? base::transformed_at(1, 0) : base::transformed_size());
    input = memory.take<T>(36 * base::input_step());
    grad = memory.take<T>(36 * grad_step());
    rows = memory.take<int32_t>(base::tiles);
  }
  int64_t grad_step() const { return matrix_step<T>(base::tiles * padded<T>(g.outputs)); }

  // A tile of grad, each panel's columns side by side: [p][panel][tile][column].
  void transform_grad(const T *images, int64_t tile, int64_t t) const {
    const typename base::place at = base::find(tile);
    const T *image = images + at.image * g.pixels() * g.outputs;
    for (int64_t panel = 0; panel < base::panel_count; ++panel) {
      const int64_t first = panel * panel_width<T>, columns = vectors_of<T>(g.outputs, panel) * width<T>;
      for (int64_t j = 0; j < columns; j += width<T>)
        transform_gradient_tile(image + first + j, g.width, g.outputs, at.y, at.x, g.outputs - first - j,
                                grad + first * base::tiles + t * columns + j, grad_step());
    }
  }

  int64_t parts() const { return ceiling(g.channels, unit_rows); }

  T *sums_of(int64_t panel) const { return one_block ? sums : sums + base::transformed_at(panel, 0); }

  void add(int64_t panel, int64_t unit, int64_t count, bool first_block, lines_ahead<T> later) const {
    const int64_t part = unit % parts(), p = unit / parts();
    const int64_t vectors = vectors_of<T>(g.outputs, panel), columns = vectors * width<T>;
    const int64_t end = least(g.channels, (part + 1) * unit_rows);
    transposed_arguments<T> t;
    t.b = grad + p * grad_step() + panel * panel_width<T> * base::tiles;
    t.a_at = t.b_at = rows;
    t.a_step = base::input_row();
    t.b_step = t.c_step = columns;
    t.count = count;
    t.add = !first_block;
    for (int64_t k = part * unit_rows; k < end;) {
      const int64_t height = next_rows(end - k, most_rows[vectors]);
      t.ahead_step = later.count > 0 ? line<T> : 0;
      t.ahead = later.take(count, t.b);
      t.a = input + p * base::input_step() + k;
      t.c = sums_of(panel) + p * base::transformed_step(panel) + k * columns;
      tile<T>(vectors, height, t);
      k += height;
    }
  }
};

template <typename T> void run_weight_grad(const class_conv_arguments &x) {
  arena memory{static_cast<char *>(x.scratch)};
  const winograd_weight_plan<T> plan(x, memory);
  plan.fill();
  const conv_geometry &g = plan.g;
  const int64_t weight_elements = g.outputs * g.channels * 9, units = 36 * plan.parts();
  for (int64_t t = 0; t < plan.tiles; ++t) plan.rows[t] = int32_t(t);
#ifdef _OPENMP
#pragma omp parallel num_threads(x.threads) if (x.threads > 1)
#endif
  for (int64_t c = 0; c < x.classes; ++c) {
    T *out = static_cast<T *>(x.out) + c * weight_elements;
    const int64_t tiles = (x.first[c + 1] - x.first[c]) * plan.tiles_of_image;
    const T *images = static_cast<const T *>(x.images) + x.first[c] * g.pixels() * g.channels;
    const T *grads = static_cast<const T *>(x.other) + x.first[c] * g.pixels() * g.outputs;
    for (int64_t first = 0; first < tiles; first += plan.tiles) {
      const int64_t count = least(plan.tiles, tiles - first);
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
      for (int64_t i = 0; i < 2 * count; ++i)
        i < count ? plan.transform_input(images, first + i, i, plan.input)
                  : plan.transform_grad(grads, first + i - count, i - count);
      for (int64_t panel = 0; panel < plan.panel_count; ++panel) {
        // Each unit fetches a part of what the next block reads: grad first, then x.
        const int64_t channels = panel == 0 ? g.outputs : g.channels, lines = count * 16 * channels / line<T>;
        const T *next = (panel == 0 ? grads : images) + (first + count) * 16 * channels;
        const auto share = [=](int64_t unit) {
          const int64_t part = panel < 2 ? ceiling(lines, units) : 0;
          return lines_ahead<T>{next + unit * part * line<T>, part};
        };
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (int64_t unit = 0; unit < units; ++unit) plan.add(panel, unit, count, first == 0, share(unit));
        if (first + count < tiles) continue;
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (int64_t k = 0; k < g.channels; k += 16)
          plan.finish_weights(plan.sums_of(panel), panel, k, least(g.channels, k + 16), out);
      }
    }
    if (tiles > 0) continue;
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
    for (int64_t i = 0; i < weight_elements; ++i) out[i] = 0;
  }
}

}  // namespace

template <typename T> int64_t winograd_scratch(const class_conv_arguments &x) {
  arena memory{nullptr};
  if (x.product == conv_by_weight)
    (void)winograd_weight_plan<T>(x, memory);
  else
    (void)winograd_conv_plan<T>(x, memory);
  return memory.used;
}

template <typename T> void winograd(const class_conv_arguments &x) {
  x.product == conv_by_weight ? run_weight_grad<T>(x) : run_conv<T>(x);
}

template int64_t winograd_scratch<float>(const class_conv_arguments &);
template int64_t winograd_scratch<double>(const class_conv_arguments &);
template void winograd<float>(const class_conv_arguments &);
template void winograd<double>(const class_conv_arguments &);

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
