/* The part of norm.c that depends on the arithmetic: included once for every REAL. */

/* `count` elements of t from `start` on as REAL: where they lie, or converted into `buffer`. */
static const REAL *NAME(load)(const Norm *p, const Tensor *t, int64_t n, int64_t c, int64_t start,
                              int64_t count, REAL *restrict buffer) {
  if (p->dtype == OWN) return (const REAL *)at(p, t, n, c, start, sizeof(REAL));
  const char *from = at(p, t, n, c, start, 2);
  if (p->dtype == BFLOAT16) {
    const uint16_t *restrict half = (const uint16_t *)from;
    for (int64_t i = 0; i < count; i++) buffer[i] = widen(half[i]);
  }
#ifdef __FLT16_MANT_DIG__
  if (p->dtype == FLOAT16) {
    const _Float16 *restrict half = (const _Float16 *)from;
    for (int64_t i = 0; i < count; i++) buffer[i] = half[i];
  }
#endif
  return buffer;
}

/* Where to write elements of t: in place, or into `buffer`, which `store` converts. */
static REAL *NAME(target)(const Norm *p, const Tensor *t, int64_t n, int64_t c, int64_t start,
                          REAL *buffer) {
  return p->dtype == OWN ? (REAL *)at(p, t, n, c, start, sizeof(REAL)) : buffer;
}

/* Elements of t that are worth an EXPECT; else `near`, whose lines are at hand. */
static const REAL *NAME(expected)(const Norm *p, const Tensor *t, int64_t n, int64_t c,
                                  int64_t start, const REAL *near) {
  if (!t->data || p->dtype != OWN || p->n * p->c * p->s < FAR) return near;
  return (const REAL *)at(p, t, n, c, start, sizeof(REAL));
}

static void NAME(store)(const Norm *p, const Tensor *t, int64_t n, int64_t c, int64_t start,
                        int64_t count, const REAL *restrict buffer) {
  if (p->dtype == OWN) return;
  char *to = at(p, t, n, c, start, 2);
  if (p->dtype == BFLOAT16) {
    uint16_t *restrict half = (uint16_t *)to;
    for (int64_t i = 0; i < count; i++) half[i] = narrow(buffer[i]);
  }
#ifdef __FLT16_MANT_DIG__
  if (p->dtype == FLOAT16) {
    _Float16 *restrict half = (_Float16 *)to;
    for (int64_t i = 0; i < count; i++) half[i] = (_Float16)buffer[i];
  }
#endif
}

/* ---- statistics */

typedef struct {
  double seen, squares; /* squares: around the mean */
  long double mean;     /* so that what its rounding to REAL loses can be told */
} NAME(Moments);

/* Chan's merge. Equal means stay what they are. */
static void NAME(merge)(NAME(Moments) *a, NAME(Moments) b) {
  double total = a->seen + b.seen, share = b.seen / total;
  double delta = (double)(b.mean - a->mean);
  if (a->seen == 0) {
    *a = b;
    return;
  }
  a->squares += b.squares + delta * delta * (a->seen * share);
  a->mean += (long double)delta * share;
  a->seen = total;
}

/* Sums run side by side in LANES, so that they wait less for each other (and err less). */
static REAL NAME(total)(REAL *sums) {
  for (int half = LANES / 2; half; half /= 2)
    for (int k = 0; k < half; k++) sums[k] += sums[k + half];
  return sums[0];
}

/* Sums around the mean of the first LANES values: however far from 0 all are, and even if these
 * are unlike the others, that is near enough to the mean to leave the variance its digits. */
static NAME(Moments) NAME(moments)(const REAL *restrict a, int64_t count, const REAL *next) {
  REAL middle, sum = 0, square = 0, sums[LANES] = {0}, squares[LANES] = {0};
  NAME(few) side = {0}, squared = {0};
  int64_t few = least(count, LANES), more = count - count % FEW;
  for (int64_t i = 0; i < few; i++) sums[i] = a[i] - a[0];
  middle = a[0] + NAME(total)(sums) / few;
  memset(sums, 0, sizeof(sums));
  int64_t whole = count < 4 * LANES ? 0 : count - count % LANES;
  for (int64_t i = 0; i < whole; i += LANES) {
    EXPECT(next, i);
    for (int k = 0; k < LANES; k++) {
      REAL d = a[i + k] - middle;
      sums[k] += d;
      squares[k] = NAME(fma)(d, d, squares[k]);
    }
  }
  for (int64_t i = whole; i < more; i += FEW) {
    NAME(few) d = *(const NAME(few) *)(a + i) - middle;
    side += d;
    squared += d * d;
  }
  for (int64_t i = more; i < count; i++) {
    REAL d = a[i] - middle;
    sum += d;
    square = NAME(fma)(d, d, square);
  }
  sum += NAME(total_few)(&side), square += NAME(total_few)(&squared);
  if (whole) sum += NAME(total)(sums), square += NAME(total)(squares);
  NAME(Moments) m = {count, square - (double)sum * sum / count,
                     (long double)middle + (double)sum / count};
  if (isfinite(m.squares)) return m;
  double wide = 0, d; /* squares beyond REAL, or NaN or Inf among the values */
  for (int64_t i = 0; i < count; i++) wide += a[i];
  m.mean = wide / count;
  m.squares = 0;
  for (int64_t i = 0; i < count; i++) d = a[i] - m.mean, m.squares += d * d;
  return m;
}

