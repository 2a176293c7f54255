/* 3x3 convolutions on a CPU, stride 1, padding 1, by Winograd's minimal filtering (Lavin and Gray,
 * 2016): a quarter of the multiplications. A tile of 4x4 outputs is 36 products of what 6x6 inputs
 * and 3x3 weights are at 6x6 points; over the channels these are 36 products of matrices.
 *
 * x (N, H, W, C), y (N, H, W, K), weights (K, 3, 3, C): channels last. What the networks do around
 * such a convolution is done where values are read and written: the border may be zeros or a
 * reflection; x may stand for its nearest upsampling (up), for what is left of it where `gate` is
 * positive (gate = x: a ReLU); y for its 2x2 means (pool).
 *
 * The points are 0, +-sqrt(1/2), +-sqrt(2) and infinity: their errors are a fifth of those of the
 * usual 0, +-1, +-2, about 5 times a direct convolution's. The gradients are the transposed sums,
 * with the same points. Threads share out tiles, points and channels; each number is added up by
 * one of them, in one order: results do not depend on their number.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* A vector; how many of them, times how many rows, a product's sums fill the registers with. */
#if defined(__AVX512F__)
enum { VL = 16, NV = 4, MR = 6 };
#elif defined(__AVX__)
enum { VL = 8, NV = 2, MR = 6 };
#else
enum { VL = 4, NV = 4, MR = 6 };
#endif
enum { NR = VL * NV, TILE = 4, POINTS = 36 };
typedef float vec __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * VL), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define LOAD(p) (*(const vec *)(p))
#define STORE(p, value) (*(vec *)(p) = (value))

/* h, w: of the convolution, so of the upsampled x and of y before its means are taken. */
typedef struct {
  int64_t n, c, k, h, w, reflect, up, pool, threads, chunk; /* chunk: tiles at once */
  const float *x, *gate, *weight, *bias, *dy;
  float *y, *dx, *dw;        /* NULL: not wanted */
  float *u, *v, *m, *du;     /* room for 36 times: weights, a chunk of x, of y, gradients of u */
} Conv;

_Static_assert(offsetof(Conv, x) == 8 * INTEGERS, "integers");
_Static_assert(sizeof(Conv) - offsetof(Conv, x) == 8 * ADDRESSES, "addresses");

/* From one point to the next: not a power of two, whose lines would share few places in a cache. */
static int64_t stride_of(int64_t size) { return size + SPARE; }

int conv_lanes(void) { return VL; } /* channels come in multiples of it */

