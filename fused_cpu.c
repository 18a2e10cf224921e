/* A transformer block's two branches on x86 CPUs with AVX-512: x + attention(LN x) and x + MLP(LN x), forward and backward. fused_cpu.py calls them.

Rows of the activations are handled ROWS at a time, so that what one product writes is in the second-level cache when the next one reads it; between
two barriers a thread has rows, heads or tiles of weight gradients to itself. Every sum has one order, whatever the number of threads.

Matrices are row-major float32. A product's operands are read as 32-bit lanes: a float32, or with `half` two neighbours of the summed index in
bfloat16, whose products are summed in float32. The right operand is in panels of PANEL columns, panel[l][column]; tiles are TILE rows by PANEL
columns, 24 of the 32 registers. Attention's own products are in float32 always.

R = B T rows, C channels, H heads of d = C / H, F = 4 C. n is LN x; `stats` holds each row's mean and 1 / deviation, `soft` each attention row's
largest q k and 1 / sum. */

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { ROWS = 48, TILE = 12, PANEL = 32, SEGMENT = 768, HALF = 64, PAGE = 1 << 21 };
#define INLINE static inline __attribute__((always_inline))

INLINE long up(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }
INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE __mmask16 first(long n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

/* ---------------------------------------------------------------------------------------------------------------------------------
   Memory: one pool, kept between calls and in large pages, handed out from its start by `take` */

static float *pool;
static long pool_floats;

static int reserve(long floats) {
    if (floats <= pool_floats) return 1;
    free(pool);
    pool_floats = up(floats, PAGE / sizeof(float));
    pool = aligned_alloc(PAGE, pool_floats * sizeof(float));
    if (!pool) return pool_floats = 0;
    madvise(pool, pool_floats * sizeof(float), MADV_HUGEPAGE);
    return 1;
}

INLINE float *take(float **free_from, long floats) {
    float *taken = *free_from;
    *free_from += up(floats, 16);
    return taken;
}

/* ---------------------------------------------------------------------------------------------------------------------------------
   Products */

/* c (m rows, columns of the masks) = or += sum over l of a[i ai + l al] b[l][column], with m <= TILE */
INLINE void tile(int half, int m, long L, const float *a, long ai, long al, const float *b, float *c, long ldc, int add, __mmask16 left,
                 __mmask16 right) {
    __m512 s[TILE][2];
    for (int i = 0; i < m; i++) {
        s[i][0] = add ? _mm512_maskz_loadu_ps(left, c + i * ldc) : _mm512_setzero_ps();
        s[i][1] = add ? _mm512_maskz_loadu_ps(right, c + i * ldc + 16) : _mm512_setzero_ps();
    }
    for (long l = 0; l < L; l++, a += al, b += PANEL) {
        __m512 b0 = _mm512_loadu_ps(b), b1 = _mm512_loadu_ps(b + 16);
#pragma GCC unroll 12
        for (int i = 0; i < m; i++) {
            __m512 x = _mm512_set1_ps(a[i * ai]);
#ifdef __AVX512BF16__
            if (half) {
                s[i][0] = _mm512_dpbf16_ps(s[i][0], (__m512bh)x, (__m512bh)b0);
                s[i][1] = _mm512_dpbf16_ps(s[i][1], (__m512bh)x, (__m512bh)b1);
                continue;
            }
#endif
            s[i][0] = _mm512_fmadd_ps(x, b0, s[i][0]);
            s[i][1] = _mm512_fmadd_ps(x, b1, s[i][1]);
        }
    }
    for (int i = 0; i < m; i++) {
        _mm512_mask_storeu_ps(c + i * ldc, left, s[i][0]);
        _mm512_mask_storeu_ps(c + i * ldc + 16, right, s[i][1]);
    }
}

/* c (m, n) = or += a b, the rows of c by twelves and what is left by 8, 4, 2 and 1; a panel of b has `stride` rows of memory */
static void product(int half, long m, long n, long L, const float *a, long ai, long al, const float *b, long stride, float *c, long ldc, int add) {
    for (long j = 0; j < n; j += PANEL, b += PANEL * stride)
        for (long i = 0, rows; i < m; i += rows) {
            rows = m - i >= 12 ? 12 : m - i >= 8 ? 8 : m - i >= 4 ? 4 : m - i >= 2 ? 2 : 1;
            switch (half ? rows + HALF : rows) { /* constants, so that a tile's sums are in registers */
#define CASE(rows)                                                                                                                             \
    case rows:                                                                                                                                 \
        tile(0, rows, L, a + i * ai, ai, al, b, c + i * ldc + j, ldc, add, first(n - j), first(n - j - 16));                                   \
        break;                                                                                                                                 \
    case rows + HALF:                                                                                                                          \
        tile(HALF, rows, L, a + i * ai, ai, al, b, c + i * ldc + j, ldc, add, first(n - j), first(n - j - 16));                                \
        break;
                CASE(12) CASE(8) CASE(4) CASE(2) CASE(1)
            }
        }
}

/* ---------------------------------------------------------------------------------------------------------------------------------
   Lanes. How many of them K values of the summed index make: */

INLINE long lanes(int half, long K) { return half ? (K + 1) / 2 : K; }

INLINE __m512i bf16(__m512 x) { /* rounded, in the lower half of each lane */
#ifdef __AVX512BF16__
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
#else
    return _mm512_castps_si512(x);
#endif
}

/* 16 lanes from as many as K of the neighbours src[0], src[1], … of one row */
INLINE __m512 lanes_along(int half, long K, const float *src) {
    if (!half) return _mm512_maskz_loadu_ps(first(K), src);
#ifdef __AVX512BF16__
    return (__m512)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(first(K - 16), src + 16), _mm512_maskz_loadu_ps(first(K), src));
#endif
    return _mm512_setzero_ps();
}