/* Piece k of set i, whose first plane is (n, c). */
static NAME(Moments) NAME(piece)(const Norm *p, int64_t n, int64_t c, int64_t k) {
  REAL buffer[PIECE];
  int64_t run = p->groups ? p->own * p->s : p->s, chunks = parts(run, PIECE);
  int64_t start = k % chunks * PIECE, count = least(PIECE, run - start);
  n += k / chunks;
  const REAL *a = NAME(load)(p, &p->x, n, c, start, count, buffer);
  return NAME(moments)(a, count, NAME(expected)(p, &p->y, n, c, start, a));
}

static int64_t NAME(pieces)(const Norm *p) {
  return p->groups ? parts(values_of(p), PIECE) : p->n * parts(p->s, PIECE);
}

/* All sets of a unit of short planes: column by column down the samples, as `moments` otherwise. */
static void NAME(columns)(const Norm *p, Unit u, NAME(Moments) *found) {
  enum { SAMPLES = 64 };
  REAL buffer[PIECE], middle[PIECE], sum[PIECE], square[PIECE];
  int64_t s = p->s, width = u.count * s;
  for (int64_t j = 0; j < u.count; j++) found[j].seen = 0;
  for (int64_t n0 = 0; n0 < p->n; n0 += SAMPLES) {
    int64_t n1 = least(n0 + SAMPLES, p->n);
    double count = (double)(n1 - n0) * s;
    const REAL *top = NAME(load)(p, &p->x, n0, u.c0, 0, width, buffer);
    for (int64_t j = 0; j < u.count; j++)
      for (int64_t i = 0; i < s; i++) middle[j * s + i] = top[j * s];
    memset(sum, 0, width * sizeof(REAL));
    memset(square, 0, width * sizeof(REAL));
    for (int64_t n = n0; n < n1; n++) {
      const REAL *restrict a = NAME(load)(p, &p->x, n, u.c0, 0, width, buffer);
      for (int64_t i = 0; i < width; i++) sum[i] += a[i] - middle[i];
    }
    for (int64_t j = 0; j < u.count; j++) {
      double total = 0;
      for (int64_t i = j * s; i < (j + 1) * s; i++) total += sum[i];
      REAL around = middle[j * s] + (REAL)(total / count);
      for (int64_t i = j * s; i < (j + 1) * s; i++) middle[i] = around;
    }
    memset(sum, 0, width * sizeof(REAL));
    for (int64_t n = n0; n < n1; n++) {
      const REAL *restrict a = NAME(load)(p, &p->x, n, u.c0, 0, width, buffer);
      const REAL *next = NAME(expected)(p, &p->y, n, u.c0, 0, NULL);
      for (int64_t i = 0; next && i < width; i += 128 / sizeof(REAL)) EXPECT(next, i);
      for (int64_t i = 0; i < width; i++) {
        REAL d = a[i] - middle[i];
        sum[i] += d;
        square[i] = NAME(fma)(d, d, square[i]);
      }
    }
    for (int64_t j = 0; j < u.count; j++) {
      double total = 0, squares = 0;
      for (int64_t i = j * s; i < (j + 1) * s; i++) total += sum[i], squares += square[i];
      NAME(Moments) m = {count, squares - total * total / count,
                         (long double)middle[j * s] + total / count};
      if (!isfinite(m.squares)) { /* plane by plane then */
        m.seen = 0;
        for (int64_t n = n0; n < n1; n++) NAME(merge)(&m, NAME(piece)(p, n, u.c0 + j, 0));
      }
      NAME(merge)(found + j, m);
    }
  }
}

/* Every channel's moments over a cut of many rows, as `moments` of a plane. */
static void NAME(band)(const Norm *p, Cut at, WIDE *mean, double *squares) {
  REAL buffer[PIECE], middle[PIECE], sum[PIECE], square[PIECE];
  int64_t n = at.n, c = at.c, planes = at.planes, end = at.start + at.count;
  int64_t length = length_of(p), few = least(at.count, LANES);
  const REAL *a = NULL;
  memset(sum, 0, planes * sizeof(REAL));
  for (int64_t start = 0; start < few; start += length) {
    int64_t rows = least(length, few - start);
    a = NAME(load)(p, &p->x, n, c, at.start + start, rows * planes, buffer);
    if (start == 0) memcpy(square, a, planes * sizeof(REAL));
    for (int64_t r = 0; r < rows; r++)
      for (int64_t j = 0; j < planes; j++) sum[j] += a[r * planes + j] - square[j];
  }
  for (int64_t j = 0; j < planes; j++) middle[j] = square[j] + sum[j] / few;
  memset(sum, 0, planes * sizeof(REAL));
  memset(square, 0, planes * sizeof(REAL));
  for (int64_t start = at.start; start < end; start += length) {
    int64_t rows = least(length, end - start);
    a = NAME(load)(p, &p->x, n, c, start, rows * planes, buffer);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t j = 0; j < planes; j++) {
        REAL d = a[r * planes + j] - middle[j];
        sum[j] += d;
        square[j] = NAME(fma)(d, d, square[j]);
      }
  }
  double count = at.count;
  int finite = 1;
  for (int64_t j = 0; j < planes; j++) {
    mean[j] = (WIDE)middle[j] + (double)sum[j] / count;
    squares[j] = square[j] - (double)sum[j] * sum[j] / count;
    finite &= isfinite(squares[j]) != 0;
  }
  if (finite) return;
  double wide[PIECE] = {0}, d;
  for (int64_t start = at.start; start < end; start++) {
    a = NAME(load)(p, &p->x, n, c, start, planes, buffer);
    for (int64_t j = 0; j < planes; j++) wide[j] += a[j];
  }
  for (int64_t j = 0; j < planes; j++) mean[j] = wide[j] / count, squares[j] = 0;
  for (int64_t start = at.start; start < end; start++) {
    a = NAME(load)(p, &p->x, n, c, start, planes, buffer);
    for (int64_t j = 0; j < planes; j++) d = a[j] - (double)mean[j], squares[j] += d * d;
  }
}

