/* Matrix products for CPUs with bf16, int8 or int4 weights and float32 arithmetic.
 *
 * Plain C with GCC/Clang vector extensions: it compiles for any CPU, and -march=native decides the instructions.
 *
 * Packed layout: blocks of ROWS output rows. A 32-bit word holds 32/bits consecutive inputs of one row, lowest bits first;
 * words of the ROWS rows lie side by side: words[block][input / per_word][row]. One vector load thus feeds one lane a row,
 * and a sum over inputs needs no shuffle. scales and zeros: [block][group][row], float32.
 * w[row][k] = scale * (code - zero), so sum_k x*w = scale * (sum_k x*code - zero * sum_k x), one correction a group.
 *
 * Codes are never shifted down: (word & mask << b*j) is converted to float as it is, and x is scaled by 2^-bj instead,
 * which is exact. That leaves three vector operations for a code: and, convert, multiply-add.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ROWS 16
#if defined(__AVX512F__)
#define LANES 16
#define TILE 12 /* rows of x in registers in the matrix-matrix kernel */
#elif defined(__AVX__)
#define LANES 8
#define TILE 6
#else
#define LANES 4
#define TILE 4
#endif
#define VECTORS (ROWS / LANES)
#define GEMV 4 /* most rows of x in the matrix-vector kernels */
#define DEPTH 512 /* inputs of a panel: DEPTH x ROWS floats stay in the caches next to the core */
#define UNROLL _Pragma("GCC unroll 16") /* the accumulators must become registers */
#define INLINE static inline __attribute__((always_inline))

typedef float vfloat __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t vint __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vuint __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t vhalf __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

enum { FLOAT32 = 0, BFLOAT16 = 1 };

typedef struct {
    const void *words; /* or the bf16 weight itself, [out][in] */
    const float *scales, *zeros; /* zeros NULL: 2^(bits-1) throughout */
    int64_t out_features, in_features, group_size; /* in_features padded to whole groups */
} Packed;

INLINE float from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40); /* a NaN stays one */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float load(const void *data, int64_t index, int dtype) {
    return dtype == BFLOAT16 ? from_bf16(((const uint16_t *)data)[index]) : ((const float *)data)[index];
}

INLINE void store(void *data, int64_t index, int dtype, float value) {
    if (dtype == BFLOAT16) ((uint16_t *)data)[index] = to_bf16(value);
    else ((float *)data)[index] = value;
}

/* ROWS results of one row of x, with the bias, to y[m]. */
INLINE void store_rows(void *y, int dtype, int64_t m, int64_t row, int64_t out_features, const float *sums,
                       const void *bias) {
    int64_t count = out_features - row < ROWS ? out_features - row : ROWS;
    for (int64_t r = 0; r < count; r++)
        store(y, m * out_features + row + r, dtype, sums[r] + (bias ? load(bias, row + r, dtype) : 0.0f));
}

INLINE vfloat zero_points(const int bits, const Packed *p, int64_t at) {
    if (p->zeros) return *(const vfloat *)(p->zeros + at);
    return (vfloat){0} + (float)(1 << (bits - 1));
}

/* One block of ROWS rows times `batch` rows of x, codes unpacked on the fly.
 * x: [batch][in_features], scaled as said above; group_sums: [batch][groups], of x as it was. */
