// The gradient of a convolution by its weights, class by class, directly: for each tap, the input
// pixels that see it, transposed, times their output pixels.
//
// A block of pixels (tap_pairs) is summed in registers in chunks of pair_chunk pairs and added to the
// class's gradient, which stays in cache in the layout of packed weights. Blocks and chunks depend
// on the shape alone, and threads share the rows of the gradient among them, so the bits do not
// depend on the number of threads.
#include "conv_taps.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

constexpr int64_t pair_chunk = 128;  // times panel_width: a panel of grad in the first cache
constexpr int64_t unit_rows = 192;   // input channels of one task

template <typename T> struct weight_grad_plan {
  conv_geometry g;
  bool rows_copied, grad_copied;
  int64_t panel_count, taps, depth, depth_parts, grad_step, input_elements;
  T *sums, *input, *grad;
  int32_t *input_at, *output_at;  // for copied rows: of a block's pixels
  tap_pairs pairs;

  weight_grad_plan(const class_conv_arguments &x, arena &memory)
      : g(geometry_of(x)),
        rows_copied(copies_rows(g)),
        grad_copied(g.outputs % width<T> != 0),
        panel_count(panels<T>(g.outputs)),
        taps(rows_copied ? g.kernel_height : g.taps()),
        depth(rows_copied ? g.kernel_width * g.channels : g.channels),
        depth_parts(ceiling(depth, unit_rows)),
        grad_step(grad_copied ? padded<T>(g.outputs) : g.outputs),
        pairs(g, block_pixels, memory) {
    const int64_t block_size = pairs.group * pairs.block_rows * g.out_width;
    sums = memory.take<T>(packed_size<T>(g));
    input_elements = rows_copied ? pairs.group * padded_plane() : 0;
    input = memory.take<T>(input_elements);
    grad = memory.take<T>(grad_copied ? block_size * grad_step : 0);
    input_at = memory.take<int32_t>(rows_copied ? block_size : 0);
    output_at = memory.take<int32_t>(rows_copied ? block_size : 0);
  }

  int64_t padded_plane() const { return (pairs.block_rows + g.kernel_height - 1) * padded_row(g); }

  void fill() {
    pairs.fill(g);
    if (!rows_copied) return;
    int64_t at = 0;
    for (int64_t n = 0; n < pairs.group; ++n)
      for (int64_t y = 0; y < pairs.block_rows; ++y)
        for (int64_t px = 0; px < g.out_width; ++px, ++at) {
          input_at[at] = int32_t(n * padded_plane() + y * padded_row(g) + px * g.channels);
          output_at[at] = int32_t(n * g.out_pixels() + y * g.out_width + px);
        }
  }

  struct block {
    const T *images, *grad;  // of its first image
    int64_t group, row_block, rows;
    bool fresh;  // the first of its class
  };

  // One unit's share of what the next block will read: as much grad as this one has, behind it.
  lines_ahead<T> next_lines(const block &b, int64_t unit) const {
    const int64_t lines = b.group * b.rows * g.out_width * g.outputs / line<T>, share = ceiling(lines, units());
    const T *end = b.grad + ((b.group - 1) * g.out_pixels() + (b.row_block * pairs.block_rows + b.rows) * g.out_width) *
                                g.outputs;
    return {end + unit * share * line<T>, share};
  }

  // Rows `first` to `end` of the gradient under one tap and in one panel.
  // With `fresh` rows have not been written yet.
  void multiply(transposed_arguments<T> t, const int32_t *a_at, const int32_t *b_at, int64_t count, const T *a,
                T *c, int64_t first, int64_t end, int64_t vectors, bool fresh, lines_ahead<T> ahead) const {
    if (fresh && count == 0) memset(c + first * t.c_step, 0, size_t((end - first) * t.c_step) * sizeof(T));
    for (int64_t n = 0; n < count; n += pair_chunk) {
      t.add = n > 0 || !fresh;
      t.a_at = a_at + n;
      t.b_at = b_at + n;
      t.count = least(pair_chunk, count - n);
      for (int64_t r = first; r < end;) {
        const int64_t rows = next_rows(end - r, most_rows[vectors]);
        t.a = a + r;
        t.c = c + r * t.c_step;
        t.ahead_step = ahead.count > 0 ? line<T> : 0;
        t.ahead = ahead.take(t.count, t.b);
        tile<T>(vectors, rows, t);
        r += rows;
      }
    }
  }

  void copy(const block &b, int64_t n) const {
    const int64_t first_row = b.row_block * pairs.block_rows;
    if (rows_copied)
      copy_padded(g, b.images + n * g.pixels() * g.channels, first_row, first_row + b.rows,
                  input + n * padded_plane());
    if (!grad_copied) return;
    const int64_t pixel_count = b.rows * g.out_width;
    const T *from = b.grad + (n * g.out_pixels() + first_row * g.out_width) * g.outputs;
    T *to = grad + n * pixel_count * grad_step;
    for (int64_t p = 0; p < pixel_count; ++p) {
      memcpy(to + p * grad_step, from + p * g.outputs, size_t(g.outputs) * sizeof(T));
      memset(to + p * grad_step + g.outputs, 0, size_t(grad_step - g.outputs) * sizeof(T));
    }
  }

  int64_t units() const { return panel_count * taps * depth_parts; }

  void add(const block &b, int64_t unit) const {
    const int64_t part = unit % depth_parts, tap = unit / depth_parts % taps, panel = unit / depth_parts / taps;
    const int64_t vectors = vectors_of<T>(g.outputs, panel), first_row = b.row_block * pairs.block_rows;
    const int64_t first = part * unit_rows, end = least(depth, first + unit_rows);
    transposed_arguments<T> t;
    const int64_t skipped = first_row * g.out_width;  // output pixels before the block
    t.b = (grad_copied ? grad - skipped * grad_step : b.grad) + panel * panel_width<T>;
    t.b_step = grad_step;
    t.c_step = vectors * width<T>;
    T *c = sums + panel_offset<T>(g, panel) + tap * depth * t.c_step;
    if (!rows_copied) {
      const int64_t at = b.row_block * taps + tap;
      t.a_step = g.channels;
      return multiply(t, pairs.input + pairs.begin[at], pairs.output + pairs.begin[at], b.group * pairs.count[at],
                      b.images, c, first, end, vectors, b.fresh, next_lines(b, unit));
    }
    t.a_step = 1;
    t.b += skipped * grad_step;
    // The last rows of an image may be fewer than a block's; then a block is of one image.
    multiply(t, input_at, output_at, b.group * b.rows * g.out_width, input + tap * padded_row(g), c, first, end,
             vectors, b.fresh, next_lines(b, unit));
  }
};

}  // namespace

