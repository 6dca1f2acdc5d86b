// Causal attention of prompts by a Hopper's tensor cores, after FlashAttention-3 (arXiv 2407.08608); what is computed is
// defined in triton/prompt_attention.py.
//
// A program takes one tile of 128 queries of a head after the other. Of its warps, one has the copy engine bring keys and
// values, three bring queries, those of the next tile while this one is attended to, and two groups of four attend, 64
// queries each: while the tensor cores multiply for one, the other takes its exponentials, and either has the scores of
// the next block of keys multiplied beside those of this one.
//
// Defined by the host: DIM, 64 or 128 numbers of a head, and `wgmma` and `wgmma_held`, one product of 64 rows with 128
// keys and with DIM numbers of values.

constexpr int GROUPS = 2, QUERIES = 64 * GROUPS, KEYS = 128;
constexpr int THREADS = 128 * GROUPS, LOADERS = 96;           // that attend, and that bring queries
constexpr u32 PART = 128 * 128, BYTES = DIM / 64 * PART;      // of a tile: 64 numbers of 128 rows, and all of them
constexpr u32 BARRIERS = 6 * BYTES, JOBS = BARRIERS + 96;     // they lie behind two tiles each of queries, keys, values
constexpr float HIDDEN = -1e30f;
static_assert(DIM == 64 || DIM == 128, "see DIM");

// Tiles of one kind, which come and go in turn in room for two.
struct Tiles {
    u32 base, barriers, count = 0;  // count: that have been there before
    __device__ Tiles(u32 shared, int kind) : base(shared + 2 * kind * BYTES), barriers(shared + BARRIERS + 32 * kind) {}
    __device__ u32 tile() const { return base + count % 2 * BYTES; }
    __device__ u32 full() const { return barriers + count % 2 * 16; }
    __device__ u32 empty() const { return full() + 8; }
    __device__ void wait_full() const { barrier_wait(full(), count / 2 % 2); }
    __device__ void wait_empty() const { barrier_wait(empty(), count / 2 % 2 ^ 1); }
};

struct Prompts {
    const int *query_starts, *context_starts, *tiles, *before;
    int heads, jobs, rows;
};

// A tile of queries of one head: its first row of q, its rows, the prompt's first row of k and its keys, how many the
// first query sees besides its own, and blocks of keys that any of them sees: none where the prompt has no such queries.
struct alignas(16) Job { int head, row, rows, keys, context, seen, blocks; };

__device__ inline Job job_of(const Prompts& p, int number, int first) {
    const int prompt = p.tiles[number / p.heads * 2];
    const int begin = p.query_starts[prompt], queries = p.query_starts[prompt + 1] - begin;
    const int keys = p.context_starts[prompt], context = p.context_starts[prompt + 1] - keys;
    const int rows = min(QUERIES, queries - first), seen = context - queries + first;
    const int row = begin + first + (p.before ? *p.before : 0);
    return {number % p.heads, row, rows, keys, context, seen, rows > 0 ? (seen + rows + KEYS - 1) / KEYS : 0};
}

// The jobs of a program, of which the first are the longest: every second round is dealt in the opposite order. A tile
// that begins behind all rows ends the list.
template <typename Attend> __device__ inline void each_job(const Prompts& p, Attend attend) {
    const int programs = gridDim.x, me = blockIdx.x;
    for (int first = 0, round = 0; first < p.jobs; first += programs, round ^= 1) {
        int number = first + (round ? programs - 1 - me : me);
        if (number >= p.jobs) continue;
        const int begins = p.tiles[number / p.heads * 2 + 1];
        if (begins >= p.rows) break;
        Job job = job_of(p, number, begins);
        if (job.blocks) attend(job);
    }
}