/* The left operand of a product, m rows of K: as they are, or as lanes in `room`; *ld becomes the rows' distance */
static const float *left_operand(int half, long m, long K, const float *src, float *room, long *ld) {
    if (!half) return src;
    long L = lanes(half, K);
    for (long i = 0; i < m; i++)
        for (long l = 0; l < L; l += 16) _mm512_mask_storeu_ps(room + i * L + l, first(L - l), lanes_along(half, K - 2 * l, src + i * *ld + 2 * l));
    *ld = L;
    return room;
}

/* Panels of `width` columns from src[k ld + n], k < K, n < N; a panel begins `stride` lanes' rows after the one before */
static void pack_rows(int half, long width, long K, long N, const float *src, long ld, float *dst, long stride) {
    for (long n = 0; n < N; n += width, dst += width * stride)
        for (long w = 0; w < width; w += 16) {
            __mmask16 from = first(N - n - w), to = first(width - w);
            for (long k = 0, step = half ? 2 : 1; k < K; k += step) {
                const float *row = src + k * ld + n + w;
                __m512 x = _mm512_maskz_loadu_ps(from, row);
                if (half) {
                    __m512i second = k + 1 < K ? bf16(_mm512_maskz_loadu_ps(from, row + ld)) : _mm512_setzero_si512();
                    x = _mm512_castsi512_ps(_mm512_or_si512(bf16(x), _mm512_slli_epi32(second, 16)));
                }
                _mm512_mask_storeu_ps(dst + k / step * width + w, to, x);
            }
        }
}

