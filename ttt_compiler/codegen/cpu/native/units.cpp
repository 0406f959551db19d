// v of a chunk ahead of its end, unit by unit, from the tokens that the tail holds; see units.py.
namespace {

template <typename T, typename A>
struct Ahead : Material<T, A> {
  using Base = Material<T, A>;
  using Base::tail_h, Base::tail_t, Base::tail_v, Base::lanes, Base::norms, Base::conv, Base::p, Base::units;
  using Base::count, Base::norm_columns, Base::d, Base::f, Base::dt, Base::chunk, Base::capacity;
  using Base::values_stride, Base::kernel, Base::scale, Base::threads;

  // Makes the next units of row r, ``most`` at most, whose tokens and those that their taps see are there: parts of
  // the same tokens at once.
  void make(int64_t* me, int64_t r, int64_t most) const {
    const int64_t end = std::min(count, me[VALUES] + most), there = me[SEEN] - me[DONE] * chunk;
    while (me[VALUES] < end && reach(units[me[VALUES]]) <= there) {
      const Unit& unit = units[me[VALUES]];
      const int64_t last = std::min(end - 1, me[VALUES] + unit.parts - 1 - unit.part);
      multiply(me, r, unit, units[last].part);
      for (; me[VALUES] <= last; ++me[VALUES]) measure(me, r, units[me[VALUES]]);
    }
  }

  // The token behind the last one that a unit sees.
  int64_t reach(const Unit& unit) const { return std::min(chunk, unit.stop + kernel - 1 - kernel / 2); }

  A* norms_of(int64_t r) const { return norms + r * norm_columns; }
  Keys<T> keys_of(int64_t r, int64_t first) const { return in_tail(tail_h, f, r, first); }
  T* values_of(int64_t r) const { return tail_v + (r + 1) * values_stride - d * chunk; }

  // Whether nothing would ever be written.
  bool still() const {
    for (int64_t i = 0; i < dt * kernel; ++i)
      if (widen(conv[i]) != 0) return false;
    return true;
  }

 private:
  // Rows of a tail of row r, from a token of its document on.
  Keys<T> in_tail(const T* tail, int64_t width, int64_t r, int64_t first) const {
    return {tail, lanes ? lanes + r * capacity : nullptr, r, capacity, width, first};
  }

  // v of a unit and of the parts up to ``last``.
  void multiply(const int64_t* me, int64_t r, const Unit& unit, int64_t last) const {
    T* v = values_of(r);
    const int64_t size = unit.stop - unit.first, low = std::max<int64_t>(0, unit.first - kernel / 2);
    // The tokens behind have no v yet: there is room for the convolution, unless it is wider, or they are fewer.
    T* mixed = unit.stop + size <= chunk && dt <= d ? v + unit.stop : nullptr;
    const int64_t from = edge(unit, unit.part), to = edge(unit, last + 1);
    if (!mixed && from == to) return;
    Values<T, A>{tokens(me, r, low, reach(unit)),
                 conv,
                 p,
                 v + unit.first,
                 mixed,
                 unit.part == 0,
                 reach(unit) - low,
                 unit.first - low,
                 size,
                 dt,
                 d,
                 from,
                 to,
                 kernel,
                 chunk,
                 A(scale),
                 int(threads)}
        .run();
  }

  // Norms of a unit: of its v, and of as large a part of h.
  void measure(const int64_t* me, int64_t r, const Unit& unit) const {
    const T* v = values_of(r) + unit.first;
    const Keys<T> keys = keys_of(r, me[DONE] * chunk);
    const int64_t from = f * unit.part / unit.parts, to = f * (unit.part + 1) / unit.parts;
    Squares<T, A> of_v, of_h;
    for (int64_t c = edge(unit, unit.part); c < edge(unit, unit.part + 1); ++c)
      of_v.add(v + c * chunk, unit.stop - unit.first);
    for (int64_t i = unit.first; i < unit.stop; ++i) of_h.add(keys(i) + from, to - from);
    A* sums = norms_of(r);
    add(sums[OF_V], of_v.total(), me[VALUES] == 0);
    add(sums[OF_H], of_h.total(), me[VALUES] == 0);
  }

  // A norm grows by a sum of squares: to Inf where that is beyond A, or not a number.
  static void add(A& norm, double squares, bool first) {
    const double one = squares <= double(std::numeric_limits<A>::max()) ? std::sqrt(squares) : INFINITY;
    norm = A(std::hypot(first ? 0.0 : double(norm), one));
  }

  // The first column of a part: whole panels. Part 0 of many tokens is their convolution alone, and has none.
  int64_t edge(const Unit& unit, int64_t part) const {
    const int64_t alone = unit.stop - unit.first > kFewest, parts = unit.parts - alone;
    return std::min(d, (d * std::max<int64_t>(0, part - alone) / parts + kWide - 1) / kWide * kWide);
  }

  // Targets of tokens [low, high) of the chunk, one after the other.
  const T* tokens(const int64_t* me, int64_t r, int64_t low, int64_t high) const {
    const Keys<T> rows = in_tail(tail_t, dt, r, me[DONE] * chunk);
    bool together = true;
    for (int64_t n = low + 1; together && n < high; ++n) together = rows(n) == rows(low) + (n - low) * dt;
    if (together) return rows(low);
    static thread_local std::vector<T> held;
    held.resize((high - low) * dt);
    for (int64_t n = low; n < high; ++n) std::copy_n(rows(n), dt, held.data() + (n - low) * dt);
    return held.data();
  }
};

}  // namespace

#define TTT_UNITS(NAME, T, A)                                                                            \
  extern "C" void units_##NAME(const Material<T, A>* of_v, int64_t* me, int64_t row, int64_t most) {      \
    Ahead<T, A>{*of_v}.make(me, row, most);                                                              \
  }

TTT_UNITS(float32, float, float)
TTT_UNITS(float64, double, double)
TTT_UNITS(bfloat16, bf16, float)
TTT_UNITS(float16, _Float16, float)
