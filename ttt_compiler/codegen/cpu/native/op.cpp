// ttt::fast_weight_step on CPU as torch calls it: one token here, all else in Python (ttt::fast_weight_rest). A library
// of its own behind operands.cpp, since torch's headers take as long to compile as the loops do; see op.py.
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

// decode_float32 and so on: of the other library.
using DecodeFunction = int (*)(const Operands<void, void>*, const Material<void, void>*, int);
enum Kind { FLOAT32, FLOAT64, BFLOAT16, FLOAT16, OTHER };
std::atomic<DecodeFunction> functions[OTHER];
std::atomic<bool> used{true};

Kind kind_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return FLOAT32;
    case at::kDouble: return FLOAT64;
    case at::kBFloat16: return BFLOAT16;
    case at::kHalf: return FLOAT16;
    default: return OTHER;
  }
}

// Elements of W from which on more than one thread reads it, and makes v: together with units.py.
constexpr int64_t kMany = 1 << 16;
// Where a site's numbers stand in what ttt::step_constants returns.
enum { CHUNK, SPREAD, SCALE, COUNT, UNITS };

struct Call {
  const Tensor &h, &t, &w0;
  const Optional& bias;
  const Tensor& conv;
  const Optional &proj, &pos;
  c10::string_view spec;
  const Tensor &w, &tail_h, &tail_t, &tail_v, &lanes, &rows, &norms, &batch;
};

// What a site's spec says, as int64: asked of Python once. Kept for ever, as a site's spec is by its graph.
const int64_t* constants_of(const Call& call) {
  static std::mutex mutex;
  static std::unordered_map<std::string, Tensor> known;
  static thread_local std::string key;
  key.assign(call.spec.data(), call.spec.size());
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (const auto found = known.find(key); found != known.end()) return found->second.const_data_ptr<int64_t>();
  }
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ttt::step_constants", "")
                             .typed<Tensor(const Tensor&, c10::string_view)>();
  // Not under the lock: Python may be waited for by who waits for the lock.
  const Tensor asked = op.call(call.rows, call.spec);
  const std::lock_guard<std::mutex> lock(mutex);
  return known.emplace(key, asked).first->second.const_data_ptr<int64_t>();
}

struct Step {
  Tensor y;
  std::vector<uint8_t> done;
  bool base_done = false, all = false;
};

bool is(const Tensor& x, at::IntArrayRef sizes, at::ScalarType type) {
  return x.scalar_type() == type && x.sizes() == sizes;
}

// Whether the loops take these operands. Python takes more, and says what is wrong with those that it does not take.
bool fits(const Call& c, int64_t chunk, int64_t spread) {
  if (c.w0.dim() != 2 || c.tail_t.dim() != 3 || c.rows.dim() != 2 || c.conv.dim() != 3) return false;
  const auto type = c.h.scalar_type(), sum = type == at::kDouble ? at::kDouble : at::kFloat;
  const int64_t members = c.batch.numel(), d = c.w0.size(0), f = c.w0.size(1), dt = c.tail_t.size(2);
  const int64_t slots = c.rows.size(0), capacity = c.tail_t.size(1), columns = c.rows.size(1);
  const bool spreads = columns > VALUES;
  if (!is(c.h, {members, 1, f}, type) || !is(c.t, {members, 1, dt}, type) || !is(c.w0, {d, f}, type)) return false;
  if (c.bias && !is(*c.bias, {d}, type)) return false;
  if (c.conv.size(0) != dt || c.conv.size(1) != 1 || (c.proj ? c.proj->sizes() != at::IntArrayRef{dt, d} : dt != d))
    return false;
  if (c.pos && c.pos->sizes() != at::IntArrayRef{members, 1} && c.pos->sizes() != at::IntArrayRef{1, 1}) return false;
  if (!is(c.w, {slots, d, f}, sum) || !is(c.tail_h, {slots, capacity, f}, type)) return false;
  if (!is(c.tail_t, {slots, capacity, dt}, type) || capacity < chunk + (spreads ? spread : 0)) return false;
  if (c.tail_v.dim() != 3 || !is(c.tail_v, {slots, c.tail_v.size(1), d}, type)) return false;
  if (spreads && c.tail_v.size(1) < chunk) return false;
  if (c.lanes.numel() && !is(c.lanes, {slots, capacity}, at::kInt)) return false;
  if (c.rows.scalar_type() != at::kLong || columns <= SLOT || c.batch.scalar_type() != at::kLong) return false;
  if (c.norms.dim() != 2 || !is(c.norms, {slots, c.norms.size(1)}, sum)) return false;
  if (c.norms.size(1) <= (spreads ? OF_H : TOTAL)) return false;
  for (const Tensor* x : {&c.w, &c.tail_h, &c.tail_t, &c.tail_v, &c.lanes, &c.rows, &c.norms, &c.batch})
    if (!x->is_contiguous()) return false;
  if (c.bias && !c.bias->is_contiguous()) return false;
  const int64_t* batch = c.batch.const_data_ptr<int64_t>();
  static thread_local std::vector<char> taken;
  taken.assign(slots, 0);
  // No row twice: its token would be read before the other one is kept.
  const auto once = [&](int64_t b) { return b >= 0 && b < slots && !std::exchange(taken[b], 1); };
  return std::all_of(batch, batch + members, once);
}

// Changed as by an operation of torch: who looks whether a call has begun looks at that.
void note_change(const Call& c) {
  for (const Tensor* x : {&c.w, &c.tail_h, &c.tail_t, &c.tail_v, &c.lanes, &c.rows, &c.norms})
    if (!x->is_inference()) x->unsafeGetTensorImpl()->bump_version();
}