INLINE void transpose(__m512 x[16]) {
    __m512 y[16];
    for (int i = 0; i < 8; i++) {
        y[2 * i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            __m512d a = _mm512_castps_pd(y[4 * i + j]), b = _mm512_castps_pd(y[4 * i + j + 2]);
            x[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            x[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++) {
            y[8 * i + j] = _mm512_shuffle_f32x4(x[8 * i + j], x[8 * i + j + 4], 0x88);
            y[8 * i + j + 4] = _mm512_shuffle_f32x4(x[8 * i + j], x[8 * i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        x[j] = _mm512_shuffle_f32x4(y[j], y[j + 8], 0x88);
        x[j + 8] = _mm512_shuffle_f32x4(y[j], y[j + 8], 0xdd);
    }
}

/* The panels `from` to `to` (of PANEL columns) from src[n ld + k], k < K, n < N: those of the transpose */
static void pack_columns(int half, long K, long N, const float *src, long ld, float *dst, long from, long to) {
    long L = lanes(half, K), per_lane = half ? 2 : 1;
    for (long n = from * PANEL; n < to * PANEL; n += 16)
        for (long l = 0; l < L; l += 16) {
            __m512 x[16];
            for (int i = 0; i < 16; i++)
                x[i] = n + i < N ? lanes_along(half, K - l * per_lane, src + (n + i) * ld + l * per_lane) : _mm512_setzero_ps();
            transpose(x);
            float *out = dst + n / PANEL * PANEL * L + n % PANEL + l * PANEL;
            for (int i = 0; i < 16 && l + i < L; i++) _mm512_storeu_ps(out + i * PANEL, x[i]);
        }
}

/* Inside a parallel region. The right operands of x W^T and of dy W, W being (N, K) */
static void pack_forward(int half, long N, long K, const float *w, float *dst) {
#pragma omp for schedule(static) nowait
    for (long p = 0; p < up(N, PANEL) / PANEL; p++) pack_columns(half, K, N, w, K, dst, p, p + 1);
}

static void pack_backward(int half, long N, long K, const float *w, float *dst) {
    long L = lanes(half, N);
#pragma omp for schedule(static) nowait
    for (long p = 0; p < up(K, PANEL) / PANEL; p++) pack_rows(half, PANEL, N, least(PANEL, K - p * PANEL), w + p * PANEL, K, dst + p * PANEL * L, L);
}

/* Inside a parallel region: dW (N, K) = dy^T x, with dy packed by pack_rows in TILE columns and x in PANEL columns, L lanes both; nothing where dW is
   NULL */
static void weight_gradient(int half, long N, long K, long L, const float *dy, const float *x, float *dw) {
    long blocks = up(N, TILE) / TILE, panels = up(K, PANEL) / PANEL;
    if (!dw) return;
    for (long l = 0; l < L; l += SEGMENT)
#pragma omp for schedule(static) nowait
        for (long t = 0; t < blocks * panels; t++) {
            long block = t % blocks, panel = t / blocks;
            product(half, least(TILE, N - block * TILE), least(PANEL, K - panel * PANEL), least(SEGMENT, L - l), dy + (block * L + l) * TILE, 1, TILE,
                    x + (panel * L + l) * PANEL, L, dw + block * TILE * K + panel * PANEL, K, l > 0);
        }
}

/* ---------------------------------------------------------------------------------------------------------------------------------
   Element-wise functions */

INLINE __m512 exponential(__m512 x) { /* of x <= 0: relative error below 2.5e-7 down to -87, then denormal numbers and 0; NaN of NaN */
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x), p = _mm512_set1_ps(1.0f / 720);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    const float taylor[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (int i = 0; i < 6; i++) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(taylor[i]));
    return _mm512_scalef_ps(p, n);
}

/* The normal distribution function and its density. Abramowitz and Stegun 7.1.26: absolute error below 3e-7; the tail is right to 3 % at -12 */
INLINE __m512 normal(__m512 x, __m512 *density) {
    __m512 e = exponential(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-0.5f)));
    __m512 t = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_fmadd_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.3275911f * 0.70710678f), _mm512_set1_ps(1.0f)));
    const float series[] = {-1.453152027f / 2, 1.421413741f / 2, -0.284496736f / 2, 0.254829592f / 2};
    __m512 p = _mm512_set1_ps(1.061405429f / 2);
    for (int i = 0; i < 4; i++) p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(series[i]));
    __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, t), e);
    *density = _mm512_mul_ps(e, _mm512_set1_ps(0.39894228f));
    return _mm512_mask_sub_ps(tail, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ), _mm512_set1_ps(1.0f), tail);
}

static void gelu(long count, const float *u, float *h) {
    for (long i = 0; i < count; i += 16) {
        __mmask16 m = first(count - i);
        __m512 x = _mm512_maskz_loadu_ps(m, u + i), density;
        _mm512_mask_storeu_ps(h + i, m, _mm512_mul_ps(x, normal(x, &density)));
    }
}

