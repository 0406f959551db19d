// Sums of squares, which say in one pass whether a number is NaN or Inf; see squares.py.
namespace {

// Partial sums: so many that additions do not wait for each other.
constexpr int64_t kParts = 64;
// Numbers that are summed in the operands' precision before the sum is widened.
constexpr int64_t kStretch = 1 << 14;

// A sum of squares that grows.
template <typename T, typename A>
class Squares {
 public:
  void add(const T* x, int64_t count) {
    int64_t i = 0;
    for (; i + kParts <= count; i += kParts)
#pragma omp simd
      for (int64_t j = 0; j < kParts; ++j) {
        const A one = widen(x[i + j]);
        sum_[j] += one * one;
      }
    for (; i < count; ++i) {
      const A one = widen(x[i]);
      sum_[0] += one * one;
    }
    if ((held_ += count) >= kStretch) flush();
  }

  double total() {
    flush();
    return total_;
  }

 private:
  void flush() {
    double here = 0;
    for (int64_t j = 0; j < kParts; ++j) {
      here += sum_[j];
      sum_[j] = 0;
    }
    total_ += here;
    held_ = 0;
  }

  A sum_[kParts] = {};
  int64_t held_ = 0;
  double total_ = 0;
};

template <typename T, typename A>
double squares(const T* x, int64_t count, int threads) {
  double total = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) reduction(+ : total)
  for (int64_t first = 0; first < count; first += kStretch) {
    Squares<T, A> here;
    here.add(x + first, std::min(kStretch, count - first));
    total += here.total();
  }
  return total;
}

}  // namespace

#define TTT_SQUARES(NAME, T, A)                                                 \
  extern "C" double squares_##NAME(const T* x, int64_t count, int threads) {    \
    return squares<T, A>(x, count, threads);                                    \
  }

TTT_SQUARES(float32, float, float)
TTT_SQUARES(float64, double, double)
TTT_SQUARES(bfloat16, bf16, float)
TTT_SQUARES(float16, _Float16, float)
