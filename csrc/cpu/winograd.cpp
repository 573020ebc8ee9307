#include "conv.h"
namespace ddfast {
namespace DDFAST_LEVEL {
template <typename T> int64_t winograd_scratch(const class_conv_arguments &) { return 0; }
template <typename T> void winograd(const class_conv_arguments &) {}
template int64_t winograd_scratch<float>(const class_conv_arguments &);
template int64_t winograd_scratch<double>(const class_conv_arguments &);
template void winograd<float>(const class_conv_arguments &);
template void winograd<double>(const class_conv_arguments &);
}  // namespace DDFAST_LEVEL
}  // namespace ddfast
