// Vectors as wide as the level's registers, on GCC's and clang's vector extensions: arithmetic,
// comparison and `mask ? a : b` come with them.
#pragma once

#include "common.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int64_t vector_bytes = 64;
#elif defined(__AVX__)
constexpr int64_t vector_bytes = 32;
#else
constexpr int64_t vector_bytes = 16;
#endif

template <typename T> struct vectors;
template <> struct vectors<float> {
  typedef float value __attribute__((vector_size(vector_bytes)));
  typedef int32_t mask __attribute__((vector_size(vector_bytes)));
};
template <> struct vectors<double> {
  typedef double value __attribute__((vector_size(vector_bytes)));
  typedef int64_t mask __attribute__((vector_size(vector_bytes)));
};
template <typename T> using vector = typename vectors<T>::value;
template <typename T> using vector_mask = typename vectors<T>::mask;
template <typename T> constexpr int64_t width_of = vector_bytes / int64_t(sizeof(T));

#define DDFAST_INLINE inline __attribute__((always_inline))

template <typename T> DDFAST_INLINE vector<T> read(const T *source) {
  vector<T> value;
  memcpy(&value, source, sizeof value);
  return value;
}
template <typename T> DDFAST_INLINE void write(T *target, vector<T> value) { memcpy(target, &value, sizeof value); }
// The same past the caches, where a vector is a whole line: for large results, whose lines would
// otherwise be read before they are overwritten. `target` must be aligned; end with `drain`.
#if defined(__AVX512F__)
constexpr bool can_bypass = true;
DDFAST_INLINE void write_through(float *target, vector<float> value) { _mm512_stream_ps(target, value); }
DDFAST_INLINE void write_through(double *target, vector<double> value) { _mm512_stream_pd(target, value); }
DDFAST_INLINE void drain() { _mm_sfence(); }
#else
constexpr bool can_bypass = false;
template <typename T> DDFAST_INLINE void write_through(T *target, vector<T> value) { write(target, value); }
DDFAST_INLINE void drain() {}
#endif
template <typename T> DDFAST_INLINE vector<T> broadcast(T value) { return value - vector<T>{}; }

// e^x to a few units in the last place; beyond +-87 (float) or +-700 it stays at the end's value,
// which is finite.
DDFAST_INLINE vector<float> exponential(vector<float> x) {
  const vector<float> low = broadcast(-87.3f), high = broadcast(88.3f);
  x = x > high ? high : x;
  x = x < low ? low : x;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the lowest bits.
  const vector<float> magic = broadcast(12582912.0f), shifted = x * 1.44269504f + magic, n = shifted - magic;
  const vector<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  vector<float> p = broadcast(1.0f / 5040) * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = (p * r) * r + r + 1.0f;
  const vector_mask<float> exponent = (vector_mask<float>(shifted) - vector_mask<float>(magic) + 127) << 23;
  return p * vector<float>(exponent);
}
DDFAST_INLINE vector<double> exponential(vector<double> x) {
  const vector<double> low = broadcast(-700.0), high = broadcast(700.0);
  x = x > high ? high : x;
  x = x < low ? low : x;
  for (int64_t k = 0; k < width_of<double>; ++k) x[k] = exp(x[k]);
  return x;
}

// Beyond this sine_cosine(float) is wrong; its quarter turns must be whole numbers below 2^16.
constexpr float most_quick_angle = 1e5f;

