// y = x w^T by a Hopper's tensor cores: x [rows, inputs] and w [outputs, inputs] are bfloat16, sums are float32.
//
// A program multiplies all rows of x by COLUMNS rows of w, block by block of 64 inputs. Two threads have the copy engine
// bring the blocks, as many ahead as shared memory holds, one w, which may be on its way before the kernel before this
// one is done, and one x; groups of 128 threads multiply 64 rows each. Where there are too few tiles for the card, SPLITS
// programs of a cluster take a part of the inputs each, and exchange sums through shared memory.
//
// Defined by the host: ROWS (of x, or more: a multiple of 32), COLUMNS, SPLITS, BLOCKS (in shared memory), GATED, WIDE
// (y is float32), ADD (to y), BIAS, EARLY (w comes before the kernel before is done), and `wgmma`, one product of 64
// rows, COLUMNS and 16 inputs.

constexpr int GROUPS = (ROWS + 63) / 64, THREADS = 128 * GROUPS;  // that multiply; two warps bring
constexpr int INPUTS = 64, X_BYTES = ROWS * 128, W_BYTES = COLUMNS * 128, BYTES = X_BYTES + W_BYTES;  // of a block
constexpr int OUTPUTS = GATED ? COLUMNS / 2 : COLUMNS;  // columns of y of a tile
static_assert(SPLITS == 1 || !GATED, "parts of a gate are not added up");
static_assert(COLUMNS % (GATED ? 16 : 8) == 0 && ROWS % 32 == 0 && 64 * GROUPS - ROWS <= COLUMNS, "see Layout");

// The first column of a tile of y, and the first that is its own: the last tile overlaps with the one before, as the
// copy engine is to fill up nothing.
struct Tile { int column, own; };

__device__ inline Tile tile_of(int job, int outputs) {
    return {min(job * OUTPUTS, outputs - OUTPUTS), job * OUTPUTS};
}

// The blocks in shared memory, which come and go in turn: `full` when one is there, `empty` when it has been multiplied.
struct Ring {
    u32 base, turn = 0, round = 0;  // the first block, that whose turn it is, and the parity of the round
    __device__ explicit Ring(u32 first) : base(first) {}
    __device__ u32 x() const { return base + turn * BYTES; }
    __device__ u32 w() const { return x() + X_BYTES; }
    __device__ u32 full() const { return base + BLOCKS * BYTES + 16 * turn; }
    __device__ u32 empty() const { return full() + 8; }
    __device__ void next() {
        if (++turn == BLOCKS) turn = 0, round ^= 1;
    }
};

__device__ inline float gate(float g, float up) { return g / (1.0f + __expf(-g)) * up; }

__device__ inline void add_bias(const u16* bias, int column, float& a, float& b) {
    if (!BIAS) return;
    u32 both = __ldg((const u32*)(bias + column));
    a += bf16_float((u16)both), b += bf16_float((u16)(both >> 16));
}

// Four neighbours of a row of float32 y, from `at` on.
__device__ inline void store_wide(float* at, float4 v) {
    if (ADD) add_to_memory(at, v);
    else *(float4*)at = v;
}