/* h = GELU(u), and dh becomes du in place */
static void gelu_backward(long count, const float *u, float *h, float *dh) {
    for (long i = 0; i < count; i += 16) {
        __mmask16 m = first(count - i);
        __m512 x = _mm512_maskz_loadu_ps(m, u + i), density, below = normal(x, &density);
        _mm512_mask_storeu_ps(h + i, m, _mm512_mul_ps(x, below));
        _mm512_mask_storeu_ps(dh + i, m, _mm512_mul_ps(_mm512_maskz_loadu_ps(m, dh + i), _mm512_fmadd_ps(x, density, below)));
    }
}

static void norm(long rows, long C, const float *x, const float *gain, float *n, float *stats) {
    for (long i = 0; i < rows; i++, x += C, n += C) {
        float mean = 0, square = 0;
#pragma omp simd reduction(+ : mean)
        for (long c = 0; c < C; c++) mean += x[c];
        mean /= C;
#pragma omp simd reduction(+ : square)
        for (long c = 0; c < C; c++) square += (x[c] - mean) * (x[c] - mean);
        float scale = 1 / sqrtf(square / C + 1e-5f);
#pragma omp simd
        for (long c = 0; c < C; c++) n[c] = (x[c] - mean) * scale * gain[c];
        stats[2 * i] = mean, stats[2 * i + 1] = scale;
    }
}

/* dx = dout + the gradient of x through LN x, whose own is dn; dgain is added to */
static void norm_backward(long rows, long C, const float *x, const float *gain, const float *stats, const float *dn, const float *dout, float *dx,
                          float *dgain) {
    for (long i = 0; i < rows; i++, x += C, dn += C, dout += C, dx += C) {
        float mean = stats[2 * i], scale = stats[2 * i + 1], sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
        for (long c = 0; c < C; c++) {
            float hat = (x[c] - mean) * scale, g = dn[c] * gain[c];
            dgain[c] += dn[c] * hat;
            sum += g, along += g * hat;
        }
        sum /= C, along /= C;
#pragma omp simd
        for (long c = 0; c < C; c++) dx[c] = dout[c] + scale * (dn[c] * gain[c] - sum - (x[c] - mean) * scale * along);
    }
}

/* Inside a parallel region, after a barrier: the gain's gradient from those of the chunks, in their order; nothing where dgain is NULL */
static void sum_gains(long chunks, long C, const float *parts, float *dgain) {
    if (!dgain) return;
#pragma omp for schedule(static) nowait
    for (long c = 0; c < C; c++) {
        float sum = 0;
        for (long i = 0; i < chunks; i++) sum += parts[i * C + c];
        dgain[c] = sum;
    }
}

/* ---------------------------------------------------------------------------------------------------------------------------------
   Attention, and graph diffusion lambda (A v - alpha v) in the last `diffusing` heads */

typedef struct {
    long B, T, C, H;
    int causal;
    long diffusing;
    float alpha, lambda;
    long d, padded_T, padded_d; /* these and the next are derived */
    float scale;
} Heads;

static Heads sizes(long B, long T, long C, long H, int causal, long diffusing, float alpha, float lambda) {
    long d = C / H;
    return (Heads){B, T, C, H, causal, diffusing, alpha, lambda, d, up(T, PANEL), up(d, PANEL), 1 / sqrtf(d)};
}

/* What `attend_backward`, which needs more than `attend`, takes; 16 for the rounding of each */
static long attention_floats(const Heads *s) { return 2 * s->padded_T * s->d + 2 * s->T * s->padded_d + 2 * PANEL * (s->padded_T + s->padded_d) + 16 * 8; }

/* Products q k of `count` keys to probabilities with the largest product and the sum's inverse in soft, both found here if `find`; 0 from there to
   `end`. The largest is subtracted before the scale comes in, so that it is exactly 0 whatever its size. */
