// What a step of one token is given: filled by op.cpp and units.py, read by units.cpp and decode.cpp. 8 bytes a field,
// so that who fills it need not know T, which is stored, nor A, which is summed.
#include <cstdint>

namespace {

// Columns of the table of rows and of the norms: together with layout.py.
enum { SEEN, DONE, WRITES, FACTORED, SLOT, LEFT = 8, VALUES = 9 };
enum { LAST, PEAK, TOTAL, OF_V, OF_H };

// What a step returns, and what stands in ``done`` then.
enum Result { ALL = 0, SOME = 1, NEEDS_BASE = 2, BORDER = 4, IS_BASE = 8, NEEDS_Y = 16 };
enum Done : uint8_t { NOT, KEPT, COMPLETE };

// Some tokens of a chunk, and which part of what makes their v, in the order in which they are made: part 0 of many
// tokens is their convolution alone.
struct Unit {
  int64_t first, stop, part, parts;
};

// What makes v of a site's rows.
template <typename T, typename A>
struct Material {
  T *tail_h, *tail_t;  // [lanes, capacity, f], [lanes, capacity, dt]
  T* tail_v;           // [rows, ..], of which the last d * chunk of a row are v, [d, chunk]
  int32_t* lanes;      // null while every row uses its own
  A* norms;            // [rows, norm_columns]
  const T *conv, *p;   // [dt, kernel], and [dt, d] or null
  const Unit* units;
  int64_t count;  // of units; 0 where conv or p are not as they must be
  int64_t norm_columns, d, f, dt, chunk, capacity, values_stride, kernel;
  double scale;
  int64_t threads;
};

template <typename T, typename A>
struct Operands {
  const T *h, *t;
  T* y;  // null until it is asked for: often it is the base's product, which makes its own
  const T *bias, *w0;  // either may be null; w0 where its rows are not in one piece
  A* w;
  int64_t* table;
  const int64_t *batch, *pos;  // pos may be null; one of all rows, or of each
  uint8_t* done;               // of each sequence
  int64_t members, positions, rows, columns, w0_stride;
  int64_t spread;  // tokens that a write is spread over
};

static_assert(sizeof(Unit) == 4 * 8 && sizeof(Material<void, void>) == 19 * 8);
static_assert(sizeof(Operands<void, void>) == 16 * 8);

}  // namespace
