// What the files of dense_kernel share: variances of the rows at every layer, and what is done to a
// tile of pairs.
#pragma once

#include "row_blocks.h"

namespace ddfast {
namespace DDFAST_LEVEL {

// Of the rows of one set at each layer, `step` elements from layer to layer; the paddings are zero.
template <typename T> struct dense_rows {
  T *q;        // K(x, x) before the ReLU; one layer more than there are ReLUs
  T *inverse;  // 1 / sqrt(q), 0 where q is next to nothing
  T *share;    // half^layer / (2 q), or 0: what the logarithm of p weighs in the gradient of q of layer 0
  int64_t step;
  dense_rows from(int64_t row) const { return {q + row, inverse + row, share + row, step}; }
};

template <typename T> struct dense_network {
  bool ntk;
  int64_t depth;
  T scale, half, bias;  // weight_var / d, weight_var / 2, bias_var
  const bool *exact;    // of each layer: no product of two q leaves the range of T
};

// q of layer 0 of a packed and transposed block, from sums in the order of the matrix product: so a
// pair of equal rows has the covariance of either with itself, to the last bit.
template <typename T>
void dense_variances(const dense_network<T> &, const row_panels &, int64_t width, const T *transposed, int64_t count,
                     T *q);
// All layers of rows 0 to count from q of layer 0; count may include paddings.
template <typename T> void dense_layers(const dense_network<T> &, const dense_rows<T> &, int64_t count);
// What is left of `exact` where these rows take part.
template <typename T>
void dense_ranges(const dense_network<T> &, const dense_rows<T> &, int64_t count, bool *exact);

// One tile of pairs; the pointers are those of its first row and column.
template <typename T> struct dense_tile {
  int64_t rows, columns;
  dense_rows<T> left, right;
  int64_t diagonal;  // first column - first row where a set meets itself, else beyond the tile
  int64_t step;      // between the rows of `gram` and of the next two
  T *gram;           // may be null in the forward pass
  T *out;            // forward
  const T *grad;     // backward
  const T *grad_transposed;  // tile_step apart, added to grad; may be null
  T *tile;           // rows tile_step apart: inner products, or to be filled with the gradient by K of layer 0
  int64_t tile_step;
  char *state;       // dense_state_bytes
};

template <typename T> int64_t dense_state_bytes(int64_t depth);

template <typename T> void dense_forward(const dense_network<T> &, const dense_tile<T> &);
// Adds to by_q, of each row or (by_rows false) of each column, what comes through its variances.
template <typename T>
void dense_backward(const dense_network<T> &, const dense_tile<T> &, bool by_rows, double *by_q);

// target[c][r] = source[r][c]
template <typename T>
void dense_transpose(const T *source, int64_t source_row, int64_t rows, int64_t columns, T *target, int64_t target_row);

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
