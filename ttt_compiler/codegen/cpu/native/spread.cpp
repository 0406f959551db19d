// The write of a chunk over many steps: what it adds to a product meanwhile, and its next columns; see spread.py.
namespace {

// Columns of W that are written side by side, and rows of W for which they are summed together.
constexpr int kPanel = 16, kTile = 8;

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

// scores[n] = keys(n)[from:] . h[from:] of ``count`` keys.
template <typename T, typename A>
void scores_of(const Keys<T>& keys, int64_t count, const A* h, A* scores, int64_t from, int threads) {
  const int64_t f = keys.f, width = f - from;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < count; block += kBlock) {
    const int64_t end = std::min(count, block + kBlock);
    for (int64_t n = block; n < end;) {
      const T* key = keys(n);
      bool together = n + kRows <= end;
      for (int i = 1; together && i < kRows; ++i) together = keys(n + i) == key + i * f;
      if (together)
        dots<kRows>(key + from, h + from, scores + n, width, f);
      else
        dots<1>(key + from, h + from, scores + n, width, f);
      n += together ? kRows : 1;
    }
  }
}

// ``count`` keys and their v, and the matrix that they are written into.
template <typename T, typename A>
struct Columns {
  A* w;           // [d, f]
  const T* base;  // what stands in W before, where that is not W itself; else null
  int64_t base_stride;
  const T* v;  // [d, count]
  Keys<T> keys;
  int64_t count, d;
  int threads;

  // W[:, first:first+size] += v keys[:, first:first+size].
  void write(int64_t first, int64_t size) const {
    static thread_local std::vector<A> held;
    held.resize(count * kPanel);
    A* panel = held.data();
    for (int64_t c = first; c < first + size; c += kPanel) {
      const int n = int(std::min<int64_t>(kPanel, first + size - c));
      for (int64_t k = 0; k < count; ++k) {
        const T* key = keys(k) + c;
        for (int j = 0; j < kPanel; ++j) panel[k * kPanel + j] = j < n ? A(widen(key[j])) : A(0);
      }
      const int64_t tiles = (d + kTile - 1) / kTile;
#pragma omp parallel for num_threads(threads) if (threads > 1)
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t r = i * kTile;
        if (r + kTile <= d)
          tile<kTile>(panel, r, c, n);
        else
          for (int64_t one = r; one < d; ++one) tile<1>(panel, one, c, n);
      }
    }
  }

  template <int N>
  void tile(const A* panel, int64_t row, int64_t column, int n) const {
    A sum[N][kPanel] = {};
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
};

}  // namespace

#define TTT_SPREAD(NAME, T, A)                                                                                     \
  extern "C" void spread_##NAME(A* w, const T* base, const T* v, const T* tail, const int32_t* lanes,              \
                                int64_t base_stride, int64_t lane, int64_t capacity, int64_t f, int64_t d,         \
                                int64_t start, int64_t count, int64_t first, int64_t size, int threads) {          \
    Columns<T, A>{w, base, base_stride, v, Keys<T>{tail, lanes, lane, capacity, f, start}, count, d, threads}      \
        .write(first, size);                                                                                       \
  }

TTT_SPREAD(float32, float, float)
TTT_SPREAD(float64, double, double)
TTT_SPREAD(bfloat16, bf16, float)
TTT_SPREAD(float16, _Float16, float)
