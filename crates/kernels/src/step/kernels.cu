// One token for each of n sequences, at most 8 * TILES of them, as one kernel whose blocks all run at a time and meet after each
// product: products that read four-bit weights where they lie, with their low-rank corrections in the same pass; attention
// over pages; the choice of the likeliest token.
//
// Compiled when it is first used, with TILES (1, 2 or 4), ONE (1 where n is 1), BF16 (0 or 1), PLAIN (1 where scales are stored as they
// are), WIDTH (of a head), TABLE_ROW (256 or 128), SLICE (256, 128 or 64), DEPTH and CHUNK defined. See mod.rs for what is computed and
// cuda/layout.rs for how these are chosen and for the bytes of shared memory.
//
// How a product works. A slice, TILE_ROWS rows by SLICE columns of packed weights, is what a warp multiplies at a time. Each warp fetches its own
// slices into its own ring in shared memory, DEPTH ahead and across the end of a product, for weights depend on nothing: so memory is busy
// while blocks wait for each other. Up to eight tokens (TILES 1) blocks share out the tiles of rows; each warp keeps the inputs of its own columns
// in registers and goes over all tiles of its block. With more, blocks share out tiles and columns: a block has the inputs of
// a group of CHUNK columns in shared memory, each of its warps multiplies tiles of its own with them and leaves sums, and the warp that owns half of a tile adds up
// the sums of all groups, in their order.
//
// A tile is the left factor of mma.m16n8k16, the inputs are the right one, and because a sum does not depend on the order of its terms,
// a lane may take neighbouring columns for what the instruction calls columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9: of 64 columns that
// share a scale lane t of 4 has 16 t to 16 t + 15, that is 8 bytes of codes. A byte is two levels of the code book in 16 bits each, looked up in
// a table of which every lane has a copy in its own bank. The scales are applied to the sums of 64 products, in f32.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define THREADS 512
#define WARPS (THREADS / 32)
#define TOKENS (8 * TILES)
#define BY_COLUMNS (TILES == 1)   // whether a warp has columns of its own, and not a tile
#define ROW_TILES (BY_COLUMNS ? 1 : 2)     // that a warp multiplies at a time, of 16 rows each
#define TILE_ROWS (16 * ROW_TILES)
#define MOST_PARTS 3
#define MOST_ATTENTION_SPLITS 4
#define SQUARES_APART 16          // sums of squares, so that neighbouring ones are in different lines of the cache
#define NOTHING -1e30f
#define SCALES (SLICE / 64)                // scales of a row of a slice
#define STAGE_CODES (8 * SLICE)            // bytes of the codes of 16 rows of a slice, and of all of them
#define STAGE (STAGE_CODES + (PLAIN && SLICE > 128 ? SLICE : 128))

// Where a product's input comes from.
#define FROM_RESIDUAL 0   // the residual stream, normalised
#define FROM_ROWS 1       // rows in 16 bits
#define FROM_ATTENTION 2  // what attention left
// Where its result goes.
#define TO_ROWS 0         // rows of f32
#define TO_RESIDUAL 1     // added to the residual stream
#define TO_ACTIVATED 2    // silu(first part) * second part

struct Part {
    const unsigned char *codes;        // [rows, inner] in four bits, or null
    const unsigned char *scale_codes;  // 8-bit codes of the scales, or null
    const float *scales;               // of 64 values, or of 256 scales
    const float *offset;               // added to decoded scales
    const u16 *dense;                  // [rows, inner] where there are no codes
    const u16 *a;                      // [rank, inner], where the rank is not 0: a multiple of 64
    const u16 *b;                      // [rows, rank]
    float lora_scale;
    int rows, rank;
    int first_row, first_rank;         // among those of all parts; a part that is not there begins after all
    int unused;
};

struct Product {
    Part parts[MOST_PARTS];
    const u16 *norm;         // [inner]
    const u16 *rows_in;      // [n, inner]
    float *to;               // [n, rows], or the residual stream
    u16 *keys, *values;      // pages of the attention before it: [places, key_heads WIDTH]
    float epsilon;
    int inner;
    int rows, ranks;         // of all parts
    int source, target;
    int attends;             // 1 where attention comes before
    int unused[3];
};

struct Step {
    const Product *products;
    u32 *barrier;
    const u16 *embedding;    // [vocabulary, d]
    const int *ids;          // [n]
    float *residual;         // [n, d]
    u16 *normalised;         // [n, d]
    u16 *activated;          // [n, rows / 2]
    long long *low_rank;     // [3, most_low_rank]
    const u32 *pairs;        // two levels for each byte
    const float *dynamic;    // levels of the scales' codes
    const float *logits;     // [n, vocabulary]
    int *choices;            // [2, n]: the likeliest tokens, and the bits of their log-probabilities
    const float *joined;     // [n, (heads + 2 key_heads) WIDTH]
    const int *lengths;      // [n], the new token included
    const int *tables;       // [n, table]
    const float2 *turns;     // [context, WIDTH / 2]: sine and cosine
    float *attended;         // [n, heads, splits, WIDTH]
    float *log_sums;         // [n, heads, splits]
    u16 *result;             // [n, heads WIDTH]
    float4 *partial;         // [groups of columns, tiles, ROW_TILES TILES, 32]: sums as lanes have them, where warps are not by columns
    u32 *arrived;            // [3, most_tiles]: groups that left theirs
    long long *squares;      // [3, TOKENS, SQUARES_APART]: sums of squares of rows of the residual stream, where warps are not by columns
    int count, n, d, vocabulary;
    int round;               // tiles that a block has sums of at a time, where warps are by columns
    int work_bytes;          // of shared memory for sums, inputs and attention
    int most_low_rank;
    int table, page_shift, heads, key_heads, splits;
    float scale;
    int most_tiles;
};

// What the step is; the host puts it there.
__constant__ Step step;

// Its tokens.
#define N (ONE ? 1 : step.n)

__device__ __forceinline__ u32 bits(float x) { return __float_as_uint(x); }

#if BF16
__device__ __forceinline__ float widen(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ u16 narrow(float x) {
    u32 b = bits(x);
    if ((b & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (u16)((b + 0x7fffu + (b >> 16 & 1u)) >> 16);
}
#else
__device__ __forceinline__ float widen(u32 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"((u16)x));
    return y;
}
__device__ __forceinline__ u16 narrow(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
#endif

// Two numbers in 16 bits, the first in the lower half.
__device__ __forceinline__ u32 narrow_2(float first, float second) {
#if __CUDA_ARCH__ >= 800 && BF16
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
    return y;
#elif __CUDA_ARCH__ >= 800
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
    return y;
#else
    return narrow(first) | (u32)narrow(second) << 16;
#endif
}

// c += a b of 16 x 16 and 16 x 8.
__device__ __forceinline__ void multiply(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#elif __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a2), "r"(a3), "r"(b1));
#endif
}

// The number of the thread, asked for anew: what is made of it would otherwise be kept in registers through the whole step.
__device__ __forceinline__ int thread_number() {
    int number;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
    return number & (THREADS - 1);
}

// The number of the warp, which the compiler then knows to be the same in all lanes.
__device__ __forceinline__ int warp_number() { return __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0); }

__device__ __forceinline__ float sum_of_warp(float x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

__device__ __forceinline__ void copy_16(u32 to, const void *from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#else
    uint4 v = __ldg((const uint4 *)from);
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#endif
}

__device__ __forceinline__ void copy_4(u32 to, const void *from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
#else
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(__ldg((const u32 *)from)) : "memory");
#endif
}

__device__ __forceinline__ void end_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int PENDING> __device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

__device__ __forceinline__ void prefetch(const void *at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

__device__ __forceinline__ uint4 shared_16(u32 from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
    return v;
}

__device__ __forceinline__ uint2 shared_8(u32 from) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(from));
    return v;
}

__device__ __forceinline__ u32 shared_4(u32 from) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from));
    return v;
}

struct Stream {
    int left;                    // slices that follow at the same distance, this one included
    u32 stride, group, pitch;    // that distance in bytes of codes, the number of this lane's first scale, and bytes of codes in a row
    u32 apart;                   // bytes of codes between the first 16 rows and the others
    const unsigned char *codes;  // this lane's first chunk of it
    const unsigned char *scales; // the scales' codes, or the scales of scales, of this lane's part
    int pending, head, tail;     // slices in shared memory or on their way
};

// Where a stream looks for more slices: after so many slices of a slot of a pass over product number op, or so many units of it. Its place is op % 3.
struct Position {
    int op, place, first, slot, at;
};

// What a block does of a product: its tiles, or places in [groups of columns, tiles].
struct Range {
    int begin, end;
};

struct Shared {
    u32 ring;          // [DEPTH, ROW_TILES, STAGE]: this warp's own
    u32 table;         // [256, TABLE_ROW]: pairs, of which a row has 32
    float *dynamic;    // [256]
    Product *products; // [3]: of product number op in place op % 3
    float *offsets;    // [3, 4]
    Range *units;      // [3]: of this block
    int *gathered;     // sums of x A that warps have taken upon themselves; what follows is at a multiple of 16 bytes
    int *lengths;      // [TOKENS]
    Position *position; // of this warp's stream
    float *scratch;    // [2, 4, WARPS]
    float *work;       // sums, inputs, or what attention has
    u16 *low_rank;     // [n, ranks + 8], times the corrections' scales
};

#if TABLE_ROW == 256
// The table begins at this address of shared memory, so that the address of a pair is put together by one instruction. Rings lie on both sides.
#define TABLE 65536
#else
#define TABLE 0
#endif
#define RING (DEPTH * ROW_TILES * STAGE)

