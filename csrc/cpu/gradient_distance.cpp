// Distance between two lists of weight gradients, with its gradient in the same pass.
//
// Row cosine (Zhao et al., ICLR 2021): per row, with a = real, b = syn, m = |a|, n = |b|,
//   value = 1 - <a,b> / D,  D = m n + epsilon,  d value/d b = -a/D + <a,b> m / (D^2 n) b.
// A row is read once from memory for its three sums and once more, from cache, for the gradient.
// `cosine` is the same with one row that runs over all tensors; `mse` and `l1` need no sums.
#include "common.h"
#include "kernels.h"

namespace ddfast {
namespace DDFAST_LEVEL {
namespace {

constexpr int64_t fold_every = 2048;
template <typename T> constexpr int64_t line = 64 / int64_t(sizeof(T));  // elements of a cache line
constexpr int64_t block_elements = 16384;  // work of one thread at a time; fits the first caches

// Sums over one row or chunk: <a,b>, |a|^2, |b|^2, <u,a>, <u,b>, <w,b>, <w,a>,
// u and w the cotangents of the gradients with respect to syn and real.
struct moments {
  double ab = 0, aa = 0, bb = 0, ua = 0, ub = 0, wb = 0, wa = 0;
};

// out_syn = syn_syn b + syn_real a + syn_u u + syn_w w, and the same for out_real.
struct coefficients {
  double syn_syn = 0, syn_real = 0, syn_u = 0, syn_w = 0;
  double real_syn = 0, real_real = 0, real_u = 0, real_w = 0;
};

template <typename T> struct segment {
  const T *syn, *real, *u, *w;
  T *out_syn, *out_real;
  int64_t length;
};

double inverse(double x) { return x > 0 ? 1.0 / x : 0.0; }

double cosine_value(const moments &s, double epsilon) {
  return 1.0 - s.ab / (sqrt(s.aa) * sqrt(s.bb) + epsilon);
}

// The norm of a zero row has derivative zero, as in torch.
coefficients cosine_gradient(const moments &s, double epsilon) {
  const double m = sqrt(s.aa), n = sqrt(s.bb), d = 1.0 / (m * n + epsilon);
  coefficients c;
  c.syn_real = c.real_syn = -d;
  c.syn_syn = s.ab * m * d * d * inverse(n);
  c.real_real = s.ab * n * d * d * inverse(m);
  return c;
}

// phi = <u, d value/d b> + <w, d value/d a> and its gradient, by the chain rule over the seven sums.
double cosine_second(const moments &s, double epsilon, coefficients *c) {
  const double m = sqrt(s.aa), n = sqrt(s.bb), d = 1.0 / (m * n + epsilon), dd = d * d;
  const double im = inverse(m), in = inverse(n);
  const double by_ab = (m * s.ub * in + n * s.wa * im) * dd;
  const double by_d = (s.ua + s.wb) * dd - 2.0 * s.ab * (m * s.ub * in + n * s.wa * im) * dd * d;
  const double by_m = n * by_d + s.ab * (s.ub * in - n * s.wa * im * im) * dd;
  const double by_n = m * by_d + s.ab * (s.wa * im - m * s.ub * in * in) * dd;
  c->syn_real = c->real_syn = by_ab;
  c->syn_u = s.ab * m * in * dd;
  c->syn_w = -d;
  c->syn_syn = by_n * in;
  c->real_u = -d;
  c->real_w = s.ab * n * im * dd;
  c->real_real = by_m * im;
  return -(s.ua + s.wb) * d + s.ab * (m * s.ub * in + n * s.wa * im) * dd;
}

// Adds the sums of x.y over `length` elements to *total for `count` pairs of streams at once, in
// float lanes that are folded into a double every `fold_every` elements.
// Meanwhile the lines of `next`, about to be written, are fetched, if it is not null.
template <int count, typename T>
void add_dots(const T *const (&x)[count], const T *const (&y)[count], int64_t length, double (&total)[count], T *next = nullptr) {
  using A = typename accumulator<T>::type;
  for (int64_t begin = 0; begin < length; begin += fold_every) {
    const int64_t end = begin + fold_every < length ? begin + fold_every : length;
    A sum[count][lanes] = {};
    int64_t i = begin;
    for (; i + lanes <= end; i += lanes) {
      for (int64_t k = 0; next && k < lanes; k += line<T>) __builtin_prefetch(next + i + k, 1);
      for (int64_t k = 0; k < lanes; ++k)
        for (int j = 0; j < count; ++j) sum[j][k] += A(load(x[j][i + k])) * A(load(y[j][i + k]));
    }
    for (int64_t k = 0; i + k < end; ++k)
      for (int j = 0; j < count; ++j) sum[j][k] += A(load(x[j][i + k])) * A(load(y[j][i + k]));
    for (int j = 0; j < count; ++j) total[j] += fold(sum[j]);
  }
}

template <typename T> moments first_moments(const segment<T> &x) {
  double total[3] = {};
  add_dots<3, T>({x.real, x.real, x.syn}, {x.syn, x.real, x.syn}, x.length, total, x.out_syn);
  moments s;
  s.ab = total[0];
  s.aa = total[1];
  s.bb = total[2];
  return s;
}

template <typename T> void dot_pair(const T *v, const segment<T> &x, double *va, double *vb) {
  double total[2] = {};
  add_dots<2, T>({v, v}, {x.real, x.syn}, x.length, total);
  *va = total[0];
  *vb = total[1];
}

template <typename T> moments all_moments(const segment<T> &x, bool second) {
  moments s = first_moments(x);
  if (second && x.u) dot_pair(x.u, x, &s.ua, &s.ub);
  if (second && x.w) dot_pair(x.w, x, &s.wa, &s.wb);
  return s;
}

template <typename T> void combine(const segment<T> &x, T *out, double by_syn, double by_real, double scale) {
  using A = typename accumulator<T>::type;
  const A cb = A(by_syn * scale), ca = A(by_real * scale);
  const T *b = x.syn, *a = x.real;
  T *__restrict__ target = out;
  int64_t i = 0;
  for (; i + lanes <= x.length; i += lanes) {
    // The next row, so that memory is not idle while this one is worked on in cache.
    for (int64_t k = 0; k < lanes; k += line<T>) {
      __builtin_prefetch(b + i + k + x.length);
      __builtin_prefetch(a + i + k + x.length);
    }
    for (int64_t k = 0; k < lanes; ++k) store(&target[i + k], cb * A(load(b[i + k])) + ca * A(load(a[i + k])));
  }
  for (; i < x.length; ++i) store(&target[i], cb * A(load(b[i])) + ca * A(load(a[i])));
}

template <typename T>
void combine_second(const segment<T> &x, T *out, double by_syn, double by_real, double by_u, double by_w, double scale) {
  using A = typename accumulator<T>::type;
  const A cb = A(by_syn * scale), ca = A(by_real * scale), cu = A(by_u * scale), cw = A(by_w * scale);
  // A missing cotangent is zero; reading syn in its place with coefficient zero would turn inf into NaN.
  for (int64_t i = 0; i < x.length; ++i) {
    A sum = cb * A(load(x.syn[i])) + ca * A(load(x.real[i]));
    if (x.u) sum += cu * A(load(x.u[i]));
    if (x.w) sum += cw * A(load(x.w[i]));
    store(&out[i], sum);
  }
}

template <typename T> void write_outputs(const segment<T> &x, const coefficients &c, double scale, bool second) {
  if (second) {
    if (x.out_syn) combine_second(x, x.out_syn, c.syn_syn, c.syn_real, c.syn_u, c.syn_w, scale);
    if (x.out_real) combine_second(x, x.out_real, c.real_syn, c.real_real, c.real_u, c.real_w, scale);
  } else {
    if (x.out_syn) combine(x, x.out_syn, c.syn_syn, c.syn_real, scale);
    if (x.out_real) combine(x, x.out_real, c.real_syn, c.real_real, scale);
  }
}

// The sum of the lanes, which start again at zero.
template <typename A> double take(A (&sum)[lanes]) {
  const double total = fold(sum);
  for (int64_t k = 0; k < lanes; ++k) sum[k] = 0;
  return total;
}

// mse and l1: value and gradient element by element.
template <typename T> double elementwise(const segment<T> &x, int metric, double scale) {
  using A = typename accumulator<T>::type;
  const A factor = A(scale);
  A sum[lanes] = {};
  double total = 0;
  for (int64_t i = 0; i < x.length; i += lanes) {
    const int64_t width = x.length - i < lanes ? x.length - i : lanes;
    if (i % fold_every == 0) total += take(sum);
    for (int64_t k = 0; k < width; ++k) {
      const A difference = A(load(x.syn[i + k])) - A(load(x.real[i + k]));
      const A magnitude = difference < 0 ? -difference : difference;
      sum[k] += metric == mse ? difference * difference : magnitude;
    }
    if (!x.out_syn && !x.out_real) continue;
    for (int64_t k = 0; k < width; ++k) {
      const A difference = A(load(x.syn[i + k])) - A(load(x.real[i + k]));
      // A NaN difference passes through both metrics.
      const A sign = difference > 0 ? A(1) : (difference < 0 ? A(-1) : difference);
      const A slope = metric == mse ? 2 * difference : sign;
      if (x.out_syn) store(&x.out_syn[i + k], factor * slope);
      if (x.out_real) store(&x.out_real[i + k], -factor * slope);
    }
  }
  return total + take(sum);
}

// Second derivative of mse: phi = 2 <u - w, b - a>; l1 has none almost everywhere.
template <typename T> double elementwise_second(const segment<T> &x, int metric, double scale) {
  using A = typename accumulator<T>::type;
  const A factor = metric == mse ? A(2 * scale) : A(0);
  A sum[lanes] = {};
  double total = 0;
  for (int64_t i = 0; i < x.length; i += lanes) {
    const int64_t width = x.length - i < lanes ? x.length - i : lanes;
    if (i % fold_every == 0) total += take(sum);
    for (int64_t k = 0; k < width; ++k) {
      const A difference = A(load(x.syn[i + k])) - A(load(x.real[i + k]));
      const A u = x.u ? A(load(x.u[i + k])) : A(0), w = x.w ? A(load(x.w[i + k])) : A(0);
      const A sign = difference > 0 ? A(1) : (difference < 0 ? A(-1) : difference);
      sum[k] += (metric == mse ? 2 * difference : sign) * (u - w);
      if (x.out_syn) store(&x.out_syn[i + k], factor * (u - w));
      if (x.out_real) store(&x.out_real[i + k], factor * (w - u));
    }
  }
  return total + take(sum);
}

template <typename T> const T *at(const void *base, int64_t offset) {
  return base ? static_cast<const T *>(base) + offset : nullptr;
}
template <typename T> T *at(void *base, int64_t offset) {
  return base ? static_cast<T *>(base) + offset : nullptr;
}

template <typename T> segment<T> slice(const gradient_layer &layer, int64_t offset, int64_t length) {
  return {at<T>(layer.syn, offset),           at<T>(layer.real, offset),
          at<T>(layer.cotangent_syn, offset), at<T>(layer.cotangent_real, offset),
          at<T>(layer.out_syn, offset),       at<T>(layer.out_real, offset),
          length};
}

// Cuts the tensors into segments: rows for row_cosine, chunks of a class's share otherwise.
// Segment s of a tensor belongs to class s / per_class.
struct cut {
  int64_t layer_count;
  scratch<int64_t> length, per_class, share, first_segment, first_block, segments_per_block;