// sin x and cos x for |x| up to most_quick_angle, with an error of at most 2^-23 and at most
// 3 * 2^-24 of the value, plus 1e-11.
DDFAST_INLINE void sine_cosine(vector<float> x, vector<float> *sine, vector<float> *cosine) {
  const vector<float> magic = broadcast(12582912.0f), shifted = x * 0.636619772f + magic, n = shifted - magic;
  // pi/2 in four parts. The first three have 8 bits, so that n times each is exact without FMA too.
  const vector<float> r = (((x - n * 1.5703125f) - n * 4.825592041e-4f) - n * 1.266598701e-6f) - n * 9.920935798e-10f;
  const vector<float> z = r * r;
  const vector<float> s = r + (r * z) * ((broadcast(-1.9510838e-4f) * z + 8.332131e-3f) * z - 0.16666654f);
  const vector<float> c =
      (z * z) * ((broadcast(2.4431203e-5f) * z - 1.3887306e-3f) * z + 0.041666646f) + (1.0f - 0.5f * z);
  const vector_mask<float> turns = vector_mask<float>(shifted), odd = -(turns & 1);
  // Signs: sine is negative in quarters 2 and 3, cosine in 1 and 2.
  const vector_mask<float> sign_s = (turns & 2) << 30, sign_c = ((turns + 1) & 2) << 30;
  const vector_mask<float> bits_s = vector_mask<float>(s), bits_c = vector_mask<float>(c);
  *sine = vector<float>(((bits_s & ~odd) | (bits_c & odd)) ^ sign_s);
  *cosine = vector<float>(((bits_c & ~odd) | (bits_s & odd)) ^ sign_c);
}
DDFAST_INLINE void sine_cosine(vector<double> x, vector<double> *sine, vector<double> *cosine) {
  vector<double> s = {}, c = {};
  for (int64_t k = 0; k < width_of<double>; ++k) s[k] = sin(x[k]), c[k] = cos(x[k]);
  *sine = s;
  *cosine = c;
}

// ln x of normal numbers, to two units in the last place near 1 too.
DDFAST_INLINE vector<float> logarithm(vector<float> x) {
  const vector_mask<float> bits = vector_mask<float>(x), exponent = (bits - 0x3f3504f3) >> 23;
  const vector<float> f = vector<float>(bits - (exponent << 23)) - 1.0f;  // x in sqrt(1/2) .. sqrt(2), less 1
  vector<float> p = broadcast(-0.07859583f) * f + 0.12881632f;
  p = p * f - 0.13128757f;
  p = p * f + 0.14181194f;
  p = p * f - 0.16624554f;
  p = p * f + 0.20002286f;
  p = p * f - 0.2500081f;
  p = p * f + 0.33333316f;
  const vector<float> e = __builtin_convertvector(exponent, vector<float>), square = f * f;
  // ln 2 in two parts, of which the first has 15 bits.
  return e * 0.693145751953f + (f + (square * (f * p - 0.5f) + e * 1.42860682e-6f));
}

// a > b ? a : b, so b where either is NaN. One instruction, which GCC 12 does not find by itself.
template <typename V> DDFAST_INLINE V larger(V a, V b) { return a > b ? a : b; }
#if defined(__AVX512F__)
template <> DDFAST_INLINE vector<float> larger(vector<float> a, vector<float> b) {
  return _mm512_maskz_max_ps(__mmask16(-1), a, b);
}
template <> DDFAST_INLINE vector<double> larger(vector<double> a, vector<double> b) {
  return _mm512_maskz_max_pd(__mmask8(-1), a, b);
}
#endif

DDFAST_INLINE float root(float x) { return sqrtf(x); }
DDFAST_INLINE double root(double x) { return sqrt(x); }

// (sum, low) += value, where low collects what rounding takes from sum.
template <typename T> DDFAST_INLINE void add_exactly(T *sum, T *low, vector<T> value) {
  const vector<T> before = read(sum), after = before + value, added = after - before;
  write(sum, after);
  write(low, read(low) + ((before - (after - added)) + (value - added)));
}

// Asks for memory that is read from one end to the other, some lines before it is read.
constexpr int64_t line_bytes = 64;
struct stream {
  const char *line, *limit;
  DDFAST_INLINE void fetch(int64_t lines) {
    const int64_t left = (limit - line) / line_bytes;
    for (lines = left < lines ? left : lines; lines > 0; --lines, line += line_bytes) __builtin_prefetch(line, 0, 2);
  }
};