__device__ __forceinline__ Shared lay_out(unsigned char *memory) {
    u32 begin = (u32)__cvta_generic_to_shared(memory), warp = warp_number();
    u32 before = TABLE ? min((TABLE - begin) / RING, WARPS) : 0, after = TABLE ? TABLE + 256 * TABLE_ROW : begin + 256 * TABLE_ROW;
    Shared s;
    s.table = TABLE ? TABLE : begin;
    s.ring = warp < before ? begin + warp * RING : after + (warp - before) * RING;
    s.dynamic = (float *)(memory + (after - begin) + (WARPS - before) * RING);
    s.products = (Product *)(s.dynamic + 256);
    s.offsets = (float *)(s.products + 3);
    s.units = (Range *)(s.offsets + 12);
    s.gathered = (int *)(s.units + 3);
    s.lengths = s.gathered + 2;
    s.position = (Position *)(s.lengths + TOKENS) + warp;
    s.scratch = (float *)((Position *)(s.lengths + TOKENS) + WARPS);
    s.work = s.scratch + 2 * 4 * WARPS;
    s.low_rank = (u16 *)((unsigned char *)s.work + step.work_bytes);
    return s;
}

// A copy of the pairs for every bank. Neighbouring threads begin at different banks.
__device__ __forceinline__ void fetch_tables(const Shared &s, unsigned char *memory) {
    u32 *pairs = (u32 *)(memory + (TABLE ? TABLE - (u32)__cvta_generic_to_shared(memory) : 0));
    for (int byte = thread_number(); byte < 256; byte += THREADS) {
        u32 pair = __ldg(step.pairs + byte);
        uint4 *to = (uint4 *)(pairs + byte * TABLE_ROW / 4);
#pragma unroll
        for (int i = 0; i < 8; i++) to[(i + byte) % 8] = make_uint4(pair, pair, pair, pair);
        s.dynamic[byte] = __ldg(step.dynamic + byte);
    }
}

// Where eight rows of a tile are among those of their layer. A ragged last tile begins earlier and computes rows again.
struct Place {
    int part, own;
};

__device__ __forceinline__ Place place_of(const Product &p, int tile, int eighth) {
    Place place;
    if (p.target == TO_ACTIVATED) {
        place.part = eighth % 2;
        place.own = min(TILE_ROWS / 2 * tile, p.parts[0].rows - TILE_ROWS / 2) + 8 * (eighth / 2);
    } else {
        place.part = (TILE_ROWS * tile >= p.parts[1].first_row) + (TILE_ROWS * tile >= p.parts[2].first_row);
        place.own = min(TILE_ROWS * tile - p.parts[place.part].first_row, p.parts[place.part].rows - TILE_ROWS) + 8 * eighth;
    }
    return place;
}

__device__ __forceinline__ int tiles_of(const Product &p) { return (p.rows + TILE_ROWS - 1) / TILE_ROWS; }

// ---- A warp's stream of slices, in the order in which it multiplies them ------------------------------------------------

#if BY_COLUMNS
// A warp goes over its block's tiles, step.round at a time, for each of its slots of columns.
__device__ __forceinline__ int slots_of(const Product &p) { return (p.inner / SLICE - warp_number() + WARPS - 1) / WARPS; }
__device__ __forceinline__ int column_of(int slot) { return (slot * WARPS + warp_number()) * SLICE; }
#else
// A warp has every sixteenth of its block's units, a tile of a group of columns each.
__device__ __forceinline__ int groups_of(const Product &p) { return (p.inner + CHUNK - 1) / CHUNK; }
__device__ __forceinline__ int columns_of(const Product &p, int group) { return min(CHUNK, p.inner - group * CHUNK); }
#endif

// Copies of 16 bytes that a row of a slice takes, and rows of half a slice that half a warp copies at a time.
#define ROW_COPIES (SLICE / 32)
#define ROWS (16 / ROW_COPIES)

// Where a lane's share of a slice begins: half of the warp has eight of each 16 rows of the tile, and the other half the others.
__device__ __forceinline__ void find_slice(const Product &p, int tile, int column, int lane, Stream &stream) {
    Place place = place_of(p, tile, lane / 16);
    const Part &part = p.parts[place.part];
    stream.pitch = p.inner / 2;
    stream.apart = (p.target == TO_ACTIVATED ? 8 : 16) * stream.pitch;
    stream.codes = part.codes + ((u32)(place.own + lane % 16 / ROW_COPIES) * stream.pitch + column / 2 + 16 * (lane % ROW_COPIES));
    stream.group = (place.own + lane % 8) * (u32)(p.inner / 64) + column / 64;
    stream.scales = PLAIN || lane % 16 >= 8 ? (const unsigned char *)part.scales : part.scale_codes;
}

// Finds the slices that come next, but none of a product that comes after the one after `current`.
__device__ __forceinline__ bool find_slices(const Shared &s, Stream &stream, int current, int lane) {
    Position now = *s.position;
    bool found = false;
#pragma unroll 1
    while (!found && now.op <= current + 1 && now.op < step.count) {
        const Product &p = s.products[now.place];
        Range units = s.units[now.place];
#if BY_COLUMNS
        int tiles = units.end, count = 0;
        if (p.parts[0].codes && now.first < tiles && now.slot < slots_of(p)) count = min(tiles - now.first, step.round);
        if (now.at < count) {
            int tile = blockIdx.x + (now.first + now.at) * gridDim.x;
            find_slice(p, tile, column_of(now.slot), lane, stream);
            // Tiles follow at the same distance as long as they are whole ones of the same layer.
            int part = p.target == TO_ACTIVATED ? 0 : place_of(p, tile, 0).part, begins = p.target == TO_ACTIVATED ? 0 : p.parts[part].first_row;
            int rows = p.target == TO_ACTIVATED ? 8 : 16, whole = (begins + p.parts[part].rows) / rows - tile;
            stream.left = max(1, min(count - now.at, (whole + (int)gridDim.x - 1) / (int)gridDim.x));
            stream.stride = rows * gridDim.x * (p.inner / 2);
            now.at += stream.left;
            found = true;
            continue;
        }
        now.at = 0;
        if (++now.slot < slots_of(p) && now.first < tiles) continue;
        now.slot = 0;
        now.first += step.round;
        if (now.first < tiles && p.parts[0].codes) continue;
        now.first = 0;
#else
        int unit = units.begin + now.first + warp_number();
        if (p.parts[0].codes && unit < units.end) {
            int group = unit / tiles_of(p);
            find_slice(p, unit - group * tiles_of(p), group * CHUNK, lane, stream);
            stream.left = columns_of(p, group) / SLICE;
            now.first += WARPS;
            found = true;
            continue;
        }
        now.first = 0;
#endif
        now.op++;
        now.place = now.place == 2 ? 0 : now.place + 1;
    }
    *s.position = now;
    return found;
}

__device__ __forceinline__ void fetch_slice(const Shared &s, Stream &stream, int lane) {
    int half = lane / 16, row = lane % 16 / ROW_COPIES, chunk = lane % ROW_COPIES, own = lane % 8 + 8 * half;
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; tile++) {
        u32 stage = s.ring + (stream.tail * ROW_TILES + tile) * STAGE, to = stage + STAGE_CODES;
        const unsigned char *codes = stream.codes + tile * stream.apart;
        u32 group = stream.group + tile * (stream.apart / 32);
#pragma unroll
        for (int i = 0; i < 8 / ROWS; i++) {
            int r = row + ROWS * i;
            copy_16(stage + (8 * half + r) * (SLICE / 2) + 16 * (chunk ^ 2 * (r / (256 / SLICE) % SCALES)), codes + i * ROWS * stream.pitch);
        }
#if PLAIN
        if (lane % 16 < 8) {
            const float *from = (const float *)stream.scales + group;
            if (SLICE == 256) copy_16(to + 16 * own, from);
            else for (int i = 0; i < SCALES; i++) copy_4(to + 4 * (own * SCALES + i), from + i);
        }
#else
        bool nested = lane % 16 >= 8;
        copy_4(to + 4 * own + (nested ? 64 : 0), stream.scales + (nested ? group / 256 * 4 : group & ~3u));
#endif
    }
    end_copies();
    u32 stride = BY_COLUMNS ? stream.stride : SLICE / 2;
    stream.codes += stride;
    stream.group += stride / 32;
    stream.tail = stream.tail + 1 == DEPTH ? 0 : stream.tail + 1;
    stream.pending++;
    stream.left--;
}

// Fetches as far ahead as there is room.
__device__ __forceinline__ void fetch_ahead(const Shared &s, Stream &stream, int current, int lane) {
#pragma unroll 1
    while (stream.pending < DEPTH && (stream.left || find_slices(s, stream, current, lane)))
        fetch_slice(s, stream, lane);
}

__device__ __forceinline__ u32 wait_for_slice(const Shared &s, const Stream &stream) {
    if (stream.pending == DEPTH) wait_for_copies<DEPTH - 1>();
    else wait_for_copies<0>();
    __syncwarp();
    return s.ring + stream.head * ROW_TILES * STAGE;
}

__device__ __forceinline__ void leave_slice(const Shared &s, Stream &stream, int current, int lane) {
    __syncwarp();
    stream.head = stream.head + 1 == DEPTH ? 0 : stream.head + 1;
    stream.pending--;
    fetch_ahead(s, stream, current, lane);
}

// ---- Inputs ---------------------------------------------------------------------------------------------------------------

// A lane's 16 columns of one token, in pairs.
__device__ __forceinline__ void unpack(uint4 first, uint4 second, u32 *x) {
    x[0] = first.x; x[1] = first.y; x[2] = first.z; x[3] = first.w;
    x[4] = second.x; x[5] = second.y; x[6] = second.z; x[7] = second.w;
}

__device__ __forceinline__ void load_shared(const u16 *from, u32 *x) { unpack(((const uint4 *)from)[0], ((const uint4 *)from)[1], x); }

__device__ __forceinline__ uint2 normalised(float4 x, float factor, uint2 weight) {
    return make_uint2(
        narrow_2(x.x * factor * widen(weight.x & 0xffff), x.y * factor * widen(weight.x >> 16)),
        narrow_2(x.z * factor * widen(weight.y & 0xffff), x.w * factor * widen(weight.y >> 16)));
}

__device__ __forceinline__ float squares(float4 x) { return x.x * x.x + x.y * x.y + (x.z * x.z + x.w * x.w); }

