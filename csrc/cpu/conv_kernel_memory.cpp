// The memory that one thread walks through a convolutional network in.
#include "conv_kernel.h"

namespace ddfast {
namespace DDFAST_LEVEL {

template <typename T>
int64_t conv_divide(const conv_plan &plan, bool ntk, bool backward, char *data, conv_memory<T> *memory) {
  conv_memory<T> found{};
  found.plan = &plan;
  int64_t used = 0;
  const auto take = [&](int64_t count) {
    vector<T> *const part = data ? reinterpret_cast<vector<T> *>(data + used) : nullptr;
    used += (count * int64_t(sizeof(vector<T>)) + line_bytes - 1) / line_bytes * line_bytes;
    return part;
  };
  const auto take_rows = [&](int64_t count) {
    vector<T> *const k = take(count);
    return conv_rows<T>{k, ntk ? take(count) : nullptr};
  };
  const conv_stage &first = plan.stage[0];
  const int64_t pixels = first.height * first.width * plan.channels;
  const auto take_side = [&](conv_side<T> *side) {
    side->pixels = reinterpret_cast<T *>(take(pixels));
    side->inverse = reinterpret_cast<T *>(take(plan.positions));
    side->root = reinterpret_cast<T *>(take(plan.positions));
  };
  take_side(&found.x);
  take_side(&found.y);
  for (int s = 0; s < plan.stages; ++s) {
    const conv_stage &stage = plan.stage[s];
    if (s > 0) found.storage[s] = take_rows(stage.pairs());
    if (stage.layers < 2) continue;
    if (found.plane == 0) found.plane = stage.height * stage.width;  // later stages are smaller
    if (stage.layers - 1 > found.inner) found.inner = stage.layers - 1;
  }
  if (!backward && found.inner > 2) found.inner = 2;
  found.between = take_rows(found.inner * found.plane);
  if (backward) found.adjoint = take_rows(found.plane);
  for (conv_rows<T> &ring : found.ring) ring = take_rows(first.width);
  for (conv_rows<T> &ring : found.back_ring) ring = take_rows(first.width);
  found.row = take_rows(first.width);
  found.row2 = take_rows(first.width);
  found.zeros = take(first.width);
  if (backward) {
    found.by_pixels_x = take(pixels);
    found.by_pixels_y = take(pixels);
    found.by_norms_x = take(plan.positions);
    found.by_norms_y = take(plan.positions);
  }
  found.variances = take(plan.positions);
  if (memory) *memory = found;
  return used;
}

template int64_t conv_divide<float>(const conv_plan &, bool, bool, char *, conv_memory<float> *);
template int64_t conv_divide<double>(const conv_plan &, bool, bool, char *, conv_memory<double> *);

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
