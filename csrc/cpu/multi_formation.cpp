// Multi-formation (IDC, Kim et al., ICML 2022): the factor^2 crops of an image, each enlarged
// bilinearly to the size of the image; and the transpose of that.
//
// Both are separable. Along an axis the enlargement is a sparse matrix with two entries a row, and
// its transpose is one whose rows are short, too: so the two directions share their code, and the
// transpose gathers. Rows of pixels are combined vector by vector. Columns are combined by the
// blocks of the matrix that a vector of results needs, dense: no gather, no shuffle, on any
// processor. Where a pixel is not finite its zeros would matter, and the sparse form is used.
#include "common.h"
#include "kernels.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int64_t register_bytes = 64;
#elif defined(__AVX__)
constexpr int64_t register_bytes = 32;
#else
constexpr int64_t register_bytes = 16;
#endif
constexpr int64_t elements_per_thread = 32768;

template <typename A, int64_t BYTES> struct vectors {
  static constexpr int64_t count = BYTES / int64_t(sizeof(A));
  typedef A type __attribute__((vector_size(BYTES), aligned(sizeof(A)), may_alias));
};

template <typename A> constexpr int64_t block_size() { return vectors<A, register_bytes>::count; }

template <typename A> int64_t whole_blocks(int64_t count) {
  return (count + block_size<A>() - 1) / block_size<A>() * block_size<A>();
}

// --- one axis -----------------------------------------------------------------------------------

// y[r] = sum over t of weight[r][t] x[first[r] + t]
template <typename A> struct sparse {
  int64_t rows, columns, taps;
  scratch<int64_t> first, count;
  scratch<A> weight;
  sparse(int64_t rows_, int64_t columns_, int64_t taps_)
      : rows(rows_), columns(columns_), taps(taps_), first(rows_), count(rows_), weight(rows_ * taps_) {}
  // For each row, columns must come one by one.
  void add(int64_t row, int64_t column, A value) {
    if (count[row] == 0) first[row] = column;
    weight[row * taps + count[row]++] = value;
  }
};

// The enlargement of `crop` pixels to `full`, and its transpose. In whole numbers until the share, as
// in the definition, so that every implementation reads the same pixels.
template <typename A> void enlarge(int64_t crop, int64_t full, sparse<A> *matrix, sparse<A> *transposed) {
  for (int64_t i = 0; i < full; ++i) {
    int64_t place = (2 * i + 1) * crop - full;  // in units of 1 / (2 full) pixels
    if (place < 0) place = 0;
    int64_t low = place / (2 * full);
    const int64_t rest = low < crop - 1 ? place - low * 2 * full : 0;
    if (low > crop - 1) low = crop - 1;
    const double share = double(rest) / double(2 * full);
    for (int64_t k = 0; k < (rest > 0 ? 2 : 1); ++k) {
      const A value = A(k ? share : 1 - share);
      if (matrix) matrix->add(i, low + k, value);
      if (transposed) transposed->add(low + k, i, value);
    }
  }
}

// The same matrix in dense blocks, one per vector of results.
template <typename A> struct blocks {
  const sparse<A> &matrix;
  int64_t number, stride;
  scratch<int64_t> first, count;
  scratch<A> weight;  // block, column, row in the block
  explicit blocks(const sparse<A> &m)
      : matrix(m), number(whole_blocks<A>(m.rows) / block_size<A>()), stride(longest(m) * block_size<A>()),
        first(number), count(number), weight(number * stride) {
    constexpr int64_t size = block_size<A>();
    for (int64_t r = 0; r < m.rows; ++r) {
      const int64_t b = r / size;
      if (r % size == 0) first[b] = m.first.data[r];
      const int64_t end = m.first.data[r] + m.count.data[r] - first[b];
      if (end > count[b]) count[b] = end;
      for (int64_t t = 0; t < m.count.data[r]; ++t)
        weight[b * stride + (m.first.data[r] + t - first[b]) * size + r % size] = m.weight.data[r * m.taps + t];
    }
  }
  static int64_t longest(const sparse<A> &m) {
    int64_t most = 1;
    for (int64_t begin = 0; begin < m.rows; begin += block_size<A>()) {
      const int64_t last = begin + block_size<A>() < m.rows ? begin + block_size<A>() - 1 : m.rows - 1;
      const int64_t span = m.first.data[last] + m.count.data[last] - m.first.data[begin];
      most = span > most ? span : most;
    }
    return most;
  }
};

