// Direct convolution, and its gradient by the input, which is a convolution with the kernel turned
// around: an implicit matrix multiplication, tap by tap.
//
// Three ways by the number of channels. Many inputs and outputs: for each tap, the pixels that see
// it times the tap's panel of weights. Few inputs (a first layer): rows of a zero-padded copy times
// all taps at once. Few outputs (the gradient by the images): every input pixel times the weights
// of all taps and outputs, then a sum over the shifted products.
#include "conv_taps.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

constexpr int64_t depth_chunk = 128;  // times panel_width: a panel of weights in the first cache

template <typename T> struct direct_plan {
  conv_geometry g, products;  // products: few outputs, taps as columns of a 1x1 kernel
  bool few_outputs, rows_copied;
  int64_t panel_count, classes_at_once, packed_elements, local_elements;
  T *packed, *local;
  tap_pairs pairs;

  static conv_geometry seen(const class_conv_arguments &x) { return geometry_of(x); }
  static bool has_few_outputs(const conv_geometry &g) { return g.taps() > 1 && g.outputs <= 4 && g.channels > 4; }
  static conv_geometry as_products(const conv_geometry &g) {
    return {g.channels, g.outputs * g.taps(), g.height, g.width, g.height, g.width, 1, 1, 0, 0};
  }
  static int64_t largest(const class_conv_arguments &x) {
    int64_t images = 0;
    for (int64_t c = 0; c < x.classes; ++c) images = most(images, x.first[c + 1] - x.first[c]);
    return images;
  }

  direct_plan(const class_conv_arguments &x, arena &memory)
      : g(seen(x)),
        products(as_products(g)),
        few_outputs(has_few_outputs(g)),
        rows_copied(!few_outputs && copies_rows(g)),
        pairs(few_outputs ? products : g, ceiling(largest(x), x.threads), memory) {
    const conv_geometry &used = few_outputs ? products : g;
    panel_count = panels<T>(used.outputs);
    // Weights of one class stay in cache until its images have been seen.
    classes_at_once = x.threads > 1 ? 4 * x.threads : 1;
    packed_elements = packed_size<T>(used);
    packed = memory.take<T>(classes_at_once * packed_elements);
    local_elements = 0;
    if (few_outputs)
      local_elements = pairs.group * g.pixels() * padded<T>(products.outputs);
    else
      local_elements = pairs.group * pairs.block_rows * g.out_width * (rows_copied ? padded<T>(g.outputs) : panel_width<T>);
    if (rows_copied) local_elements += pairs.group * padded_plane() + width<T>;
    local = memory.take<T>(x.threads * local_elements);
  }

  int64_t padded_plane() const { return (pairs.block_rows + g.kernel_height - 1) * padded_row(g); }

  // One tap (or all of them, for few inputs) of some output pixels.
  struct rows_of_block {
    const T *a;
    const int32_t *a_at;
    T *c;
    const int32_t *c_at;
    int64_t a_step, c_step, count;
  };

  // With `stream` A is read once, in order, and fetched two tiles ahead.
  static void multiply(const rows_of_block &x, const T *b, int64_t vectors, int64_t depth, bool add,
                       bool stream) {
    times_arguments<T> t;
    t.b = t.ahead = b;
    t.pieces = 1;
    t.step = 0;
    t.depth = depth;
    t.add = add;
    for (int64_t r = 0; r < x.count;) {
      const int64_t rows = next_rows(x.count - r, most_rows[vectors]);
      if (stream) t.ahead = x.a + (x.a_at[r] + 2 * rows) * x.a_step;
      for (int64_t i = 0; i < rows; ++i) {
        t.a[i] = x.a + x.a_at[r + i] * x.a_step;
        t.c[i] = x.c + x.c_at[r + i] * x.c_step;
      }
      tile<T>(vectors, rows, t);
      r += rows;
    }
  }

  // Output pixels of one block and panel, tap by tap. The rows of C are zero or, with `fresh`, not
  // yet written, in which case the first tap must reach all of them.
  void by_taps(const conv_geometry &used, const T *images, int64_t row_block, int64_t group, int64_t panel,
               const T *b, T *c, int64_t c_step) const {
    const int64_t vectors = vectors_of<T>(used.outputs, panel), columns = vectors * width<T>;
    const int64_t first_row = row_block * pairs.block_rows;
    const int64_t rows = least(pairs.block_rows, used.out_height - first_row), taps = used.taps();
    // A tap that reaches every pixel goes first and need not find zeros there.
    int64_t whole = -1;
    for (int64_t tap = taps / 2, i = 0; i < taps && whole < 0; ++i, tap = (tap + 1) % taps)
      if (pairs.count[row_block * taps + tap] == rows * used.out_width) whole = tap;
    if (whole < 0)
      for (int64_t n = 0; n < group; ++n)
        for (int64_t p = 0; p < rows * used.out_width; ++p)
          memset(c + (n * used.out_pixels() + first_row * used.out_width + p) * c_step, 0, size_t(columns) * sizeof(T));
    b += panel_offset<T>(used, panel);
    for (int64_t i = 0; i < taps; ++i) {
      const int64_t tap = whole < 0 ? i : (whole + i) % taps, at = row_block * taps + tap;
      for (int64_t k = 0; k < used.channels; k += depth_chunk)
        multiply({images + k, pairs.input + pairs.begin[at], c, pairs.output + pairs.begin[at], used.channels, c_step,
                  group * pairs.count[at]},
                 b + (tap * used.channels + k) * columns, vectors, least(depth_chunk, used.channels - k),
                 k > 0 || i > 0 || whole < 0, taps == 1 && panel == 0);
    }
  }

  // Copies finished columns to the output where a vector would reach into the next pixel.
  void copy_out(const T *from, T *to, int64_t pixel_count, int64_t panel) const {
    const int64_t columns = least(panel_width<T>, g.outputs - panel * panel_width<T>);
    const int64_t step = vectors_of<T>(g.outputs, panel) * width<T>;
    for (int64_t p = 0; p < pixel_count; ++p)
      for (int64_t j = 0; j < columns; ++j) to[p * g.outputs + j] = from[p * step + j];
  }

  bool in_place() const { return g.outputs % width<T> == 0; }

  void tap_block(const T *images, T *out, int64_t row_block, int64_t group, int64_t panel, const T *b,
                 T *scratch) const {
    out += panel * panel_width<T>;
    if (in_place()) return by_taps(g, images, row_block, group, panel, b, out, g.outputs);
    const int64_t first = row_block * pairs.block_rows * g.out_width;
    const int64_t rows = least(pairs.block_rows, g.out_height - row_block * pairs.block_rows);
    const int64_t step = vectors_of<T>(g.outputs, panel) * width<T>;
    by_taps(g, images, row_block, group, panel, b, scratch - first * step, step);
    // More than one image only where a block holds whole images: then rows follow each other.
    copy_out(scratch, out + first * g.outputs, ((group - 1) * g.out_height + rows) * g.out_width, panel);
  }

  // Few inputs: copies the padded rows, then every panel with all taps in one go.
  void row_block(const T *images, T *out, int64_t block, int64_t group, const T *b, T *scratch) const {
    const int64_t first_row = block * pairs.block_rows, row = padded_row(g);
    const int64_t rows = least(pairs.block_rows, g.out_height - first_row), count = rows * g.out_width;
    T *tile_memory = scratch + pairs.group * padded_plane() + width<T>;
    for (int64_t n = 0; n < group; ++n)
      copy_padded(g, images + n * g.pixels() * g.channels, first_row, first_row + rows, scratch + n * padded_plane());
    // All panels of few pixels, so that the output is written in order. It is larger than the cache;
    // its lines are fetched two tiles ahead.
    T *to = out + first_row * g.out_width * g.outputs, *c = in_place() ? to : tile_memory;
    const int64_t c_step = in_place() ? g.outputs : padded<T>(g.outputs);
    times_arguments<T> t;
    t.pieces = g.kernel_height;
    t.step = row;
    t.depth = g.kernel_width * g.channels;
    t.add = false;
    int64_t n = 0, y = 0, px = 0;
    for (int64_t r = 0; r < group * count;) {
      const int64_t tile_rows = next_rows(group * count - r, most_rows[most_vectors]);
      for (int64_t i = 0; i < tile_rows; ++i) {
        t.a[i] = scratch + n * padded_plane() + y * row + px * g.channels;
        t.c[i] = c + (r + i) * c_step;
        if (++px == g.out_width) px = 0, ++y;
        if (y == rows) y = 0, ++n;
      }
      t.ahead = c + (r + 2 * tile_rows) * c_step;
      for (int64_t panel = 0; panel < panel_count; ++panel) {
        t.b = b + panel_offset<T>(g, panel);
        tile<T>(vectors_of<T>(g.outputs, panel), tile_rows, t);
        t.ahead += t.pieces * t.depth * line<T>;
        for (int64_t i = 0; i < tile_rows; ++i) t.c[i] += panel_width<T>;
      }
      r += tile_rows;
    }
    if (!in_place())
      for (int64_t p = 0; p < group * count; ++p)
        memcpy(to + p * g.outputs, tile_memory + p * c_step, size_t(g.outputs) * sizeof(T));
  }

  // out[pixel][:] = sum over taps of z[shifted pixel][tap][:]
  template <int outputs> void add_shifted(const T *z, T *out) const {
    constexpr int summed = outputs == 3 ? 4 : outputs;  // a vector; z has room behind its last row
    const int64_t step = padded<T>(products.outputs);
    for (int64_t y = 0; y < g.out_height; ++y)
      for (int64_t px = 0; px < g.out_width; ++px) {
        T sum[summed] = {};
        const int64_t ky_end = least(g.kernel_height, g.height + g.top - y);
        const int64_t kx_first = most(0, g.left - px), kx_end = least(g.kernel_width, g.width + g.left - px);
        for (int64_t ky = most(0, g.top - y); ky < ky_end; ++ky)
          for (int64_t kx = kx_first; kx < kx_end; ++kx) {
            const T *from = z + ((y + ky - g.top) * g.width + px + kx - g.left) * step +
                            (ky * g.kernel_width + kx) * outputs;
            for (int o = 0; o < summed; ++o) sum[o] += from[o];
          }
        for (int o = 0; o < outputs; ++o) out[(y * g.out_width + px) * outputs + o] = sum[o];
      }
  }

  void shifted_group(const T *images, T *out, int64_t group, const T *b, T *z) const {
    const int64_t step = padded<T>(products.outputs);
    for (int64_t block = 0; block < pairs.row_blocks; ++block)
      for (int64_t panel = 0; panel < panel_count; ++panel)
        by_taps(products, images, block, group, panel, b, z + panel * panel_width<T>, step);
    for (int64_t n = 0; n < group; ++n) {
      const T *from = z + n * g.pixels() * step;
      T *to = out + n * g.out_pixels() * g.outputs;
      if (g.outputs == 1) add_shifted<1>(from, to);
      if (g.outputs == 2) add_shifted<2>(from, to);
      if (g.outputs == 3) add_shifted<3>(from, to);
      if (g.outputs == 4) add_shifted<4>(from, to);
    }
  }

  // Weights [channel][tap][output] of the products.
  void pack_products(const weight_strides &s, const T *weight, int64_t panel, T *to) const {
    const int64_t columns = vectors_of<T>(products.outputs, panel) * width<T>;
    to += panel_offset<T>(products, panel);
    for (int64_t k = 0; k < g.channels; ++k)
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t column = panel * panel_width<T> + j, tap = column / g.outputs, o = column % g.outputs;
        const bool inside = column < products.outputs;
        to[k * columns + j] = inside ? weight[s.origin + o * s.column + k * s.channel + tap * s.tap] : T(0);
      }
  }

  void pack(const class_conv_arguments &x, int64_t c, int64_t panel, T *to) const {
    const T *weight = static_cast<const T *>(x.other) + c * g.outputs * g.channels * g.taps();
    const weight_strides s = strides_of(g, x.product == conv_by_input);
    few_outputs ? pack_products(s, weight, panel, to) : pack_panel<T>(g, s, weight, panel, to);
  }

  // One block of one class; tasks count panels only where each panel is a task of its own.
  void run(const class_conv_arguments &x, int64_t c, int64_t task, const T *b, T *scratch) const {
    const int64_t per_group = few_outputs ? 1 : pairs.row_blocks * (rows_copied ? 1 : panel_count);
    const int64_t n = x.first[c] + task / per_group * pairs.group;
    const int64_t group = least(pairs.group, x.first[c + 1] - n);
    const T *images = static_cast<const T *>(x.images) + n * g.pixels() * g.channels;
    T *out = static_cast<T *>(x.out) + n * g.out_pixels() * g.outputs;
    const int64_t part = task % per_group;
    if (few_outputs) return shifted_group(images, out, group, b, scratch);
    if (rows_copied) return row_block(images, out, part, group, b, scratch);
    tap_block(images, out, part / panel_count, group, part % panel_count, b, scratch);
  }
  int64_t tasks(const class_conv_arguments &x, int64_t c) const {
    const int64_t groups = ceiling(x.first[c + 1] - x.first[c], pairs.group);
    return groups * (few_outputs ? 1 : pairs.row_blocks * (rows_copied ? 1 : panel_count));
  }
};

}  // namespace

