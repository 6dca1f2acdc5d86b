/* The small operations of a transformer block on few tokens, one call each: between the matrix products of a decoding
 * step, calling a chain of general operators costs as much as the products do.
 *
 * Activations are float32 or bfloat16, arithmetic is float32. Sizes count elements; strides are those between tokens.
 */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math", "no-math-errno") /* else a comparison keeps a loop from vectorising */
#endif

#include <math.h>
#include <stdlib.h>

#include "scalar.h"

enum { UINT8 = 2 }; /* a quantized cache, beside scalar.h's types */

#define MAX_HEAD_DIM 256 /* as block.py says */
#define TOKENS 4 /* of a sequence that attention reads at once */
#define PARALLEL 32768 /* elements from which waking the other threads pays */

/* `call` with DTYPE a constant, so that the loops in it vectorise. Used inside a parallel loop: a constant does not reach
 * into a parallel region from outside. */
#define BY_DTYPE(dtype, call) \
    do { \
        if ((dtype) == BFLOAT16) { enum { DTYPE = BFLOAT16 }; call; } \
        else { enum { DTYPE = FLOAT32 }; call; } \
    } while (0)

INLINE void rms_norm_row(const int dtype, const void *x, const void *weight, void *y, int64_t at, int64_t width,
                         float eps) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; i++) sum += load(x, at + i, dtype) * load(x, at + i, dtype);
    const float factor = 1.0f / sqrtf(sum / (float)width + eps);
#pragma omp simd
    for (int64_t i = 0; i < width; i++)
        store(y, at + i, dtype, rounded(load(x, at + i, dtype) * factor, dtype) * load(weight, i, dtype));
}

/* y = round(x / sqrt(mean(x^2) + eps)) * weight, rows of `width`, rounding to the dtype before the product as well. */
void qwenfit_rms_norm(const void *x, const void *weight, void *y, int64_t rows, int64_t width, float eps, int dtype,
                      int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > PARALLEL)
    for (int64_t row = 0; row < rows; row++)
        BY_DTYPE(dtype, rms_norm_row(DTYPE, x, weight, y, row * width, width, eps));
}

/* e^x for x <= 0, relative error about 2e-7; loops over it vectorise, which calls of expf do not. */
INLINE float exp_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float turns = x * 1.44269504f + 12582912.0f; /* rounds to an integer in the lowest bits */
    const float n = turns - 12582912.0f, r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.3981999507e-3f + 1.9875691500e-4f * r; /* the polynomial of Cephes' expf */
    p = 8.3334519073e-3f + p * r;
    p = 4.1665795894e-2f + p * r;
    p = 1.6666665459e-1f + p * r;
    p = 5.0000001201e-1f + p * r;
    p = 1.0f + r + p * r * r;
    const int32_t bits = ((int32_t)n + 127) << 23; /* 2^n */
    float scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}

INLINE void silu_mul_row(const int dtype, const void *gate_up, void *y, int64_t row, int64_t width) {
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
        const float gate = load(gate_up, 2 * row * width + i, dtype), up = load(gate_up, (2 * row + 1) * width + i, dtype);
        const float small = exp_negative(-fabsf(gate)); /* never overflows */
        const float sigmoid = (gate < 0 ? small : 1.0f) / (1.0f + small);
        store(y, row * width + i, dtype, rounded(gate * sigmoid, dtype) * up);
    }
}

/* y[rows][width] = round(silu(gate)) * up, from gate_up [rows][gate of width | up of width]. */
void qwenfit_silu_mul(const void *gate_up, void *y, int64_t rows, int64_t width, int dtype, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > PARALLEL)
    for (int64_t row = 0; row < rows; row++) BY_DTYPE(dtype, silu_mul_row(DTYPE, gate_up, y, row, width));
}

INLINE void rotate_head(const int dtype, const void *x, int64_t from, const float *cos, const float *sin, void *y,
                        int64_t to, int64_t half) {
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        const float a = load(x, from + i, dtype), b = load(x, from + half + i, dtype);
        store(y, to + i, dtype, a * cos[i] + b * sin[i]);
        store(y, to + half + i, dtype, b * cos[half + i] + a * sin[half + i]);
    }
}

/* y[tokens][heads][head_dim]: each head turned by the token's cos and sin [tokens][head_dim], sin's first half negated. */
void qwenfit_rotate(const void *x, int64_t x_stride, const float *cos, const float *sin, void *y, int64_t tokens,
                    int64_t heads, int64_t head_dim, int dtype, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens * heads * head_dim > PARALLEL)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++) {
            const int64_t from = t * x_stride + h * head_dim, to = (t * heads + h) * head_dim, angle = t * head_dim;
            BY_DTYPE(dtype, rotate_head(DTYPE, x, from, cos + angle, sin + angle, y, to, head_dim / 2));
        }
}