__device__ __forceinline__ float sum_of_warps(const float *scratch) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += scratch[w];
    return sum;
}

#if BY_COLUMNS
#define ROWS_AT_A_TIME (ONE ? 1 : 4)
#define GROUPS_KEPT 2     // groups of four columns that a thread keeps

// The normalised residual stream: all rows as [n, inner + 8] in shared memory, or each block some rows of [n, inner] in global memory.
__device__ __forceinline__ void normalise(const Product &p, const Shared &s, bool here) {
    int tid = thread_number(), groups = p.inner / 4, pitch = here ? p.inner + 8 : p.inner, apart = here ? 1 : gridDim.x;
    u16 *to = here ? (u16 *)s.work : step.normalised;
    uint2 weights[GROUPS_KEPT];
#pragma unroll
    for (int e = 0; e < GROUPS_KEPT; e++) weights[e] = __ldg((const uint2 *)p.norm + min(tid + e * THREADS, groups - 1));
#pragma unroll 1
    for (int first = here ? 0 : blockIdx.x, round = 0; first < N; first += ROWS_AT_A_TIME * apart, round++) {
        float4 x[ROWS_AT_A_TIME][GROUPS_KEPT];
        float *scratch = s.scratch + round % 2 * ROWS_AT_A_TIME * WARPS;
#pragma unroll
        for (int r = 0; r < ROWS_AT_A_TIME; r++) {
#pragma unroll
            for (int e = 0; e < GROUPS_KEPT; e++) {
                int row = first + r * apart, i = tid + e * THREADS;
                x[r][e] = make_float4(0, 0, 0, 0);
                if (row < N && i < groups) x[r][e] = __ldcg((const float4 *)(step.residual + (size_t)row * p.inner) + i);
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS_AT_A_TIME; r++) {
            int row = first + r * apart;
            if (row >= N) break;
            const float4 *from = (const float4 *)(step.residual + (size_t)row * p.inner);
            float sum = 0.0f;
#pragma unroll
            for (int e = 0; e < GROUPS_KEPT; e++) sum += squares(x[r][e]);
#pragma unroll 1
            for (int i = tid + GROUPS_KEPT * THREADS; i < groups; i += THREADS) sum += squares(__ldcg(from + i));
            sum = sum_of_warp(sum);
            if (tid % 32 == 0) scratch[r * WARPS + tid / 32] = sum;
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < ROWS_AT_A_TIME; r++) {
            int row = first + r * apart;
            if (row >= N) break;
            const float4 *from = (const float4 *)(step.residual + (size_t)row * p.inner);
            float factor = rsqrtf(sum_of_warps(scratch + r * WARPS) / p.inner + p.epsilon);
            uint2 *own = (uint2 *)(to + (size_t)row * pitch);
#pragma unroll
            for (int e = 0; e < GROUPS_KEPT; e++)
                if (tid + e * THREADS < groups) own[tid + e * THREADS] = normalised(x[r][e], factor, weights[e]);
#pragma unroll 1
            for (int i = tid + GROUPS_KEPT * THREADS; i < groups; i += THREADS) own[i] = normalised(__ldcg(from + i), factor, __ldg((const uint2 *)p.norm + i));
        }
    }
}

// What the blocks found that share out the places of a head, each with a softmax of its own, as [n, inner + 8] in shared memory.
__device__ __forceinline__ void join_attention(const Product &p, const Shared &s) {
    int tid = thread_number(), all = N * p.inner / 4;
#pragma unroll 1
    for (int first = tid; first < all; first += GROUPS_KEPT * THREADS) {
        float log_sums[GROUPS_KEPT][MOST_ATTENTION_SPLITS];
        float4 parts[GROUPS_KEPT][MOST_ATTENTION_SPLITS];
#pragma unroll
        for (int e = 0; e < GROUPS_KEPT; e++) {
            // Rows of heads of rows follow each other.
            int i = min(first + e * THREADS, all - 1), head = i / (WIDTH / 4);
#pragma unroll
            for (int k = 0; k < MOST_ATTENTION_SPLITS; k++) {
                size_t at = (size_t)head * step.splits + min(k, step.splits - 1);
                log_sums[e][k] = __ldcg(step.log_sums + at);
                parts[e][k] = __ldcg((const float4 *)(step.attended + at * WIDTH) + i % (WIDTH / 4));
            }
        }
#pragma unroll
        for (int e = 0; e < GROUPS_KEPT; e++) {
            int i = first + e * THREADS;
            float most = NOTHING, sum = 0.0f;
            float4 o = make_float4(0, 0, 0, 0);
#pragma unroll
            for (int k = 0; k < MOST_ATTENTION_SPLITS; k++) most = fmaxf(most, log_sums[e][k]);
#pragma unroll
            for (int k = 0; k < MOST_ATTENTION_SPLITS; k++) {
                float weight = k < step.splits ? __expf(log_sums[e][k] - most) : 0.0f;
                sum += weight;
                o.x += weight * parts[e][k].x;
                o.y += weight * parts[e][k].y;
                o.z += weight * parts[e][k].z;
                o.w += weight * parts[e][k].w;
            }
            float factor = 1.0f / sum;
            int token = i / (p.inner / 4), column = 4 * (i - token * (p.inner / 4));
            if (i < all)
                *(uint2 *)((u16 *)s.work + token * (p.inner + 8) + column) = make_uint2(narrow_2(o.x * factor, o.y * factor), narrow_2(o.z * factor, o.w * factor));
        }
    }
}

// A lane's 16 columns of one token from `column` on, from shared or global memory.
__device__ __forceinline__ void load_input(const Product &p, const Shared &s, bool here, int token, int column, int lane, u32 *x) {
    column += 16 * (lane % 4);
    if (here) {
        load_shared((const u16 *)s.work + token * (p.inner + 8) + column, x);
    } else {
        const uint4 *from = (const uint4 *)(p.rows_in + (size_t)token * p.inner + column);
        unpack(__ldcg(from), __ldcg(from + 1), x);
    }
}

#endif

// ---- Products of a tile ---------------------------------------------------------------------------------------------------

// A byte's pair of levels: row `byte` of the table, this lane's column. Where rows are 256 bytes apart, the byte is the second one
// of the address, which takes one instruction to make.
__device__ __forceinline__ u32 pair_of(u32 table, u32 word, int byte) {
#if TABLE_ROW == 256
    u32 at = __byte_perm(word, table, 0x7604 | byte << 4);
#else
    u32 at = table + ((byte == 0 ? word << 7 : word >> (8 * byte - 7)) & 0x7f80);
#endif
    return shared_4(at);
}

// The scale that this lane decodes for each of its rows of 16; it takes the others from its neighbours.
__device__ __forceinline__ void decode_scales(const Shared &s, u32 stage, int first_scale, const float *offsets, int lane, float *own) {
    int row = lane / 4, quarter = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 at = stage + STAGE_CODES;
#if PLAIN
        own[half] = __uint_as_float(shared_4(at + 4 * ((row + 8 * half) * SCALES + quarter % SCALES)));
#else
        u32 codes = shared_4(at + 4 * (row + 8 * half)), code = codes >> 8 * ((first_scale + quarter % SCALES) % 4) & 0xff;
        own[half] = s.dynamic[code] * __uint_as_float(shared_4(at + 64 + 4 * (row + 8 * half))) + offsets[half];
#endif
    }
}

// This lane's codes of group `group` of 64 columns of a slice, for a row of the first or second half of 16.
__device__ __forceinline__ uint2 load_codes(u32 stage, int half, int group, int lane) {
    int row = lane / 4, swizzle = row / (256 / SLICE) % SCALES;
    return shared_8(stage + (row + 8 * half) * (SLICE / 2) + 32 * (group ^ swizzle) + 8 * (lane % 4));
}

__device__ __forceinline__ float scale_of(const float *own, int half, int group) {
    return SCALES == 1 ? own[half] : __shfl_sync(0xffffffffu, own[half], group, 4);
}

#if BY_COLUMNS
// The inputs of a warp's slice.
typedef u32 Inputs[SCALES][8];

// The product of a slice in shared memory.
__device__ __forceinline__ void multiply_slice(
    const Shared &s, u32 stage, const Inputs &x, int first_scale, float2 offset, int lane, float (*sums)[4]
) {
    u32 table = s.table + 4 * lane;
    float own[2], offsets[2] = {offset.x, offset.y};
    decode_scales(s, stage, first_scale, offsets, lane, own);
    // Two groups of 64 columns have products that do not wait for each other.
    constexpr int TOGETHER = SCALES > 1 ? 2 : 1;
#pragma unroll
    for (int first = 0; first < SCALES; first += TOGETHER) {
        u32 a[TOGETHER][2][8];
        float unscaled[TOGETHER][1][4] = {};
#pragma unroll
        for (int g = 0; g < TOGETHER; g++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint2 words = load_codes(stage, half, first + g, lane);
#pragma unroll
                for (int byte = 0; byte < 4; byte++) {
                    a[g][half][byte] = pair_of(table, words.x, byte);
                    a[g][half][4 + byte] = pair_of(table, words.y, byte);
                }
            }
        }
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
#pragma unroll
            for (int g = 0; g < TOGETHER; g++)
                multiply(unscaled[g][0], a[g][0][j], a[g][1][j], a[g][0][j + 1], a[g][1][j + 1], x[first + g][j], x[first + g][j + 1]);
        }
#pragma unroll
        for (int g = 0; g < TOGETHER; g++) {
            float scales[2] = {scale_of(own, 0, first + g), scale_of(own, 1, first + g)};
#pragma unroll
            for (int i = 0; i < 4; i++) sums[0][i] += scales[i / 2] * unscaled[g][0][i];
        }
    }
}
#else
#define PITCH (2 * (CHUNK + 8))   // bytes between the inputs of two tokens
#define LEAST_SCALE 1e-30f

// Where a lane finds the inputs of its first token and columns.
__device__ __forceinline__ u32 inputs_of(const Shared &s, int lane) {
    return (u32)__cvta_generic_to_shared(s.work) + lane / 4 * PITCH + 32 * (lane % 4);
}

