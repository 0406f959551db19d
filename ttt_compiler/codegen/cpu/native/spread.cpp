// The write of a chunk over many steps: what it adds to a product meanwhile, and its next columns; see spread.py.
namespace {

// Columns of W that are written side by side, and rows of W for which they are summed together.
constexpr int kPanel = 16, kTile = 8;
// Columns that are packed side by side when a write ends at once: their panels stay in the cache for all rows.
constexpr int64_t kBite = 64;

#if defined(__AVX512BF16__)
inline __m512bh as_pairs(__m512i x) { return reinterpret_cast<const __m512bh&>(x); }
#endif

// Hidden rows of a chunk as they lie in the ring of the tail.
template <typename T>
struct Keys {
  const T* tail;         // [lanes, capacity, f]
  const int32_t* lanes;  // which lane holds a column, of this row; null while it is always ``lane``
  int64_t lane, capacity, f, first;

  const T* operator()(int64_t n) const {
    const int64_t column = (first + n) % capacity;
    return tail + ((lanes ? lanes[column] : lane) * capacity + column) * f;
  }
};

// ``count`` keys and their v, and the matrix that they are written into.
template <typename T, typename A>
struct Columns {
#if defined(__AVX512BF16__)
  static constexpr bool kByPairs = std::is_same_v<T, bf16>;
#else
  static constexpr bool kByPairs = false;
#endif
  A* w;           // [d, f]
  const T* base;  // what stands in W before, where that is not W itself; else null
  int64_t base_stride;
  const T* v;  // [d, count]
  Keys<T> keys;
  int64_t count, d;
  int threads;

