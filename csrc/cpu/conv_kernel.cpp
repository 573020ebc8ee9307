// The convolutional kernel of two sets of images: variances of every image, then the pairs, as many
// at a time as a vector has lanes, then, backward, each image's own covariance once more.
//
// What a task does depends on neither the number of threads nor that of tasks, and gradients are added
// up in the order of the tasks. So results are the same bits for any number of threads, and an entry
// depends on nothing but its two images.
#include "conv_kernel_sets.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

constexpr int64_t rows_of_task = 4;

int64_t round_up(int64_t bytes) { return (bytes + line_bytes - 1) / line_bytes * line_bytes; }

template <typename T> struct conv_work {
  static constexpr int64_t lanes = width_of<T>;
  const conv_kernel_arguments &x;
  conv_plan plan, own_plan;
  conv_sets<T> sets;
  conv_pairs pairs;
  bool backward;
  int64_t chunks, block_tasks, tasks, groups[2];
  int threads;
  char *memories;  // of threads
  int64_t memory_bytes, pair_bytes, bytes;

  explicit conv_work(const conv_kernel_arguments &arguments)
      : x(arguments), plan(conv_plan_of(arguments, false)), own_plan(conv_plan_of(arguments, true)),
        sets{arguments, plan.positions, {}, {}}, pairs{arguments.n, arguments.m, lanes, arguments.y == nullptr},
        backward(arguments.grad != nullptr) {
    chunks = (x.n + rows_of_task - 1) / rows_of_task;
    block_tasks = pairs.blocks() * chunks;
    tasks = block_tasks + (pairs.left() + lanes - 1) / lanes;
    groups[0] = (x.n + lanes - 1) / lanes;
    groups[1] = x.y ? (x.m + lanes - 1) / lanes : 0;
    threads = int(tasks < x.threads ? (tasks > 0 ? tasks : 1) : x.threads);
    char *data = static_cast<char *>(x.scratch);
    bytes = 0;
    const auto take = [&](int64_t count) {
      T *const part = data ? reinterpret_cast<T *>(data + bytes) : nullptr;
      bytes += round_up(count * int64_t(sizeof(T)));
      return part;
    };
    for (int side = 0; side < (x.y ? 2 : 1); ++side) {
      sets.variances[side] = take(sets.images(side) * plan.positions);
      sets.by_variances[side] = take(backward ? sets.images(side) * plan.positions : 0);
    }
    if (!x.y) sets.variances[1] = sets.variances[0], sets.by_variances[1] = sets.by_variances[0];
    // Behind a thread's planes lies what the rows of its task receive: pixels as in conv_side, norms.
    pair_bytes = conv_divide<T>(plan, x.ntk, backward, nullptr, nullptr);
    const int64_t received = backward ? rows_of_task * (sets.pixels() + plan.positions) * int64_t(sizeof(T)) : 0;
    const int64_t own_bytes = conv_divide<T>(own_plan, false, backward, nullptr, nullptr);
    memory_bytes = round_up(pair_bytes + received > own_bytes ? pair_bytes + received : own_bytes);
    memories = data ? data + bytes : nullptr;
    bytes += threads * memory_bytes;
  }

  char *memory_of_thread() const {
#ifdef _OPENMP
    return memories + omp_get_thread_num() * memory_bytes;
#else
    return memories;
#endif
  }

  conv_memory<T> memory_of(const conv_plan &walked, bool ntk) const {
    conv_memory<T> memory;
    conv_divide(walked, ntk, backward, memory_of_thread(), &memory);
    clear(memory.zeros, x.width);
    return memory;
  }

  static void clear(vector<T> *data, int64_t count) {
    if (data) memset(static_cast<void *>(data), 0, size_t(count) * sizeof(vector<T>));
  }
  static const T *scalars(const vector<T> *data) { return reinterpret_cast<const T *>(data); }

  // --- variances ---

  // Computes those of a group of images, as many as there are lanes.
  conv_memory<T> group(int64_t g, int *side, conv_tile<T> *tile) const {
    *side = g < groups[0] ? 0 : 1;
    const int64_t first = (*side == 0 ? g : g - groups[0]) * lanes, images = sets.images(*side);
    tile->count = images - first < lanes ? images - first : lanes;
    for (int64_t k = 0; k < lanes; ++k) tile->i[k] = first + k < images ? first + k : images - 1;
    conv_memory<T> memory = memory_of(own_plan, false);
    memory.y = memory.x;
    sets.pack_pixels(*side, tile->i, memory.x.pixels);
    conv_variances(memory);
    return memory;
  }

  void group_forward(int64_t g) const {
    int side;
    conv_tile<T> tile;
    const conv_memory<T> memory = group(g, &side, &tile);
    for (int64_t k = 0; k < tile.count; ++k)
      for (int64_t p = 0; p < plan.positions; ++p)
        sets.variances[side][tile.i[k] * plan.positions + p] = memory.variances[p][k];
  }

  void group_backward(int64_t g) const {
    if (!sets.gradient(g < groups[0] ? 0 : 1)) return;
    int side;
    conv_tile<T> tile;
    conv_memory<T> memory = group(g, &side, &tile);
    // V itself is done with: its place takes what it receives, from log sqrt(V).
    for (int64_t p = 0; p < plan.positions; ++p) {
      vector<T> total = {};
      for (int64_t k = 0; k < lanes; ++k) total[k] = sets.by_variances[side][tile.i[k] * plan.positions + p];
      const vector<T> inverse = read(memory.x.inverse + p * lanes);
      memory.variances[p] = total * (inverse * inverse * T(0.5));
    }
    memory.by_variance = memory.variances;
    memory.by_pixels_y = memory.by_pixels_x, memory.by_norms_y = memory.by_norms_x;
    clear(memory.by_pixels_x, sets.pixels());
    clear(memory.by_norms_x, plan.positions);
    conv_variances_backward(memory);
    sets.add_pixels(side, tile.i, tile.count, scalars(memory.by_pixels_x), lanes);
  }

  // --- pairs ---

  // A task: rows of x against a block of y; or, beyond those, a tile of pairs that no block has.
  struct task_of_pairs {
    bool shared;
    int64_t row, end;  // shared: rows
    conv_tile<T> tile;
    conv_memory<T> memory;
  };

  // False if there is nothing to do. The side or sides that stay for all of the task are in place.
  bool begin(int64_t index, task_of_pairs *task) const {
    conv_tile<T> &tile = task->tile;
    task->shared = index < block_tasks;
    if (task->shared) {
      const int64_t block = index / chunks, rows = pairs.rows(block);
      task->row = index % chunks * rows_of_task;
      task->end = task->row + rows_of_task < rows ? task->row + rows_of_task : rows;
      if (task->row >= task->end) return false;
      tile.count = lanes;
      for (int64_t k = 0; k < lanes; ++k) tile.j[k] = block * lanes + k;
    } else {
      const int64_t first = (index - block_tasks) * lanes, left = pairs.left();
      tile.count = left - first < lanes ? left - first : lanes;
      for (int64_t k = 0; k < lanes; ++k)
        pairs.left_pair(first + (k < tile.count ? k : tile.count - 1), tile.i + k, tile.j + k);
      task->row = 0, task->end = 1;
    }
    task->memory = memory_of(plan, x.ntk);
    sets.pack(1, tile.j, task->memory.y);
    if (!task->shared) sets.pack(0, tile.i, task->memory.x);
    return true;
  }

  void next_row(int64_t i, task_of_pairs *task) const {
    if (!task->shared) return;
    for (int64_t &row : task->tile.i) row = i;
    sets.pack_shared(i, task->memory.x);
  }

  void task_forward(int64_t index) const {
    task_of_pairs task;
    if (!begin(index, &task)) return;
    for (int64_t i = task.row; i < task.end; ++i) {
      next_row(i, &task);
      T k[lanes], t[lanes];
      conv_forward(task.memory, task.shared, k, t);
      vector<T> value = read(k) * T(plan.readout) + T(plan.bias_var);
      if (x.ntk) value = read(t) * T(plan.readout) + value;
      sets.write_entries(task.tile, value);
    }
  }

  // Gradients stay in the thread's memory, for `add`.
  bool task_backward(int64_t index, task_of_pairs *task) const {
    if (!begin(index, task)) return false;
    conv_memory<T> &memory = task->memory;
    if (!sets.gradient(0)) memory.by_pixels_x = memory.by_norms_x = nullptr;
    if (!sets.gradient(1)) memory.by_pixels_y = memory.by_norms_y = nullptr;
    clear(memory.by_pixels_y, sets.pixels());
    clear(memory.by_norms_y, plan.positions);
    for (int64_t i = task->row; i < task->end; ++i) {
      clear(memory.by_pixels_x, sets.pixels());
      clear(memory.by_norms_x, plan.positions);
      next_row(i, task);
      T k[lanes], t[lanes], cotangents[lanes];
      sets.cotangents_of(task->tile, cotangents);
      conv_forward(memory, task->shared, k, t);
      conv_backward(memory, task->shared, cotangents);
      if (!task->shared || !memory.by_pixels_x) continue;
      T *received = received_by(i - task->row);
      for (int64_t p = 0; p < sets.pixels(); ++p) received[p] = lane_sum(memory.by_pixels_x[p]);
      received += sets.pixels();
      for (int64_t p = 0; p < plan.positions; ++p) received[p] = lane_sum(memory.by_norms_x[p]);
    }
    return true;
  }

  static T lane_sum(vector<T> v) {
    for (int64_t half = lanes / 2; half > 0; half /= 2)
      for (int64_t k = 0; k < half; ++k) v[k] += v[k + half];
    return v[0];
  }
  T *received_by(int64_t row) const {
    return reinterpret_cast<T *>(memory_of_thread() + pair_bytes) + row * (sets.pixels() + plan.positions);
  }

  void add(const task_of_pairs &task) const {
    const conv_memory<T> &memory = task.memory;
    const conv_tile<T> &tile = task.tile;
    if (memory.by_pixels_y) {
      sets.add_pixels(1, tile.j, tile.count, scalars(memory.by_pixels_y), lanes);
      sets.add_norms(1, tile.j, tile.count, scalars(memory.by_norms_y), lanes);
    }
    if (!memory.by_pixels_x) return;
    if (!task.shared) {
      sets.add_pixels(0, tile.i, tile.count, scalars(memory.by_pixels_x), lanes);
      sets.add_norms(0, tile.i, tile.count, scalars(memory.by_norms_x), lanes);
      return;
    }
    for (int64_t i = task.row; i < task.end; ++i) {
      const T *received = received_by(i - task.row);
      sets.add_pixels(0, &i, 1, received, 1);
      sets.add_norms(0, &i, 1, received + sets.pixels(), 1);
    }
  }

  void run() const {
    if (backward) {
      for (int side = 0; side < (x.y ? 2 : 1); ++side) {
        memset(sets.by_variances[side], 0, size_t(sets.images(side) * plan.positions) * sizeof(T));
        if (sets.gradient(side)) memset(sets.gradient(side), 0, size_t(sets.images(side) * sets.pixels()) * sizeof(T));
      }
    }
    const int64_t all_groups = groups[0] + groups[1];
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
    {
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
      for (int64_t g = 0; g < all_groups; ++g) group_forward(g);
      if (!backward) {
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
        for (int64_t index = 0; index < tasks; ++index) task_forward(index);
      } else {
#ifdef _OPENMP
#pragma omp for ordered schedule(dynamic, 1)
#endif
        for (int64_t index = 0; index < tasks; ++index) {
          task_of_pairs task;
          const bool any = task_backward(index, &task);
#ifdef _OPENMP
#pragma omp ordered
#endif
          if (any) add(task);
        }
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
        for (int64_t g = 0; g < all_groups; ++g) group_backward(g);
      }
    }
  }
};

}  // namespace

int64_t conv_kernel_scratch(const conv_kernel_arguments &x) {
  return x.wide ? conv_work<double>(x).bytes : conv_work<float>(x).bytes;
}

void conv_kernel(const conv_kernel_arguments &x) {
  if (x.n == 0 || x.m == 0) {
    const size_t image = size_t(x.channels * x.height * x.width) * (x.wide ? sizeof(double) : sizeof(float));
    if (x.by_x) memset(x.by_x, 0, size_t(x.n) * image);
    if (x.by_y) memset(x.by_y, 0, size_t(x.m) * image);
    return;
  }
  x.wide ? conv_work<double>(x).run() : conv_work<float>(x).run();
}

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