typedef struct {
    void *key, *value;                /* [slots][kv_heads][head_dim] */
    float *key_affine, *value_affine; /* [slots][kv_heads][2], scale and zero; UINT8 only */
    int64_t kv_heads, head_dim, block_size;
    int dtype;
} Cache;

/* As quantize_kv of kv_quant.py. */
static void quantize(const void *x, int64_t at, int dtype, int64_t count, uint8_t *q, float *affine) {
    float low = load(x, at, dtype), high = low;
    for (int64_t i = 0; i < count; i++) {
        const float value = load(x, at + i, dtype);
        low = value < low ? value : low;
        high = value > high ? value : high;
    }
    float scale = (high - low) / 255.0f;
    if (!(scale > 0.0f)) scale = 0x1p-30f; /* CONSTANT of kv_quant.py */
    for (int64_t i = 0; i < count; i++) {
        const float steps = rintf((load(x, at + i, dtype) - low) / scale);
        q[i] = steps < 255.0f ? (uint8_t)steps : 255;
    }
    affine[0] = scale;
    affine[1] = -low / scale;
}

static void write_head(void *stored, float *affine, const Cache *c, int64_t slot_head, const void *x, int64_t at,
                       int dtype) {
    const int64_t to = slot_head * c->head_dim;
    if (c->dtype == UINT8) quantize(x, at, dtype, c->head_dim, (uint8_t *)stored + to, affine + 2 * slot_head);
    else
        for (int64_t i = 0; i < c->head_dim; i++) store(stored, to + i, c->dtype, load(x, at + i, dtype));
}

void qwenfit_write_kv(const Cache *c, const void *k, int64_t k_stride, const void *v, int64_t v_stride,
                      const int64_t *slots, int64_t tokens, int dtype, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens * c->kv_heads * c->head_dim > PARALLEL)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < c->kv_heads; h++) {
            const int64_t slot_head = slots[t] * c->kv_heads + h;
            write_head(c->key, c->key_affine, c, slot_head, k, t * k_stride + h * c->head_dim, dtype);
            write_head(c->value, c->value_affine, c, slot_head, v, t * v_stride + h * c->head_dim, dtype);
        }
}

INLINE void read_head(const int cache_dtype, const void *stored, const float *affine, int64_t slot_head,
                      const int64_t d, float *out) {
    const int64_t from = slot_head * d;
    if (cache_dtype == UINT8) {
        const uint8_t *q = (const uint8_t *)stored + from;
        const float scale = affine[2 * slot_head], zero = affine[2 * slot_head + 1];
        for (int64_t i = 0; i < d; i++) out[i] = scale * ((float)q[i] - zero);
    } else
        for (int64_t i = 0; i < d; i++) out[i] = load(stored, from + i, cache_dtype);
}

/* Tokens first to first + TOKENS of a sequence's keys, or values, of one kv head; past the end the last one again. */
INLINE void read_tokens(const int cache_dtype, const int64_t d, const Cache *c, const void *stored, const float *affine,
                        int64_t kv_head, const int32_t *table, int64_t first, int64_t context,
                        float out[TOKENS][MAX_HEAD_DIM]) {
    for (int64_t j = 0; j < TOKENS; j++) {
        const int64_t t = first + j < context ? first + j : context - 1;
        const int64_t slot = (int64_t)table[t / c->block_size] * c->block_size + t % c->block_size;
        read_head(cache_dtype, stored, affine, slot * c->kv_heads + kv_head, d, out[j]);
    }
}

INLINE int64_t round_up(int64_t context) { return (context + TOKENS - 1) / TOKENS * TOKENS; }

/* scores[context] become their softmax. */
static void softmax(float *scores, int64_t context) {
    float high = scores[0], sum = 0.0f;
#pragma omp simd reduction(max : high)
    for (int64_t t = 0; t < context; t++) high = scores[t] > high ? scores[t] : high;
#pragma omp simd reduction(+ : sum)
    for (int64_t t = 0; t < context; t++) {
        scores[t] = exp_negative(scores[t] - high);
        sum += scores[t];
    }
    const float share = 1.0f / sum;
    for (int64_t t = 0; t < context; t++) scores[t] *= share;
}

