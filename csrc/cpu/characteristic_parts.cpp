// What `characteristic_function` does outside its matrix products: reads or draws rows, and turns
// blocks of products <x, t> into sums of waves or into the weights of the backward.
#include "characteristic_function.h"
#include "vector.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

constexpr int64_t group = 64, blocks = 16;  // features of a row of counters; ddfast/reference/frequencies.py
constexpr int64_t run_rows = 16;            // rows that are summed in the type of the products

// One round of Philox 4x32 on 16 counters.
inline void philox_round(uint32_t *__restrict__ a, uint32_t *__restrict__ b, uint32_t *__restrict__ c,
                         uint32_t *__restrict__ d, uint32_t low_key, uint32_t high_key) {
  for (int64_t i = 0; i < blocks; ++i) {
    const uint64_t by_a = uint64_t(a[i]) * 0xD2511F53u, by_c = uint64_t(c[i]) * 0xCD9E8D57u;
    a[i] = uint32_t(by_c >> 32) ^ b[i] ^ low_key;
    b[i] = uint32_t(by_c);
    c[i] = uint32_t(by_a >> 32) ^ d[i] ^ high_key;
    d[i] = uint32_t(by_a);
  }
}

inline void random_words(const row_source &x, int64_t row, int64_t first_block, uint32_t (*words)[blocks]) {
  for (int64_t i = 0; i < blocks; ++i) {
    words[0][i] = uint32_t(first_block + i);
    words[1][i] = uint32_t(row);
    words[2][i] = x.stream;
    words[3][i] = 0;
  }
  uint32_t low = uint32_t(x.seed), high = uint32_t(x.seed >> 32);
  for (int step = 0; step < 10; ++step) {
    philox_round(words[0], words[1], words[2], words[3], low, high);
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
}

// Two normal values from the words of a pair, as in the reference.
inline void normal_pair(const uint32_t *__restrict__ first, const uint32_t *__restrict__ second, float scale,
                        float *__restrict__ to_first, float *__restrict__ to_second) {
  float radius[blocks];
  for (int64_t i = 0; i < blocks; i += width_of<float>) {
    vector_mask<float> bits;
    memcpy(&bits, first + i, sizeof bits);
    const vector<float> u = __builtin_convertvector((bits >> 9) & 0x7fffff, vector<float>) + 0.5f;
    write(radius + i, -2.0f * logarithm(u * (1.0f / 8388608)));
  }
  for (int64_t i = 0; i < blocks; ++i) radius[i] = scale * sqrtf(radius[i]);
  for (int64_t i = 0; i < blocks; i += width_of<float>) {
    vector_mask<float> bits;
    memcpy(&bits, second + i, sizeof bits);
    const vector<float> v = __builtin_convertvector((bits >> 9) & 0x7fffff, vector<float>) + 0.5f;
    // Quarter turns and what is left of one, both exact; the angle left is below pi/4.
    const vector<float> quarters = v * (4.0f / 8388608), magic = broadcast(12582912.0f);
    const vector<float> shifted = quarters + magic, left = (quarters - (shifted - magic)) * 1.57079633f;
    vector<float> s, c;
    sine_cosine(left, &s, &c);
    const vector_mask<float> turns = vector_mask<float>(shifted), odd = -(turns & 1);
    const vector_mask<float> sign_s = (turns & 2) << 30, sign_c = ((turns + 1) & 2) << 30;
    const vector_mask<float> bits_s = vector_mask<float>(s), bits_c = vector_mask<float>(c);
    const vector<float> r = read(radius + i);
    write(to_first + i, r * vector<float>(((bits_c & ~odd) | (bits_s & odd)) ^ sign_c));
    write(to_second + i, r * vector<float>(((bits_s & ~odd) | (bits_c & odd)) ^ sign_s));
  }
}
inline void normal_pair(const uint32_t *first, const uint32_t *second, double scale, double *to_first,
                        double *to_second) {
  for (int64_t i = 0; i < blocks; ++i) {
    const double u = (double(first[i] >> 9) + 0.5) / 8388608, v = (double(second[i] >> 9) + 0.5) / 8388608;
    const double radius = scale * sqrt(-2 * log(u)), angle = 6.283185307179586 * v;
    to_first[i] = radius * cos(angle);
    to_second[i] = radius * sin(angle);
  }
}

template <typename T>
void draw(const row_source &x, int64_t row, int64_t rows, int64_t column, int64_t columns, T *to, int64_t step) {
  for (int64_t r = 0; r < rows; ++r, to += step)
    for (int64_t j = 0; j < columns; j += group) {
      uint32_t words[4][blocks];
      random_words(x, x.first_row + row + r, (column + j) / group * blocks, words);
      T values[group];
      T *target = columns - j < group ? values : to + j;
      normal_pair(words[0], words[1], T(x.scale), target, target + blocks);
      normal_pair(words[2], words[3], T(x.scale), target + 2 * blocks, target + 3 * blocks);
      if (target == values) memcpy(to + j, values, size_t(columns - j) * sizeof(T));
    }
}

template <typename T, typename S>
void convert(const row_source &x, int64_t row, int64_t rows, int64_t column, int64_t columns, T *to, int64_t step) {
  const S *from = static_cast<const S *>(x.data) + row * x.step + column;
  for (int64_t r = 0; r < rows; ++r, from += x.step, to += step)
    for (int64_t c = 0; c < columns; ++c) to[c] = T(load(from[c]));
}

template <typename T>
void fetch_any(const row_source &x, int64_t row, int64_t rows, int64_t column, int64_t columns, T *to, int64_t step) {
  if (!x.data) return draw(x, row, rows, column, columns, to, step);
  switch (x.type) {
  case float32: return convert<T, float>(x, row, rows, column, columns, to, step);
  case float64: return convert<T, double>(x, row, rows, column, columns, to, step);
  case bfloat16_type: return convert<T, bfloat16>(x, row, rows, column, columns, to, step);
  default: return convert<T, float16>(x, row, rows, column, columns, to, step);
  }
}

// Whether sine_cosine is good for all of up to run_rows vectors. Any double is.
inline bool all_quick(const float *phase, int64_t step, int64_t rows) {
  vector_mask<float> good = ~vector_mask<float>{};
  for (int64_t r = 0; r < rows; ++r) {
    const vector<float> x = read(phase + r * step);
    good &= (x <= broadcast(most_quick_angle)) & (x >= broadcast(-most_quick_angle));
  }
  int32_t all = -1;
  for (int64_t k = 0; k < width_of<float>; ++k) all &= good[k];
  return all != 0;
}
inline bool all_quick(const double *, int64_t, int64_t) { return true; }

// Any angle: the C library's functions in double, which know how to reduce it.
template <typename T> void sine_cosine_of_any(vector<T> x, vector<T> *sine, vector<T> *cosine) {
  vector<T> s = {}, c = {};
  for (int64_t k = 0; k < width_of<T>; ++k) {
    s[k] = T(sin(double(x[k])));
    c[k] = T(cos(double(x[k])));
  }
  *sine = s;
  *cosine = c;
}

// Calls visit(row, sine, cosine) for every row of a column of vectors.
template <typename T, typename F> DDFAST_INLINE void waves(const T *phase, int64_t step, int64_t rows, F &&visit) {
  vector<T> s = {}, c = {};
  if (all_quick(phase, step, rows))
    for (int64_t r = 0; r < rows; ++r) {
      sine_cosine(read(phase + r * step), &s, &c);
      visit(r, s, c);
    }
  else
    for (int64_t r = 0; r < rows; ++r) {
      sine_cosine_of_any<T>(read(phase + r * step), &s, &c);
      visit(r, s, c);
    }
}

template <typename T>
void add_waves_any(const T *phase, int64_t step, int64_t rows, int64_t columns, double *cosines, double *sines) {
  constexpr int64_t n = width_of<T>;
  for (int64_t r = 0; r < rows; r += run_rows) {
    const int64_t count = rows - r < run_rows ? rows - r : run_rows;
    for (int64_t j = 0; j < columns; j += n) {
      vector<T> sum_s = {}, sum_c = {};
      waves<T>(phase + r * step + j, step, count, [&](int64_t, vector<T> s, vector<T> c) {
        sum_s += s;
        sum_c += c;
      });
      for (int64_t k = 0; k < n; ++k) {
        cosines[j + k] += double(sum_c[k]);
        sines[j + k] += double(sum_s[k]);
      }
    }
  }
}

template <typename T>
void weigh_any(const T *phase, int64_t step, int64_t rows, int64_t columns, const T *real, const T *imaginary, T *to,
               int64_t to_step) {
  for (int64_t r = 0; r < rows; r += run_rows) {
    const int64_t count = rows - r < run_rows ? rows - r : run_rows;
    for (int64_t j = 0; j < columns; j += width_of<T>) {
      const vector<T> re = read(real + j), im = read(imaginary + j);
      waves<T>(phase + r * step + j, step, count, [&](int64_t i, vector<T> s, vector<T> c) {
        write(to + (r + i) * to_step + j, im * c - re * s);
      });
    }
  }
}

}  // namespace

#define DDFAST_PARTS(T)                                                                                               \
  void fetch(const row_source &x, int64_t row, int64_t rows, int64_t column, int64_t columns, T *to, int64_t step) {  \
    fetch_any(x, row, rows, column, columns, to, step);                                                               \
  }                                                                                                                   \
  void turn(const T *from, int64_t from_step, int64_t rows, int64_t columns, T *to, int64_t to_step) {                \
    transpose(from, from_step, rows, columns, to, to_step);                                                           \
  }                                                                                                                   \
  void add_waves(const T *phase, int64_t step, int64_t rows, int64_t columns, double *cosines, double *sines) {       \
    add_waves_any(phase, step, rows, columns, cosines, sines);                                                        \
  }                                                                                                                   \
  void weigh(const T *phase, int64_t step, int64_t rows, int64_t columns, const T *real, const T *imaginary, T *to,   \
             int64_t to_step) {                                                                                       \
    weigh_any(phase, step, rows, columns, real, imaginary, to, to_step);                                              \
  }
DDFAST_PARTS(float)
DDFAST_PARTS(double)
#undef DDFAST_PARTS

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
