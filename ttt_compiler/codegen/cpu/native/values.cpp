// v of a few tokens, turned: at the speed of reading P, in the order in which it lies.
namespace {

// Tokens and columns whose sums are in registers. Rows of P and of the tokens lie far apart: so many are asked for
// ahead, so many are packed at once, which stay in the cache, and so many pieces of P's.
constexpr int kFew = 8, kWide = 32;
constexpr int64_t kAhead = 12, kAtOnce = 128, kPieces = 2;

// sums[i][j] += sum_k x[k][i] panel[k][j], k below ``deep``.
template <typename A>
void few(const A* x, const A* panel, A* sums, int64_t deep) {
  A sum[kFew][kWide];
  for (int i = 0; i < kFew; ++i)
#pragma omp simd
    for (int j = 0; j < kWide; ++j) sum[i][j] = sums[i * kWide + j];
  for (int64_t k = 0; k < deep; ++k)
    for (int i = 0; i < kFew; ++i) {
      const A one = x[k * kFew + i];
#pragma omp simd
      for (int j = 0; j < kWide; ++j) sum[i][j] += one * panel[k * kWide + j];
    }
  for (int i = 0; i < kFew; ++i)
#pragma omp simd
    for (int j = 0; j < kWide; ++j) sums[i * kWide + j] = sum[i][j];
}

// ``deep`` rows of ``count`` numbers that lie ``apart``, in pieces of W: row k of piece g is at
// to[(g * kAtOnce + k) * W]. The last piece is filled up with zeros.
template <int W, typename T, typename A>
void pack(const T* from, int64_t apart, A* to, int64_t deep, int64_t count) {
  for (int64_t k = 0; k < deep; ++k) {
    const T* row = from + k * apart;
    for (int64_t c = 0; c < count; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + kAhead * apart + c);
    A* piece = to + k * W;
    int64_t c = 0;
    for (; c + W <= count; c += W, piece += kAtOnce * W)
#pragma omp simd
      for (int j = 0; j < W; ++j) piece[j] = widen(row[c + j]);
    if (c < count)
      for (int j = 0; j < W; ++j) piece[j] = c + j < count ? A(widen(row[c + j])) : A(0);
  }
}

// out [columns, count] of rows ``stride`` apart = (x^T p)^T, x [depth, count] of rows ``apart`` apart,
// p [depth, columns], columns [from, to).
template <typename T, typename A>
void project(const T* x, int64_t apart, const T* p, T* out, int64_t count, int64_t depth, int64_t columns,
             int64_t stride, int64_t from, int64_t to, int threads) {
  if constexpr (std::is_same_v<T, bf16>)
    if (fits_pairs(depth, columns) &&
        project_pairs(x, apart, p, out, count, depth, columns, stride, from, to, threads))
      return;
  const int64_t bunches = (count + kFew - 1) / kFew, tiles = (to - from + kWide - 1) / kWide;
  const int64_t share = (tiles + threads - 1) / threads * kWide;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < threads; ++part) {
    const int64_t first = from + part * share, last = std::min(to, first + share);
    static thread_local std::vector<A> tokens, panels, sums;
    tokens.resize(bunches * kAtOnce * kFew);
    panels.resize(kPieces * kAtOnce * kWide);
    sums.assign(share * bunches * kFew, A(0));
    for (int64_t k = 0; k < depth && first < last; k += kAtOnce) {
      const int64_t deep = std::min(kAtOnce, depth - k);
      pack<kFew>(x + k * apart, apart, tokens.data(), deep, count);
      A* sum = sums.data();
      for (int64_t c = first; c < last; c += kPieces * kWide) {
        const int64_t width = std::min(kPieces * kWide, last - c);
        pack<kWide>(p + k * columns + c, columns, panels.data(), deep, width);
        for (int64_t j = 0; j < width; j += kWide)
          for (int64_t i = 0; i < bunches; ++i, sum += kFew * kWide)
            few(tokens.data() + i * kAtOnce * kFew, panels.data() + j * kAtOnce, sum, deep);
      }
    }
    for (int64_t c = first; c < last; ++c) {
      const A* of_column = sums.data() + (c - first) / kWide * bunches * kFew * kWide + (c - first) % kWide;
      for (int64_t i = 0; i < count; ++i) narrow(out[c * stride + i], of_column[i * kWide]);
    }
  }
}

