// One operation of differentiable siamese augmentation (Zhao and Bilen, ICML 2021) per image.
//
// Every operation is affine in the image, y = A x + offset, and one pass computes y or A^T y.
//   color   A = c (a I + (1 - a) channel mean) + (1 - c) image mean: symmetric
//   crop    a shift with zeros, cutout a mask, flip a mirror: copies
//   scale, rotate   output pixel p reads four neighbours of a source point (bilinear, zeros outside)
// resample.h does the last two for many planes at once. No result depends on the number of threads.
#include "common.h"
#include "kernels.h"
#include "resample.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

constexpr int64_t wide_scratch_bytes = 1536 * 1024;  // beyond it, wide rows would leave the cache
constexpr int64_t elements_per_thread = 16384;      // less is not worth waking a thread

bool is_affine(const double *row) { return row[0] == augment_scale || row[0] == augment_rotate; }

// --- the record ---------------------------------------------------------------------------------

bool whole(double value) { return value == floor(value); }

// ddfast/reference/augment.py states the same rules in Python.
bool valid(const double *row) {
  for (int k = 0; k < 4; ++k)
    if (!(fabs(row[k]) <= 1e9)) return false;
  if (row[0] == augment_color || row[0] == augment_rotate) return true;
  if (row[0] == augment_crop) return whole(row[1]) && whole(row[2]);
  if (row[0] == augment_cutout) return whole(row[1]) && whole(row[2]) && row[3] >= 0;
  if (row[0] == augment_flip) return row[1] == 0 || row[1] == 1;
  if (row[0] == augment_scale) return row[1] > 0 && row[2] > 0;
  return false;
}

// --- color --------------------------------------------------------------------------------------

template <typename T> double mean_of(const T *x, int64_t count) {
  using A = typename accumulator<T>::type;
  constexpr int64_t block = 4096;
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += block) {
    const int64_t end = begin + block < count ? begin + block : count;
    A partial[lanes] = {};
    int64_t i = begin;
    for (; i + lanes <= end; i += lanes)
      for (int64_t k = 0; k < lanes; ++k) partial[k] += load(x[i + k]);
    for (int64_t k = 0; i + k < end; ++k) partial[k] += load(x[i + k]);
    total += fold(partial);
  }
  return total / double(count);
}

template <typename T>
void color(const T *x, T *y, int64_t channels, int64_t pixels, const double *row, bool offset) {
  using A = typename accumulator<T>::type;
  const double brightness = offset ? row[1] : 0.0, saturation = row[2], contrast = row[3];
  const double mean = mean_of(x, channels * pixels);
  // Saturation keeps both means, and brightness passes through both steps after it unchanged.
  const A own = A(contrast * saturation);
  const A others = A(contrast * (1 - saturation) / double(channels));
  const A constant = A((1 - contrast) * mean + brightness);
  constexpr int64_t block = 64;
  for (int64_t begin = 0; begin < pixels; begin += block) {
    const int64_t count = pixels - begin < block ? pixels - begin : block;
    A sum[block] = {};
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t k = 0; k < count; ++k) sum[k] += load(x[c * pixels + begin + k]);
    for (int64_t k = 0; k < count; ++k) sum[k] = others * sum[k] + constant;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t k = 0; k < count; ++k)
        store(&y[c * pixels + begin + k], own * A(load(x[c * pixels + begin + k])) + sum[k]);
  }
}

// --- crop, cutout, flip -------------------------------------------------------------------------

// Short runs: a call of memset would cost more than the stores.
template <typename T> void clear(T *y, int64_t count) {
  char *p = reinterpret_cast<char *>(y);
  int64_t bytes = count * int64_t(sizeof(T));
  if (bytes > 1024) {
    memset(p, 0, size_t(bytes));
    return;
  }
  for (; bytes >= 64; bytes -= 64, p += 64) memset(p, 0, 64);
  if (bytes & 32) memset(p, 0, 32), p += 32;
  if (bytes & 16) memset(p, 0, 16), p += 16;
  if (bytes & 8) memset(p, 0, 8), p += 8;
  if (bytes & 4) memset(p, 0, 4), p += 4;
  if (bytes & 2) memset(p, 0, 2);
}

// y[i][j] = x[i + down][j + right], zero outside: one copy of the plane moved by a flat offset, in
// which the columns that wrapped around are cleared.
template <typename T> void crop(const T *x, T *y, int64_t height, int64_t width, int64_t down, int64_t right) {
  const int64_t top = down < 0 ? -down : 0, bottom = down > 0 ? height - down : height;
  const int64_t left = right < 0 ? -right : 0, end = right > 0 ? width - right : width;
  if (top >= bottom || left >= end) {
    memset(y, 0, size_t(height * width) * sizeof(T));
    return;
  }
  const int64_t first = top * width + left, last = (bottom - 1) * width + end;
  clear(y, first);
  memcpy(y + first, x + first + down * width + right, size_t(last - first) * sizeof(T));
  clear(y + last, height * width - last);
  if (end - left < width)
    for (int64_t i = top; i + 1 < bottom; ++i) clear(y + i * width + end, width - (end - left));
}

// Rows and columns that the square around the offset covers.
void covered(int64_t size, double offset, double ratio, int64_t *begin, int64_t *end) {
  const int64_t side = int64_t(double(size) * ratio + 0.5), start = int64_t(offset) - side / 2;
  *begin = start < 0 ? 0 : start;
  *end = start + side < size ? start + side : size;
}

template <typename T>
void cutout(const T *x, T *y, int64_t channels, int64_t height, int64_t width, const double *row) {
  memcpy(y, x, size_t(channels * height * width) * sizeof(T));
  int64_t top, bottom, left, right;
  covered(height, row[1], row[3], &top, &bottom);
  covered(width, row[2], row[3], &left, &right);
  if (left >= right) return;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = top; i < bottom; ++i) clear(y + (c * height + i) * width + left, right - left);
}