// A warp's sums of a tile, in units of what the scale of each row was last: the tensor cores add to them where they are. For a second set
// beside them, whose sums of 64 columns are scaled when they are added, there are not enough registers.
struct TileSums {
    float of[ROW_TILES][TILES][4], units[ROW_TILES][2];
};

__device__ __forceinline__ TileSums no_sums() {
    TileSums sums = {};
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) sums.units[r][0] = sums.units[r][1] = 1.0f;
    return sums;
}

// Puts sums of half of 16 rows into units of a scale. One of 0, of a group of zeros, is taken for a very small one.
__device__ __forceinline__ void change_units(TileSums &sums, int r, int half, float scale) {
    scale = fabsf(scale) < LEAST_SCALE ? LEAST_SCALE : scale;
    float ratio = __fdividef(sums.units[r][half], scale);
    sums.units[r][half] = scale;
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        sums.of[r][t][2 * half] *= ratio;
        sums.of[r][t][2 * half + 1] *= ratio;
    }
}

// Puts all sums into units of 1.
__device__ __forceinline__ void scale_sums(TileSums &sums) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
        for (int t = 0; t < TILES; t++) {
#pragma unroll
            for (int i = 0; i < 4; i++) sums.of[r][t][i] *= sums.units[r][i / 2];
        }
    }
}

// The product of a slice in shared memory; `inputs` is where those of this lane's first token and columns are.
__device__ __forceinline__ void multiply_slice(const Shared &s, u32 stage, u32 inputs, int first_scale, float2 offset, int lane, TileSums &sums) {
    u32 table = s.table + 4 * lane;
    float own[ROW_TILES][2], offsets[2] = {offset.x, offset.y};
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) decode_scales(s, stage + r * STAGE, first_scale, offsets, lane, own[r]);
#pragma unroll
    for (int group = 0; group < SCALES; group++) {
        uint2 words[ROW_TILES][2];
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                words[r][half] = load_codes(stage + r * STAGE, half, group, lane);
                change_units(sums, r, half, scale_of(own[r], half, group));
            }
        }
        // Half of a lane's columns at a time, for registers.
#pragma unroll
        for (int part = 0; part < 2; part++) {
            uint4 in[TILES];
#pragma unroll
            for (int t = 0; t < TILES; t++) in[t] = shared_16(inputs + 8 * t * PITCH + 128 * group + 16 * part);
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) {
                u32 a[2][4];
#pragma unroll
                for (int half = 0; half < 2; half++) {
#pragma unroll
                    for (int byte = 0; byte < 4; byte++) a[half][byte] = pair_of(table, part ? words[r][half].y : words[r][half].x, byte);
                }
#pragma unroll
                for (int t = 0; t < TILES; t++) multiply(sums.of[r][t], a[0][0], a[1][0], a[0][1], a[1][1], in[t].x, in[t].y);
#pragma unroll
                for (int t = 0; t < TILES; t++) multiply(sums.of[r][t], a[0][2], a[1][2], a[0][3], a[1][3], in[t].z, in[t].w);
            }
        }
    }
}
#endif

// 16 rows by 64 columns in 16 bits, as the lanes have them.
struct Dense {
    uint4 rows[2][2];
};

__device__ __forceinline__ void load_dense(const u16 *first, const u16 *second, Dense &a) {
    a.rows[0][0] = __ldg((const uint4 *)first);
    a.rows[0][1] = __ldg((const uint4 *)first + 1);
    a.rows[1][0] = __ldg((const uint4 *)second);
    a.rows[1][1] = __ldg((const uint4 *)second + 1);
}

__device__ __forceinline__ void multiply_dense(const Dense &a, const u32 *x, float *sums) {
    multiply(sums, a.rows[0][0].x, a.rows[1][0].x, a.rows[0][0].y, a.rows[1][0].y, x[0], x[1]);
    multiply(sums, a.rows[0][0].z, a.rows[1][0].z, a.rows[0][0].w, a.rows[1][0].w, x[2], x[3]);
    multiply(sums, a.rows[0][1].x, a.rows[1][1].x, a.rows[0][1].y, a.rows[1][1].y, x[4], x[5]);
    multiply(sums, a.rows[0][1].z, a.rows[1][1].z, a.rows[0][1].w, a.rows[1][1].w, x[6], x[7]);
}

// The same with inputs of their own for the first eight rows and for the second.
__device__ __forceinline__ void multiply_halves(const Dense &a, const u32 *x, const u32 *y, float *sums) {
    multiply(sums, a.rows[0][0].x, 0, a.rows[0][0].y, 0, x[0], x[1]);
    multiply(sums, a.rows[0][0].z, 0, a.rows[0][0].w, 0, x[2], x[3]);
    multiply(sums, a.rows[0][1].x, 0, a.rows[0][1].y, 0, x[4], x[5]);
    multiply(sums, a.rows[0][1].z, 0, a.rows[0][1].w, 0, x[6], x[7]);
    multiply(sums, 0, a.rows[1][0].x, 0, a.rows[1][0].y, y[0], y[1]);
    multiply(sums, 0, a.rows[1][0].z, 0, a.rows[1][0].w, y[2], y[3]);
    multiply(sums, 0, a.rows[1][1].x, 0, a.rows[1][1].y, y[4], y[5]);
    multiply(sums, 0, a.rows[1][1].z, 0, a.rows[1][1].w, y[6], y[7]);
}

// ---- Low-rank corrections -------------------------------------------------------------------------------------------------

// x A is summed up by all blocks in fixed point, so that a sum does not depend on the order of its terms. The lower bits count them.
#define COUNT_BITS 10
#define LOW_RANK_ONE 1073741824.0f

// So are the squares of the residual stream, where warps are not by columns; these sums hold up to 8.6e9.
#define SQUARES_ONE 1073741824.0f

#if BY_COLUMNS
#define UNIT_COLUMNS 64
#else
#define UNIT_COLUMNS 128
#endif

// 16 ranks by UNIT_COLUMNS columns of a factor A are a unit; where the one is that is number `unit` of those whose columns are `pieces` times as many.
struct LowRankUnit {
    int part, row, column;
};

__device__ __forceinline__ LowRankUnit low_rank_unit(const Product &p, int unit, int pieces) {
    int tile = unit / pieces, part = 0;
    LowRankUnit found;
    found.column = unit % pieces * UNIT_COLUMNS;
#pragma unroll 1
    while (tile >= p.parts[part].rank / 16) tile -= p.parts[part++].rank / 16;
    found.part = part;
    found.row = 16 * tile;
    return found;
}

// Adds a warp's share of x A, of eight tokens, to what the others found.
__device__ __forceinline__ void add_low_rank(const Product &p, const LowRankUnit &unit, int buffer, int tokens, const float *sums, int lane) {
    long long *to = step.low_rank + (size_t)buffer * step.most_low_rank + p.parts[unit.part].first_rank + unit.row + lane / 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int token = tokens + 2 * (lane % 4) + i % 2;
        long long term = (llrintf(sums[i] * LOW_RANK_ONE) << COUNT_BITS) + 1;
        long long *at = to + (size_t)token * p.ranks + 8 * (i / 2);
        if (token < N) asm volatile("red.global.add.u64 [%0], %1;" ::"l"(at), "l"(term) : "memory");
    }
}

// A sum of x A, once all its terms are there.
__device__ __forceinline__ long long whole_sum(const long long *from, long long sum, int terms) {
    while ((sum & ((1 << COUNT_BITS) - 1)) != terms) sum = *(volatile const long long *)from;
    return sum;
}

__device__ __forceinline__ u16 low_rank_of(const Product &p, int part, long long sum) {
    return narrow((float)(sum >> COUNT_BITS) * (p.parts[part].lora_scale / LOW_RANK_ONE));
}

#if BY_COLUMNS
__device__ __forceinline__ int first_low_rank_unit() { return gridDim.x - 1 - blockIdx.x + warp_number() * gridDim.x; }
__device__ __forceinline__ int low_rank_units(const Product &p) { return p.ranks / 16 * (p.inner / UNIT_COLUMNS); }

__device__ __forceinline__ void load_low_rank(const Product &p, int number, Dense &a) {
    int lane = (thread_number() & 31);
    // Without a unit something is loaded all the same: a value that is there on some ways only would be kept in memory.
    const u16 *first = step.embedding, *second = step.embedding;
    if (number < low_rank_units(p)) {
        LowRankUnit unit = low_rank_unit(p, number, p.inner / UNIT_COLUMNS);
        first = p.parts[unit.part].a + (size_t)(unit.row + lane / 4) * p.inner + unit.column + 16 * (lane % 4);
        second = first + 8 * (size_t)p.inner;
    }
    load_dense(first, second, a);
}

// Adds this warp's share of x A to what the others found; `a` is its first unit.
__device__ __forceinline__ void multiply_low_rank(const Product &p, const Shared &s, bool here, int buffer, Dense &a) {
    int lane = (thread_number() & 31);
#pragma unroll 1
    for (int number = first_low_rank_unit(); number < low_rank_units(p); number += WARPS * gridDim.x) {
        LowRankUnit unit = low_rank_unit(p, number, p.inner / UNIT_COLUMNS);
        float sums[4] = {};
        u32 x[8];
        load_input(p, s, here, min(lane / 4, N - 1), unit.column, lane, x);
        multiply_dense(a, x, sums);
        add_low_rank(p, unit, buffer, 0, sums, lane);
        load_low_rank(p, number + WARPS * gridDim.x, a);
    }
}

