// The first block of a network: convolution of images with few channels, normalisation, activation,
// pooling. What the convolution writes is many times as large as the images and as the block's
// result, so it lives in a slab of one or a few images that stays in the second cache, and the
// backward pass computes it again.
//
// A slab of images of one class is the unit of work; its size follows from the shape alone, and
// slabs are added in order, so that no sum depends on the number of threads.
#include "conv.h"

namespace ddfast {
namespace DDFAST_LEVEL {

int64_t class_conv_scratch(const class_conv_arguments &);
void class_conv(const class_conv_arguments &);
void norm_relu_pool(const norm_relu_pool_arguments &);
void norm_relu_pool_bwd(const norm_relu_pool_arguments &);

namespace {

constexpr int64_t slab_bytes = 512 << 10;
constexpr int64_t most_images = 32;

struct slab {
  int64_t c, first, count;
};

template <typename T> struct first_block_plan {
  const first_block_arguments &x;
  conv_geometry g;
  int64_t group, slab_count = 0, weight_elements, conv_scratch, grad_scratch, thread_bytes;
  slab *slabs;
  T *partial;
  char *local;

  bool backward() const { return x.conv.out != nullptr; }
  int64_t slab_elements() const { return group * g.out_pixels() * g.outputs; }

  class_conv_arguments conv_of(const int64_t *first) const {
    class_conv_arguments conv = x.conv;
    conv.product = conv_by_grad;
    conv.classes = 1;
    conv.first = first;
    conv.threads = 1;
    return conv;
  }

  first_block_plan(const first_block_arguments &arguments, arena &memory) : x(arguments), g(geometry_of(x.conv)) {
    const int64_t image_bytes = most(1, g.out_pixels() * g.outputs * int64_t(sizeof(T)));
    group = least(most_images, most(1, slab_bytes / image_bytes));
    for (int64_t c = 0; c < x.conv.classes; ++c) slab_count += ceiling(x.conv.first[c + 1] - x.conv.first[c], group);
    weight_elements = g.outputs * g.channels * g.taps();
    const int64_t whole[2] = {0, group};
    class_conv_arguments conv = conv_of(whole);
    conv_scratch = class_conv_scratch(conv);
    conv.product = conv_by_weight;
    grad_scratch = backward() ? class_conv_scratch(conv) : 0;
    slabs = memory.take<slab>(slab_count);
    partial = memory.take<T>(backward() ? slab_count * weight_elements : 0);
    arena one{nullptr};
    cut(one);
    thread_bytes = one.used;
    local = memory.take<char>(x.norm.threads * thread_bytes);
  }

  struct thread_memory {
    T *z, *gz;
    char *conv, *grad;
  };
  thread_memory cut(arena &memory) const {
    T *z = memory.take<T>(slab_elements());
    T *gz = memory.take<T>(backward() ? slab_elements() : 0);
    char *conv = memory.take<char>(conv_scratch);
    return {z, gz, conv, memory.take<char>(grad_scratch)};
  }

  void fill() {
    int64_t at = 0;
    for (int64_t c = 0; c < x.conv.classes; ++c)
      for (int64_t n = x.conv.first[c]; n < x.conv.first[c + 1]; n += group)
        slabs[at++] = {c, n, least(group, x.conv.first[c + 1] - n)};
  }

  static T *moved(const void *pointer, int64_t elements) {
    return pointer ? static_cast<T *>(const_cast<void *>(pointer)) + elements : nullptr;
  }

  void run(int64_t task, const thread_memory &m) const {
    const slab &s = slabs[task];
    const int64_t range[2] = {0, s.count}, outputs = g.outputs;
    class_conv_arguments conv = conv_of(range);
    conv.images = moved(x.conv.images, s.first * g.pixels() * g.channels);
    conv.out = m.z;
    conv.scratch = m.conv;
    class_conv(conv);
    if (const T *bias = static_cast<const T *>(x.bias))
      for (int64_t p = 0; p < s.count * g.out_pixels(); ++p)
        for (int64_t o = 0; o < outputs; ++o) m.z[p * outputs + o] += bias[o];

    const int64_t half = x.norm.pool == 2 ? 1 : 2;
    const int64_t pooled = s.first * (g.out_height / half) * (g.out_width / half) * outputs;
    norm_relu_pool_arguments norm = x.norm;
    norm.images = s.count;
    norm.x = m.z;
    norm.mean = moved(x.norm.mean, s.first * x.norm.groups);
    norm.rstd = moved(x.norm.rstd, s.first * x.norm.groups);
    norm.threads = 1;
    if (!backward()) {
      norm.out = moved(x.norm.out, pooled);
      return norm_relu_pool(norm);
    }
    norm.grad = moved(x.norm.grad, pooled);
    norm.out = m.gz;
    norm.out_weight = moved(x.norm.out_weight, s.first * outputs);
    norm.out_bias = moved(x.norm.out_bias, s.first * outputs);
    norm_relu_pool_bwd(norm);
    if (T *sums = moved(x.out_bias, s.first * outputs)) add_planes(m.gz, s.count, m.z, sums);
    conv.product = conv_by_weight;
    conv.other = m.gz;
    conv.out = partial + task * weight_elements;
    conv.scratch = m.grad;
    class_conv(conv);
  }

  // sums[image][o] = sum over the plane, row by row: less rounding than one long sum. `row` is scratch.
  void add_planes(const T *gz, int64_t images, T *__restrict__ row, T *__restrict__ sums) const {
    const int64_t outputs = g.outputs;
    for (int64_t n = 0; n < images; ++n, sums += outputs) {
      memset(sums, 0, size_t(outputs) * sizeof(T));
      for (int64_t y = 0; y < g.out_height; ++y) {
        memset(row, 0, size_t(outputs) * sizeof(T));
        for (int64_t px = 0; px < g.out_width; ++px, gz += outputs)
          for (int64_t o = 0; o < outputs; ++o) row[o] += gz[o];
        for (int64_t o = 0; o < outputs; ++o) sums[o] += row[o];
      }
    }
  }

  void add_slabs(int64_t c) const {
    T *out = static_cast<T *>(x.conv.out) + c * weight_elements;
    memset(out, 0, size_t(weight_elements) * sizeof(T));
    for (int64_t task = 0; task < slab_count; ++task)
      if (slabs[task].c == c)
        for (int64_t i = 0; i < weight_elements; ++i) out[i] += partial[task * weight_elements + i];
  }
};

template <typename T> void run(const first_block_arguments &x) {
  arena memory{static_cast<char *>(x.conv.scratch)};
  first_block_plan<T> plan(x, memory);
  plan.fill();
#ifdef _OPENMP
#pragma omp parallel num_threads(x.norm.threads) if (x.norm.threads > 1)
#endif
  {
    int thread = 0;
#ifdef _OPENMP
    thread = omp_get_thread_num();
#endif
    arena mine{plan.local + thread * plan.thread_bytes};
    const typename first_block_plan<T>::thread_memory m = plan.cut(mine);
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
    for (int64_t task = 0; task < plan.slab_count; ++task) plan.run(task, m);
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
    for (int64_t c = 0; c < (plan.backward() ? x.conv.classes : 0); ++c) plan.add_slabs(c);
  }
}

template <typename T> int64_t scratch_bytes(const first_block_arguments &x) {
  arena memory{nullptr};
  const first_block_plan<T> plan(x, memory);
  return memory.used;
}

}  // namespace

int64_t first_block_scratch(const first_block_arguments &x) {
  return x.norm.type == float64 ? scratch_bytes<double>(x) : scratch_bytes<float>(x);
}

void first_block(const first_block_arguments &x) { x.norm.type == float64 ? run<double>(x) : run<float>(x); }

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
