// A 16-bit copy of W in the order in which oneDNN's block product reads it, and products with it; see panels.py.
namespace {

// oneDNN's: C [m, n] (+)= A [m, k] B [k, n]; of 16-bit operands B holds pairs of rows side by side.
template <typename P>
using Product = void (*)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const P* a,
                         const P* b, float* c, bool pairs);
using Release = void (*)(bool pairs);

// Rows of W in a panel: [d / kPanelRows][f / 2][kPanelRows][2]. And rows of a product that go through all panels.
constexpr int64_t kPanelRows = 64, kTogether = 512;

// Two rows of n numbers as one of pairs.
inline void pair(const bf16* one, const bf16* two, uint32_t* to, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] = uint32_t(one[j].bits) | uint32_t(two[j].bits) << 16;
}

#if defined(__AVX512BF16__)
// 16 rows of 16 pairs, turned.
inline void turn_pairs(__m512i (&a)[16]) {
  __m512i b[16];
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  __m512i c[16];
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      c[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + 2 + j]);
      c[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + 2 + j]);
    }
  // c[4 q + k]: of rows 4 q to 4 q + 3 the pairs k, k + 4, k + 8, k + 12.
  for (int k = 0; k < 4; ++k) {
    const __m512i low = _mm512_shuffle_i32x4(c[k], c[4 + k], 0x88);
    const __m512i high = _mm512_shuffle_i32x4(c[8 + k], c[12 + k], 0x88);
    const __m512i odd = _mm512_shuffle_i32x4(c[k], c[4 + k], 0xdd);
    const __m512i more = _mm512_shuffle_i32x4(c[8 + k], c[12 + k], 0xdd);
    a[k] = _mm512_shuffle_i32x4(low, high, 0x88);
    a[k + 8] = _mm512_shuffle_i32x4(low, high, 0xdd);
    a[k + 4] = _mm512_shuffle_i32x4(odd, more, 0x88);
    a[k + 12] = _mm512_shuffle_i32x4(odd, more, 0xdd);
  }
}

// 16 rows of 32 numbers, ``apart`` apart, narrowed to 16 lines of 16 pairs, ``step`` apart.
inline void narrow_turned(const float* c, int64_t apart, uint32_t* to, int64_t step) {
  __m512i a[16];
  for (int i = 0; i < 16; ++i) {
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(c + i * apart + 16), _mm512_loadu_ps(c + i * apart));
    a[i] = reinterpret_cast<const __m512i&>(both);
  }
  turn_pairs(a);
  for (int k = 0; k < 16; ++k) _mm512_stream_si512(reinterpret_cast<__m512i*>(to + k * step), a[k]);
}

// 16 rows of 32 numbers to 32 rows of 16.
inline void turn(const bf16* from, int64_t apart, bf16* to, int64_t step) {
  __m512i a[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * apart);
  turn_pairs(a);
  for (int k = 0; k < 16; ++k) {
    const __m256i low = _mm512_cvtepi32_epi16(a[k]), high = _mm512_cvtepi32_epi16(_mm512_srli_epi32(a[k], 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * k * step), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (2 * k + 1) * step), high);
  }
}
#else
inline void narrow_turned(const float* c, int64_t apart, uint32_t* to, int64_t step) {
  for (int k = 0; k < 16; ++k)
    for (int i = 0; i < 16; ++i) {
      bf16 low, high;
      narrow(low, c[i * apart + 2 * k]);
      narrow(high, c[i * apart + 2 * k + 1]);
      to[k * step + i] = uint32_t(low.bits) | uint32_t(high.bits) << 16;
    }
}

inline void turn(const bf16* from, int64_t apart, bf16* to, int64_t step) {
  for (int k = 0; k < 32; ++k)
    for (int i = 0; i < 16; ++i) to[k * step + i] = from[i * apart + k];
}
#endif

// Rows [r, r + m) and columns [first, first + n) of W [., columns], which stand at c: whole panels, and n of 32 each.
inline void to_panels(const float* c, bf16* copy, int64_t columns, int64_t r, int64_t m, int64_t first, int64_t n) {
  uint32_t* pairs = reinterpret_cast<uint32_t*>(copy);
  for (int64_t i = 0; i < m; i += 16) {
    const int64_t panel = (r + i) / kPanelRows, inside = (r + i) % kPanelRows;
    uint32_t* to = pairs + (panel * columns + first) / 2 * kPanelRows + inside;
    for (int64_t j = 0; j < n; j += 32)
      narrow_turned(c + i * columns + j, columns, to + j / 2 * kPanelRows, kPanelRows);
  }
}

// y = h W^T + bias: h [m, f], y [m, d].
struct Panels {
  Product<bf16> product;
  Release release;
  const bf16 *h, *w, *bias;  // bias may be null
  bf16* y;
  int64_t m, d, f;
  int threads;

  int run() const {
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      std::vector<float> sums;
      for (int64_t r = 0; r < m; r += kTogether) {
#pragma omp for nowait
        for (int64_t first = 0; first < d; first += kPanelRows) {
          // No exception may leave a thread.
          try {
            panel(sums, r, std::min(kTogether, m - r), first);
          } catch (...) {
#pragma omp atomic write
            failed = 1;
          }
        }
      }
      release(true);
    }
    return !failed;
  }

  void panel(std::vector<float>& sums, int64_t r, int64_t count, int64_t first) const {
    constexpr int64_t kRows = 128;
    sums.resize(std::min(count, kRows) * kPanelRows);
    for (int64_t i = r; i < r + count; i += kRows) {
      const int64_t n = std::min(kRows, r + count - i);
      product(n, kPanelRows, f, f, kPanelRows, kPanelRows, false, h + i * f, w + first * f, sums.data(), true);
      for (int64_t j = 0; j < n; ++j)
        for (int64_t c = 0; c < kPanelRows; ++c) {
          const float of_bias = bias ? widen(bias[first + c]) : 0.0f;
          narrow(y[(i + j) * d + first + c], sums[j * kPanelRows + c] + of_bias);
        }
    }
  }
};

}  // namespace

extern "C" int panels_bfloat16(void* product, void* release, const bf16* h, const bf16* w, const bf16* bias, bf16* y,
                               int64_t m, int64_t d, int64_t f, int threads) {
  try {
    return Panels{reinterpret_cast<Product<bf16>>(product), reinterpret_cast<Release>(release), h, w, bias, y, m, d, f,
                  threads}
        .run();
  } catch (...) {
    return 0;
  }
}

extern "C" void pack_bfloat16(const float* w, bf16* copy, int64_t d, int64_t f, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < d; r += kPanelRows) to_panels(w + r * f, copy, f, r, kPanelRows, 0, f);
  narrowed();
}

// Of W^T [f, d], which is 16 bits wide already: pairs of its rows side by side.
extern "C" void pack_turned_bfloat16(const bf16* p, bf16* copy, int64_t f, int64_t d, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t first = 0; first < d; first += kPanelRows)
    for (int64_t k = 0; k < f; k += 2) {
      const bf16* row = p + k * d + first;
      pair(row, row + d, reinterpret_cast<uint32_t*>(copy) + (first * f + k * kPanelRows) / 2, kPanelRows);
    }
}