// Waits for all terms of the sums that this thread takes into shared memory.
__device__ __forceinline__ void gather_low_rank(const Product &p, const Shared &s, int buffer) {
    const long long *from = step.low_rank + (size_t)buffer * step.most_low_rank;
#pragma unroll 4
    for (int place = thread_number(); place < p.ranks * N; place += THREADS) {
        long long sum = whole_sum(from + place, __ldcg(from + place), p.inner / UNIT_COLUMNS);
        int rank = place % p.ranks, token = place / p.ranks, part = (rank >= p.parts[1].first_rank) + (rank >= p.parts[2].first_rank);
        s.low_rank[token * (p.ranks + 8) + rank] = low_rank_of(p, part, sum);
    }
}
#else
// The units of a group of columns are shared out as its tiles are; the last warps begin, for they have the fewest tiles, or none.
__device__ __forceinline__ void multiply_low_rank(const Product &p, const Shared &s, int group, int first_tile, int end_tile, int buffer) {
    int lane = (thread_number() & 31), pieces = columns_of(p, group) / UNIT_COLUMNS, all = p.ranks / 16 * pieces, tiles = tiles_of(p);
    u32 inputs = inputs_of(s, lane);
#pragma unroll 1
    for (int number = first_tile * all / tiles + WARPS - 1 - warp_number(); number < end_tile * all / tiles; number += WARPS) {
        LowRankUnit unit = low_rank_unit(p, number, pieces);
        const u16 *first = p.parts[unit.part].a + (size_t)(unit.row + lane / 4) * p.inner + group * CHUNK + unit.column + 16 * (lane % 4);
        Dense a[2];
#pragma unroll
        for (int part = 0; part < 2; part++) load_dense(first + 64 * part, first + 8 * (size_t)p.inner + 64 * part, a[part]);
#pragma unroll 1
        for (int t = 0; t < TILES; t++) {
            float sums[4] = {};
#pragma unroll
            for (int part = 0; part < 2; part++) {
                u32 x[8], from = inputs + 8 * t * PITCH + 2 * unit.column + 128 * part;
                unpack(shared_16(from), shared_16(from + 16), x);
                multiply_dense(a[part], x, sums);
            }
            add_low_rank(p, unit, buffer, 8 * t, sums, lane);
        }
    }
}

#define TOKENS_AT_ONCE 4

// Waits for the sums and takes them into shared memory: 64 ranks of some tokens at a time by a warp that has nothing else to do yet.
__device__ __forceinline__ void gather_low_rank(const Product &p, const Shared &s, int buffer) {
    const long long *sums = step.low_rank + (size_t)buffer * step.most_low_rank;
    int lane = (thread_number() & 31), pieces = p.ranks / 64, all = pieces * ((N + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE);
#pragma unroll 1
    for (;;) {
        int number = lane == 0 ? atomicAdd(s.gathered, 1) : 0;
        number = __shfl_sync(0xffffffffu, number, 0);
        if (number >= all) break;
        int tokens = number / pieces * TOKENS_AT_ONCE, rank = number % pieces * 64, part = (rank >= p.parts[1].first_rank) + (rank >= p.parts[2].first_rank);
        long long found[TOKENS_AT_ONCE][2];
#pragma unroll
        for (int t = 0; t < TOKENS_AT_ONCE; t++) {
            const long long *from = sums + min(tokens + t, N - 1) * p.ranks + rank + lane;
            found[t][0] = __ldcg(from);
            found[t][1] = __ldcg(from + 32);
        }
#pragma unroll
        for (int t = 0; t < TOKENS_AT_ONCE; t++) {
            int token = min(tokens + t, N - 1);
            const long long *from = sums + token * p.ranks + rank + lane;
            u16 *to = s.low_rank + token * (p.ranks + 8) + rank + lane;
            to[0] = low_rank_of(p, part, whole_sum(from, found[t][0], p.inner / UNIT_COLUMNS));
            to[32] = low_rank_of(p, part, whole_sum(from + 32, found[t][1], p.inner / UNIT_COLUMNS));
        }
    }
}
#endif

// Sums of x A and of squares, and what counts the groups that left sums, for another product.
__device__ __forceinline__ void clear_counted(int buffer) {
    long long *to = step.low_rank + (size_t)buffer * step.most_low_rank;
#pragma unroll 1
    for (int i = blockIdx.x * THREADS + thread_number(); i < step.most_low_rank; i += gridDim.x * THREADS) to[i] = 0;
#if !BY_COLUMNS
#pragma unroll 1
    for (int i = blockIdx.x * THREADS + thread_number(); i < step.most_tiles; i += gridDim.x * THREADS) step.arrived[buffer * step.most_tiles + i] = 0;
    if (blockIdx.x == 0 && thread_number() < TOKENS) step.squares[(buffer * TOKENS + thread_number()) * SQUARES_APART] = 0;
#endif
}

// ---- A tile's end ---------------------------------------------------------------------------------------------------------

// Factors B of 16 rows of a tile, of which `first` is the first eighth.
__device__ __forceinline__ void load_factors(const Product &p, int tile, int first, int rank, Dense &b) {
    int lane = (thread_number() & 31);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        Place place = place_of(p, tile, first + half);
        const Part &part = p.parts[place.part];
        bool there = rank < part.rank;
        const uint4 *from = (const uint4 *)(part.b + (size_t)(place.own + lane / 4) * part.rank + rank + 16 * (lane % 4));
        b.rows[half][0] = there ? __ldg(from) : make_uint4(0, 0, 0, 0);
        b.rows[half][1] = there ? __ldg(from + 1) : make_uint4(0, 0, 0, 0);
    }
}

// Adds their corrections to 16 rows of a tile. `b` are the first 64 ranks.
__device__ __forceinline__ void correct(const Product &p, const Shared &s, int tile, int first, Dense &b, float (*sums)[4]) {
    int lane = (thread_number() & 31);
    int part = place_of(p, tile, first).part, second = place_of(p, tile, first + 1).part;
    int ranks = max(p.parts[part].rank, p.parts[second].rank);
#pragma unroll 1
    for (int rank = 0; rank < ranks; rank += 64) {
        if (rank) load_factors(p, tile, first, rank, b);
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            const u16 *rows = s.low_rank + min(8 * t + lane / 4, N - 1) * (p.ranks + 8) + rank + 16 * (lane % 4);
            u32 x[8], y[8];
            load_shared(rows + p.parts[part].first_rank, x);
            load_shared(rows + p.parts[second].first_rank, y);
            multiply_halves(b, x, y, sums[t]);
        }
    }
}

// Puts 16 rows of a tile where they belong.
__device__ __forceinline__ void put_rows(const Product &p, int tile, int first, const float (*sums)[4]) {
    int lane = (thread_number() & 31), column = 2 * (lane % 4), part = place_of(p, tile, first).part;
    int own = p.parts[part].first_row + place_of(p, tile, first).own + lane / 4;
    if (p.target == TO_ACTIVATED) {
#pragma unroll
        for (int t = 0; t < TILES; t++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int token = 8 * t + column + i;
                float x = sums[t][i] / (1.0f + __expf(-sums[t][i])) * sums[t][i + 2];
                if (token < N) step.activated[(size_t)token * p.parts[0].rows + own] = narrow(x);
            }
        }
        return;
    }
    bool adds = BY_COLUMNS && p.target == TO_RESIDUAL, there[2] = {own >= TILE_ROWS * tile, own + 8 >= TILE_ROWS * tile};
    float *to = p.to + (size_t)column * p.rows + own;
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float *at = to + (size_t)(8 * t + i % 2) * p.rows + 8 * (i / 2);
            if (8 * t + column + i % 2 >= N || !there[i / 2]) continue;
            // Nobody else adds to it.
            if (adds) asm volatile("red.global.add.f32 [%0], %1;" ::"l"(at), "f"(sums[t][i]) : "memory");
            else asm volatile("st.global.f32 [%0], %1;" ::"l"(at), "f"(sums[t][i]) : "memory");
        }
    }
}

#if !BY_COLUMNS
// Adds 16 rows of a tile to the residual stream, and the squares of what it is then to the sums of the tokens.
__device__ __forceinline__ void add_to_residual(const Product &p, int tile, int first, int buffer, const float (*sums)[4]) {
    int lane = (thread_number() & 31), column = 2 * (lane % 4), own = place_of(p, tile, first).own + lane / 4;
    bool there[2] = {own >= TILE_ROWS * tile, own + 8 >= TILE_ROWS * tile};
    float *to = p.to + (size_t)column * p.rows + own, now[TILES][4];
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            bool is = 8 * t + column + i % 2 < N && there[i / 2];
            now[t][i] = is ? __ldcg(to + (size_t)(8 * t + i % 2) * p.rows + 8 * (i / 2)) + sums[t][i] : 0.0f;
        }
    }
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float *at = to + (size_t)(8 * t + i % 2) * p.rows + 8 * (i / 2);
            if (8 * t + column + i % 2 < N && there[i / 2]) asm volatile("st.global.f32 [%0], %1;" ::"l"(at), "f"(now[t][i]) : "memory");
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float sum = now[t][i] * now[t][i] + now[t][i + 2] * now[t][i + 2];
#pragma unroll
            for (int other = 16; other >= 4; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
            long long term = llrintf(sum * SQUARES_ONE), *at = step.squares + (buffer * TOKENS + 8 * t + column + i) * SQUARES_APART;
            if (lane < 4) asm volatile("red.global.add.u64 [%0], %1;" ::"l"(at), "l"(term) : "memory");
        }
    }
}
#endif

#if BY_COLUMNS
// Adds up what `warps` warps left from `from` on, corrects it and puts it where it belongs. `b` are the first 64 ranks.
__device__ __forceinline__ void finish_tile(const Product &p, const Shared &s, int tile, const float *from, int warps, Dense &b) {
    int lane = (thread_number() & 31), row = lane / 4, column = 2 * (lane % 4);
    float sums[1][4] = {};
    for (int w = 0; w < warps; w++) {
        if (N == 1) {
            sums[0][0] += from[row];
            sums[0][2] += from[row + 8];
            from += 16;
            continue;
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float2 v = *(const float2 *)(from + (row + 8 * half) * TOKENS + column);
            sums[0][2 * half] += v.x;
            sums[0][2 * half + 1] += v.y;
        }
        from += 16 * TOKENS;
    }
    correct(p, s, tile, 0, b, sums);
    put_rows(p, tile, 0, sums);
}