/* `merge` of many channels, where all have `seen` values, the others `more`. */
static void NAME(join)(int64_t count, WIDE *mean, double *squares, double seen, const WIDE *means,
                       const double *others, double more) {
  double share = more / (seen + more);
  for (int64_t j = 0; j < count; j++) {
    double delta = (double)(means[j] - mean[j]);
    squares[j] += others[j] + delta * delta * (seen * share);
    mean[j] += (WIDE)delta * share;
  }
}

/* As torch's lerp: exact at both ends. */
static REAL NAME(moved)(REAL from, REAL to, REAL share) {
  return share < (REAL)0.5 ? from + share * (to - from) : to - (to - from) * (1 - share);
}

static void NAME(finish_set)(const Norm *p, int64_t i, long double mean, double var) {
  REAL *stats = (REAL *)p->stats;
  int64_t sets = sets_of(p);
  if (p->shared) {
    p->shared[i] = (double)mean;
    p->shared[sets + i] = var * values_of(p);
    return;
  }
  REAL rounded = (REAL)mean;
  stats[i] = rounded;
  stats[sets + i] = (REAL)(mean - rounded);
  p->rstd[i] = 1.0 / sqrt(var + p->eps);
  stats[2 * sets + i] = (REAL)p->rstd[i];
  stats[3 * sets + i] = (REAL)var;
  REAL *m = (REAL *)p->running_mean, *v = (REAL *)p->running_var, spread = (REAL)(var * p->bessel);
  if ((m && !isfinite(rounded)) || (v && !isfinite(spread))) return;
  if (m) m[i] = NAME(moved)(m[i], rounded, (REAL)p->momentum);
  if (v) v[i] = NAME(moved)(v[i], spread, (REAL)p->momentum);
}

/* ---- (x - mean) * scale + shift, and what follows */

/* Coefficients of a cut: for each plane, the first three for each element where it is narrow.
 * x_hat = (x - center) * rstd - lag. */
typedef struct {
  REAL mean[PIECE], scale[PIECE], shift[PIECE];
  REAL center[PIECE], rstd[PIECE], lag[PIECE], gain[PIECE];
} NAME(Affine);

/* Whether a cut's coefficients are those of its elements, not of its planes or of its rows. */
static int NAME(is_narrow)(const Norm *p, Cut at) {
  return (p->last ? at.planes : at.count) < NARROW;
}

/* One number for each plane as one for each element, from the back: in place. */
static void NAME(spread)(const Norm *p, REAL *a, Cut at) {
  if (!NAME(is_narrow)(p, at)) return;
  if (p->last) {
    for (int64_t i = at.planes; i < at.planes * at.count; i++) a[i] = a[i - at.planes];
    return;
  }
  for (int64_t j = at.planes - 1; j >= 0; j--) {
    REAL value = a[j];
    for (int64_t i = at.count - 1; i >= 0; i--) a[j * at.count + i] = value;
  }
}

static void NAME(describe)(const Norm *p, Cut at, NAME(Affine) *a) {
  int64_t n = at.n, c0 = at.c, count = at.planes;
  int64_t sets = sets_of(p), own = p->own, row = (p->labels ? p->labels[n] : 0) * p->c + c0;
  int64_t first = set_of(p, n, c0);
  const REAL *stats = (const REAL *)p->stats + first;
  const REAL *restrict weight = p->weight ? (const REAL *)p->weight + row : NULL;
  const REAL *restrict bias = p->bias ? (const REAL *)p->bias + row : NULL;
  REAL *var = a->mean; /* until the mean itself is known */
  for (int64_t j = 0; j < count; j++) a->gain[j] = weight ? weight[j] : 1;
  if (own == 1) {
    memcpy(a->center, stats, count * sizeof(REAL));
    memcpy(a->rstd, stats + 2 * sets, count * sizeof(REAL));
    memcpy(var, stats + 3 * sets, count * sizeof(REAL));
    for (int64_t j = 0; j < count; j++) a->lag[j] = stats[sets + j] * a->rstd[j];
    if (p->rstd) /* rounded once */
      for (int64_t j = 0; j < count; j++) a->scale[j] = (REAL)(p->rstd[first + j] * a->gain[j]);
    else
      for (int64_t j = 0; j < count; j++) a->scale[j] = a->rstd[j] * a->gain[j];
  } else {
    for (int64_t i = 0, j = 0; j < count; i++) {
      REAL rstd = stats[2 * sets + i], lag = stats[sets + i] * rstd;
      double exact = p->rstd ? p->rstd[first + i] : rstd;
      for (int64_t end = least(count, (c0 + j) / own * own + own - c0); j < end; j++) {
        a->center[j] = stats[i];
        a->rstd[j] = rstd;
        var[j] = stats[3 * sets + i];
        a->lag[j] = lag;
        a->scale[j] = (REAL)(exact * a->gain[j]);
      }
    }
  }
  for (int64_t j = 0; j < count; j++) {
    REAL mean = a->center[j], shift = bias ? bias[j] : 0;
    /* Near 0 nothing cancels in x * scale + shift, which rounds once less. */
    int near = (double)mean * mean < 4 * (double)var[j] && isfinite(var[j]);
    a->mean[j] = near ? 0 : mean;
    a->shift[j] = (REAL)(shift - (double)a->lag[j] * a->gain[j] -
                         (near ? (double)mean * a->scale[j] : 0));
  }
  NAME(spread)(p, a->mean, at);
  NAME(spread)(p, a->scale, at);
  NAME(spread)(p, a->shift, at);
}

