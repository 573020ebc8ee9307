// What the two files of `characteristic_function` share: matrices that are read, converted or
// drawn, and what is done with a block of products <x, t> while it is in the cache.
#pragma once

#include "common.h"
#include "kernels.h"

namespace ddfast {
namespace DDFAST_LEVEL {

// Rows of a matrix of any type, or rows of drawn frequencies.
struct row_source {
  const void *data;  // null: drawn
  int type;
  int64_t step;  // in elements, from row to row
  uint64_t seed;
  uint32_t stream;
  double scale;
  int64_t first_row;  // drawn: what row 0 is among all frequencies
};

// to[r][c] = row `row + r`, column `column + c`. The first column of drawn rows is a multiple of 64.
void fetch(const row_source &x, int64_t row, int64_t rows, int64_t column, int64_t columns, float *to, int64_t step);
void fetch(const row_source &x, int64_t row, int64_t rows, int64_t column, int64_t columns, double *to, int64_t step);

// to[c][r] = from[r][c].
void turn(const float *from, int64_t from_step, int64_t rows, int64_t columns, float *to, int64_t to_step);
void turn(const double *from, int64_t from_step, int64_t rows, int64_t columns, double *to, int64_t to_step);

// cosines[c] += sum over rows of cos(phase[r][c]), and the same for the sines.
void add_waves(const float *phase, int64_t step, int64_t rows, int64_t columns, double *cosines, double *sines);
void add_waves(const double *phase, int64_t step, int64_t rows, int64_t columns, double *cosines, double *sines);

// to[r][c] = imaginary[c] cos(phase[r][c]) - real[c] sin(phase[r][c]).
void weigh(const float *phase, int64_t step, int64_t rows, int64_t columns, const float *real, const float *imaginary,
           float *to, int64_t to_step);
void weigh(const double *phase, int64_t step, int64_t rows, int64_t columns, const double *real,
           const double *imaginary, double *to, int64_t to_step);

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
