// Numbers as they are stored and as they are summed. First of the files that are one library; see __init__.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

struct bf16 {
  uint16_t bits;
};
inline float widen(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline float widen(_Float16 x) { return float(x); }
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

// To nearest, ties to even. NaN stays NaN, by its bits: the compiler may believe that there is none.
inline void narrow(bf16& to, float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  const uint32_t nan = (u & 0x7fffffffu) > 0x7f800000u;
  to.bits = uint16_t((u + (nan ? 0u : 0x7fffu + ((u >> 16) & 1u))) >> 16) | uint16_t(nan << 6);
}
inline void narrow(_Float16& to, float x) { to = _Float16(x); }
inline void narrow(float& to, float x) { to = x; }
inline void narrow(double& to, double x) { to = x; }

// A row that is not read soon: past the caches where that can be, which spares reading what it overwrites. By one
// instruction then, with the same roundings; it takes numbers below 1e-38 for zero.
template <typename T>
inline void narrow_away(T* to, const float* x, int64_t count) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>)
    if (reinterpret_cast<uintptr_t>(to) % 64 == 0 && count % 32 == 0) {
      for (int64_t i = 0; i < count; i += 32) {
        const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + 16), _mm512_loadu_ps(x + i));
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), reinterpret_cast<const __m512i&>(both));
      }
      return;
    }
#endif
  for (int64_t i = 0; i < count; ++i) narrow(to[i], x[i]);
}

// What was narrowed away is there for other threads.
inline void narrowed() {
#if defined(__AVX512BF16__)
  _mm_sfence();
#endif
}

}  // namespace
