/* What the kernels read and write: float32 or bfloat16, computed with as float32. */
#ifndef QWENFIT_SCALAR_H
#define QWENFIT_SCALAR_H

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32 = 0, BFLOAT16 = 1 };

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

INLINE float rounded(float value, int dtype) { return dtype == BFLOAT16 ? from_bf16(to_bf16(value)) : value; }

#endif