// What a thread has of a row of y's tile: OUTPUTS / 8 pairs, eight columns apart. `here`: the row exists.
template <typename Pair>
__device__ inline void store_row(void* y, size_t row, bool here, Tile tile, int outputs, int lane, Pair pair) {
    constexpr int EIGHTS = OUTPUTS / 8, WHOLE = WIDE ? EIGHTS / 2 * 2 : EIGHTS / 4 * 4;
    const int quarter = lane % 4, column = tile.column, first = tile.own;
    if (WIDE) {
#pragma unroll
        for (int i = 0; i < WHOLE; i += 2) {  // two threads exchange two pairs: each has four neighbours
            float2 keep = pair(i), give = pair(i + 1);
            if (quarter & 1) { float2 other = keep; keep = give, give = other; }
            give.x = __shfl_xor_sync(~0u, give.x, 1), give.y = __shfl_xor_sync(~0u, give.y, 1);
            int at = column + 8 * (i + (quarter & 1)) + 2 * (quarter & 2);
            float4 four = quarter & 1 ? make_float4(give.x, give.y, keep.x, keep.y)
                                      : make_float4(keep.x, keep.y, give.x, give.y);
            if (here && at >= first) store_wide((float*)y + row * outputs + at, four);
        }
        if (EIGHTS > WHOLE) {
            float2 keep = pair(WHOLE), other;
            other.x = __shfl_xor_sync(~0u, keep.x, 1), other.y = __shfl_xor_sync(~0u, keep.y, 1);
            int at = column + 8 * WHOLE + 2 * quarter;
            if (here && at >= first && !(quarter & 1))
                store_wide((float*)y + row * outputs + at, make_float4(keep.x, keep.y, other.x, other.y));
        }
    } else {
#pragma unroll
        for (int i = 0; i < WHOLE; i += 4) {
            u32 words[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float2 two = pair(i + j);
                words[j] = bf16_pair(two.x, two.y);
            }
            exchange(words, lane);
            int at = column + 8 * (i + quarter);
            if (here && at >= first)
                *(uint4*)((u16*)y + row * outputs + at) = make_uint4(words[0], words[1], words[2], words[3]);
        }
#pragma unroll
        for (int i = WHOLE; i < EIGHTS; i++) {
            float2 two = pair(i);
            int at = column + 8 * i + 2 * quarter;
            if (here && at >= first) *(u32*)((u16*)y + row * outputs + at) = bf16_pair(two.x, two.y);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS + 64, 1)
hopper_product(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, void* y, const u16* bias,
               int rows, int outputs, int blocks, int jobs, int brought) {
    const u32 base = shared_base(), split = SPLITS > 1 ? cluster_rank() : 0;
    const int thread = threadIdx.x, first = blocks * split / SPLITS, last = blocks * (split + 1) / SPLITS;
    const int mine = blockIdx.x / SPLITS, programs = gridDim.x / SPLITS;
    Ring ring(base);
    if (thread == 0) {
        for (int i = 0; i < BLOCKS; i++, ring.next()) {
            barrier_init(ring.full(), 2);
            barrier_init(ring.empty(), GROUPS);
        }
        barriers_visible();
    }
    ring = Ring(base);
    __syncthreads();

    if (thread >= THREADS) {
        if (thread == THREADS) {  // brings w
            prefetch_map(&w);
            if (!EARLY) wait_for_previous();
            for (int job = mine; job < jobs; job += programs) {
                Tile tile = tile_of(job, outputs);
                for (int block = first; block < last; block++, ring.next()) {
                    barrier_wait(ring.empty(), ring.round ^ 1);
                    barrier_expect(ring.full(), W_BYTES);
                    copy_tile(ring.w(), &w, block * INPUTS, tile.column, ring.full());
                    if (GATED)
                        copy_tile(ring.w() + W_BYTES / 2, &w, block * INPUTS, outputs + tile.column, ring.full());
                }
            }
        } else if (thread == THREADS + 32) {  // brings x
            prefetch_map(&x);
            wait_for_previous();
            start_next();
            for (int job = mine; job < jobs; job += programs)
                for (int block = first; block < last; block++, ring.next()) {
                    barrier_wait(ring.empty(), ring.round ^ 1);
                    barrier_expect(ring.full(), brought * 128);
                    copy_tile(ring.x(), &x, block * INPUTS, 0, ring.full());
                }
        }
        __syncwarp();  // else the others of the warp wait below, each time before this thread goes on
        if (SPLITS > 1) cluster_sync();
    } else {
        wait_for_previous();
        const int group = thread / 128, warp = thread / 32 % 4, lane = thread % 32;
        const int row = group * 64 + warp * 16 + lane / 4;  // of the sums; others are eight rows below
        float sums[COLUMNS / 2];
        for (int job = mine; job < jobs; job += programs) {
            u32 multiplied = 0;
            for (int block = first; block < last; block++, ring.next()) {
                barrier_wait(ring.full(), ring.round);
                u64 of_x = described(ring.x() + group * 64 * 128), of_w = described(ring.w());
                wgmma_begin();
#pragma unroll
                for (int k = 0; k < INPUTS / 16; k++) wgmma(sums, of_x + 2 * k, of_w + 2 * k, block > first || k > 0);
                wgmma_commit();
                if (block > first) {  // the one before is done then
                    wgmma_wait<1>();
                    if (thread % 128 == 0) barrier_arrive(multiplied);
                }
                multiplied = ring.empty();
            }
            wgmma_wait<0>();
            if (thread % 128 == 0) barrier_arrive(multiplied);
#pragma unroll
            for (int i = 0; i < COLUMNS / 2; i++) only_from_here(sums[i]);

            Tile tile = tile_of(job, outputs);
            if (SPLITS == 1) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    auto pair = [&](int i) {
                        const int at = 4 * i + 2 * half, column = tile.column + 8 * i + 2 * (lane % 4);
                        float a = sums[at], b = sums[at + 1];
                        add_bias(bias, column, a, b);
                        if (GATED) {
                            float up_a = sums[COLUMNS / 4 + at], up_b = sums[COLUMNS / 4 + at + 1];
                            add_bias(bias, outputs + column, up_a, up_b);
                            a = gate(a, up_a), b = gate(b, up_b);
                        }
                        return make_float2(a, b);
                    };
                    store_row(y, row + 8 * half, row + 8 * half < rows, tile, outputs, lane, pair);
                }
            } else {  // one job a cluster
                constexpr int PITCH = COLUMNS + 8;  // floats; a warp's rows begin at different banks
                constexpr int EACH = (64 * GROUPS + SPLITS - 1) / SPLITS, PIECES = COLUMNS / 4;  // to be added up
                named_barrier(1, THREADS);  // all have read the last block
                float* own = shared_floats(base);
#pragma unroll
                for (int half = 0; half < 2; half++)
#pragma unroll
                    for (int i = 0; i < COLUMNS / 8; i++)
                        *(float2*)(own + (row + 8 * half) * PITCH + 8 * i + 2 * (lane % 4)) =
                            make_float2(sums[4 * i + 2 * half], sums[4 * i + 2 * half + 1]);
                cluster_sync();
                for (int i = thread; i < EACH * PIECES; i += THREADS) {
                    int its = (int)split * EACH + i / PIECES, column = tile.column + i % PIECES * 4;
                    if (its >= rows || column < tile.own) continue;
                    u32 at = base + (its * PITCH + i % PIECES * 4) * 4;
                    float4 sum = load_peer(peer(at, 0));
#pragma unroll
                    for (int part = 1; part < SPLITS; part++) {
                        float4 more = load_peer(peer(at, part));
                        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
                    }
                    add_bias(bias, column, sum.x, sum.y), add_bias(bias, column + 2, sum.z, sum.w);
                    size_t total = (size_t)its * outputs + column;
                    if (WIDE) store_wide((float*)y + total, sum);
                    else *(uint2*)((u16*)y + total) = make_uint2(bf16_pair(sum.x, sum.y), bf16_pair(sum.z, sum.w));
                }
            }
        }
    }
    if (SPLITS > 1) cluster_meet();  // none leaves while another may still read its shared memory
}
