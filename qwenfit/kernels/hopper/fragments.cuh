// What wgmma reads in shared memory, and what of its result a thread has.
#pragma once

// A tile of 128-byte rows, its 16-byte pieces placed by the copy engine's swizzle, for wgmma.
__device__ inline u64 described(u32 at) {
    return (u64)((at & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
// The same of a tile whose columns, not rows, are those of the product: 64, and the next 64 so many bytes behind.
__device__ inline u64 described_across(u32 at, u32 bytes) {
    return (u64)((at & 0x3FFFF) >> 4) | (u64)(bytes >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// The sums of a thread are two neighbours of every eight columns, the other six are those of the next three threads.
// Here each gets what all four have of one of four eights: neighbours in memory, to be stored at once.
__device__ inline void exchange(u32 (&words)[4], int lane) {
#pragma unroll
    for (int apart = 1; apart <= 2; apart++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32 &low = words[apart == 1 ? 2 * i : i], &high = words[apart == 1 ? 2 * i + 1 : i + 2];
            u32 got = __shfl_xor_sync(~0u, lane & apart ? low : high, apart);
            (lane & apart ? low : high) = got;
        }
}