// --- rows of pixels -----------------------------------------------------------------------------

// y = sum of `taps` rows of x, weighted. TAPS 0: a number known only now.
template <int64_t BYTES, int64_t TAPS, typename A>
void combine(const A *weight, int64_t taps, const A *x, int64_t stride, int64_t width, A *y) {
  using V = vectors<A, BYTES>;
  using vector = typename V::type;
  const int64_t number = TAPS ? TAPS : taps;
  const auto at = [&](int64_t j) {
    vector sum = weight[0] * *reinterpret_cast<const vector *>(x + j);
    for (int64_t t = 1; t < number; ++t) sum += weight[t] * *reinterpret_cast<const vector *>(x + t * stride + j);
    *reinterpret_cast<vector *>(y + j) = sum;
  };
  int64_t j = 0;
  for (; j + V::count <= width; j += V::count) at(j);
  if (j < width) at(width - V::count);  // some columns once more: the same bits
}

template <int64_t BYTES, typename A>
void combine_row(const sparse<A> &matrix, int64_t row, const A *x, int64_t stride, int64_t width, A *y) {
  const A *weight = &matrix.weight.data[row * matrix.taps];
  const int64_t taps = matrix.count.data[row];
  x += matrix.first.data[row] * stride;
  switch (taps) {
  case 1: return combine<BYTES, 1>(weight, taps, x, stride, width, y);
  case 2: return combine<BYTES, 2>(weight, taps, x, stride, width, y);
  case 3: return combine<BYTES, 3>(weight, taps, x, stride, width, y);
  case 4: return combine<BYTES, 4>(weight, taps, x, stride, width, y);
  case 6: return combine<BYTES, 6>(weight, taps, x, stride, width, y);
  default: return combine<BYTES, 0>(weight, taps, x, stride, width, y);
  }
}

// Row `row` of the matrix applied to rows of pixels, with the widest vectors that fit into one.
template <typename A>
void combine_rows(const sparse<A> &matrix, int64_t row, const A *x, int64_t stride, int64_t width, A *y) {
  const int64_t bytes = width * int64_t(sizeof(A));
  if (bytes >= register_bytes) return combine_row<register_bytes>(matrix, row, x, stride, width, y);
  if (register_bytes > 32 && bytes >= 32) return combine_row<32>(matrix, row, x, stride, width, y);
  if (bytes >= 16) return combine_row<16>(matrix, row, x, stride, width, y);
  combine_row<int64_t(sizeof(A))>(matrix, row, x, stride, width, y);
}

// --- columns of pixels --------------------------------------------------------------------------

// Writes whole blocks: y's rows must have room for them.
template <int64_t ROWS, typename A>
void combine_columns(const blocks<A> &matrix, const A *x, int64_t stride, A *y, int64_t y_stride) {
  using V = vectors<A, register_bytes>;
  using vector = typename V::type;
  for (int64_t b = 0; b < matrix.number; ++b) {
    const vector *weight = reinterpret_cast<const vector *>(matrix.weight.data + b * matrix.stride);
    const A *from = x + matrix.first.data[b];
    const int64_t count = matrix.count.data[b];
    vector sum[ROWS] = {};
    for (int64_t k = 0; k < count; ++k)
      for (int64_t r = 0; r < ROWS; ++r) sum[r] += from[r * stride + k] * weight[k];
    for (int64_t r = 0; r < ROWS; ++r) *reinterpret_cast<vector *>(y + r * y_stride + b * V::count) = sum[r];
  }
}

