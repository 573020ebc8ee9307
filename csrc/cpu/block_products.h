// Matrix products of packed blocks of rows: the inner products of all pairs, a tile, and sums of rows
// with a tile's factors.
#pragma once

#include "gemm.h"
#include "row_blocks.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

inline int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct arena {
  char *base;
  int64_t used = 0;
  template <typename T> T *take(int64_t count) {
    T *at = base ? reinterpret_cast<T *>(base + used) : nullptr;
    used += (count * int64_t(sizeof(T)) + 127) / 64 * 64;
    return at;
  }
};

// Between the rows of a tile, of which no two start in the same lines of a cache.
template <typename T> constexpr int64_t tile_step = block_rows + width<T>;

// out = left right': the inner products of all rows of one block with those of another.
template <typename T>
void block_products(const row_panels &panel, int64_t d, const row_block<T> &left, const row_block<T> &right, T *out) {
  constexpr int64_t at_once = product_depth / panel_width<T>;
  const int64_t whole = d / panel_width<T>;
  if (d == 0) memset(out, 0, size_t(block_rows * tile_step<T>) * sizeof(T));
  times_arguments<T> t;
  for (int64_t p = 0; p < panels<T>(d);) {
    const int64_t step = panel.columns(d, p), k = p * panel_width<T>;
    t.pieces = p < whole ? (whole - p < at_once ? whole - p : at_once) : 1;
    t.depth = p < whole ? panel_width<T> : d - k;
    t.step = panel_width<T> * block_rows;
    t.add = p > 0;
    for (int64_t q = 0; q < panels<T>(right.count); ++q) {
      const int64_t vectors = vectors_of<T>(right.count, q), columns = vectors * width<T>;
      t.b = right.transposed + q * panel_width<T> * d + k * columns;
      t.ahead = t.b;
      for (int64_t r = 0; r < left.count;) {
        const int64_t count = next_rows(left.count - r, most_rows[vectors]);
        for (int64_t i = 0; i < count; ++i) {
          t.a[i] = left.rows + k * block_rows + (r + i) * step;
          t.c[i] = out + (r + i) * tile_step<T> + q * panel_width<T>;
        }
        tile<T>(vectors, count, t);
        r += count;
      }
    }
    p += t.pieces;
  }
}

// Adds the columns of a panel that is narrower than its vectors.
template <typename T>
void add_edge(const T *edge, int64_t step, int64_t rows, int64_t columns, int64_t d, T *to) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < columns; ++k) to[r * d + k] += edge[r * step + k];
}

// gradient[i] += sum over j of factors[i][j] right[j]; `edge` has room for block_rows rows of a panel
template <typename T>
void add_rows(int64_t d, const T *factors, int64_t count, const row_block<T> &right, T *edge, T *gradient) {
  times_arguments<T> t;
  t.pieces = 1;
  t.step = 0;
  for (int64_t p = 0; p < panels<T>(d); ++p) {
    const int64_t vectors = vectors_of<T>(d, p), columns = vectors * width<T>, k = p * panel_width<T>;
    const bool in_place = k + columns <= d;
    T *to = in_place ? gradient + k : edge;
    const int64_t to_step = in_place ? d : columns;
    for (int64_t j = 0; j < right.count; j += product_depth) {
      t.depth = right.count - j < product_depth ? right.count - j : product_depth;
      t.add = in_place || j > 0;
      t.b = right.rows + k * block_rows + j * columns;
      t.ahead = t.b;
      for (int64_t r = 0; r < count;) {
        const int64_t some = next_rows(count - r, most_rows[vectors]);
        for (int64_t i = 0; i < some; ++i) {
          t.a[i] = factors + (r + i) * tile_step<T> + j;
          t.c[i] = to + (r + i) * to_step;
        }
        tile<T>(vectors, some, t);
        r += some;
      }
    }
    if (!in_place) add_edge(edge, columns, count, d - k, d, gradient + k);
  }
}

// gradient[j] += sum over i of factors[i][j] left[i]; identity[i] = i
template <typename T>
void add_columns(int64_t d, const int32_t *identity, const T *factors, const row_block<T> &left, int64_t count, T *edge,
                 T *gradient) {
  transposed_arguments<T> t;
  t.a_at = t.b_at = identity;
  t.a_step = tile_step<T>;
  t.ahead_step = 0;
  for (int64_t p = 0; p < panels<T>(d); ++p) {
    const int64_t vectors = vectors_of<T>(d, p), columns = vectors * width<T>, k = p * panel_width<T>;
    const bool in_place = k + columns <= d;
    T *to = in_place ? gradient + k : edge;
    t.b_step = columns;
    t.c_step = in_place ? d : columns;
    for (int64_t i = 0; i < left.count; i += product_depth) {
      t.count = left.count - i < product_depth ? left.count - i : product_depth;
      t.add = in_place || i > 0;
      t.b = left.rows + k * block_rows + i * columns;
      t.ahead = t.b;
      for (int64_t r = 0; r < count;) {
        const int64_t some = next_rows(count - r, most_rows[vectors]);
        t.a = factors + i * tile_step<T> + r;
        t.c = to + r * t.c_step;
        tile<T>(vectors, some, t);
        r += some;
      }
    }
    if (!in_place) add_edge(edge, columns, count, d - k, d, gradient + k);
  }
}

}  // namespace
}  // namespace DDFAST_LEVEL
}  // namespace ddfast
