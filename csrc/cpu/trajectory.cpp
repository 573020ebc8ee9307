// One SGD step of flat parameters, the running sum of their gradients, and two squared distances
// (MTT, Cazenavette et al., CVPR 2022; TESLA, Cui et al., ICML 2023), in one pass over memory.
//
// Every block is summed by a fixed number of lanes and the blocks in their order, in double: the
// same bits for any number of threads.
#include <type_traits>

#include "common.h"
#include "kernels.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

constexpr int64_t block = 4096;
constexpr int64_t elements_per_thread = 65536;

template <typename A, typename T>
void run_block(const trajectory_arguments &x, int64_t first, int64_t count, double *sums) {
  const A lr = A(x.lr);
  const T *theta = static_cast<const T *>(x.theta) + first;
  const T *start = static_cast<const T *>(x.start) + first, *target = static_cast<const T *>(x.target) + first;
  const T *gradient = static_cast<const T *>(x.gradient);
  const A *total = static_cast<const A *>(x.total);
  T *next = static_cast<T *>(x.next);
  A *next_total = static_cast<A *>(x.next_total);
  double ours[lanes] = {}, theirs[lanes] = {};
  // Of full width but for the end of a block: the compiler vectorises loops of a length it knows.
  const auto part = [&](int64_t j, auto width) __attribute__((always_inline)) {
    A here[lanes];
    for (int64_t k = 0; k < width; ++k) here[k] = A(load(theta[j + k]));
    if (gradient) {
      for (int64_t k = 0; k < width; ++k) {
        const A g = A(load(gradient[first + j + k]));
        next_total[first + j + k] = total[first + j + k] + g;
        here[k] -= lr * g;
        store(&next[first + j + k], here[k]);
      }
    }
    for (int64_t k = 0; k < width; ++k) {
      const A goal = A(load(target[j + k]));
      const A a = here[k] - goal, b = A(load(start[j + k])) - goal;
      ours[k] += double(a) * double(a);
      theirs[k] += double(b) * double(b);
    }
  };
  int64_t j = 0;
  for (; j + lanes <= count; j += lanes) part(j, std::integral_constant<int64_t, lanes>());
  if (j < count) part(j, count - j);
  sums[0] = fold(ours);
  sums[1] = fold(theirs);
}

template <typename A, typename T> void run(const trajectory_arguments &x) {
  const int64_t blocks = (x.size + block - 1) / block, useful = 1 + x.size / elements_per_thread;
  const int threads = useful < x.threads ? int(useful) : x.threads;
  (void)threads;
  scratch<double> sums(2 * blocks);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
#endif
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = i * block, count = x.size - first < block ? x.size - first : block;
    run_block<A, T>(x, first, count, sums.data + 2 * i);
  }
  x.squares[0] = x.squares[1] = 0;
  for (int64_t i = 0; i < blocks; ++i)
    for (int side = 0; side < 2; ++side) x.squares[side] += sums[2 * i + side];
}

}  // namespace

void trajectory(const trajectory_arguments &x) {
  switch (x.type) {
  case float32: return run<float, float>(x);
  case float64: return run<double, double>(x);
  case bfloat16_type: return run<float, bfloat16>(x);
  default: return run<float, float16>(x);
  }
}

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
