// Rows are read, centred, and laid out for the matrix products.
#include "mmd.h"
#include "vector.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

template <typename S> const S *row_of(const class_rows &set, int64_t c, int64_t row) {
  return static_cast<const S *>(set.data) + c * set.class_stride + row * set.row_stride;
}

template <typename S, typename T> void read_row(const S *__restrict__ from, int64_t count, T *__restrict__ to) {
  for (int64_t k = 0; k < count; ++k) to[k] = T(load(from[k]));
}

template <typename T>
void load_row(const class_rows &set, int64_t c, int64_t row, int64_t first, int64_t count, T *to) {
  switch (set.type) {
  case float32: return read_row(row_of<float>(set, c, row) + first, count, to);
  case float64: return read_row(row_of<double>(set, c, row) + first, count, to);
  case bfloat16_type: return read_row(row_of<bfloat16>(set, c, row) + first, count, to);
  default: return read_row(row_of<float16>(set, c, row) + first, count, to);
  }
}

template <typename T> T norm_of(const T *row, int64_t width) {
  T partial[lanes] = {};
  int64_t k = 0;
  for (; k + lanes <= width; k += lanes)
    for (int64_t l = 0; l < lanes; ++l) partial[l] += row[k + l] * row[k + l];
  for (int64_t l = 0; k + l < width; ++l) partial[l] += row[k + l] * row[k + l];
  return fold(partial);
}

template <typename S>
void add_columns(const class_rows &set, int64_t c, int64_t first, int64_t count, const double *__restrict__ origin,
                 double *__restrict__ sum, double *__restrict__ square) {
  for (int64_t r = 0; r < set.rows; ++r) {
    const S *row = row_of<S>(set, c, r) + first;
    for (int64_t k = 0; k < count; ++k) {
      const double z = double(load(row[k])) - origin[k];
      sum[k] += z;
      square[k] += z * z;
    }
  }
}

}  // namespace

void mmd_load(const class_rows &set, int64_t c, int64_t row, int64_t first, int64_t count, double *out) {
  load_row(set, c, row, first, count, out);
}

void mmd_column_sums(const class_rows &set, int64_t c, int64_t first, int64_t count, const double *origin, double *sum,
                     double *square) {
  memset(sum, 0, size_t(count) * sizeof(double));
  memset(square, 0, size_t(count) * sizeof(double));
  switch (set.type) {
  case float32: return add_columns<float>(set, c, first, count, origin, sum, square);
  case float64: return add_columns<double>(set, c, first, count, origin, sum, square);
  case bfloat16_type: return add_columns<bfloat16>(set, c, first, count, origin, sum, square);
  default: return add_columns<float16>(set, c, first, count, origin, sum, square);
  }
}

template <typename T>
void pack_rows(const class_rows &set, int64_t c, int64_t first, int64_t width, const T *centre,
              const row_panels &panels, T *line, const row_block<T> &block) {
  const int64_t panel_count = panels.count(width);
  const int64_t padded = width == 0 ? 0 : (panel_count - 1) * panels.panel + panels.columns(width, panel_count - 1);
  for (int64_t k = width; k < padded; ++k) line[k] = 0;
  for (int64_t r = 0; r < block.count; ++r) {
    load_row(set, c, first + r, 0, width, line);
    if (centre)
      for (int64_t k = 0; k < width; ++k) line[k] -= centre[k];
    block.norms[r] = norm_of(line, width);
    for (int64_t p = 0; p < panel_count; ++p) {
      const int64_t columns = panels.columns(width, p);
      memcpy(block.rows + p * panels.panel * block_rows + r * columns, line + p * panels.panel,
             size_t(columns) * sizeof(T));
    }
  }
  for (int64_t r = block.count; r % panels.vector; ++r) block.norms[r] = 0;
  if (!block.transposed) return;
  for (int64_t q = 0; q < panels.count(block.count); ++q) {
    const int64_t columns = panels.columns(block.count, q), first_row = q * panels.panel;
    const int64_t rows = block.count - first_row < columns ? block.count - first_row : columns;
    T *to = block.transposed + first_row * width;
    for (int64_t p = 0; p < panel_count; ++p) {
      const int64_t step = panels.columns(width, p), k = p * panels.panel;
      transpose(block.rows + k * block_rows + first_row * step, step, rows, width - k < step ? width - k : step,
                to + k * columns, columns);
    }
    for (int64_t k = 0; rows < columns && k < width; ++k)
      for (int64_t r = rows; r < columns; ++r) to[k * columns + r] = 0;
  }
}

template void pack_rows<float>(const class_rows &, int64_t, int64_t, int64_t, const float *, const row_panels &, float *,
                              const row_block<float> &);
template void pack_rows<double>(const class_rows &, int64_t, int64_t, int64_t, const double *, const row_panels &,
                               double *, const row_block<double> &);

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
