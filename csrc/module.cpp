// ddfast._C: the CPU kernels behind raw pointers. No torch header is included, so one build serves
// every torch version; ddfast/ops checks types, shapes and lifetimes before it calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "buffer.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using ddfast::kernel_table;

namespace {

// Every level that was compiled and that this processor runs, the fastest first.
std::vector<const kernel_table *> usable_tables() {
  std::vector<const kernel_table *> tables;
#ifdef DDFAST_X86_LEVELS
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4) tables.push_back(ddfast::kernel_table_x86_64_v4());
  if (v3) tables.push_back(ddfast::kernel_table_x86_64_v3());
#endif
  tables.push_back(ddfast::kernel_table_portable());
  return tables;
}

const kernel_table *active = nullptr;

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (const kernel_table *table : usable_tables()) names.push_back(table->level);
  return names;
}

void set_level(const std::string &name) {
  for (const kernel_table *table : usable_tables())
    if (name == table->level) {
      active = table;
      return;
    }
  std::string message = "unknown instruction-set level '" + name + "'; this machine runs:";
  for (const std::string &level : levels()) message += " " + level;
  throw std::invalid_argument(message);
}

void *pointer(std::uintptr_t address) { return reinterpret_cast<void *>(address); }

// layers: (syn, real, cotangent_syn, cotangent_real, out_syn, out_real, rows, length) each.
std::vector<double> gradient_distance(const std::vector<std::array<std::uintptr_t, 8>> &layers, int type, int metric,
                                      std::int64_t classes, double epsilon, const std::vector<double> &scale,
                                      bool second, int threads) {
  std::vector<ddfast::gradient_layer> packed;
  packed.reserve(layers.size());
  for (const auto &l : layers)
    packed.push_back({pointer(l[0]), pointer(l[1]), pointer(l[2]), pointer(l[3]), pointer(l[4]), pointer(l[5]),
                      std::int64_t(l[6]), std::int64_t(l[7])});
  std::vector<double> value(classes, 0.0);
  ddfast::gradient_distance_arguments arguments{type,    metric,
                                                packed.data(), std::int64_t(packed.size()),
                                                classes, epsilon,
                                                scale.empty() ? nullptr : scale.data(), value.data(),
                                                threads};
  {
    py::gil_scoped_release release;
    second ? active->gradient_distance_second(arguments) : active->gradient_distance(arguments);
  }
  return value;
}

// syn, real: (data, type, class stride, row stride, rows) and each class's first row, if classes
// are of unequal size; real empty: the mean of syn alone.
void class_mean(const std::vector<std::int64_t> &syn, const std::vector<std::int64_t> &syn_first,
                const std::vector<std::int64_t> &real, const std::vector<std::int64_t> &real_first, bool wide,
                std::int64_t classes, std::int64_t width, std::uintptr_t out, std::uintptr_t distance, int threads) {
  const auto rows = [](const std::vector<std::int64_t> &x, const std::vector<std::int64_t> &first) {
    if (x.empty()) return ddfast::class_rows{};
    return ddfast::class_rows{pointer(std::uintptr_t(x[0])), int(x[1]), x[2], x[3], x[4],
                              first.empty() ? nullptr : first.data()};
  };
  const ddfast::class_mean_arguments arguments{rows(syn, syn_first), rows(real, real_first), wide, classes, width,
                                               pointer(out), pointer(distance), threads};
  py::gil_scoped_release release;
  active->class_mean(arguments);
}

// shape: images, channels, height, width. Returns the first invalid row of the record, or -1.
std::int64_t augment(std::uintptr_t input, std::uintptr_t output, int type, std::uintptr_t record, std::int64_t rows,
                     const std::array<std::int64_t, 4> &shape, bool align_corners, bool offset, bool adjoint,
                     int threads) {
  const ddfast::augment_arguments arguments{type,
                                            pointer(input),
                                            pointer(output),
                                            static_cast<const double *>(pointer(record)),
                                            rows,
                                            shape[0],
                                            shape[1],
                                            shape[2],
                                            shape[3],
                                            align_corners,
                                            offset,
                                            adjoint,
                                            threads};
  py::gil_scoped_release release;
  return active->augment(arguments);
}

// first: first image of each class, and the end. sizes: I, O, H, W, kh, kw, padding.
void class_conv(int type, int product, bool winograd, std::uintptr_t images, std::uintptr_t other, std::uintptr_t out,
                const std::vector<std::int64_t> &first, const std::array<std::int64_t, 7> &sizes, int threads) {
  ddfast::class_conv_arguments arguments{type,
                                         product,
                                         winograd,
                                         pointer(images),
                                         pointer(other),
                                         pointer(out),
                                         first.data(),
                                         std::int64_t(first.size()) - 1,
                                         sizes[0],
                                         sizes[1],
                                         sizes[2],
                                         sizes[3],
                                         sizes[4],
                                         sizes[5],
                                         sizes[6],
                                         nullptr,
                                         threads};
  py::gil_scoped_release release;
  const ddfast::buffer scratch(std::size_t(active->class_conv_scratch(arguments)));
  arguments.scratch = scratch.data();
  active->class_conv(arguments);
}