static inline REAL NAME(activate)(REAL v, int64_t activation, REAL slope) {
  if (activation == RELU) return v < 0 ? 0 : v; /* NaN stays NaN */
  if (activation == LEAKY_RELU) return v > 0 ? v : v * slope;
  if (activation == SILU) return v * NAME(sigmoid)(v);
  return v;
}

/* dy behind the activation; what it masks may be Inf or NaN. */
static inline REAL NAME(masked)(REAL dy, REAL v, int64_t activation, REAL slope) {
  if (activation == RELU) return v <= 0 ? 0 : dy;
  if (activation == LEAKY_RELU) return v > 0 ? dy : dy * slope;
  if (activation == SILU) {
    REAL s = NAME(sigmoid)(v);
    return dy * (s * NAME(fma)(v, 1 - s, 1));
  }
  return dy;
}

/* One plane, or (`each`) elements with coefficients of their own. */
INLINE void NAME(apply_plane)(const REAL *restrict x, const REAL *restrict r, REAL *restrict y,
                              int64_t count, const REAL *restrict mean, const REAL *restrict scale,
                              const REAL *restrict shift, int each, int64_t activation, int after,
                              REAL slope) {
  REAL m = *mean, a = *scale, b = *shift;
#define PRE NAME(fma)(x[i] - (each ? mean[i] : m), each ? scale[i] : a, each ? shift[i] : b)
  if (!r)
    for (int64_t i = 0; i < count; i++) y[i] = NAME(activate)(PRE, activation, slope);
  else if (after)
    for (int64_t i = 0; i < count; i++) y[i] = NAME(activate)(PRE, activation, slope) + r[i];
  else
    for (int64_t i = 0; i < count; i++) y[i] = NAME(activate)(PRE + r[i], activation, slope);
}

/* What a cut's elements share: every run of `of` has coefficients element by element. */
#define RUNS(p, at) \
  int64_t all = (at).planes * (at).count, of = NAME(is_narrow)(p, at) ? all : (at).planes; \
  int each = (p)->last || NAME(is_narrow)(p, at)

INLINE void NAME(apply_cut)(const Norm *p, Cut at, const REAL *x, const REAL *r, REAL *y,
                            const NAME(Affine) *a, int64_t activation) {
  RUNS(p, at);
  int64_t s = at.count;
  int after = (int)p->residual_after;
  REAL slope = (REAL)p->slope;
  if (each)
    for (int64_t i = 0; i < all; i += of)
      NAME(apply_plane)(x + i, r ? r + i : NULL, y + i, of, a->mean, a->scale, a->shift, 1,
                        activation, after, slope);
  else
    for (int64_t j = 0; j < at.planes; j++)
      NAME(apply_plane)(x + j * s, r ? r + j * s : NULL, y + j * s, s, a->mean + j, a->scale + j,
                        a->shift + j, 0, activation, after, slope);
}

/* The steps: each describes its stretch once, and goes through it cut by cut. */
#define EACH_CUT(p, at)                                                       \
  for (int64_t end_ = at.start + at.count, length_ = length_of(p);            \
       at.start < end_ && (at.count = least(length_, end_ - at.start), 1);    \
       at.start += length_)

static void NAME(apply)(const Norm *p, Cut at, double *unused) {
  REAL bx[PIECE], br[PIECE], by[PIECE];
  int64_t n = at.n, c = at.c;
  (void)unused;
  NAME(Affine) a;
  NAME(describe)(p, first_of(p, at), &a);
  EACH_CUT(p, at) {
    int64_t start = at.start, all = at.planes * at.count;
    const REAL *x = NAME(load)(p, &p->x, n, c, start, all, bx), *r = NULL;
    if (p->residual.data) r = NAME(load)(p, &p->residual, n, c, start, all, br);
    REAL *y = NAME(target)(p, &p->y, n, c, start, by);
    switch (p->activation) {
      case RELU: NAME(apply_cut)(p, at, x, r, y, &a, RELU); break;
      case LEAKY_RELU: NAME(apply_cut)(p, at, x, r, y, &a, LEAKY_RELU); break;
      case SILU: NAME(apply_cut)(p, at, x, r, y, &a, SILU); break;
      default: NAME(apply_cut)(p, at, x, r, y, &a, NONE);
    }
    NAME(store)(p, &p->y, n, c, start, all, y);
  }
}

static void NAME(apply_all)(const Norm *p) {
#pragma omp parallel for num_threads(p->threads) if (is_parallel(p))
  for (int64_t k = 0; k < p->n * items_of(p); k++) NAME(apply)(p, item_of(p, k), NULL);
}