// Leaves a warp's sums of a tile, or adds to what it left before.
__device__ __forceinline__ void leave_sums(float *to, const float (*sums)[4], bool adds, int lane) {
    int row = lane / 4, column = 2 * (lane % 4);
    if (N == 1) {
        if (column == 0) {
            to[row] = sums[0][0] + (adds ? to[row] : 0.0f);
            to[row + 8] = sums[0][2] + (adds ? to[row + 8] : 0.0f);
        }
        return;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float2 *at = (float2 *)(to + (row + 8 * half) * TOKENS + column), before = adds ? *at : make_float2(0, 0);
        *at = make_float2(sums[0][2 * half] + before.x, sums[0][2 * half + 1] + before.y);
    }
}
#else
#define UNIT_SUMS (ROW_TILES * TILES * 32)   // of four floats

// Leaves a warp's sums of a tile for those who finish it.
__device__ __forceinline__ void leave_sums(const Product &p, int group, int tile, int buffer, const TileSums &sums, int lane) {
    float4 *to = step.partial + (size_t)(group * tiles_of(p) + tile) * UNIT_SUMS + lane;
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            const float *own = sums.of[r][t];
            __stcg(to + 32 * (r * TILES + t), make_float4(own[0], own[1], own[2], own[3]));
        }
    }
    __syncwarp();
    u32 *arrived = step.arrived + buffer * step.most_tiles + tile;
    if (lane == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
}

// Waits until all groups have left their sums of a tile.
__device__ __forceinline__ void wait_for_groups(const Product &p, int tile, int buffer, int lane) {
    if (lane == 0) {
        u32 found, *arrived = step.arrived + buffer * step.most_tiles + tile;
        do asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(arrived) : "memory");
        while (found != groups_of(p));
        __threadfence();
    }
    __syncwarp();
}

// Halves of tiles, of 16 rows each, have owners, who add up what all groups left, correct it and put it where it belongs.
__device__ __forceinline__ void finish_tiles(const Product &p, const Shared &s, int buffer, int lane) {
#pragma unroll 1
    for (int half = blockIdx.x + warp_number() * gridDim.x; half < ROW_TILES * tiles_of(p); half += WARPS * gridDim.x) {
        int tile = half / ROW_TILES, row_tile = half % ROW_TILES;
        Dense b;
        load_factors(p, tile, 2 * row_tile, 0, b);
        wait_for_groups(p, tile, buffer, lane);
        float sums[TILES][4] = {};
        const float4 *from = step.partial + (size_t)tile * UNIT_SUMS + 32 * row_tile * TILES + lane;
#pragma unroll 4
        for (int group = groups_of(p); group > 0; group--, from += tiles_of(p) * UNIT_SUMS) {
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                float4 v = __ldcg(from + 32 * t);
                sums[t][0] += v.x; sums[t][1] += v.y; sums[t][2] += v.z; sums[t][3] += v.w;
            }
        }
        correct(p, s, tile, 2 * row_tile, b, sums);
        if (p.target == TO_RESIDUAL) add_to_residual(p, tile, 2 * row_tile, buffer, sums);
        else put_rows(p, tile, 2 * row_tile, sums);
    }
}
#endif

// What this block does of a product of so many rows and columns.
__device__ __forceinline__ Range units_of(int rows, int inner) {
    int tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, block = blockIdx.x, blocks = gridDim.x;
#if BY_COLUMNS
    return Range{0, (tiles - block + blocks - 1) / blocks};
#else
    int all = (inner + CHUNK - 1) / CHUNK * tiles;
    return Range{all * block / blocks, all * (block + 1) / blocks};
#endif
}

// Takes what a product is into shared memory; the last two warps do.
__device__ __forceinline__ void take_product(const Shared &s, int op) {
    int tid = thread_number() - (THREADS - 64), place = op % 3;
    if (op >= step.count || tid < 0) return;
    const Product *from = step.products + op;
    if (tid < sizeof(Product) / 16) {
        ((uint4 *)(s.products + place))[tid] = __ldg((const uint4 *)from + tid);
    } else if (tid >= 40 && tid < 40 + MOST_PARTS) {
        const float *offset = from->parts[tid - 40].offset;
        s.offsets[4 * place + tid - 40] = offset ? __ldg(offset) : 0.0f;
    } else if (tid == 48) {
        s.units[place] = units_of(__ldg(&from->rows), __ldg(&from->inner));
    }
}

// Brings into the cache what a product needs besides packed weights.
__device__ __forceinline__ void prefetch_product(const Product &p, Range units, int tid, int threads) {
    if (p.source == FROM_RESIDUAL)
#pragma unroll 1
        for (int i = tid; i < p.inner / 64; i += threads) prefetch(p.norm + 64 * i);
#if BY_COLUMNS
#pragma unroll 1
    for (int i = tid; i < units.end * 16; i += threads) {
        Place place = place_of(p, blockIdx.x + i / 16 * gridDim.x, i / 8 % 2);
        const Part &part = p.parts[place.part];
        if (part.rank) prefetch(part.b + (size_t)(place.own + i % 8) * part.rank);
    }
#pragma unroll 1
    for (int i = tid; i < WARPS * 16; i += threads) {
        int number = gridDim.x - 1 - blockIdx.x + i / 16 * gridDim.x;
        if (number >= low_rank_units(p)) break;
        LowRankUnit unit = low_rank_unit(p, number, p.inner / UNIT_COLUMNS);
        prefetch(p.parts[unit.part].a + (size_t)(unit.row + i % 16) * p.inner + unit.column);
    }
#else
    // Other blocks may need what this one brings.
    int first = blockIdx.x + tid * gridDim.x, all = threads * gridDim.x;
#pragma unroll 1
    for (int row = first; row < p.rows; row += all) {
        const Part &part = p.parts[(row >= p.parts[1].first_row) + (row >= p.parts[2].first_row)];
        if (part.rank) prefetch(part.b + (size_t)(row - part.first_row) * part.rank);
    }
#pragma unroll 1
    for (int line = first; line < p.ranks * (p.inner / 64); line += all) {
        int rank = line / (p.inner / 64);
        const Part &part = p.parts[(rank >= p.parts[1].first_rank) + (rank >= p.parts[2].first_rank)];
        prefetch(part.a + (size_t)(rank - part.first_rank) * p.inner + line % (p.inner / 64) * 64);
    }
#endif
}

// What can be done for the products to come while other warps finish tiles.
__device__ __forceinline__ void prepare_next(const Shared &s, int op, int warp, int warps) {
    int tid = warp * 32 + (thread_number() & 31);
    if (op + 1 < step.count) prefetch_product(s.products[(op + 1) % 3], s.units[(op + 1) % 3], tid, warps * 32);
}

// ---- Products -------------------------------------------------------------------------------------------------------------

// The offsets of the scales of a tile's halves.
__device__ __forceinline__ float2 offsets_of(const Product &p, const Shared &s, int op, int tile) {
    const float *offsets = s.offsets + 4 * (op % 3);
    int first = place_of(p, tile, 0).part;
    return make_float2(offsets[first], offsets[p.target == TO_ACTIVATED ? 1 : first]);
}

__device__ __forceinline__ const u16 *dense_row(const Product &p, int tile, int eighth, int lane) {
    Place place = place_of(p, tile, eighth);
    return p.parts[place.part].dense + (size_t)(place.own + lane / 4) * p.inner + 16 * (lane % 4);
}

#if BY_COLUMNS
// `a` is the first of this warp's units of the factors A; `here` says that the inputs are in shared memory.
__device__ __forceinline__ void multiply_product(const Shared &s, Stream &stream, int op, bool here, Dense &a) {
    const Product &p = s.products[op % 3];
    int lane = (thread_number() & 31), warp = warp_number(), tiles = s.units[op % 3].end;
    bool packed = p.parts[0].codes;
    if (p.ranks) multiply_low_rank(p, s, here, op % 3, a);
    take_product(s, op + 2);
    Inputs x = {};
    int area = N == 1 ? 16 : 16 * TOKENS, slots = slots_of(p), most = (p.inner / SLICE + WARPS - 1) / WARPS;
#pragma unroll 1
    for (int first = 0, pass = 0; first < tiles; first += step.round, pass++) {
        int end = min(tiles, first + step.round);
        float *sums = s.work + (pass & 1) * step.round * WARPS * area;
#pragma unroll 1
        for (int slot = 0; slot < slots; slot++) {
            int column = column_of(slot);
            if (most > 1 || pass == 0) {
#pragma unroll
                for (int b = 0; b < SCALES; b++) load_input(p, s, here, min(lane / 4, N - 1), column + 64 * b, lane, x[b]);
            }
            if (here && pass == 0) __syncthreads();   // sums lie where the inputs were
#pragma unroll 1
            for (int at = first; at < end; at++) {
                float own[1][4] = {};
                int tile = blockIdx.x + at * gridDim.x;
                if (packed) {
                    u32 stage = wait_for_slice(s, stream);
                    multiply_slice(s, stage, x, column / 64, offsets_of(p, s, op, tile), lane, own);
                    leave_slice(s, stream, op, lane);
                } else {
                    const u16 *rows[2] = {dense_row(p, tile, 0, lane) + column, dense_row(p, tile, 1, lane) + column};
#pragma unroll
                    for (int b = 0; b < SCALES; b++) {
                        Dense w;
                        load_dense(rows[0] + 64 * b, rows[1] + 64 * b, w);
                        multiply_dense(w, x[b], own[0]);
                    }
                }
                leave_sums(sums + ((at - first) * WARPS + warp) * area, own, slot > 0, lane);
            }
        }
        if (here && pass == 0 && slots == 0) __syncthreads();
        int mine = first + (warp + pass * step.round) % WARPS, tile = blockIdx.x + mine * gridDim.x;
        Dense b;
        if (mine < end) load_factors(p, tile, 0, 0, b);
        if (pass == 0) gather_low_rank(p, s, op % 3);
        __syncthreads();
        if (mine < end) finish_tile(p, s, tile, sums + (mine - first) * WARPS * area, min(WARPS, p.inner / SLICE), b);
        else if (end == tiles) prepare_next(s, op, mine - end, WARPS - (end - first));
    }
}
#else
// Starts to copy a group's columns of the inputs into shared memory.
__device__ __forceinline__ void copy_inputs(const Product &p, const Shared &s, int group) {
    u32 place = (u32)__cvta_generic_to_shared(s.work);
    int pieces = columns_of(p, group) / 8;
    const u16 *from = p.rows_in + group * CHUNK;
#pragma unroll 1
    for (int i = thread_number(); i < N * (CHUNK / 8); i += THREADS) {
        int token = i / (CHUNK / 8), piece = i % (CHUNK / 8);
        if (piece < pieces) copy_16(place + token * PITCH + 16 * piece, from + (size_t)token * p.inner + 8 * piece);
    }
    end_copies();
}

