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

struct kernel_table {
  const char *level;
  // value = distance; out_syn, out_real = scale * its gradient
  void (*gradient_distance)(const gradient_distance_arguments &);
  // value = <cotangents, gradient>; out_syn, out_real = scale * gradient of that
  void (*gradient_distance_second)(const gradient_distance_arguments &);
};

// Defined once per level in table.cpp.
const kernel_table *kernel_table_portable();
const kernel_table *kernel_table_x86_64_v3();
const kernel_table *kernel_table_x86_64_v4();

}  // namespace ddfast
