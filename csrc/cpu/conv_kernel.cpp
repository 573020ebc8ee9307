// The convolutional kernel of two sets of images: variances of every image, then the pairs, as many
// at a time as a vector has lanes, then, backward, each image's own covariance once more.
//
// A task is a block of y (one image a lane) against some rows of x; what it does depends on neither the
// number of threads nor that of tasks, and gradients are added up in the order of the tasks. So results
// are the same bits for any number of threads, and an entry depends on nothing but its two images.
#include "conv_kernel.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

constexpr int64_t rows_of_task = 4;

int64_t round_up(int64_t bytes) { return (bytes + line_bytes - 1) / line_bytes * line_bytes; }

template <typename T> struct conv_work {
  const conv_kernel_arguments &x;
  conv_plan plan, own_plan;
  bool backward;
  int64_t pixels, blocks, chunks, groups;
  int threads;
  // Where things lie in scratch.
  T *variances[2], *by_variances[2];  // per image, layer and position
  char *memories;
  int64_t memory_bytes;
  int64_t bytes;

  static constexpr int64_t lanes_ = width_of<T>;

  explicit conv_work(const conv_kernel_arguments &arguments)
      : x(arguments), plan(conv_plan_of(arguments, false)), own_plan(conv_plan_of(arguments, true)),
        backward(arguments.grad != nullptr) {
    pixels = x.channels * x.height * x.width;
    blocks = (x.m + lanes_ - 1) / lanes_;
    chunks = (x.n + rows_of_task - 1) / rows_of_task;
    groups = (x.n + lanes_ - 1) / lanes_ + (x.y ? blocks : 0);
    const int64_t tasks = blocks * chunks > groups ? blocks * chunks : groups;
    threads = int(tasks < x.threads ? (tasks > 0 ? tasks : 1) : x.threads);
    char *data = static_cast<char *>(x.scratch);
    bytes = 0;
    const auto take = [&](int64_t count) {
      T *const part = data ? reinterpret_cast<T *>(data + bytes) : nullptr;
      bytes += round_up(count * int64_t(sizeof(T)));
      return part;
    };
    for (int side = 0; side < 2; ++side) {
      const int64_t images = side == 0 ? x.n : x.y ? x.m : 0;
      variances[side] = take(images * plan.positions);
      by_variances[side] = take(backward ? images * plan.positions : 0);
    }
    if (!x.y) variances[1] = variances[0], by_variances[1] = by_variances[0];
    const int64_t pair = conv_divide<T>(plan, x.ntk, backward, nullptr, nullptr) + chunk_bytes();
    const int64_t own = conv_divide<T>(own_plan, false, backward, nullptr, nullptr);
    memory_bytes = pair > own ? pair : own;
    memories = data + bytes;
    bytes += threads * memory_bytes;
  }

  // What the rows of a task receive: pixels as in conv_side, then norms.
  int64_t chunk_bytes() const {
    return backward ? round_up(rows_of_task * (pixels + plan.positions) * int64_t(sizeof(T))) : 0;
  }

  const T *image(int side, int64_t i) const {
    return static_cast<const T *>(side == 1 && x.y ? x.y : x.x) + i * pixels;
  }
  int64_t images(int side) const { return side == 0 ? x.n : x.m; }
  // Lanes beyond the last image repeat it.
  int64_t lane(int side, int64_t first, int64_t k) const {
    return first + k < images(side) ? first + k : images(side) - 1;
  }
  int64_t valid(int side, int64_t first) const {
    return images(side) - first < lanes_ ? images(side) - first : lanes_;
  }

  void pack_pixels(int side, int64_t first, T *out) const {
    const int64_t area = x.height * x.width;
    for (int64_t k = 0; k < lanes_; ++k) {
      const T *from = image(side, lane(side, first, k));
      for (int64_t c = 0; c < x.channels; ++c)
        for (int64_t p = 0; p < area; ++p) out[(p * x.channels + c) * lanes_ + k] = from[c * area + p];
    }
  }

  void pack_norms(int side, int64_t first, const conv_side<T> &out) const {
    const T *from[lanes_];
    for (int64_t k = 0; k < lanes_; ++k) from[k] = variances[side] + lane(side, first, k) * plan.positions;
    for (int64_t p = 0; p < plan.positions; ++p) {
      vector<T> v = {};
      for (int64_t k = 0; k < lanes_; ++k) v[k] = from[k][p];
      conv_norms_of(v, out.inverse + p * lanes_, out.root + p * lanes_);
    }
  }

  // One image for all lanes.
  void pack_one(int64_t i, const conv_side<T> &out) const {
    const int64_t area = x.height * x.width;
    const T *from = image(0, i), *v = variances[0] + i * plan.positions;
    for (int64_t c = 0; c < x.channels; ++c)
      for (int64_t p = 0; p < area; ++p) out.pixels[p * x.channels + c] = from[c * area + p];
    for (int64_t p = 0; p < plan.positions; p += lanes_) {
      vector<T> part = {};
      const int64_t left = plan.positions - p < lanes_ ? plan.positions - p : lanes_;
      memcpy(&part, v + p, size_t(left) * sizeof(T));
      conv_norms_of(part, out.inverse + p, out.root + p);
    }
  }

  // Adds gradients of `count` images from `first` on, which lie lane by lane.
  void unpack_pixels(int side, int64_t first, const vector<T> *by_pixels) const {
    T *const target = static_cast<T *>(side == 1 && x.y ? x.by_y : x.by_x);
    if (!target) return;
    const int64_t area = x.height * x.width;
    const T *from = reinterpret_cast<const T *>(by_pixels);
    for (int64_t k = 0; k < valid(side, first); ++k) {
      T *to = target + (first + k) * pixels;
      for (int64_t c = 0; c < x.channels; ++c)
        for (int64_t p = 0; p < area; ++p) to[c * area + p] += from[(p * x.channels + c) * lanes_ + k];
    }
  }
  void unpack_norms(int side, int64_t first, const vector<T> *by_norms) const {
    const T *from = reinterpret_cast<const T *>(by_norms);
    for (int64_t k = 0; k < valid(side, first); ++k) {
      T *to = by_variances[side] + (first + k) * plan.positions;
      for (int64_t p = 0; p < plan.positions; ++p) to[p] += from[p * lanes_ + k];
    }
  }

  conv_memory<T> memory_of_thread(bool own) const {
#ifdef _OPENMP
    const int64_t thread = omp_get_thread_num();
#else
    const int64_t thread = 0;
#endif
    conv_memory<T> memory;
    conv_divide(own ? own_plan : plan, !own && x.ntk, backward, memories + thread * memory_bytes, &memory);
    memset(static_cast<void *>(memory.zeros), 0, size_t(x.width) * sizeof(vector<T>));
    return memory;
  }

  // --- variances ---

  void group(int64_t g) {
    const int64_t of_x = (x.n + lanes_ - 1) / lanes_;
    const int side = g < of_x ? 0 : 1;
    const int64_t first = (side == 0 ? g : g - of_x) * lanes_;
    conv_memory<T> memory = memory_of_thread(true);
    memory.y = memory.x;
    pack_pixels(side, first, memory.x.pixels);
    conv_variances(memory);
    for (int64_t k = 0; k < valid(side, first); ++k)
      for (int64_t p = 0; p < plan.positions; ++p)
        variances[side][(first + k) * plan.positions + p] = memory.variances[p][k];
  }

  void group_backward(int64_t g) {
    const int64_t of_x = (x.n + lanes_ - 1) / lanes_;
    const int side = g < of_x ? 0 : 1;
    if (!(side == 0 ? x.by_x : x.by_y)) return;
    const int64_t first = (side == 0 ? g : g - of_x) * lanes_;
    conv_memory<T> memory = memory_of_thread(true);
    memory.y = memory.x;
    pack_pixels(side, first, memory.x.pixels);
    conv_variances(memory);
    // V itself is done with: its place takes what it receives, from log sqrt(V).
    for (int64_t p = 0; p < plan.positions; ++p) {
      vector<T> total = {};
      for (int64_t k = 0; k < lanes_; ++k) total[k] = by_variances[side][lane(side, first, k) * plan.positions + p];
      const vector<T> inverse = read(memory.x.inverse + p * lanes_);
      memory.variances[p] = total * (inverse * inverse * T(0.5));
    }
    memory.by_variance = memory.variances;
    memory.by_pixels_y = memory.by_pixels_x, memory.by_norms_y = memory.by_norms_x;
    memset(static_cast<void *>(memory.by_pixels_x), 0, size_t(pixels) * sizeof(vector<T>));
    memset(static_cast<void *>(memory.by_norms_x), 0, size_t(plan.positions) * sizeof(vector<T>));
    conv_variances_backward(memory);
    unpack_pixels(side, first, memory.by_pixels_x);
  }

  // --- pairs ---

  // Rows of x that a block's images are paired with: without y, those up to its last one.
  int64_t last_row(int64_t first) const { return x.y ? x.n : first + valid(1, first); }

  void write_entries(int64_t i, int64_t first, const vector<T> &values) const {
    T *out = static_cast<T *>(x.out);
    for (int64_t k = 0; k < valid(1, first); ++k) {
      const int64_t j = first + k;
      if (!x.y && j < i) continue;
      out[i * x.m + j] = values[k];
      if (!x.y) out[j * x.m + i] = values[k];
    }
  }

  void cotangents_of(int64_t i, int64_t first, T *found) const {
    const T *grad = static_cast<const T *>(x.grad);
    for (int64_t k = 0; k < lanes_; ++k) found[k] = 0;
    for (int64_t k = 0; k < valid(1, first); ++k) {
      const int64_t j = first + k;
      if (!x.y && j < i) continue;
      found[k] = grad[i * x.m + j];
      if (!x.y && j > i) found[k] += grad[j * x.m + i];
    }
  }

  // The memory of a task, whose y is in place; false if there is nothing to do.
  bool begin(int64_t task, conv_memory<T> *memory, int64_t *first, int64_t *row, int64_t *end) const {
    *first = task / chunks * lanes_;
    *row = task % chunks * rows_of_task;
    *end = *row + rows_of_task < last_row(*first) ? *row + rows_of_task : last_row(*first);
    if (*row >= *end) return false;
    *memory = memory_of_thread(false);
    pack_pixels(1, *first, memory->y.pixels);
    pack_norms(1, *first, memory->y);
    return true;
  }

  void task_forward(int64_t task) const {
    conv_memory<T> memory;
    int64_t first, row, end;
    if (!begin(task, &memory, &first, &row, &end)) return;
    for (int64_t i = row; i < end; ++i) {
      pack_one(i, memory.x);
      T k[lanes_], t[lanes_];
      conv_forward(memory, true, k, t);
      vector<T> value = read(k) * T(plan.readout) + T(plan.bias_var);
      if (x.ntk) value = read(t) * T(plan.readout) + value;
      write_entries(i, first, value);
    }
  }

  // The gradients of a task stay in the thread's memory, for `add`.
  bool task_backward(int64_t task, conv_memory<T> *memory, int64_t *first, int64_t *row, int64_t *end) const {
    if (!begin(task, memory, first, row, end)) return false;
    if (!x.by_x) memory->by_pixels_x = memory->by_norms_x = nullptr;
    if (x.y && !x.by_y) memory->by_pixels_y = memory->by_norms_y = nullptr;
    clear(memory->by_pixels_y, pixels);
    clear(memory->by_norms_y, plan.positions);
    T *chunk = chunk_of(*memory);
    for (int64_t i = *row; i < *end; ++i, chunk += pixels + plan.positions) {
      clear(memory->by_pixels_x, pixels);
      clear(memory->by_norms_x, plan.positions);
      pack_one(i, memory->x);
      T k[lanes_], t[lanes_], cotangents[lanes_];
      cotangents_of(i, *first, cotangents);
      conv_forward(*memory, true, k, t);
      conv_backward(*memory, true, cotangents);
      if (!memory->by_pixels_x) continue;
      for (int64_t p = 0; p < pixels; ++p) chunk[p] = lane_sum(memory->by_pixels_x[p]);
      for (int64_t p = 0; p < plan.positions; ++p) chunk[pixels + p] = lane_sum(memory->by_norms_x[p]);
    }
    return true;
  }

  static void clear(vector<T> *data, int64_t count) {
    if (data) memset(static_cast<void *>(data), 0, size_t(count) * sizeof(vector<T>));
  }
  static T lane_sum(vector<T> v) {
    for (int64_t half = lanes_ / 2; half > 0; half /= 2)
      for (int64_t k = 0; k < half; ++k) v[k] += v[k + half];
    return v[0];
  }
  // Behind what conv_divide takes.
  T *chunk_of(const conv_memory<T> &memory) const {
    char *const start = reinterpret_cast<char *>(memory.x.pixels);
    return reinterpret_cast<T *>(start + conv_divide<T>(plan, x.ntk, backward, nullptr, nullptr));
  }

  void add(const conv_memory<T> &memory, int64_t first, int64_t row, int64_t end) const {
    if (memory.by_pixels_y) {
      unpack_pixels(1, first, memory.by_pixels_y);
      unpack_norms(1, first, memory.by_norms_y);
    }
    if (!memory.by_pixels_x) return;
    const int64_t area = x.height * x.width;
    const T *chunk = chunk_of(memory);
    for (int64_t i = row; i < end; ++i, chunk += pixels + plan.positions) {
      T *to = static_cast<T *>(x.by_x) + i * pixels, *norms = by_variances[0] + i * plan.positions;
      for (int64_t c = 0; c < x.channels; ++c)
        for (int64_t p = 0; p < area; ++p) to[c * area + p] += chunk[p * x.channels + c];
      for (int64_t p = 0; p < plan.positions; ++p) norms[p] += chunk[pixels + p];
    }
  }

  void run() {
    if (backward) {
      for (int side = 0; side < (x.y ? 2 : 1); ++side)
        memset(by_variances[side], 0, size_t(images(side) * plan.positions) * sizeof(T));
      if (x.by_x) memset(x.by_x, 0, size_t(x.n * pixels) * sizeof(T));
      if (x.by_y && x.y) memset(x.by_y, 0, size_t(x.m * pixels) * sizeof(T));
    }
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
    {
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
      for (int64_t g = 0; g < groups; ++g) group(g);
      if (!backward) {
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
        for (int64_t task = 0; task < blocks * chunks; ++task) task_forward(task);
      } else {
#ifdef _OPENMP
#pragma omp for ordered schedule(dynamic, 1)
#endif
        for (int64_t task = 0; task < blocks * chunks; ++task) {
          conv_memory<T> memory;
          int64_t first, row, end;
          const bool any = task_backward(task, &memory, &first, &row, &end);
#ifdef _OPENMP
#pragma omp ordered
#endif
          if (any) add(memory, first, row, end);
        }
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
        for (int64_t g = 0; g < groups; ++g) group_backward(g);
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
    const size_t image = size_t(x.channels * x.height * x.width) * (x.wide ? 8 : 4);
    if (x.by_x) memset(x.by_x, 0, size_t(x.n) * image);
    if (x.by_y) memset(x.by_y, 0, size_t(x.m) * image);
    return;
  }
  x.wide ? conv_work<double>(x).run() : conv_work<float>(x).run();
}

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
