// The mean of exp(j <t, x>) over the rows x of each class, at many frequencies t, and its gradient
// (Wang et al., CVPR 2025): matrix products whose result is used while it is in the cache.
//
// Forward, a task per class and block of frequencies: products of the rows with these frequencies,
// chunk by chunk of the features, then sines, cosines and their sums. Backward, by blocks of
// frequencies that fit weights_bytes: the weights W = (g_im cos - g_re sin) / rows of the products,
// which are kept by the forward or computed again; then W t for x and W' x for t. Each sum is taken
// in an order of its own, whatever the blocks of other rows and columns: the bits do not depend on
// the number of threads.
#include "characteristic_function.h"
#include "gemm.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

constexpr int64_t block_columns = 256;  // of a task
constexpr int64_t block_rows = 96;      // of A, packed in the second cache
constexpr int64_t slab_rows = 1024;     // of one task's result
constexpr int64_t depth_chunk = 128;    // a multiple of the 64 features that are drawn together
constexpr int64_t read_rows = 32;       // fetched at once for B
constexpr int64_t weights_bytes = int64_t(16) << 20;

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T> constexpr int64_t a_step = depth_chunk + line<T>;  // not a power of two
template <typename T> constexpr int type_of = sizeof(T) == 8 ? float64 : float32;

// A thread's memory.
template <typename T> struct workspace {
  T *a, *b, *c, *read;
  double *sums;
  static constexpr int64_t bytes =
      int64_t(sizeof(T)) * (block_rows * a_step<T> + depth_chunk * block_columns + slab_rows * block_columns +
                            most(read_rows * block_columns, depth_chunk * panel_width<T>)) +
      int64_t(sizeof(double)) * 2 * block_columns;
  explicit workspace(char *memory) {
    a = reinterpret_cast<T *>(memory);
    b = a + block_rows * a_step<T>;
    c = b + depth_chunk * block_columns;
    read = c + slab_rows * block_columns;
    sums = reinterpret_cast<double *>(memory + bytes) - 2 * block_columns;
  }
};

// A factor of a product: the rows of `rows`, or its columns.
struct factor {
  row_source rows;
  bool turned;
};

// Rows and columns of x, in place where they have the right type.
template <typename T>
const T *look(const row_source &x, int64_t row, int64_t rows, int64_t column, int64_t columns, T *buffer,
              int64_t *step) {
  if (x.data && x.type == type_of<T>) {
    *step = x.step;
    return static_cast<const T *>(x.data) + row * x.step + column;
  }
  *step = ceiling(columns, line<T>) * line<T>;
  fetch(x, row, rows, column, columns, buffer, *step);
  return buffer;
}

// Rows k .. k + deep of B, columns `column` .. + columns, into panels; zeros behind the last column.
template <typename T>
void pack_b(const factor &b, int64_t k, int64_t deep, int64_t column, int64_t columns, const workspace<T> &w) {
  const int64_t count = panels<T>(columns);
  const auto panel_at = [&](int64_t panel) { return w.b + panel * panel_width<T> * deep; };
  int64_t step;
  if (b.turned)
    for (int64_t panel = 0; panel < count; ++panel) {
      const int64_t first = panel * panel_width<T>, across = least(panel_width<T>, columns - first);
      const T *from = look(b.rows, column + first, across, k, deep, w.read, &step);
      turn(from, step, across, deep, panel_at(panel), padded<T>(across));
    }
  else
    for (int64_t i = 0; i < deep; i += read_rows) {
      const int64_t rows = least(read_rows, deep - i);
      const T *from = look(b.rows, k + i, rows, column, columns, w.read, &step);
      for (int64_t panel = 0; panel < count; ++panel) {
        const int64_t first = panel * panel_width<T>, across = least(panel_width<T>, columns - first);
        T *to = panel_at(panel) + i * padded<T>(across);
        for (int64_t r = 0; r < rows; ++r, to += padded<T>(across))
          memcpy(to, from + r * step + first, size_t(across) * sizeof(T));
      }
    }
  const int64_t first = (count - 1) * panel_width<T>, across = columns - first, all = padded<T>(across);
  T *last = panel_at(count - 1);
  for (int64_t i = 0; i < deep && across < all; ++i)
    memset(last + i * all + across, 0, size_t(all - across) * sizeof(T));
}

