// Collects the kernels of one instruction-set level.
#include "kernels.h"

#ifndef DDFAST_LEVEL
#define DDFAST_LEVEL portable
#endif
#define DDFAST_JOIN_(a, b) a##b
#define DDFAST_JOIN(a, b) DDFAST_JOIN_(a, b)
#define DDFAST_TEXT_(a) #a
#define DDFAST_TEXT(a) DDFAST_TEXT_(a)

namespace ddfast {
namespace DDFAST_LEVEL {
void gradient_distance(const gradient_distance_arguments &);
void gradient_distance_second(const gradient_distance_arguments &);
void class_mean(const class_mean_arguments &);
int64_t augment(const augment_arguments &);
int64_t class_conv_scratch(const class_conv_arguments &);
void class_conv(const class_conv_arguments &);
void norm_relu_pool(const norm_relu_pool_arguments &);
void norm_relu_pool_bwd(const norm_relu_pool_arguments &);
void norm_relu_pool_means(const norm_relu_pool_arguments &);
void norm_relu_pool_tangent(const norm_relu_pool_arguments &);
void norm_relu_pool_tangent_bwd(const norm_relu_pool_arguments &);
int64_t first_block_scratch(const first_block_arguments &);
void first_block(const first_block_arguments &);
void multi_formation(const multi_formation_arguments &);
int64_t mmd_scratch(const mmd_arguments &);
void mmd(const mmd_arguments &);
void mmd_mean_distance(const mmd_arguments &);
void mmd_median_distance(const mmd_arguments &);
int64_t characteristic_function_scratch(const characteristic_function_arguments &);
void characteristic_function(const characteristic_function_arguments &);
void trajectory(const trajectory_arguments &);
int64_t dense_kernel_scratch(const dense_kernel_arguments &);
void dense_kernel(const dense_kernel_arguments &);
int64_t conv_kernel_scratch(const conv_kernel_arguments &);
void conv_kernel(const conv_kernel_arguments &);
}  // namespace DDFAST_LEVEL

const kernel_table *DDFAST_JOIN(kernel_table_, DDFAST_LEVEL)() {
  static const kernel_table table = {
      DDFAST_TEXT(DDFAST_LEVEL),
      DDFAST_LEVEL::gradient_distance,
      DDFAST_LEVEL::gradient_distance_second,
      DDFAST_LEVEL::class_mean,
      DDFAST_LEVEL::augment,
      DDFAST_LEVEL::class_conv_scratch,
      DDFAST_LEVEL::class_conv,
      DDFAST_LEVEL::norm_relu_pool,
      DDFAST_LEVEL::norm_relu_pool_bwd,
      DDFAST_LEVEL::norm_relu_pool_means,
      DDFAST_LEVEL::norm_relu_pool_tangent,
      DDFAST_LEVEL::norm_relu_pool_tangent_bwd,
      DDFAST_LEVEL::first_block_scratch,
      DDFAST_LEVEL::first_block,
      DDFAST_LEVEL::multi_formation,
      DDFAST_LEVEL::mmd_scratch,
      DDFAST_LEVEL::mmd,
      DDFAST_LEVEL::mmd_mean_distance,
      DDFAST_LEVEL::mmd_median_distance,
      DDFAST_LEVEL::characteristic_function_scratch,
      DDFAST_LEVEL::characteristic_function,
      DDFAST_LEVEL::trajectory,
      DDFAST_LEVEL::dense_kernel_scratch,
      DDFAST_LEVEL::dense_kernel,
      DDFAST_LEVEL::conv_kernel_scratch,
      DDFAST_LEVEL::conv_kernel,
  };
  return &table;
}

}  // namespace ddfast