static const float A = 0.70710678118654752f, B = 1.41421356237309505f;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t parts(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Which row (column) of x stands at place i of a side of `size`; -1: a zero. */
INLINE int64_t place(const Conv *p, int64_t i, int64_t size) {
  if (i < 0) i = p->reflect ? -i : -1;
  if (i >= size) i = p->reflect && i == size ? size - 2 : -1; /* beyond: tiles that hang over */
  return i < 0 ? -1 : i >> p->up;
}

/* ---- to the points and back, along one side */

/* Six inputs to six points. */
INLINE void to_points(vec *o, vec x0, vec x1, vec x2, vec x3, vec x4, vec x5) {
  vec e = x4 - 2.0f * x2, f = A * x3 - B * x1, g = x4 - 0.5f * x2, h = B * x3 - A * x1;
  o[0] = x0 + x4 - 2.5f * x2;
  o[1] = e + f, o[2] = e - f, o[3] = g + h, o[4] = g - h;
  o[5] = x1 + x5 - 2.5f * x3;
}
/* Its transpose. */
INLINE void from_points(vec *o, vec v0, vec v1, vec v2, vec v3, vec v4, vec v5) {
  vec p = v1 + v2, q = v1 - v2, r = v3 + v4, s = v3 - v4;
  o[0] = v0;
  o[1] = v5 - B * q - A * s;
  o[2] = -2.5f * v0 - 2.0f * p - 0.5f * r;
  o[3] = A * q + B * s - 2.5f * v5;
  o[4] = v0 + p + r;
  o[5] = v5;
}
/* Six points to four outputs. */
INLINE void to_outputs(vec *o, vec m0, vec m1, vec m2, vec m3, vec m4, vec m5) {
  vec p = m1 + m2, q = A * (m1 - m2), r = m3 + m4, s = B * (m3 - m4);
  o[0] = m0 + p + r;
  o[1] = q + s;
  o[2] = 0.5f * p + 2.0f * r;
  o[3] = 0.5f * q + 2.0f * s + m5;
}
/* Its transpose. */
INLINE void from_outputs(vec *o, vec d0, vec d1, vec d2, vec d3) {
  vec e = d0 + 0.5f * d2, f = A * (d1 + 0.5f * d3), g = d0 + 2.0f * d2, h = B * (d1 + 2.0f * d3);
  o[0] = d0, o[1] = e + f, o[2] = e - f, o[3] = g + h, o[4] = g - h, o[5] = d3;
}
/* Three weights to six points. */
INLINE void weight_points(vec *o, vec w0, vec w1, vec w2) {
  vec e = (w0 + 0.5f * w2) * (-2.0f / 3), f = w1 * (-2.0f / 3 * A);
  vec g = (w0 + 2.0f * w2) * (1.0f / 6), h = w1 * (B / 6);
  o[0] = w0, o[1] = e + f, o[2] = e - f, o[3] = g + h, o[4] = g - h, o[5] = w2;
}
/* Its transpose. */
INLINE void from_weight_points(vec *o, vec u0, vec u1, vec u2, vec u3, vec u4, vec u5) {
  vec p = (u1 + u2) * (-2.0f / 3), q = (u1 - u2) * (-2.0f / 3 * A);
  vec r = (u3 + u4) * (1.0f / 6), s = (u3 - u4) * (B / 6);
  o[0] = u0 + p + r, o[1] = q + s, o[2] = 0.5f * p + 2.0f * r + u5;
}

/* x where the gate is positive (or NaN), 0 elsewhere. */
INLINE vec gated(vec x, const float *gate) {
  vec g = LOAD(gate);
  return (vec)((ivec)x & ~(ivec)(g <= 0.0f));
}

/* ---- whole tiles. In u a point is panels of NR columns, each (rows, NR); in v and m it is (tiles,
 * channels). */

/* VL rows and columns of u: (C, K) for y; back, for dx, (K, C). */
static void transform_weight(const Conv *p, int64_t row, int64_t col, int back) {
  int64_t c = p->c, rows = back ? p->k : p->c, columns = back ? p->c : p->k;
  int64_t width = least(NR, columns - col / NR * NR), stride = stride_of(p->c * p->k);
  float *to = p->u + col / NR * NR * rows + col % NR;
  if (back) {
    for (int64_t k = row; k < row + VL; k++) {
      vec t[3][6], o[6];
      const float *w = p->weight + k * 9 * c + col;
      for (int i = 0; i < 3; i++, w += 3 * c)
        weight_points(t[i], LOAD(w), LOAD(w + c), LOAD(w + 2 * c));
      for (int j = 0; j < 6; j++) {
        weight_points(o, t[0][j], t[1][j], t[2][j]);
        for (int i = 0; i < 6; i++) STORE(to + (i * 6 + j) * stride + k * width, o[i]);
      }
    }
  } else {
    float part[9][VL][VL];
    for (int k = 0; k < VL; k++)
      for (int tap = 0; tap < 9; tap++) {
        const float *w = p->weight + ((col + k) * 9 + tap) * c + row;
        for (int i = 0; i < VL; i++) part[tap][i][k] = w[i];
      }
    for (int r = 0; r < VL; r++) {
      vec t[3][6], o[6];
      for (int i = 0; i < 3; i++)
        weight_points(t[i], LOAD(part[3 * i][r]), LOAD(part[3 * i + 1][r]),
                      LOAD(part[3 * i + 2][r]));
      for (int j = 0; j < 6; j++) {
        weight_points(o, t[0][j], t[1][j], t[2][j]);
        for (int i = 0; i < 6; i++) STORE(to + (i * 6 + j) * stride + (row + r) * width, o[i]);
      }
    }
  }
}

typedef struct {
  int64_t n, top, left;
} Spot;

static Spot spot_of(const Conv *p, int64_t tile) {
  int64_t across = parts(p->w, TILE), down = parts(p->h, TILE), at = tile % (across * down);
  Spot s = {tile / (across * down), at / across * TILE, at % across * TILE};
  return s;
}

static void transform_input(const Conv *p, Spot s, int64_t c0, float *to, int64_t stride) {
  vec t[6][6], o[6], zero = {0};
  int64_t width = p->w >> p->up, left[6];
  int64_t start = s.n * (p->h >> p->up) * width * p->c + c0;
  const float *x = p->x + start, *gate = p->gate + start;
  for (int j = 0; j < 6; j++) left[j] = place(p, s.left + j - 1, p->w);
  for (int i = 0; i < 6; i++) {
    int64_t row = place(p, s.top + i - 1, p->h);
    vec a[6];
    for (int j = 0; j < 6; j++) {
      int64_t at = (row * width + left[j]) * p->c;
      a[j] = row < 0 || left[j] < 0 ? zero : LOAD(x + at);
      if (p->gate && row >= 0 && left[j] >= 0) a[j] = gated(a[j], gate + at);
    }
    to_points(t[i], a[0], a[1], a[2], a[3], a[4], a[5]);
  }
  for (int j = 0; j < 6; j++) {
    to_points(o, t[0][j], t[1][j], t[2][j], t[3][j], t[4][j], t[5][j]);
    for (int i = 0; i < 6; i++) STORE(to + (i * 6 + j) * stride, o[i]);
  }
}

/* Where a tile of y begins. */
static int64_t start_of(const Conv *p, Spot s) {
  int64_t row = s.n * (p->h >> p->pool) + (s.top >> p->pool);
  return (row * (p->w >> p->pool) + (s.left >> p->pool)) * p->k;
}

static void transform_output(const Conv *p, Spot s, int64_t k0, const float *from, int64_t stride) {
  vec t[6][4], o[4], bias = {0};
  if (p->bias) bias = LOAD(p->bias + k0);
  for (int i = 0; i < 6; i++) {
    const float *f = from + i * 6 * stride;
    to_outputs(t[i], LOAD(f), LOAD(f + stride), LOAD(f + 2 * stride), LOAD(f + 3 * stride),
               LOAD(f + 4 * stride), LOAD(f + 5 * stride));
  }
  vec out[4][4];
  for (int j = 0; j < 4; j++) {
    to_outputs(o, t[0][j], t[1][j], t[2][j], t[3][j], t[4][j], t[5][j]);
    for (int i = 0; i < 4; i++) out[i][j] = o[i] + bias;
  }
  if (p->pool)
    for (int i = 0; i < 2; i++)
      for (int j = 0; j < 2; j++)
        out[i][j] = 0.25f * ((out[2 * i][2 * j] + out[2 * i][2 * j + 1]) +
                             (out[2 * i + 1][2 * j] + out[2 * i + 1][2 * j + 1]));
  int64_t width = p->w >> p->pool, down = least(TILE, p->h - s.top) >> p->pool;
  int64_t across = least(TILE, p->w - s.left) >> p->pool;
  float *y = p->y + start_of(p, s) + k0;
  for (int i = 0; i < down; i++)
    for (int j = 0; j < across; j++) STORE(y + (i * width + j) * p->k, out[i][j]);
}

static void transform_gradient(const Conv *p, Spot s, int64_t k0, float *to, int64_t stride) {
  vec t[4][6], o[6], zero = {0};
  int64_t width = p->w >> p->pool, down = least(TILE, p->h - s.top);
  int64_t across = least(TILE, p->w - s.left);
  const float *y = p->dy + start_of(p, s) + k0;
  float share = p->pool ? 0.25f : 1.0f;
  for (int i = 0; i < 4; i++) {
    vec a[4] = {zero, zero, zero, zero};
    for (int j = 0; j < 4; j++)
      if (i < down && j < across)
        a[j] = share * LOAD(y + ((i >> p->pool) * width + (j >> p->pool)) * p->k);
    from_outputs(t[i], a[0], a[1], a[2], a[3]);
  }
  for (int j = 0; j < 6; j++) {
    from_outputs(o, t[0][j], t[1][j], t[2][j], t[3][j]);
    for (int i = 0; i < 6; i++) STORE(to + (i * 6 + j) * stride, o[i]);
  }
}

static void add_input_gradient(const Conv *p, Spot s, int64_t c0, const float *from,
                               int64_t stride) {
  vec t[6][6], o[6];
  int64_t width = p->w >> p->up, top[6];
  int64_t start = s.n * (p->h >> p->up) * width * p->c + c0;
  float *x = p->dx + start;
  for (int i = 0; i < 6; i++) {
    const float *f = from + i * 6 * stride;
    top[i] = place(p, s.top + i - 1, p->h);
    from_points(t[i], LOAD(f), LOAD(f + stride), LOAD(f + 2 * stride), LOAD(f + 3 * stride),
                LOAD(f + 4 * stride), LOAD(f + 5 * stride));
  }
  for (int j = 0; j < 6; j++) {
    int64_t left = place(p, s.left + j - 1, p->w);
    if (left < 0) continue;
    from_points(o, t[0][j], t[1][j], t[2][j], t[3][j], t[4][j], t[5][j]);
    for (int i = 0; i < 6; i++)
      if (top[i] >= 0) {
        int64_t at = (top[i] * width + left) * p->c;
        if (p->gate) o[i] = gated(o[i], p->gate + start + at);
        STORE(x + at, LOAD(x + at) + o[i]);
      }
  }
}

/* ---- products */

/* out (rows, vecs * VL), `across` from row to row, (+)= the sum over d < depth of
 * a[r * row + d * step] * b[d * width]. */
INLINE void product(int rows, int vecs, const float *a, int64_t row, int64_t step, const float *b,
                    int64_t width, int64_t depth, float *out, int64_t across, int add) {
  vec sum[MR][NV];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vecs; v++) {
      if (add) sum[r][v] = LOAD(out + r * across + v * VL);
      else sum[r][v] = (vec){0};
    }
  for (int64_t d = 0; d < depth; d++) {
    vec column[NV];
    for (int v = 0; v < vecs; v++) column[v] = LOAD(b + d * width + v * VL);
    for (int r = 0; r < rows; r++) {
      float one = a[r * row + d * step];
      for (int v = 0; v < vecs; v++) sum[r][v] += one * column[v];
    }
  }
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vecs; v++) STORE(out + r * across + v * VL, sum[r][v]);
}

