// v of a few tokens, turned: at the speed of reading P, in the order in which it lies; see values.py.
namespace {

// Tokens and columns whose sums are in registers; rows of P that are asked for ahead, since they lie far apart.
constexpr int kFew = 8, kWide = 32;
constexpr int64_t kAhead = 12;

// out[j * stride + i] = x[i] . panel[:, j] of N tokens and n columns.
template <int N, typename T, typename A>
void few(const T* x, const A* panel, T* out, int64_t depth, int64_t stride, int n) {
  A sum[N][kWide] = {};
  for (int64_t k = 0; k < depth; ++k)
    for (int i = 0; i < N; ++i) {
      const A one = widen(x[i * depth + k]);
#pragma omp simd
      for (int j = 0; j < kWide; ++j) sum[i][j] += one * panel[k * kWide + j];
    }
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < N; ++i) narrow(out[j * stride + i], sum[i][j]);
}

// out [columns, count] of rows ``stride`` apart = (x [count, depth] p [depth, columns])^T, columns [from, to).
template <typename T, typename A>
void project(const T* x, const T* p, T* out, int64_t count, int64_t depth, int64_t columns, int64_t stride,
             int64_t from, int64_t to, int threads) {
  const int64_t tiles = (to - from + kWide - 1) / kWide;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t c = from + tile * kWide;
    const int n = int(std::min<int64_t>(kWide, to - c));
    static thread_local std::vector<A> held;
    held.resize(depth * kWide);
    A* panel = held.data();
    for (int64_t k = 0; k < depth; ++k) {
      const T* row = p + k * columns + c;
      if (k + kAhead < depth)
        for (int j = 0; j < n; j += 64 / int(sizeof(T))) __builtin_prefetch(row + kAhead * columns + j);
      if (n == kWide) {
#pragma omp simd
        for (int j = 0; j < kWide; ++j) panel[k * kWide + j] = widen(row[j]);
      } else {
        for (int j = 0; j < kWide; ++j) panel[k * kWide + j] = j < n ? A(widen(row[j])) : A(0);
      }
    }
    int64_t i = 0;
    for (; i + kFew <= count; i += kFew) few<kFew>(x + i * depth, panel, out + c * stride + i, depth, stride, n);
    for (; i < count; ++i) few<1>(x + i * depth, panel, out + c * stride + i, depth, stride, n);
  }
}

// Of so few tokens that reading P is all: sums stay in the cache, and P is read in the order in which it lies.
constexpr int kFewest = 4, kDeep = 8, kOne = 16;

// Columns [first, first + width) of N tokens; ``sums`` holds N * width numbers.
template <int N, typename T, typename A>
void stream(const T* x, const T* p, T* out, int64_t depth, int64_t columns, int64_t stride, int64_t first,
            int64_t width, A* sums) {
  std::fill_n(sums, N * width, A(0));
  for (int64_t k = 0; k < depth; k += kDeep) {
    const int64_t deep = std::min<int64_t>(kDeep, depth - k);
    const T* rows = p + k * columns + first;
    A of_x[N][kDeep] = {};
    for (int i = 0; i < N; ++i)
      for (int64_t q = 0; q < deep; ++q) of_x[i][q] = widen(x[i * depth + k + q]);
    int64_t c = 0;
    if (deep == kDeep)
      for (; c + kOne <= width; c += kOne) {
        A sum[N][kOne];
        for (int i = 0; i < N; ++i)
#pragma omp simd
          for (int j = 0; j < kOne; ++j) sum[i][j] = sums[i * width + c + j];
        for (int q = 0; q < kDeep; ++q)
          for (int i = 0; i < N; ++i)
#pragma omp simd
            for (int j = 0; j < kOne; ++j) sum[i][j] += of_x[i][q] * A(widen(rows[q * columns + c + j]));
        for (int i = 0; i < N; ++i)
#pragma omp simd
          for (int j = 0; j < kOne; ++j) sums[i * width + c + j] = sum[i][j];
      }
    for (; c < width; ++c)
      for (int i = 0; i < N; ++i)
        for (int64_t q = 0; q < deep; ++q) sums[i * width + c] += of_x[i][q] * A(widen(rows[q * columns + c]));
  }
  for (int64_t c = 0; c < width; ++c)
    for (int i = 0; i < N; ++i) narrow(out[(first + c) * stride + i], sums[i * width + c]);
}

// As ``project``, of ``kFewest`` tokens.
template <typename T, typename A>
void project_fewest(const T* x, const T* p, T* out, int64_t depth, int64_t columns, int64_t stride, int64_t from,
                    int64_t to, int threads) {
  const int64_t share = (to - from + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < threads; ++i) {
    const int64_t first = std::min(to, from + i * share), width = std::min(to, first + share) - first;
    static thread_local std::vector<A> sums;
    sums.resize(kFewest * width);
    stream<kFewest, T, A>(x, p, out, depth, columns, stride, first, width, sums.data());
  }
}

template <typename T, typename A>
struct Values {
  const T *t, *h;  // [rows, dt], and [count, f]
  const T *conv, *p;  // [dt, kernel], and [dt, d] or null
  T* out;             // [d, count], rows ``stride`` apart
  int64_t rows, first, count, dt, f, d, from, to, kernel, stride;
  A scale;
  int threads;

  // ``sums``: of the squares of v and of h.
  void run(double* sums) const {
    static thread_local std::vector<T> held;
    held.resize(count * dt);
    std::vector<A> taps(kernel * dt);
    for (int64_t c = 0; c < dt; ++c)
      for (int64_t k = 0; k < kernel; ++k) taps[k * dt + c] = A(widen(conv[c * kernel + k])) * scale;
    // Of the tokens that are there, centred, zero beyond them; times eta.
    for (int64_t i = 0; i < count; ++i)
      convolved(t, taps.data(), held.data() + i * dt, first + i, rows, dt, kernel);
    if (p) {
      if (count == kFewest)
        project_fewest<T, A>(held.data(), p, out, dt, d, stride, from, to, threads);
      else
        project<T, A>(held.data(), p, out, count, dt, d, stride, from, to, threads);
    } else {
      for (int64_t c = from; c < to; ++c)
        for (int64_t i = 0; i < count; ++i) out[c * stride + i] = held[i * dt + c];
    }
    sums[0] = 0;
    for (int64_t c = from; c < to; ++c) sums[0] += squares<T, A>(out + c * stride, count, 1);
    sums[1] = from == 0 && to > 0 ? squares<T, A>(h, count * f, 1) : 0;
  }
};

}  // namespace

#define TTT_VALUES(NAME, T, A)                                                                                    \
  extern "C" void values_##NAME(const T* t, const T* h, const T* conv, const T* p, T* out, double* sums,          \
                                int64_t rows, int64_t first, int64_t count, int64_t dt, int64_t f, int64_t d,     \
                                int64_t from, int64_t to, int64_t kernel, int64_t stride, double scale,           \
                                int threads) {                                                                    \
    Values<T, A>{t,  h,    conv, p,      out,    rows,     first,  count, dt, f,                                  \
                 d,  from, to,   kernel, stride, A(scale), threads}                                               \
        .run(sums);                                                                                               \
  }

TTT_VALUES(float32, float, float)
TTT_VALUES(float64, double, double)
TTT_VALUES(bfloat16, bf16, float)
TTT_VALUES(float16, _Float16, float)
