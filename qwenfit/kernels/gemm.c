/* Matrix-matrix products for prompts: panels of a packed or bf16 weight, widened to float32 in cache, times x. */
#include "packed.h"

#define DEPTH 512 /* inputs of a panel: DEPTH x ROWS floats stay in the caches next to the core */

/* Panels: inputs first .. first + count of ROWS rows as float32 [count][ROWS]. */
INLINE void packed_panel(const int bits, const Packed *p, int64_t block, int64_t first, int64_t count, float *panel) {
    const int per_word = 32 / bits;
    const int64_t groups = p->in_features / p->group_size;
    for (int64_t k = 0; k < count; k += per_word) {
        int64_t group = (first + k) / p->group_size;
        const uint32_t *word = words_at(bits, p, block, first + k);
        UNROLL for (int v = 0; v < VECTORS; v++) {
            PREFETCH(word + v * LANES);
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

typedef uint16_t rows8 __attribute__((vector_size(16), aligned(2), may_alias)); /* 8 of bf16 */
typedef float wide8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t bits8 __attribute__((vector_size(32), may_alias));

/* Interleave the low or the high halves of two vectors of 8: a0 b0 a1 b1 ... GCC before 12 has only its own name. */
#if defined(__clang__)
#define ZIP(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ZIP(a, b, ...) __builtin_shuffle(a, b, (rows8){__VA_ARGS__})
#endif
#define ZIP_LOW(a, b) ZIP(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_HIGH(a, b) ZIP(a, b, 4, 12, 5, 13, 6, 14, 7, 15)

/* Eight rows of a panel from 8 bf16 of 8 rows: three rounds of interleaving row i with row i + 4 turn them. */
INLINE void turn(const uint16_t *const *rows, int64_t k, float *panel) {
    rows8 from[8], to[8];
    UNROLL for (int r = 0; r < 8; r++) from[r] = *(const rows8 *)(rows[r] + k);
    for (int round = 0; round < 3; round++) {
        UNROLL for (int i = 0; i < 4; i++) {
            to[2 * i] = ZIP_LOW(from[i], from[i + 4]);
            to[2 * i + 1] = ZIP_HIGH(from[i], from[i + 4]);
        }
        UNROLL for (int i = 0; i < 8; i++) from[i] = to[i];
    }
    UNROLL for (int i = 0; i < 8; i++) {
        bits8 wide = __builtin_convertvector(from[i], bits8) << 16;
        *(wide8 *)(panel + i * ROWS) = (wide8)wide;
    }
}

INLINE void bf16_panel(const Packed *p, int64_t block, int64_t first, int64_t count, float *panel) {
    const uint16_t *rows[ROWS];
    for (int64_t r = 0; r < ROWS; r++) {
        int64_t row = block * ROWS + r < p->out_features ? block * ROWS + r : p->out_features - 1;
        rows[r] = (const uint16_t *)p->words + row * p->in_features + first;
    }
    int64_t k = 0;
    for (; k + 8 <= count; k += 8)
        for (int half = 0; half < ROWS; half += 8) turn(rows + half, k, panel + k * ROWS + half);
    for (; k < count; k++)
        for (int64_t r = 0; r < ROWS; r++) panel[k * ROWS + r] = from_bf16(rows[r][k]);
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
static void multiply_panel(const float *x, int64_t rows, int64_t stride, int64_t count, const float *panel,
                           float *sums) {
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

/* y[rows][out] = x[rows][in_features] times the weight, for any number of rows. x is float32 and as long as the packed
 * inputs; `dtype` is that of y and bias. bits 4 or 8, or 16 for a weight [out][in] of bf16. Returns 1 when out of
 * memory. */
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

#define RUN 128 /* weights of a row that are unpacked at once */

/* `count` weights of a row of a block, from input `first` on, all of one group. */
INLINE void unpack_run(const int bits, const uint32_t *words, int64_t count, float scale, float zero,
                       float *restrict to) {
    const int per_word = 32 / bits;
    uint32_t row[RUN / 4];
    uint8_t codes[RUN] __attribute__((aligned(64)));
    for (int64_t w = 0; w < count / per_word; w++) row[w] = words[w * ROWS];
    const uint8_t *bytes = (const uint8_t *)row;
    if (bits == 8) memcpy(codes, bytes, (size_t)count);
    else
        for (int64_t k = 0; k < count / 2; k++) ((two *)codes)[k] = (uint16_t)((bytes[k] | bytes[k] << 4) & 0x0f0f);
    for (int64_t k = 0; k < count; k++) to[k] = ((float)codes[k] - zero) * scale;
}

INLINE void unpack_row(const int bits, const Packed *p, int64_t block, int64_t r, int64_t width, void *weight,
                       int64_t at, int dtype) {
    const int64_t groups = p->in_features / p->group_size;
    float values[RUN];
    for (int64_t first = 0; first < width;) {
        const int64_t group = first / p->group_size, end = (group + 1) * p->group_size;
        const int64_t count = end - first < RUN ? end - first : RUN;
        const int64_t there = width - first < count ? width - first : count;
        const int64_t place = (block * groups + group) * ROWS + r;
        const float zero = p->zeros ? p->zeros[place] : (float)(1 << (bits - 1));
        const uint32_t *words = words_at(bits, p, block, first) + r;
        if (count == RUN) unpack_run(bits, words, RUN, p->scales[place], zero, values);
        else unpack_run(bits, words, count, p->scales[place], zero, values);
        if (dtype == BFLOAT16)
            for (int64_t k = 0; k < there; k++) store(weight, at + first + k, BFLOAT16, values[k]);
        else memcpy((float *)weight + at + first, values, (size_t)there * sizeof *values);
        first += count;
    }
}

/* weight[out][width] of `dtype` from a packed one. */
void qwenfit_unpack(int bits, const Packed *p, int64_t width, void *weight, int dtype, int threads) {
    const int64_t blocks = (p->out_features + ROWS - 1) / ROWS;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t r = 0; r < ROWS && block * ROWS + r < p->out_features; r++) {
            const int64_t at = (block * ROWS + r) * width;
            if (bits == 4) unpack_row(4, p, block, r, width, weight, at, dtype);
            else unpack_row(8, p, block, r, width, weight, at, dtype);
        }
}