#define ROWS(count, vecs) \
  case count: product(count, vecs, a, row, step, b, width, depth, out, across, add); break;
#define WIDTH(vecs) \
  static void product_##vecs(int rows, const float *a, int64_t row, int64_t step, const float *b, \
      int64_t width, int64_t depth, float *out, int64_t across, int add) { \
    switch (rows) { \
      ROWS(6, vecs) ROWS(5, vecs) ROWS(4, vecs) ROWS(3, vecs) ROWS(2, vecs) ROWS(1, vecs) \
    } \
  }
WIDTH(1) WIDTH(2)
#if defined(__AVX512F__) || !defined(__AVX__)
WIDTH(3) WIDTH(4)
#else
#define product_3 product_2 /* never called */
#define product_4 product_2
#endif

static void products(int64_t rows, int64_t columns, const float *a, int64_t row, int64_t step,
                     const float *b, int64_t width, int64_t depth, float *out, int64_t across,
                     int add) {
  for (int64_t r = 0; r < rows; r += MR) {
    int some = (int)least(MR, rows - r);
    const float *from = a + r * row;
    float *to = out + r * across;
    switch (columns / VL) {
      case 1: product_1(some, from, row, step, b, width, depth, to, across, add); break;
      case 2: product_2(some, from, row, step, b, width, depth, to, across, add); break;
      case 3: product_3(some, from, row, step, b, width, depth, to, across, add); break;
      default: product_4(some, from, row, step, b, width, depth, to, across, add);
    }
  }
}