template <typename A> void combine_columns_one_by_one(const sparse<A> &matrix, const A *x, A *y) {
  for (int64_t r = 0; r < matrix.rows; ++r) {
    const A *weight = matrix.weight.data + r * matrix.taps, *from = x + matrix.first.data[r];
    A sum = weight[0] * from[0];
    for (int64_t t = 1; t < matrix.count.data[r]; ++t) sum += weight[t] * from[t];
    y[r] = sum;
  }
}

template <typename A>
void combine_columns(const blocks<A> &matrix, bool finite, const A *x, int64_t stride, int64_t rows, A *y,
                     int64_t y_stride) {
  int64_t r = 0;
  if (!finite) {
    for (; r < rows; ++r) combine_columns_one_by_one(matrix.matrix, x + r * stride, y + r * y_stride);
    return;
  }
  for (; r + 4 <= rows; r += 4) combine_columns<4>(matrix, x + r * stride, stride, y + r * y_stride, y_stride);
  for (; r < rows; ++r) combine_columns<1>(matrix, x + r * stride, stride, y + r * y_stride, y_stride);
}

template <typename A> bool all_finite(const A *x, int64_t count) {
  A sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes)
    for (int64_t k = 0; k < lanes; ++k) sums[k] += x[i + k] * A(0);
  for (; i < count; ++i) sums[0] += x[i] * A(0);
  return fold(sums) == A(0);
}

// --- planes -------------------------------------------------------------------------------------

template <typename T, typename A> const A *widened(const T *x, int64_t count, A *space) {
  for (int64_t i = 0; i < count; ++i) space[i] = load(x[i]);
  return space;
}
const float *widened(const float *x, int64_t, float *) { return x; }
const double *widened(const double *x, int64_t, double *) { return x; }

template <typename T, typename A> void narrowed(const A *x, int64_t count, T *y) {
  for (int64_t i = 0; i < count; ++i) store(&y[i], x[i]);
}
template <typename T> constexpr bool is_wide() { return false; }
template <> constexpr bool is_wide<float>() { return true; }
template <> constexpr bool is_wide<double>() { return true; }

// Sizes of the work, and each crop's plane in the larger tensor.
template <typename T> struct layout {
  const multi_formation_arguments &x;
  int64_t tall, broad, pixels, crops;
  explicit layout(const multi_formation_arguments &a)
      : x(a), tall((a.height + a.factor - 1) / a.factor), broad((a.width + a.factor - 1) / a.factor),
        pixels(a.height * a.width), crops(a.factor * a.factor) {}
  int64_t of_crop(int64_t plane, int64_t crop) const {
    const int64_t image = plane / x.channels, channel = plane % x.channels;
    const int64_t place = x.by_image ? image * crops + crop : crop * x.images + image;
    return (place * x.channels + channel) * pixels;
  }
};

// What one thread needs.
template <typename A> struct space {
  scratch<A> plane, lines, result;
  space(int64_t plane_, int64_t lines_, int64_t result_) : plane(plane_), lines(lines_), result(result_) {}
};

template <typename T, typename A>
void form(const layout<T> &l, const sparse<A> &rows, const blocks<A> &columns, int64_t plane, space<A> &work) {
  const auto &x = l.x;
  const T *input = static_cast<const T *>(x.input) + plane * l.pixels;
  int64_t stride = x.width;
  const A *source = nullptr;
  if (l.tall * x.factor != x.height || l.broad * x.factor != x.width) {
    stride = l.broad * x.factor;
    for (int64_t i = 0; i < l.tall * x.factor; ++i) {
      A *line = &work.plane[i * stride];
      int64_t j = 0;
      for (; i < x.height && j < x.width; ++j) line[j] = load(input[i * x.width + j]);
      for (; j < stride; ++j) line[j] = A(x.fill);
    }
    source = work.plane.data;
  } else {
    source = widened(input, l.pixels, work.plane.data);
  }
  const bool finite = all_finite(source, l.tall * x.factor * stride);
  const int64_t line = whole_blocks<A>(x.width);
  for (int64_t crop = 0; crop < l.crops; ++crop) {
    const A *corner = source + crop / x.factor * l.tall * stride + crop % x.factor * l.broad;
    combine_columns(columns, finite, corner, stride, l.tall, work.lines.data, line);
    T *output = static_cast<T *>(x.output) + l.of_crop(plane, crop);
    for (int64_t i = 0; i < x.height; ++i) {
      A *target = is_wide<T>() ? reinterpret_cast<A *>(output + i * x.width) : work.result.data;
      combine_rows(rows, i, work.lines.data, line, x.width, target);
      if (!is_wide<T>()) narrowed(work.result.data, x.width, output + i * x.width);
    }
  }
}