template <typename T> int64_t direct_scratch(const class_conv_arguments &x) {
  arena memory{nullptr};
  direct_plan<T> plan(x, memory);
  return memory.used;
}

template <typename T> void direct_conv(const class_conv_arguments &x) {
  arena memory{static_cast<char *>(x.scratch)};
  direct_plan<T> plan(x, memory);
  plan.pairs.fill(plan.few_outputs ? plan.products : plan.g);
#ifdef _OPENMP
#pragma omp parallel num_threads(x.threads) if (x.threads > 1)
#endif
  {
    int thread = 0;
#ifdef _OPENMP
    thread = omp_get_thread_num();
#endif
    T *local = plan.local + thread * plan.local_elements;
    for (int64_t begin = 0; begin < x.classes; begin += plan.classes_at_once) {
      const int64_t end = least(x.classes, begin + plan.classes_at_once);
      int64_t tasks = 0;
      for (int64_t c = begin; c < end; ++c) tasks += plan.tasks(x, c);
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
      for (int64_t i = 0; i < (end - begin) * plan.panel_count; ++i) {
        const int64_t c = begin + i / plan.panel_count;
        if (plan.tasks(x, c) > 0)
          plan.pack(x, c, i % plan.panel_count, plan.packed + (c - begin) * plan.packed_elements);
      }
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
      for (int64_t i = 0; i < tasks; ++i) {
        int64_t c = begin, task = i;
        while (task >= plan.tasks(x, c)) task -= plan.tasks(x, c++);
        plan.run(x, c, task, plan.packed + (c - begin) * plan.packed_elements, local);
      }
    }
  }
}

template int64_t direct_scratch<float>(const class_conv_arguments &);
template int64_t direct_scratch<double>(const class_conv_arguments &);
template void direct_conv<float>(const class_conv_arguments &);
template void direct_conv<double>(const class_conv_arguments &);

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
