/* Blocks of quantized GGUF types to float32 or bfloat16: gguf_blocks.h, for whole tensors. */
#include "gguf_blocks.h"

#define CHUNK 2048

/* `count` blocks of a ggml type -> 32 or 256 values each, float32 or bfloat16. 1 when the type is not known.
 *
 * bfloat16 by way of a few kilobytes of float32: a long loop rounds several times as fast as one a block. */
int qwenfit_gguf_blocks(int type, const uint8_t *blocks, int64_t count, void *out, int dtype) {
    const int nbytes = block_bytes(type), length = block_values(type);
    if (!nbytes) return 1;
    if (dtype == FLOAT32) {
        blocks_to_floats(type, blocks, count, out);
        return 0;
    }
    float values[CHUNK];
    for (int64_t first = 0; first < count; first += CHUNK / length) {
        const int64_t some = count - first < CHUNK / length ? count - first : CHUNK / length;
        blocks_to_floats(type, blocks + first * nbytes, some, values);
        uint16_t *restrict to = (uint16_t *)out + first * length;
        for (int64_t i = 0; i < some * length; i++) to[i] = to_bf16(values[i]);
    }
    return 0;
}