// Of so few tokens that reading P is all: sums stay in the cache, and P is read in the order in which it lies.
constexpr int kFewest = 4, kDeep = 8, kOne = 16;

// Columns [first, first + width) of N tokens, of which n are there; ``sums`` holds N * width numbers.
template <int N, typename T, typename A>
void stream(const T* x, const T* p, T* out, int64_t depth, int64_t columns, int64_t stride, int64_t first,
            int64_t width, int n, A* sums) {
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
    for (int i = 0; i < n; ++i) narrow(out[(first + c) * stride + i], sums[i * width + c]);
}

// As ``project``, of at most ``kFewest`` tokens that lie one after the other, in room for so many.
template <typename T, typename A>
void project_fewest(const T* x, const T* p, T* out, int64_t count, int64_t depth, int64_t columns, int64_t stride,
                    int64_t from, int64_t to, int threads) {
  const int64_t share = (to - from + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < threads; ++i) {
    const int64_t first = std::min(to, from + i * share), width = std::min(to, first + share) - first;
    static thread_local std::vector<A> sums;
    sums.resize(kFewest * width);
    stream<kFewest, T, A>(x, p, out, depth, columns, stride, first, width, int(count), sums.data());
  }
}

// out[k * stride + i] = x[i * width + k]: by tiles, since a row of ``out`` lies far from the next.
template <typename T>
void turned(const T* x, T* out, int64_t count, int64_t width, int64_t stride) {
  constexpr int64_t kTile = 16;
  for (int64_t c = 0; c < width; c += kTile)
    for (int64_t r = 0; r < count; r += kTile)
      for (int64_t k = c; k < std::min(width, c + kTile); ++k)
        for (int64_t i = r; i < std::min(count, r + kTile); ++i) out[k * stride + i] = x[i * width + k];
}

// v of some tokens of a chunk, and of its columns.
template <typename T, typename A>
struct Values {
  const T* t;         // [rows, dt], consecutive: those tokens, and what their taps reach of the chunk
  const T *conv, *p;  // [dt, kernel], and [dt, d] or null
  T* out;             // [d, count], rows ``stride`` apart
  T* mixed;           // [dt, count], rows ``stride`` apart: the convolution, which ``mixes`` makes; or null
  bool mixes;
  int64_t rows, first, count, dt, d, from, to, kernel, stride;
  A scale;
  int threads;

  void run() const {
    static thread_local std::vector<T> held, beside;
    if (p && count <= kFewest) {
      convolve(held);
      project_fewest<T, A>(held.data(), p, out, count, dt, d, stride, from, to, threads);
    } else {
      T* x = mixed;
      const int64_t apart = mixed ? stride : count;
      if (!mixed) {
        beside.resize(dt * count);
        x = beside.data();
      }
      if (!mixed || mixes) {
        convolve(held);
        turned(held.data(), x, count, dt, apart);
      }
      if (p && from < to)
        project<T, A>(x, apart, p, out, count, dt, d, stride, from, to, threads);
      else
        for (int64_t c = from; c < to; ++c) std::copy_n(x + c * apart, count, out + c * stride);
    }
  }

  // Of the tokens that are there, centred, zero beyond them; times eta.
  void convolve(std::vector<T>& to) const {
    to.assign(std::max<int64_t>(count, kFewest) * dt, T{});
    std::vector<A> taps(kernel * dt);
    for (int64_t c = 0; c < dt; ++c)
      for (int64_t k = 0; k < kernel; ++k) taps[k * dt + c] = A(widen(conv[c * kernel + k])) * scale;
    for (int64_t i = 0; i < count; ++i) convolved(t, taps.data(), to.data() + i * dt, first + i, rows, dt, kernel);
  }
};

}  // namespace