// Eight numbers of a query and their partners, half a head behind.
struct Piece {
    uint4 a, b;
    float4 cos[2], sin[2];
    float factor;
};
__device__ inline u32 turned(u32 mine, u32 other, float c0, float c1, float s0, float s1, float factor, bool scaled) {
    float x = bf16_float((u16)mine) * c0 + bf16_float((u16)other) * s0;
    float y = bf16_float((u16)(mine >> 16)) * c1 + bf16_float((u16)(other >> 16)) * s1;
    u32 both = bf16_pair(x, y);
    return scaled ? bf16_pair(bf16_float((u16)both) * factor, bf16_float((u16)(both >> 16)) * factor) : both;
}
__device__ inline void rotate(Piece& p, bool scaled) {  // and scale, each rounded to bfloat16
    const uint4 a = p.a, b = p.b;
    const float4 c = p.cos[0], d = p.cos[1], s = p.sin[0], t = p.sin[1];
    p.a.x = turned(a.x, b.x, c.x, c.y, -s.x, -s.y, p.factor, scaled);
    p.a.y = turned(a.y, b.y, c.z, c.w, -s.z, -s.w, p.factor, scaled);
    p.a.z = turned(a.z, b.z, d.x, d.y, -t.x, -t.y, p.factor, scaled);
    p.a.w = turned(a.w, b.w, d.z, d.w, -t.z, -t.w, p.factor, scaled);
    p.b.x = turned(b.x, a.x, c.x, c.y, s.x, s.y, p.factor, scaled);
    p.b.y = turned(b.y, a.y, c.z, c.w, s.z, s.w, p.factor, scaled);
    p.b.z = turned(b.z, a.z, d.x, d.y, t.x, t.y, p.factor, scaled);
    p.b.w = turned(b.w, a.w, d.z, d.w, t.z, t.w, p.factor, scaled);
}
__device__ inline void store_piece(u32 tile, int row, int column, uint4 piece) {
    u32 at = tile + column / 64 * PART + row * 128 + ((column % 64 / 8 ^ row % 8) << 4);
    *(uint4*)shared_floats(at) = piece;
}

// Scores become weights, relative to the highest so far; `shrink` is by what the sums so far are to be multiplied. A
// thread has two rows, eight apart. Of the first one it sees columns up to `limit`, counted from its own first column.
template <bool MASKED>
__device__ inline void weigh(float (&s)[64], float (&top)[2], float (&total)[2], float (&shrink)[2], float scale,
                             int limit) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float highest = top[half];
#pragma unroll
        for (int i = 0; i < 16; i++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float& score = s[4 * i + 2 * half + e];
                if (MASKED && 8 * i + e > limit + 8 * half) score = HIDDEN;
                highest = max(highest, score);
            }
        highest = max(highest, __shfl_xor_sync(~0u, highest, 1));
        highest = max(highest, __shfl_xor_sync(~0u, highest, 2));
        shrink[half] = power_of_two((top[half] - highest) * scale);
        top[half] = highest;
        const float from = highest * scale;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 16; i++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float& score = s[4 * i + 2 * half + e];
                score = power_of_two(score * scale - from);
                sum += score;
            }
        total[half] = total[half] * shrink[half] + sum;
    }
}

