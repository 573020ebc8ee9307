// conv_kernel on an NVIDIA GPU: a thread block takes one pair of images after another.
#include <cuda_runtime.h>

#include "conv_kernel.h"
#include "pairs.h"

namespace ddfast_cuda {
namespace {

constexpr int threads = 512, most_groups = threads;

struct thread_block {
  static constexpr int threads = ddfast_cuda::threads;
  template <typename F> DDFAST_DEVICE void each_group(int size, F f) {
    const int lane = threadIdx.x & 31, start = lane & ~(size - 1);
    const unsigned members = (size == 32 ? 0xffffffffu : (1u << size) - 1) << start;
    f(group{int(threadIdx.x) & (size - 1), size, members}, int(threadIdx.x) / size, threads / size);
    __syncthreads();
  }
  template <typename F> DDFAST_DEVICE void once(F f) {
    if (threadIdx.x == 0) f();
    __syncthreads();
  }
  template <typename F> DDFAST_DEVICE void spread(int count, F f) {
    for (int i = threadIdx.x; i < count; i += threads) f(i);
    __syncthreads();
  }
  DDFAST_DEVICE void fill(float *to, int count) {
    spread(count, [&](int i) { to[i] = 0; });
  }
};

DDFAST_DEVICE image_pair pair_of(const network &net, const image_set &x, const image_set &y, bool symmetric, int64_t i,
                                 int64_t j) {
  const int64_t size = int64_t(net.channels) * net.levels[0].height * net.levels[0].width;
  return {x.images + i * size, y.images + j * size, x.deviations + i * net.table_size,
          y.deviations + j * net.table_size, symmetric && i == j};
}

extern __shared__ float shared_state[];

__global__ void __launch_bounds__(threads)
    forward_kernel(const network net, image_set x, image_set y, bool symmetric, float *out, float *memory,
                   int64_t memory_of_block, bool state_is_shared) {
  __shared__ float sums[2 * most_groups];
  float *state = state_is_shared ? shared_state : memory + blockIdx.x * memory_of_block;
  thread_block block;
  for (int64_t pair = blockIdx.x; pair < x.count * y.count; pair += gridDim.x) {
    const int64_t i = pair / y.count, j = pair % y.count;
    if (symmetric && j < i) continue;
    forward_pair(block, net, pair_of(net, x, y, symmetric, i, j), state, sums);
    block.once([&] {
      out[i * y.count + j] = after_readout(net, sums);
      if (symmetric) out[j * y.count + i] = out[i * y.count + j];
    });
  }
}

__global__ void __launch_bounds__(threads)
    backward_kernel(const network net, image_set x, image_set y, bool symmetric, const float *grad, int chunks,
                    float *out, float *memory, int64_t memory_of_block, bool state_is_shared) {
  __shared__ float sums[2 * most_groups];
  float *scratch = memory + blockIdx.x * memory_of_block;
  const scratch_layout layout = layout_of(net, threads);
  float *state = state_is_shared ? shared_state : scratch + layout.size;
  const int size = net.table_size + net.channels * net.levels[0].height * net.levels[0].width;
  thread_block block;
  for (int64_t task = blockIdx.x; task < x.count * chunks; task += gridDim.x) {
    const int64_t i = task % x.count, chunk = task / x.count;
    block.fill(scratch + layout.variances[0], int(layout.size - layout.variances[0]));
    for (int64_t j = chunk; j < y.count; j += chunks)
      backward_pair(block, net, pair_of(net, x, y, symmetric, i, j), grad[i * y.count + j], state, sums, scratch);
    gather(block, net, scratch, out + task % x.count * size + chunk * x.count * size);
  }
}

int shared_bytes(const network &net, int most) {
  const int64_t bytes = int64_t(net.state_size) * int64_t(sizeof(float));
  return bytes <= most ? int(bytes) : 0;
}

const char *message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

int most_shared() {
  int device = 0, most = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return most - int(2 * most_groups * sizeof(float));
}

}  // namespace

const char *plan_of(const network &net, bool backward, plan *out) {
  int device = 0, processors = 0, resident = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return message(error);
  const int shared = shared_bytes(net, most_shared());
  if (backward) {
    error = cudaFuncSetAttribute(backward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error == cudaSuccess)
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, backward_kernel, threads, shared);
  } else {
    error = cudaFuncSetAttribute(forward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error == cudaSuccess)
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, forward_kernel, threads, shared);
  }
  if (error != cudaSuccess) return message(error);
  out->blocks = processors * (resident ? resident : 1);
  out->bytes_of_block = shared ? 0 : int64_t(net.state_size) * int64_t(sizeof(float));
  if (backward) out->bytes_of_block += layout_of(net, threads).size * int64_t(sizeof(float));
  return nullptr;
}

const char *forward(const network &net, const image_set &x, const image_set &y, bool symmetric, float *out,
                    float *memory, const plan &how, void *stream) {
  const int shared = shared_bytes(net, most_shared());
  forward_kernel<<<how.blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(
      net, x, y, symmetric, out, memory, how.bytes_of_block / int64_t(sizeof(float)), shared || !net.state_size);
  return message(cudaGetLastError());
}

const char *backward(const network &net, const image_set &x, const image_set &y, bool symmetric, const float *grad,
                     int chunks, float *out, float *memory, const plan &how, void *stream) {
  const int shared = shared_bytes(net, most_shared());
  backward_kernel<<<how.blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(
      net, x, y, symmetric, grad, chunks, out, memory, how.bytes_of_block / int64_t(sizeof(float)),
      shared || !net.state_size);
  return message(cudaGetLastError());
}

}  // namespace ddfast_cuda