// One of the four operators. tensors: x, tangent, grad, grad_tangent, weight, bias, weight_tangent,
// bias_tangent, mean, rstd, out, out_weight, out_bias; strides: of the two tangents.
template <void (*kernel_table::*member)(const ddfast::norm_relu_pool_arguments &)>
void norm_relu_pool(int type, bool channels_last, const std::array<std::int64_t, 4> &shape, std::int64_t groups,
                    double eps, int activation, int pool, const std::array<std::uintptr_t, 13> &tensors,
                    const std::array<std::int64_t, 2> &strides, int threads) {
  const ddfast::norm_relu_pool_arguments arguments{type,
                                                   channels_last,
                                                   shape[0],
                                                   shape[1],
                                                   shape[2],
                                                   shape[3],
                                                   groups,
                                                   eps,
                                                   activation,
                                                   pool,
                                                   pointer(tensors[0]),
                                                   pointer(tensors[1]),
                                                   pointer(tensors[2]),
                                                   pointer(tensors[3]),
                                                   pointer(tensors[4]),
                                                   pointer(tensors[5]),
                                                   pointer(tensors[6]),
                                                   pointer(tensors[7]),
                                                   strides[0],
                                                   strides[1],
                                                   pointer(tensors[8]),
                                                   pointer(tensors[9]),
                                                   pointer(tensors[10]),
                                                   pointer(tensors[11]),
                                                   pointer(tensors[12]),
                                                   threads};
  py::gil_scoped_release release;
  (active->*member)(arguments);
}

// tensors: x, weight, bias, mean, rstd, out, means. first: first image of each class, and the end.
void norm_relu_pool_means(int type, bool channels_last, const std::array<std::int64_t, 4> &shape, std::int64_t groups,
                          double eps, int activation, int pool, const std::array<std::uintptr_t, 7> &tensors,
                          const std::vector<std::int64_t> &first, int threads) {
  ddfast::norm_relu_pool_arguments x{};
  x.type = type;
  x.channels_last = channels_last;
  x.images = shape[0], x.channels = shape[1], x.height = shape[2], x.width = shape[3];
  x.groups = groups;
  x.eps = eps;
  x.activation = activation;
  x.pool = pool;
  x.x = pointer(tensors[0]);
  x.weight = pointer(tensors[1]), x.bias = pointer(tensors[2]);
  x.mean = pointer(tensors[3]), x.rstd = pointer(tensors[4]);
  x.out = pointer(tensors[5]), x.means = pointer(tensors[6]);
  x.first = first.data();
  x.classes = std::int64_t(first.size()) - 1;
  x.threads = threads;
  py::gil_scoped_release release;
  active->norm_relu_pool_means(x);
}

// tensors: x, weight, bias, norm weight, norm bias, mean, rstd, then out (forward) or grad, weight
// gradients, and sums of each image for bias, norm weight and norm bias. sizes: as for class_conv.
void first_block(int type, const std::vector<std::uintptr_t> &tensors, const std::vector<std::int64_t> &first,
                 const std::array<std::int64_t, 7> &sizes, std::int64_t groups, double eps, int activation, int pool,
                 int threads) {
  const bool backward = tensors.size() > 8;
  const auto result = [&](std::size_t i) { return backward ? pointer(tensors[i]) : nullptr; };
  ddfast::first_block_arguments x{};
  x.conv = {type, ddfast::conv_by_grad, false, pointer(tensors[0]), pointer(tensors[1]), result(8), first.data(),
            std::int64_t(first.size()) - 1, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6],
            nullptr, threads};
  x.bias = pointer(tensors[2]);
  x.norm.type = type;
  x.norm.channels_last = true;
  x.norm.images = first.back();
  x.norm.channels = sizes[1];
  x.norm.height = sizes[2] + 2 * sizes[6] - sizes[4] + 1;
  x.norm.width = sizes[3] + 2 * sizes[6] - sizes[5] + 1;
  x.norm.groups = groups;
  x.norm.eps = eps;
  x.norm.activation = activation;
  x.norm.pool = pool;
  x.norm.weight = pointer(tensors[3]);
  x.norm.bias = pointer(tensors[4]);
  x.norm.mean = pointer(tensors[5]);
  x.norm.rstd = pointer(tensors[6]);
  x.norm.out = backward ? nullptr : pointer(tensors[7]);
  x.norm.grad = result(7);
  x.out_bias = result(9);
  x.norm.out_weight = result(10);
  x.norm.out_bias = result(11);
  x.norm.threads = threads;
  py::gil_scoped_release release;
  const ddfast::buffer scratch(std::size_t(active->first_block_scratch(x)));
  x.conv.scratch = scratch.data();
  active->first_block(x);
}