// Registers of a thread: 168 at the start, of which those that bring leave some to those that attend.
extern "C" __global__ void __launch_bounds__(THREADS + 128, 1)
hopper_attention(const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, const u16* q, u16* out,
                 const float* cos, const float* sin, const u16* query_scale, const int* query_starts,
                 const int* context_starts, const int* tiles, const int* before, long long q_stride, float scale,
                 int heads, int group, int jobs, int rows) {
    const u32 base = shared_base();
    const int thread = threadIdx.x;
    const Prompts prompts = {query_starts, context_starts, tiles, before, heads, jobs, rows};
    Tiles queries(base, 0), keys(base, 1), values(base, 2);
    if (thread == 0) {
        for (int i = 0; i < 2; i++, queries.count++, keys.count++, values.count++) {
            barrier_init(queries.full(), LOADERS), barrier_init(keys.full(), 1), barrier_init(values.full(), 1);
            barrier_init(queries.empty(), 4 * GROUPS), barrier_init(keys.empty(), GROUPS);  // by warps: they read the job
            barrier_init(values.empty(), GROUPS);
        }
        barriers_visible();
    }
    queries.count = keys.count = values.count = 0;
    auto shared_job = [&] { return (Job*)shared_floats(base + JOBS + queries.count % 2 * sizeof(Job)); };
    __syncthreads();
    wait_for_previous();

    if (thread >= THREADS) {
        fewer_registers<88>();
        if (thread == THREADS) {
            start_next();
            each_job(prompts, [&](const Job& job) {
                const int column = job.head / group * DIM;
                for (int block = 0; block < job.blocks; block++, keys.count++, values.count++) {
                    const int row = job.keys + block * KEYS;
                    keys.wait_empty();
                    barrier_expect(keys.full(), BYTES);
                    for (int part = 0; part < DIM / 64; part++)
                        copy_tile(keys.tile() + part * PART, &k, column + 64 * part, row, keys.full());
                    values.wait_empty();
                    barrier_expect(values.full(), BYTES);
                    for (int part = 0; part < DIM / 64; part++)
                        copy_tile(values.tile() + part * PART, &v, column + 64 * part, row, values.full());
                }
            });
        } else if (thread >= THREADS + 32) {
            const int mine = thread - THREADS - 32;
            each_job(prompts, [&](const Job& job) {
                constexpr int OF_ROW = DIM / 16, PIECES = QUERIES * OF_ROW, AT_ONCE = 2;
                queries.wait_empty();
                if (mine == 0) *shared_job() = job;
                for (int first = mine; first < PIECES; first += AT_ONCE * LOADERS) {
                    Piece pieces[AT_ONCE];
#pragma unroll
                    for (int i = 0; i < AT_ONCE; i++) {
                        const int number = first + i * LOADERS, row = number / OF_ROW, column = number % OF_ROW * 8;
                        pieces[i].a = pieces[i].b = make_uint4(0, 0, 0, 0);
                        if (row >= job.rows) continue;
                        const size_t token = job.row + row;
                        const u16* from = q + token * q_stride + job.head * DIM + column;
                        pieces[i].a = *(const uint4*)from, pieces[i].b = *(const uint4*)(from + DIM / 2);
                        if (!cos) continue;
                        const float4* angle = (const float4*)(cos + token * DIM + column);
                        pieces[i].cos[0] = angle[0], pieces[i].cos[1] = angle[1];
                        angle = (const float4*)(sin + token * DIM + DIM / 2 + column);
                        pieces[i].sin[0] = angle[0], pieces[i].sin[1] = angle[1];
                        if (query_scale) pieces[i].factor = bf16_float(query_scale[token]);
                    }
#pragma unroll
                    for (int i = 0; i < AT_ONCE; i++) {
                        const int number = first + i * LOADERS, row = number / OF_ROW, column = number % OF_ROW * 8;
                        if (cos && row < job.rows) rotate(pieces[i], query_scale);
                        if (number >= PIECES) continue;
                        store_piece(queries.tile(), row, column, pieces[i].a);
                        store_piece(queries.tile(), row, column + DIM / 2, pieces[i].b);
                    }
                }
                written_for_tensor_cores();
                barrier_arrive(queries.full());
                queries.count++;
            });
            queries.wait_empty();
            if (mine == 0) shared_job()->blocks = 0;  // there is no more
            barrier_arrive(queries.full());
        }
    } else {
        more_registers<208>();
        const int mine = thread / 128, lane = thread % 32, own = mine * 64 + thread / 32 % 4 * 16 + lane / 4;
        const bool tells = thread % 128 == 0;
        if (mine == 1) named_arrive(2, THREADS);  // the first group begins
        for (;;) {
            queries.wait_full();
            const Job job = *shared_job();
            if (!job.blocks) break;
            float s[64], o[DIM / 2], top[2] = {HIDDEN, HIDDEN}, total[2] = {0, 0}, shrink[2];
            u32 weights[32];  // as bfloat16, of which wgmma has rows
            const int whole = (job.seen + 1) / KEYS, limit = job.seen + own - 2 * (lane % 4);
#pragma unroll
            for (int i = 0; i < DIM / 2; i++) o[i] = 0;
            auto begin_scores = [&] {
                u64 of_q = described(queries.tile() + mine * 64 * 128), of_k = described(keys.tile());
                wgmma_begin();
#pragma unroll
                for (int i = 0; i < DIM / 16; i++) {
                    const u32 at = i / 4 * (PART >> 4) + i % 4 * 2;
                    wgmma(s, of_q + at, of_k + at, i > 0);
                }
                wgmma_commit();
            };
            auto begin_sums = [&](int block) {
                values.wait_full();
                const int left = job.context - block * KEYS;
                if (left < KEYS) {  // what lies behind a prompt is another's, and nought times NaN is NaN: by each group
                    for (int i = left * 8 + thread % 128; i < KEYS * 8; i += 128)
                        for (int part = 0; part < DIM / 64; part++)
                            *(uint4*)shared_floats(values.tile() + part * PART + i * 16) = make_uint4(0, 0, 0, 0);
                    written_for_tensor_cores();
                    named_barrier(4 + mine, 128);
                }
                u64 of_v = described_across(values.tile(), PART);
                wgmma_begin();
#pragma unroll
                for (int i = 0; i < KEYS / 16; i++) wgmma_held(o, &weights[4 * i], of_v + i * (16 * 128 >> 4));
                wgmma_commit();
            };
            auto weigh_scores = [&](int block) {
#pragma unroll
                for (int i = 0; i < 64; i++) only_from_here(s[i]);
                if (tells) barrier_arrive(keys.empty());
                keys.count++;
                if (block < whole) weigh<false>(s, top, total, shrink, scale, 0);
                else weigh<true>(s, top, total, shrink, scale, limit - block * KEYS);
            };
            auto keep_weights = [&] {
#pragma unroll
                for (int i = 0; i < 32; i++) weights[i] = bf16_pair(s[2 * i], s[2 * i + 1]);
            };
            auto end_sums = [&] {
                wgmma_wait<0>();
#pragma unroll
                for (int i = 0; i < DIM / 2; i++) only_from_here(o[i]);
                if (tells) barrier_arrive(values.empty());
                values.count++;
            };

            keys.wait_full();
            begin_scores();
            wgmma_wait<0>();
            weigh_scores(0);
            keep_weights();
            for (int block = 1; block < job.blocks; block++) {
                keys.wait_full();
                named_barrier(2 + mine, THREADS);
                begin_scores();
                begin_sums(block - 1);
                named_arrive(2 + (mine ^ 1), THREADS);
                wgmma_wait<1>();
                weigh_scores(block);
                end_sums();
#pragma unroll
                for (int i = 0; i < DIM / 2; i++) o[i] *= shrink[i / 2 % 2];
                keep_weights();
            }
            if (lane == 0) barrier_arrive(queries.empty());
            queries.count++;
            begin_sums(job.blocks - 1);
            end_sums();

#pragma unroll
            for (int half = 0; half < 2; half++) {
                total[half] += __shfl_xor_sync(~0u, total[half], 1);
                total[half] += __shfl_xor_sync(~0u, total[half], 2);
                const float part = 1.0f / total[half];
                const int row = own + 8 * half;
                u16* to = out + ((size_t)(job.row + row) * heads + job.head) * DIM;
#pragma unroll
                for (int i = 0; i < DIM / 8; i += 4) {
                    u32 words[4];
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const int at = 4 * (i + j) + 2 * half;
                        words[j] = bf16_pair(o[at] * part, o[at + 1] * part);
                    }
                    exchange(words, lane);
                    if (row < job.rows)
                        *(uint4*)(to + 8 * (i + lane % 4)) = make_uint4(words[0], words[1], words[2], words[3]);
                }
            }
        }
        if (mine == 0) named_barrier(2, THREADS);  // the last arrival has someone who waits for it
    }
}
