// Numbers as they are stored and as they are summed. First of the files that are one library; see __init__.py.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

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

}  // namespace
