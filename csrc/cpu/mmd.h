// What the files of mmd share: what is done to a tile of pairs.
#pragma once

#include "row_blocks.h"

namespace ddfast {
namespace DDFAST_LEVEL {

constexpr int64_t mmd_sum_columns = 256;  // columns that are added up at once

// Row `row` of class c in double; columns first to first + count.
void mmd_load(const class_rows &set, int64_t c, int64_t row, int64_t first, int64_t count, double *out);

// Sums over a class's rows of z - origin, and of its squares, for columns first to first + count.
void mmd_column_sums(const class_rows &set, int64_t c, int64_t first, int64_t count, const double *origin, double *sum,
                     double *square);

// The kernel function of one class. Bandwidths of zero are left out; see mmd_kernel_of.
template <typename T> struct mmd_kernel {
  int kind, degree;
  int64_t count;      // of bandwidths
  const T *rate;      // 1 / bandwidth, the smallest first
  bool doubling;      // every rate is twice the one before
  T exact_from;       // squared norms from which the distances of near pairs are taken from differences
};

// One tile: the inner products of the rows of one block with those of another.
template <typename T> struct mmd_tile {
  T *products;  // rows x step; becomes the factor of each column's row in the gradient of each row
  int64_t step;
  row_block<T> left, right;
  row_panels panels;
  int64_t width;
  bool self;            // the diagonal is left out
  T factor;             // of the gradient
  double *row_sums;     // of the factors, negative; null: only the sum of the kernel is wanted
  double *column_sums;  // the same of columns, where their gradient is wanted
  T *row_gradient, *column_gradient;  // rows of `width`: pairs that are close are added here
  T *line;                            // room for block_rows elements, three times
};

// Sum of the kernel over the tile.
template <typename T> double mmd_apply(const mmd_tile<T> &, const mmd_kernel<T> &);

// Replaces the products by squared distances; all near pairs are exact.
template <typename T> void mmd_distances(const mmd_tile<T> &);

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
