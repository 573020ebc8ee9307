// Bilinear resampling of many planes at once, and its transpose: the inner part of augment.cpp.
//
// Sixteen planes that share a record lie side by side in a scratch buffer, pixel by pixel and with a
// border of zeros. Each of the four reads of an output pixel is then a plain vector load without a
// bounds check, and the transpose, which adds to the same four places, needs no scatter either.
// A plane's arithmetic depends neither on its lane nor on its thread.
#pragma once

#include "common.h"
#include "kernels.h"

#ifdef __SSE__
#include <xmmintrin.h>
#endif

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

constexpr int64_t wide = 16;   // planes side by side
constexpr int64_t narrow = 4;  // the same for few planes, or large ones

// --- planes side by side ------------------------------------------------------------------------

// Written with vector types because compilers do not reliably find these vectors by themselves.
#if defined(__AVX512F__)
constexpr int64_t register_bytes = 64;
#elif defined(__AVX__)
constexpr int64_t register_bytes = 32;
#else
constexpr int64_t register_bytes = 16;
#endif

template <typename A, int64_t L> struct side_by_side {
  static constexpr int64_t all = L * int64_t(sizeof(A));
  static constexpr int64_t bytes = all < register_bytes ? all : register_bytes;
  static constexpr int64_t count = all / bytes;
  typedef A vector __attribute__((vector_size(bytes), aligned(sizeof(A)), may_alias));
};

// y = a x[0] + b x[1] + c x[below] + d x[below + 1], for all lanes of a pixel
template <int64_t L, typename A> void mix(const A *weight, int64_t stride, const A *x, int64_t below, A *y) {
  using V = side_by_side<A, L>;
  using vector = typename V::vector;
  const vector *top = reinterpret_cast<const vector *>(x), *bottom = reinterpret_cast<const vector *>(x + below);
  for (int64_t v = 0; v < V::count; ++v) {
    vector sum = weight[0] * top[v];
    sum += weight[stride] * top[v + V::count];
    sum += weight[2 * stride] * bottom[v];
    sum += weight[3 * stride] * bottom[v + V::count];
    reinterpret_cast<vector *>(y)[v] = sum;
  }
}

// Its transpose: adds a y, b y, c y, d y to the four places.
template <int64_t L, typename A> void spread(const A *weight, int64_t stride, const A *y, int64_t below, A *x) {
  using V = side_by_side<A, L>;
  using vector = typename V::vector;
  vector *top = reinterpret_cast<vector *>(x), *bottom = reinterpret_cast<vector *>(x + below);
  for (int64_t v = 0; v < V::count; ++v) {
    const vector value = reinterpret_cast<const vector *>(y)[v];
    top[v] += weight[0] * value;
    top[v + V::count] += weight[stride] * value;
    bottom[v] += weight[2 * stride] * value;
    bottom[v + V::count] += weight[3 * stride] * value;
  }
}

// side[k * L + l] = rows[l][k]
template <int64_t L, typename T, typename A> void interleave_some(const T *const *rows, int64_t begin, int64_t count, A *side) {
  for (int64_t k = begin; k < count; ++k)
    for (int64_t l = 0; l < L; ++l) side[k * L + l] = load(rows[l][k]);
}

template <int64_t L, typename T, typename A> void interleave(const T *const *rows, int64_t count, A *side) {
  interleave_some<L>(rows, 0, count, side);
}

// rows[l][k] = side[k * L + l]
template <int64_t L, typename T, typename A> void separate_some(const A *side, int64_t begin, int64_t count, T *const *rows) {
  for (int64_t k = begin; k < count; ++k)
    for (int64_t l = 0; l < L; ++l) store(&rows[l][k], side[k * L + l]);
}

template <int64_t L, typename T, typename A> void separate(const A *side, int64_t count, T *const *rows) {
  separate_some<L>(side, 0, count, rows);
}