static void NAME(forward_unit)(const Norm *p, Unit u) {
  NAME(Moments) found[PIECE];
  int64_t own = p->own, sets = u.count / own, first = set_of(p, u.n0, u.c0);
  if (is_short(p))
    NAME(columns)(p, u, found);
  else
    for (int64_t i = 0; i < sets; i++) {
      found[i].seen = 0;
      for (int64_t k = 0; k < NAME(pieces)(p); k++)
        NAME(merge)(found + i, NAME(piece)(p, u.n0, u.c0 + i * own, k));
    }
  for (int64_t i = 0; i < sets; i++)
    NAME(finish_set)(p, first + i, found[i].mean, found[i].squares / found[i].seen);
  if (p->y.data) walk(p, u, NAME(apply), NULL);
}

/* Samples [n0, n1) of rows: what lies between is `mean` and `squares`, (N, stretches, C). */
static void NAME(forward_rows)(const Norm *p, int64_t n0, int64_t n1, WIDE *mean, double *squares,
                               int parallel) {
  enum { SPAN = 64 };
  int64_t stretch = stretch_of(p), chunks = parts(p->s, stretch), c = p->c, own = p->own;
  int64_t items = items_of(p);
  int64_t rest = p->s - (chunks - 1) * stretch; /* rows of a sample's last stretch */
#pragma omp parallel for num_threads(p->threads) if (parallel)
  for (int64_t k = n0 * items; k < n1 * items; k++) {
    Cut at = item_of(p, k);
    int64_t to = (at.n * chunks + at.start / stretch) * c + at.c;
    NAME(band)(p, at, mean + to, squares + to);
  }
#pragma omp parallel for num_threads(p->threads) if (parallel)
  for (int64_t first = 0; first < c; first += SPAN) {
    int64_t count = least(SPAN, c - first);
    double seen = 0;
    for (int64_t k = n0 * chunks; k < n1 * chunks; k++) { /* into the batch's or a sample's first */
      int64_t to = p->groups ? k / chunks * chunks : 0;
      double more = k % chunks == chunks - 1 ? rest : stretch;
      if (k == to) seen = 0;
      if (k > to)
        NAME(join)(count, mean + to * c + first, squares + to * c + first, seen,
                   mean + k * c + first, squares + k * c + first, more);
      seen += more;
    }
  }
  for (int64_t n = n0; n < (p->groups ? n1 : n0 + 1); n++) {
    const WIDE *m = mean + n * chunks * c;
    const double *sq = squares + n * chunks * c;
    for (int64_t i = 0; i < c; i += own) {
      long double middle = 0;
      double square = 0, d, seen = p->groups ? p->s : p->n * p->s;
      for (int64_t j = i; j < i + own; j++) middle += m[j];
      middle /= own;
      for (int64_t j = i; j < i + own; j++)
        d = (double)(m[j] - middle), square += sq[j] + seen * d * d;
      NAME(finish_set)(p, set_of(p, n, i), middle, square / (seen * own));
    }
  }
  if (!p->y.data) return;
#pragma omp parallel for num_threads(p->threads) if (parallel)
  for (int64_t k = n0 * items; k < n1 * items; k++) NAME(apply)(p, item_of(p, k), NULL);
}

static int NAME(forward)(const Norm *p) {
  int64_t sets = sets_of(p), pieces = NAME(pieces)(p), own = p->own;
  if (!p->mean && by_units(p)) {
#pragma omp parallel for num_threads(p->threads) if (is_parallel(p))
    for (int64_t i = 0; i < units_of(p); i++) NAME(forward_unit)(p, unit_of(p, i));
    return 0;
  }
  if (!p->mean && p->last) {
    int64_t count = p->n * parts(p->s, stretch_of(p)) * p->c, runs = runs_of(p);
    WIDE *mean = malloc(count * (sizeof(WIDE) + sizeof(double)));
    if (!mean) return 1;
    double *squares = (double *)(mean + count);
    if (runs == 1) {
      NAME(forward_rows)(p, 0, p->n, mean, squares, is_parallel(p));
    } else {
#pragma omp parallel for num_threads(p->threads) if (is_parallel(p))
      for (int64_t n = 0; n < runs; n++) NAME(forward_rows)(p, n, n + 1, mean, squares, 0);
    }
    free(mean);
    return 0;
  }
  if (p->mean) {
    const REAL *mean = (const REAL *)p->mean, *var = (const REAL *)p->var;
    for (int64_t i = 0; i < sets; i++) NAME(finish_set)(p, i, mean[i], var[i]);
  } else {
    NAME(Moments) *part = malloc(sets * pieces * sizeof(*part));
    if (!part) return 1;
#pragma omp parallel for num_threads(p->threads) if (is_parallel(p))
    for (int64_t k = 0; k < sets * pieces; k++) {
      int64_t i = k / pieces, n = p->groups ? i / p->groups : 0;
      int64_t c = p->groups ? i % p->groups * own : i;
      part[k] = NAME(piece)(p, n, c, k % pieces);
    }
    for (int64_t i = 0; i < sets; i++) {
      NAME(Moments) *m = part + i * pieces;
      for (int64_t k = 1; k < pieces; k++) NAME(merge)(m, m[k]);
      NAME(finish_set)(p, i, m->mean, m->squares / m->seen);
    }
    free(part);
  }
  if (p->y.data) NAME(apply_all)(p);
  return 0;
}

/* ---- backward: g is dy behind the activation */

