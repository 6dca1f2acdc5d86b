/* Weights of 4 and 8 bits as the kernels read them, and the vectors they compute with.
 *
 * Plain C with GCC/Clang vector extensions: it compiles for any CPU, and -march=native decides the instructions.
 *
 * Packed layout: blocks of ROWS output rows. A 32-bit word holds 32/bits consecutive inputs of one row, lowest bits
 * first; words of the ROWS rows lie side by side: words[block][input / per_word][row]. One vector load thus feeds one
 * lane a row, and a sum over inputs needs no shuffle. scales and zeros: [block][group][row], float32.
 * w[row][k] = scale * (code - zero), so sum_k x*w = scale * (sum_k x*code - zero * sum_k x), one correction a group.
 */
#ifndef QWENFIT_PACKED_H
#define QWENFIT_PACKED_H

#include <stdlib.h>

#include "scalar.h"

#define ROWS 16
#if defined(__AVX512BW__)
#define LANES 16
#define TILE 12 /* rows of x whose sums stay in registers in gemm.c */
#elif defined(__AVX__)
#define LANES 8
#define TILE 6
#else
#define LANES 4
#define TILE 4
#endif
#define VECTORS (ROWS / LANES)
/* Weights that are read soon: a core's own prefetcher leaves a third to half of the memory's speed on some servers. */
#define AHEAD 4096 /* bytes */
#define PREFETCH(pointer) __builtin_prefetch((const char *)(pointer) + AHEAD)
#define UNROLL _Pragma("GCC unroll 16") /* the accumulators must become registers */

typedef float vfloat __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t vint __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vuint __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t two __attribute__((may_alias)); /* codes of a byte each */
typedef uint16_t vhalf __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

typedef struct {
    const void *words; /* or the bf16 weight itself, [out][in] */
    const float *scales, *zeros; /* zeros NULL: 2^(bits-1) throughout */
    int64_t out_features, in_features, group_size; /* in_features padded to whole groups */
} Packed;

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

/* The words of a block from input `first` on. */
INLINE const uint32_t *words_at(const int bits, const Packed *p, int64_t block, int64_t first) {
    const int per_word = 32 / bits;
    return (const uint32_t *)p->words + (block * (p->in_features / per_word) + first / per_word) * ROWS;
}

#endif