// shape: images, channels, height, width of the smaller set.
void multi_formation(std::uintptr_t input, std::uintptr_t output, int type, const std::array<std::int64_t, 4> &shape,
                     std::int64_t factor, bool by_image, bool adjoint, double fill, int threads) {
  const ddfast::multi_formation_arguments arguments{
      type,   pointer(input), pointer(output), shape[0], shape[1], shape[2], shape[3],
      factor, by_image,       adjoint,         fill,     threads};
  py::gil_scoped_release release;
  active->multi_formation(arguments);
}

// x, y: (data, type, class stride, row stride, rows). what: 0 the distance, 1 the mean and 2 the
// median of the squared distances.
std::vector<double> mmd(int what, const std::array<std::int64_t, 5> &x, const std::array<std::int64_t, 5> &y, bool wide,
                        std::int64_t classes, std::int64_t width, int kind, int degree, bool unbiased,
                        const std::vector<double> &bandwidth, std::int64_t bandwidths, const std::vector<double> &scale,
                        std::uintptr_t by_x, std::uintptr_t by_y, int threads) {
  const auto rows = [](const std::array<std::int64_t, 5> &set) {
    return ddfast::class_rows{pointer(std::uintptr_t(set[0])), int(set[1]), set[2], set[3], set[4], nullptr};
  };
  std::vector<double> value(classes, 0.0);
  ddfast::mmd_arguments arguments{rows(x),      rows(y),       wide,
                                  classes,      width,         kind,
                                  degree,       unbiased,      bandwidth.data(),
                                  bandwidths,   scale.empty() ? nullptr : scale.data(),
                                  value.data(), pointer(by_x), pointer(by_y),
                                  nullptr,      threads};
  py::gil_scoped_release release;
  if (what == 1) {
    active->mmd_mean_distance(arguments);
    return value;
  }
  const ddfast::buffer scratch(std::size_t(active->mmd_scratch(arguments)));
  arguments.scratch = scratch.data();
  what == 0 ? active->mmd(arguments) : active->mmd_median_distance(arguments);
  return value;
}

// x, t: (address, type, bytes of an element, class stride, row stride); t empty: drawn. sizes: classes,
// rows, count, width, whether t is shared. results: phi, or grad, by_x, by_t.
void characteristic_function(const std::vector<std::int64_t> &x, const std::vector<std::int64_t> &t, bool wide,
                             const std::array<std::int64_t, 5> &sizes, std::uint64_t seed, std::int64_t stream,
                             double scale, std::uintptr_t phase, const std::vector<std::uintptr_t> &results,
                             int threads) {
  const auto matrix = [](const std::vector<std::int64_t> &m) {
    if (m.empty()) return ddfast::class_matrix{};
    return ddfast::class_matrix{pointer(std::uintptr_t(m[0])), int(m[1]), m[2], m[3], m[4]};
  };
  const bool backward = results.size() == 3;
  ddfast::characteristic_function_arguments arguments{matrix(x),
                                                      matrix(t),
                                                      wide,
                                                      sizes[0],
                                                      sizes[1],
                                                      sizes[2],
                                                      sizes[3],
                                                      sizes[4] != 0,
                                                      seed,
                                                      stream,
                                                      scale,
                                                      pointer(phase),
                                                      backward ? nullptr : pointer(results[0]),
                                                      backward ? pointer(results[0]) : nullptr,
                                                      backward ? pointer(results[1]) : nullptr,
                                                      backward ? pointer(results[2]) : nullptr,
                                                      nullptr,
                                                      threads};
  py::gil_scoped_release release;
  const ddfast::buffer scratch(std::size_t(active->characteristic_function_scratch(arguments)));
  arguments.scratch = scratch.data();
  active->characteristic_function(arguments);
}

// tensors: theta, gradient, total, start, target, next, next_total; 0 for those of a step without one.
std::array<double, 2> trajectory(int type, std::int64_t size, const std::array<std::uintptr_t, 7> &tensors, double lr,
                                 int threads) {
  std::array<double, 2> squares{};
  const ddfast::trajectory_arguments arguments{type,
                                               size,
                                               pointer(tensors[0]),
                                               pointer(tensors[1]),
                                               pointer(tensors[2]),
                                               pointer(tensors[3]),
                                               pointer(tensors[4]),
                                               pointer(tensors[5]),
                                               pointer(tensors[6]),
                                               lr,
                                               squares.data(),
                                               threads};
  py::gil_scoped_release release;
  active->trajectory(arguments);
  return squares;
}

