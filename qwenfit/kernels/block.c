/* The small operations of a transformer block on few tokens, one call each: between the matrix products of a decoding
 * step, calling a chain of general operators costs as much as the products do.
 *
 * Activations are float32 or bfloat16, arithmetic is float32. Sizes count elements; strides are those between tokens.
 */
#include <math.h>
#include <stdlib.h>

#include "scalar.h"

enum { UINT8 = 2 }; /* a quantized cache, beside scalar.h's types */

#define PARALLEL 32768 /* elements from which waking the other threads pays */

/* y = round(x / sqrt(mean(x^2) + eps)) * weight, rows of `width`, rounding to the dtype before the product as well. */
void qwenfit_rms_norm(const void *x, const void *weight, void *y, int64_t rows, int64_t width, float eps, int dtype,
                      int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > PARALLEL)
    for (int64_t row = 0; row < rows; row++) {
        const int64_t at = row * width;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; i++) {
            float value = load(x, at + i, dtype);
            sum += value * value;
        }
        const float factor = 1.0f / sqrtf(sum / (float)width + eps);
        for (int64_t i = 0; i < width; i++) {
            float value = rounded(load(x, at + i, dtype) * factor, dtype);
            store(y, at + i, dtype, value * load(weight, i, dtype));
        }
    }
}

/* e^x for x <= 0, relative error about 2e-7; loops over it vectorise, which calls of expf do not. */
INLINE float exp_negative(float x) {
    if (x < -87.0f) x = -87.0f;
    const float turns = x * 1.44269504f + 12582912.0f; /* rounds to an integer in the lowest bits */
    const float n = turns - 12582912.0f, r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.3981999507e-3f + 1.9875691500e-4f * r; /* the polynomial of Cephes' expf */
    p = 8.3334519073e-3f + p * r;
    p = 4.1665795894e-2f + p * r;
    p = 1.6666665459e-1f + p * r;
    p = 5.0000001201e-1f + p * r;
    p = 1.0f + r + p * r * r;
    union { float f; int32_t i; } scale = {.i = ((int32_t)n + 127) << 23};
    return p * scale.f;
}

/* y[rows][width] = round(silu(gate)) * up, from gate_up [rows][gate of width | up of width]. */
void qwenfit_silu_mul(const void *gate_up, void *y, int64_t rows, int64_t width, int dtype, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > PARALLEL)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < width; i++) {
            const float gate = load(gate_up, 2 * row * width + i, dtype);
            const float small = exp_negative(-fabsf(gate)); /* never overflows */
            const float sigmoid = (gate < 0 ? small : 1.0f) / (1.0f + small);
            const float up = load(gate_up, (2 * row + 1) * width + i, dtype);
            store(y, row * width + i, dtype, rounded(gate * sigmoid, dtype) * up);
        }
}

/* y[tokens][heads][head_dim]: each head turned by the token's cos and sin [tokens][head_dim], sin's first half negated. */
void qwenfit_rotate(const void *x, int64_t x_stride, const float *cos, const float *sin, void *y, int64_t tokens,
                    int64_t heads, int64_t head_dim, int dtype, int threads) {
    const int64_t half = head_dim / 2;
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens * heads * head_dim > PARALLEL)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++) {
            const int64_t from = t * x_stride + h * head_dim, to = (t * heads + h) * head_dim;
            const float *c = cos + t * head_dim, *s = sin + t * head_dim;
            for (int64_t i = 0; i < half; i++) {
                const float a = load(x, from + i, dtype), b = load(x, from + half + i, dtype);
                store(y, to + i, dtype, a * c[i] + b * s[i]);
                store(y, to + half + i, dtype, b * c[half + i] + a * s[half + i]);
            }
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
    if (!(scale > 0.0f)) scale = 1.0f;
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
                      int64_t head_dim, float *out) {
    const int64_t from = slot_head * head_dim;
    if (cache_dtype == UINT8) {
        const uint8_t *q = (const uint8_t *)stored + from;
        const float scale = affine[2 * slot_head], zero = affine[2 * slot_head + 1];
        for (int64_t i = 0; i < head_dim; i++) out[i] = scale * ((float)q[i] - zero);
    } else
        for (int64_t i = 0; i < head_dim; i++) out[i] = load(stored, from + i, cache_dtype);
}

/* The `group` query heads that share a kv head, over one sequence. work: [group][context] scores, then [group + 1][head_dim].
 * q is scaled already. */
INLINE void attend_head(const int cache_dtype, const Cache *c, int64_t kv_head, const int32_t *table, int64_t context,
                        const float *q, int64_t group, float *work, float *out) {
    const int64_t d = c->head_dim;
    float *scores = work, *vector = work + group * context;
    for (int64_t t = 0; t < context; t++) {
        const int64_t slot = (int64_t)table[t / c->block_size] * c->block_size + t % c->block_size;
        read_head(cache_dtype, c->key, c->key_affine, slot * c->kv_heads + kv_head, d, vector);
        for (int64_t g = 0; g < group; g++) {
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < d; i++) sum += q[g * d + i] * vector[i];
            scores[g * context + t] = sum;
        }
    }
    for (int64_t g = 0; g < group; g++) {
        float *s = scores + g * context, high = s[0], sum = 0.0f;
#pragma omp simd reduction(max : high)
        for (int64_t t = 0; t < context; t++) high = s[t] > high ? s[t] : high;
#pragma omp simd reduction(+ : sum)
        for (int64_t t = 0; t < context; t++) {
            s[t] = exp_negative(s[t] - high);
            sum += s[t];
        }
        for (int64_t t = 0; t < context; t++) s[t] /= sum;
        for (int64_t i = 0; i < d; i++) out[g * d + i] = 0.0f;
    }
    for (int64_t t = 0; t < context; t++) {
        const int64_t slot = (int64_t)table[t / c->block_size] * c->block_size + t % c->block_size;
        read_head(cache_dtype, c->value, c->value_affine, slot * c->kv_heads + kv_head, d, vector);
        for (int64_t g = 0; g < group; g++) {
            const float weight = scores[g * context + t];
            for (int64_t i = 0; i < d; i++) out[g * d + i] += weight * vector[i];
        }
    }
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
    int failed = 0;
#pragma omp parallel num_threads(threads) if (total * heads * d > PARALLEL)
    {
        float *work = malloc(sizeof(float) * (size_t)(group * longest + (2 * group + 1) * d));
        if (!work) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < sequences * c->kv_heads; i++) {
            if (!work) continue;
            const int64_t s = i / c->kv_heads, kv_head = i % c->kv_heads, context = contexts[s];
            const int32_t *table = tables + s * table_stride;
            float *wide = work + group * longest + d, *out = wide + group * d;
            const int64_t from = rows[s] * q_stride + kv_head * group * d, to = (rows[s] * heads + kv_head * group) * d;
            for (int64_t j = 0; j < group * d; j++) wide[j] = load(q, from + j, dtype) * scale;
            if (c->dtype == UINT8) attend_head(UINT8, c, kv_head, table, context, wide, group, work, out);
            else if (c->dtype == BFLOAT16) attend_head(BFLOAT16, c, kv_head, table, context, wide, group, work, out);
            else attend_head(FLOAT32, c, kv_head, table, context, wide, group, work, out);
            for (int64_t j = 0; j < group * d; j++) store(y, to + j, dtype, out[j]);
        }
        free(work);
    }
    return failed;
}