INLINE void softmax(long count, long end, float scale, float *p, float *soft, int find) {
    __m512 factor = _mm512_set1_ps(scale), largest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    if (find) {
        for (long j = 0; j < count; j += 16) {
            __mmask16 m = first(count - j);
            largest = _mm512_mask_max_ps(largest, m, largest, _mm512_maskz_loadu_ps(m, p + j));
        }
        soft[0] = _mm512_reduce_max_ps(largest);
    }
    largest = _mm512_set1_ps(soft[0]);
    __m512 inverse = _mm512_set1_ps(find ? 1.0f : soft[1]);
    for (long j = 0; j < end; j += 16) {
        __mmask16 m = first(count - j);
        __m512 e = _mm512_maskz_mul_ps(m, exponential(_mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(m, p + j), largest), factor)), inverse);
        sum = _mm512_add_ps(sum, e);
        _mm512_mask_storeu_ps(p + j, first(end - j), e);
    }
    if (find) {
        soft[1] = 1 / _mm512_reduce_add_ps(sum);
        inverse = _mm512_set1_ps(soft[1]);
        for (long j = 0; j < count; j += 16) _mm512_mask_storeu_ps(p + j, first(end - j), _mm512_mul_ps(_mm512_maskz_loadu_ps(first(end - j), p + j), inverse));
    }
}

/* y = lambda (y - alpha v), d numbers each */
INLINE void subtract(long d, float alpha, float lambda, const float *v, float *y) {
#pragma omp simd
    for (long c = 0; c < d; c++) y[c] = lambda * (y[c] - alpha * v[c]);
}

/* One head of one sequence: qkv (T, 3 C) and y (T, C) at its first channel */
static void attend(const Heads *s, int diffuses, const float *qkv, float *y, float *soft, float *room) {
    long T = s->T, C = s->C, d = s->d, ld = 3 * C;
    const float *k = qkv + C, *v = qkv + 2 * C;
    float *keys = take(&room, s->padded_T * d), *values = take(&room, T * s->padded_d), *p = take(&room, PANEL * s->padded_T);
    pack_columns(0, d, T, k, ld, keys, 0, s->padded_T / PANEL);
    pack_rows(0, PANEL, T, d, v, ld, values, T);
    for (long i = 0; i < T; i += PANEL) {
        long m = least(PANEL, T - i), end = s->causal ? i + m : T;
        product(0, m, end, d, qkv + i * ld, ld, 1, keys, d, p, s->padded_T, 0);
        for (long r = 0; r < m; r++) softmax(s->causal ? i + r + 1 : T, end, s->scale, p + r * s->padded_T, soft + 2 * (i + r), 1);
        product(0, m, d, end, p, s->padded_T, 1, values, T, y + i * C, C, 0);
        if (diffuses)
            for (long r = i; r < i + m; r++) subtract(d, s->alpha, s->lambda, v + r * ld, y + r * C);
    }
}

