// Means of the rows of each class, and the squared distance between the means of two sets (DM's
// loss, Zhao and Bilen, WACV 2023).
//
// Bound by reading x once. Eight rows at a time are added up in a tree, block_rows of them make a
// block, and the blocks' sums are added pairwise: the error grows with the logarithm of the number
// of rows. Every column is summed in an order of its own, whatever the tiles and threads.
#include "common.h"
#include "kernels.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

constexpr int64_t block_rows = 64;
constexpr int64_t tile_columns = 1024;  // columns of one task; a tile of sums stays in the first cache
constexpr int64_t side_by_side = 8;     // rows read at once: as many streams for the prefetcher
constexpr int64_t elements_per_thread = 65536;

// sum[j] = sum over rows of x[row][j], for at most block_rows rows.
template <typename A, typename T>
void add_block(const T *x, int64_t stride, int64_t rows, int64_t columns, A *__restrict__ sum) {
  memset(sum, 0, size_t(columns) * sizeof(A));
  int64_t r = 0;
  for (; r + side_by_side <= rows; r += side_by_side) {
    const T *a = x + r * stride, *b = a + stride, *c = b + stride, *d = c + stride;
    const T *e = d + stride, *f = e + stride, *g = f + stride, *h = g + stride;
    for (int64_t j = 0; j < columns; ++j)
      sum[j] += ((A(load(a[j])) + A(load(b[j]))) + (A(load(c[j])) + A(load(d[j])))) +
                ((A(load(e[j])) + A(load(f[j]))) + (A(load(g[j])) + A(load(h[j]))));
  }
  for (; r < rows; ++r) {
    const T *row = x + r * stride;
    for (int64_t j = 0; j < columns; ++j) sum[j] += A(load(row[j]));
  }
}

// How many partial sums are kept at once: one per binary digit of the number of blocks.
int64_t depth(int64_t rows) {
  int64_t levels = 1;
  for (int64_t blocks = (rows + block_rows - 1) / block_rows; blocks > 1; blocks /= 2) ++levels;
  return levels;
}

// mean[j] over the rows. partial holds depth(rows) tiles: as in a binary counter, tile l is the sum
// of 2^l blocks when digit l of the number of blocks so far is one.
template <typename A, typename T>
void mean_of_rows(const T *x, int64_t stride, int64_t rows, int64_t columns, A *partial, A *__restrict__ mean) {
  int64_t blocks = 0;
  for (int64_t r = 0; r < rows; r += block_rows, ++blocks) {
    const int64_t count = rows - r < block_rows ? rows - r : block_rows;
    add_block(x + r * stride, stride, count, columns, mean);
    A *tile = partial;
    for (int64_t digits = blocks; digits & 1; digits >>= 1, tile += tile_columns)
      for (int64_t j = 0; j < columns; ++j) mean[j] = tile[j] + mean[j];
    memcpy(tile, mean, size_t(columns) * sizeof(A));
  }
  bool first = true;
  const A *tile = partial;
  for (int64_t digits = blocks; digits; digits >>= 1, tile += tile_columns) {
    if (!(digits & 1)) continue;
    if (first)
      memcpy(mean, tile, size_t(columns) * sizeof(A));
    else
      for (int64_t j = 0; j < columns; ++j) mean[j] = tile[j] + mean[j];
    first = false;
  }
  if (first) memset(mean, 0, size_t(columns) * sizeof(A));
  const A count = A(rows);
  for (int64_t j = 0; j < columns; ++j) mean[j] /= count;
}

int64_t rows_of(const class_rows &x, int64_t c) { return x.first_row ? x.first_row[c + 1] - x.first_row[c] : x.rows; }

template <typename A, typename T>
void mean_of_class(const class_rows &x, int64_t c, int64_t column, int64_t columns, A *partial, A *mean) {
  const T *data = static_cast<const T *>(x.data);
  data += (x.first_row ? x.first_row[c] * x.row_stride : c * x.class_stride) + column;
  mean_of_rows<A>(data, x.row_stride, rows_of(x, c), columns, partial, mean);
}

template <typename A>
void mean_of_class(const class_rows &x, int64_t c, int64_t column, int64_t columns, A *partial, A *mean) {
  switch (x.type) {
  case float32: return mean_of_class<A, float>(x, c, column, columns, partial, mean);
  case float64: return mean_of_class<A, double>(x, c, column, columns, partial, mean);
  case bfloat16_type: return mean_of_class<A, bfloat16>(x, c, column, columns, partial, mean);
  default: return mean_of_class<A, float16>(x, c, column, columns, partial, mean);
  }
}

// difference -= real; returns the sum of its squares.
template <typename A> double subtract(A *__restrict__ difference, const A *real, int64_t columns) {
  A squares[lanes] = {};
  for (int64_t j = 0; j < columns; j += lanes) {
    const int64_t width = columns - j < lanes ? columns - j : lanes;
    for (int64_t k = 0; k < width; ++k) {
      const A d = difference[j + k] - real[j + k];
      difference[j + k] = d;
      squares[k] += d * d;
    }
  }
  return fold(squares);
}

template <typename A> void run(const class_mean_arguments &x) {
  const int64_t tiles = (x.width + tile_columns - 1) / tile_columns, tasks = x.classes * tiles;
  int64_t levels = 1, elements = 0;
  const class_rows *sides[] = {&x.syn, &x.real};
  for (const class_rows *side : sides)
    for (int64_t c = 0; side->data && c < x.classes; ++c) {
      const int64_t rows = rows_of(*side, c);
      levels = depth(rows) > levels ? depth(rows) : levels;
      elements += rows * x.width;
    }
  // Waking a thread for less than a few microseconds of work costs more than it gives.
  const int64_t useful = 1 + elements / elements_per_thread;
  const int64_t most = tasks < useful ? tasks : useful;
  const int threads = most < 1 ? 1 : (most < x.threads ? int(most) : x.threads);
  (void)threads;
  A *out = static_cast<A *>(x.out), *distance = static_cast<A *>(x.distance);
  scratch<double> squares(tasks);
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
  {
    scratch<A> partial(levels * tile_columns), real(tile_columns);
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t c = task / tiles, column = (task % tiles) * tile_columns;
      const int64_t columns = x.width - column < tile_columns ? x.width - column : tile_columns;
      A *mean = out + c * x.width + column;
      mean_of_class<A>(x.syn, c, column, columns, partial.data, mean);
      if (!x.real.data) continue;
      mean_of_class<A>(x.real, c, column, columns, partial.data, real.data);
      squares[task] = subtract(mean, real.data, columns);
    }
  }
  if (!distance) return;
  for (int64_t c = 0; c < x.classes; ++c) {
    double sum = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) sum += squares[c * tiles + tile];
    distance[c] = A(sum);
  }
}

}  // namespace

void class_mean(const class_mean_arguments &x) { x.wide ? run<double>(x) : run<float>(x); }

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
