// v of some tokens by the processor's unit for bf16, through oneDNN's block product; see values.cpp.
namespace {

// Bound once, before anything is made: v may not depend on when it was made.
Product<bf16> pairs_product = nullptr;
Release pairs_release = nullptr;

// Columns of P that are turned for one product: fixed, so that what is made together does not matter.
constexpr int64_t kTurned = 32;

inline bool fits_pairs(int64_t depth, int64_t columns) {
  return pairs_product && depth % 16 == 0 && columns % kTurned == 0;
}

// kTurned columns, of which the first m are wanted: p and out stand at the first one.
inline void pairs_tile(const uint32_t* pairs, const bf16* p, bf16* out, int64_t count, int64_t depth, int64_t columns,
                       int64_t stride, int64_t m) {
  constexpr int64_t kAsked = 32;
  static thread_local std::vector<bf16> rows;
  static thread_local std::vector<float> sums;
  rows.resize(depth * kTurned);
  sums.resize(count * kTurned);
  for (int64_t k = 0; k < depth; k += 16) {
    for (int64_t q = k + kAsked; q < std::min(k + kAsked + 16, depth); ++q) __builtin_prefetch(p + q * columns);
    turn(p + k * columns, columns, rows.data() + k, depth);
  }
  pairs_product(kTurned, count, depth, depth, count, count, false, rows.data(), reinterpret_cast<const bf16*>(pairs),
                sums.data(), true);
  for (int64_t j = 0; j < m; ++j)
    for (int64_t i = 0; i < count; ++i) narrow(out[j * stride + i], sums[j * count + i]);
}

// out [columns, count] of rows ``stride`` apart = (x^T p)^T, x [depth, count] of rows ``apart`` apart,
// p [depth, columns], columns [from, to), from a multiple of kTurned. Whether oneDNN did it.
inline bool project_pairs(const bf16* x, int64_t apart, const bf16* p, bf16* out, int64_t count, int64_t depth,
                          int64_t columns, int64_t stride, int64_t from, int64_t to, int threads) {
  static thread_local std::vector<uint32_t> held;
  held.resize(depth / 2 * count);
  uint32_t* pairs = held.data();
  for (int64_t k = 0; k < depth; k += 2) {
    const bf16 *one = x + k * apart, *two = one + apart;
    if (k + 16 < depth) {
      __builtin_prefetch(one + 16 * apart);
      __builtin_prefetch(two + 16 * apart);
    }
    pair(one, two, pairs + k / 2 * count, count);
  }
  const int64_t tiles = (to - from + kTurned - 1) / kTurned;
  int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t c = from + tile * kTurned;
      // No exception may leave a thread.
      try {
        pairs_tile(pairs, p + c, out + c * stride, count, depth, columns, stride, std::min(kTurned, to - c));
      } catch (...) {
#pragma omp atomic write
        failed = 1;
      }
    }
    pairs_release(true);
  }
  return !failed;
}

}  // namespace

// Whether this processor multiplies so, by trying it.
extern "C" int bind_pairs(void* product, void* release) {
  const uint16_t one = 0x3f80, two = 0x4000;
  const uint16_t left[2][2] = {{one, two}, {two, two}}, right[2][2] = {{one, one}, {two, one}};
  float sums[2][2] = {};
  try {
    const auto multiply = reinterpret_cast<Product<bf16>>(product);
    const auto *a = reinterpret_cast<const bf16*>(left), *b = reinterpret_cast<const bf16*>(right);
    multiply(2, 2, 2, 2, 2, 2, false, a, b, sums[0], true);
    reinterpret_cast<Release>(release)(true);
    // The right one holds columns, as pairs of rows.
    if (sums[0][0] != 3 || sums[0][1] != 4 || sums[1][0] != 4 || sums[1][1] != 6) return 0;
    pairs_product = multiply;
    pairs_release = reinterpret_cast<Release>(release);
    return 1;
  } catch (...) {
    return 0;
  }
}
