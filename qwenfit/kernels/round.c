/* Weights, plain or in GGUF blocks, rounded to nearest, symmetric, straight into the packed layout (packed.h).
 *
 * The same numbers as quantize_rtn in PyTorch, bit for bit: scale = the value of largest magnitude, with its sign,
 * / -2^(bits-1); code = w / scale rounded half to even, + 2^(bits-1), at most 2^bits - 1. A group with a NaN gets the
 * scale NaN, so that the mistake shows in the logits.
 *
 * The ROWS rows of a block go together, some hundred inputs at a time: their scales are then one vector, and no row
 * waits for the scale of the one before it.
 */
#include <math.h>

#include "gguf_blocks.h"
#include "packed.h"

#define GROUP_MAX 1024
#define USUAL 128 /* the group whose loops are compiled for its length */
#define CHUNK 256 /* inputs fetched at once: whole groups of the usual length, whole blocks of any GGUF type */

/* The extremes of some values. As integers, positive floats are ordered as signed numbers and negative ones by their
 * magnitude as unsigned numbers: two integer maxima, which compilers vectorise where float maxima must mind NaNs. */
INLINE void extremes(const float *values, const int64_t count, int32_t *most, uint32_t *least) {
    int32_t high = 0;
    uint32_t low = 0x80000000u;
    for (int64_t k = 0; k < count; k++) {
        uint32_t u;
        memcpy(&u, values + k, 4);
        high = (int32_t)u > high ? (int32_t)u : high;
        low = u > low ? u : low;
    }
    *most = high;
    *least = low;
}

INLINE float scale_of(int32_t high, uint32_t low, const int bits) {
    uint32_t widest = (uint32_t)high > (low & 0x7fffffffu) ? (uint32_t)high : low;
    float value;
    memcpy(&value, &widest, 4);
    float scale = value / -(float)(1 << (bits - 1));
    scale = scale == 0.0f ? 1.0f : scale;
    return high > 0x7f800000 || low > 0xff800000u ? NAN : scale;
}

/* Adding 1.5 * 2^23 leaves the rounded integer in the low bits of the sum. */
INLINE uint32_t code_of(float quotient, const int bits) {
    const float shift = 12582912.0f + (float)(1 << (bits - 1));
    const uint32_t base = 0x4b400000u, top = (1u << bits) - 1;
    float sum = quotient + shift;
    uint32_t u;
    memcpy(&u, &sum, 4);
    u = u > base ? u - base : 0; /* below zero only where the scale is subnormal */
    return u < top ? u : top;
}

/* Dividing takes several times as long as multiplying by 1 / scale, which is off by two roundings, below 2^-15 for
 * quotients up to 128: only a group with a quotient that close to the middle of two codes is divided. */
INLINE void codes_of(const float *restrict values, const int64_t count, float scale, float inverse, const int bits,
                     uint8_t *restrict codes) {
    const float whole = 12582912.0f, middle = 0.5f - 0x1p-15f;
    int32_t doubtful = !(fabsf(inverse) > 0x1p-100f && fabsf(inverse) < 0x1p100f);
    for (int64_t k = 0; k < count; k++) {
        float quotient = values[k] * inverse, apart = quotient - ((quotient + whole) - whole);
        doubtful |= fabsf(apart) > middle;
        codes[k] = (uint8_t)code_of(quotient, bits);
    }
    if (doubtful)
        for (int64_t k = 0; k < count; k++) codes[k] = (uint8_t)code_of(values[k] / scale, bits);
}

/* Codes of a byte each to words, lowest first. */
INLINE void words_of(const uint8_t *restrict codes, const int64_t count, const int bits, uint32_t *restrict words) {
    uint8_t *restrict bytes = (uint8_t *)words;
    if (bits == 8) memcpy(bytes, codes, (size_t)count);
    else
        for (int64_t k = 0; k < count / 2; k++) {
            const uint16_t pair = ((const two *)codes)[k];
            bytes[k] = (uint8_t)(pair | pair >> 4);
        }
}

