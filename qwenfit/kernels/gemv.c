/* Matrix-vector products for decoding: 1 to 4 rows of x, codes unpacked in registers.
 *
 * Two ways to multiply a packed weight. float32 activations keep float32 arithmetic. bf16 activations become 16-bit
 * integers whose unit is 1/32767 of the largest in a group, an error far below bf16's own: where the CPU multiplies
 * pairs of integers, one instruction does for twice as many codes.
 */
#include "packed.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define GEMV 4 /* most rows of x */
#define SEGMENT 256 /* inputs summed in 32 bits without overflow: 255 * 32767 * 256 < 2^31 */

/* In each 32-bit lane, the sum of the products of both pairs of signed 16-bit integers. */
#if defined(__AVX512BW__)
#define MULTIPLY_PAIRS(a, b) ((vint)_mm512_madd_epi16((__m512i)(a), (__m512i)(b)))
#elif defined(__AVX2__)
#define MULTIPLY_PAIRS(a, b) ((vint)_mm256_madd_epi16((__m256i)(a), (__m256i)(b)))
#endif

typedef uint16_t vshort __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* x as a block's kernel wants it: float32, or pairs of 16-bit integers. */
typedef struct {
    const void *values; /* [batch][in_features] float32, or [batch][in_features / 2] pairs */
    const float *sums; /* [batch][groups]: of the values in a group */
    const float *scales; /* [batch][groups]: what a unit of an integer value is worth; 1 for float32 */
} Input;

/* total += scales * x_scale * (acc - zeros * x_sum): what ends a group. */
INLINE vfloat end_group(const int bits, const Packed *p, int64_t at, vfloat acc, const Input *x, int64_t group) {
    return *(const vfloat *)(p->scales + at) * x->scales[group] * (acc - zero_points(bits, p, at) * x->sums[group]);
}

/* One block of ROWS rows in float32. Codes are not shifted down: (word & mask << b*j) is converted as it is, and the
 * values are x * 2^-bj, which is exact. That leaves three vector operations for a code: and, convert, multiply-add. */
INLINE void float_block(const int bits, const int batch, const Packed *p, int64_t block, const Input *x, float *sums) {
    const int per_word = 32 / bits;
    const int chains = batch == 1 ? 3 : batch == 2 ? 2 : 1; /* sums apart: they hide latency, until they spill */
    const int64_t groups = p->in_features / p->group_size;
    const uint32_t *word = words_at(bits, p, block, 0);
    vfloat total[GEMV][VECTORS];
    UNROLL for (int m = 0; m < batch; m++)
        UNROLL for (int v = 0; v < VECTORS; v++) total[m][v] = (vfloat){0};
    for (int64_t group = 0; group < groups; group++) {
        const float *xs = (const float *)x->values + group * p->group_size;
        vfloat acc[GEMV][VECTORS][3];
        UNROLL for (int m = 0; m < batch; m++)
            UNROLL for (int v = 0; v < VECTORS; v++)
                UNROLL for (int c = 0; c < chains; c++) acc[m][v][c] = (vfloat){0};
        for (int64_t k = 0; k < p->group_size; k += per_word, word += ROWS)
            UNROLL for (int v = 0; v < VECTORS; v++) {
                PREFETCH(word + v * LANES);
                vuint raw = *(const vuint *)(word + v * LANES);
                UNROLL for (int j = 0; j < per_word; j++) {
                    vuint code = raw >> (32 - bits); /* the last one: shifted, since converting reads a sign */
                    if (j < per_word - 1) code = raw & (((1u << bits) - 1) << bits * j);
                    vfloat value = __builtin_convertvector((vint)code, vfloat);
                    UNROLL for (int m = 0; m < batch; m++)
                        acc[m][v][j % chains] += value * xs[m * p->in_features + k + j];
                }
            }
        UNROLL for (int m = 0; m < batch; m++)
            UNROLL for (int v = 0; v < VECTORS; v++) {
                vfloat sum = acc[m][v][0];
                UNROLL for (int c = 1; c < chains; c++) sum += acc[m][v][c];
                const int64_t at = (block * groups + group) * ROWS + v * LANES;
                total[m][v] += end_group(bits, p, at, sum, x, m * groups + group);
            }
    }
    UNROLL for (int m = 0; m < batch; m++)
        UNROLL for (int v = 0; v < VECTORS; v++) *(vfloat *)(sums + m * ROWS + v * LANES) = total[m][v];
}

