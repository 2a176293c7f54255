/* Every norm on a CPU, forward and backward (see __init__.py).
 *
 * x is (N, C, S), every sample dense: planes of S elements, or (channels last) rows of C. A set is
 * what shares a mean and a variance: one channel of the batch (groups = 0), or C / groups channels
 * of one sample. A unit is whole sets: channels side by side, of one sample or of all. A thread
 * takes a unit, and finds it in its cache when it looks a second time; where there are too few
 * units, pieces are dealt out instead. A piece has at most PIECE elements; sums are REAL inside a
 * piece and double across pieces, and are added up in one order, whatever the number of threads;
 * what rounds, and in which order, is said here and not left to the compiler (see `fma`).
 * Rows are worked on as they lie, the channels side by side.
 *
 * REAL is float, to which half types are converted by the piece, and double; WIDE tells what a mean
 * loses when it is rounded to REAL.
 */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
  PIECE = 2048,
  SHORT = 1024,  /* planes up to this size are added up side by side in a batch's statistics */
  LANES = 32,    /* sums side by side */
  NARROW = 16,   /* planes (rows) below this size get their coefficients element by element */
  ROWS = 128,    /* about so many have sums of their own */
  SERIAL = 16384, /* fewer elements than that are not worth a second thread */
  FAR = 2097152 /* from as many on, the output's lines come from beyond the caches */
};
enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
enum { NONE, RELU, LEAKY_RELU, SILU };

/* A tensor (N, C, S) of its dtype, and how many elements lie from one sample to the next. */
typedef struct {
  char *data; /* NULL: there is none */
  int64_t sample;
} Tensor;

typedef struct {
  int64_t n, c, s, groups, rows; /* rows: K, of the tables */
  int64_t dtype, activation, residual_after, threads, last; /* last: channels */
  double eps, slope, momentum, bessel;
  Tensor x, residual, y, dy, dx, g;
  void *stats;                      /* (4, sets): mean, its rounding error, 1 / std, variance */
  const void *mean, *var;           /* (C,) given in place of the input's own */
  const void *weight, *bias;        /* (K, C) */
  const int64_t *labels;            /* (N,), or NULL: row 0 for all */
  void *running_mean, *running_var; /* (C,) */
  void *dweight, *dbias;            /* (K, C) */
  /* (2, C), what processes share of a batch; or NULL. Of norm_forward, without y: means, squares
   * around them. Of norm_backward, whose dx may then hold g alone: sums of gain * g and of that
   * times x_hat. To norm_dx: their means over all processes' elements. */
  double *shared;
  /* Filled in here. */
  double *rstd; /* forward: (sets,), 1 / std before it is rounded */
  double *sums; /* backward: (2, N, C): of g * x_hat and of g over each plane */
  int64_t own, width; /* channels of a set, of a unit */
} Norm;

/* What is given, as build.py packs it: fields of 8 bytes, a tensor two. */
_Static_assert(offsetof(Norm, eps) == 8 * INTEGERS, "integers");
_Static_assert(offsetof(Norm, x) - offsetof(Norm, eps) == 8 * REALS, "reals");
_Static_assert(offsetof(Norm, stats) - offsetof(Norm, x) == 16 * TENSORS, "tensors");
_Static_assert(offsetof(Norm, rstd) - offsetof(Norm, stats) == 8 * ADDRESSES, "addresses");

/* What is written soon, fetched while other lines are read. */
#define EXPECT(to, i) \
  __builtin_prefetch((to) + (i), 1), __builtin_prefetch((to) + (i) + 64 / sizeof(REAL), 1)

#define INLINE static inline __attribute__((always_inline))

/* a * b + c, rounded once where the processor can. FLAGS let no compiler choose: it may fuse in a
 * loop's vectors and not in its remainder, and what is remainder depends on a thread's share. */