template <typename T> void mirror(const T *x, T *y, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < width; ++j) y[i * width + j] = x[i * width + width - 1 - j];
}

// --- all images ---------------------------------------------------------------------------------

// Neighbouring planes of images that share a record: one image, or a group for scale and rotate.
struct unit {
  const double *row;
  int64_t first, count, lanes;
};

template <int64_t L, typename T, typename A>
void run_group(const augment_arguments &x, const unit &part, footprint<A> &reads, workspace<A> &work, T *spare) {
  group<L, T> planes;
  planes.count = part.count;
  planes.spare = spare;
  for (int64_t l = 0; l < L; ++l) {
    const int64_t offset = (part.first + (l < part.count ? l : part.count - 1)) * x.height * x.width;
    planes.from[l] = static_cast<const T *>(x.input) + offset;
    planes.to[l] = static_cast<T *>(x.output) + offset;
  }
  x.adjoint ? resample_adjoint<L>(planes, reads, work, x.height, x.width)
            : resample<L>(planes, reads, work, x.height, x.width);
}

template <typename T> void run_image(const augment_arguments &x, const unit &part) {
  const int64_t pixels = x.height * x.width;
  const T *in = static_cast<const T *>(x.input) + part.first * pixels;
  T *out = static_cast<T *>(x.output) + part.first * pixels;
  const double *row = part.row;
  switch (int(row[0])) {
  case augment_color: return color(in, out, x.channels, pixels, row, x.offset && !x.adjoint);
  case augment_crop: {
    const int64_t sign = x.adjoint ? -1 : 1;
    for (int64_t c = 0; c < x.channels; ++c)
      crop(in + c * pixels, out + c * pixels, x.height, x.width, sign * int64_t(row[1]), sign * int64_t(row[2]));
    return;
  }
  case augment_cutout: return cutout(in, out, x.channels, x.height, x.width, row);
  default:
    if (row[1] != 0) return mirror(in, out, x.channels * x.height, x.width);
    memcpy(out, in, size_t(x.channels * pixels) * sizeof(T));
  }
}

// The share of one thread.
template <typename T> void run_units(const augment_arguments &x, const unit *units, int64_t count) {
  using A = typename accumulator<T>::type;
  int64_t most = 0;
  for (int64_t u = 0; u < count; ++u) most = units[u].lanes > most ? units[u].lanes : most;
  footprint<A> reads(most ? x.height * x.width : 0);
  workspace<A> work(most ? x.height : 0, most ? x.width : 0, most);
  scratch<T> spare(x.width);
  const unit *before = nullptr;
  for (int64_t u = 0; u < count; ++u) {
    const unit &part = units[u];
    if (!part.lanes) {
      run_image<T>(x, part);
      continue;
    }
    if (!before || before->row != part.row) find_footprint(reads, part.row, x.height, x.width, x.align_corners);
    if (before && before->lanes != part.lanes) work.clear_plane();
    before = &part;
    if (part.lanes == wide) run_group<wide>(x, part, reads, work, &spare[0]);
    else if (part.lanes == narrow) run_group<narrow>(x, part, reads, work, &spare[0]);
    else run_group<1>(x, part, reads, work, &spare[0]);
  }
}

// Cuts the batch into units. Runs of equal rows, such as all images of a class, share a footprint.
template <typename T> int64_t cut_batch(const augment_arguments &x, unit *units) {
  using A = typename accumulator<T>::type;
  const int64_t wide_bytes = (x.height + 2) * (x.width + 2) * wide * int64_t(sizeof(A));
  int64_t count = 0;
  for (int64_t n = 0; n < x.images;) {
    const double *row = x.record + (x.rows == 1 ? 0 : 4 * n);
    int64_t next = x.rows == 1 ? x.images : n + 1;
    while (next < x.images && memcmp(x.record + 4 * next, row, 4 * sizeof(double)) == 0) ++next;
    const int64_t end = next * x.channels;
    int64_t step = x.channels, lanes = 0;
    if (is_affine(row)) {
      const int64_t planes = end - n * x.channels;
      lanes = planes == 1 ? 1 : (planes <= narrow || wide_bytes > wide_scratch_bytes ? narrow : wide);
      step = lanes;
    }
    for (int64_t plane = n * x.channels; plane < end; plane += step)
      units[count++] = {row, plane, plane + step < end ? step : end - plane, lanes};
    n = next;
  }
  return count;
}

template <typename T> void run(const augment_arguments &x) {
  scratch<unit> units(x.images * x.channels);
  const int64_t count = cut_batch<T>(x, &units[0]);
  const int64_t useful = x.images * x.channels * x.height * x.width / elements_per_thread + 1;
  int64_t threads = x.threads < useful ? x.threads : useful;
  threads = threads < count ? threads : count;
#ifdef _OPENMP
#pragma omp parallel for schedule(static, 1) num_threads(int(threads)) if (threads > 1)
#endif
  for (int64_t t = 0; t < threads; ++t) {
    const int64_t begin = count * t / threads, end = count * (t + 1) / threads;
    run_units<T>(x, &units[begin], end - begin);
  }
}

}  // namespace

int64_t augment(const augment_arguments &x) {
  for (int64_t r = 0; r < x.rows; ++r)
    if (!valid(x.record + 4 * r)) return r;
  if (x.images * x.channels * x.height * x.width == 0) return -1;
  switch (x.type) {
  case float32: run<float>(x); break;
  case float64: run<double>(x); break;
  case bfloat16_type: run<bfloat16>(x); break;
  default: run<float16>(x);
  }
  return -1;
}

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
