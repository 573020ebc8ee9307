// NNGP and NTK of fully connected ReLU networks for all pairs of rows of two sets, and the gradient.
//
// A tile of pairs is one matrix product; all layers then pass over it while it is in the second cache
// (dense_kernel_tile.cpp). Of a set with itself the upper tiles are computed and mirrored. Backward
// reads the saved covariances behind the first layer, makes a tile of gradients by them, and multiplies
// it with the other set's rows; every row (or column) of the result has one task, so that its sum has
// one order whatever the threads.
#include "block_products.h"
#include "dense_kernel.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

template <typename T> T *moved(T *of, int64_t bytes) {
  return of ? reinterpret_cast<T *>(reinterpret_cast<char *>(of) + bytes) : nullptr;
}

// One set: its blocks, packed once for all threads, and its variances.
template <typename T> struct dense_set {
  const class_rows *source;
  int64_t count, blocks, width;
  T *rows, *transposed;  // null: not wanted
  dense_rows<T> layers;

  dense_set(const class_rows &set, int64_t d, int64_t depth, bool with_rows, bool with_transposed, arena &memory)
      : source(&set), count(set.rows), blocks(ceiling(count, block_rows)), width(d) {
    rows = with_rows ? memory.take<T>(blocks * rows_size()) : nullptr;
    transposed = with_transposed ? memory.take<T>(blocks * transposed_size()) : nullptr;
    layers.step = blocks * block_rows + panel_width<T>;
    layers.q = memory.take<T>((depth + 1) * layers.step);
    layers.inverse = memory.take<T>((depth + 1) * layers.step);
    layers.share = memory.take<T>((depth + 1) * layers.step);
  }
  int64_t rows_size() const { return block_rows * padded<T>(width); }
  int64_t transposed_size() const { return (block_rows + panel_width<T>)*width; }
  int64_t first(int64_t block) const { return block * block_rows; }
  int64_t size(int64_t block) const { return count - first(block) < block_rows ? count - first(block) : block_rows; }
  row_block<T> block(int64_t b) const {
    return {rows ? rows + b * rows_size() : nullptr, transposed ? transposed + b * transposed_size() : nullptr, nullptr,
            size(b)};
  }
};

// What one thread works with.
template <typename T> struct dense_local {
  T *rows, *transposed, *norms, *line, *tile, *mirrored, *edge;
  double *by_q;
  char *state;
};

