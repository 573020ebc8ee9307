// Micro-kernels of matrix multiplication, with the tile in registers, for any vector width.
//
// times:       C[r][:] += sum over k of A[r][k] B[k][:]        rows of A and C anywhere in memory
// transposed:  C[r][:] += sum over n of A[n][r] B[n][:]        rows n of A and B anywhere in memory
//
// A tile is `rows` by `vectors` vectors of columns. Its sum starts at zero and is added to C at the
// end, so that a long sum is made of shorter ones: less rounding, and an order that is fixed by the
// lengths of the calls. Panels of B are packed vectors * lanes columns wide.
#pragma once

#include "common.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64, most_vectors = 4;
constexpr int most_rows[most_vectors + 1] = {0, 8, 8, 8, 6};
#elif defined(__AVX2__)
constexpr int vector_bytes = 32, most_vectors = 2;
constexpr int most_rows[most_vectors + 1] = {0, 8, 6};
#else
constexpr int vector_bytes = 16, most_vectors = 2;
constexpr int most_rows[most_vectors + 1] = {0, 8, 6};
#endif

template <typename T> struct simd;
template <> struct simd<float> {
  typedef float vector __attribute__((vector_size(vector_bytes)));
};
template <> struct simd<double> {
  typedef double vector __attribute__((vector_size(vector_bytes)));
};
template <typename T> using vec = typename simd<T>::vector;
template <typename T> constexpr int64_t width = vector_bytes / int64_t(sizeof(T));
template <typename T> constexpr int64_t panel_width = most_vectors *width<T>;
template <typename T> constexpr int64_t line = 64 / int64_t(sizeof(T));  // of a cache

template <typename T> inline vec<T> read(const T *from) {
  vec<T> v;
  memcpy(&v, from, sizeof v);
  return v;
}
template <typename T> inline void write(T *to, vec<T> v) { memcpy(to, &v, sizeof v); }
// The first `count` elements, zeros behind them.
template <typename T> inline vec<T> read_some(const T *from, int64_t count) {
  if (count >= width<T>) return read(from);
  T padded[width<T>] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
  return read(padded);
}
template <typename T> inline void write_some(T *to, vec<T> v, int64_t count) {
  if (count >= width<T>) return write(to, v);
  T all[width<T>];
  write(all, v);
  for (int64_t i = 0; i < count; ++i) to[i] = all[i];
}

// One tile of `times`. A's rows are made of `pieces` runs of `depth` elements that lie `step` apart.
template <typename T> struct times_arguments {
  const T *a[8];
  T *c[8];
  const T *b;
  int64_t pieces, step, depth;
  bool add;         // false: C is written, not read
  const T *ahead;   // a line of this is fetched per step of depth; b where there is nothing to fetch
};

template <typename T, int rows, int vectors> void times(const times_arguments<T> &x) {
  typedef vec<T> v;
  v sum[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) sum[r][j] = v{};
  const T *a[rows];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) a[r] = x.a[r];
  const T *b = x.b, *ahead = x.ahead;
  for (int64_t piece = 0;;) {
    for (int64_t k = 0; k < x.depth; ++k) {
      v columns[vectors];
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) columns[j] = read(b + j * width<T>);
      b += vectors * width<T>;
      __builtin_prefetch(ahead, 0, 2);
      ahead += line<T>;
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const T scalar = a[r][k];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j) sum[r][j] += columns[j] * scalar;
      }
    }
    if (++piece >= x.pieces) break;
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) a[r] += x.step;
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    T *c = x.c[r];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      const v before = x.add ? read(c + j * width<T>) : v{};
      write(c + j * width<T>, before + sum[r][j]);
    }
  }
}

