// One token of sequences that only read their matrix and keep the token; see decode.py.
namespace {

// Columns of the table of rows, and what is returned: together with layout.py and decode.py.
enum { SEEN, DONE, WRITES, FACTORED, SLOT, COLUMNS = 8 };
enum Result { ALL = 0, SOME = 1, NEEDS_BASE = 2 };

// Rows of a matrix that are read side by side: h is loaded once for them.
constexpr int kRows = 8;
// Partial sums of one row: so many that additions do not wait for each other.
constexpr int kLanes = 16;
// Rows of one unit of work; what sequences that share a matrix read one after the other.
constexpr int64_t kBlock = 64;

// s[n] = sum_f m[n, f] h[f] of N rows.
template <int N, typename M, typename A>
inline void dots(const M* m, const A* h, A* s, int64_t width) {
  A sum[N][kLanes] = {};
  int64_t f = 0;
  for (; f + kLanes <= width; f += kLanes)
    for (int n = 0; n < N; ++n)
#pragma omp simd
      for (int j = 0; j < kLanes; ++j) sum[n][j] += A(widen(m[n * width + f + j])) * h[f + j];
  for (int n = 0; n < N; ++n) {
    s[n] = 0;
    for (int j = 0; j < kLanes; ++j) s[n] += sum[n][j];
    for (int64_t g = f; g < width; ++g) s[n] += A(widen(m[n * width + g])) * h[g];
  }
}

template <typename M, typename A>
void dots_of(const M* m, const A* h, A* s, int64_t rows, int64_t width) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) dots<kRows>(m + r * width, h, s + r, width);
  for (; r < rows; ++r) dots<1>(m + r * width, h, s + r, width);
}

template <typename T, typename A>
struct Decode {
  const T *h, *t;
  T* y;
  const T* bias;
  const A* w;
  T *tail_h, *tail_t;
  int32_t* lanes;  // null while every row uses its own
  int64_t* table;
  const int64_t *batch, *pos;  // pos may be null; one of all rows, or of each
  int64_t members, positions, rows, d, f, dt, chunk, capacity;
  int threads;

  int64_t* row(int64_t b) const { return table + batch[b] * COLUMNS; }

  // Neither the first token of a document nor padding.
  bool goes_on(int64_t b) const { return !pos || pos[positions == 1 ? 0 : b] > 0; }

  bool keeps(int64_t b) const {
    const int64_t* me = row(b);
    return goes_on(b) && me[SEEN] - me[DONE] * chunk < chunk - 1;
  }

  bool needs_base(int64_t b) const { return !goes_on(b) || row(b)[WRITES] == 0 || row(b)[FACTORED] > 0; }

  int run(bool base_done) {
    std::vector<int64_t> kept;
    for (int64_t b = 0; b < members; ++b) {
      if (!base_done && needs_base(b)) return NEEDS_BASE;
      if (keeps(b)) kept.push_back(b);
    }
    const A* wide = widened();
    dense(kept, wide);
    for (int64_t b : kept)
      if (row(b)[WRITES] > 0 && row(b)[FACTORED] > 0) factored(row(b), wide + b * f, y + b * d);
    if (int64_t(kept.size()) < members) return SOME;
    append();
    return ALL;
  }

  const A* widened() const {
    if constexpr (std::is_same_v<T, A>) {
      return h;
    } else {
      static thread_local std::vector<A> held;
      held.resize(members * f);
      for (int64_t i = 0; i < members * f; ++i) held[i] = widen(h[i]);
      return held.data();
    }
  }

  void dense(const std::vector<int64_t>& kept, const A* wide) {
    const int64_t blocks = (d + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = i * kBlock, count = std::min(kBlock, d - first);
      for (int64_t b : kept) {
        const int64_t* me = row(b);
        if (me[WRITES] == 0 || me[FACTORED] > 0) continue;
        A sum[kBlock];
        dots_of(w + (me[SLOT] * d + first) * f, wide + b * f, sum, count, f);
        for (int64_t r = 0; r < count; ++r) {
          const A of_bias = bias ? A(widen(bias[first + r])) : A(0);
          narrow(y[b * d + first + r], sum[r] + of_bias);
        }
      }
    }
  }