INLINE void packed_block(const int bits, const int batch, const Packed *p, int64_t block, const float *x,
                         const float *group_sums, float *sums) {
    const int per_word = 32 / bits, chains = batch == 1 ? 4 : batch == 2 ? 2 : 1; /* independent sums hide latency */
    const int64_t groups = p->in_features / p->group_size, words = p->group_size / per_word;
    const uint32_t *word = (const uint32_t *)p->words + block * ROWS * (p->in_features / per_word);
    vfloat total[GEMV][VECTORS];
    UNROLL for (int m = 0; m < batch; m++)
        UNROLL for (int v = 0; v < VECTORS; v++) total[m][v] = (vfloat){0};
    for (int64_t group = 0; group < groups; group++) {
        vfloat acc[GEMV][VECTORS][4];
        UNROLL for (int m = 0; m < batch; m++)
            UNROLL for (int v = 0; v < VECTORS; v++)
                UNROLL for (int c = 0; c < chains; c++) acc[m][v][c] = (vfloat){0};
        const float *xs = x + group * p->group_size;
        for (int64_t i = 0; i < words; i++, word += ROWS, xs += per_word)
            UNROLL for (int v = 0; v < VECTORS; v++) {
                vuint raw = *(const vuint *)(word + v * LANES);
                UNROLL for (int j = 0; j < per_word; j++) {
                    vuint code = raw >> (32 - bits); /* the last one: shifted, since converting reads a sign */
                    if (j < per_word - 1) code = raw & (((1u << bits) - 1) << bits * j);
                    vfloat value = __builtin_convertvector((vint)code, vfloat);
                    UNROLL for (int m = 0; m < batch; m++)
                        acc[m][v][j % chains] += value * xs[m * p->in_features + j];
                }
            }
        UNROLL for (int m = 0; m < batch; m++)
            UNROLL for (int v = 0; v < VECTORS; v++) {
                const int64_t at = (block * groups + group) * ROWS + v * LANES;
                vfloat sum = acc[m][v][0];
                UNROLL for (int c = 1; c < chains; c++) sum += acc[m][v][c];
                sum -= zero_points(bits, p, at) * group_sums[m * groups + group];
                total[m][v] += *(const vfloat *)(p->scales + at) * sum;
            }
    }
    UNROLL for (int m = 0; m < batch; m++)
        UNROLL for (int v = 0; v < VECTORS; v++) *(vfloat *)(sums + m * ROWS + v * LANES) = total[m][v];
}

/* A parallel region is compiled as a function of its own, to which constants do not propagate: the variants are chosen
 * outside it and called through a pointer. */
typedef void (*PackedBlock)(const Packed *, int64_t, const float *, const float *, float *);
#define VARIANT(BITS, BATCH) \
    static void packed_block_##BITS##_##BATCH(const Packed *p, int64_t block, const float *x, const float *group_sums, \
                                              float *sums) { \
        packed_block(BITS, BATCH, p, block, x, group_sums, sums); \
    }
VARIANT(4, 1) VARIANT(4, 2) VARIANT(4, 3) VARIANT(4, 4) VARIANT(8, 1) VARIANT(8, 2) VARIANT(8, 3) VARIANT(8, 4)
#undef VARIANT
static const PackedBlock PACKED_BLOCK[2][GEMV] = {
    {packed_block_4_1, packed_block_4_2, packed_block_4_3, packed_block_4_4},
    {packed_block_8_1, packed_block_8_2, packed_block_8_3, packed_block_8_4},
};

/* One row of x: to float32, padded with zeros, summed by group, then scaled for unshifted codes. */
INLINE void scale_input(const int bits, const Packed *p, const void *x, int64_t start, int64_t width, int dtype,
                        float *scaled, float *group_sums) {
    const int per_word = 32 / bits;
    float factor[8];
    for (int j = 0; j < per_word; j++) factor[j] = j == per_word - 1 ? 1.0f : 1.0f / (float)(1u << bits * j);
    for (int64_t k = 0; k < width; k++) scaled[k] = load(x, start + k, dtype);
    for (int64_t k = width; k < p->in_features; k++) scaled[k] = 0.0f;
    for (int64_t group = 0; group < p->in_features / p->group_size; group++) {
        float *xs = scaled + group * p->group_size, part[8] = {0}, sum = 0.0f;
        for (int64_t k = 0; k < p->group_size; k += per_word)
            for (int j = 0; j < per_word; j++) {
                part[j] += xs[k + j];
                xs[k + j] *= factor[j];
            }
        for (int j = 0; j < per_word; j++) sum += part[j];
        group_sums[group] = sum;
    }
}