/* The query heads q[group][d] that share a kv head, over one sequence, to out[group][d]. q is scaled already.
 * scores: [group][stride], stride being context rounded up to TOKENS, for the work. */
INLINE void attend_head(const int cache_dtype, const int64_t d, const Cache *c, int64_t kv_head, const int32_t *table,
                        int64_t context, const float *restrict q, int64_t group, float *restrict scores,
                        float *restrict out) {
    const int64_t stride = round_up(context);
    float x[TOKENS][MAX_HEAD_DIM];
    for (int64_t t = 0; t < context; t += TOKENS) {
        read_tokens(cache_dtype, d, c, c->key, c->key_affine, kv_head, table, t, context, x);
        for (int64_t g = 0; g < group; g++) {
            float s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
            for (int64_t i = 0; i < d; i++) {
                const float value = q[g * d + i];
                s0 += value * x[0][i];
                s1 += value * x[1][i];
                s2 += value * x[2][i];
                s3 += value * x[3][i];
            }
            float *score = scores + g * stride + t;
            score[0] = s0, score[1] = s1, score[2] = s2, score[3] = s3;
        }
    }
    for (int64_t g = 0; g < group; g++) {
        softmax(scores + g * stride, context);
        for (int64_t t = context; t < stride; t++) scores[g * stride + t] = 0.0f;
    }
    for (int64_t i = 0; i < group * d; i++) out[i] = 0.0f;
    for (int64_t t = 0; t < context; t += TOKENS) {
        read_tokens(cache_dtype, d, c, c->value, c->value_affine, kv_head, table, t, context, x);
        for (int64_t g = 0; g < group; g++) {
            const float *w = scores + g * stride + t;
            const float w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
#pragma omp simd
            for (int64_t i = 0; i < d; i++)
                out[g * d + i] += w0 * x[0][i] + w1 * x[1][i] + w2 * x[2][i] + w3 * x[3][i];
        }
    }
}

/* The released head widths as constants, for the loops over them. */
INLINE void attend_any_width(const int cache_dtype, const Cache *c, int64_t kv_head, const int32_t *table,
                             int64_t context, const float *q, int64_t group, float *scores, float *out) {
    if (c->head_dim == 128) attend_head(cache_dtype, 128, c, kv_head, table, context, q, group, scores, out);
    else if (c->head_dim == 64) attend_head(cache_dtype, 64, c, kv_head, table, context, q, group, scores, out);
    else attend_head(cache_dtype, c->head_dim, c, kv_head, table, context, q, group, scores, out);
}

/* One query token a sequence: q[rows[s]] over contexts[s] cached tokens, to y[rows[s]], for s below `sequences`.
 * y: [tokens][heads * head_dim]; tables: [sequences][table_stride]. Returns 1 when out of memory. */
int qwenfit_decode_attention(const Cache *c, const void *q, int64_t q_stride, void *y, int64_t heads,
                             const int64_t *rows, const int32_t *contexts, const int32_t *tables, int64_t table_stride,
                             int64_t sequences, float scale, int dtype, int threads) {
    const int64_t group = heads / c->kv_heads, d = c->head_dim;
    int64_t longest = 0, total = 0;
    for (int64_t s = 0; s < sequences; s++) {
        longest = contexts[s] > longest ? contexts[s] : longest;
        total += contexts[s];
    }
    const int64_t scores = group * round_up(longest);
    int failed = 0;
#pragma omp parallel num_threads(threads) if (total * heads * d > PARALLEL)
    {
        float *work = malloc(sizeof(float) * (size_t)(scores + 2 * group * d));
        if (!work) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < sequences * c->kv_heads; i++) {
            if (!work) continue;
            const int64_t s = i / c->kv_heads, kv_head = i % c->kv_heads, context = contexts[s];
            const int32_t *table = tables + s * table_stride;
            float *wide = work + scores, *out = wide + group * d;
            const int64_t from = rows[s] * q_stride + kv_head * group * d, to = (rows[s] * heads + kv_head * group) * d;
            for (int64_t j = 0; j < group * d; j++) wide[j] = load(q, from + j, dtype) * scale;
            if (c->dtype == UINT8) attend_any_width(UINT8, c, kv_head, table, context, wide, group, work, out);
            else if (c->dtype == BFLOAT16) attend_any_width(BFLOAT16, c, kv_head, table, context, wide, group, work, out);
            else attend_any_width(FLOAT32, c, kv_head, table, context, wide, group, work, out);
            for (int64_t j = 0; j < group * d; j++) store(y, to + j, dtype, out[j]);
        }
        free(work);
    }
    return failed;
}