/* One row of x for float_block. */
INLINE void float_input(const int bits, const Packed *p, float *xs, float *sums, float *scales) {
    const int per_word = 32 / bits;
    float factor[8];
    for (int j = 0; j < per_word; j++) factor[j] = j == per_word - 1 ? 1.0f : 1.0f / (float)(1u << bits * j);
    for (int64_t group = 0; group < p->in_features / p->group_size; group++, xs += p->group_size) {
        float part[8] = {0}, sum = 0.0f;
        for (int64_t k = 0; k < p->group_size; k += per_word)
            for (int j = 0; j < per_word; j++) {
                part[j] += xs[k + j];
                xs[k + j] *= factor[j];
            }
        for (int j = 0; j < per_word; j++) sum += part[j];
        sums[group] = sum;
        scales[group] = 1.0f;
    }
}

#if defined(MULTIPLY_PAIRS)
/* One block of ROWS rows in integers. A 32-bit lane of codes, shifted by b*j and masked, is the pair of inputs j and
 * j + per_word / 2 of its word; x holds the same pairs. */
INLINE void integer_block(const int bits, const int batch, const Packed *p, int64_t block, const Input *x,
                          float *sums) {
    const int per_word = 32 / bits;
    const int64_t groups = p->in_features / p->group_size;
    const uint32_t *word = words_at(bits, p, block, 0);
    const vshort mask = (vshort){0} + (uint16_t)((1 << bits) - 1);
    vfloat total[GEMV][VECTORS];
    UNROLL for (int m = 0; m < batch; m++)
        UNROLL for (int v = 0; v < VECTORS; v++) total[m][v] = (vfloat){0};
    for (int64_t group = 0; group < groups; group++) {
        vfloat sum[GEMV][VECTORS];
        UNROLL for (int m = 0; m < batch; m++)
            UNROLL for (int v = 0; v < VECTORS; v++) sum[m][v] = (vfloat){0};
        for (int64_t start = 0; start < p->group_size; start += SEGMENT) {
            const int64_t stop = start + SEGMENT < p->group_size ? start + SEGMENT : p->group_size;
            const int32_t *pairs = (const int32_t *)x->values + group * p->group_size / 2;
            vint acc[GEMV][VECTORS];
            UNROLL for (int m = 0; m < batch; m++)
                UNROLL for (int v = 0; v < VECTORS; v++) acc[m][v] = (vint){0};
            for (int64_t k = start; k < stop; k += per_word, word += ROWS)
                UNROLL for (int v = 0; v < VECTORS; v++) {
                    PREFETCH(word + v * LANES);
                    vshort raw = *(const vshort *)(word + v * LANES);
                    UNROLL for (int j = 0; j < per_word / 2; j++) {
                        vshort codes = raw >> bits * j;
                        if (j < per_word / 2 - 1) codes &= mask;
                        UNROLL for (int m = 0; m < batch; m++)
                            acc[m][v] += MULTIPLY_PAIRS(codes, (vint){0} + pairs[(m * p->in_features + k) / 2 + j]);
                    }
                }
            UNROLL for (int m = 0; m < batch; m++)
                UNROLL for (int v = 0; v < VECTORS; v++) sum[m][v] += __builtin_convertvector(acc[m][v], vfloat);
        }
        UNROLL for (int m = 0; m < batch; m++)
            UNROLL for (int v = 0; v < VECTORS; v++) {
                const int64_t at = (block * groups + group) * ROWS + v * LANES;
                total[m][v] += end_group(bits, p, at, sum[m][v], x, m * groups + group);
            }
    }
    UNROLL for (int m = 0; m < batch; m++)
        UNROLL for (int v = 0; v < VECTORS; v++) *(vfloat *)(sums + m * ROWS + v * LANES) = total[m][v];
}