/* y[batch][out] = x[batch][width] times the packed weight, batch 1 to 4; y and bias have x's dtype. x's rows are `width`
 * long, at most in_features. Returns 1 when out of memory. */
int qwenfit_packed_gemv(int bits, const Packed *p, const void *x, int batch, int64_t width, void *y, const void *bias,
                        int dtype, int threads) {
    const int64_t groups = p->in_features / p->group_size, blocks = (p->out_features + ROWS - 1) / ROWS;
    const PackedBlock packed_block = PACKED_BLOCK[bits == 8][batch - 1];
    float *scaled = malloc(sizeof(float) * (size_t)(batch * (p->in_features + groups)));
    if (!scaled) return 1;
    float *group_sums = scaled + batch * p->in_features;
    for (int m = 0; m < batch; m++) {
        float *row = scaled + m * p->in_features, *sums = group_sums + m * groups;
        if (bits == 4) scale_input(4, p, x, m * width, width, dtype, row, sums);
        else scale_input(8, p, x, m * width, width, dtype, row, sums);
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        float sums[GEMV * ROWS];
        packed_block(p, block, scaled, group_sums, sums);
        for (int m = 0; m < batch; m++)
            store_rows(y, dtype, m, block * ROWS, p->out_features, sums + m * ROWS, bias);
    }
    free(scaled);
    return 0;
}

/* Panels: inputs first .. first + count of ROWS rows as float32 [count][ROWS]. */
INLINE void packed_panel(const int bits, const Packed *p, int64_t block, int64_t first, int64_t count, float *panel) {
    const int per_word = 32 / bits;
    const int64_t groups = p->in_features / p->group_size;
    for (int64_t k = 0; k < count; k += per_word) {
        int64_t group = (first + k) / p->group_size;
        const uint32_t *word = (const uint32_t *)p->words + (block * (p->in_features / per_word) + (first + k) / per_word) * ROWS;
        UNROLL for (int v = 0; v < VECTORS; v++) {
            const int64_t at = (block * groups + group) * ROWS + v * LANES;
            vuint raw = *(const vuint *)(word + v * LANES);
            vfloat s = *(const vfloat *)(p->scales + at), z = zero_points(bits, p, at);
            UNROLL for (int j = 0; j < per_word; j++, raw >>= bits) {
                vfloat code = __builtin_convertvector((vint)(raw & ((1u << bits) - 1)), vfloat);
                *(vfloat *)(panel + (k + j) * ROWS + v * LANES) = (code - z) * s;
            }
        }
    }
}

INLINE void bf16_panel(const Packed *p, int64_t block, int64_t first, int64_t count, float *panel) {
    for (int64_t r = 0; r < ROWS; r++) {
        int64_t row = block * ROWS + r;
        const uint16_t *weight = p->words, *source = weight + (row < p->out_features ? row : p->out_features - 1) * p->in_features + first;
        for (int64_t k = 0; k < count; k++) panel[k * ROWS + r] = from_bf16(source[k]);
    }
}

/* sums[batch][ROWS] += x[batch][count] times a panel; x's rows are `stride` apart. */
INLINE void tile(const int batch, const float *x, int64_t stride, int64_t count, const float *panel, float *sums) {
    vfloat acc[TILE][VECTORS];
    UNROLL for (int m = 0; m < batch; m++)
        UNROLL for (int v = 0; v < VECTORS; v++) acc[m][v] = *(const vfloat *)(sums + m * ROWS + v * LANES);
    for (int64_t k = 0; k < count; k++) {
        vfloat w[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) w[v] = *(const vfloat *)(panel + k * ROWS + v * LANES);
        UNROLL for (int m = 0; m < batch; m++)
            UNROLL for (int v = 0; v < VECTORS; v++) acc[m][v] += w[v] * x[m * stride + k];
    }
    UNROLL for (int m = 0; m < batch; m++)
        UNROLL for (int v = 0; v < VECTORS; v++) *(vfloat *)(sums + m * ROWS + v * LANES) = acc[m][v];
}