INLINE void NAME(slope_plane)(const REAL *restrict x, const REAL *restrict r,
                              const REAL *restrict dy, REAL *restrict g, int64_t count,
                              const REAL *restrict mean, const REAL *restrict scale,
                              const REAL *restrict shift, int each, int64_t activation,
                              REAL slope) {
  REAL m = *mean, a = *scale, b = *shift;
  if (!r)
    for (int64_t i = 0; i < count; i++) g[i] = NAME(masked)(dy[i], PRE, activation, slope);
  else
    for (int64_t i = 0; i < count; i++)
      g[i] = NAME(masked)(dy[i], PRE + r[i], activation, slope);
}
#undef PRE

INLINE void NAME(slope_cut)(const Norm *p, Cut at, const REAL *x, const REAL *r, const REAL *dy,
                            REAL *g, const NAME(Affine) *a, int64_t activation) {
  RUNS(p, at);
  int64_t s = at.count;
  REAL slope = (REAL)p->slope;
  if (each)
    for (int64_t i = 0; i < all; i += of)
      NAME(slope_plane)(x + i, r ? r + i : NULL, dy + i, g + i, of, a->mean, a->scale, a->shift, 1,
                        activation, slope);
  else
    for (int64_t j = 0; j < at.planes; j++)
      NAME(slope_plane)(x + j * s, r ? r + j * s : NULL, dy + j * s, g + j * s, s, a->mean + j,
                        a->scale + j, a->shift + j, 0, activation, slope);
}

/* Where the sums leave g for dx: in the residual's gradient, or in dx, which is written last; NULL
 * where dx has to make it again, since those are of another type. */
static REAL *NAME(kept)(const Norm *p, Cut at) {
  const Tensor *t = p->g.data ? &p->g : &p->dx;
  if (p->dtype != OWN || p->activation == NONE || !t->data) return NULL;
  return NAME(target)(p, t, at.n, at.c, at.start, NULL);
}

/* g of a cut: dy itself where there is no activation, else in `buffer`. */
static const REAL *NAME(gradient)(const Norm *p, Cut at, const NAME(Affine) *a, const REAL *x,
                                  REAL *buffer) {
  REAL br[PIECE], bd[PIECE];
  int64_t n = at.n, c = at.c, start = at.start, all = at.planes * at.count;
  if (p->activation == NONE) return NAME(load)(p, &p->dy, n, c, start, all, buffer);
  const REAL *dy = NAME(load)(p, &p->dy, n, c, start, all, bd), *r = NULL;
  if (p->residual.data) r = NAME(load)(p, &p->residual, n, c, start, all, br);
  switch (p->activation) {
    case RELU: NAME(slope_cut)(p, at, x, r, dy, buffer, a, RELU); break;
    case LEAKY_RELU: NAME(slope_cut)(p, at, x, r, dy, buffer, a, LEAKY_RELU); break;
    default: NAME(slope_cut)(p, at, x, r, dy, buffer, a, SILU);
  }
  return buffer;
}

INLINE void NAME(sum_planes)(const REAL *x, const REAL *g, int64_t planes, int64_t s, int64_t start,
                             const NAME(Affine) *a, double *gx_sum, double *g_sum,
                             const REAL *next) {
  for (int64_t j = 0; j < planes; j++) {
    const REAL *restrict xs = x + j * s, *restrict gs = g + j * s;
    REAL sum = 0, product = 0, mean = a->center[j], rstd = a->rstd[j];
    REAL sums[LANES] = {0}, products[LANES] = {0};
    NAME(few) side = {0}, made = {0};
    int64_t whole = s < 4 * LANES ? 0 : s - s % LANES, more = s - s % FEW;
    for (int64_t i = 0; i < whole; i += LANES) {
      EXPECT(next + j * s, i);
      for (int k = 0; k < LANES; k++) {
        sums[k] += gs[i + k];
        products[k] = NAME(fma)(gs[i + k], (xs[i + k] - mean) * rstd, products[k]);
      }
    }
    for (int64_t i = whole; i < more; i += FEW) {
      NAME(few) value = *(const NAME(few) *)(gs + i);
      side += value;
      made += value * ((*(const NAME(few) *)(xs + i) - mean) * rstd);
    }
    for (int64_t i = more; i < s; i++) {
      sum += gs[i];
      product = NAME(fma)(gs[i], (xs[i] - mean) * rstd, product);
    }
    sum += NAME(total_few)(&side), product += NAME(total_few)(&made);
    if (whole) sum += NAME(total)(sums), product += NAME(total)(products);
    gx_sum[j] = (start ? gx_sum[j] : 0) + ((double)product - (double)a->lag[j] * sum);
    g_sum[j] = (start ? g_sum[j] : 0) + sum;
  }
}

static void NAME(sum_rows)(const REAL *restrict x, const REAL *restrict g, int64_t planes,
                           int64_t rows, int64_t start, const NAME(Affine) *a, double *gx_sum,
                           double *g_sum) {
  REAL sum[PIECE], product[PIECE];
  memset(sum, 0, planes * sizeof(REAL));
  memset(product, 0, planes * sizeof(REAL));
  for (int64_t r = 0; r < rows; r++)
    for (int64_t j = 0; j < planes; j++) {
      REAL value = g[r * planes + j];
      sum[j] += value;
      REAL x_hat = (x[r * planes + j] - a->center[j]) * a->rstd[j];
      product[j] = NAME(fma)(value, x_hat, product[j]);
    }
  for (int64_t j = 0; j < planes; j++) {
    gx_sum[j] = (start ? gx_sum[j] : 0) + ((double)product[j] - (double)a->lag[j] * sum[j]);
    g_sum[j] = (start ? g_sum[j] : 0) + sum[j];
  }
}