template <typename T> int64_t direct_weight_grad_scratch(const class_conv_arguments &x) {
  arena memory{nullptr};
  weight_grad_plan<T> plan(x, memory);
  return memory.used;
}

template <typename T> void direct_weight_grad(const class_conv_arguments &x) {
  arena memory{static_cast<char *>(x.scratch)};
  weight_grad_plan<T> plan(x, memory);
  plan.fill();
  const conv_geometry &g = plan.g;
  const int64_t weight_elements = g.outputs * g.channels * g.taps(), units = plan.units();
#ifdef _OPENMP
#pragma omp parallel num_threads(x.threads) if (x.threads > 1)
#endif
  for (int64_t c = 0; c < x.classes; ++c) {
    T *out = static_cast<T *>(x.out) + c * weight_elements;
    const bool empty = x.first[c + 1] == x.first[c];
    for (int64_t n = x.first[c]; n < x.first[c + 1]; n += plan.pairs.group)
      for (int64_t row_block = 0; row_block < plan.pairs.row_blocks; ++row_block) {
        const typename weight_grad_plan<T>::block b = {
            static_cast<const T *>(x.images) + n * g.pixels() * g.channels,
            static_cast<const T *>(x.other) + n * g.out_pixels() * g.outputs,
            least(plan.pairs.group, x.first[c + 1] - n), row_block,
            least(plan.pairs.block_rows, g.out_height - row_block * plan.pairs.block_rows),
            n == x.first[c] && row_block == 0};
        if (plan.rows_copied || plan.grad_copied) {
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
          for (int64_t i = 0; i < b.group; ++i) plan.copy(b, i);
        }
        // Copies are read until everyone is done; without any, nobody waits: a unit stays with its
        // thread from block to block.
        if (plan.rows_copied || plan.grad_copied) {
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
          for (int64_t unit = 0; unit < units; ++unit) plan.add(b, unit);
        } else {
#ifdef _OPENMP
#pragma omp for schedule(static) nowait
#endif
          for (int64_t unit = 0; unit < units; ++unit) plan.add(b, unit);
        }
      }
#ifdef _OPENMP
#pragma omp barrier
#pragma omp for schedule(static)
#endif
    for (int64_t k = 0; k < g.channels; k += 16) {
      const int64_t end = least(g.channels, k + 16);
      for (int64_t panel = 0; panel < plan.panel_count && !empty; ++panel)
        unpack_panel<T>(g, plan.sums, panel, k, end, out);
      for (int64_t o = 0; o < g.outputs && empty; ++o)
        memset(out + (o * g.channels + k) * g.taps(), 0, size_t((end - k) * g.taps()) * sizeof(T));
    }
  }
}

template int64_t direct_weight_grad_scratch<float>(const class_conv_arguments &);
template int64_t direct_weight_grad_scratch<double>(const class_conv_arguments &);
template void direct_weight_grad<float>(const class_conv_arguments &);
template void direct_weight_grad<double>(const class_conv_arguments &);

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
