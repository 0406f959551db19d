// Products of rows with one vector, at the speed of reading the rows.
namespace {

// Rows of a matrix that are read side by side: h is loaded once for them.
constexpr int kRows = 8;
// Partial sums of one row: so many that additions do not wait for each other.
constexpr int kLanes = 16;
// Rows of one unit of work; what sequences that share a matrix read one after the other.
constexpr int64_t kBlock = 64;

// s[n] = sum_f m[n, f] h[f] of N rows that lie ``stride`` apart.
template <int N, typename M, typename A>
inline void dots(const M* m, const A* h, A* s, int64_t width, int64_t stride) {
  A sum[N][kLanes] = {};
  int64_t f = 0;
  for (; f + kLanes <= width; f += kLanes)
    for (int n = 0; n < N; ++n) {
      // The next rows, into the second cache: a matrix comes from memory, since a model's other weights have
      // passed through the last one. 26 GB/s for 21; but where it is there, 54 for 64.
      if (N == kRows && f * int64_t(sizeof(M)) % 64 == 0) __builtin_prefetch(m + (n + N) * stride + f, 0, 2);
#pragma omp simd
      for (int j = 0; j < kLanes; ++j) sum[n][j] += A(widen(m[n * stride + f + j])) * h[f + j];
    }
  for (int n = 0; n < N; ++n) {
    s[n] = 0;
    for (int j = 0; j < kLanes; ++j) s[n] += sum[n][j];
    for (int64_t g = f; g < width; ++g) s[n] += A(widen(m[n * stride + g])) * h[g];
  }
}

template <typename M, typename A>
void dots_of(const M* m, const A* h, A* s, int64_t rows, int64_t width, int64_t stride) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) dots<kRows>(m + r * stride, h, s + r, width, stride);
  for (; r < rows; ++r) dots<1>(m + r * stride, h, s + r, width, stride);
}

}  // namespace
