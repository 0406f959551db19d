// One token of sequences that read their matrix and keep the token; called by op.cpp.
namespace {

constexpr int64_t kNotAhead = -1;
// Steps between two turns of a row at most; near the border, where units of a few tokens are left; and its last steps.
constexpr int64_t kTurns = 16, kLate = 32, kAtLast = 4;

template <typename T, typename A>
struct Decode : Operands<T, A> {
  using Base = Operands<T, A>;
  using Base::h, Base::t, Base::y, Base::bias, Base::w0, Base::w, Base::table, Base::batch, Base::pos, Base::done;
  using Base::members, Base::positions, Base::rows, Base::columns, Base::w0_stride, Base::spread;
  static constexpr A kLargest = std::numeric_limits<A>::max();
  const Ahead<T, A>& ahead;
  T *const tail_h, *const tail_t;
  int32_t* const lanes;
  const int64_t d, f, dt, chunk, capacity;
  const int threads;

  Decode(const Base& operands, const Ahead<T, A>& of_v)
      : Base(operands), ahead(of_v), tail_h(of_v.tail_h), tail_t(of_v.tail_t), lanes(of_v.lanes),
        d(of_v.d), f(of_v.f), dt(of_v.dt), chunk(of_v.chunk), capacity(of_v.capacity), threads(int(of_v.threads)) {}

  int64_t* row(int64_t b) const { return table + batch[b] * columns; }
  int64_t left(const int64_t* me) const { return spread > 0 ? me[LEFT] : 0; }
  int64_t open(const int64_t* me) const { return me[SEEN] - me[DONE] * chunk; }
  // The first token that the tail must keep.
  int64_t start(const int64_t* me) const { return (me[DONE] - (left(me) > 0)) * chunk; }

  // Neither the first token of a document nor padding.
  bool goes_on(int64_t b) const { return !pos || pos[positions == 1 ? 0 : b] > 0; }

  bool keeps(int64_t b) const {
    const int64_t* me = row(b);
    if (!goes_on(b)) return false;
    if (left(me) > 0 && (open(me) + chunk >= capacity || (me[WRITES] == 1 && !w0) || shares_slot(b))) return false;
    return open(me) < chunk - 1 || (open(me) == chunk - 1 && spreads(me));
  }

  // Whether the write of the incomplete chunk will be spread.
  bool spreads(const int64_t* me) const {
    return spread > 0 && capacity == chunk + spread && !me[FACTORED] && !me[LEFT] &&
           me[VALUES] >= 0 && (me[WRITES] > 0 || w0);
  }

