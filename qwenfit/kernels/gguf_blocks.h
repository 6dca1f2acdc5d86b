/* Blocks of quantized GGUF types to float32: the numbers of the `gguf` package, bit for bit.
 *
 * A block holds 32 or 256 values of a row. Products are exact in float32 (11 bits of a scale, 7 of its own scale, 6 of
 * a code), so each value is rounded at most once, fused multiply-adds or not. Loops are over 16 or 32 values of one
 * scale, which compilers vectorise (vector types of their own are slower: GCC 12 converts them lane by lane). Nothing
 * in a block is an index or a size: any bytes are numbers.
 */
#ifndef QWENFIT_GGUF_BLOCKS_H
#define QWENFIT_GGUF_BLOCKS_H

#include "scalar.h"

enum { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14 };

INLINE float from_f16(const uint8_t *bytes) {
    uint16_t half;
    memcpy(&half, bytes, 2);
    uint32_t rest = half & 0x7fffu, sign = (uint32_t)(half & 0x8000u) << 16, bits = rest << 13;
    if (rest >= 0x7c00u) bits |= 0x7f800000u; /* infinite, or no number */
    else {
        float value;
        memcpy(&value, &bits, 4);
        value *= 0x1p112f; /* the exponents' biases differ by 112; right for subnormal halves too */
        memcpy(&bits, &value, 4);
    }
    bits |= sign;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* d, [m,] [32 high bits,] 16 bytes of two low halves: value i in the low four bits, i + 16 in the high ones. */
INLINE void legacy(const uint8_t *restrict block, float *restrict y, const int high, const int minimum) {
    const float d = from_f16(block), m = minimum ? from_f16(block + 2) : 0.0f;
    const uint8_t *codes = block + 2 + 2 * minimum + 4 * high;
    const int middle = minimum ? 0 : high ? 16 : 8;
    uint32_t fifth = 0;
    if (high) memcpy(&fifth, codes - 4, 4);
    for (int i = 0; i < 16; i++) {
        int low = codes[i] & 15, up = codes[i] >> 4;
        if (high) low |= (int)(fifth >> i & 1) << 4, up |= (int)(fifth >> (i + 16) & 1) << 4;
        y[i] = d * (float)(low - middle);
        y[i + 16] = d * (float)(up - middle);
    }
    if (minimum)
        for (int i = 0; i < 32; i++) y[i] += m;
}

INLINE void q8_0(const uint8_t *restrict block, float *restrict y) {
    const float d = from_f16(block);
    const int8_t *codes = (const int8_t *)block + 2;
    for (int i = 0; i < 32; i++) y[i] = (float)codes[i] * d;
}

/* 16 scales of 4 bits with 4 of the minimum, 64 bytes of four codes, d, dmin. */
INLINE void q2_k(const uint8_t *restrict block, float *restrict y) {
    const uint8_t *scales = block, *codes = block + 16;
    const float d = from_f16(block + 80), dmin = from_f16(block + 82);
    for (int part = 0; part < 16; part++) {
        const float scale = d * (float)(scales[part] & 15), m = dmin * (float)(scales[part] >> 4);
        const uint8_t *from = codes + part / 8 * 32 + part % 2 * 16;
        const int shift = part % 8 / 2 * 2;
        for (int i = 0; i < 16; i++) y[part * 16 + i] = scale * (float)(from[i] >> shift & 3) - m;
    }
}

/* 32 bytes of high bits, 64 of four low codes, 12 of 16 scales of 6 bits, d. */
INLINE void q3_k(const uint8_t *restrict block, float *restrict y) {
    const uint8_t *high = block, *codes = block + 32, *scales = block + 96;
    const float d = from_f16(block + 108);
    for (int part = 0; part < 16; part++) {
        const int low4 = part < 8 ? scales[part] & 15 : scales[part - 8] >> 4;
        const float scale = d * (float)((low4 | (scales[8 + part % 4] >> part / 4 * 2 & 3) << 4) - 32);
        const uint8_t *from = codes + part / 8 * 32 + part % 2 * 16, *bits = high + part % 2 * 16;
        const int shift = part % 8 / 2 * 2, bit = part / 2;
        for (int i = 0; i < 16; i++)
            y[part * 16 + i] = scale * (float)((from[i] >> shift & 3) - 4 + ((bits[i] >> bit & 1) << 2));
    }
}

/* d, dmin, 12 bytes of 8 scales and 8 minima of 6 bits, [32 bytes of fifth bits,] 128 bytes of two codes. */
INLINE void q4_or_q5_k(const uint8_t *restrict block, float *restrict y, const int high) {
    const float d = from_f16(block), dmin = from_f16(block + 2);
    const uint8_t *s = block + 4, *bits = block + 16, *codes = block + 16 + 32 * high;
    for (int part = 0; part < 8; part++) {
        const int j = part % 4;
        const int scale6 = part < 4 ? s[j] & 63 : (s[8 + j] & 15) | (s[j] >> 2 & 48);
        const int minimum6 = part < 4 ? s[4 + j] & 63 : s[8 + j] >> 4 | (s[4 + j] >> 2 & 48);
        const float scale = d * (float)scale6, m = dmin * (float)minimum6;
        const uint8_t *from = codes + part / 2 * 32;
        const int shift = part % 2 * 4;
        for (int i = 0; i < 32; i++) {
            int code = from[i] >> shift & 15;
            if (high) code |= (bits[i] >> part & 1) << 4;
            y[part * 32 + i] = scale * (float)code - m;
        }
    }
}

/* 128 bytes of two low codes, 64 of four high ones, 16 signed scales, d. */
INLINE void q6_k(const uint8_t *restrict block, float *restrict y) {
    const uint8_t *low = block, *high = block + 128;
    const int8_t *scales = (const int8_t *)block + 192;
    const float d = from_f16(block + 208);
    for (int part = 0; part < 16; part++) {
        const float scale = d * (float)scales[part];
        const int half = part / 8, quarter = part % 8 / 2, begin = part % 2 * 16;
        const uint8_t *from = low + half * 64 + quarter % 2 * 32 + begin, *bits = high + half * 32 + begin;
        for (int i = 0; i < 16; i++) {
            int code = (from[i] >> quarter / 2 * 4 & 15) | (bits[i] >> quarter * 2 & 3) << 4;
            y[part * 16 + i] = scale * (float)(code - 32);
        }
    }
}

/* Bytes of a block, and 32 or 256 values; 0 bytes when the type is not known. */
INLINE int block_bytes(int type) {
    switch (type) {
    case Q4_0: return 18;
    case Q4_1: return 20;
    case Q5_0: return 22;
    case Q5_1: return 24;
    case Q8_0: return 34;
    case Q2_K: return 84;
    case Q3_K: return 110;
    case Q4_K: return 144;
    case Q5_K: return 176;
    case Q6_K: return 210;
    }
    return 0;
}

INLINE int block_values(int type) { return type < Q2_K ? 32 : 256; }

#define EACH_BLOCK(call)                                                                                               \
    for (int64_t b = 0; b < count; b++, blocks += nbytes, y += length) call;                                           \
    break

/* `count` blocks that follow each other. */
static void blocks_to_floats(int type, const uint8_t *restrict blocks, int64_t count, float *restrict y) {
    const int nbytes = block_bytes(type), length = block_values(type);
    switch (type) {
    case Q4_0: EACH_BLOCK(legacy(blocks, y, 0, 0));
    case Q4_1: EACH_BLOCK(legacy(blocks, y, 0, 1));
    case Q5_0: EACH_BLOCK(legacy(blocks, y, 1, 0));
    case Q5_1: EACH_BLOCK(legacy(blocks, y, 1, 1));
    case Q8_0: EACH_BLOCK(q8_0(blocks, y));
    case Q2_K: EACH_BLOCK(q2_k(blocks, y));
    case Q3_K: EACH_BLOCK(q3_k(blocks, y));
    case Q4_K: EACH_BLOCK(q4_or_q5_k(blocks, y, 0));
    case Q5_K: EACH_BLOCK(q4_or_q5_k(blocks, y, 1));
    case Q6_K: EACH_BLOCK(q6_k(blocks, y));
    }
}

#endif