#define PIECES (CHUNK / 4)                       // of four columns
#define ROUNDS (TOKENS * PIECES / THREADS)       // of the threads over all pieces
#define IN_FLIGHT (ROUNDS < 8 ? ROUNDS : 8)

// The same of the residual stream, which is normalised on the way. `buffer` has the sums of its squares.
__device__ __forceinline__ void copy_normalised(const Product &p, const Shared &s, int group, int buffer) {
    int tid = thread_number(), piece = tid % PIECES, token = tid / PIECES;
    bool there = 4 * piece < columns_of(p, group);
    const float *from = step.residual + group * CHUNK + (there ? 4 * piece : 0);
    uint2 weight = __ldg((const uint2 *)(p.norm + group * CHUNK + (there ? 4 * piece : 0)));
    if (tid < TOKENS) s.scratch[tid] = rsqrtf(__ldcg(step.squares + (buffer * TOKENS + tid) * SQUARES_APART) * (1.0f / SQUARES_ONE) / p.inner + p.epsilon);
#pragma unroll 1
    for (int round = 0; round < ROUNDS; round += IN_FLIGHT) {
        float4 x[IN_FLIGHT];
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; k++) x[k] = __ldcg((const float4 *)(from + (size_t)min(token + (round + k) * (THREADS / PIECES), N - 1) * p.inner));
        if (round == 0) __syncthreads();
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; k++) {
            int row = token + (round + k) * (THREADS / PIECES);
            if (there) *(uint2 *)((unsigned char *)s.work + row * PITCH + 8 * piece) = normalised(x[k], s.scratch[row], weight);
        }
    }
}

// The sums of a tile over a group of columns.
__device__ __forceinline__ void multiply_tile(const Shared &s, Stream &stream, int op, int group, int tile, int lane, TileSums &sums) {
    const Product &p = s.products[op % 3];
    int columns = columns_of(p, group);
    u32 inputs = inputs_of(s, lane);
    if (p.parts[0].codes) {
        float2 offsets = offsets_of(p, s, op, tile);
#pragma unroll 1
        for (int column = 0; column < columns; column += SLICE) {
            u32 stage = wait_for_slice(s, stream);
            multiply_slice(s, stage, inputs + 2 * column, (group * CHUNK + column) / 64, offsets, lane, sums);
            leave_slice(s, stream, op, lane);
        }
        scale_sums(sums);
        return;
    }
#pragma unroll 1
    for (int column = 0; column < columns; column += 64) {
        Dense w[ROW_TILES];
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
            load_dense(dense_row(p, tile, 2 * r, lane) + group * CHUNK + column, dense_row(p, tile, 2 * r + 1, lane) + group * CHUNK + column, w[r]);
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            u32 in[8];
            unpack(shared_16(inputs + 8 * t * PITCH + 2 * column), shared_16(inputs + 8 * t * PITCH + 2 * column + 16), in);
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) multiply_dense(w[r], in, sums.of[r][t]);
        }
    }
}

__device__ __forceinline__ void multiply_product(const Shared &s, Stream &stream, int op) {
    const Product &p = s.products[op % 3];
    int lane = (thread_number() & 31), tiles = tiles_of(p);
    Range units = s.units[op % 3];
    int unit = units.begin + warp_number();
#pragma unroll 1
    for (int group = units.begin / tiles, first = group; group * tiles < units.end; group++) {
        if (group > first) __syncthreads();
        if (p.source == FROM_RESIDUAL) copy_normalised(p, s, group, (op + 2) % 3);
        else copy_inputs(p, s, group);
        int end = min(units.end, (group + 1) * tiles);
        wait_for_copies<0>();
        __syncthreads();
        if (p.ranks) multiply_low_rank(p, s, group, max(units.begin - group * tiles, 0), end - group * tiles, op % 3);
#pragma unroll 1
        for (; unit < end; unit += WARPS) {
            TileSums sums = no_sums();
            multiply_tile(s, stream, op, group, unit - group * tiles, lane, sums);
            leave_sums(p, group, unit - group * tiles, op % 3, sums, lane);
        }
    }
    if (p.ranks) {
        gather_low_rank(p, s, op % 3);
        __syncthreads();
        *s.gathered = 0;   // all have the sums
    }
    finish_tiles(p, s, op % 3, lane);
    prepare_next(s, op, warp_number(), WARPS);
}
#endif

// Waits until all blocks have come here.
__device__ __forceinline__ void meet(u32 &passed) {
    __syncthreads();
    passed += gridDim.x;
    if (thread_number() == 0) {
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(step.barrier) : "memory");
        u32 found;
        do asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(step.barrier) : "memory");
        while ((int)(found - passed) < 0);
        __threadfence();
    }
    __syncthreads();
}

// ---- Attention ------------------------------------------------------------------------------------------------------------

#define LANES 16                    // that share a place
#define GROUPS (THREADS / LANES)    // of such lanes
#define PLACES (TILES == 4 ? 3 : 4)  // of a group at a time; fewer registers for the widest variant
#define OWN (WIDTH / LANES)         // columns of a lane: 4 or 8

// What warps find of a unit, which is a block's share of the places of a head of a sequence.
struct AttentionRoom {
    float most[WARPS], sum[WARPS], o[WARPS][WIDTH];
};

// The query of a unit, and the new key and value.
struct Prepared {
    float q[WIDTH];
    u16 new_key[WIDTH], new_value[WIDTH];
};

// A lane's columns of a row in 16 bits, in pairs.
struct Columns {
    u32 pairs[OWN / 2];
};

__device__ __forceinline__ Columns load_columns(const u16 *from) {
    Columns c;
#if WIDTH == 128
    uint4 v = __ldcg((const uint4 *)from);
    c.pairs[0] = v.x; c.pairs[1] = v.y; c.pairs[2] = v.z; c.pairs[3] = v.w;
#else
    uint2 v = __ldcg((const uint2 *)from);
    c.pairs[0] = v.x; c.pairs[1] = v.y;
#endif
    return c;
}

__device__ __forceinline__ u32 place_in_pages(int row, int at) {
    u32 page = __ldg(step.tables + row * step.table + (at >> step.page_shift));
    return (page << step.page_shift) + (at & ((1 << step.page_shift) - 1));
}

// Where the columns of a head begin at a place in the pages of keys or values.
__device__ __forceinline__ size_t begin_of(int head, u32 place) {
    return ((size_t)place * step.key_heads + head / (step.heads / step.key_heads)) * WIDTH;
}

// What a block reads at a time: PLACES * GROUPS places from `base` on of those before `end` that are its share of a head of a sequence.
struct Reading {
    int number, head, row, base, end;
};

__device__ __forceinline__ Reading first_reading(const int *lengths, int number) {
    Reading r;
    int unit = min(number, step.heads * N * step.splits - 1), split = unit / step.heads / N;
    r.number = number;
    r.head = unit % step.heads;
    r.row = unit / step.heads % N;
    int length = lengths[r.row], share = (length + step.splits - 1) / step.splits;
    r.base = split * share;
    r.end = min(length, r.base + share);
    return r;
}

__device__ __forceinline__ Reading reading_after(const int *lengths, const Reading &r) {
    Reading next = r;
    next.base += PLACES * GROUPS;
    if (next.base >= r.end) next = first_reading(lengths, r.number + gridDim.x);
    return next;
}

// A group's place number k of a reading. Where it is not in the pages yet, or past the end, the sequence's first: nothing is made of it.
__device__ __forceinline__ u32 place_of_group(const int *lengths, const Reading &r, int k, int tid) {
    int at = r.base + GROUPS * k + tid / LANES;
    return place_in_pages(r.row, at < min(r.end, lengths[r.row] - 1) ? at : 0);
}

// A lane's columns of the keys and values of its group's places.
struct Places {
    Columns keys[PLACES], values[PLACES];
};

__device__ __forceinline__ void load_place(const Product &p, int head, u32 place, int tid, Columns &key, Columns &value) {
    size_t from = begin_of(head, place) + tid % LANES * OWN;
    key = load_columns(p.keys + from);
    value = load_columns(p.values + from);
}

// Element i of a head that begins at x, turned by its position.
__device__ __forceinline__ float turned(const float *x, int i, int position) {
    float2 turn = __ldg(step.turns + position * (WIDTH / 2) + i % (WIDTH / 2));
    float own = __ldcg(x + i), other = __ldcg(x + (i + WIDTH / 2) % WIDTH);
    return own * turn.y + (i < WIDTH / 2 ? -other : other) * turn.x;
}

