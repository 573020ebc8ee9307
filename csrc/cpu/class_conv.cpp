// The entry of the convolution kernels: chooses type and algorithm. ddfast/ops/class_weight_grad.py
// says which algorithm is fastest where.
#include "conv.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

template <typename T> int64_t scratch_of(const class_conv_arguments &x) {
  if (x.winograd) return winograd_scratch<T>(x);
  return x.product == conv_by_weight ? direct_weight_grad_scratch<T>(x) : direct_scratch<T>(x);
}

template <typename T> void run(const class_conv_arguments &x) {
  if (x.winograd) return winograd<T>(x);
  x.product == conv_by_weight ? direct_weight_grad<T>(x) : direct_conv<T>(x);
}

}  // namespace

int64_t class_conv_scratch(const class_conv_arguments &x) {
  return x.type == float64 ? scratch_of<double>(x) : scratch_of<float>(x);
}

void class_conv(const class_conv_arguments &x) { x.type == float64 ? run<double>(x) : run<float>(x); }

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