#if defined(__FP_FAST_FMAF) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
INLINE float fma_float(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
INLINE double fma_double(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
INLINE float fma_float(float a, float b, float c) { return a * b + c; }
INLINE double fma_double(double a, double b, double c) { return a * b + c; }
#endif

/* Few sums side by side: a vector, since an array would stay in memory or be taken apart. Added up
 * in this order, which `reduction` would leave to the compiler. */
typedef float few_float __attribute__((vector_size(32), aligned(4), may_alias));
typedef double few_double __attribute__((vector_size(32), aligned(8), may_alias));
INLINE float total_few_float(const few_float *s) {
  return (((*s)[0] + (*s)[4]) + ((*s)[2] + (*s)[6])) + (((*s)[1] + (*s)[5]) + ((*s)[3] + (*s)[7]));
}
INLINE double total_few_double(const few_double *s) {
  return ((*s)[0] + (*s)[2]) + ((*s)[1] + (*s)[3]);
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t parts(int64_t a, int64_t b) { return (a + b - 1) / b; }

static int64_t sets_of(const Norm *p) { return p->groups ? p->n * p->groups : p->c; }
static int64_t values_of(const Norm *p) { return (p->groups ? p->own : p->n) * p->s; }
static int is_parallel(const Norm *p) { return p->threads > 1 && p->n * p->c * p->s >= SERIAL; }

/* Samples [n0, n1), channels [c0, c0 + count). */
typedef struct {
  int64_t n0, n1, c0, count;
} Unit;

/* A unit's channels are what a piece holds of them, and not more than a thread's share. */
static Norm prepared(const Norm *given) {
  Norm p = {0};
  memcpy(&p, given, offsetof(Norm, rstd));
  p.own = p.groups ? p.c / p.groups : 1;
  int64_t most = PIECE / (p.own * p.s);
  if (p.groups == 0) most = least(most, parts(p.c, 2 * p.threads));
  p.width = p.own * (most > 1 ? most : 1);
  return p;
}

static int64_t units_of(const Norm *p) {
  return parts(p->c, p->width) * (p->groups ? p->n : 1);
}

static Unit unit_of(const Norm *p, int64_t i) {
  int64_t width = p->width, row = parts(p->c, width), n = i / row, c0 = i % row * width;
  Unit u = {p->groups ? n : 0, p->groups ? n + 1 : p->n, c0, least(width, p->c - c0)};
  return u;
}

static int64_t set_of(const Norm *p, int64_t n, int64_t c) {
  if (p->groups == 0) return c;
  return n * p->groups + (p->own == 1 ? c : c / p->own);
}

/* A batch's statistics over short planes: of many planes side by side. */
static int is_short(const Norm *p) { return !p->last && p->groups == 0 && p->s <= SHORT; }

static int by_units(const Norm *p) {
  if (p->last) return 0;
  return p->threads == 1 || is_short(p) || units_of(p) >= 4 * p->threads;
}

/* What is worked on at once, contiguous and at most a PIECE: whole planes side by side, or elements
 * [start, start + count) of one; or rows [start, start + count), or a part of one. A stretch, which
 * has sums of its own, is a cut or, of rows, some. */
typedef struct {
  int64_t n, c, planes, start, count;
} Cut;

static int64_t planes_of(const Norm *p) {
  return p->last ? least(p->c, PIECE) : p->s < PIECE ? PIECE / p->s : 1;
}

static int64_t length_of(const Norm *p) { return p->last ? PIECE / planes_of(p) : PIECE; }

static int64_t stretch_of(const Norm *p) {
  return p->last ? length_of(p) * parts(ROWS, length_of(p)) : PIECE;
}

static Cut first_of(const Norm *p, Cut stretch) {
  stretch.count = least(length_of(p), stretch.count);
  return stretch;
}

static void walk(const Norm *p, Unit u, void (*step)(const Norm *, Cut, double *), double *extra) {
  int64_t planes = planes_of(p), end = u.c0 + u.count;
  for (int64_t n = u.n0; n < u.n1; n++)
    for (int64_t c = u.c0; c < end; c += planes)
      for (int64_t start = 0; start < p->s; start += PIECE) {
        Cut at = {n, c, least(planes, end - c), start, least(PIECE, p->s - start)};
        step(p, at, extra);
      }
}

/* Stretches of a sample, and one of all samples'. */
static int64_t items_of(const Norm *p) {
  return parts(p->c, planes_of(p)) * parts(p->s, stretch_of(p));
}

static Cut item_of(const Norm *p, int64_t k) {
  int64_t length = stretch_of(p), chunks = parts(p->s, length), planes = planes_of(p);
  int64_t row = parts(p->c, planes), start = k % chunks * length, c = k / chunks % row * planes;
  Cut at = {k / chunks / row, c, least(planes, p->c - c), start, least(length, p->s - start)};
  return at;
}

/* Into how many runs of samples rows are dealt out; within one all threads share every step. */
static int64_t runs_of(const Norm *p) {
  return p->last && p->groups && p->n >= 2 * p->threads ? p->n : 1;
}

static char *at(const Norm *p, const Tensor *t, int64_t n, int64_t c, int64_t start, int64_t size) {
  int64_t inside = p->last ? start * p->c + c : c * p->s + start;
  return t->data + size * (n * t->sample + inside);
}

static inline float widen(uint16_t half) {
  uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static inline uint16_t narrow(float value) { /* to nearest, ties to even */
  uint32_t bits;
  memcpy(&bits, &value, 4);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
}

/* 1 / (1 + exp(-x)), which compilers turn into vector code; exp to 2 units in the last place. */
static inline float sigmoid_float(float x) {
  x = -x;
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  float power, whole = fma_float(x, 1.44269504f, 12582912.0f); /* 1.5 * 2^23: to an integer */
  int32_t bits;
  memcpy(&bits, &whole, 4);
  whole -= 12582912.0f;
  float f = fma_float(whole, -1.42860677e-6f, fma_float(whole, -0.693145752f, x)); /* ln 2 in two */
  bits = (int32_t)((uint32_t)(bits + 127) << 23);
  memcpy(&power, &bits, 4);
  float e = fma_float(f, 0.00138888889f, 0.00833333333f);
  e = fma_float(f, fma_float(f, e, 0.0416666667f), 0.166666667f);
  e = fma_float(f, fma_float(f, fma_float(f, e, 0.5f), 1.0f), 1.0f);
  return x == 88.0f ? 0.0f : 1.0f / fma_float(e, power, 1.0f);
}

static inline double sigmoid_double(double x) { return 1.0 / (1.0 + exp(-x)); }

#define REAL float
#define OWN FLOAT32
#define WIDE double
#define NAME(name) name##_float
#define FEW 8
#include "norm_real.c"
#undef REAL
#undef WIDE
#undef OWN
#undef NAME
#undef FEW
#define REAL double
#define OWN FLOAT64
#define WIDE long double
#define NAME(name) name##_double
#define FEW 4
#include "norm_real.c"

int norm_float16(void) {
#ifdef __FLT16_MANT_DIG__
  return 1;
#else
  return 0;
#endif
}

/* What both return if a label is no row; 1: no memory. */
enum { NO_ROW = 2 };

static int is_labelled_wrong(const Norm *p) {
  for (int64_t n = 0; p->labels && n < p->n; n++)
    if (p->labels[n] < 0 || p->labels[n] >= p->rows) return 1;
  return 0;
}

int norm_forward(const Norm *given) {
  Norm p = prepared(given);
  if (is_labelled_wrong(&p)) return NO_ROW;
  p.rstd = malloc(sets_of(&p) * sizeof(double));
  if (!p.rstd) return 1;
  int failed = p.dtype == FLOAT64 ? forward_double(&p) : forward_float(&p);
  free(p.rstd);
  return failed;
}

int norm_backward(const Norm *given) {
  Norm p = prepared(given);
  if (is_labelled_wrong(&p)) return NO_ROW;
  p.sums = malloc(2 * p.n * p.c * sizeof(double));
  if (!p.sums) return 1;
  int failed = p.dtype == FLOAT64 ? backward_double(&p) : backward_float(&p);
  free(p.sums);
  return failed;
}

/* y by the statistics in `stats`. */
int norm_apply(const Norm *given) {
  Norm p = prepared(given);
  if (is_labelled_wrong(&p)) return NO_ROW;
  if (p.dtype == FLOAT64)
    apply_all_double(&p);
  else
    apply_all_float(&p);
  return 0;
}

/* dx, after norm_backward on the same tensors. */
int norm_dx(const Norm *given) {
  Norm p = prepared(given);
  if (is_labelled_wrong(&p)) return NO_ROW;
  return p.dtype == FLOAT64 ? dx_all_double(&p) : dx_all_float(&p);
}