// w.c[r][c] = sum over depth of A[row + r][:] B[:][column + c], rows block_columns apart.
template <typename T>
void product(const factor &a, int64_t row, int64_t rows, const factor &b, int64_t column, int64_t columns,
             int64_t depth, const workspace<T> &w) {
  if (depth == 0) memset(w.c, 0, size_t(rows * block_columns) * sizeof(T));
  times_arguments<T> t;
  t.pieces = 1;
  t.step = 0;
  for (int64_t k = 0; k < depth; k += depth_chunk) {
    const int64_t deep = least(depth_chunk, depth - k);
    pack_b(b, k, deep, column, columns, w);
    t.depth = deep;
    t.add = k > 0;
    for (int64_t begin = 0; begin < rows; begin += block_rows) {
      const int64_t count = least(block_rows, rows - begin);
      if (a.turned)
        turn(static_cast<const T *>(a.rows.data) + k * a.rows.step + row + begin, a.rows.step, deep, count, w.a,
             a_step<T>);
      else
        fetch(a.rows, row + begin, count, k, deep, w.a, a_step<T>);
      for (int64_t panel = 0; panel < panels<T>(columns); ++panel) {
        const int64_t vectors = vectors_of<T>(columns, panel);
        t.b = t.ahead = w.b + panel * panel_width<T> * deep;
        for (int64_t r = 0; r < count;) {
          const int64_t some = next_rows(count - r, most_rows[vectors]);
          for (int64_t i = 0; i < some; ++i) {
            t.a[i] = w.a + (r + i) * a_step<T>;
            t.c[i] = w.c + (begin + r + i) * block_columns + panel * panel_width<T>;
          }
          tile<T>(vectors, some, t);
          r += some;
        }
      }
    }
  }
}