/* Every plane's sums of g * x_hat and of g, into to[n, c] and behind all of those; a later part of
 * a plane is added. An inner residual's gradient is g. */
static void NAME(sum)(const Norm *p, Cut at, double *to) {
  REAL bx[PIECE], bg[PIECE];
  int64_t n = at.n, c = at.c;
  double *gx_sum = to + n * p->c + c, *g_sum = gx_sum + p->n * p->c;
  NAME(Affine) a;
  NAME(describe)(p, first_of(p, at), &a);
  EACH_CUT(p, at) {
    int64_t start = at.start, s = at.count, all = at.planes * s;
    const REAL *x = NAME(load)(p, &p->x, n, c, start, all, bx);
    REAL *kept = NAME(kept)(p, at);
    const REAL *g = NAME(gradient)(p, at, &a, x, kept ? kept : bg);
    const REAL *next = p->groups && !kept ? NAME(expected)(p, &p->dx, n, c, start, x) : x;
    if (p->last)
      NAME(sum_rows)(x, g, at.planes, s, start, &a, gx_sum, g_sum);
    else if (s == 16)
      NAME(sum_planes)(x, g, at.planes, 16, start, &a, gx_sum, g_sum, next);
    else if (s == 64)
      NAME(sum_planes)(x, g, at.planes, 64, start, &a, gx_sum, g_sum, next);
    else
      NAME(sum_planes)(x, g, at.planes, s, start, &a, gx_sum, g_sum, next);
    if (!p->g.data || kept) continue;
    REAL *out = NAME(target)(p, &p->g, n, c, start, bg);
    if (out != g) memcpy(out, g, all * sizeof(REAL));
    NAME(store)(p, &p->g, n, c, start, all, out);
  }
}

/* What dx takes off gain * g: the means over a set of that, and of that times x_hat: (sets, 2);
 * their sums, where other processes have more of the set. */
static void NAME(average)(const Norm *p, Unit u, double *means) {
  int64_t own = p->own, sets = u.count / own;
  double *to = means + 2 * set_of(p, u.n0, u.c0);
  memset(to, 0, 2 * sets * sizeof(double));
  for (int64_t n = u.n0; n < u.n1; n++) {
    const double *gx_sum = p->sums + n * p->c + u.c0, *g_sum = gx_sum + p->n * p->c;
    const REAL *gain = (const REAL *)p->weight;
    if (gain) gain += (p->labels ? p->labels[n] : 0) * p->c + u.c0;
    for (int64_t i = 0, j = 0; i < sets; i++)
      for (int64_t end = j + own; j < end; j++) {
        to[2 * i] += (gain ? gain[j] : 1) * g_sum[j];
        to[2 * i + 1] += (gain ? gain[j] : 1) * gx_sum[j];
      }
  }
  if (p->shared) return;
  for (int64_t i = 0; i < 2 * sets; i++) to[i] /= values_of(p);
}

static void NAME(dx)(const Norm *p, Cut at, double *means) {
  REAL bx[PIECE], bg[PIECE], bo[PIECE], slope[PIECE], offset[PIECE];
  int64_t n = at.n, c = at.c, planes = at.planes, own = p->own, first = set_of(p, n, c);
  Cut one = first_of(p, at);
  NAME(Affine) a;
  NAME(describe)(p, one, &a);
  if (!p->mean) {
    for (int64_t i = 0, j = 0; j < planes; i++) {
      const double *of = means + 2 * (first + i);
      for (int64_t end = least(planes, (c + j) / own * own + own - c); j < end; j++) {
        slope[j] = (REAL)(-of[1] * a.rstd[j]);
        offset[j] = (REAL)((of[1] * a.lag[j] - of[0]) * a.rstd[j]);
      }
    }
    NAME(spread)(p, a.center, one);
    NAME(spread)(p, a.rstd, one);
    NAME(spread)(p, slope, one);
    NAME(spread)(p, offset, one);
  }
  EACH_CUT(p, at) {
    int64_t start = at.start, s = at.count;
    RUNS(p, at);
    const REAL *x = NAME(load)(p, &p->x, n, c, start, all, bx), *g = NAME(kept)(p, at);
    if (!g) g = NAME(gradient)(p, at, &a, x, bg);
    REAL *dx = NAME(target)(p, &p->dx, n, c, start, bo);
    /* g may be in dx: element by element. */
    if (each) {
      for (int64_t k = 0; k < all; k += of)
        if (p->mean)
#pragma omp simd
          for (int64_t i = 0; i < of; i++) dx[k + i] = g[k + i] * a.scale[i];
        else
#pragma omp simd
          for (int64_t i = 0; i < of; i++) {
            REAL x_hat = (x[k + i] - a.center[i]) * a.rstd[i];
            dx[k + i] = NAME(fma)(g[k + i], a.scale[i], NAME(fma)(x_hat, slope[i], offset[i]));
          }
    } else {
      for (int64_t j = 0; j < planes; j++) {
        const REAL *xs = x + j * s, *gs = g + j * s;
        REAL *to = dx + j * s, scale = a.scale[j], mean = a.center[j], rstd = a.rstd[j];
        REAL pull = p->mean ? 0 : slope[j], shift = p->mean ? 0 : offset[j];
        if (p->mean)
#pragma omp simd
          for (int64_t i = 0; i < s; i++) to[i] = gs[i] * scale;
        else
#pragma omp simd
          for (int64_t i = 0; i < s; i++)
            to[i] = NAME(fma)(gs[i], scale, NAME(fma)((xs[i] - mean) * rstd, pull, shift));
      }
    }
    NAME(store)(p, &p->dx, n, c, start, all, dx);
  }
}