/* One row of x for integer_block. A group that is not all finite gets the scale NaN, which no sum survives. */
INLINE void integer_input(const int bits, const Packed *p, const float *row, int32_t *row_pairs, float *sums,
                          float *scales) {
    const int per_word = 32 / bits, half = per_word / 2;
    for (int64_t group = 0; group < p->in_features / p->group_size; group++) {
        const float *xs = row + group * p->group_size;
        int32_t *pairs = row_pairs + group * p->group_size / 2;
        float largest[8] = {0}, check[8] = {0};
        for (int64_t k = 0; k < p->group_size; k += per_word)
            for (int j = 0; j < per_word; j++) {
                const float value = xs[k + j], size = value < 0 ? -value : value;
                largest[j] = size > largest[j] ? size : largest[j];
                check[j] += value * 0.0f; /* NaN if any value is not finite, else 0 */
            }
        for (int j = 1; j < per_word; j++) {
            largest[0] = largest[j] > largest[0] ? largest[j] : largest[0];
            check[0] += check[j];
        }
        scales[group] = largest[0] / 32767.0f + check[0];
        sums[group] = 0.0f;
        memset(pairs, 0, sizeof(int32_t) * (size_t)p->group_size / 2);
        if (!(scales[group] > 1e-30f)) continue; /* zero, as good as zero, or NaN */
        const float inverse = 32767.0f / largest[0];
        int32_t total[8] = {0};
        for (int64_t k = 0; k < p->group_size; k += per_word) {
            int32_t integer[8];
            for (int j = 0; j < per_word; j++) {
                const float value = xs[k + j] * inverse;
                integer[j] = (int32_t)(value + (value < 0 ? -0.5f : 0.5f));
                total[j] += integer[j];
            }
            for (int j = 0; j < half; j++)
                pairs[k / 2 + j] = (int32_t)((uint32_t)integer[j + half] << 16 | (uint16_t)integer[j]);
        }
        for (int j = 0; j < per_word; j++) sums[group] += (float)total[j];
    }
}
#endif

/* A parallel region is compiled as a function of its own, to which constants do not propagate: the variants are chosen
 * outside it and called through a pointer. */
typedef void (*Block)(const Packed *, int64_t, const Input *, float *);
#define VARIANT(KIND, BITS, BATCH) \
    static void KIND##_block_##BITS##_##BATCH(const Packed *p, int64_t block, const Input *x, float *sums) { \
        KIND##_block(BITS, BATCH, p, block, x, sums); \
    }
