// v of a few tokens, turned: at the speed of reading P, in the order in which it lies; see values.py.
namespace {

// Rows whose sums are taken together, rows of the matrix that are read side by side, and sums in one register.
constexpr int kFew = 8, kDeep = 8, kOne = 16;

// Columns [first, first + width) of N rows; ``sums`` holds N * width numbers.
template <int N, typename T, typename A>
void few(const T* x, const T* p, T* out, int64_t depth, int64_t columns, int64_t stride, int64_t first, int64_t width,
         A* sums) {
  std::fill_n(sums, N * width, A(0));
  for (int64_t k = 0; k < depth; k += kDeep) {
    const int deep = int(std::min<int64_t>(kDeep, depth - k));
    A of_x[kDeep][N];
    for (int q = 0; q < kDeep; ++q)
      for (int i = 0; i < N; ++i) of_x[q][i] = q < deep ? A(widen(x[i * depth + k + q])) : A(0);
    const T* rows[kDeep];
    // Beyond the last row that row again, times zero.
    for (int q = 0; q < kDeep; ++q) rows[q] = p + (k + std::min(q, deep - 1)) * columns + first;
    int64_t c = 0;
    for (; c + kOne <= width; c += kOne) {
      A sum[N][kOne];
      for (int i = 0; i < N; ++i)
#pragma omp simd
        for (int j = 0; j < kOne; ++j) sum[i][j] = sums[i * width + c + j];
      for (int q = 0; q < kDeep; ++q)
        for (int i = 0; i < N; ++i)
#pragma omp simd
          for (int j = 0; j < kOne; ++j) sum[i][j] += of_x[q][i] * A(widen(rows[q][c + j]));
      for (int i = 0; i < N; ++i)
#pragma omp simd
        for (int j = 0; j < kOne; ++j) sums[i * width + c + j] = sum[i][j];
    }
    for (; c < width; ++c)
      for (int i = 0; i < N; ++i)
        for (int q = 0; q < deep; ++q) sums[i * width + c] += of_x[q][i] * A(widen(rows[q][c]));
  }
  for (int64_t c = 0; c < width; ++c)
    for (int i = 0; i < N; ++i) narrow(out[(first + c) * stride + i], sums[i * width + c]);
}

template <int N, typename T, typename A>
void across(const T* x, const T* p, T* out, int64_t depth, int64_t columns, int64_t stride, int threads) {
  // Each thread reads columns of its own.
  const int64_t share = (columns + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < threads; ++i) {
    const int64_t first = std::min(columns, i * share), width = std::min(columns, first + share) - first;
    static thread_local std::vector<A> sums;
    sums.resize(N * width);
    few<N, T, A>(x, p, out, depth, columns, stride, first, width, sums.data());
  }
}

template <typename T, typename A>
struct Values {
  const T *t, *h;  // [rows, dt], and [count, f]
  const T *conv, *p;  // [dt, kernel], and [dt, d] or null
  T* out;             // [d, count], rows ``stride`` apart
  int64_t rows, first, count, dt, f, d, kernel, stride;
  A scale;
  int threads;

  // Squares of v and h are summed in double precision.
  void run(double* squares) const {
    static thread_local std::vector<T> held;
    held.resize(count * dt);
    convolve(held.data());
    if (p) {
      int64_t i = 0;
      for (; i + kFew <= count; i += kFew) across<kFew, T, A>(held.data() + i * dt, p, out + i, dt, d, stride, threads);
      for (; i < count; ++i) across<1, T, A>(held.data() + i * dt, p, out + i, dt, d, stride, threads);
    } else {
      for (int64_t c = 0; c < dt; ++c)
        for (int64_t i = 0; i < count; ++i) out[c * stride + i] = held[i * dt + c];
    }
    double of_v = 0, of_h = 0;
    for (int64_t c = 0; c < d; ++c)
      for (int64_t i = 0; i < count; ++i) of_v += double(widen(out[c * stride + i])) * double(widen(out[c * stride + i]));
    for (int64_t i = 0; i < count * f; ++i) of_h += double(widen(h[i])) * double(widen(h[i]));
    squares[0] = of_v;
    squares[1] = of_h;
  }

  // Tokens [first, first + count) of those that are there, centred, zero beyond them; times eta.
  void convolve(T* u) const {
    std::vector<A> taps(kernel * dt);
    for (int64_t c = 0; c < dt; ++c)
      for (int64_t k = 0; k < kernel; ++k) taps[k * dt + c] = A(widen(conv[c * kernel + k])) * scale;
    std::vector<A> sum(dt);
    for (int64_t i = 0; i < count; ++i) {
      std::fill(sum.begin(), sum.end(), A(0));
      for (int64_t k = 0; k < kernel; ++k) {
        const int64_t row = first + i + k - kernel / 2;
        if (row < 0 || row >= rows) continue;
#pragma omp simd
        for (int64_t c = 0; c < dt; ++c) sum[c] += taps[k * dt + c] * A(widen(t[row * dt + c]));
      }
      for (int64_t c = 0; c < dt; ++c) narrow(u[i * dt + c], sum[c]);
    }
  }
};

}  // namespace

#define TTT_VALUES(NAME, T, A)                                                                                    \
  extern "C" void values_##NAME(const T* t, const T* h, const T* conv, const T* p, T* out, double* squares,       \
                                int64_t rows, int64_t first, int64_t count, int64_t dt, int64_t f, int64_t d,     \
                                int64_t kernel, int64_t stride, double scale, int threads) {                      \
    Values<T, A>{t, h, conv, p, out, rows, first, count, dt, f, d, kernel, stride, A(scale), threads}.run(squares); \
  }

TTT_VALUES(float32, float, float)
TTT_VALUES(float64, double, double)
TTT_VALUES(bfloat16, bf16, float)
TTT_VALUES(float16, _Float16, float)