/* The rows' gradients: what their samples' planes sum up to, in the samples' order. */
static void NAME(rows)(const Norm *p, void *table, const double *sums) {
  enum { SPAN = 64 };
  if (!table) return;
  if (p->labels || p->rows > 1) memset(table, 0, p->rows * p->c * sizeof(REAL));
#pragma omp parallel for num_threads(p->threads) if (p->threads > 1 && p->n * p->c >= SERIAL)
  for (int64_t first = 0; first < p->c; first += SPAN) {
    int64_t count = least(SPAN, p->c - first);
    double total[SPAN] = {0};
    for (int64_t n = 0; n < p->n; n++) {
      const double *from = sums + n * p->c + first;
      REAL *to = (REAL *)table + (p->labels ? p->labels[n] : 0) * p->c + first;
      if (p->labels)
        for (int64_t c = 0; c < count; c++) to[c] += (REAL)from[c];
      else
        for (int64_t c = 0; c < count; c++) total[c] += from[c];
    }
    if (!p->labels)
      for (int64_t c = 0; c < count; c++) ((REAL *)table)[first + c] = (REAL)total[c];
  }
}

/* Samples [n0, n1), step by step: a stretch's sums go to `part`, (stretches, 2, N, C). */
static void NAME(backward_steps)(const Norm *p, int64_t n0, int64_t n1, double *means,
                                 double *part, int parallel) {
  int64_t all = p->n * p->c, row = parts(p->c, p->width);
  int64_t stretch = stretch_of(p), items = items_of(p);
#pragma omp parallel for num_threads(p->threads) if (parallel)
  for (int64_t k = n0 * items; k < n1 * items; k++) {
    Cut at = item_of(p, k);
    double *to = part + at.start / stretch * 2 * all;
    for (int64_t j = at.n * p->c + at.c, end = j + at.planes; j < end; j++)
      to[j] = to[all + j] = 0; /* a stretch's first part is added here */
    NAME(sum)(p, at, to);
  }
  for (int64_t i = n0 * p->c; i < n1 * p->c; i++) {
    p->sums[i] = p->sums[all + i] = 0;
    for (int64_t k = 0; k < parts(p->s, stretch); k++) {
      p->sums[i] += part[2 * k * all + i];
      p->sums[all + i] += part[2 * k * all + all + i];
    }
  }
  if (!p->dx.data) return;
#pragma omp parallel for num_threads(p->threads) if (parallel)
  for (int64_t i = n0 * row; i < (p->groups ? n1 * row : row); i++)
    NAME(average)(p, unit_of(p, i), means);
  if (p->shared) return;
#pragma omp parallel for num_threads(p->threads) if (parallel)
  for (int64_t k = n0 * items; k < n1 * items; k++) NAME(dx)(p, item_of(p, k), means);
}

static int NAME(backward)(const Norm *p) {
  int64_t all = 2 * p->n * p->c, chunks = parts(p->s, stretch_of(p));
  int together = by_units(p);
  double *means = malloc((2 * sets_of(p) + (together ? 0 : all * chunks)) * sizeof(double));
  if (!means) return 1;
  if (together) {
#pragma omp parallel for num_threads(p->threads) if (is_parallel(p))
    for (int64_t i = 0; i < units_of(p); i++) {
      Unit u = unit_of(p, i);
      walk(p, u, NAME(sum), p->sums);
      if (!p->dx.data) continue;
      NAME(average)(p, u, means);
      if (!p->shared) walk(p, u, NAME(dx), means);
    }
  } else {
    double *part = means + 2 * sets_of(p);
    int64_t runs = runs_of(p);
    if (runs == 1) { /* a region inside of one, even of one thread, would start threads anew */
      NAME(backward_steps)(p, 0, p->n, means, part, is_parallel(p));
    } else {
#pragma omp parallel for num_threads(p->threads) if (is_parallel(p))
      for (int64_t n = 0; n < runs; n++) NAME(backward_steps)(p, n, n + 1, means, part, 0);
    }
  }
  for (int64_t i = 0; p->shared && i < p->c; i++)
    p->shared[i] = means[2 * i], p->shared[p->c + i] = means[2 * i + 1];
  free(means);
  NAME(rows)(p, p->dweight, p->sums);
  NAME(rows)(p, p->dbias, p->sums + all / 2);
  return 0;
}

static int NAME(dx_all)(const Norm *p) {
  double *means = malloc(2 * p->c * sizeof(double));
  if (!means) return 1;
  for (int64_t i = 0; i < p->c; i++)
    means[2 * i] = p->shared[i], means[2 * i + 1] = p->shared[p->c + i];
#pragma omp parallel for num_threads(p->threads) if (is_parallel(p))
  for (int64_t k = 0; k < p->n * items_of(p); k++) NAME(dx)(p, item_of(p, k), means);
  free(means);
  return 0;
}