  bool shares_slot(int64_t b) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t* it = table + r * columns;
      if (it != row(b) && it[WRITES] > 0 && it[SLOT] == row(b)[SLOT]) return true;
    }
    return false;
  }

  bool needs_base(int64_t b) const { return !goes_on(b) || row(b)[WRITES] == 0 || row(b)[FACTORED] > 0; }

  int run(bool base_done) {
    std::vector<int64_t> kept;
    bool some_need = false, all_are = true;
    for (int64_t b = 0; b < members; ++b) {
      done[b] = keeps(b) ? KEPT : NOT;
      if (done[b]) kept.push_back(b);
      some_need |= needs_base(b);
      all_are &= done[b] && row(b)[WRITES] == 0;
    }
    if (all_are) {
      append(kept);
      return IS_BASE | work(kept);
    }
    if (some_need && !base_done) return NEEDS_BASE;
    if (!y) return NEEDS_Y;
    const A* wide = widened();
    std::vector<std::vector<A>> waiting(members);
    for (int64_t b : kept)
      if (left(row(b)) > 0) write(b, wide + b * f, waiting[b]);
    dense(kept, wide, waiting);
    int result = int64_t(kept.size()) < members ? SOME : ALL;
    for (int64_t b : kept)
      if (row(b)[WRITES] > 0 && row(b)[FACTORED] > 0) factored(row(b), wide + b * f, y + b * d);
    append(kept);
    return result | work(kept);
  }

  // v ahead of the chunk's end, and the begin of its write; and whether a chunk is complete whose write is not begun.
  int work(const std::vector<int64_t>& kept) const {
    int result = 0;
    for (int64_t b : kept) {
      int64_t* me = row(b);
      if (!spreads(me)) continue;
      if (open(me) == chunk) {
        if (begins(b)) continue;
        done[b] = COMPLETE;
        result = BORDER;
      } else if (const int64_t due = units_due(me, batch[b])) {
        if (me[VALUES] == 0 && ahead.still())
          me[VALUES] = kNotAhead;
        else
          ahead.make(me, batch[b], due);
      }
    }
    return result;
  }

  // Begins the write of a complete chunk, which counts as written from now on: unless it writes nothing, or not into
  // a slot of this row alone, or is not finite, or v cannot be made here.
  bool begins(int64_t b) const {
    int64_t* me = row(b);
    if (ahead.count == 0 || shares_slot(b) || (me[VALUES] == 0 && ahead.still())) return false;
    ahead.make(me, batch[b], ahead.count);
    A* norm = ahead.norms_of(batch[b]);
    if (!(norm[OF_V] <= kLargest && norm[OF_H] <= kLargest)) return false;
    ++me[DONE];
    ++me[WRITES];
    me[LEFT] = f;
    me[VALUES] = 0;
    norm[LAST] = A(double(norm[OF_V]) * double(norm[OF_H]));
    norm[PEAK] = std::max(norm[PEAK], norm[LAST]);
    norm[TOTAL] += norm[LAST];
    return true;
  }

  // Units are made at an even pace that ends at the border. Rows of a batch take turns, each with all units of its
  // turn at once: what is read of P and of the tokens is read for all of them. The last tokens come too late for that.
  int64_t units_due(const int64_t* me, int64_t r) const {
    const int64_t missing = ahead.count - me[VALUES], steps = chunk - open(me);
    if (missing <= 0) return 0;
    const int64_t turns = steps <= kAtLast ? 1 : std::clamp<int64_t>(members, 2, steps <= kLate ? kAtLast : kTurns);
    return (me[SEEN] + r) % turns == 0 ? (missing * turns + steps - 1) / steps : 0;
  }

  const A* widened() const {
    if constexpr (std::is_same_v<T, A>) {
      return h;
    } else {
      static thread_local std::vector<A> held;
      held.resize(members * f);
      for (int64_t i = 0; i < members * f; ++i) held[i] = widen(h[i]);
      return held.data();
    }
  }

  // The share of a write that belongs to one step, of all that are as long; and what the columns that are left then
  // add to y: v is read once for both.
  void write(int64_t b, const A* x, std::vector<A>& added) const {
    int64_t* me = row(b);
    const Columns<T, A> all{w + me[SLOT] * d * f,
                            me[WRITES] == 1 ? w0 : nullptr,
                            w0_stride,
                            ahead.values_of(batch[b]),
                            ahead.keys_of(batch[b], start(me)),
                            chunk,
                            d,
                            threads};
    const int64_t share = ((f + spread - 1) / spread + kPanel - 1) / kPanel * kPanel;
    const int64_t size = std::min(share, me[LEFT]);
    all.write(f - me[LEFT], size, x, added);
    me[LEFT] -= size;
  }

  void dense(const std::vector<int64_t>& kept, const A* wide, const std::vector<std::vector<A>>& waiting) const {
    const int64_t blocks = (d + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = i * kBlock, count = std::min(kBlock, d - first);
      for (int64_t b : kept) {
        const int64_t* me = row(b);
        if (me[WRITES] == 0 || me[FACTORED] > 0) continue;
        A sum[kBlock], more[kBlock];
        // The first write leaves W0 to be read where it has not come to; a later one finds W there.
        const int64_t unwritten = me[WRITES] == 1 ? left(me) : 0, width = f - unwritten;
        dots_of(w + (me[SLOT] * d + first) * f, wide + b * f, sum, count, width, f);
        if (unwritten > 0) {
          dots_of(w0 + first * w0_stride + width, wide + b * f + width, more, count, unwritten, w0_stride);
          for (int64_t r = 0; r < count; ++r) sum[r] += more[r];
        }
        for (int64_t r = 0; r < count; ++r) {
          if (left(me) > 0) sum[r] += waiting[b][first + r];
          narrow(y[b * d + first + r], sum[r] + (bias ? A(widen(bias[first + r])) : A(0)));
        }
      }
    }
  }

  // out += V^T (K h): rows K [n, F], and V [n, D] behind the room for as many as a slot holds.
  void factored(const int64_t* me, const A* x, T* out) {
    const T* keys = reinterpret_cast<const T*>(w + me[SLOT] * d * f);
    const T* values = keys + d * f / (d + f) * f;
    const int64_t count = me[FACTORED];
    std::vector<A> scores(count);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < count; n += kBlock)
      dots_of(keys + n * f, x, scores.data() + n, std::min(kBlock, count - n), f, f);
    const int64_t blocks = (d + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = i * kBlock, width = std::min(kBlock, d - first);
      A sum[kBlock] = {};
      for (int64_t n = 0; n < count; ++n) {
        const T* v = values + n * d + first;
        for (int64_t r = 0; r < width; ++r) sum[r] += scores[n] * A(widen(v[r]));
      }
      for (int64_t r = 0; r < width; ++r) narrow(out[first + r], A(widen(out[first + r])) + sum[r]);
    }
  }

  // Whether row r still reads its entry of a column.
  bool reads(int64_t r, int64_t column) const {
    const int64_t* it = table + r * columns;
    const int64_t first = start(it), age = (column - first) % capacity;
    return (age < 0 ? age + capacity : age) < it[SEEN] - first;
  }

  // A row's own lane, or else the first one that no row reads at that column and none took before it.
  void append(const std::vector<int64_t>& kept) {
    const size_t count = kept.size();
    std::vector<int64_t> column(count), lane(count);
    for (size_t i = 0; i < count; ++i) {
      column[i] = row(kept[i])[SEEN] % capacity;
      lane[i] = batch[kept[i]];
    }
    if (lanes) {
      std::vector<char> used(rows);
      for (size_t i = 0; i < count; ++i) {
        std::fill(used.begin(), used.end(), 0);
        for (int64_t r = 0; r < rows; ++r)
          if (reads(r, column[i])) used[lanes[r * capacity + column[i]]] = 1;
        for (size_t a = 0; a < i; ++a)
          if (column[a] == column[i]) used[lane[a]] = 1;
        if (used[lane[i]]) lane[i] = std::find(used.begin(), used.end(), 0) - used.begin();
      }
      for (size_t i = 0; i < count; ++i) lanes[batch[kept[i]] * capacity + column[i]] = int32_t(lane[i]);
    }
    for (size_t i = 0; i < count; ++i) {
      const int64_t b = kept[i], place = lane[i] * capacity + column[i];
      std::copy_n(h + b * f, f, tail_h + place * f);
      std::copy_n(t + b * dt, dt, tail_t + place * dt);
      ++row(b)[SEEN];
    }
  }
};

}  // namespace

#define TTT_DECODE(NAME, T, A)                                                                                   \
  extern "C" int decode_##NAME(const Operands<T, A>* operands, const Material<T, A>* of_v, int base_done) {      \
    const Ahead<T, A> ahead{*of_v};                                                                              \
    return Decode<T, A>(*operands, ahead).run(base_done != 0);                                                   \
  }

TTT_DECODE(float32, float, float)
TTT_DECODE(float64, double, double)
TTT_DECODE(bfloat16, bf16, float)
TTT_DECODE(float16, _Float16, float)
