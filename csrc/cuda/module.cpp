// ddfast._cuda: the CUDA C++ kernels behind raw pointers. It links the CUDA runtime statically, so
// that it can be imported where there is neither a GPU nor a driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "conv_kernel.h"

namespace py = pybind11;
using namespace ddfast_cuda;

namespace {

// channels, height, width, pools, NTK, global average, weight_var, bias_var
using description = std::tuple<int, int, int, std::vector<bool>, bool, bool, float, float>;
// address of the images, of the deviations, number of images
using described_set = std::tuple<std::uintptr_t, std::uintptr_t, std::int64_t>;

bool described(const description &d, network &net) {
  const auto &[channels, height, width, pools, ntk, gap, weight_var, bias_var] = d;
  std::unique_ptr<bool[]> each(new bool[pools.size()]);
  for (std::size_t i = 0; i < pools.size(); ++i) each[i] = pools[i];
  return describe(net, channels, height, width, each.get(), int(pools.size()), ntk, gap, weight_var, bias_var);
}

network network_of(const description &d) {
  network net;
  if (!described(d, net)) throw std::invalid_argument("a network that these kernels are not made for");
  return net;
}

float *pointer(std::uintptr_t address) { return reinterpret_cast<float *>(address); }

image_set set_of(const described_set &set) {
  return {pointer(std::get<0>(set)), pointer(std::get<1>(set)), std::get<2>(set)};
}

void check(const char *error) {
  if (error) throw std::runtime_error(std::string("CUDA: ") + error);
}

// Numbers in an image's table of variances, or -1 for a network that is too large.
int table_size(const description &d) {
  network net;
  return described(d, net) ? net.table_size : -1;
}

// Blocks that run at once, and bytes that each of them needs.
std::pair<int, std::int64_t> plan_for(const description &d, bool backward) {
  ddfast_cuda::plan out;
  check(plan_of(network_of(d), backward, &out));
  return {out.blocks, out.bytes_of_block};
}

void conv_kernel(const description &d, const described_set &x, const described_set &y, bool symmetric,
                 std::uintptr_t out, std::uintptr_t memory, std::pair<int, std::int64_t> how, std::uintptr_t stream) {
  check(forward(network_of(d), set_of(x), set_of(y), symmetric, pointer(out), pointer(memory),
                {how.first, how.second}, reinterpret_cast<void *>(stream)));
}

void conv_kernel_bwd(const description &d, const described_set &x, const described_set &y, bool symmetric,
                     std::uintptr_t grad, int chunks, std::uintptr_t out, std::uintptr_t memory,
                     std::pair<int, std::int64_t> how, std::uintptr_t stream) {
  check(backward(network_of(d), set_of(x), set_of(y), symmetric, pointer(grad), chunks, pointer(out), pointer(memory),
                 {how.first, how.second}, reinterpret_cast<void *>(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA C++ kernels of ddfast; see ddfast.kernels for what is to be called.";
  module.def("table_size", &table_size);
  module.def("plan", &plan_for);
  module.def("conv_kernel", &conv_kernel);
  module.def("conv_kernel_bwd", &conv_kernel_bwd);
}
