// C += A B in blocks that stay in the cache while oneDNN's block product sums them in fp32; see blocks.py.
namespace {

// What a block of C holds before the product is added.
enum Before { ITSELF = 0, BASE = 1, ZERO = 2 };

// Rows of a block; and the bytes of the columns of B for it, which stay in the private cache.
constexpr int64_t kHigh = 128;
constexpr int64_t kPacked = 256 << 10;
// Bytes of a row of A, or a column of B, that are summed at once: of more, no 64 columns would stay in the cache, and
// products come at 72 and 42 GF/s (fp32, depth 4096, 8192) for 107, which reading C again hardly takes from.
constexpr int64_t kDeepest = 8 << 10;

// T: of A, B, the base and the narrow copy. P: of the product's operands, T or float.
template <typename T, typename P>
struct Blocks {
  Product<P> product;
  Release release;
  const T *a, *b;  // A [rows, depth], or [depth, rows] to be turned; B [depth, columns]
  float* c;
  const T* base;
  T* copy;  // may be null
  int64_t depth, rows, columns;
  int before, turned, in_panels, threads;
  int64_t apart;  // how far rows of A lie from each other, where it is not turned

  static constexpr bool kPairs = sizeof(P) == 2;

  // Piece by piece of the depth.
  int run() const {
    const int64_t pieces = (depth * int64_t(sizeof(P)) + kDeepest - 1) / kDeepest;
    const int64_t size = ((depth + pieces - 1) / pieces + 15) / 16 * 16;
    for (int64_t first = 0; first < depth; first += size) {
      Blocks piece = *this;
      piece.a += first * (turned ? rows : 1);
      piece.b += first * columns;
      piece.depth = std::min(size, depth - first);
      if (first > 0) piece.before = ITSELF;
      if (first + size < depth) piece.copy = nullptr;
      if (!piece.sum()) return 0;
    }
    return 1;
  }

 private:
  int sum() const {
    // Pairs need sums of an even length.
    const int64_t k = kPairs ? (depth + 1) / 2 * 2 : depth;
    const int64_t wide = std::clamp<int64_t>(kPacked / int64_t(sizeof(P)) / k / 64 * 64, 64, 256);
    const int64_t across = (columns + wide - 1) / wide, down = (rows + kHigh - 1) / kHigh;
    const bool as_it_is = std::is_same_v<T, P> && !turned && k == depth;
    std::vector<P> held(as_it_is ? 0 : rows * k);
    const P* left = as_it_is ? reinterpret_cast<const P*>(a) : held.data();
    const int64_t of_left = as_it_is ? apart : k;
    // Who shares columns packs them again, so rows are split for threads that have no columns of their own alone.
    const int64_t split = std::min(down, threads == 1 ? 1 : (2 * threads + across - 1) / across);
    const int64_t step = (down + split - 1) / split * kHigh;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      if (!as_it_is) {
#pragma omp for
        for (int64_t i = 0; i < down; ++i) hold(held.data(), k, i * kHigh, std::min(rows, (i + 1) * kHigh));
      }
      std::vector<P> packed;
#pragma omp for
      for (int64_t i = 0; i < across * split; ++i) {
        const int64_t first = i / split * wide, n = std::min(wide, columns - first);
        // No exception may leave a thread.
        try {
          packed.resize(k * std::min(columns, wide));
          pack(packed.data(), first, n);
          for (int64_t r = i % split * step; r < std::min(rows, (i % split + 1) * step); r += kHigh)
            block(left + r * of_left, of_left, packed.data(), k, r, std::min(kHigh, rows - r), first, n);
        } catch (...) {
#pragma omp atomic write
          failed = 1;
        }
      }
      narrowed();
      release(kPairs);
    }
    return !failed;
  }

  static void to(P& out, T x) {
    if constexpr (std::is_same_v<T, P>)
      out = x;
    else
      out = widen(x);
  }

  // A, rows first to last: [., k].
  void hold(P* out, int64_t k, int64_t first, int64_t last) const {
    constexpr int64_t kTile = 16;
    if constexpr (std::is_same_v<P, bf16>)
      if (turned && depth % kTile == 0 && (last - first) % 32 == 0) {
        for (int64_t r = first; r < last; r += 32)
          for (int64_t t = 0; t < depth; t += kTile) turn(a + t * rows + r, rows, out + r * k + t, k);
        return;
      }
    const int64_t along = turned ? rows : 1, across = turned ? 1 : apart;
    for (int64_t t = 0; t < depth; t += kTile)
      for (int64_t r = first; r < last; ++r)
        for (int64_t i = t; i < std::min(t + kTile, depth); ++i) to(out[r * k + i], a[i * along + r * across]);
    if (k > depth)
      for (int64_t r = first; r < last; ++r) to(out[r * k + depth], T{});
  }

  // n columns of B.
  void pack(P* out, int64_t first, int64_t n) const {
    // Rows lie far apart: no processor foresees the next one.
    constexpr int64_t kAsked = 16;
    const auto ask = [&](int64_t t) {
      if (t < depth)
        for (int64_t j = 0; j < n; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(b + t * columns + first + j);
    };
    for (int64_t t = 0; t < kAsked; ++t) ask(t);
    if constexpr (kPairs) {
      static_assert(std::is_same_v<T, P>);
      for (int64_t t = 0; t < depth; t += 2) {
        ask(t + kAsked);
        ask(t + kAsked + 1);
        const T* one = b + t * columns + first;
        uint32_t* pairs = reinterpret_cast<uint32_t*>(out + t * n);
        if (t + 1 < depth)
          pair(one, one + columns, pairs, n);
        else
          for (int64_t j = 0; j < n; ++j) pairs[j] = one[j].bits;
      }
    } else {
      for (int64_t t = 0; t < depth; ++t) {
        ask(t + kAsked);
        for (int64_t j = 0; j < n; ++j) to(out[t * n + j], b[t * columns + first + j]);
      }
    }
  }

  void block(const P* left, int64_t of_left, const P* packed, int64_t k, int64_t r, int64_t m, int64_t first,
             int64_t n) const {
    const int64_t here = r * columns + first;
    if (before == BASE)
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = here; j < here + n; ++j) c[i * columns + j] = widen(base[i * columns + j]);
    product(m, n, k, of_left, n, columns, before != ZERO, left, packed, c + here, kPairs);
    if constexpr (std::is_same_v<T, bf16>)
      if (copy && in_panels) return to_panels(c + here, copy, columns, r, m, first, n);
    if (copy)
      for (int64_t i = 0; i < m; ++i) narrow_away(copy + i * columns + here, c + i * columns + here, n);
  }
};

}  // namespace

#define TTT_BLOCKS(NAME, T, P)                                                                                      \
  extern "C" int NAME(void* product, void* release, const T* a, const T* b, float* c, const T* base, T* copy,       \
                      int64_t depth, int64_t rows, int64_t columns, int before, int turned, int in_panels,          \
                      int threads) {                                                                                \
    try {                                                                                                           \
      return Blocks<T, P>{reinterpret_cast<Product<P>>(product), reinterpret_cast<Release>(release), a, b, c, base, \
                          copy, depth, rows, columns, before, turned, in_panels, threads, depth}                    \
          .run();                                                                                                   \
    } catch (...) {                                                                                                 \
      return 0;                                                                                                     \
    }                                                                                                               \
  }

TTT_BLOCKS(blocks_float32, float, float)
TTT_BLOCKS(blocks_bfloat16, bf16, bf16)
TTT_BLOCKS(wideblocks_bfloat16, bf16, float)
TTT_BLOCKS(wideblocks_float16, _Float16, float)
