// A few rows times a matrix, turned: at the speed of reading the matrix, in the order in which it lies; see few_rows.py.
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
void few_rows(const T* x, const T* p, T* out, int64_t count, int64_t depth, int64_t columns, int64_t stride,
              int threads) {
  int64_t i = 0;
  for (; i + kFew <= count; i += kFew) across<kFew, T, A>(x + i * depth, p, out + i, depth, columns, stride, threads);
  for (; i < count; ++i) across<1, T, A>(x + i * depth, p, out + i, depth, columns, stride, threads);
}

}  // namespace

// out [columns, count] of rows ``stride`` apart = (x [count, depth] p [depth, columns])^T.
#define TTT_FEW(NAME, T, A)                                                                                 \
  extern "C" void few_rows_##NAME(const T* x, const T* p, T* out, int64_t count, int64_t depth,             \
                                  int64_t columns, int64_t stride, int threads) {                           \
    few_rows<T, A>(x, p, out, count, depth, columns, stride, threads);                                      \
  }

TTT_FEW(float32, float, float)
TTT_FEW(float64, double, double)
TTT_FEW(bfloat16, bf16, float)
TTT_FEW(float16, _Float16, float)