  cut(const gradient_distance_arguments &x)
      : layer_count(x.layer_count), length(layer_count), per_class(layer_count), share(layer_count),
        first_segment(layer_count + 1), first_block(layer_count + 1), segments_per_block(layer_count) {
    for (int64_t l = 0; l < layer_count; ++l) {
      const gradient_layer &layer = x.layers[l];
      const int64_t elements = layer.rows * layer.length;
      const bool by_row = x.metric == row_cosine;
      length[l] = by_row ? layer.length : block_elements;
      per_class[l] = by_row ? layer.rows : (elements + block_elements - 1) / block_elements;
      share[l] = elements;
      segments_per_block[l] = by_row && layer.length < block_elements && layer.length > 0 ? block_elements / layer.length : 1;
      const int64_t segments = per_class[l] * x.classes;
      first_segment[l + 1] = first_segment[l] + segments;
      first_block[l + 1] = first_block[l] + (segments + segments_per_block[l] - 1) / segments_per_block[l];
    }
  }
  int64_t segments() { return first_segment[layer_count]; }
  int64_t blocks() { return first_block[layer_count]; }
};

// Calls f(layer, segment within the layer, class, T segment, slot in a global list), in parallel.
template <typename T, typename F> void for_each_segment(const gradient_distance_arguments &x, cut &parts, F f) {
  const int64_t blocks = parts.blocks();
  const int threads = blocks < x.threads ? int(blocks) : x.threads;
  (void)threads;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
#endif
  for (int64_t block = 0; block < blocks; ++block) {
    int64_t l = 0;
    while (parts.first_block[l + 1] <= block) ++l;
    const int64_t begin = (block - parts.first_block[l]) * parts.segments_per_block[l];
    const int64_t all = parts.first_segment[l + 1] - parts.first_segment[l];
    const int64_t end = begin + parts.segments_per_block[l] < all ? begin + parts.segments_per_block[l] : all;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t c = s / parts.per_class[l], within = (s % parts.per_class[l]) * parts.length[l];
      const int64_t left = parts.share[l] - within;
      const int64_t length = left < parts.length[l] ? left : parts.length[l];
      f(c, slice<T>(x.layers[l], c * parts.share[l] + within, length), parts.first_segment[l] + s);
    }
  }
}

// Sums the segments' values per class, in one order whatever the number of threads.
template <typename F> void add_by_class(const gradient_distance_arguments &x, cut &parts, F add) {
  for (int64_t l = 0; l < x.layer_count; ++l)
    for (int64_t c = 0; c < x.classes; ++c)
      for (int64_t s = 0; s < parts.per_class[l]; ++s) add(c, parts.first_segment[l] + c * parts.per_class[l] + s);
}

template <typename T> void run_cosine(const gradient_distance_arguments &x, cut &parts, bool second) {
  scratch<moments> partial(parts.segments());
  for_each_segment<T>(x, parts, [&](int64_t, const segment<T> &part, int64_t slot) {
    partial[slot] = all_moments(part, second);
  });
  scratch<moments> total(x.classes);
  scratch<coefficients> factors(x.classes);
  add_by_class(x, parts, [&](int64_t c, int64_t slot) {
    moments &sum = total[c];
    const moments &part = partial[slot];
    sum.ab += part.ab;
    sum.aa += part.aa;
    sum.bb += part.bb;
    sum.ua += part.ua;
    sum.ub += part.ub;
    sum.wb += part.wb;
    sum.wa += part.wa;
  });
  for (int64_t c = 0; c < x.classes; ++c) {
    if (second) {
      x.value[c] = cosine_second(total[c], x.epsilon, &factors[c]);
    } else {
      x.value[c] = cosine_value(total[c], x.epsilon);
      factors[c] = cosine_gradient(total[c], x.epsilon);
    }
  }
  for_each_segment<T>(x, parts, [&](int64_t c, const segment<T> &part, int64_t) {
    write_outputs(part, factors[c], x.scale ? x.scale[c] : 1.0, second);
  });
}

template <typename T> void run(const gradient_distance_arguments &x, bool second) {
  cut parts(x);
  if (x.metric == cosine) return run_cosine<T>(x, parts, second);
  scratch<double> value(parts.segments());
  for_each_segment<T>(x, parts, [&](int64_t c, const segment<T> &part, int64_t slot) {
    const double scale = x.scale ? x.scale[c] : 1.0;
    if (x.metric != row_cosine) {
      value[slot] = second ? elementwise_second(part, x.metric, scale) : elementwise(part, x.metric, scale);
      return;
    }
    const moments sums = all_moments(part, second);
    coefficients factors;
    if (second) {
      value[slot] = cosine_second(sums, x.epsilon, &factors);
    } else {
      value[slot] = cosine_value(sums, x.epsilon);
      factors = cosine_gradient(sums, x.epsilon);
    }
    write_outputs(part, factors, scale, second);
  });
  for (int64_t c = 0; c < x.classes; ++c) x.value[c] = 0;
  add_by_class(x, parts, [&](int64_t c, int64_t slot) { x.value[c] += value[slot]; });
}

void run_type(const gradient_distance_arguments &x, bool second) {
  switch (x.type) {
  case float32: return run<float>(x, second);
  case float64: return run<double>(x, second);
  case bfloat16_type: return run<bfloat16>(x, second);
  default: return run<float16>(x, second);
  }
}

}  // namespace

void gradient_distance(const gradient_distance_arguments &x) { run_type(x, false); }
void gradient_distance_second(const gradient_distance_arguments &x) { run_type(x, true); }

}  // namespace DDFAST_LEVEL
}  // namespace ddfast