#ifdef __SSE__
// Lane by lane in fours: planes often lie a multiple of 4096 bytes apart, and more than a few such
// rows at a time would evict one another from the first cache.
template <int64_t L> void interleave(const float *const *rows, int64_t count, float *side) {
  const int64_t blocks = L % 4 == 0 ? count / 4 * 4 : 0;
  for (int64_t l = 0; l + 4 <= L; l += 4)
    for (int64_t k = 0; k < blocks; k += 4) {
      __m128 a = _mm_loadu_ps(rows[l] + k), b = _mm_loadu_ps(rows[l + 1] + k);
      __m128 c = _mm_loadu_ps(rows[l + 2] + k), d = _mm_loadu_ps(rows[l + 3] + k);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      _mm_storeu_ps(side + k * L + l, a);
      _mm_storeu_ps(side + (k + 1) * L + l, b);
      _mm_storeu_ps(side + (k + 2) * L + l, c);
      _mm_storeu_ps(side + (k + 3) * L + l, d);
    }
  interleave_some<L>(rows, blocks, count, side);
}

template <int64_t L> void separate(const float *side, int64_t count, float *const *rows) {
  const int64_t blocks = L % 4 == 0 ? count / 4 * 4 : 0;
  for (int64_t l = 0; l + 4 <= L; l += 4)
    for (int64_t k = 0; k < blocks; k += 4) {
      __m128 a = _mm_loadu_ps(side + k * L + l), b = _mm_loadu_ps(side + (k + 1) * L + l);
      __m128 c = _mm_loadu_ps(side + (k + 2) * L + l), d = _mm_loadu_ps(side + (k + 3) * L + l);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      _mm_storeu_ps(rows[l] + k, a);
      _mm_storeu_ps(rows[l + 1] + k, b);
      _mm_storeu_ps(rows[l + 2] + k, c);
      _mm_storeu_ps(rows[l + 3] + k, d);
    }
  separate_some<L>(side, blocks, count, rows);
}
#endif

// --- scale, rotate ------------------------------------------------------------------------------

// Where each output pixel reads, in a plane with a border of one pixel, and with which weights.
template <typename A> struct footprint {
  scratch<int32_t> corner;  // of the four pixels, the one above and left
  scratch<A> weight;        // per row of pixels: corner, then right of it, below it, across
  explicit footprint(int64_t pixels) : corner(pixels), weight(4 * pixels) {}
};

// Pixel (i, j) reads at x = cx + xx (j - cx) + xy (i - cy), y = cy + yx (j - cx) + yy (i - cy), which
// is torch's affine_grid followed by grid_sample, in units of pixels and about the centre.
template <typename A>
void find_footprint(footprint<A> &reads, const double *row, int64_t height, int64_t width, bool align_corners) {
  double xx = row[1], xy = 0, yx = 0, yy = row[2];
  if (row[0] == augment_rotate) {
    const double tall = double(align_corners ? height - 1 : height), broad = double(align_corners ? width - 1 : width);
    xx = yy = cos(row[1]);
    xy = tall > 0 ? -sin(row[1]) * broad / tall : 0;
    yx = broad > 0 ? sin(row[1]) * tall / broad : 0;
  }
  const double cx = 0.5 * double(width - 1), cy = 0.5 * double(height - 1);
  const double right = double(width + 1), below = double(height + 1);
  const int32_t columns = int32_t(width), lines = int32_t(height);
  for (int64_t i = 0; i < height; ++i) {
    // In the bordered plane pixel 0 is at 1; points beyond the border read its zeros.
    const double x0 = 1 + cx + xy * (double(i) - cy) - xx * cx, y0 = 1 + cy + yy * (double(i) - cy) - yx * cx;
    int32_t *__restrict__ corner = &reads.corner[i * width];
    A *__restrict__ weight = &reads.weight[4 * i * width];
    for (int32_t j = 0; j < columns; ++j) {  // 32 bits: converted to double on every level
      double x = x0 + xx * double(j), y = y0 + yx * double(j);
      x = x > 0 ? x : 0, x = x < right ? x : right;
      y = y > 0 ? y : 0, y = y < below ? y : below;
      int32_t column = int32_t(x), line = int32_t(y);
      column = column < columns ? column : columns;
      line = line < lines ? line : lines;
      const double fx = x - double(column), fy = y - double(line);
      corner[j] = line * (columns + 2) + column;
      weight[j] = A((1 - fx) * (1 - fy));
      weight[width + j] = A(fx * (1 - fy));
      weight[2 * width + j] = A((1 - fx) * fy);
      weight[3 * width + j] = A(fx * fy);
    }
  }
}

