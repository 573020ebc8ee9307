// The pairs of blocks of mmd, in an order that any number of threads may share.
//
// The blocks of x and of y stand in one row, x first. In round r block i meets block j where
// i + j = r modulo the number of blocks: every pair once, and every block once per round. So the
// pairs of one round write to different blocks, and a block's sums grow round by round, in the same
// order whoever computes them.
#pragma once

#include "block_products.h"
#include "mmd.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

// What one thread works with.
template <typename T> struct mmd_local {
  T *left, *right, *transposed, *tile, *edge, *left_norms, *right_norms, *line;
};

template <typename T> struct mmd_plan {
  const mmd_arguments &x;
  row_panels panel;
  int64_t d, n, m, x_blocks, y_blocks, blocks, pairs;
  int threads;
  T *centres;  // classes x d
  mmd_local<T> local;  // of thread 0; the others follow
  int64_t local_bytes;
  int32_t *identity;

  mmd_plan(const mmd_arguments &arguments, arena &memory)
      : x(arguments), panel{panel_width<T>, width<T>}, d(x.width), n(x.x.rows), m(x.y.rows),
        x_blocks(ceiling(n, block_rows)), y_blocks(ceiling(m, block_rows)),
        blocks(x_blocks + y_blocks), pairs(blocks * (blocks + 1) / 2), threads(useful_threads(arguments)) {
    centres = memory.take<T>(x.classes * d);
    identity = memory.take<int32_t>(block_rows);
    const int64_t before = memory.used;
    local = take_local(memory);
    local_bytes = memory.used - before;
    memory.used += (threads - 1) * local_bytes;
    if (identity)
      for (int64_t i = 0; i < block_rows; ++i) identity[i] = int32_t(i);
  }

  static int useful_threads(const mmd_arguments &x) {
    const double rows = double(x.x.rows + x.y.rows), work = double(x.classes) * rows * rows * double(x.width + 32);
    const double most = 1 + work / 4e6;  // about a hundred microseconds each
    return most < double(x.threads) ? int(most) : x.threads;
  }

  mmd_local<T> take_local(arena &memory) const {
    const int64_t packed = block_rows * padded<T>(d), rows = block_rows + width<T>;
    const int64_t longest = padded<T>(d) > 3 * block_rows ? padded<T>(d) : 3 * block_rows;
    return {memory.take<T>(packed), memory.take<T>(packed), memory.take<T>((block_rows + panel_width<T>) * d),
            memory.take<T>(block_rows * tile_step<T>), memory.take<T>(block_rows * panel_width<T>),
            memory.take<T>(rows), memory.take<T>(rows), memory.take<T>(longest)};
  }
  mmd_local<T> local_of(int thread) const {
    mmd_local<T> of = local;
    T **arrays[] = {&of.left, &of.right, &of.transposed, &of.tile, &of.edge, &of.left_norms, &of.right_norms, &of.line};
    for (T **a : arrays) *a = reinterpret_cast<T *>(reinterpret_cast<char *>(*a) + thread * local_bytes);
    return of;
  }

  bool of_x(int64_t block) const { return block < x_blocks; }
  int64_t first_row(int64_t block) const { return (of_x(block) ? block : block - x_blocks) * block_rows; }
  int64_t rows(int64_t block) const {
    const int64_t left = (of_x(block) ? n : m) - first_row(block);
    return left < block_rows ? left : block_rows;
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

  void pack(int64_t c, int64_t block, bool centred, T *line, const row_block<T> &to) const {
    pack_rows(of_x(block) ? x.x : x.y, c, first_row(block), d, centred ? centres + c * d : nullptr, panel, line, to);
  }

  // tile = left right'
  void products(const row_block<T> &left, const row_block<T> &right, T *out) const {
    block_products(panel, d, left, right, out);
  }
};

}  // namespace
}  // namespace DDFAST_LEVEL
}  // namespace ddfast
