// Which input pixel meets which output pixel under each tap of the kernel.
//
// Pairs whose input lies in the padding do not exist, so nothing is multiplied by zero: on a 4x4
// plane a 3x3 kernel has 100 pairs instead of 144. A block is some rows of output pixels of one
// large image, or a group of small images.
#pragma once

#include "conv.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

constexpr int64_t block_pixels = 256;

struct tap_pairs {
  int64_t group;       // images in a block
  int64_t block_rows;  // output rows in a block
  int64_t row_blocks;  // blocks in an image
  int32_t *input, *output;  // pixel, counted from the block's first image
  int64_t *begin, *count;   // by row block and tap; count is for one image, further images follow

  tap_pairs(const conv_geometry &g, int64_t images, arena &memory) {
    const int64_t pixels = g.out_pixels();
    group = most(1, least(images, block_pixels / pixels));
    block_rows = pixels <= 2 * block_pixels ? g.out_height : most(1, block_pixels / g.out_width);
    row_blocks = ceiling(g.out_height, block_rows);
    input = memory.take<int32_t>(group * g.taps() * pixels);
    output = memory.take<int32_t>(group * g.taps() * pixels);
    begin = memory.take<int64_t>(row_blocks * g.taps());
    count = memory.take<int64_t>(row_blocks * g.taps());
  }

  void fill(const conv_geometry &g) {
    int64_t end = 0;
    for (int64_t block = 0; block < row_blocks; ++block)
      for (int64_t tap = 0; tap < g.taps(); ++tap) {
        const int64_t dy = tap / g.kernel_width - g.top, dx = tap % g.kernel_width - g.left;
        const int64_t y_first = most(block * block_rows, -dy), x_first = most(0, -dx);
        const int64_t y_end = least(least((block + 1) * block_rows, g.out_height), g.height - dy);
        const int64_t x_end = least(g.out_width, g.width - dx);
        const int64_t at = block * g.taps() + tap;
        begin[at] = end;
        count[at] = most(0, y_end - y_first) * most(0, x_end - x_first);
        for (int64_t n = 0; n < group; ++n)
          for (int64_t y = y_first; y < y_end; ++y)
            for (int64_t px = x_first; px < x_end; ++px, ++end) {
              input[end] = int32_t(n * g.pixels() + (y + dy) * g.width + px + dx);
              output[end] = int32_t(n * g.out_pixels() + y * g.out_width + px);
            }
      }
  }
};

// Zero-padded rows of one image that output rows y_first .. y_end - 1 see, for few channels: a row
// of the kernel is then one run of kernel_width * channels elements.
inline int64_t padded_row(const conv_geometry &g) { return (g.out_width + g.kernel_width - 1) * g.channels; }

template <typename T> void copy_padded(const conv_geometry &g, const T *image, int64_t y_first, int64_t y_end, T *to) {
  const int64_t row = padded_row(g);
  for (int64_t y = y_first - g.top; y < y_end - g.top + g.kernel_height - 1; ++y, to += row) {
    memset(to, 0, size_t(row) * sizeof(T));
    if (y < 0 || y >= g.height) continue;
    const int64_t skipped = most(0, -g.left);
    const int64_t columns = least(g.width - skipped, g.out_width + g.kernel_width - 1 - most(0, g.left));
    if (columns > 0)
      memcpy(to + most(0, g.left) * g.channels, image + (y * g.width + skipped) * g.channels,
             size_t(columns * g.channels) * sizeof(T));
  }
}

// Few channels: multiplying by a padded zero costs less than one call for each tap.
inline bool copies_rows(const conv_geometry &g) { return g.taps() > 1 && g.channels <= 16; }

}  // namespace
}  // namespace DDFAST_LEVEL
}  // namespace ddfast
