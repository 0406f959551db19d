// The convolution along a chunk; see conv.py.
namespace {

// out[d] = sum_n taps[n][d] * x[n][d]. N is known to the compiler, so that the sum stays in registers.
template <int N, typename T, typename A>
void row(T* __restrict out, const A* const* taps, const T* const* x, int64_t width) {
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) {
    A sum = 0;
    for (int n = 0; n < N; ++n) sum += taps[n][d] * widen(x[n][d]);
    narrow(out[d], sum);
  }
}

template <int N, typename T, typename A>
void some(int count, T* out, const A* const* taps, const T* const* x, int64_t width) {
  if constexpr (N > 0) {
    if (count == N)
      row<N>(out, taps, x, width);
    else
      some<N - 1>(count, out, taps, x, width);
  }
}

constexpr int kTaps = 9;

// Row r of ``rows``: out[d] = sum_k taps[k, d] * src[r + k - K/2, d] over rows that there are.
template <typename T, typename A>
void convolved(const T* src, const A* taps, T* out, int64_t r, int64_t rows, int64_t width, int64_t kernel) {
  const int64_t half = kernel / 2;
  if (kernel > kTaps) {
    for (int64_t d = 0; d < width; ++d) {
      A sum = 0;
      for (int64_t k = std::max<int64_t>(0, half - r); k < std::min(kernel, rows - r + half); ++k)
        sum += taps[k * width + d] * widen(src[(r + k - half) * width + d]);
      narrow(out[d], sum);
    }
    return;
  }
  const A* w[kTaps];
  const T* x[kTaps];
  int count = 0;
  for (int64_t k = 0; k < kernel; ++k) {
    if (r + k - half < 0 || r + k - half >= rows) continue;
    w[count] = taps + k * width;
    x[count++] = src + (r + k - half) * width;
  }
  some<kTaps>(count, out, w, x, width);
}

// out[c, i, d] = sum_k taps[k, d] * src[c, i + k - K/2, d] over rows of the same chunk.
template <typename T, typename A>
void conv(const T* src, const A* taps, T* out, int64_t chunks, int64_t rows, int64_t width, int64_t kernel,
          int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < chunks * rows; ++i) {
    const int64_t r = i % rows;
    convolved(src + (i - r) * width, taps, out + i * width, r, rows, width, kernel);
  }
}

// out[k, d] += sum over chunks c and rows i of grad[c, i, d] src[c, i + k - K/2, d]: sums of a chunk in A, of
// chunks in double.
template <typename T, typename A>
void taps(const T* grad, const T* src, double* out, int64_t chunks, int64_t rows, int64_t width, int64_t kernel,
          int threads) {
  constexpr int64_t kWidth = 64;
  const int64_t half = kernel / 2, blocks = (width + kWidth - 1) / kWidth;
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = i * kWidth, count = std::min(kWidth, width - first);
    for (int64_t c = 0; c < chunks; ++c) {
      A sum[kTaps][kWidth] = {};
      for (int64_t r = 0; r < rows; ++r) {
        const T* g = grad + (c * rows + r) * width + first;
        for (int64_t k = std::max<int64_t>(0, half - r); k < std::min(kernel, rows - r + half); ++k) {
          const T* x = src + (c * rows + r + k - half) * width + first;
#pragma omp simd
          for (int64_t d = 0; d < count; ++d) sum[k][d] += A(widen(g[d])) * widen(x[d]);
        }
      }
      for (int64_t k = 0; k < kernel; ++k)
        for (int64_t d = 0; d < count; ++d) out[k * width + first + d] += sum[k][d];
    }
  }
}

}  // namespace

#define TTT_CONV(NAME, T, A)                                                                             \
  extern "C" void conv_##NAME(const T* src, const A* taps, T* out, int64_t chunks, int64_t rows,         \
                              int64_t width, int64_t kernel, int threads) {                              \
    conv<T, A>(src, taps, out, chunks, rows, width, kernel, threads);                                    \
  }                                                                                                      \
  extern "C" void taps_##NAME(const T* grad, const T* src, double* out, int64_t chunks, int64_t rows,    \
                              int64_t width, int64_t kernel, int threads) {                              \
    taps<T, A>(grad, src, out, chunks, rows, width, kernel, threads);                                    \
  }

TTT_CONV(float32, float, float)
TTT_CONV(float64, double, double)
TTT_CONV(bfloat16, bf16, float)
TTT_CONV(float16, _Float16, float)