/* The same head's gradient: dy (T, C) and dqkv (T, 3 C) at its first channel */
static void attend_backward(const Heads *s, int diffuses, const float *qkv, const float *dy, float *dqkv, float *soft, float *room) {
    long T = s->T, C = s->C, d = s->d, ld = 3 * C, P = s->padded_T;
    const float *k = qkv + C, *v = qkv + 2 * C;
    float *dk = dqkv + C, *dv = dqkv + 2 * C, lambda = diffuses ? s->lambda : 1;
    float *keys = take(&room, P * d), *values = take(&room, P * d), *key_rows = take(&room, T * s->padded_d), *p = take(&room, PANEL * P);
    float *ds = take(&room, PANEL * P), *queries = take(&room, PANEL * s->padded_d), *upstream = take(&room, PANEL * s->padded_d);
    pack_columns(0, d, T, k, ld, keys, 0, P / PANEL);
    pack_columns(0, d, T, v, ld, values, 0, P / PANEL);
    pack_rows(0, PANEL, T, d, k, ld, key_rows, T);
    for (long r = 0; r < T; r++) memset(dk + r * ld, 0, d * sizeof(float)), memset(dv + r * ld, 0, d * sizeof(float));
    for (long i = 0; i < T; i += PANEL) {
        long m = least(PANEL, T - i), end = s->causal ? i + m : T;
        product(0, m, end, d, qkv + i * ld, ld, 1, keys, d, p, P, 0);
        product(0, m, end, d, dy + i * C, C, 1, values, d, ds, P, 0);
        for (long r = 0; r < m; r++) {
            float *pr = p + r * P, *dr = ds + r * P, sum = 0;
            softmax(s->causal ? i + r + 1 : T, end, s->scale, pr, soft + 2 * (i + r), 0);
#pragma omp simd reduction(+ : sum)
            for (long j = 0; j < end; j++) sum += pr[j] * dr[j];
#pragma omp simd
            for (long j = 0; j < end; j++) dr[j] = pr[j] * (dr[j] - sum) * (s->scale * lambda);
        }
        product(0, m, d, end, ds, P, 1, key_rows, T, dqkv + i * ld, ld, 0);
        pack_rows(0, PANEL, m, d, qkv + i * ld, ld, queries, m);
        pack_rows(0, PANEL, m, d, dy + i * C, C, upstream, m);
        product(0, end, d, m, ds, 1, P, queries, m, dk, ld, 1);
        product(0, end, d, m, p, 1, P, upstream, m, dv, ld, 1);
    }
    if (diffuses)
        for (long r = 0; r < T; r++) subtract(d, s->alpha, lambda, dy + r * C, dv + r * ld);
}

/* ---------------------------------------------------------------------------------------------------------------------------------
   Branches. Each returns 0 if there is no memory, else 1. Gradients of weights that nobody asks for are NULL. */

int attention_forward(long B, long T, long C, long H, int causal, long diffusing, float alpha, float lambda, int half, const float *x,
                      const float *gain, const float *w_qkv, const float *w_out, float *n, float *stats, float *qkv, float *soft, float *y,
                      float *out) {
    Heads s = sizes(B, T, C, H, causal, diffusing, alpha, lambda);
    long R = B * T, L = lanes(half, C), each = ROWS * up(L, 16) + attention_floats(&s);
    if (!reserve((up(3 * C, PANEL) + up(C, PANEL)) * L + 64 + omp_get_max_threads() * up(each, 16))) return 0;
    float *from = pool, *qkv_panels = take(&from, up(3 * C, PANEL) * L), *out_panels = take(&from, up(C, PANEL) * L);
#pragma omp parallel
    {
        float *room = from + omp_get_thread_num() * up(each, 16);
        pack_forward(half, 3 * C, C, w_qkv, qkv_panels);
        pack_forward(half, C, C, w_out, out_panels);
#pragma omp barrier
#pragma omp for schedule(static)
        for (long i = 0; i < R; i += ROWS) {
            long m = least(ROWS, R - i), ld = C;
            norm(m, C, x + i * C, gain, n + i * C, stats + 2 * i);
            const float *a = left_operand(half, m, C, n + i * C, room, &ld);
            product(half, m, 3 * C, L, a, ld, 1, qkv_panels, L, qkv + i * 3 * C, 3 * C, 0);
        }
#pragma omp for schedule(static)
        for (long i = 0; i < B * H; i++) {
            long b = i / H, h = i % H;
            attend(&s, h >= H - diffusing, qkv + b * T * 3 * C + h * s.d, y + b * T * C + h * s.d, soft + 2 * i * T, room);
        }
#pragma omp for schedule(static)
        for (long i = 0; i < R; i += ROWS) {
            long m = least(ROWS, R - i), ld = C;
            memcpy(out + i * C, x + i * C, m * C * sizeof(float));
            const float *a = left_operand(half, m, C, y + i * C, room, &ld);
            product(half, m, C, L, a, ld, 1, out_panels, L, out + i * C, C, 1);
        }
    }
    return 1;
}