static void write_weight_gradient(const Conv *p, int64_t o, int64_t c0, int64_t stride) {
  vec t[6][3], w[3];
  for (int i = 0; i < 6; i++) {
    const float *f = p->du + i * 6 * stride + o * p->c + c0;
    from_weight_points(t[i], LOAD(f), LOAD(f + stride), LOAD(f + 2 * stride), LOAD(f + 3 * stride),
                       LOAD(f + 4 * stride), LOAD(f + 5 * stride));
  }
  for (int j = 0; j < 3; j++) {
    from_weight_points(w, t[0][j], t[1][j], t[2][j], t[3][j], t[4][j], t[5][j]);
    for (int i = 0; i < 3; i++) STORE(p->dw + ((o * 3 + i) * 3 + j) * p->c + c0, w[i]);
  }
}

static int64_t tiles_of(const Conv *p) { return p->n * parts(p->h, TILE) * parts(p->w, TILE); }

void conv_forward(const Conv *p) {
  int64_t tiles = tiles_of(p), c = p->c, k = p->k, panels = parts(k, NR);
  int64_t of_u = stride_of(c * k), of_v = stride_of(p->chunk * c), of_m = stride_of(p->chunk * k);
#pragma omp parallel num_threads(p->threads)
  {
#pragma omp for schedule(static) nowait collapse(2)
    for (int64_t row = 0; row < c; row += VL)
      for (int64_t col = 0; col < k; col += VL) transform_weight(p, row, col, 0);
    for (int64_t t0 = 0; t0 < tiles; t0 += p->chunk) {
      int64_t some = least(p->chunk, tiles - t0);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < some; t++) {
        Spot s = spot_of(p, t0 + t);
        for (int64_t c0 = 0; c0 < c; c0 += VL) transform_input(p, s, c0, p->v + t * c + c0, of_v);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < POINTS * panels; i++) {
        int64_t point = i / panels, col = i % panels * NR, width = least(NR, k - col);
        products(some, width, p->v + point * of_v, c, 1, p->u + point * of_u + col * c, width, c,
                 p->m + point * of_m + col, k, 0);
      }
#pragma omp for schedule(static) nowait
      for (int64_t t = 0; t < some; t++) {
        Spot s = spot_of(p, t0 + t);
        for (int64_t k0 = 0; k0 < k; k0 += VL) transform_output(p, s, k0, p->m + t * k + k0, of_m);
      }
    }
  }
}

