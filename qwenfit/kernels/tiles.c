/* Products of bfloat16 by the tile instructions of x86 servers (AMX): panels of a packed or bf16 weight, made bf16 in
 * the caches in the layout of a tile, times x. A weight is read from memory once and never written to it.
 *
 * tdpbf16ps: C[16 rows][16 columns] of float32 += A[16 rows][32 inputs] times B[16 pairs of inputs][16 columns], a pair
 * being two bf16 in 32 bits (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18).
 * A tile of B is 16 rows of the weight: the lanes of the packed layout.
 */
#define _DEFAULT_SOURCE /* syscall */
#include "packed.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__) && defined(__x86_64__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define DEPTH 512 /* inputs of a panel: what A and B share stays in the caches next to the core */
#define STEP 32 /* inputs of a tile */
#define TILE_WORDS 256
#define PANEL_WORDS (DEPTH / STEP * TILE_WORDS) /* of ROWS output rows */
#define MOST_BLOCKS 8 /* of ROWS output rows for which a piece of x is fetched once */
#define MOST_ROWS 512 /* of x that a panel is kept for */

/* Linux grants the tiles' registers to a process that asks (Documentation/arch/x86/xstate.rst). */
int qwenfit_tiles_granted(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0; }

INLINE __m512i pair_of(__m512 even, __m512 odd) {
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* Inputs first .. first + count of a block, as tiles. */
INLINE void packed_tiles(const int bits, const Packed *p, int64_t block, int64_t first, int64_t count, uint32_t *to) {
    const int per_word = 32 / bits;
    const int64_t groups = p->in_features / p->group_size;
    const __m512i mask = _mm512_set1_epi32((1 << bits) - 1);
    for (int64_t k = 0; k < count; k += per_word) {
        const int64_t at = (block * groups + (first + k) / p->group_size) * ROWS;
        const __m512 s = _mm512_loadu_ps(p->scales + at), z = (__m512)zero_points(bits, p, at);
        const uint32_t *from = words_at(bits, p, block, first + k);
        __m512i word = _mm512_loadu_si512(from);
        PREFETCH(from);
        UNROLL for (int j = 0; j < per_word / 2; j++) {
            __m512 even = _mm512_cvtepi32_ps(_mm512_and_si512(word, mask));
            __m512 odd = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(word, bits), mask));
            even = _mm512_mul_ps(_mm512_sub_ps(even, z), s);
            odd = _mm512_mul_ps(_mm512_sub_ps(odd, z), s);
            _mm512_storeu_si512(to + (k / 2 + j) * ROWS, pair_of(even, odd));
            word = _mm512_srli_epi32(word, 2 * bits);
        }
    }
}