/* One group of ROWS rows that lie `stride` apart, `count` of its inputs being there. */
INLINE void round_group(const int bits, const float *values, int64_t stride, const int64_t count, const int64_t group,
                        uint32_t *words, float *scales) {
    int32_t high[ROWS];
    uint32_t low[ROWS], row_words[GROUP_MAX / 4];
    float inverse[ROWS];
    uint8_t codes[GROUP_MAX] __attribute__((aligned(64)));
    for (int r = 0; r < ROWS; r++) extremes(values + r * stride, count, high + r, low + r);
    for (int r = 0; r < ROWS; r++) {
        scales[r] = scale_of(high[r], low[r], bits);
        inverse[r] = 1.0f / scales[r];
    }
    for (int r = 0; r < ROWS; r++) {
        codes_of(values + r * stride, count, scales[r], inverse[r], bits, codes);
        memset(codes + count, 0, (size_t)(group - count));
        words_of(codes, group, bits, row_words);
        for (int64_t w = 0; w < group * bits / 32; w++) words[w * ROWS + r] = row_words[w];
    }
}

/* Inputs `begin` to `begin + count` of a row: plain of `dtype`, or in blocks of a ggml type. */
static void fetch(const void *rows, int dtype, int type, int64_t in_features, int64_t row, int64_t begin, int64_t count,
                  float *restrict values) {
    const int64_t from = row * in_features + begin;
    if (type) {
        const int length = block_values(type);
        blocks_to_floats(type, (const uint8_t *)rows + from / length * block_bytes(type), count / length, values);
    } else if (dtype == BFLOAT16) {
        for (int64_t k = 0; k < count; k++) values[k] = load(rows, from + k, BFLOAT16);
    } else {
        for (int64_t k = 0; k < count; k++) values[k] = load(rows, from + k, FLOAT32);
    }
}

INLINE void round_rows(const int bits, const void *rows, int dtype, int type, int64_t count, int64_t in_features,
                       int64_t group, uint32_t *words, float *scales) {
    float values[ROWS * GROUP_MAX];
    const int64_t chunk = group == USUAL ? CHUNK : group, padded = (in_features + group - 1) / group * group;
    for (int64_t row = 0; row < count; row += ROWS, words += padded * bits / 32 * ROWS) {
        const int64_t there = count - row < ROWS ? count - row : ROWS;
        memset(values, 0, sizeof *values * (size_t)(ROWS * chunk));
        uint32_t *to = words;
        for (int64_t begin = 0; begin < in_features; begin += chunk) {
            const int64_t end = in_features - begin < chunk ? in_features - begin : chunk;
            for (int64_t r = 0; r < there; r++)
                fetch(rows, dtype, type, in_features, row + r, begin, end, values + r * chunk);
            for (int64_t g = 0; g < end; g += group, to += group * bits / 32 * ROWS, scales += ROWS) {
                const int64_t some = end - g < group ? end - g : group;
                if (group == USUAL && some == USUAL) round_group(bits, values + g, chunk, USUAL, USUAL, to, scales);
                else round_group(bits, values + g, chunk, some, group, to, scales);
                for (int64_t r = there; r < ROWS; r++) { /* rows that only fill the last block */
                    for (int64_t w = 0; w < group * bits / 32; w++) to[w * ROWS + r] = 0;
                    scales[r] = 0.0f;
                }
            }
        }
    }
}

/* rows [count, in_features], plain of `dtype` (type 0) or in blocks of a ggml type, -> words and scales of
 * ceil(count / ROWS) blocks. 1 when the type is not known, `group` too large or not of whole blocks. */
int qwenfit_round(int bits, const void *rows, int dtype, int type, int64_t count, int64_t in_features, int64_t group,
                  uint32_t *words, float *scales) {
    if (group > GROUP_MAX) return 1;
    if (type && (!block_bytes(type) || in_features % block_values(type))) return 1;
    if (type && (group == USUAL ? CHUNK : group) % block_values(type)) return 1;
    if (bits == 4) round_rows(4, rows, dtype, type, count, in_features, group, words, scales);
    else round_rows(8, rows, dtype, type, count, in_features, group, words, scales);
    return 0;
}