// Prepares all units of this block, those of four at a time side by side. New keys and values go into their pages too.
__device__ __forceinline__ void prepare(const Product &p, const int *lengths, int units, int tid, Prepared *prepared) {
    int i = tid % 128, shared_by = step.heads / step.key_heads;
    if (i >= WIDTH) return;
#pragma unroll 1
    for (int at = tid / 128; blockIdx.x + at * gridDim.x < units; at += THREADS / 128) {
        Reading unit = first_reading(lengths, blockIdx.x + at * gridDim.x);
        int position = lengths[unit.row] - 1;
        const float *joined = step.joined + (size_t)unit.row * (step.heads + 2 * step.key_heads) * WIDTH;
        const float *key = joined + (step.heads + unit.head / shared_by) * WIDTH;
        float q = turned(joined + unit.head * WIDTH, i, position) * step.scale;
        u16 new_key = narrow(turned(key, i, position)), new_value = narrow(__ldcg(key + step.key_heads * WIDTH + i));
        prepared[at].q[i] = q;
        prepared[at].new_key[i] = new_key;
        prepared[at].new_value[i] = new_value;
        if (unit.head % shared_by == 0 && unit.end > position) {
            size_t to = begin_of(unit.head, place_in_pages(unit.row, position)) + i;
            asm volatile("st.global.u16 [%0], %1;" ::"l"(p.keys + to), "h"(new_key) : "memory");
            asm volatile("st.global.u16 [%0], %1;" ::"l"(p.values + to), "h"(new_value) : "memory");
        }
    }
}

__device__ __forceinline__ void write_unit(const Reading &unit, int i, const AttentionRoom &room) {
    if (i >= WIDTH) return;
    int split = unit.number / step.heads / N;
    float highest = NOTHING, total = 0.0f, value = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, room.most[w]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        float weight = __expf(room.most[w] - highest);
        total += room.sum[w] * weight;
        value += room.o[w][i] * weight;
    }
    value = total > 0.0f ? value / total : 0.0f;
    size_t head = (size_t)unit.row * step.heads + unit.head;
    if (step.splits == 1) {
        step.result[head * WIDTH + i] = narrow(value);
        return;
    }
    step.attended[(head * step.splits + split) * WIDTH + i] = value;
    if (i == 0) step.log_sums[head * step.splits + split] = total > 0.0f ? highest + logf(total) : NOTHING;
}

// Groups of 16 lanes go over the places of a unit, each with a softmax of its own, which are joined in the end. Keys and values are on their
// way while those before are used, and the numbers of their pages one reading earlier. What is in the pages does not depend on what other
// blocks still compute, so this begins before they meet.
__device__ __forceinline__ void attend(const Product &p, const Shared &s, u32 &passed) {
    AttentionRoom &room = *(AttentionRoom *)s.work;
    const Prepared *unit = (Prepared *)(&room + 1);
    int tid = thread_number(), lane = tid % LANES, units = step.heads * N * step.splits;
    Reading now = first_reading(s.lengths, blockIdx.x), next = reading_after(s.lengths, now);
    Places places;
    u32 numbers[PLACES];
#pragma unroll
    for (int k = 0; k < PLACES; k++) load_place(p, now.head, place_of_group(s.lengths, now, k, tid), tid, places.keys[k], places.values[k]);
#pragma unroll
    for (int k = 0; k < PLACES; k++) numbers[k] = place_of_group(s.lengths, next, k, tid);
    meet(passed);
    prepare(p, s.lengths, units, tid, (Prepared *)(&room + 1));
    __syncthreads();
    float q[OWN] = {}, o[OWN] = {}, most = NOTHING, sum = 0.0f;
    bool begins = true;
#pragma unroll 1
    while (now.number < units) {
        int position = s.lengths[now.row] - 1;
        if (begins) {
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                q[i] = unit->q[lane * OWN + i];
                o[i] = 0.0f;
            }
            most = NOTHING;
            sum = 0.0f;
        }
        Reading after = reading_after(s.lengths, next);
#pragma unroll
        for (int k = 0; k < PLACES; k++) {
            int at = now.base + GROUPS * k + tid / LANES;
            bool there = at < now.end, is_new = there && at == position;
            float score = 0.0f;
#pragma unroll
            for (int i = 0; i < OWN / 2; i++) {
                u32 pair = is_new ? ((const u32 *)unit->new_key)[lane * (OWN / 2) + i] : places.keys[k].pairs[i];
                score += q[2 * i] * widen(pair & 0xffff) + q[2 * i + 1] * widen(pair >> 16);
            }
#pragma unroll
            for (int other = LANES / 2; other > 0; other /= 2) score += __shfl_xor_sync(0xffffffffu, score, other);
            if (!there) score = NOTHING;
            float higher = fmaxf(most, score), fade = __expf(most - higher), weight = there ? __expf(score - higher) : 0.0f;
            most = higher;
            sum = sum * fade + weight;
#pragma unroll
            for (int i = 0; i < OWN / 2; i++) {
                u32 pair = is_new ? ((const u32 *)unit->new_value)[lane * (OWN / 2) + i] : places.values[k].pairs[i];
                o[2 * i] = o[2 * i] * fade + weight * widen(pair & 0xffff);
                o[2 * i + 1] = o[2 * i + 1] * fade + weight * widen(pair >> 16);
            }
            load_place(p, next.head, numbers[k], tid, places.keys[k], places.values[k]);
            numbers[k] = place_of_group(s.lengths, after, k, tid);
        }
        begins = next.number != now.number;
        Reading done = now;
        now = next;
        next = after;
        if (!begins) continue;
        unit++;
        float higher = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, LANES)), fade = __expf(most - higher);
        sum *= fade;
        sum += __shfl_xor_sync(0xffffffffu, sum, LANES);
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            o[i] *= fade;
            o[i] += __shfl_xor_sync(0xffffffffu, o[i], LANES);
        }
        __syncthreads();   // what was there of the unit before has been read
        if (tid % 32 < LANES) {
#pragma unroll
            for (int i = 0; i < OWN; i++) room.o[tid / 32][lane * OWN + i] = o[i];
            room.most[tid / 32] = higher;
            room.sum[tid / 32] = sum;
        }
        __syncthreads();
        write_unit(done, tid, room);
    }
}

// ---- The step -------------------------------------------------------------------------------------------------------------

// The rows of the embedding that the tokens name, as the residual stream.
__device__ __forceinline__ void begin(const Shared &s) {
    for (int row = blockIdx.x; row < N; row += gridDim.x) {
        const u16 *from = step.embedding + (size_t)step.ids[row] * step.d;
        float sum = 0.0f;
#pragma unroll 1
        for (int i = thread_number(); i < step.d; i += THREADS) {
            float x = widen(from[i]);
            step.residual[(size_t)row * step.d + i] = x;
            sum += x * x;
        }
#if !BY_COLUMNS
        sum = sum_of_warp(sum);
        __syncthreads();
        if (thread_number() % 32 == 0) s.scratch[thread_number() / 32] = sum;
        __syncthreads();
        if (thread_number() == 0) step.squares[(2 * TOKENS + row) * SQUARES_APART] = llrintf(sum_of_warps(s.scratch) * SQUARES_ONE);
#endif
    }
}

// The first of the greatest logits of each row, -1 if one of them is no number; and the logarithm of its share of their softmax.
__device__ __forceinline__ void choose(const Shared &s) {
    int tid = thread_number();
    float *best_of = s.work;
    int *place_of_best = (int *)(s.work + THREADS);
    float *sum_of = s.work + 2 * THREADS;   // of all weights, that of the thread's best being 1
    for (int r = blockIdx.x; r < N; r += gridDim.x) {
        const float *row = step.logits + (size_t)r * step.vocabulary;
        float best = __ldcg(row), sum = 0.0f;
        int place = 0;
        bool number = true;
#pragma unroll 4
        for (int i = tid; i < step.vocabulary; i += THREADS) {
            float x = __ldcg(row + i);
            number = number && x == x;
            sum = x > best ? sum * __expf(best - x) + 1.0f : sum + __expf(x - best);
            if (x > best || (x == best && i < place)) { best = x; place = i; }
        }
        __syncthreads();
        best_of[tid] = best;
        sum_of[tid] = sum;
        place_of_best[tid] = number ? place : -1;
        __syncthreads();
        for (int half = THREADS / 2; half > 0; half /= 2) {
            if (tid < half) {
                int mine = place_of_best[tid], other = place_of_best[tid + half];
                float a = best_of[tid], b = best_of[tid + half], higher = fmaxf(a, b);
                bool takes = mine >= 0 && (other < 0 || b > a || (b == a && other < mine));
                sum_of[tid] = sum_of[tid] * __expf(a - higher) + sum_of[tid + half] * __expf(b - higher);
                best_of[tid] = higher;
                if (takes) place_of_best[tid] = other;
            }
            __syncthreads();
        }
        if (tid == 0) {
            step.choices[r] = place_of_best[0];
            step.choices[step.n + r] = bits(-__logf(sum_of[0]));
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) run_step(u32 passed) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared s = lay_out(memory);
    Stream stream = {};
    *s.position = Position{};
    if (!BY_COLUMNS) *s.gathered = 0;
    take_product(s, 0);
    take_product(s, 1);
    fetch_tables(s, memory);
    if (thread_number() < N) s.lengths[thread_number()] = __ldg(step.lengths + thread_number());
    clear_counted(0);
    begin(s);
    __syncthreads();
    fetch_ahead(s, stream, 0, (thread_number() & 31));
    prefetch_product(s.products[0], s.units[0], thread_number(), THREADS);
    meet(passed);
#pragma unroll 1
    for (int op = 0; op < step.count; op++) {
        Product &p = s.products[op % 3];
        if (op) {
            fetch_ahead(s, stream, op, (thread_number() & 31));
        }
#if BY_COLUMNS
        Dense a;
        load_low_rank(p, first_low_rank_unit(), a);
        bool here = p.source != FROM_ROWS && p.inner <= WARPS * SLICE && (p.source == FROM_RESIDUAL || step.splits > 1);
        if (p.source == FROM_RESIDUAL) {
            normalise(p, s, here);
            if (!here) {
                meet(passed);
                if (thread_number() == 0) p.rows_in = step.normalised;
            }
            __syncthreads();
        } else if (here) {
            join_attention(p, s);
            __syncthreads();
        }
        multiply_product(s, stream, op, here, a);
#else
        take_product(s, op + 2);
        multiply_product(s, stream, op);
#endif
        clear_counted((op + 1) % 3);
        const Product &next = s.products[(op + 1) % 3];
        if (op + 1 < step.count) {
            if (next.attends) attend(next, s, passed);
        }
        meet(passed);
    }
    choose(s);
}
