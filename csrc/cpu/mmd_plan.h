// The pairs of blocks of mmd, in an order that any number of threads may share, and the matrix
// products of one pair.
//
// The blocks of x and of y stand in one row, x first. In round r block i meets block j where
// i + j = r modulo the number of blocks: every pair once, and every block once per round. So the
// pairs of one round write to different blocks, and a block's sums grow round by round, in the same
// order whoever computes them.
#pragma once

#include "gemm.h"
#include "mmd.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

constexpr int64_t mmd_depth = 128;  // of one product: times panel_width, a panel in the first cache

inline int64_t mmd_ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct mmd_arena {
  char *base;
  int64_t used = 0;
  template <typename T> T *take(int64_t count) {
    T *at = base ? reinterpret_cast<T *>(base + used) : nullptr;
    used += (count * int64_t(sizeof(T)) + 127) / 64 * 64;
    return at;
  }
};

// What one thread works with.
template <typename T> struct mmd_local {
  T *left, *right, *transposed, *tile, *edge, *left_norms, *right_norms, *line;
};

template <typename T> struct mmd_plan {
  static constexpr int64_t tile_step = mmd_block_rows + width<T>;  // no two rows start in the same lines of a cache
  const mmd_arguments &x;
  mmd_panels panel;
  int64_t d, n, m, x_blocks, y_blocks, blocks, pairs;
  int threads;
  T *centres;  // classes x d
  mmd_local<T> local;  // of thread 0; the others follow
  int64_t local_bytes;
  int32_t *identity;

  mmd_plan(const mmd_arguments &arguments, mmd_arena &memory)
      : x(arguments), panel{panel_width<T>, width<T>}, d(x.width), n(x.x.rows), m(x.y.rows),
        x_blocks(mmd_ceiling(n, mmd_block_rows)), y_blocks(mmd_ceiling(m, mmd_block_rows)),
        blocks(x_blocks + y_blocks), pairs(blocks * (blocks + 1) / 2), threads(useful_threads(arguments)) {
    centres = memory.take<T>(x.classes * d);
    identity = memory.take<int32_t>(mmd_block_rows);
    const int64_t before = memory.used;
    local = take_local(memory);
    local_bytes = memory.used - before;
    memory.used += (threads - 1) * local_bytes;
    if (identity)
      for (int64_t i = 0; i < mmd_block_rows; ++i) identity[i] = int32_t(i);
  }

  static int useful_threads(const mmd_arguments &x) {
    const double rows = double(x.x.rows + x.y.rows), work = double(x.classes) * rows * rows * double(x.width + 32);
    const double most = 1 + work / 4e6;  // about a hundred microseconds each
    return most < double(x.threads) ? int(most) : x.threads;
  }

  mmd_local<T> take_local(mmd_arena &memory) const {
    const int64_t packed = mmd_block_rows * padded<T>(d), rows = mmd_block_rows + width<T>;
    const int64_t longest = padded<T>(d) > 3 * mmd_block_rows ? padded<T>(d) : 3 * mmd_block_rows;
    return {memory.take<T>(packed), memory.take<T>(packed), memory.take<T>((mmd_block_rows + panel_width<T>) * d),
            memory.take<T>(mmd_block_rows * tile_step), memory.take<T>(mmd_block_rows * panel_width<T>),
            memory.take<T>(rows), memory.take<T>(rows), memory.take<T>(longest)};
  }
  mmd_local<T> local_of(int thread) const {
    mmd_local<T> of = local;
    T **arrays[] = {&of.left, &of.right, &of.transposed, &of.tile, &of.edge, &of.left_norms, &of.right_norms, &of.line};
    for (T **a : arrays) *a = reinterpret_cast<T *>(reinterpret_cast<char *>(*a) + thread * local_bytes);
    return of;
  }

  bool of_x(int64_t block) const { return block < x_blocks; }
  int64_t first_row(int64_t block) const { return (of_x(block) ? block : block - x_blocks) * mmd_block_rows; }
  int64_t rows(int64_t block) const {
    const int64_t left = (of_x(block) ? n : m) - first_row(block);
    return left < mmd_block_rows ? left : mmd_block_rows;
  }

  // Block j that meets block i in this round; the pair is theirs where i <= j.
  int64_t partner(int64_t round, int64_t i) const { return (round - i + blocks) % blocks; }

  // The pooled mean of columns first to first + count, about the first row of x: exact where all
  // rows are equal.
  void centre(int64_t c, int64_t first, int64_t count) const {
    double origin[mmd_sum_columns], sums[2][mmd_sum_columns], squares[mmd_sum_columns];
    mmd_load(x.x, c, 0, first, count, origin);
    mmd_column_sums(x.x, c, first, count, origin, sums[0], squares);
    mmd_column_sums(x.y, c, first, count, origin, sums[1], squares);
    for (int64_t k = 0; k < count; ++k)
      centres[c * d + first + k] = T(origin[k] + (sums[0][k] + sums[1][k]) / double(n + m));
  }

  void pack(int64_t c, int64_t block, bool centred, T *line, const mmd_block<T> &to) const {
    mmd_pack(of_x(block) ? x.x : x.y, c, first_row(block), d, centred ? centres + c * d : nullptr, panel, line, to);
  }

  // tile = left right': the inner products of all rows of one block with those of another.
  void products(const mmd_block<T> &left, const mmd_block<T> &right, T *out) const {
    constexpr int64_t at_once = mmd_depth / panel_width<T>;
    const int64_t whole = d / panel_width<T>;
    if (d == 0) memset(out, 0, size_t(mmd_block_rows * tile_step) * sizeof(T));
    times_arguments<T> t;
    for (int64_t p = 0; p < panels<T>(d);) {
      const int64_t step = panel.columns(d, p), k = p * panel_width<T>;
      t.pieces = p < whole ? (whole - p < at_once ? whole - p : at_once) : 1;
      t.depth = p < whole ? panel_width<T> : d - k;
      t.step = panel_width<T> * mmd_block_rows;
      t.add = p > 0;
      for (int64_t q = 0; q < panels<T>(right.count); ++q) {
        const int64_t vectors = vectors_of<T>(right.count, q), columns = vectors * width<T>;
        t.b = right.transposed + q * panel_width<T> * d + k * columns;
        t.ahead = t.b;
        for (int64_t r = 0; r < left.count;) {
          const int64_t count = next_rows(left.count - r, most_rows[vectors]);
          for (int64_t i = 0; i < count; ++i) {
            t.a[i] = left.rows + k * mmd_block_rows + (r + i) * step;
            t.c[i] = out + (r + i) * tile_step + q * panel_width<T>;
          }
          tile<T>(vectors, count, t);
          r += count;
        }
      }
      p += t.pieces;
    }
  }

  // Adds the columns of a panel that is narrower than its vectors.
  void add_edge(const T *edge, int64_t step, int64_t rows, int64_t columns, T *to) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < columns; ++k) to[r * d + k] += edge[r * step + k];
  }

  // gradient[i] += sum over j of factors[i][j] right[j]
  void add_rows(const T *factors, int64_t count, const mmd_block<T> &right, T *edge, T *gradient) const {
    times_arguments<T> t;
    t.pieces = 1;
    t.step = 0;
    for (int64_t p = 0; p < panels<T>(d); ++p) {
      const int64_t vectors = vectors_of<T>(d, p), columns = vectors * width<T>, k = p * panel_width<T>;
      const bool in_place = k + columns <= d;
      T *to = in_place ? gradient + k : edge;
      const int64_t to_step = in_place ? d : columns;
      for (int64_t j = 0; j < right.count; j += mmd_depth) {
        t.depth = right.count - j < mmd_depth ? right.count - j : mmd_depth;
        t.add = in_place || j > 0;
        t.b = right.rows + k * mmd_block_rows + j * columns;
        t.ahead = t.b;
        for (int64_t r = 0; r < count;) {
          const int64_t some = next_rows(count - r, most_rows[vectors]);
          for (int64_t i = 0; i < some; ++i) {
            t.a[i] = factors + (r + i) * tile_step + j;
            t.c[i] = to + (r + i) * to_step;
          }
          tile<T>(vectors, some, t);
          r += some;
        }
      }
      if (!in_place) add_edge(edge, columns, count, d - k, gradient + k);
    }
  }

  // gradient[j] += sum over i of factors[i][j] left[i]
  void add_columns(const T *factors, const mmd_block<T> &left, int64_t count, T *edge, T *gradient) const {
    transposed_arguments<T> t;
    t.a_at = t.b_at = identity;
    t.a_step = tile_step;
    t.ahead_step = 0;
    for (int64_t p = 0; p < panels<T>(d); ++p) {
      const int64_t vectors = vectors_of<T>(d, p), columns = vectors * width<T>, k = p * panel_width<T>;
      const bool in_place = k + columns <= d;
      T *to = in_place ? gradient + k : edge;
      t.b_step = columns;
      t.c_step = in_place ? d : columns;
      for (int64_t i = 0; i < left.count; i += mmd_depth) {
        t.count = left.count - i < mmd_depth ? left.count - i : mmd_depth;
        t.add = in_place || i > 0;
        t.b = left.rows + k * mmd_block_rows + i * columns;
        t.ahead = t.b;
        for (int64_t r = 0; r < count;) {
          const int64_t some = next_rows(count - r, most_rows[vectors]);
          t.a = factors + i * tile_step + r;
          t.c = to + r * t.c_step;
          tile<T>(vectors, some, t);
          r += some;
        }
      }
      if (!in_place) add_edge(edge, columns, count, d - k, gradient + k);
    }
  }
};

}  // namespace
}  // namespace DDFAST_LEVEL
}  // namespace ddfast
