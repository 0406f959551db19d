// W += v^T h in blocks that stay in the cache while oneDNN's block product sums them in fp32; see write.py.
namespace {

// C [m, n] (+)= A [m, k] B [k, n]; of 16-bit operands B holds pairs of rows side by side.
template <typename P>
using Product = void (*)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const P* a,
                         const P* b, float* c, bool pairs);
using Release = void (*)(bool pairs);

// What a block of W holds before the product is added.
enum Before { ITSELF = 0, BASE = 1, ZERO = 2 };

// A block of W: as wide as is worth packing h for, and in the private cache with its part of v and h.
constexpr int64_t kWide = 256;
constexpr int64_t kHigh = 128;

// T: of v, h, W0 and the narrow copy. P: of the product's operands, T or float.
template <typename T, typename P>
struct Write {
  Product<P> product;
  Release release;
  const T *v, *h;
  float* w;
  const T* base;
  T* copy;  // may be null
  int64_t tokens, d, f;
  int before, threads;

  static constexpr bool kPairs = sizeof(P) == 2;

  // The length of sums: pairs need an even one.
  int64_t depth() const { return kPairs ? (tokens + 1) / 2 * 2 : tokens; }

  int run() const {
    const int64_t k = depth();
    std::vector<P> turned(d * k);
    const int64_t across = (f + kWide - 1) / kWide, down = (d + kHigh - 1) / kHigh;
    // Who shares columns packs them again, so rows are split for threads that have no columns of their own alone.
    const int64_t split = std::min(down, threads == 1 ? 1 : (2 * threads + across - 1) / across);
    const int64_t step = (down + split - 1) / split * kHigh;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for
      for (int64_t i = 0; i < down; ++i) turn(turned.data(), k, i * kHigh, std::min(d, (i + 1) * kHigh));
      std::vector<P> packed(k * std::min(f, kWide));
#pragma omp for
      for (int64_t i = 0; i < across * split; ++i) {
        const int64_t c = i / split * kWide, n = std::min(kWide, f - c);
        pack(packed.data(), c, n);
        // No exception may leave a thread.
        try {
          for (int64_t r = i % split * step; r < std::min(d, (i % split + 1) * step); r += kHigh)
            block(turned.data() + r * k, packed.data(), k, r, std::min(kHigh, d - r), c, n);
        } catch (...) {
#pragma omp atomic write
          failed = 1;
        }
      }
      if (!failed) release(kPairs);
    }
    return !failed;
  }

  static void to(P& out, T x) {
    if constexpr (std::is_same_v<T, P>)
      out = x;
    else
      out = widen(x);
  }

  // v^T, rows first to last: [., k].
  void turn(P* out, int64_t k, int64_t first, int64_t last) const {
    constexpr int64_t kTile = 16;
    for (int64_t t = 0; t < tokens; t += kTile)
      for (int64_t r = first; r < last; ++r)
        for (int64_t i = t; i < std::min(t + kTile, tokens); ++i) to(out[r * k + i], v[i * d + r]);
    if (k > tokens)
      for (int64_t r = first; r < last; ++r) to(out[r * k + tokens], T{});
  }

  // n columns of h from c on.
  void pack(P* out, int64_t c, int64_t n) const {
    if constexpr (kPairs) {
      static_assert(std::is_same_v<T, P>);
      for (int64_t t = 0; t < tokens; t += 2) {
        const uint16_t* one = reinterpret_cast<const uint16_t*>(h + t * f + c);
        const uint16_t* two = one + f;
        uint32_t* pairs = reinterpret_cast<uint32_t*>(out + t * n);
        if (t + 1 < tokens)
          for (int64_t j = 0; j < n; ++j) pairs[j] = uint32_t(one[j]) | uint32_t(two[j]) << 16;
        else
          for (int64_t j = 0; j < n; ++j) pairs[j] = one[j];
      }
    } else {
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t j = 0; j < n; ++j) to(out[t * n + j], h[t * f + c + j]);
    }
  }

  void block(const P* a, const P* b, int64_t k, int64_t r, int64_t m, int64_t c, int64_t n) const {
    float* to = w + r * f + c;
    if (before == BASE)
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j) to[i * f + j] = widen(base[(r + i) * f + c + j]);
    product(m, n, k, k, n, f, before != ZERO, a, b, to, kPairs);
    if (copy)
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j) narrow(copy[(r + i) * f + c + j], to[i * f + j]);
  }
};

}  // namespace

#define TTT_WRITE(NAME, T, P)                                                                                       \
  extern "C" int NAME(void* product, void* release, const T* v, const T* h, float* w, const T* base, T* copy,       \
                      int64_t tokens, int64_t d, int64_t f, int before, int threads) {                              \
    return Write<T, P>{reinterpret_cast<Product<P>>(product), reinterpret_cast<Release>(release), v, h, w, base,    \
                       copy, tokens, d, f, before, threads}                                                         \
        .run();                                                                                                     \
  }

TTT_WRITE(write_float32, float, float)
TTT_WRITE(write_bfloat16, bf16, bf16)
TTT_WRITE(widewrite_bfloat16, bf16, float)
TTT_WRITE(widewrite_float16, _Float16, float)
