// hopper/primitives.cuh on a CPU: every thread of a cluster is a thread, its clocks are its own.
// The copy engine is done at once; the tensor cores begin as late as they may, when they are waited for: what is
// overwritten too early shows. Shared memory is NaN at first. A wait of a minute ends the process with status 9; an
// arrival too many, a tile out of place, what lies beyond the shared memory, or a register that nobody gave, with 8.
#include <atomic>
#include <barrier>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <unordered_map>
#include <vector>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
using std::max;
using std::min;

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static u32 __ldg(const u32* at) { return *at; }
static void add_to_memory(float* at, float4 v) { at[0] += v.x, at[1] += v.y, at[2] += v.z, at[3] += v.w; }
#define __expf expf

struct Index { u32 x; };
static thread_local Index threadIdx, blockIdx, gridDim;
static thread_local u32 rank_of_thread;

constexpr u32 SHARED = 1 << 18;  // bytes of a program, more than there are
static std::vector<unsigned char> arena;
static u32 used;  // bytes of a program

static void within(u32 at) {
    if (at % SHARED >= used) fprintf(stderr, "byte %u of %u\n", at % SHARED, used), _Exit(8);
}

struct TensorMap { const u16* data; long long columns, rows, stride; int box_rows; };

static u32 shared_base() { return rank_of_thread * SHARED; }
static float* shared_floats(u32 at) { return (float*)(arena.data() + at); }
static u32 cluster_rank() { return rank_of_thread; }
static u32 peer(u32 at, u32 rank) { return at % SHARED + rank * SHARED; }
static float4 load_peer(u32 there) { return *(float4*)(arena.data() + there); }

struct Barrier { u32 arrivals, pending, phase; long long bytes; };
static std::mutex lock;
static std::condition_variable changed;
static std::unordered_map<u32, Barrier> barriers;

static void settle(Barrier& b) {
    if (b.pending == 0 && b.bytes == 0) b.phase ^= 1, b.pending = b.arrivals, changed.notify_all();
}
static void barrier_init(u32 at, u32 arrivals) {
    std::lock_guard hold(lock);
    within(at);
    barriers[at] = {arrivals, arrivals, 0, 0};
}
static void barriers_visible() {}
static void arrive(u32 at, long long bytes, u32 arrivals) {
    std::lock_guard hold(lock);
    Barrier& b = barriers.at(at);
    if (arrivals > b.pending) fprintf(stderr, "an arrival too many\n"), _Exit(8);
    b.bytes += bytes, b.pending -= arrivals;
    settle(b);
}
static void barrier_expect(u32 at, u32 bytes) { arrive(at, bytes, 1); }
static void barrier_arrive(u32 at) { arrive(at, 0, 1); }
static void barrier_wait(u32 at, u32 phase) {
    std::unique_lock hold(lock);
    auto over = [&] { return barriers.at(at).phase != phase; };
    if (!changed.wait_for(hold, std::chrono::seconds(60), over)) fprintf(stderr, "a wait without end\n"), _Exit(9);
}

static u32 swizzled(u32 at) { return at ^ (at >> 7 & 7) << 4; }

static void copy_tile(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
    if (to % 1024) fprintf(stderr, "a tile at %u\n", to), _Exit(8);
    for (int r = 0; r < map->box_rows; r++)
        for (int c = 0; c < 64; c++) {
            bool there = row + r < map->rows && column + c < map->columns;
            u16 value = there ? map->data[(row + r) * map->stride + column + c] : 0;
            within(to + r * 128 + c * 2);
            memcpy(arena.data() + swizzled(to + r * 128 + c * 2), &value, 2);
        }
    arrive(barrier, -128LL * map->box_rows, 0);
}
static void prefetch_map(const TensorMap*) {}

typedef std::vector<std::unique_ptr<std::barrier<>>> Barriers;
static std::vector<Barriers> multiplying;  // by program, by group of 128 threads
static Barriers whole_program;  // by program
static std::unique_ptr<std::barrier<>> whole_cluster;

struct Product { float* sums; int count; u64 x, w; bool add; const u32* held = nullptr; };
static thread_local std::deque<std::vector<Product>> groups;
static thread_local std::vector<Product> begun;

static float bf16_float(u16 bits) {
    u32 wide = (u32)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}
