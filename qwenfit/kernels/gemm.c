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
    /* In pieces of 32 inputs: turning rows into columns writes to a new cache line each time, and these 32 stay. */
    for (int64_t start = 0; start < count; start += 32) {
        const int64_t stop = start + 32 < count ? start + 32 : count;
        for (int64_t r = 0; r < ROWS; r++) {
            int64_t row = block * ROWS + r < p->out_features ? block * ROWS + r : p->out_features - 1;
            const uint16_t *source = (const uint16_t *)p->words + row * p->in_features + first;
            for (int64_t k = start; k < stop; k++) panel[k * ROWS + r] = from_bf16(source[k]);
        }
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