int attention_backward(long B, long T, long C, long H, int causal, long diffusing, float alpha, float lambda, int half, const float *x,
                       const float *gain, const float *w_qkv, const float *w_out, const float *n, const float *stats, const float *qkv, float *soft,
                       const float *y, const float *dout, float *dx, float *dgain, float *dw_qkv, float *dw_out) {
    Heads s = sizes(B, T, C, H, causal, diffusing, alpha, lambda);
    long R = B * T, chunks = up(R, ROWS) / ROWS, L = lanes(half, C), L3 = lanes(half, 3 * C), LR = lanes(half, R);
    long each = ROWS * (up(L3, 16) + C) + 64 + attention_floats(&s), wide = up(C, PANEL), tall = up(C, TILE);
    long shared = wide * (L + L3) + R * 4 * C + chunks * C + LR * (2 * wide + tall + up(3 * C, TILE)) + 256;
    if (!reserve(shared + omp_get_max_threads() * up(each, 16))) return 0;
    float *from = pool, *qkv_panels = take(&from, wide * L3), *out_panels = take(&from, wide * L), *dy = take(&from, R * C);
    float *dqkv = take(&from, R * 3 * C), *gains = take(&from, chunks * C), *n_packed = take(&from, LR * wide), *y_packed = take(&from, LR * wide);
    float *dout_packed = take(&from, LR * tall), *dqkv_packed = take(&from, LR * up(3 * C, TILE));
#pragma omp parallel
    {
        float *room = from + omp_get_thread_num() * up(each, 16), *local = room, *dn = take(&local, ROWS * C);
        pack_backward(half, 3 * C, C, w_qkv, qkv_panels);
        pack_backward(half, C, C, w_out, out_panels);
#pragma omp barrier
#pragma omp for schedule(static)
        for (long i = 0; i < R; i += ROWS) {
            long m = least(ROWS, R - i), ld = C, l = lanes(half, i);
            const float *a = left_operand(half, m, C, dout + i * C, local, &ld);
            product(half, m, C, L, a, ld, 1, out_panels, L, dy + i * C, C, 0);
            if (dw_out) pack_rows(half, TILE, m, C, dout + i * C, C, dout_packed + l * TILE, LR);
            if (dw_out) pack_rows(half, PANEL, m, C, y + i * C, C, y_packed + l * PANEL, LR);
        }
#pragma omp for schedule(static)
        for (long i = 0; i < B * H; i++) {
            long b = i / H, h = i % H, at = b * T * C + h * s.d, at3 = b * T * 3 * C + h * s.d;
            attend_backward(&s, h >= H - diffusing, qkv + at3, dy + at, dqkv + at3, soft + 2 * i * T, local);
        }
#pragma omp for schedule(static)
        for (long i = 0; i < R; i += ROWS) {
            long m = least(ROWS, R - i), ld = 3 * C, l = lanes(half, i);
            const float *a = left_operand(half, m, 3 * C, dqkv + i * 3 * C, local, &ld);
            product(half, m, C, L3, a, ld, 1, qkv_panels, L3, dn, C, 0);
            float *part = gains + i / ROWS * C;
            memset(part, 0, C * sizeof(float));
            norm_backward(m, C, x + i * C, gain, stats + 2 * i, dn, dout + i * C, dx + i * C, part);
            if (dw_qkv) pack_rows(half, TILE, m, 3 * C, dqkv + i * 3 * C, 3 * C, dqkv_packed + l * TILE, LR);
            if (dw_qkv) pack_rows(half, PANEL, m, C, n + i * C, C, n_packed + l * PANEL, LR);
        }
        sum_gains(chunks, C, gains, dgain);
        weight_gradient(half, C, C, LR, dout_packed, y_packed, dw_out);
        weight_gradient(half, 3 * C, C, LR, dqkv_packed, n_packed, dw_qkv);
    }
    return 1;
}

