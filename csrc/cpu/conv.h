// What the convolution kernels share: the geometry, scratch memory, packed weights.
#pragma once

#include "gemm.h"
#include "kernels.h"

namespace ddfast {
namespace DDFAST_LEVEL {

// A convolution of stride 1 from channels-last planes to channels-last planes. The paddings may be
// negative: the gradient of a padding larger than the kernel crops.
struct conv_geometry {
  int64_t channels, outputs;  // per input pixel, per output pixel
  int64_t height, width, out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t top, left;  // paddings
  int64_t taps() const { return kernel_height * kernel_width; }
  int64_t pixels() const { return height * width; }
  int64_t out_pixels() const { return out_height * out_width; }
};

namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The geometry of class_conv, or, seen as a convolution of grad, of its gradient by the input.
inline conv_geometry geometry_of(const class_conv_arguments &x) {
  const int64_t oh = x.height + 2 * x.padding - x.kernel_height + 1;
  const int64_t ow = x.width + 2 * x.padding - x.kernel_width + 1;
  if (x.product == conv_by_input)
    return {x.out_channels, x.in_channels,   oh, ow, x.height, x.width, x.kernel_height, x.kernel_width,
            x.kernel_height - 1 - x.padding, x.kernel_width - 1 - x.padding};
  return {x.in_channels,   x.out_channels, x.height,  x.width,  oh, ow,
          x.kernel_height, x.kernel_width, x.padding, x.padding};
}

// Cuts scratch memory into arrays. Without memory it only adds up what is needed.
struct arena {
  char *base;
  int64_t used = 0;
  template <typename T> T *take(int64_t count) {
    T *at = base ? reinterpret_cast<T *>(base + used) : nullptr;
    used += (count * int64_t(sizeof(T)) + 127) / 64 * 64;
    return at;
  }
};

// Weights (O, I, taps) of one class as the B of `times`: panels of output channels of the geometry,
// in each [tap][channel][column]. Every panel but the last is panel_width wide.
template <typename T> inline int64_t packed_size(const conv_geometry &g) {
  return padded<T>(g.outputs) * g.taps() * g.channels;
}
template <typename T> inline int64_t panel_offset(const conv_geometry &g, int64_t panel) {
  return panel * panel_width<T> * g.taps() * g.channels;
}

// Where element (tap, channel, column) of the packed weights lies in (O, I, taps).
struct weight_strides {
  int64_t column, channel, tap, origin;
};
inline weight_strides strides_of(const conv_geometry &g, bool by_input) {
  const int64_t taps = g.taps();
  // By the input, columns are input channels and the kernel is turned around.
  if (by_input) return {taps, g.outputs * taps, -1, taps - 1};
  return {g.channels * taps, taps, 1, 0};
}

template <typename T>
inline void pack_panel(const conv_geometry &g, const weight_strides &s, const T *weight, int64_t panel, T *packed) {
  const int64_t first = panel * panel_width<T>, columns = vectors_of<T>(g.outputs, panel) * width<T>;
  const int64_t taps = g.taps();
  packed += panel_offset<T>(g, panel);
  for (int64_t j = 0; j < columns; j += width<T>) {
    const int64_t count = least(width<T>, g.outputs - first - j);
    for (int64_t k = 0; k < g.channels; ++k)
      for (int64_t t = 0; t < taps; ++t) {
        const T *from = weight + s.origin + (first + j) * s.column + k * s.channel + t * s.tap;
        T *to = packed + (t * g.channels + k) * columns + j;
        if (count == width<T>)
          for (int64_t l = 0; l < width<T>; ++l) to[l] = from[l * s.column];
        else
          for (int64_t l = 0; l < width<T>; ++l) to[l] = l < count ? from[l * s.column] : T(0);
      }
  }
}

// The way back: channels k_first to k_end of a panel of packed weight gradients to (O, I, taps).
template <typename T>
inline void unpack_panel(const conv_geometry &g, const T *packed, int64_t panel, int64_t k_first, int64_t k_end,
                         T *weight) {
  const int64_t first = panel * panel_width<T>, columns = vectors_of<T>(g.outputs, panel) * width<T>;
  const int64_t taps = g.taps();
  packed += panel_offset<T>(g, panel);
  for (int64_t j = 0; j < columns; j += width<T>) {
    const int64_t count = least(width<T>, g.outputs - first - j), step = g.channels * taps;
    for (int64_t k = k_first; k < k_end; ++k)
      for (int64_t t = 0; t < taps; ++t) {
        const T *from = packed + (t * g.channels + k) * columns + j;
        T *to = weight + (first + j) * step + k * taps + t;
        for (int64_t l = 0; l < count; ++l) to[l * step] = from[l];
      }
  }
}

}  // namespace

// Direct and Winograd convolutions, one template instance each in its own file.
template <typename T> int64_t direct_scratch(const class_conv_arguments &);
template <typename T> void direct_conv(const class_conv_arguments &);
template <typename T> int64_t direct_weight_grad_scratch(const class_conv_arguments &);
template <typename T> void direct_weight_grad(const class_conv_arguments &);
template <typename T> int64_t winograd_scratch(const class_conv_arguments &);
template <typename T> void winograd(const class_conv_arguments &);

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