  // W[:, first:rest] += v keys[:, first:rest], rest = first + size; and ``added`` = v (keys[:, rest:] h[rest:]): empty
  // where no column is left, or h is null.
  void write(int64_t first, int64_t size, const A* h, std::vector<A>& added) const {
    const int64_t rest = first + size;
    const bool adds = h && rest < keys.f;
    static thread_local std::vector<A> of_panels, of_keys;
    of_panels.resize(room(size));
    of_keys.resize(count);
    A *panels = of_panels.data(), *scores = of_keys.data();
    const int64_t groups = (count + kRows - 1) / kRows;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t n = i * kRows, end = std::min(count, n + kRows);
      if (adds) dots_of_keys(n, end, h, scores, rest);
      pack(panels, first, size, n, end);
    }
    added.resize(adds ? d : 0);
    const int64_t tiles = (d + kTile - 1) / kTile;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t r = i * kTile, rows = std::min<int64_t>(kTile, d - r);
      if (adds) dots_of(v + r * count, scores, added.data() + r, rows, count, count);
      for (int64_t c = 0; c < size; c += kPanel) {
        const int n = int(std::min<int64_t>(kPanel, size - c));
        if (rows == kTile)
          tile<kTile>(panels + c * count, r, first + c, n);
        else
          for (int64_t one = r; one < d; ++one) tile<1>(panels + c * count, one, first + c, n);
      }
    }
  }

 private:
  // Room for panels of ``size`` columns.
  int64_t room(int64_t size) const { return (size + kPanel - 1) / kPanel * kPanel * count; }

  // Whether two keys at a time are multiplied, by the processor's unit for bf16: numbers below 1e-38 are zero to it.
  bool pairs() const { return kByPairs && count % 2 == 0; }

  // scores[n] = keys(n)[rest:] . h[rest:] of kRows keys or fewer, from a multiple of it.
  void dots_of_keys(int64_t n, int64_t end, const A* h, A* scores, int64_t rest) const {
    const T* key = keys(n);
    bool together = end - n == kRows;
    for (int i = 1; together && i < kRows; ++i) together = keys(n + i) == key + i * keys.f;
    if (together)
      dots<kRows>(key + rest, h + rest, scores + n, keys.f - rest, keys.f);
    else
      for (; n < end; ++n) dots<1>(keys(n) + rest, h + rest, scores + n, keys.f - rest, keys.f);
  }

  // Columns [first, first + size) of keys [from, to), in panels [size / kPanel][count][kPanel], or pairs of them
  // [..][count / 2][kPanel][2]. The last panel is filled up with zeros.
  void pack(A* panels, int64_t first, int64_t size, int64_t from, int64_t to) const {
    for (int64_t c = 0; c < size; c += kPanel) {
      const int n = int(std::min<int64_t>(kPanel, size - c));
      A* panel = panels + c * count;
      if constexpr (kByPairs)
        if (pairs()) {
          uint32_t* of_two = reinterpret_cast<uint32_t*>(panel);
          for (int64_t k = from; k < to; k += 2) {
            std::fill_n(of_two + k / 2 * kPanel + n, kPanel - n, 0);
            pair(keys(k) + first + c, keys(k + 1) + first + c, of_two + k / 2 * kPanel, n);
          }
          continue;
        }
      for (int64_t k = from; k < to; ++k) {
        const T* key = keys(k) + first + c;
        for (int j = 0; j < kPanel; ++j) panel[k * kPanel + j] = j < n ? A(widen(key[j])) : A(0);
      }
    }
  }

  template <int N>
  void tile(const A* panel, int64_t row, int64_t column, int n) const {
    A sum[N][kPanel] = {};
    if (pairs())
      of_pairs<N>(panel, row, sum);
    else
      for (int64_t k = 0; k < count; ++k)
        for (int i = 0; i < N; ++i) {
          const A of_v = widen(v[(row + i) * count + k]);
#pragma omp simd
          for (int j = 0; j < kPanel; ++j) sum[i][j] += of_v * panel[k * kPanel + j];
        }
    for (int i = 0; i < N; ++i) {
      A* to = w + (row + i) * keys.f + column;
      for (int j = 0; j < n; ++j)
        to[j] = (base ? A(widen(base[(row + i) * base_stride + column + j])) : to[j]) + sum[i][j];
    }
  }

  template <int N>
  void of_pairs([[maybe_unused]] const A* panel, [[maybe_unused]] int64_t row,
                [[maybe_unused]] A (&sum)[N][kPanel]) const {
#if defined(__AVX512BF16__)
    if constexpr (kByPairs) {
      __m512 total[N];
      for (int i = 0; i < N; ++i) total[i] = _mm512_setzero_ps();
      for (int64_t k = 0; k < count / 2; ++k) {
        const __m512i of_keys = _mm512_loadu_si512(panel + k * kPanel);
        for (int i = 0; i < N; ++i) {
          int of_v;
          std::memcpy(&of_v, v + (row + i) * count + 2 * k, 4);
          total[i] = _mm512_dpbf16_ps(total[i], as_pairs(of_keys), as_pairs(_mm512_set1_epi32(of_v)));
        }
      }
      for (int i = 0; i < N; ++i) _mm512_storeu_ps(sum[i], total[i]);
    }
#endif
  }
};

}  // namespace

#define TTT_SPREAD(NAME, T, A)                                                                                     \
  extern "C" void spread_##NAME(A* w, const T* base, const T* v, const T* tail, const int32_t* lanes,              \
                                int64_t base_stride, int64_t lane, int64_t capacity, int64_t f, int64_t d,         \
                                int64_t start, int64_t count, int64_t first, int64_t size, int threads) {          \
    std::vector<A> unused;                                                                                         \
    const Columns<T, A> all{w,     base, base_stride, v, Keys<T>{tail, lanes, lane, capacity, f, start},           \
                            count, d,    threads};                                                                 \
    for (int64_t c = 0; c < size; c += kBite) all.write(first + c, std::min(kBite, size - c), nullptr, unused);    \
  }

TTT_SPREAD(float32, float, float)
TTT_SPREAD(float64, double, double)
TTT_SPREAD(bfloat16, bf16, float)
TTT_SPREAD(float16, _Float16, float)