template <typename T> struct dense_work {
  const dense_kernel_arguments &x;
  const bool symmetric, forward;
  const row_panels panel{panel_width<T>, width<T>};
  int64_t d;
  int threads;
  dense_network<T> network;
  bool *exact;
  dense_set<T> left, right;  // of a symmetric call right is empty, and left stands for both
  dense_local<T> local;
  int64_t local_bytes;
  int32_t *identity;

  dense_work(const dense_kernel_arguments &arguments, arena &memory)
      : x(arguments), symmetric(!x.y.data), forward(!x.grad), d(x.width), threads(useful_threads(arguments)),
        network{x.ntk, x.depth, T(x.weight_var / double(x.width)), T(x.weight_var / 2), T(x.bias_var), nullptr},
        exact(memory.take<bool>(x.depth)),
        left(x.x, d, x.depth, forward || x.by_y || symmetric, forward && symmetric, memory),
        right(symmetric ? nothing() : x.y, d, x.depth, x.by_x && !symmetric, forward && !symmetric, memory) {
    network.exact = exact;
    identity = memory.take<int32_t>(block_rows);
    for (int64_t i = 0; identity && i < block_rows; ++i) identity[i] = int32_t(i);
    const int64_t before = memory.used;
    local = {memory.take<T>(left.rows_size()),
             memory.take<T>(left.transposed_size()),
             memory.take<T>(block_rows + width<T>),
             memory.take<T>(padded<T>(d)),
             memory.take<T>(block_rows * tile_step<T>),
             memory.take<T>(block_rows * tile_step<T>),
             memory.take<T>(block_rows * panel_width<T>),
             memory.take<double>(block_rows),
             memory.take<char>(dense_state_bytes<T>(x.depth))};
    local_bytes = memory.used - before;
    memory.used += (threads - 1) * local_bytes;
  }

  static const class_rows &nothing() {
    static const class_rows none{};
    return none;
  }

  static int useful_threads(const dense_kernel_arguments &x) {
    const double pairs = double(x.x.rows) * double(x.y.data ? x.y.rows : x.x.rows);
    const double most = 1 + pairs * double(x.width + 20 * x.depth) / 4e6;  // about a hundred microseconds each
    return most < double(x.threads) ? int(most) : x.threads;
  }

  dense_local<T> local_of(int thread) const {
    const int64_t by = thread * local_bytes;
    return {moved(local.rows, by),  moved(local.transposed, by), moved(local.norms, by),
            moved(local.line, by),  moved(local.tile, by),       moved(local.mirrored, by),
            moved(local.edge, by),  moved(local.by_q, by),       moved(local.state, by)};
  }

  const dense_set<T> &columns() const { return symmetric ? left : right; }

  // Packs a block of a set, what is not kept into memory of the thread's own, and finds its variances.
  void prepare(const dense_set<T> &set, int64_t b, const dense_local<T> &mine) const {
    row_block<T> block = set.block(b);
    if (!block.rows) block.rows = mine.rows;
    if (!block.transposed) block.transposed = mine.transposed;
    block.norms = mine.norms;
    pack_rows<T>(*set.source, 0, set.first(b), d, nullptr, panel, mine.line, block);
    const dense_rows<T> layers = set.layers.from(set.first(b));
    dense_variances(network, panel, d, block.transposed, block.count, layers.q);
    dense_layers(network, layers, block.count);
  }

  dense_tile<T> tile_at(int64_t row, int64_t column, const dense_local<T> &mine) const {
    const int64_t m = columns().count, at = row * m + column;
    dense_tile<T> t{};
    t.left = left.layers.from(row);
    t.right = columns().layers.from(column);
    t.diagonal = symmetric ? column - row : block_rows;
    t.step = m;
    t.gram = x.gram ? static_cast<T *>(x.gram) + at : nullptr;
    t.out = forward ? static_cast<T *>(x.out) + at : nullptr;
    t.grad = forward ? nullptr : static_cast<const T *>(x.grad) + at;
    t.tile = mine.tile;
    t.tile_step = tile_step<T>;
    t.state = mine.state;
    return t;
  }

  void forward_tile(int64_t i, int64_t j, const dense_local<T> &mine) const {
    const row_block<T> a = left.block(i), b = columns().block(j);
    block_products(panel, d, a, b, mine.tile);
    dense_tile<T> t = tile_at(left.first(i), columns().first(j), mine);
    t.rows = a.count;
    t.columns = b.count;
    dense_forward(network, t);
    if (!symmetric || i == j) return;
    const int64_t across = columns().first(j) * t.step + left.first(i);
    dense_transpose(t.out, t.step, t.rows, t.columns, static_cast<T *>(x.out) + across, t.step);
    if (t.gram) dense_transpose(t.gram, t.step, t.rows, t.columns, static_cast<T *>(x.gram) + across, t.step);
  }

  // Rows first to first + count of x, or of y: all their pairs.
  void backward_rows(bool of_x, int64_t first, int64_t count, const dense_local<T> &mine) const {
    const dense_set<T> &set = of_x ? left : right, &other = of_x ? columns() : left;
    T *to = static_cast<T *>(of_x ? x.by_x : x.by_y) + first * d;
    memset(to, 0, size_t(count * d) * sizeof(T));
    memset(mine.by_q, 0, size_t(count) * sizeof(double));
    for (int64_t b = 0; b < other.blocks; ++b) {
      dense_tile<T> t = of_x ? tile_at(first, other.first(b), mine) : tile_at(other.first(b), first, mine);
      t.rows = of_x ? count : other.size(b);
      t.columns = of_x ? other.size(b) : count;
      if (symmetric) {
        const T *mirror = static_cast<const T *>(x.grad) + other.first(b) * t.step + first;
        dense_transpose(mirror, t.step, t.columns, t.rows, mine.mirrored, tile_step<T>);
        t.grad_transposed = mine.mirrored;
      }
      dense_backward(network, t, of_x, mine.by_q);
      if (of_x)
        add_rows(d, mine.tile, count, other.block(b), mine.edge, to);
      else
        add_columns(d, identity, mine.tile, other.block(b), count, mine.edge, to);
    }
    finish(*set.source, first, count, mine, to);
  }

  // The share of the rows' own variances, and the factor of both.
  void finish(const class_rows &source, int64_t first, int64_t count, const dense_local<T> &mine, T *to) const {
    const row_block<T> block{mine.rows, nullptr, mine.norms, 1};
    for (int64_t r = 0; r < count; ++r, to += d) {
      pack_rows<T>(source, 0, first + r, d, nullptr, panel, mine.line, block);
      const T share = T(2 * mine.by_q[r]);
      for (int64_t k = 0; k < d; ++k) to[k] = network.scale * (to[k] + share * mine.line[k]);
    }
  }

  // Rows of one task: a block, or less where there would be too few tasks for the threads.
  int64_t group_of(int64_t rows) const {
    int64_t group = block_rows;
    while (group > 64 && ceiling(rows, group) < 2 * threads) group /= 2;
    return group;
  }

  void run() const {
    const int64_t n = left.blocks, m = columns().blocks, own = symmetric ? 0 : right.blocks;
    const bool through_y = !forward && x.by_y && !symmetric;
    const int64_t group_x = group_of(left.count), group_y = group_of(right.count);
    const int64_t tasks_x = !forward && x.by_x ? ceiling(left.count, group_x) : 0;
    const int64_t tasks_y = through_y ? ceiling(right.count, group_y) : 0;
    for (int64_t l = 0; l < x.depth; ++l) exact[l] = true;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
    {
      int thread = 0;
#ifdef _OPENMP
      thread = omp_get_thread_num();
#endif
      const dense_local<T> mine = local_of(thread);
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
      for (int64_t b = 0; b < n + own; ++b) b < n ? prepare(left, b, mine) : prepare(right, b - n, mine);
#ifdef _OPENMP
#pragma omp single
#endif
      {
        dense_ranges(network, left.layers, left.count, exact);
        dense_ranges(network, right.layers, right.count, exact);
      }
      if (forward) {
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
        for (int64_t t = 0; t < n * m; ++t)
          if (!symmetric || t / m <= t % m) forward_tile(t / m, t % m, mine);
      } else {
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
        for (int64_t t = 0; t < tasks_x + tasks_y; ++t) {
          const bool of_x = t < tasks_x;
          const int64_t group = of_x ? group_x : group_y, first = (of_x ? t : t - tasks_x) * group;
          const int64_t rows = (of_x ? left : right).count - first;
          backward_rows(of_x, first, rows < group ? rows : group, mine);
        }
      }
    }
  }
};

template <typename T> int64_t scratch_of(const dense_kernel_arguments &x) {
  arena memory{nullptr};
  dense_work<T> work(x, memory);
  return memory.used;
}

template <typename T> void run(const dense_kernel_arguments &x) {
  arena memory{static_cast<char *>(x.scratch)};
  dense_work<T>(x, memory).run();
}

}  // namespace

int64_t dense_kernel_scratch(const dense_kernel_arguments &x) { return x.wide ? scratch_of<double>(x) : scratch_of<float>(x); }

void dense_kernel(const dense_kernel_arguments &x) { x.wide ? run<double>(x) : run<float>(x); }

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