// --- transposition ---

#ifdef __clang__
#define DDFAST_SHUFFLE(T, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DDFAST_SHUFFLE(T, a, b, ...) __builtin_shuffle(a, b, vector_mask<T>{__VA_ARGS__})
#endif

// The first (last) halves of a and b, alternating.
#if defined(__AVX512F__)
DDFAST_INLINE vector<float> first_halves(vector<float> a, vector<float> b) {
  return DDFAST_SHUFFLE(float, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
DDFAST_INLINE vector<float> last_halves(vector<float> a, vector<float> b) {
  return DDFAST_SHUFFLE(float, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
DDFAST_INLINE vector<double> first_halves(vector<double> a, vector<double> b) {
  return DDFAST_SHUFFLE(double, a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
DDFAST_INLINE vector<double> last_halves(vector<double> a, vector<double> b) {
  return DDFAST_SHUFFLE(double, a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
#elif defined(__AVX__)
DDFAST_INLINE vector<float> first_halves(vector<float> a, vector<float> b) {
  return DDFAST_SHUFFLE(float, a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
DDFAST_INLINE vector<float> last_halves(vector<float> a, vector<float> b) {
  return DDFAST_SHUFFLE(float, a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
DDFAST_INLINE vector<double> first_halves(vector<double> a, vector<double> b) {
  return DDFAST_SHUFFLE(double, a, b, 0, 4, 1, 5);
}
DDFAST_INLINE vector<double> last_halves(vector<double> a, vector<double> b) {
  return DDFAST_SHUFFLE(double, a, b, 2, 6, 3, 7);
}
#else
DDFAST_INLINE vector<float> first_halves(vector<float> a, vector<float> b) {
  return DDFAST_SHUFFLE(float, a, b, 0, 4, 1, 5);
}
DDFAST_INLINE vector<float> last_halves(vector<float> a, vector<float> b) {
  return DDFAST_SHUFFLE(float, a, b, 2, 6, 3, 7);
}
DDFAST_INLINE vector<double> first_halves(vector<double> a, vector<double> b) {
  return DDFAST_SHUFFLE(double, a, b, 0, 2);
}
DDFAST_INLINE vector<double> last_halves(vector<double> a, vector<double> b) {
  return DDFAST_SHUFFLE(double, a, b, 1, 3);
}
#endif

// A square of width_of<T> rows, transposed in registers.
template <typename T>
DDFAST_INLINE void transpose_square(const T *source, int64_t source_row, T *target, int64_t target_row) {
  constexpr int64_t n = width_of<T>;
  vector<T> a[n], b[n];
#pragma GCC unroll 16
  for (int64_t i = 0; i < n; ++i) a[i] = read(source + i * source_row);
#pragma GCC unroll 4
  for (int64_t round = 1; round < n; round *= 2) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < n / 2; ++i) {
      b[2 * i] = first_halves(a[i], a[i + n / 2]);
      b[2 * i + 1] = last_halves(a[i], a[i + n / 2]);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < n; ++i) a[i] = b[i];
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < n; ++i) write(target + i * target_row, a[i]);
}

// target[c][r] = source[r][c].
template <typename T>
void transpose(const T *source, int64_t source_row, int64_t rows, int64_t columns, T *target, int64_t target_row) {
  constexpr int64_t n = width_of<T>;
  const int64_t whole_rows = rows / n * n, whole_columns = columns / n * n;
  for (int64_t r = 0; r < whole_rows; r += n)
    for (int64_t c = 0; c < whole_columns; c += n)
      transpose_square(source + r * source_row + c, source_row, target + c * target_row + r, target_row);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
      target[c * target_row + r] = source[r * source_row + c];
}

}  // namespace
}  // namespace DDFAST_LEVEL
}  // namespace ddfast