// Zeros that start at a cache line, for whole-line reads and writes.
template <typename A> struct aligned {
  scratch<char> bytes;
  A *data;
  explicit aligned(int64_t count) : bytes(count * int64_t(sizeof(A)) + 64) {
    data = reinterpret_cast<A *>((reinterpret_cast<uintptr_t>(bytes.data) + 63) / 64 * 64);
  }
  A &operator[](int64_t i) { return data[i]; }
};

// Buffers of one thread.
template <typename A> struct workspace {
  aligned<A> plane;  // (height + 2) x (width + 2) x lanes; the border stays zero between uses
  aligned<A> line;   // two of width x lanes
  int64_t plane_bytes;
  workspace(int64_t height, int64_t width, int64_t count)
      : plane((height + 2) * (width + 2) * count), line(2 * width * count),
        plane_bytes((height + 2) * (width + 2) * count * int64_t(sizeof(A))) {}
  void clear_plane() { memset(&plane[0], 0, size_t(plane_bytes)); }
};

// The planes of one group; lanes beyond `count` repeat the last plane and write to a spare row.
template <int64_t L, typename T> struct group {
  const T *from[L];
  T *to[L];
  int64_t count;
  T *spare;
  void inputs_at(int64_t offset, const T **rows) const {
    for (int64_t l = 0; l < L; ++l) rows[l] = from[l] + offset;
  }
  void outputs_at(int64_t offset, T **rows) const {
    for (int64_t l = 0; l < L; ++l) rows[l] = l < count ? to[l] + offset : spare;
  }
};

template <int64_t L, typename T, typename A>
void resample(const group<L, T> &planes, footprint<A> &reads, workspace<A> &work, int64_t height, int64_t width) {
  const int64_t below = (width + 2) * L;
  const T *inputs[L];
  T *outputs[L];
  for (int64_t i = 0; i < height; ++i) {
    planes.inputs_at(i * width, inputs);
    interleave<L>(inputs, width, &work.plane[((i + 1) * (width + 2) + 1) * L]);
  }
  for (int64_t i = 0; i < height; ++i) {
    const int32_t *corner = &reads.corner[i * width];
    const A *weight = &reads.weight[4 * i * width];
    A *line = &work.line[0];
    const A *plane = &work.plane[0];
    for (int64_t j = 0; j < width; ++j)
      mix<L>(weight + j, width, plane + int64_t(corner[j]) * L, below, line + j * L);
    planes.outputs_at(i * width, outputs);
    separate<L>(line, width, outputs);
  }
}

template <int64_t L, typename T, typename A>
void resample_adjoint(const group<L, T> &planes, footprint<A> &reads, workspace<A> &work, int64_t height, int64_t width) {
  const int64_t below = (width + 2) * L;
  const T *inputs[L];
  T *outputs[L];
  work.clear_plane();
  A *const plane = &work.plane[0];
  planes.inputs_at(0, inputs);
  interleave<L>(inputs, width, &work.line[0]);
  for (int64_t i = 0; i < height; ++i) {
    // One row ahead: a wide load right after the narrow stores it covers would wait for them.
    if (i + 1 < height) {
      planes.inputs_at((i + 1) * width, inputs);
      interleave<L>(inputs, width, &work.line[(i + 1) % 2 * width * L]);
    }
    const A *line = &work.line[i % 2 * width * L];
    const int32_t *corner = &reads.corner[i * width];
    const A *weight = &reads.weight[4 * i * width];
    const auto add = [&](int64_t j) { spread<L>(weight + j, width, line + j * L, below, plane + int64_t(corner[j]) * L); };
    // Neighbours add to the same places; two places far apart need not wait for each other.
    const int64_t half = width / 2;
    for (int64_t j = 0; j < half; ++j) add(j), add(j + half);
    if (width % 2) add(width - 1);
  }
  for (int64_t i = 0; i < height; ++i) {
    planes.outputs_at(i * width, outputs);
    separate<L>(plane + ((i + 1) * (width + 2) + 1) * L, width, outputs);
  }
}

}  // namespace
}  // namespace DDFAST_LEVEL
}  // namespace ddfast
