// Shared by every CPU kernel. Each kernel file is compiled once per instruction-set level, inside
// its own namespace, so nothing here may be an external inline symbol: the linker would keep one
// copy for all levels, perhaps the one that an older processor cannot run. Hence C headers only.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#ifndef DDFAST_LEVEL
#define DDFAST_LEVEL portable
#endif

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// What a sum over elements of a type is kept in.
template <typename T> struct accumulator {
  using type = float;
};
template <> struct accumulator<double> {
  using type = double;
};

inline float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline double load(double value) { return value; }
inline float load(float value) { return value; }
inline float load(bfloat16 value) { return float_from_bits(uint32_t(value.bits) << 16); }

// Exact for every half, subnormals, infinities and NaN included: the exponent is rebased by a
// multiplication, which also normalises subnormals.
inline float load(float16 value) {
  const uint32_t magnitude = uint32_t(value.bits & 0x7fffu) << 13;
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const float rebased = float_from_bits(magnitude) * float_from_bits(0x77800000u);  // 2^112
  const uint32_t finite = bits_from_float(rebased);
  const uint32_t special = magnitude | 0x7f800000u;
  return float_from_bits(sign | (magnitude >= 0x0f800000u ? special : finite));
}

inline void store(double *target, double value) { *target = value; }
inline void store(float *target, float value) { *target = value; }

// Round to nearest, ties to even; NaN stays NaN.
inline void store(bfloat16 *target, float value) {
  const uint32_t bits = bits_from_float(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  target->bits = uint16_t((is_nan ? (bits | 0x00400000u) : rounded) >> 16);
}

inline void store(float16 *target, float value) {
  const uint32_t bits = bits_from_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal halves: rebase the exponent and round the 13 dropped bits to even.
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal halves: adding 0.5 aligns the mantissa so that the addition itself rounds.
  const uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;                     // overflow: infinity
  half = magnitude > 0x7f800000u ? (0x7e00u | ((magnitude >> 13) & 0x3ffu)) : half;  // NaN
  target->bits = uint16_t(sign | half);
}

// Independent partial sums, wide enough to fill the vector registers of every level. A fixed
// number keeps the order of summation, and so the result, the same for any thread count.
constexpr int64_t lanes = 32;

template <typename A> inline A fold(A *partial) {
  for (int64_t width = lanes / 2; width > 0; width /= 2)
    for (int64_t k = 0; k < width; ++k) partial[k] += partial[k + width];
  return partial[0];
}

// A heap array that frees itself.
template <typename T> struct scratch {
  T *data;
  explicit scratch(int64_t count) : data(static_cast<T *>(calloc(count > 0 ? count : 1, sizeof(T)))) {
    if (!data) abort();  // a few kilobytes: without them nothing else would go on either
  }
  ~scratch() { free(data); }
  scratch(const scratch &) = delete;
  scratch &operator=(const scratch &) = delete;
  T &operator[](int64_t i) { return data[i]; }
};

}  // namespace
}  // namespace DDFAST_LEVEL
}  // namespace ddfast