/* sums[rows][ROWS] += x[rows][count] times a panel. */
static void multiply_panel(const float *x, int64_t rows, int64_t stride, int64_t count, const float *panel, float *sums) {
    int64_t m = 0;
    for (; m + TILE <= rows; m += TILE) tile(TILE, x + m * stride, stride, count, panel, sums + m * ROWS);
    for (; m + 2 <= rows; m += 2) tile(2, x + m * stride, stride, count, panel, sums + m * ROWS);
    for (; m < rows; m++) tile(1, x + m * stride, stride, count, panel, sums + m * ROWS);
}

static void fill_panel(int bits, const Packed *p, int64_t block, int64_t first, int64_t count, float *panel) {
    if (bits == 4) packed_panel(4, p, block, first, count, panel);
    else if (bits == 8) packed_panel(8, p, block, first, count, panel);
    else bf16_panel(p, block, first, count, panel);
}

/* y[rows][out] = x[rows][in_features] times the weight, for any number of rows. x is float32 and as long as the packed inputs;
 * `dtype` is that of y and bias. bits 4 or 8, or 16 for a weight [out][in] of bf16. Returns 1 when out of memory. */
int qwenfit_gemm(int bits, const Packed *p, const float *x, int64_t rows, void *y, const void *bias, int dtype,
                 int threads) {
    const int64_t blocks = (p->out_features + ROWS - 1) / ROWS;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        const size_t sums_size = sizeof(float) * (size_t)rows * ROWS;
        float *sums = malloc(sums_size), *panel = malloc(sizeof(float) * DEPTH * ROWS);
        if (!sums || !panel) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            if (!sums || !panel) continue;
            memset(sums, 0, sums_size);
            for (int64_t first = 0; first < p->in_features; first += DEPTH) {
                int64_t count = p->in_features - first < DEPTH ? p->in_features - first : DEPTH;
                fill_panel(bits, p, block, first, count, panel);
                multiply_panel(x + first, rows, p->in_features, count, panel, sums);
            }
            for (int64_t m = 0; m < rows; m++)
                store_rows(y, dtype, m, block * ROWS, p->out_features, sums + m * ROWS, bias);
        }
        free(sums);
        free(panel);
    }
    return failed;
}

/* `batch` dot products of one bf16 weight row. */
INLINE void bf16_row(const int batch, const uint16_t *weight, const float *x, int64_t in_features, float *sums) {
    vfloat acc[GEMV][4];
    UNROLL for (int m = 0; m < batch; m++)
        UNROLL for (int c = 0; c < 4; c++) acc[m][c] = (vfloat){0};
    int64_t k = 0;
    for (; k + 4 * LANES <= in_features; k += 4 * LANES)
        UNROLL for (int c = 0; c < 4; c++) {
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

/* weight[out][width] of `dtype` from a packed one. */
void qwenfit_unpack(int bits, const Packed *p, int64_t width, void *weight, int dtype, int threads) {
    const int64_t blocks = (p->out_features + ROWS - 1) / ROWS;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        float panel[64 * ROWS];
        for (int64_t first = 0; first < p->in_features; first += 64) {
            int64_t count = p->in_features - first < 64 ? p->in_features - first : 64;
            fill_panel(bits, p, block, first, count, panel);
            if (first + count > width) count = width - first;
            for (int64_t r = 0; r < ROWS && block * ROWS + r < p->out_features; r++)
                for (int64_t k = 0; k < count; k++)
                    store(weight, (block * ROWS + r) * width + first + k, dtype, panel[k * ROWS + r]);
        }
    }
}