void conv_backward(const Conv *p) {
  int64_t tiles = tiles_of(p), c = p->c, k = p->k, panels = parts(c, NR);
  int64_t of_u = stride_of(c * k), of_v = stride_of(p->chunk * c), of_m = stride_of(p->chunk * k);
  int64_t each = parts(p->h, TILE) * parts(p->w, TILE);
#pragma omp parallel num_threads(p->threads)
  {
    if (p->dx) {
#pragma omp for schedule(static) nowait collapse(2)
      for (int64_t row = 0; row < k; row += VL)
        for (int64_t col = 0; col < c; col += VL) transform_weight(p, row, col, 1);
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < p->n * (p->h >> p->up); i++)
        memset(p->dx + i * (p->w >> p->up) * c, 0, (p->w >> p->up) * c * sizeof(float));
    }
    for (int64_t t0 = 0; t0 < tiles; t0 += p->chunk) {
      int64_t some = least(p->chunk, tiles - t0);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < some; t++) {
        Spot s = spot_of(p, t0 + t);
        for (int64_t k0 = 0; k0 < k; k0 += VL)
          transform_gradient(p, s, k0, p->m + t * k + k0, of_m);
        if (p->dw)
          for (int64_t c0 = 0; c0 < c; c0 += VL) transform_input(p, s, c0, p->v + t * c + c0, of_v);
      }
      if (p->dw) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < POINTS * panels; i++) {
          int64_t point = i / panels, col = i % panels * NR, width = least(NR, c - col);
          products(k, width, p->m + point * of_m, 1, k, p->v + point * of_v + col, c, some,
                   p->du + point * of_u + col, c, t0 > 0);
        }
      }
      if (p->dx) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < POINTS * panels; i++) {
          int64_t point = i / panels, col = i % panels * NR, width = least(NR, c - col);
          products(some, width, p->m + point * of_m, k, 1, p->u + point * of_u + col * k, width, k,
                   p->v + point * of_v + col, c, 0);
        }
        int64_t first = t0 / each, last = (t0 + some - 1) / each;
#pragma omp for schedule(static) collapse(2)
        for (int64_t n = first; n <= last; n++) /* of one thread, as tiles overlap */
          for (int64_t c0 = 0; c0 < c; c0 += VL) {
            int64_t end = least(t0 + some, (n + 1) * each);
            for (int64_t t = n * each > t0 ? n * each : t0; t < end; t++)
              add_input_gradient(p, spot_of(p, t), c0, p->v + (t - t0) * c + c0, of_v);
          }
      }
    }
    if (p->dw) {
#pragma omp for schedule(static)
      for (int64_t o = 0; o < k; o++)
        for (int64_t c0 = 0; c0 < c; c0 += VL) write_weight_gradient(p, o, c0, of_u);
    }
  }
}
