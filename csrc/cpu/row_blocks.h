// Blocks of rows, packed for products of all rows of one block with all rows of another.
#pragma once

#include "common.h"
#include "kernels.h"

namespace ddfast {
namespace DDFAST_LEVEL {

constexpr int64_t block_rows = 256;  // rows of a block; a tile of pairs and its rows fit the second cache
constexpr int64_t product_depth = 128;  // of one product: times a panel's width, it fits the first cache

// How wide the panels of the matrix products are, and the vectors in them.
struct row_panels {
  int64_t panel, vector;
  int64_t count(int64_t width) const { return (width + panel - 1) / panel; }
  // Columns of a panel with the padding of its last vector.
  int64_t columns(int64_t width, int64_t index) const {
    const int64_t left = width - index * panel;
    return left >= panel ? panel : (left + vector - 1) / vector * vector;
  }
};

// A block of rows, less a centre. In `rows` [panel of columns][row][column], block_rows rows
// apart; in `transposed` [panel of rows][column][row]. Paddings are zero.
template <typename T> struct row_block {
  T *rows, *transposed, *norms;
  int64_t count;
};

// Rows first to first + block.count of class c. centre may be null, as may block.transposed. `line` has
// room for a padded row.
template <typename T>
void pack_rows(const class_rows &set, int64_t c, int64_t first, int64_t width, const T *centre,
              const row_panels &panels, T *line, const row_block<T> &block);

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