template <typename T, typename A>
void form_adjoint(const layout<T> &l, const sparse<A> &rows, const blocks<A> &columns, int64_t plane,
                  space<A> &work) {
  const auto &x = l.x;
  T *output = static_cast<T *>(x.output) + plane * l.pixels;
  const int64_t line = whole_blocks<A>(x.width), result = whole_blocks<A>(l.broad);
  for (int64_t crop = 0; crop < l.crops; ++crop) {
    // What the definition pads is left out: the rest of the crop.
    const int64_t top = crop / x.factor * l.tall, left = crop % x.factor * l.broad;
    if (top >= x.height || left >= x.width) continue;
    const int64_t tall = x.height - top < l.tall ? x.height - top : l.tall;
    const int64_t broad = x.width - left < l.broad ? x.width - left : l.broad;
    const A *grad = widened(static_cast<const T *>(x.input) + l.of_crop(plane, crop), l.pixels, work.plane.data);
    for (int64_t k = 0; k < tall; ++k) combine_rows(rows, k, grad, x.width, x.width, &work.lines[k * line]);
    const bool finite = all_finite(work.lines.data, tall * line);
    combine_columns(columns, finite, work.lines.data, line, tall, work.result.data, result);
    for (int64_t k = 0; k < tall; ++k)
      narrowed(&work.result[k * result], broad, output + (top + k) * x.width + left);
  }
}

template <typename T> void run(const multi_formation_arguments &x) {
  using A = typename accumulator<T>::type;
  const layout<T> l(x);
  const int64_t planes = x.images * x.channels;
  const int64_t row_taps = 2 * ((x.height + l.tall - 1) / l.tall) + 2, column_taps = 2 * ((x.width + l.broad - 1) / l.broad) + 2;
  sparse<A> rows = x.adjoint ? sparse<A>(l.tall, x.height, row_taps) : sparse<A>(x.height, l.tall, 2);
  sparse<A> columns = x.adjoint ? sparse<A>(l.broad, x.width, column_taps) : sparse<A>(x.width, l.broad, 2);
  enlarge(l.tall, x.height, x.adjoint ? nullptr : &rows, x.adjoint ? &rows : nullptr);
  enlarge(l.broad, x.width, x.adjoint ? nullptr : &columns, x.adjoint ? &columns : nullptr);
  const blocks<A> dense(columns);
  // Waking a thread for less than a few microseconds of work costs more than it gives.
  const int64_t useful = 1 + planes * l.crops * l.pixels / elements_per_thread;
  const int64_t most = planes < useful ? planes : useful;
  const int threads = most < x.threads ? int(most) : x.threads;
  (void)threads;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
  {
    space<A> work(l.tall * l.broad * l.crops, l.tall * whole_blocks<A>(x.width),
                  x.adjoint ? l.tall * whole_blocks<A>(l.broad) : whole_blocks<A>(x.width));
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
    for (int64_t plane = 0; plane < planes; ++plane)
      x.adjoint ? form_adjoint<T>(l, rows, dense, plane, work) : form<T>(l, rows, dense, plane, work);
  }
}

}  // namespace

void multi_formation(const multi_formation_arguments &x) {
  switch (x.type) {
  case float32: return run<float>(x);
  case float64: return run<double>(x);
  case bfloat16_type: return run<bfloat16>(x);
  default: return run<float16>(x);
  }
}

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