int mlp_forward(long R, long C, long F, int half, const float *x, const float *gain, const float *w_in, const float *w_out, float *n, float *stats,
                float *u, float *out) {
    long L = lanes(half, C), LF = lanes(half, F), each = ROWS * (F + up(LF, 16) + up(L, 16));
    if (!reserve(up(F, PANEL) * L + up(C, PANEL) * LF + 64 + omp_get_max_threads() * up(each, 16))) return 0;
    float *from = pool, *in_panels = take(&from, up(F, PANEL) * L), *out_panels = take(&from, up(C, PANEL) * LF);
#pragma omp parallel
    {
        float *room = from + omp_get_thread_num() * up(each, 16), *h = take(&room, ROWS * F);
        pack_forward(half, F, C, w_in, in_panels);
        pack_forward(half, C, F, w_out, out_panels);
#pragma omp barrier
#pragma omp for schedule(static)
        for (long i = 0; i < R; i += ROWS) {
            long m = least(ROWS, R - i), ld = C, wide = F;
            norm(m, C, x + i * C, gain, n + i * C, stats + 2 * i);
            const float *a = left_operand(half, m, C, n + i * C, room, &ld);
            product(half, m, F, L, a, ld, 1, in_panels, L, u + i * F, F, 0);
            gelu(m * F, u + i * F, h);
            memcpy(out + i * C, x + i * C, m * C * sizeof(float));
            a = left_operand(half, m, F, h, room, &wide);
            product(half, m, C, LF, a, wide, 1, out_panels, LF, out + i * C, C, 1);
        }
    }
    return 1;
}

int mlp_backward(long R, long C, long F, int half, const float *x, const float *gain, const float *w_in, const float *w_out, const float *n,
                 const float *stats, const float *u, const float *dout, float *dx, float *dgain, float *dw_in, float *dw_out) {
    long L = lanes(half, C), LF = lanes(half, F), LR = lanes(half, R), chunks = up(R, ROWS) / ROWS, wide = up(C, PANEL), tall = up(C, TILE);
    long each = ROWS * (C + 2 * F + up(L > LF ? L : LF, 16)) + 64;
    long shared = up(F, PANEL) * L + wide * LF + chunks * C + LR * (up(F, PANEL) + wide + up(F, TILE) + tall) + 256;
    if (!reserve(shared + omp_get_max_threads() * up(each, 16))) return 0;
    float *from = pool, *in_panels = take(&from, wide * LF), *out_panels = take(&from, up(F, PANEL) * L), *gains = take(&from, chunks * C);
    float *n_packed = take(&from, LR * wide), *h_packed = take(&from, LR * up(F, PANEL));
    float *dout_packed = take(&from, LR * tall), *du_packed = take(&from, LR * up(F, TILE));
#pragma omp parallel
    {
        float *room = from + omp_get_thread_num() * up(each, 16), *dn = take(&room, ROWS * C), *h = take(&room, ROWS * F), *du = take(&room, ROWS * F);
        pack_backward(half, F, C, w_in, in_panels);
        pack_backward(half, C, F, w_out, out_panels);
#pragma omp barrier
#pragma omp for schedule(static)
        for (long i = 0; i < R; i += ROWS) {
            long m = least(ROWS, R - i), ld = C, ld_du = F, l = lanes(half, i);
            const float *a = left_operand(half, m, C, dout + i * C, room, &ld);
            product(half, m, F, L, a, ld, 1, out_panels, L, du, F, 0);
            gelu_backward(m * F, u + i * F, h, du);
            a = left_operand(half, m, F, du, room, &ld_du);
            product(half, m, C, LF, a, ld_du, 1, in_panels, LF, dn, C, 0);
            float *part = gains + i / ROWS * C;
            memset(part, 0, C * sizeof(float));
            norm_backward(m, C, x + i * C, gain, stats + 2 * i, dn, dout + i * C, dx + i * C, part);
            if (dw_out) pack_rows(half, TILE, m, C, dout + i * C, C, dout_packed + l * TILE, LR);
            if (dw_out) pack_rows(half, PANEL, m, F, h, F, h_packed + l * PANEL, LR);
            if (dw_in) pack_rows(half, TILE, m, F, du, F, du_packed + l * TILE, LR);
            if (dw_in) pack_rows(half, PANEL, m, C, n + i * C, C, n_packed + l * PANEL, LR);
        }
        sum_gains(chunks, C, gains, dgain);
        weight_gradient(half, C, F, LR, dout_packed, h_packed, dw_out);
        weight_gradient(half, F, C, LR, du_packed, n_packed, dw_in);
    }
    return 1;
}