// One token of each sequence; nothing has changed where there is no ``y``.
Step decode(const Call& c) {
  const Kind kind = kind_of(c.h);
  const DecodeFunction function = kind == OTHER ? nullptr : functions[kind].load(std::memory_order_relaxed);
  if (!function || c.h.size(0) == 0) return {};
  const int64_t* of = constants_of(c);
  if (!fits(c, of[CHUNK], of[SPREAD])) return {};
  const int64_t members = c.h.size(0), d = c.w0.size(0), f = c.w0.size(1);
  const auto type = c.h.scalar_type();
  const bool spreads = c.rows.size(1) > VALUES;
  const bool makes_v = c.conv.scalar_type() == type && c.conv.is_contiguous() &&
                       (!c.proj || (c.proj->scalar_type() == type && c.proj->is_contiguous()));
  const Tensor h = c.h.contiguous(), t = c.t.contiguous();
  const Tensor pos = c.pos ? c.pos->to(at::kLong).contiguous() : Tensor();
  Step step{Tensor(), std::vector<uint8_t>(members)};
  Material<void, void> material{c.tail_h.data_ptr(),
                                c.tail_t.data_ptr(),
                                c.tail_v.data_ptr(),
                                c.lanes.size(1) ? c.lanes.data_ptr<int32_t>() : nullptr,
                                c.norms.data_ptr(),
                                c.conv.const_data_ptr(),
                                c.proj ? c.proj->const_data_ptr() : nullptr,
                                reinterpret_cast<const Unit*>(of + UNITS),
                                makes_v ? of[COUNT] : 0,
                                c.norms.size(1),
                                d,
                                f,
                                c.tail_t.size(2),
                                of[CHUNK],
                                c.tail_h.size(1),
                                c.tail_v.stride(0),
                                c.conv.size(2),
                                0.0,
                                d * f >= kMany ? at::get_num_threads() : 1};
  std::memcpy(&material.scale, of + SCALE, sizeof material.scale);
  Operands<void, void> operands{h.const_data_ptr(),
                                t.const_data_ptr(),
                                nullptr,
                                c.bias ? c.bias->const_data_ptr() : nullptr,
                                c.w0.stride(1) == 1 ? c.w0.const_data_ptr() : nullptr,
                                c.w.data_ptr(),
                                c.rows.data_ptr<int64_t>(),
                                c.batch.const_data_ptr<int64_t>(),
                                c.pos ? pos.const_data_ptr<int64_t>() : nullptr,
                                step.done.data(),
                                members,
                                c.pos ? pos.size(0) : 1,
                                c.rows.size(0),
                                c.rows.size(1),
                                c.w0.stride(0),
                                spreads ? of[SPREAD] : 0};
  int result = function(&operands, &material, 0);
  step.base_done = result & (NEEDS_BASE | IS_BASE);
  // One read of W0 for all rows, by the base model's own projection.
  if (step.base_done) {
    // In these dtypes, whatever autocast says of products outside, and without a graph.
    const c10::impl::ExcludeDispatchKeyGuard as_it_is(c10::autocast_dispatch_keyset);
    const at::AutoDispatchBelowADInplaceOrView below;
    step.y = at::linear(h, c.w0, c.bias);
  }
  if (result & NEEDS_Y) step.y = at::empty({members, 1, d}, c.h.options());
  if (result & (NEEDS_BASE | NEEDS_Y)) {
    operands.y = step.y.data_ptr();
    result = function(&operands, &material, step.base_done);
  }
  step.all = !(result & (SOME | BORDER));
  note_change(c);
  return step;
}

Tensor rest(const Call& c, const Step& step) {
  using In = const Tensor&;
  using Maybe = const Optional&;
  using Rest = Tensor(In, In, In, Maybe, In, Maybe, Maybe, c10::string_view, In, In, In, In, In, In, In, In, Maybe,
                      Maybe, bool);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("ttt::fast_weight_rest", "").typed<Rest>();
  Optional y, done;
  if (step.y.defined()) y = step.y, done = at::tensor(at::ArrayRef<uint8_t>(step.done), at::kByte);
  return op.call(c.h, c.t, c.w0, c.bias, c.conv, c.proj, c.pos, c.spec, c.w, c.tail_h, c.tail_t, c.tail_v, c.lanes,
                 c.rows, c.norms, c.batch, y, done, step.base_done);
}

Tensor fast_weight_step(const Tensor& h, const Tensor& t, const Tensor& w0, const Optional& bias, const Tensor& conv,
                        const Optional& proj, const Optional& pos, c10::string_view spec, const Tensor& w,
                        const Tensor& tail_h, const Tensor& tail_t, const Tensor& tail_v, const Tensor& lanes,
                        const Tensor& rows, const Tensor& norms, const Tensor& batch) {
  if (at::GradMode::is_enabled())
    for (const Tensor* x : {&h, &t, &w0, &conv})
      TORCH_CHECK(!x->requires_grad(), "a running sequence has no gradients: call it under torch.no_grad()");
  const Call call{h, t, w0, bias, conv, proj, pos, spec, w, tail_h, tail_t, tail_v, lanes, rows, norms, batch};
  Step step;
  if (h.size(1) == 1 && used.load(std::memory_order_relaxed)) step = decode(call);
  return step.all ? step.y : rest(call, step);
}

}  // namespace

TORCH_LIBRARY_IMPL(ttt, CPU, m) { m.impl("fast_weight_step", fast_weight_step); }

// Functions by kind; before that, and while it is not to be used, every call goes to Python.
extern "C" void bind_decode(int kind, void* function) { functions[kind] = reinterpret_cast<DecodeFunction>(function); }
extern "C" void use_decode(int whether) { used = whether != 0; }