// x, y: (data, type, row stride, rows); y empty: x itself. tensors: gram, out, grad, by_x, by_y.
void dense_kernel(const std::vector<std::int64_t> &x, const std::vector<std::int64_t> &y, bool wide, std::int64_t width,
                  bool ntk, std::int64_t depth, double weight_var, double bias_var,
                  const std::array<std::uintptr_t, 5> &tensors, int threads) {
  const auto rows = [](const std::vector<std::int64_t> &set) {
    if (set.empty()) return ddfast::class_rows{};
    return ddfast::class_rows{pointer(std::uintptr_t(set[0])), int(set[1]), 0, set[2], set[3], nullptr};
  };
  ddfast::dense_kernel_arguments arguments{rows(x),
                                           rows(y),
                                           wide,
                                           width,
                                           ntk,
                                           depth,
                                           weight_var,
                                           bias_var,
                                           pointer(tensors[0]),
                                           pointer(tensors[1]),
                                           pointer(tensors[2]),
                                           pointer(tensors[3]),
                                           pointer(tensors[4]),
                                           nullptr,
                                           threads};
  py::gil_scoped_release release;
  const ddfast::buffer scratch(std::size_t(active->dense_kernel_scratch(arguments)));
  arguments.scratch = scratch.data();
  active->dense_kernel(arguments);
}

// shape: n, m, channels, height, width. tensors: x, y, then out (forward) or grad, by_x, by_y.
void conv_kernel(bool wide, const std::array<std::int64_t, 5> &shape, bool ntk, const std::vector<bool> &pools, bool gap,
                 double weight_var, double bias_var, const std::vector<std::uintptr_t> &tensors, int threads) {
  const bool backward = tensors.size() > 3;
  const std::vector<unsigned char> pooled(pools.begin(), pools.end());
  ddfast::conv_kernel_arguments x{};
  x.wide = wide;
  x.x = pointer(tensors[0]), x.y = pointer(tensors[1]);
  x.n = shape[0], x.m = shape[1], x.channels = shape[2], x.height = shape[3], x.width = shape[4];
  x.ntk = ntk, x.gap = gap;
  x.pools = pooled.data();
  x.layers = int(pooled.size());
  x.weight_var = weight_var, x.bias_var = bias_var;
  x.out = backward ? nullptr : pointer(tensors[2]);
  x.grad = backward ? pointer(tensors[2]) : nullptr;
  x.by_x = backward ? pointer(tensors[3]) : nullptr;
  x.by_y = backward ? pointer(tensors[4]) : nullptr;
  x.threads = threads;
  py::gil_scoped_release release;
  const ddfast::buffer scratch(std::size_t(active->conv_kernel_scratch(x)));
  x.scratch = scratch.data();
  active->conv_kernel(x);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of ddfast over raw pointers";
  active = usable_tables().front();
  m.def("levels", &levels, "instruction-set levels that this build and processor offer, fastest first");
  m.def("level", [] { return std::string(active->level); }, "the level in use");
  m.def("set_level", &set_level, "use this level from now on");
  py::class_<ddfast::buffer>(m, "Buffer", py::buffer_protocol())
      .def(py::init<std::size_t>())
      .def_buffer([](const ddfast::buffer &b) {
        return py::buffer_info(b.data(), 1, py::format_descriptor<std::uint8_t>::format(), py::ssize_t(b.bytes()));
      });
  m.def("held_bytes", [] { return ddfast::buffer_pool::instance().held(); }, "bytes kept for later outputs");
  m.def("release_buffers", [] { ddfast::buffer_pool::instance().release(); }, "give those bytes back");
  m.def("gradient_distance", &gradient_distance);
  m.def("class_mean", &class_mean);
  m.def("augment", &augment);
  m.def("class_conv", &class_conv);
  m.def("norm_relu_pool", &norm_relu_pool<&kernel_table::norm_relu_pool>);
  m.def("norm_relu_pool_bwd", &norm_relu_pool<&kernel_table::norm_relu_pool_bwd>);
  m.def("norm_relu_pool_tangent", &norm_relu_pool<&kernel_table::norm_relu_pool_tangent>);
  m.def("norm_relu_pool_tangent_bwd", &norm_relu_pool<&kernel_table::norm_relu_pool_tangent_bwd>);
  m.def("norm_relu_pool_means", &norm_relu_pool_means);
  m.def("first_block", &first_block);
  m.def("multi_formation", &multi_formation);
  m.def("mmd", &mmd);
  m.def("characteristic_function", &characteristic_function);
  m.def("trajectory", &trajectory);
  m.def("dense_kernel", &dense_kernel);
  m.def("conv_kernel", &conv_kernel);
}
