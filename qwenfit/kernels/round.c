/* Plain weights rounded to nearest, symmetric, straight into the packed layout (packed.h): one pass over the rows.
 *
 * The same numbers as quantize_rtn in PyTorch, bit for bit: scale = the value of largest magnitude, with its sign,
 * / -2^(bits-1); code = w / scale rounded half to even, + 2^(bits-1), at most 2^bits - 1. A group with a NaN gets the
 * scale NaN, so that the mistake shows in the logits.
 */
#include <math.h>

#include "packed.h"

#define GROUP_MAX 1024

/* The scale of `count` values. As integers, positive floats are ordered as signed numbers and negative ones by their
 * magnitude as unsigned numbers: two integer maxima, which compilers vectorise where float maxima must mind NaNs. */
INLINE float scale_of(const float *values, int64_t count, const int bits) {
    int32_t high = 0;
    uint32_t low = 0x80000000u;
    for (int64_t k = 0; k < count; k++) {
        uint32_t u;
        memcpy(&u, values + k, 4);
        high = (int32_t)u > high ? (int32_t)u : high;
        low = u > low ? u : low;
    }
    if (high > 0x7f800000 || low > 0xff800000u) return NAN;
    float most, least;
    memcpy(&most, &high, 4);
    memcpy(&least, &low, 4);
    float scale = (most > -least ? most : least) / -(float)(1 << (bits - 1));
    return scale == 0.0f ? 1.0f : scale;
}

/* Adding 1.5 * 2^23 leaves the rounded integer in the low bits of the sum. */
INLINE void codes_of(const float *values, int64_t count, float scale, const int bits, uint32_t *codes) {
    const float shift = 12582912.0f + (float)(1 << (bits - 1));
    const uint32_t base = 0x4b400000u, top = (1u << bits) - 1;
    for (int64_t k = 0; k < count; k++) {
        float sum = values[k] / scale + shift;
        uint32_t u;
        memcpy(&u, &sum, 4);
        u -= base;
        codes[k] = u < top ? u : top;
    }
}

/* One row of a block: its words lie ROWS apart, its scales too. */
INLINE void round_row(const int bits, const void *row, int dtype, int64_t first, int64_t in_features, int64_t group,
                      int64_t groups, uint32_t *words, float *scales) {
    const int per_word = 32 / bits;
    float values[GROUP_MAX];
    uint32_t codes[GROUP_MAX];
    for (int64_t g = 0; g < groups; g++) {
        int64_t begin = g * group, count = in_features - begin < group ? in_features - begin : group;
        for (int64_t k = 0; k < count; k++) values[k] = load(row, first + begin + k, dtype);
        float scale = scale_of(values, count, bits);
        codes_of(values, count, scale, bits, codes);
        memset(codes + count, 0, (size_t)(group - count) * sizeof *codes);
        scales[g * ROWS] = scale;
        for (int64_t w = 0; w < group / per_word; w++) {
            uint32_t word = 0;
            for (int i = 0; i < per_word; i++) word |= codes[w * per_word + i] << (bits * i);
            words[(begin / per_word + w) * ROWS] = word;
        }
    }
}

INLINE void round_rows(const int bits, const void *rows, int dtype, int64_t count, int64_t in_features, int64_t group,
                       uint32_t *words, float *scales) {
    const int64_t groups = (in_features + group - 1) / group, width = groups * group * bits / 32;
    for (int64_t row = 0; row < (count + ROWS - 1) / ROWS * ROWS; row++) {
        uint32_t *to = words + row / ROWS * width * ROWS + row % ROWS;
        float *scale = scales + row / ROWS * groups * ROWS + row % ROWS;
        if (row < count) {
            round_row(bits, rows, dtype, row * in_features, in_features, group, groups, to, scale);
            continue;
        }
        for (int64_t w = 0; w < width; w++) to[w * ROWS] = 0; /* rows that only fill the last block */
        for (int64_t g = 0; g < groups; g++) scale[g * ROWS] = 0.0f;
    }
}

/* rows [count, in_features] -> words and scales of ceil(count / ROWS) blocks. 1 when `group` is too large. */
int qwenfit_round(int bits, const void *rows, int dtype, int64_t count, int64_t in_features, int64_t group,
                  uint32_t *words, float *scales) {
    if (group > GROUP_MAX) return 1;
    if (bits == 4 && dtype == BFLOAT16) round_rows(4, rows, BFLOAT16, count, in_features, group, words, scales);
    else if (bits == 4) round_rows(4, rows, FLOAT32, count, in_features, group, words, scales);
    else if (dtype == BFLOAT16) round_rows(8, rows, BFLOAT16, count, in_features, group, words, scales);
    else round_rows(8, rows, FLOAT32, count, in_features, group, words, scales);
    return 0;
}