template <typename T> struct plan {
  const characteristic_function_arguments &x;
  int64_t frequency_blocks, slab;  // blocks in all, frequencies of a slab of weights
  char *local;
  T *weights;

  explicit plan(const characteristic_function_arguments &arguments) : x(arguments) {
    frequency_blocks = ceiling(x.count, block_columns);
    const int64_t fit = weights_bytes / int64_t(sizeof(T)) / most(1, x.rows) / block_columns * block_columns;
    slab = least(ceiling(x.count, 16) * 16, most(block_columns, fit));
    local = static_cast<char *>(x.scratch);
    weights = reinterpret_cast<T *>(local + x.threads * workspace<T>::bytes);
  }
  int64_t bytes() const {
    return x.threads * workspace<T>::bytes + (x.grad ? x.rows * slab * int64_t(sizeof(T)) : 0);
  }
  workspace<T> mine() const {
    int thread = 0;
#ifdef _OPENMP
    thread = omp_get_thread_num();
#endif
    return workspace<T>(local + thread * workspace<T>::bytes);
  }

  row_source features(int64_t c) const {
    return {static_cast<const char *>(x.x.data) + c * x.x.class_stride * x.x.bytes, x.x.type, x.x.row_stride, 0, 0, 0, 0};
  }
  row_source frequencies(int64_t c) const {
    if (!x.t.data) return {nullptr, 0, 0, x.seed, uint32_t(x.stream + c), x.scale, 0};
    return {static_cast<const char *>(x.t.data) + c * x.t.class_stride * x.t.bytes, x.t.type, x.t.row_stride, 0, 0, 0, 0};
  }
  T *phases(int64_t c) const { return static_cast<T *>(x.phase) + c * x.rows * x.count; }

  // One class and block of frequencies.
  void forward(int64_t c, int64_t first, const workspace<T> &w) const {
    const int64_t columns = least(block_columns, x.count - first);
    double *cosines = w.sums, *sines = w.sums + block_columns;
    memset(w.sums, 0, 2 * block_columns * sizeof(double));
    for (int64_t r = 0; r < x.rows; r += slab_rows) {
      const int64_t rows = least(slab_rows, x.rows - r);
      product<T>({features(c), false}, r, rows, {frequencies(c), true}, first, columns, x.width, w);
      add_waves(w.c, block_columns, rows, columns, cosines, sines);
      for (int64_t i = 0; x.phase && i < rows; ++i)
        memcpy(phases(c) + (r + i) * x.count + first, w.c + i * block_columns, size_t(columns) * sizeof(T));
    }
    T *phi = static_cast<T *>(x.phi) + (c * x.count + first) * 2;
    for (int64_t m = 0; m < columns; ++m) {
      phi[2 * m] = T(cosines[m] / double(x.rows));
      phi[2 * m + 1] = T(sines[m] / double(x.rows));
    }
  }

  // Weights of rows r .. of one block of frequencies, which begins at `first`, in a slab.
  void weigh_block(int64_t c, int64_t slab_first, int64_t first, int64_t r, const workspace<T> &w) const {
    const int64_t columns = least(block_columns, x.count - first), rows = least(slab_rows, x.rows - r);
    T real[block_columns] = {}, imaginary[block_columns] = {};
    const T *grad = static_cast<const T *>(x.grad) + (c * x.count + first) * 2;
    for (int64_t m = 0; m < columns; ++m) {
      real[m] = grad[2 * m] / T(x.rows);
      imaginary[m] = grad[2 * m + 1] / T(x.rows);
    }
    if (x.phase)
      for (int64_t i = 0; i < rows; ++i)
        memcpy(w.c + i * block_columns, phases(c) + (r + i) * x.count + first, size_t(columns) * sizeof(T));
    else
      product<T>({features(c), false}, r, rows, {frequencies(c), true}, first, columns, x.width, w);
    for (int64_t i = 0; x.phase && i < rows; ++i)  // what lies behind the last column is read, too
      memset(w.c + i * block_columns + columns, 0, size_t(padded<T>(columns) - columns) * sizeof(T));
    weigh(w.c, block_columns, rows, columns, real, imaginary, weights + r * slab + first - slab_first, slab);
  }

  // Adds a block of results to rows of an output, or writes it.
  void put(const workspace<T> &w, int64_t rows, int64_t columns, bool add, T *to, int64_t step) const {
    for (int64_t i = 0; i < rows; ++i, to += step)
      for (int64_t j = 0; j < columns; ++j) {
        const T value = w.c[i * block_columns + j];
        to[j] = add ? to[j] + value : value;
      }
  }

  void backward_x(int64_t c, int64_t first, int64_t count, int64_t r, int64_t column, const workspace<T> &w) const {
    const int64_t rows = least(slab_rows, x.rows - r), columns = least(block_columns, x.width - column);
    const row_source weight = {weights, type_of<T>, slab, 0, 0, 0, 0};
    row_source frequency = frequencies(c);
    if (frequency.data)
      frequency.data = static_cast<const char *>(frequency.data) + first * frequency.step * x.t.bytes;
    frequency.first_row = first;
    product<T>({weight, false}, r, rows, {frequency, false}, column, columns, count, w);
    put(w, rows, columns, first > 0, static_cast<T *>(x.by_x) + (c * x.rows + r) * x.width + column, x.width);
  }

  void backward_t(int64_t c, int64_t first, int64_t count, int64_t r, int64_t column, const workspace<T> &w) const {
    const int64_t rows = least(slab_rows, count - r), columns = least(block_columns, x.width - column);
    const row_source weight = {weights, type_of<T>, slab, 0, 0, 0, 0};
    product<T>({weight, true}, r, rows, {features(c), false}, column, columns, x.rows, w);
    T *to = static_cast<T *>(x.by_t) + ((x.shared ? 0 : c * x.count) + first + r) * x.width + column;
    put(w, rows, columns, x.shared && c > 0, to, x.width);
  }

  template <typename F> void each(int64_t tasks, F &&task) const {
    const int threads = int(most(1, least(x.threads, tasks)));
    (void)threads;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
    {
      const workspace<T> w = mine();
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
      for (int64_t i = 0; i < tasks; ++i) task(i, w);
    }
  }

  void run() const {
    if (!x.grad)
      return each(x.classes * frequency_blocks, [&](int64_t i, const workspace<T> &w) {
        forward(i / frequency_blocks, i % frequency_blocks * block_columns, w);
      });
    const int64_t row_slabs = ceiling(x.rows, slab_rows), column_blocks = ceiling(x.width, block_columns);
    for (int64_t c = 0; c < x.classes; ++c)
      for (int64_t first = 0; first < x.count; first += slab) {
        const int64_t count = least(slab, x.count - first), blocks = ceiling(count, block_columns);
        each(blocks * row_slabs, [&](int64_t i, const workspace<T> &w) {
          weigh_block(c, first, first + i % blocks * block_columns, i / blocks * slab_rows, w);
        });
        if (x.by_x)
          each(row_slabs * column_blocks, [&](int64_t i, const workspace<T> &w) {
            backward_x(c, first, count, i / column_blocks * slab_rows, i % column_blocks * block_columns, w);
          });
        if (x.by_t)
          each(ceiling(count, slab_rows) * column_blocks, [&](int64_t i, const workspace<T> &w) {
            backward_t(c, first, count, i / column_blocks * slab_rows, i % column_blocks * block_columns, w);
          });
      }
  }
};

}  // namespace

int64_t characteristic_function_scratch(const characteristic_function_arguments &x) {
  return x.wide ? plan<double>(x).bytes() : plan<float>(x).bytes();
}

void characteristic_function(const characteristic_function_arguments &x) {
  x.wide ? plan<double>(x).run() : plan<float>(x).run();
}

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
