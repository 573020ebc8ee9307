// How norm_relu_pool.cpp and norm_relu_pool_means.cpp divide images into tiles, and reach them.
#pragma once

#include "norm_relu_pool.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

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
  const int64_t pooled = (x.grad ? 1 : 0) + (x.grad_tangent ? 1 : 0);
  const int64_t values = x.height * x.width * (x.tangent || x.means ? 2 : 1) + cells * pooled;
  int64_t most = tile_bytes / ((values > 0 ? values : 1) * vector_bytes);
  if (!x.channels_last && most > transposed_vectors) most = transposed_vectors;
  if (most > vectors) most = vectors;
  if (most < 1) most = 1;
  const int64_t sets = x.means ? x.classes : x.images;
  while (most > 1 && sets * ((vectors + most - 1) / most) < x.threads) most = (most + 1) / 2;
  const int64_t tiles = (vectors + most - 1) / most, width = tiles ? (vectors + tiles - 1) / tiles * n : n;
  return {width, whole, tiles + (whole < x.channels ? 1 : 0)};
}

// Where a tensor's part of a tile lies: in place, or in `buffer`.
template <typename T>
T *part(const norm_relu_pool_arguments &x, tile<T> &t, const void *tensor, int64_t pixels, T *buffer) {
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

template <typename T>
void copy_in(const norm_relu_pool_arguments &x, tile<T> &t, const void *tensor, int64_t pixels, T *buffer) {
  if (!tensor || !buffer) return;
  const T *image = static_cast<const T *>(tensor) + t.image * x.channels * pixels;
  if (t.channels < t.padded) memset(buffer, 0, size_t(pixels * t.padded) * sizeof(T));
  if (!x.channels_last)
    return transpose(image + t.first_channel * pixels, pixels, t.channels, pixels, buffer, t.padded);
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < t.channels; ++c) buffer[p * t.padded + c] = image[p * x.channels + t.first_channel + c];
}

// To the image (or class) of this number.
template <typename T>
void copy_out(const norm_relu_pool_arguments &x, tile<T> &t, void *tensor, int64_t number, const T *buffer,
              int64_t pixels) {
  if (!buffer) return;
  T *image = static_cast<T *>(tensor) + number * x.channels * pixels;
  if (!x.channels_last)
    return transpose(buffer, t.padded, pixels, t.channels, image + t.first_channel * pixels, pixels);
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < t.channels; ++c) image[p * x.channels + t.first_channel + c] = buffer[p * t.padded + c];
}

}  // namespace
}  // namespace DDFAST_LEVEL
}  // namespace ddfast