// One tile of `transposed` over n = 0 .. count - 1; row n of A starts at a + a_at[n] * a_step, of B
// at b + b_at[n] * b_step.
template <typename T> struct transposed_arguments {
  const T *a, *b;
  const int32_t *a_at, *b_at;
  int64_t a_step, b_step, count;
  T *c;
  int64_t c_step;
  bool add;  // false: C is written, not read
  const T *ahead;      // a line of this is fetched per n, ahead_step elements apart
  int64_t ahead_step;  // 0: nothing to fetch
};

template <typename T, int rows, int vectors> void transposed(const transposed_arguments<T> &x) {
  typedef vec<T> v;
  v sum[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) sum[r][j] = v{};
  if (x.add)  // the rows of C are needed when the sum is done
    for (int r = 0; r < rows; ++r)
      for (int64_t j = 0; j < vectors * width<T>; j += line<T>) __builtin_prefetch(x.c + r * x.c_step + j, 1, 3);
  const T *ahead = x.ahead;
  for (int64_t n = 0; n < x.count; ++n) {
    __builtin_prefetch(ahead, 0, 2);
    ahead += x.ahead_step;
    const T *a = x.a + x.a_at[n] * x.a_step, *b = x.b + x.b_at[n] * x.b_step;
    v columns[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) columns[j] = read(b + j * width<T>);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sum[r][j] += columns[j] * a[r];
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      T *c = x.c + r * x.c_step + j * width<T>;
      const v before = x.add ? read(c) : v{};
      write(c, before + sum[r][j]);
    }
}

// Memory that later work will read or write, fetched into the second cache during this one's: so
// many lines from `next` on. The prefetches may run a little past the end, which harms nothing.
template <typename T> struct lines_ahead {
  const T *next;
  int64_t count;
  // Where the next `lines` lines begin, or `idle` when all have been fetched.
  const T *take(int64_t lines, const T *idle) {
    if (count <= 0) return idle;
    const T *now = next;
    next += lines * line<T>;
    count -= lines;
    return now;
  }
};

// The tile of each size, found by its number of rows and vectors.
template <typename T, int vectors, int rows> struct choose {
  static void run(int64_t count, const times_arguments<T> &x) {
    count == rows ? times<T, rows, vectors>(x) : choose<T, vectors, rows - 1>::run(count, x);
  }
  static void run(int64_t count, const transposed_arguments<T> &x) {
    count == rows ? transposed<T, rows, vectors>(x) : choose<T, vectors, rows - 1>::run(count, x);
  }
};
template <typename T, int vectors> struct choose<T, vectors, 0> {
  template <typename X> static void run(int64_t, const X &) {}
};

template <typename T, typename X> inline void tile(int64_t vectors, int64_t rows, const X &x) {
  if (vectors == 1) return choose<T, 1, most_rows[1]>::run(rows, x);
  if (vectors == 2) return choose<T, 2, most_rows[2]>::run(rows, x);
#if defined(__AVX512F__)
  if (vectors == 3) return choose<T, 3, most_rows[3]>::run(rows, x);
  if (vectors == 4) return choose<T, 4, most_rows[4]>::run(rows, x);
#endif
}

// Columns of a matrix cut into panels of panel_width; the last one has fewer vectors.
template <typename T> inline int64_t panels(int64_t columns) {
  return (columns + panel_width<T> - 1) / panel_width<T>;
}
template <typename T> inline int64_t vectors_of(int64_t columns, int64_t panel) {
  const int64_t left = columns - panel * panel_width<T>;
  return left >= panel_width<T> ? most_vectors : (left + width<T> - 1) / width<T>;
}
// Columns with the padding of the last vector.
template <typename T> inline int64_t padded(int64_t columns) {
  return (columns + width<T> - 1) / width<T> * width<T>;
}

// Rows in one call: as many as fit, but not so many that a tile of one or two is left over.
inline int64_t next_rows(int64_t left, int64_t most) {
  if (left <= most) return left;
  return left < 2 * most ? (left + 1) / 2 : most;
}

}  // namespace
}  // namespace DDFAST_LEVEL
}  // namespace ddfast