#define VARIANTS(KIND) \
    VARIANT(KIND, 4, 1) VARIANT(KIND, 4, 2) VARIANT(KIND, 4, 3) VARIANT(KIND, 4, 4) \
    VARIANT(KIND, 8, 1) VARIANT(KIND, 8, 2) VARIANT(KIND, 8, 3) VARIANT(KIND, 8, 4) \
    static const Block KIND##_blocks[2][GEMV] = { \
        {KIND##_block_4_1, KIND##_block_4_2, KIND##_block_4_3, KIND##_block_4_4}, \
        {KIND##_block_8_1, KIND##_block_8_2, KIND##_block_8_3, KIND##_block_8_4}, \
    };
VARIANTS(float)
#if defined(MULTIPLY_PAIRS)
VARIANTS(integer)
#endif

/* y[batch][out] = x[batch][width] times the packed weight, batch 1 to 4; y and bias have x's dtype. width is at most
 * in_features. Returns 1 when out of memory. */
int qwenfit_packed_gemv(int bits, const Packed *p, const void *x, int batch, int64_t width, void *y, const void *bias,
                        int dtype, int threads) {
    const int64_t groups = p->in_features / p->group_size, blocks = (p->out_features + ROWS - 1) / ROWS;
    Block run = float_blocks[bits == 8][batch - 1];
    float *wide = malloc(sizeof(float) * (size_t)(batch * (2 * (p->in_features + groups))));
    if (!wide) return 1;
    float *sums = wide + batch * p->in_features, *scales = sums + batch * groups;
    Input input = {wide, sums, scales};
    for (int64_t m = 0; m < batch; m++) {
        float *row = wide + m * p->in_features;
        for (int64_t k = 0; k < width; k++) row[k] = load(x, m * width + k, dtype);
        for (int64_t k = width; k < p->in_features; k++) row[k] = 0.0f;
    }
#if defined(MULTIPLY_PAIRS)
    if (dtype == BFLOAT16) {
        int32_t *pairs = (int32_t *)(scales + batch * groups);
        run = integer_blocks[bits == 8][batch - 1];
        input.values = pairs;
        for (int64_t m = 0; m < batch; m++) {
            const float *row = wide + m * p->in_features;
            int32_t *own = pairs + m * p->in_features / 2;
            if (bits == 4) integer_input(4, p, row, own, sums + m * groups, scales + m * groups);
            else integer_input(8, p, row, own, sums + m * groups, scales + m * groups);
        }
    }
#endif
    for (int64_t m = 0; input.values == wide && m < batch; m++) {
        float *row = wide + m * p->in_features;
        if (bits == 4) float_input(4, p, row, sums + m * groups, scales + m * groups);
        else float_input(8, p, row, sums + m * groups, scales + m * groups);
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        float results[GEMV * ROWS];
        run(p, block, &input, results);
        for (int m = 0; m < batch; m++)
            store_rows(y, dtype, m, block * ROWS, p->out_features, results + m * ROWS, bias);
    }
    free(wide);
    return 0;
}

/* `batch` dot products of one bf16 weight row. */
INLINE void bf16_row(const int batch, const uint16_t *weight, const float *x, int64_t in_features, float *sums) {
    vfloat acc[GEMV][4];
    UNROLL for (int m = 0; m < batch; m++)
        UNROLL for (int c = 0; c < 4; c++) acc[m][c] = (vfloat){0};
    int64_t k = 0;
    for (; k + 4 * LANES <= in_features; k += 4 * LANES)
        UNROLL for (int c = 0; c < 4; c++) {
            if (c % 2 == 0) PREFETCH(weight + k + c * LANES);
            vuint wide = __builtin_convertvector(*(const vhalf *)(weight + k + c * LANES), vuint) << 16;
            UNROLL for (int m = 0; m < batch; m++)
                acc[m][c] += (vfloat)wide * *(const vfloat *)(x + m * in_features + k + c * LANES);
        }
    for (int m = 0; m < batch; m++) {
        vfloat sum = (acc[m][0] + acc[m][1]) + (acc[m][2] + acc[m][3]);
        float total = 0.0f;
        for (int lane = 0; lane < LANES; lane++) total += sum[lane];
        for (int64_t rest = k; rest < in_features; rest++) total += from_bf16(weight[rest]) * x[m * in_features + rest];
        sums[m] = total;
    }
}

static void bf16_rows(int batch, const uint16_t *weight, const float *x, int64_t in_features, float *sums) {
    if (batch == 1) bf16_row(1, weight, x, in_features, sums);
    else if (batch == 2) bf16_row(2, weight, x, in_features, sums);
    else if (batch == 3) bf16_row(3, weight, x, in_features, sums);
    else bf16_row(4, weight, x, in_features, sums);
}

/* y[batch][out] = x[batch][in] times weight [out][in] of bf16, batch 1 to 4; y and bias have x's dtype.
 * Returns 1 when out of memory. */
int qwenfit_bf16_gemv(const Packed *p, const void *x, int batch, void *y, const void *bias, int dtype, int threads) {
    float *wide = malloc(sizeof(float) * (size_t)(batch * p->in_features));
    if (!wide) return 1;
    for (int64_t i = 0; i < batch * p->in_features; i++) wide[i] = load(x, i, dtype);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < p->out_features; row++) {
        float sums[GEMV];
        bf16_rows(batch, (const uint16_t *)p->words + row * p->in_features, wide, p->in_features, sums);
        for (int m = 0; m < batch; m++)
            store(y, m * p->out_features + row, dtype, sums[m] + (bias ? load(bias, row, dtype) : 0.0f));
    }
    free(wide);
    return 0;
}

