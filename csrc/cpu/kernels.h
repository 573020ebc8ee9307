// The table of CPU kernels: one instance per instruction-set level, chosen at import.
#pragma once

#include <stdint.h>

namespace ddfast {

enum dtype : int { float32 = 0, float64 = 1, bfloat16_type = 2, float16_type = 3 };

// One weight tensor seen as classes x rows x length, contiguous. A null output is not written.
struct gradient_layer {
  const void *syn;
  const void *real;
  const void *cotangent_syn;   // second derivative only
  const void *cotangent_real;  // second derivative only
  void *out_syn;
  void *out_real;
  int64_t rows;
  int64_t length;
};

enum gradient_metric : int { row_cosine = 0, cosine = 1, mse = 2, l1 = 3 };

struct gradient_distance_arguments {
  int type;
  int metric;
  const gradient_layer *layers;
  int64_t layer_count;
  int64_t classes;
  double epsilon;
  const double *scale;  // per class, multiplies the outputs; null: 1
  double *value;        // per class
  int threads;
};

// Rows of features, class after class; the columns of one row lie side by side.
struct class_rows {
  const void *data;  // null: not given
  int type;
  int64_t class_stride;  // in elements, for classes of equal size
  int64_t row_stride;
  int64_t rows;              // of each class, if equal
  const int64_t *first_row;  // classes + 1 entries; null if equal
};

struct class_mean_arguments {
  class_rows syn;
  class_rows real;  // may be missing
  int wide;         // sums and outputs in double, else in float
  int64_t classes;
  int64_t width;
  void *out;       // classes x width: the mean of syn, less that of real if given
  void *distance;  // per class, the sum of its squares; null without real
  int threads;
};

enum augment_operation : int {
  augment_color = 0,
  augment_crop = 1,
  augment_cutout = 2,
  augment_flip = 3,
  augment_scale = 4,
  augment_rotate = 5
};

// Contiguous images x channels x height x width; ddfast/reference/augment.py explains the record.
struct augment_arguments {
  int type;
  const void *input;
  void *output;
  const double *record;  // rows x 4: operation and three parameters
  int64_t rows;          // as many as images, or 1 for all of them
  int64_t images, channels, height, width;
  bool align_corners;
  bool offset;   // false: the linear part only
  bool adjoint;  // the transpose of the linear part
  int threads;
};

// The three products of a convolution of stride 1 with a weight for each class of images.
enum conv_product : int { conv_by_grad = 0, conv_by_input = 1, conv_by_weight = 2 };

// Images channels-last (images x height x width x channels), weights classes x O x I x kh x kw. The
// type is float32 or float64.
struct class_conv_arguments {
  int type;
  int product;   // which of the three is computed, from the two others
  bool winograd;  // F(4x4, 3x3): kernel 3x3, padding 1, sides divisible by 4
  const void *images;  // x, or grad for conv_by_input
  const void *other;   // weights, or grad for conv_by_weight
  void *out;
  const int64_t *first;  // first image of each class, classes + 1 entries
  int64_t classes;
  int64_t in_channels, out_channels;  // I, O
  int64_t height, width;              // of x
  int64_t kernel_height, kernel_width, padding;
  void *scratch;  // as many bytes as class_conv_scratch asks for, 64-byte aligned
  int threads;
};

// Images x channels x height x width, contiguous or channels_last; a missing tensor is null.
struct norm_relu_pool_arguments {
  int type;  // float32 or float64, of every tensor
  bool channels_last;
  int64_t images, channels, height, width;
  int64_t groups;  // 0: no normalisation
  double eps;
  int activation;  // relu, leaky_relu, sigmoid, swish
  int pool;        // average, max, none
  const void *x, *tangent, *grad, *grad_tangent;
  const void *weight, *bias, *weight_tangent, *bias_tangent;  // per channel
  int64_t weight_tangent_stride, bias_tangent_stride;         // from image to image, 0: shared
  void *mean, *rstd;                                          // images x groups
  void *out;
  void *out_weight, *out_bias;  // images x channels
  int threads;
  // norm_relu_pool_means only: classes x channels x height x width, and the first image of each
  // class, classes + 1 entries.
  void *means;
  const int64_t *first;
  int64_t classes;
};

// The first block of a network: a convolution, then norm_relu_pool on what it writes.
struct first_block_arguments {
  class_conv_arguments conv;      // by_grad, with one weight for all classes; with out, where each
                                  // class's weight gradients go: backward
  norm_relu_pool_arguments norm;  // x null; backward: out null
  const void *bias;               // of the convolution; may be missing
  void *out_bias;                 // backward: images x O, may be missing
};

// Contiguous images x channels x height x width and factor^2 as many of them; fill where the crops
// reach beyond the image.
struct multi_formation_arguments {
  int type;
  const void *input;
  void *output;
  int64_t images, channels, height, width;  // of the smaller set
  int64_t factor;
  bool by_image;  // the crops of one image follow each other, else the images of one crop
  bool adjoint;   // from the larger set to the smaller one
  double fill;
  int threads;
};

enum mmd_kind : int { mmd_gaussian = 0, mmd_laplace = 1, mmd_energy = 2, mmd_polynomial = 3, mmd_linear = 4 };

// Two sets of equal classes; the value and its gradient with respect to either.
struct mmd_arguments {
  class_rows x, y;
  int wide;  // computed, and gradients written, in double, else in float
  int64_t classes;
  int64_t width;
  int kind;
  int degree;  // of the polynomial
  bool unbiased;
  const double *bandwidth;  // classes x bandwidths
  int64_t bandwidths;
  const double *scale;  // per class, multiplies the gradients; null: 1
  double *value;        // per class: MMD^2, or the bandwidth
  void *by_x, *by_y;    // classes x rows x width; null: not wanted
  void *scratch;        // as many bytes as mmd_scratch asks for, 64-byte aligned
  int threads;
};

// Features or frequencies, classes x rows x width; the columns of one row lie side by side.
struct class_matrix {
  const void *data;  // null: drawn frequencies
  int type;
  int64_t bytes;  // of an element
  int64_t class_stride, row_stride;  // in elements
};

struct characteristic_function_arguments {
  class_matrix x, t;
  int wide;  // sums and results in double, else in float
  int64_t classes, rows, count, width;
  bool shared;     // one t for all classes, whose class stride is 0
  uint64_t seed;   // of drawn frequencies
  int64_t stream;  // of the first class
  double scale;
  void *phase;       // classes x rows x count, the products <x, t>: written forward, read backward; may be null
  void *phi;         // forward: classes x count x 2
  const void *grad;  // backward: classes x count x 2
  void *by_x, *by_t;  // in the type of the sums; may be null. by_t is summed if t is shared
  void *scratch;      // as many bytes as characteristic_function_scratch asks for, 64-byte aligned
  int threads;
};

struct trajectory_arguments {
  int type;
  int64_t size;
  const void *theta;
  const void *gradient;  // null: no step, theta itself is compared
  const void *total;     // with gradient, in the type of the sums
  const void *start, *target;
  void *next, *next_total;  // with gradient
  double lr;
  double *squares;  // two: of the result, and of start, from the target
  int threads;
};

// NNGP or NTK of a fully connected ReLU network for all pairs of rows of x and y (null: x itself), or
// its gradient. Classes are not used.
struct dense_kernel_arguments {
  class_rows x, y;
  int wide;  // computed and written in double, else in float
  int64_t width;
  bool ntk;
  int64_t depth;  // ReLU layers
  double weight_var, bias_var;
  void *gram;        // n x m: the covariance behind the first layer; forward: null or written
  void *out;         // forward: n x m
  const void *grad;  // n x m: backward
  void *by_x, *by_y;  // backward: n x width, m x width; null: not wanted
  void *scratch;
  int threads;
};

// The NNGP or NTK of a convolutional ReLU network, ddfast/reference/conv_kernel.py.
struct conv_kernel_arguments {
  bool wide;           // everything is double, else float
  const void *x, *y;   // contiguous n (m) x channels x height x width; y null: x, a symmetric matrix
  int64_t n, m;        // equal without y
  int64_t channels, height, width;
  bool ntk, gap;
  const unsigned char *pools;  // per layer: a pool follows
  int layers;                  // at least 1
  double weight_var, bias_var;
  void *out;         // forward: n x m
  const void *grad;  // backward: n x m
  void *by_x, *by_y;  // backward, as x and y; null: not wanted. Without y, by_x is all of the gradient
  void *scratch;      // as many bytes as conv_kernel_scratch asks for, 64-byte aligned
  int threads;
};

struct kernel_table {
  const char *level;
  // value = distance; out_syn, out_real = scale * its gradient
  void (*gradient_distance)(const gradient_distance_arguments &);
  // value = <cotangents, gradient>; out_syn, out_real = scale * gradient of that
  void (*gradient_distance_second)(const gradient_distance_arguments &);
  void (*class_mean)(const class_mean_arguments &);
  // The first row of the record that is not valid, in which case nothing is written; -1: none.
  int64_t (*augment)(const augment_arguments &);
  int64_t (*class_conv_scratch)(const class_conv_arguments &);
  void (*class_conv)(const class_conv_arguments &);
  void (*norm_relu_pool)(const norm_relu_pool_arguments &);
  void (*norm_relu_pool_bwd)(const norm_relu_pool_arguments &);
  void (*norm_relu_pool_means)(const norm_relu_pool_arguments &);
  void (*norm_relu_pool_tangent)(const norm_relu_pool_arguments &);
  void (*norm_relu_pool_tangent_bwd)(const norm_relu_pool_arguments &);
  int64_t (*first_block_scratch)(const first_block_arguments &);
  void (*first_block)(const first_block_arguments &);
  void (*multi_formation)(const multi_formation_arguments &);
  int64_t (*mmd_scratch)(const mmd_arguments &);
  void (*mmd)(const mmd_arguments &);
  // value = mean, or lower median, of the squared distances within the pooled rows
  void (*mmd_mean_distance)(const mmd_arguments &);
  void (*mmd_median_distance)(const mmd_arguments &);
  int64_t (*characteristic_function_scratch)(const characteristic_function_arguments &);
  void (*characteristic_function)(const characteristic_function_arguments &);
  void (*trajectory)(const trajectory_arguments &);
  int64_t (*dense_kernel_scratch)(const dense_kernel_arguments &);
  void (*dense_kernel)(const dense_kernel_arguments &);
  int64_t (*conv_kernel_scratch)(const conv_kernel_arguments &);
  void (*conv_kernel)(const conv_kernel_arguments &);
};

// Defined once per level in table.cpp.
const kernel_table *kernel_table_portable();
const kernel_table *kernel_table_x86_64_v3();
const kernel_table *kernel_table_x86_64_v4();

}  // namespace ddfast