static float number(u64 described, int row, int k) {
    u32 at = shared_base() + (u32)(described & 0x3FFF) * 16, stride = (u32)(described >> 32 & 0x3FFF) * 16;
    u16 bits;
    within(at + row / 8 * stride + row % 8 * 128 + k * 2);
    memcpy(&bits, arena.data() + swizzled(at + row / 8 * stride + row % 8 * 128 + k * 2), 2);
    return bf16_float(bits);
}
static float number_across(u64 described, int column, int k) {
    u32 stride = (u32)(described >> 32 & 0x3FFF) * 16, far = (u32)(described >> 16 & 0x3FFF) * 16;
    u32 at = shared_base() + (u32)(described & 0x3FFF) * 16 + column / 64 * far + k / 8 * stride + k % 8 * 128;
    u16 bits;
    within(at + column % 64 * 2);
    memcpy(&bits, arena.data() + swizzled(at + column % 64 * 2), 2);
    return bf16_float(bits);
}
static void compute_held(const Product& p) {  // rows of the four threads that have them
    static std::vector<u32> exchanged(1 << 14);
    std::barrier<>& meet = *multiplying[cluster_rank()][threadIdx.x / 128];
    u32 *mine = &exchanged[threadIdx.x * 4], *four = &exchanged[threadIdx.x / 4 * 16];
    memcpy(mine, p.held, 16), meet.arrive_and_wait();
    for (int i = 0; i < p.count; i++) {
        int half = i / 2 % 2, column = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
        float sum = p.sums[i];
        for (int k = 0; k < 16; k++) {
            u32 pair = four[k % 8 / 2 * 4 + k / 8 * 2 + half];
            sum += bf16_float(k % 2 ? pair >> 16 : pair & 0xFFFF) * number_across(p.w, column, k);
        }
        p.sums[i] = sum;
    }
    meet.arrive_and_wait();
}
static void compute(const Product& p) {
    if (p.held) return compute_held(p);
    int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    for (int i = 0; i < p.count; i++) {
        int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float sum = p.add ? p.sums[i] : 0;
        for (int k = 0; k < 16; k++) sum += number(p.x, row, k) * number(p.w, column, k);
        p.sums[i] = sum;
    }
}
template <int N> void wgmma(float (&sums)[N], u64 x, u64 w, bool add) { begun.push_back({sums, N, x, w, add}); }
template <int N> void wgmma_held(float (&sums)[N], const u32* rows, u64 w) { begun.push_back({sums, N, 0, w, true, rows}); }
static void wgmma_begin() {}
static void only_from_here(float&) {}
static void wgmma_commit() { groups.push_back(std::move(begun)), begun.clear(); }
template <int LEFT> void wgmma_wait() {  // of the 128 threads together
    for (; groups.size() > LEFT; groups.pop_front())
        for (const Product& p : groups.front()) compute(p);
    multiplying[cluster_rank()][threadIdx.x / 128]->arrive_and_wait();
}
static void wait_for_previous() {}
static void start_next() {}

static void __syncwarp() {}
static void cluster_sync() { whole_cluster->arrive_and_wait(); }
static void cluster_meet() { cluster_sync(); }
static void __syncthreads() { whole_program[cluster_rank()]->arrive_and_wait(); }

static std::unordered_map<u32, Barrier> named;  // by program and number
static u32 named_arrival(int which, int threads) {  // the phase that it is of; `lock` is held
    Barrier& b = named.try_emplace(rank_of_thread * 16 + which, Barrier{(u32)threads, (u32)threads, 0, 0}).first->second;
    u32 phase = b.phase;
    b.pending--, settle(b);
    return phase;
}
static void named_arrive(int which, int threads) {
    std::lock_guard hold(lock);
    named_arrival(which, threads);
}
static void named_barrier(int which, int threads) {
    std::unique_lock hold(lock);
    u32 phase = named_arrival(which, threads), at = rank_of_thread * 16 + which;
    auto over = [&] { return named.at(at).phase != phase; };
    if (!changed.wait_for(hold, std::chrono::seconds(60), over)) fprintf(stderr, "a wait without end\n"), _Exit(9);
}
static std::atomic<int> registers_given;  // by all threads, of what they had at the start
static int threads_of_program;
template <int COUNT> void fewer_registers() { registers_given += 65536 / threads_of_program / 8 * 8 - COUNT; }
template <int COUNT> void more_registers() { fewer_registers<COUNT>(); }
static void written_for_tensor_cores() {}
static float power_of_two(float x) { return exp2f(x); }

static u32 bf16_bits(float value) {  // to the nearest, ties to even
    u32 bits;
    memcpy(&bits, &value, 4);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
static u32 bf16_pair(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
template <typename T> T __shfl_xor_sync(u32, T value, int mask) {
    static std::vector<u32> exchanged(1 << 16);  // a word for each thread of a cluster
    std::barrier<>& meet = *multiplying[cluster_rank()][threadIdx.x / 128];
    u32 me = cluster_rank() * 1024 + threadIdx.x;
    memcpy(&exchanged[me], &value, 4), meet.arrive_and_wait();
    T other;
    memcpy(&other, &exchanged[me ^ mask], 4), meet.arrive_and_wait();
    return other;
}

static std::unique_ptr<std::barrier<>> barrier_of(u32 threads) { return std::make_unique<std::barrier<>>(threads); }

// The clusters of a grid, one after the other: `program` by all threads of each, of which the first `multiply` multiply.
template <typename F> void run_clusters(u32 grid, u32 cluster, u32 threads, u32 multiply, u32 bytes, F program) {
    used = bytes, threads_of_program = threads;
    for (u32 first = 0; first < grid; first += cluster) {
        arena.assign((size_t)cluster * SHARED, 0xFF);  // NaN
        barriers.clear(), named.clear(), multiplying.clear(), whole_program.clear();
        whole_cluster = barrier_of(cluster * threads), registers_given = 0;
        std::vector<std::thread> all;
        for (u32 rank = 0; rank < cluster; rank++) {
            whole_program.push_back(barrier_of(threads));
            multiplying.emplace_back();
            for (u32 group = 0; group < multiply / 128; group++) multiplying.back().push_back(barrier_of(128));
        }
        for (u32 rank = 0; rank < cluster; rank++)
            for (u32 thread = 0; thread < threads; thread++)
                all.emplace_back([=] {
                    threadIdx = {thread}, blockIdx = {first + rank}, gridDim = {grid}, rank_of_thread = rank;
                    program();
                });
        for (std::thread& thread : all) thread.join();
        if (registers_given < 0) fprintf(stderr, "%d registers that nobody gave\n", -registers_given), _Exit(8);
    }
}
