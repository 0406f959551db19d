// Products by the oneDNN that torch holds, which torch's own operations call for some dtypes only; see products.py.
namespace {

// at::Tensor is one pointer to its TensorImpl, so a reference to one is a pointer to that pointer.
using Multiply = void (*)(void* const* a, void* const* b, void* const* out, float beta, float alpha);

}  // namespace

// out = beta out + a b. Returns whether oneDNN took it.
extern "C" int multiply(void* function, void* a, void* b, void* out, float beta) {
  try {
    reinterpret_cast<Multiply>(function)(&a, &b, &out, beta, 1.0f);
    return 1;
  } catch (...) {
    return 0;
  }
}