/* A tile from 16 rows of 32 bf16: 16 x 16 words turned, in rounds of neighbours 1, 2, 4 and 8 lanes apart. */
INLINE void turned_tile(const uint16_t *const *rows, int64_t k, __mmask32 there, uint32_t *to) {
    __m512i a[16], b[16];
    UNROLL for (int r = 0; r < 16; r++) {
        __builtin_prefetch(rows[r] + k + DEPTH, 0, 2); /* of the next panel */
        a[r] = _mm512_maskz_loadu_epi16(there, rows[r] + k);
    }
    UNROLL for (int r = 0; r < 16; r += 2) {
        b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
        b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
    }
    UNROLL for (int r = 0; r < 16; r += 4) {
        a[r] = _mm512_unpacklo_epi64(b[r], b[r + 2]);
        a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
        a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
        a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) { /* a[4j + i] has words i, 4 + i, 8 + i, 12 + i of rows 4j to 4j + 3 */
        __m512i even_low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
        __m512i odd_low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
        __m512i even_high = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
        __m512i odd_high = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
        _mm512_storeu_si512(to + i * ROWS, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
        _mm512_storeu_si512(to + (4 + i) * ROWS, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
        _mm512_storeu_si512(to + (8 + i) * ROWS, _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
        _mm512_storeu_si512(to + (12 + i) * ROWS, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
    }
}

INLINE void bf16_tiles(const Packed *p, int64_t block, int64_t first, int64_t count, uint32_t *to) {
    const uint16_t *rows[ROWS];
    for (int64_t r = 0; r < ROWS; r++) {
        int64_t row = block * ROWS + r < p->out_features ? block * ROWS + r : p->out_features - 1;
        rows[r] = (const uint16_t *)p->words + row * p->in_features + first;
    }
    for (int64_t k = 0; k < count; k += STEP) {
        __mmask32 there = count - k >= STEP ? 0xffffffffu : (1u << (count - k)) - 1;
        turned_tile(rows, k, there, to + k / 2 * ROWS);
    }
}

/* A whole panel of DEPTH or, at the end, fewer inputs; what is missing of the last tile is zero. */
static void fill(int bits, const Packed *p, int64_t block, int64_t first, int64_t count, uint32_t *to) {
    if (bits == 16) {
        bf16_tiles(p, block, first, count, to);
        return;
    }
    if (bits == 4) packed_tiles(4, p, block, first, count, to);
    else packed_tiles(8, p, block, first, count, to);
    if (count % STEP) memset(to + count / 2 * ROWS, 0, sizeof *to * (size_t)((STEP - count % STEP) / 2 * ROWS));
}

/* Palette 1: all eight tiles have 16 rows of 64 bytes. Constant, since GCC 12 takes the instruction to read 8 bytes of
 * it, and would not write the others. */
static const struct __attribute__((packed)) {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} CONFIG = {.palette = 1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};

/* A tile of A: ROWS rows of x, zero where x has none. */
static void x_tile(const uint16_t *x, int64_t rows, int64_t in_features, int64_t row, int64_t first, uint16_t *to) {
    for (int64_t r = 0; r < ROWS; r++) {
        const int64_t there = row + r >= rows || first >= in_features ? 0 : in_features - first;
        const __mmask32 mask = there >= STEP ? 0xffffffffu : (1u << there) - 1;
        _mm512_storeu_si512(to + r * STEP, _mm512_maskz_loadu_epi16(mask, x + (row + r) * in_features + first));
    }
}

/* sums [32 or 16][2 x 16] (rows `width` apart) += x times two panels. x: its tiles, those of the second 16 rows `apart`
 * elements after the first. */
INLINE void multiply(const int second, const uint16_t *x, int64_t apart, int64_t tiles, const uint32_t *panels,
                     float *sums, int64_t width) {
    const int row = (int)width * 4;
    __asm__ volatile("" ::: "memory"); /* GCC 12 does not see that _tile_loadd reads memory */
    _tile_loadd(0, sums, row);
    _tile_loadd(1, sums + 16, row);
    if (second) _tile_loadd(2, sums + 16 * width, row);
    if (second) _tile_loadd(3, sums + 16 * width + 16, row);
    for (int64_t t = 0; t < tiles; t++) {
        _tile_loadd(4, x + t * 2 * TILE_WORDS, 64);
        _tile_loadd(6, panels + t * TILE_WORDS, 64);
        _tile_loadd(7, panels + PANEL_WORDS + t * TILE_WORDS, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (!second) continue;
        _tile_loadd(5, x + apart + t * 2 * TILE_WORDS, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, row);
    _tile_stored(1, sums + 16, row);
    if (second) _tile_stored(2, sums + 16 * width, row);
    if (second) _tile_stored(3, sums + 16 * width + 16, row);
}

/* y[rows][out] = x[rows][in_features], bf16, times the weight, whose inputs are as many or, in whole groups, more.
 * `dtype` is that of y and bias. bits 4 or 8, or 16 for a weight [out][in] of bf16. Returns 1 when out of memory.
 *
 * x is laid out in tiles first: the rows of a tile taken from x itself would often lie a power of two apart, which is
 * the same few places of a cache. */
int qwenfit_tiles(int bits, const Packed *p, const uint16_t *x, int64_t rows, int64_t in_features, void *y,
                  const void *bias, int dtype, int threads) {
    const int64_t blocks = (p->out_features + ROWS - 1) / ROWS, x_blocks = (rows + ROWS - 1) / ROWS;
    const int64_t across = (p->in_features + STEP - 1) / STEP; /* tiles of a row */
    int64_t wide = MOST_BLOCKS; /* blocks of a panel: fewer where threads would have nothing to do */
    while (wide > 2 && blocks < 3 * wide * threads) wide /= 2;
    const int64_t width = wide * ROWS, panels = (blocks + wide - 1) / wide;
    const int64_t most = x_blocks * ROWS < MOST_ROWS ? x_blocks * ROWS : MOST_ROWS;
    uint16_t *in_tiles = aligned_alloc(64, (size_t)(x_blocks * across * TILE_WORDS * 4));
    if (!in_tiles) return 1;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *sums = aligned_alloc(64, sizeof(float) * (size_t)(most * width));
        uint32_t *panel = aligned_alloc(64, sizeof(uint32_t) * (size_t)(wide * PANEL_WORDS));
        if (!sums || !panel) {
#pragma omp atomic write
            failed = 1;
        }
        _tile_loadconfig(&CONFIG);
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < x_blocks * across; tile++)
            x_tile(x, rows, in_features, tile / across * ROWS, tile % across * STEP, in_tiles + tile * TILE_WORDS * 2);
#pragma omp for schedule(dynamic) nowait
        for (int64_t part = 0; part < panels; part++) {
            if (!sums || !panel) continue;
            const int64_t begin = part * wide, end = begin + wide < blocks ? begin + wide : blocks;
            for (int64_t row = 0; row < rows; row += most) {
                const int64_t some = rows - row < most ? rows - row : most, padded = (some + ROWS - 1) / ROWS * ROWS;
                memset(sums, 0, sizeof(float) * (size_t)(padded * width));
                for (int64_t first = 0; first < p->in_features; first += DEPTH) {
                    const int64_t count = p->in_features - first < DEPTH ? p->in_features - first : DEPTH;
                    const int64_t tiles = (count + STEP - 1) / STEP, apart = across * TILE_WORDS * 2;
                    for (int64_t b = begin; b < end; b++)
                        fill(bits, p, b, first, count, panel + (b - begin) * PANEL_WORDS);
                    for (int64_t m = 0; m < padded; m += 2 * ROWS) {
                        const uint16_t *from = in_tiles + ((row + m) / ROWS * across + first / STEP) * TILE_WORDS * 2;
                        for (int64_t b = 0; b < end - begin; b += 2) {
                            const uint32_t *two = panel + b * PANEL_WORDS;
                            float *to = sums + m * width + b * ROWS;
                            if (m + ROWS < padded) multiply(1, from, apart, tiles, two, to, width);
                            else multiply(0, from, apart, tiles, two, to, width);
                        }
                    }
                }
                for (int64_t m = 0; m < some; m++)
                    for (int64_t b = begin; b < end; b++)
                        store_rows(y, dtype, row + m, b * ROWS, p->out_features, sums + m * width + (b - begin) * ROWS,
                                   bias);
            }
        }
        _tile_release();
        free(sums);
        free(panel);
    }
    free(in_tiles);
    return failed;
}

#else

int qwenfit_tiles_granted(void) { return 0; }

int qwenfit_tiles(int bits, const Packed *p, const uint16_t *x, int64_t rows, int64_t in_features, void *y,
                  const void *bias, int dtype, int threads) {
    (void)bits, (void)p, (void)x, (void)rows, (void)in_features, (void)y, (void)bias, (void)dtype, (void)threads;
    return 1;
}

#endif