  // out += V^T (K h): rows K [n, F], and V [n, D] behind the room for as many as a slot holds.
  void factored(const int64_t* me, const A* x, T* out) {
    const T* keys = reinterpret_cast<const T*>(w + me[SLOT] * d * f);
    const T* values = keys + d * f / (d + f) * f;
    const int64_t count = me[FACTORED];
    std::vector<A> scores(count);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < count; n += kBlock)
      dots_of(keys + n * f, x, scores.data() + n, std::min(kBlock, count - n), f);
    const int64_t blocks = (d + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = i * kBlock, width = std::min(kBlock, d - first);
      A sum[kBlock] = {};
      for (int64_t n = 0; n < count; ++n) {
        const T* v = values + n * d + first;
        for (int64_t r = 0; r < width; ++r) sum[r] += scores[n] * A(widen(v[r]));
      }
      for (int64_t r = 0; r < width; ++r) narrow(out[first + r], A(widen(out[first + r])) + sum[r]);
    }
  }

  // Whether row r still reads its entry of a column.
  bool reads(int64_t r, int64_t column) const {
    const int64_t* it = table + r * COLUMNS;
    const int64_t start = it[DONE] * chunk, age = (column - start) % capacity;
    return (age < 0 ? age + capacity : age) < it[SEEN] - start;
  }

  // A row's own lane, or else the first one that no row reads at that column and none took before it.
  void append() {
    std::vector<int64_t> columns(members), lane(members);
    for (int64_t b = 0; b < members; ++b) {
      columns[b] = row(b)[SEEN] % capacity;
      lane[b] = batch[b];
    }
    if (lanes) {
      std::vector<char> used(rows);
      for (int64_t b = 0; b < members; ++b) {
        std::fill(used.begin(), used.end(), 0);
        for (int64_t r = 0; r < rows; ++r)
          if (reads(r, columns[b])) used[lanes[r * capacity + columns[b]]] = 1;
        for (int64_t a = 0; a < b; ++a)
          if (columns[a] == columns[b]) used[lane[a]] = 1;
        if (used[batch[b]]) lane[b] = std::find(used.begin(), used.end(), 0) - used.begin();
      }
      for (int64_t b = 0; b < members; ++b) lanes[batch[b] * capacity + columns[b]] = int32_t(lane[b]);
    }
    for (int64_t b = 0; b < members; ++b) {
      const int64_t place = lane[b] * capacity + columns[b];
      std::copy_n(h + b * f, f, tail_h + place * f);
      std::copy_n(t + b * dt, dt, tail_t + place * dt);
      ++row(b)[SEEN];
    }
  }
};

}  // namespace

#define TTT_DECODE(NAME, T, A)                                                                                \
  extern "C" int decode_##NAME(const T* h, const T* t, T* y, const T* bias, const A* w, T* tail_h, T* tail_t, \
                               int32_t* lanes, int64_t* table, const int64_t* batch, const int64_t* pos,      \
                               int64_t members, int64_t positions, int64_t rows, int64_t d, int64_t f,        \
                               int64_t dt, int64_t chunk, int64_t capacity, int threads, int base_done) {     \
    return Decode<T, A>{h,     t,   y,    bias,    w,         tail_h, tail_t, lanes, table, batch,            \
                        pos,   members, positions, rows,   d,      f,     dt,    chunk, capacity, threads}    \
        .run(base_done != 0);                                                                                 \
  }

TTT_DECODE(float32, float, float)
TTT_DECODE(float64, double, double)
TTT_DECODE(bfloat16, bf16, float)
TTT_DECODE(float16, _Float16, float)
