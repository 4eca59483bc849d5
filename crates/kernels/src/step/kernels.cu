// One token for each of n sequences, at most 8 * TILES of them: products that read four-bit weights where they lie, with
// their low-rank corrections in the same pass; attention over pages; the choice of the likeliest token.
//
// Compiled when it is first used, with TILES (1, 2 or 4), BF16 (0 or 1) and TABLE_ROW (256 or 128) defined. See mod.rs for what is computed and
// cuda.rs for the shapes of what is passed.
//
// How a product works. A block keeps some columns of the n inputs in shared memory and walks over tiles of
// 16 rows of W; its warps share out the columns. A tile is the left factor of mma.m16n8k16, the inputs are the right
// one, and because a sum does not depend on the order of its terms, a lane may take neighbouring columns for what the
// instruction calls columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9: of 64 columns that share a scale lane t of 4 has 16 to 16 t
// + 15, that is 8 bytes of codes. A byte is two levels of the code book in 16 bits each, looked up in a table of which every lane has a
// copy in its own bank. The scales are applied to the sums of 64 products, in f32.

typedef unsigned short u16;
typedef unsigned int u32;

#define THREADS 512
#define WARPS (THREADS / 32)
#define TOKENS (8 * TILES)
#define MOST_PARTS 3
#define MOST_ATTENTION_SPLITS 8
#define NOTHING -1e30f

// Where a product's input comes from.
#define FROM_RESIDUAL 0   // the residual stream, normalised
#define FROM_ROWS 1       // rows in 16 bits
// Where its result goes.
#define TO_ROWS 0         // rows of f32
#define TO_RESIDUAL 1     // added to the residual stream
#define TO_ACTIVATED 2    // silu(first part) * second part

struct Part {
    const u32 *codes;        // [rows, inner] in four bits, or null
    const u32 *scale_codes;  // 8-bit codes of the scales, or null
    const float *scales;     // of 64 values, or of 256 scales
    const float *offset;     // added to decoded scales
    const u16 *dense;        // [rows, inner] where there are no codes
    const u16 *a;            // [rank, inner], where the rank is not 0: a multiple of 64
    const u16 *b;            // [rows, rank]
    float lora_scale;
    int rows, rank;
    int first_row, first_rank;  // among those of all parts
};

struct Product {
    Part parts[MOST_PARTS];
    int part_count, n, inner;
    int rows, ranks;         // of all parts
    int tiles, team;         // tiles of 16 rows, and warps that share out one
    int splits, chunk;       // blocks that share out the columns of a tile, and how many columns each of them has at most
    int a_chunks;            // pieces of a chunk for the factors A
    int source, target;
    const float *residual;   // [n, inner]
    const u16 *norm;
    float epsilon;
    const u16 *rows_in;      // [n, inner]
    float *to;               // [n, rows], or the residual stream
    u16 *to_activated;       // [n, rows / 2]
    float *low_rank;         // [splits * a_chunks, n, ranks]
    float *partials;         // [tiles, splits, 16, TOKENS]
    u32 *arrived;            // [tiles], zero before and after
    u32 *ready;              // pieces of low_rank that are there; zero before
    const u32 *pairs;        // two levels for each byte
    const float *dynamic;    // levels of the scales' codes
};

struct Attend {
    const float *joined;     // [n, (heads + 2 key_heads) width]
    u16 *keys, *values;      // [places, key_heads width]
    const int *lengths;      // [n], the new token included
    const int *tables;       // [n, table]
    const float *frequencies;  // [width / 2]
    float *attended;         // [n, heads, splits, width]
    float *log_sums;         // [n, heads, splits]
    u16 *result;             // [n, heads width]
    u32 *arrived;            // [n, heads], zero before and after
    int table, page_tokens, heads, key_heads, splits;
    float scale;
};

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

// Lets the next kernel of the stream take the places of blocks that end, and waits for the one before. Until then a kernel
// reads nothing but weights and tables.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The number of the warp, which the compiler then knows to be the same in all lanes.
__device__ __forceinline__ int warp_number() { return __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0); }

__device__ __forceinline__ float sum_of_warp(float x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

// What the products of a block share.
struct Shared {
    u32 *pairs;      // [256, TABLE_ROW / 4], of which the first 32 of a row are used
    float *dynamic;  // [256]
    float *sums;     // [WARPS, 16, TOKENS]
    u32 *flags;      // [WARPS]
    u16 *low_rank;   // [n, ranks + 8], times the corrections' scales
    u16 *x;          // [n, chunk + 8]
};

__device__ __forceinline__ Shared lay_out(const Product &p, unsigned char *memory) {
    Shared s;
    s.pairs = (u32 *)memory;
    s.dynamic = (float *)(s.pairs + 256 * TABLE_ROW / 4);
    s.sums = s.dynamic + 256;
    s.flags = (u32 *)(s.sums + WARPS * 16 * TOKENS);
    s.low_rank = (u16 *)(s.flags + 16);
    s.x = s.low_rank + p.n * (p.ranks + 8);
    return s;
}

// The warps that share out the columns of a tile.
struct Team {
    int number, warps, warp, thread;
};

__device__ __forceinline__ Team team_of(const Product &p) {
    Team team;
    int warp = warp_number();
    team.warps = p.team;
    team.number = warp / p.team;
    team.warp = warp % p.team;
    team.thread = threadIdx.x - team.number * p.team * 32;
    return team;
}

__device__ __forceinline__ void wait_for(const Team &team) {
    if (team.warps == 1) {
        __syncwarp();
    } else {
        asm volatile("bar.sync %0, %1;" ::"r"(team.number + 1), "r"(team.warps * 32) : "memory");
    }
}

// A copy of the pairs for every bank. Neighbouring threads begin at different banks.
__device__ __forceinline__ void fetch_tables(const Product &p, const Shared &s) {
    for (int byte = threadIdx.x; byte < 256; byte += THREADS) {
        u32 pair = __ldg(p.pairs + byte);
        uint4 *to = (uint4 *)(s.pairs + byte * TABLE_ROW / 4);
#pragma unroll
        for (int i = 0; i < 8; i++) to[(i + byte) % 8] = make_uint4(pair, pair, pair, pair);
        s.dynamic[byte] = __ldg(p.dynamic + byte);
    }
}

__device__ __forceinline__ uint2 normalised(float4 x, float factor, uint2 weight) {
    uint2 y;
    y.x = narrow(x.x * factor * widen(weight.x & 0xffff)) | (u32)narrow(x.y * factor * widen(weight.x >> 16)) << 16;
    y.y = narrow(x.z * factor * widen(weight.y & 0xffff)) | (u32)narrow(x.w * factor * widen(weight.y >> 16)) << 16;
    return y;
}

// Columns first .. first + count of the normalised residual stream.
__device__ __forceinline__ void fetch_normalised(const Product &p, const Shared &s, int first, int count) {
    int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, pitch = p.chunk + 8;
    for (int row = 0; row < p.n; row++) {
        const float4 *x = (const float4 *)(p.residual + (size_t)row * p.inner);
        float sum = 0.0f;
#pragma unroll 4
        for (int i = tid; i < p.inner / 4; i += THREADS) {
            float4 v = x[i];
            sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        }
        sum = sum_of_warp(sum);
        if (lane == 0) s.sums[row * WARPS + warp] = sum;
    }
    __syncthreads();
    for (int row = 0; row < p.n; row++) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += s.sums[row * WARPS + w];
        float factor = rsqrtf(sum / p.inner + p.epsilon);
        const float4 *x = (const float4 *)(p.residual + (size_t)row * p.inner + first);
        const uint2 *norm = (const uint2 *)(p.norm + first);
#pragma unroll 4
        for (int i = tid; i < count / 4; i += THREADS) {
            float4 v = x[i];
            *(uint2 *)(s.x + row * pitch + 4 * i) = normalised(v, factor, __ldg(norm + i));
        }
    }
}

__device__ __forceinline__ void fetch_rows(const Product &p, const Shared &s, int first, int count) {
    for (int row = 0; row < p.n; row++) {
        const uint4 *x = (const uint4 *)(p.rows_in + (size_t)row * p.inner + first);
        uint4 *to = (uint4 *)(s.x + row * (p.chunk + 8));
#pragma unroll 4
        for (int i = threadIdx.x; i < count / 8; i += THREADS) to[i] = x[i];
    }
}

// Where a lane finds the inputs of its tokens: those past the last one are the last one, and come to nothing.
struct Inputs {
    const u16 *of[TILES];
};

__device__ __forceinline__ Inputs inputs_in(const Product &p, const u16 *rows, int pitch) {
    int lane = threadIdx.x % 32;
    Inputs inputs;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
        inputs.of[tile] = rows + min(8 * tile + lane / 4, p.n - 1) * pitch + 16 * (lane % 4);
    return inputs;
}

// A lane's 16 columns of one token, in pairs.
__device__ __forceinline__ void load_inputs(const u16 *from, u32 *b) {
    uint4 first = ((const uint4 *)from)[0], second = ((const uint4 *)from)[1];
    b[0] = first.x; b[1] = first.y; b[2] = first.z; b[3] = first.w;
    b[4] = second.x; b[5] = second.y; b[6] = second.z; b[7] = second.w;
}

// Two rows of a packed tile, those that one lane has.
struct PackedRows {
    const uint2 *words[2];
    const u32 *scale_codes[2];  // or plain scales
    const float *scales[2];
    u32 first_group[2];
    float offsets[2];
};

// The codes of 128 columns of two rows, and their two scales as they are stored.
struct Codes {
    uint2 words[2][2];
    u32 scales[2][2];
};

template <bool PLAIN> __device__ __forceinline__ void fetch_codes(const PackedRows &rows, int unit, Codes &to) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint2 *words = rows.words[half] + unit * 8;
        to.words[half][0] = __ldg(words);
        to.words[half][1] = __ldg(words + 4);
        if (PLAIN) {
            uint2 scales = __ldg((const uint2 *)rows.scale_codes[half] + unit);
            to.scales[half][0] = scales.x;
            to.scales[half][1] = scales.y;
        } else {
            to.scales[half][0] = __ldg((const u16 *)rows.scale_codes[half] + unit);
            to.scales[half][1] = bits(__ldg(rows.scales[half] + (2 * rows.first_group[half] + unit) / 128));
        }
    }
}

template <bool PLAIN>
__device__ __forceinline__ float scale_of(const PackedRows &rows, const Shared &s, const Codes &codes, int half, int block) {
    if (PLAIN) return __uint_as_float(codes.scales[half][block]);
    u32 code = block ? codes.scales[half][0] >> 8 : codes.scales[half][0] & 0xff;
    return s.dynamic[code] * __uint_as_float(codes.scales[half][1]) + rows.offsets[half];
}

// A byte's pair of levels: row `byte` of the table, this lane's column. Where rows are 256 bytes apart, the byte is the second one
// of the address, which takes one instruction to make.
__device__ __forceinline__ u32 pair_of(const Shared &s, u32 word, int byte) {
    u32 column = threadIdx.x % 32 * 4;
#if TABLE_ROW == 256
    u32 offset = __byte_perm(word, column, 0x5504 | byte << 4);
#else
    u32 offset = ((byte == 0 ? word << 7 : word >> (8 * byte - 7)) & 0x7f80) | column;
#endif
    return *(const u32 *)((const unsigned char *)s.pairs + offset);
}

template <bool PLAIN> __device__ __forceinline__ void add_codes(
    const Shared &s, const PackedRows &rows, const Inputs &inputs, const Codes &codes, int column, float (*sums)[4]
) {
    u32 a[2][2][8];
#pragma unroll
    for (int block = 0; block < 2; block++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int byte = 0; byte < 4; byte++) {
                a[block][half][byte] = pair_of(s, codes.words[half][block].x, byte);
                a[block][half][4 + byte] = pair_of(s, codes.words[half][block].y, byte);
            }
        }
    }
    float scales[2][2];
#pragma unroll
    for (int block = 0; block < 2; block++) {
#pragma unroll
        for (int half = 0; half < 2; half++) scales[block][half] = scale_of<PLAIN>(rows, s, codes, half, block);
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        // Four sums that do not wait for each other.
        float unscaled[2][2][4] = {};
        u32 b[2][8];
        load_inputs(inputs.of[tile] + column, b[0]);
        load_inputs(inputs.of[tile] + column + 64, b[1]);
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
#pragma unroll
            for (int block = 0; block < 2; block++)
                multiply(unscaled[block][j / 2 % 2], a[block][0][j], a[block][1][j], a[block][0][j + 1], a[block][1][j + 1], b[block][j], b[block][j + 1]);
        }
#pragma unroll
        for (int block = 0; block < 2; block++) {
#pragma unroll
            for (int i = 0; i < 4; i++) sums[tile][i] += scales[block][i / 2] * (unscaled[block][0][i] + unscaled[block][1][i]);
        }
    }
}

// Units unit .. end of 128 columns, of those that are in shared memory and begin at unit `before`.
template <bool PLAIN> __device__ __forceinline__ void multiply_packed(
    const Shared &s, const PackedRows &rows, const Inputs &inputs, int before, int unit, int end, float (*sums)[4]
) {
    constexpr int AHEAD = 1;
    Codes codes[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if (unit + i < end) fetch_codes<PLAIN>(rows, before + unit + i, codes[i]);
    for (; unit < end; unit += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (unit + i >= end) return;
            Codes now = codes[i];
            if (unit + i + AHEAD < end) fetch_codes<PLAIN>(rows, before + unit + i + AHEAD, codes[i]);
            add_codes<PLAIN>(s, rows, inputs, now, 128 * (unit + i), sums);
        }
    }
}

__device__ __forceinline__ void fetch_dense(const u16 *const *rows, int column, uint4 (*to)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint4 *row = (const uint4 *)(rows[half] + column);
        to[half][0] = __ldg(row);
        to[half][1] = __ldg(row + 1);
    }
}

__device__ __forceinline__ void add_dense(const Inputs &inputs, const uint4 (*a)[2], int column, float (*sums)[4]) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        u32 b[8];
        load_inputs(inputs.of[tile] + column, b);
        multiply(sums[tile], a[0][0].x, a[1][0].x, a[0][0].y, a[1][0].y, b[0], b[1]);
        multiply(sums[tile], a[0][0].z, a[1][0].z, a[0][0].w, a[1][0].w, b[2], b[3]);
        multiply(sums[tile], a[0][1].x, a[1][1].x, a[0][1].y, a[1][1].y, b[4], b[5]);
        multiply(sums[tile], a[0][1].z, a[1][1].z, a[0][1].w, a[1][1].w, b[6], b[7]);
    }
}

// Blocks block .. end of 64 columns of rows in 16 bits; the inputs begin at column `before` of the rows. The pointers are those
// of the lane's first column.
__device__ __forceinline__ void multiply_dense(
    const u16 *const *rows, const Inputs &inputs, int before, int block, int end, float (*sums)[4]
) {
    constexpr int AHEAD = 2;
    if (block >= end) return;
    uint4 a[AHEAD][2][2];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if (block + i < end) fetch_dense(rows, before + 64 * (block + i), a[i]);
    for (; block < end; block += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (block + i >= end) return;
            add_dense(inputs, a[i], 64 * (block + i), sums);
            if (block + i + AHEAD < end) fetch_dense(rows, before + 64 * (block + i + AHEAD), a[i]);
        }
    }
}

// Leaves what each warp of a team has summed in shared memory.
__device__ __forceinline__ void leave_sums(const Shared &s, const Team &team, float (*sums)[4]) {
    int lane = threadIdx.x % 32;
    float *own = s.sums + threadIdx.x / 32 * 16 * TOKENS;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        int column = 8 * tile + 2 * (lane % 4), row = lane / 4;
        *(float2 *)(own + row * TOKENS + column) = make_float2(sums[tile][0], sums[tile][1]);
        *(float2 *)(own + (row + 8) * TOKENS + column) = make_float2(sums[tile][2], sums[tile][3]);
    }
    wait_for(team);
}

__device__ __forceinline__ float sum_of_team(const Shared &s, const Team &team, int place) {
    const float *from = s.sums + team.number * team.warps * 16 * TOKENS + place;
    float sum = 0.0f;
    for (int warp = 0; warp < team.warps; warp++) sum += from[warp * 16 * TOKENS];
    return sum;
}

// 16 rows of the factors A by a piece of this block's columns, which the whole block shares out.
__device__ __forceinline__ void low_rank_piece(const Product &p, const Shared &s, int unit, int split, int first, int count) {
    int tile = unit / p.a_chunks, piece = unit % p.a_chunks, part = 0;
    while (tile >= p.parts[part].rank / 16) tile -= p.parts[part++].rank / 16;
    int lane = threadIdx.x % 32, warp = warp_number(), blocks = count / 64;
    const u16 *rows[2];
    for (int half = 0; half < 2; half++)
        rows[half] = p.parts[part].a + (size_t)(16 * tile + lane / 4 + 8 * half) * p.inner + 16 * (lane % 4);
    int from = blocks * piece / p.a_chunks, own = blocks * (piece + 1) / p.a_chunks - from;
    float sums[TILES][4] = {};
    multiply_dense(rows, inputs_in(p, s.x, p.chunk + 8), first, from + own * warp / WARPS, from + own * (warp + 1) / WARPS, sums);
    Team all = {0, WARPS, warp, (int)threadIdx.x};
    leave_sums(s, all, sums);
    float *to = p.low_rank + (size_t)(split * p.a_chunks + piece) * p.n * p.ranks + p.parts[part].first_rank + 16 * tile;
    for (int place = threadIdx.x; place < 16 * TOKENS; place += THREADS) {
        int row = place % 16, token = place / 16;
        if (token < p.n) to[(size_t)token * p.ranks + row] = sum_of_team(s, all, row * TOKENS + token);
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(p.ready, 1u);
}

// Waits for all pieces and adds them up, times the corrections' scales. Blocks with lower numbers, which run already, never
// wait before they have written theirs.
__device__ __forceinline__ void gather_low_rank(const Product &p, const Shared &s) {
    if (threadIdx.x == 0) {
        u32 all = (u32)(p.ranks / 16 * p.a_chunks * p.splits);
        while (*(volatile u32 *)p.ready < all) {
        }
        __threadfence();
    }
    __syncthreads();
    int pieces = p.splits * p.a_chunks;
    for (int place = threadIdx.x; place < p.ranks * p.n; place += THREADS) {
        int rank = place % p.ranks, token = place / p.ranks, part = 0;
        const float *from = p.low_rank + (size_t)token * p.ranks + rank;
        float sum = 0.0f;
#pragma unroll 4
        for (int piece = 0; piece < pieces; piece++) sum += __ldcg(from + (size_t)piece * p.n * p.ranks);
        while (part + 1 < p.part_count && rank >= p.parts[part + 1].first_rank) part++;
        s.low_rank[token * (p.ranks + 8) + rank] = narrow(sum * p.parts[part].lora_scale);
    }
    __syncthreads();
}

// The rows of a tile: eight of the first part and eight of the second where their products are activated together, else
// sixteen that follow each other.
__device__ __forceinline__ void place_of(const Product &p, int tile, int row, int half, int &part, int &own) {
    if (p.target == TO_ACTIVATED) {
        part = half;
        own = 8 * tile + row;
        return;
    }
    part = 0;
    while (part + 1 < p.part_count && 16 * tile >= p.parts[part + 1].first_row) part++;
    own = 16 * tile - p.parts[part].first_row + row + 8 * half;
}

// What the corrections of a tile's rows add. Where the halves of a tile belong to different layers each is taken for itself.
__device__ __forceinline__ void add_corrections(const Product &p, const Shared &s, int tile, float (*sums)[4]) {
    int lane = threadIdx.x % 32, parts[2], own[2];
    for (int half = 0; half < 2; half++) place_of(p, tile, lane / 4, half, parts[half], own[half]);
    for (int half = 0; half < 2; half++) {
        const Part &part = p.parts[parts[half]];
        bool both = parts[0] == parts[1];
        if (!part.rank || (both && half == 1)) continue;
        const u16 *rows[2];
        for (int i = 0; i < 2; i++) rows[i] = part.b + (size_t)min(own[i], part.rows - 1) * part.rank + 16 * (lane % 4);
        float sum[TILES][4] = {};
        multiply_dense(rows, inputs_in(p, s.low_rank + part.first_rank, p.ranks + 8), 0, 0, part.rank / 64, sum);
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (both || j / 2 == half) sums[i][j] += sum[i][j];
        }
    }
}

// Whether this team is the last of those that share out a tile's columns; then all their sums are there.
__device__ __forceinline__ bool is_last(const Product &p, const Shared &s, const Team &team, int tile, int split) {
    float *own = p.partials + ((size_t)tile * p.splits + split) * 16 * TOKENS;
    for (int place = team.thread; place < 16 * TOKENS; place += team.warps * 32) own[place] = sum_of_team(s, team, place);
    __threadfence();
    wait_for(team);
    if (team.thread == 0) s.flags[team.number] = atomicAdd(p.arrived + tile, 1u);
    wait_for(team);
    bool last = s.flags[team.number] == (u32)(p.splits - 1);
    if (last) __threadfence();
    return last;
}

__device__ __forceinline__ float sum_of_splits(const Product &p, int tile, int place) {
    const float *from = p.partials + (size_t)tile * p.splits * 16 * TOKENS + place;
    float sum = 0.0f;
#pragma unroll 4
    for (int split = 0; split < p.splits; split++) sum += __ldcg(from + (size_t)split * 16 * TOKENS);
    return sum;
}

__device__ __forceinline__ void write_tile(const Product &p, const Shared &s, const Team &team, int tile) {
    for (int place = team.thread; place < 8 * TOKENS; place += team.warps * 32) {
        int row = place % 8, token = place / 8;
        if (token >= p.n) continue;
        float values[2];
        for (int half = 0; half < 2; half++) {
            int at = (row + 8 * half) * TOKENS + token;
            values[half] = p.splits > 1 ? sum_of_splits(p, tile, at) : sum_of_team(s, team, at);
        }
        if (p.target == TO_ACTIVATED) {
            int own = 8 * tile + row, all = p.parts[0].rows;
            if (own < all) p.to_activated[(size_t)token * all + own] = narrow(values[0] / (1.0f + __expf(-values[0])) * values[1]);
            continue;
        }
        for (int half = 0; half < 2; half++) {
            int own = 16 * tile + row + 8 * half;
            if (own >= p.rows) continue;
            float *to = p.to + (size_t)token * p.rows + own;
            *to = p.target == TO_RESIDUAL ? *to + values[half] : values[half];
        }
    }
    if (p.splits > 1 && team.thread == 0) p.arrived[tile] = 0;
    wait_for(team);
}

// A warp's share of the product of a tile with this block's columns.
__device__ __forceinline__ void weight_tile(
    const Product &p, const Shared &s, const Team &team, int tile, int first, int count, float (*sums)[4]
) {
    int lane = threadIdx.x % 32, parts[2], own[2];
    for (int half = 0; half < 2; half++) {
        place_of(p, tile, lane / 4, half, parts[half], own[half]);
        own[half] = min(own[half], p.parts[parts[half]].rows - 1);
    }
    Inputs inputs = inputs_in(p, s.x, p.chunk + 8);
    if (!p.parts[0].codes) {
        const u16 *rows[2];
        for (int half = 0; half < 2; half++)
            rows[half] = p.parts[parts[half]].dense + (size_t)own[half] * p.inner + 16 * (lane % 4);
        int blocks = count / 64;
        multiply_dense(rows, inputs, first, blocks * team.warp / team.warps, blocks * (team.warp + 1) / team.warps, sums);
        return;
    }
    PackedRows rows;
    bool plain = !p.parts[0].scale_codes;
    for (int half = 0; half < 2; half++) {
        const Part &part = p.parts[parts[half]];
        u32 group = (u32)own[half] * (u32)(p.inner / 256);
        rows.words[half] = (const uint2 *)(part.codes + (size_t)own[half] * (p.inner / 8)) + lane % 4;
        rows.scale_codes[half] = plain ? (const u32 *)part.scales + 4 * (size_t)group : part.scale_codes + group;
        rows.scales[half] = part.scales;
        rows.first_group[half] = group;
        rows.offsets[half] = plain ? 0.0f : __ldg(part.offset);
    }
    int units = count / 128, from = units * team.warp / team.warps, end = units * (team.warp + 1) / team.warps;
    if (plain) multiply_packed<true>(s, rows, inputs, first / 128, from, end, sums);
    else multiply_packed<false>(s, rows, inputs, first / 128, from, end, sums);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) step_product(const __grid_constant__ Product p) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared s = lay_out(p, memory);
    Team team = team_of(p);
    int split = blockIdx.x % p.splits, groups = p.inner / 256;
    int first = groups * split / p.splits * 256, count = groups * (split + 1) / p.splits * 256 - first;
    int blocks = gridDim.x / p.splits, block = blockIdx.x / p.splits, pieces = p.ranks / 16 * p.a_chunks;
    let_next_begin();
    fetch_tables(p, s);
    wait_for_previous();
    if (p.source == FROM_RESIDUAL) fetch_normalised(p, s, first, count);
    else fetch_rows(p, s, first, count);
    __syncthreads();
    for (int unit = block; unit < pieces; unit += blocks) low_rank_piece(p, s, unit, split, first, count);
    // Those that had a piece of the factors come last to the tiles.
    int start = (block - pieces % blocks + blocks) % blocks;
    bool corrects = pieces > 0 && split == 0, gathered = false;
    for (int round = 0; start + round * blocks < p.tiles || !round; round += WARPS / p.team) {
        int tile = start + (round + team.number) * blocks;
        float sums[TILES][4] = {};
        if (tile < p.tiles) weight_tile(p, s, team, tile, first, count, sums);
        if (corrects && !gathered) {
            gather_low_rank(p, s);
            gathered = true;
        }
        if (tile >= p.tiles) continue;
        if (corrects && team.warp == team.warps - 1) add_corrections(p, s, tile, sums);
        leave_sums(s, team, sums);
        if (p.splits == 1 || is_last(p, s, team, tile, split)) write_tile(p, s, team, tile);
        else wait_for(team);
    }
}

// Turned by its position: element i of a head that begins at x.
__device__ __forceinline__ float turned(const float *x, int i, int width, int position, const float *frequencies) {
    int half = width / 2, j = i % half;
    float sine, cosine;
    sincosf(position * __ldg(frequencies + j), &sine, &cosine);
    return i < half ? x[i] * cosine - x[i + half] * sine : x[i] * cosine + x[i - half] * sine;
}

__device__ __forceinline__ float dot(const float *q, uint4 k) {
    u32 words[4] = {k.x, k.y, k.z, k.w};
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) sum += q[2 * i] * widen(words[i] & 0xffff) + q[2 * i + 1] * widen(words[i] >> 16);
    return sum;
}

__device__ __forceinline__ void weigh(float *o, float weight, uint4 v) {
    u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        o[2 * i] += weight * widen(words[i] & 0xffff);
        o[2 * i + 1] += weight * widen(words[i] >> 16);
    }
}

#define LANES 8       // that share a key
#define GROUPS 16     // of such lanes in a block

// The last of the blocks that share out a head's places weighs what they found by what they summed.
template <int WIDTH> __device__ __forceinline__ void join_splits(const Attend &p, size_t head, int split, float log_sum) {
    __shared__ u32 before;
    if (threadIdx.x == 0) p.log_sums[head * p.splits + split] = log_sum;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) before = atomicAdd(p.arrived + head, 1u);
    __syncthreads();
    if (before != (u32)(p.splits - 1)) return;
    __threadfence();
    for (int i = threadIdx.x; i < WIDTH; i += LANES * GROUPS) {
        float most = NOTHING, sum = 0.0f, value = 0.0f, log_sums[MOST_ATTENTION_SPLITS], parts[MOST_ATTENTION_SPLITS];
#pragma unroll
        for (int s = 0; s < MOST_ATTENTION_SPLITS; s++) {
            bool there = s < p.splits;
            log_sums[s] = there ? __ldcg(p.log_sums + head * p.splits + s) : NOTHING;
            parts[s] = there ? __ldcg(p.attended + (head * p.splits + s) * WIDTH + i) : 0.0f;
            most = fmaxf(most, log_sums[s]);
        }
#pragma unroll
        for (int s = 0; s < MOST_ATTENTION_SPLITS; s++) {
            float weight = s < p.splits ? __expf(log_sums[s] - most) : 0.0f;
            sum += weight;
            value += weight * parts[s];
        }
        p.result[head * WIDTH + i] = narrow(value / sum);
    }
    if (threadIdx.x == 0) p.arrived[head] = 0;
}

// A block has a head, a sequence and a share of its places. Groups of 8 lanes go over the places, each with a softmax of
// its own, which are joined in the end.
template <int WIDTH> __device__ __forceinline__ void attend(const Attend &p) {
    constexpr int OWN = WIDTH / LANES;
    __shared__ float q[WIDTH], o[GROUPS][WIDTH], most[GROUPS], sum[GROUPS];
    __shared__ __align__(16) u16 new_key[WIDTH];
    __shared__ __align__(16) u16 new_value[WIDTH];
    let_next_begin();
    wait_for_previous();
    int head = blockIdx.x, row = blockIdx.y, split = blockIdx.z, tid = threadIdx.x;
    int shared_by = p.heads / p.key_heads, key_head = head / shared_by;
    int length = p.lengths[row], position = length - 1;
    int share = (length + p.splits - 1) / p.splits, first = split * share, end = min(length, first + share);
    const int *table = p.tables + (size_t)row * p.table;
    const float *joined = p.joined + (size_t)row * (p.heads + 2 * p.key_heads) * WIDTH;
    bool has_new = first < end && end == length;
    for (int i = tid; i < WIDTH; i += LANES * GROUPS) {
        q[i] = turned(joined + head * WIDTH, i, WIDTH, position, p.frequencies) * p.scale;
        if (has_new) {
            new_key[i] = narrow(turned(joined + (p.heads + key_head) * WIDTH, i, WIDTH, position, p.frequencies));
            new_value[i] = narrow(joined[(p.heads + p.key_heads + key_head) * WIDTH + i]);
            if (head % shared_by == 0) {
                size_t place = (size_t)table[position / p.page_tokens] * p.page_tokens + position % p.page_tokens;
                size_t at = (place * p.key_heads + key_head) * WIDTH + i;
                p.keys[at] = new_key[i];
                p.values[at] = new_value[i];
            }
        }
    }
    __syncthreads();
    int group = tid / LANES, lane = tid % LANES;
    float own_q[OWN], own_o[OWN] = {}, own_most = NOTHING, own_sum = 0.0f;
#pragma unroll
    for (int i = 0; i < OWN; i++) own_q[i] = q[lane * OWN + i];
    for (int base = first; base < end; base += 2 * GROUPS) {
        uint4 key[2][OWN / 8], value[2][OWN / 8];
#pragma unroll
        for (int two = 0; two < 2; two++) {
            int at = base + GROUPS * two + group;
            const u16 *k = new_key, *v = new_value;
            if (at < position) {
                size_t place = (size_t)table[at / p.page_tokens] * p.page_tokens + at % p.page_tokens;
                size_t start = (place * p.key_heads + key_head) * WIDTH;
                k = p.keys + start;
                v = p.values + start;
            }
            if (at < end) {
#pragma unroll
                for (int i = 0; i < OWN / 8; i++) {
                    key[two][i] = ((const uint4 *)(k + lane * OWN))[i];
                    value[two][i] = ((const uint4 *)(v + lane * OWN))[i];
                }
            }
        }
#pragma unroll
        for (int two = 0; two < 2; two++) {
            bool there = base + GROUPS * two + group < end;
            float score = 0.0f;
            if (there) {
#pragma unroll
                for (int i = 0; i < OWN / 8; i++) score += dot(own_q + 8 * i, key[two][i]);
            }
            for (int step = LANES / 2; step > 0; step /= 2) score += __shfl_xor_sync(0xffffffffu, score, step);
            if (there) {
                float higher = fmaxf(own_most, score);
                float fade = __expf(own_most - higher), weight = __expf(score - higher);
                own_most = higher;
                own_sum = own_sum * fade + weight;
#pragma unroll
                for (int i = 0; i < OWN; i++) own_o[i] *= fade;
#pragma unroll
                for (int i = 0; i < OWN / 8; i++) weigh(own_o + 8 * i, weight, value[two][i]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < OWN; i++) o[group][lane * OWN + i] = own_o[i];
    if (lane == 0) {
        most[group] = own_most;
        sum[group] = own_sum;
    }
    __syncthreads();
    float highest = NOTHING, total = 0.0f;
    for (int g = 0; g < GROUPS; g++) highest = fmaxf(highest, most[g]);
    for (int g = 0; g < GROUPS; g++) total += sum[g] * __expf(most[g] - highest);
    size_t own_head = (size_t)row * p.heads + head;
    float *to = p.attended + (own_head * p.splits + split) * WIDTH;
    for (int i = tid; i < WIDTH; i += LANES * GROUPS) {
        float value = 0.0f;
        for (int g = 0; g < GROUPS; g++) value += o[g][i] * __expf(most[g] - highest);
        value = total > 0.0f ? value / total : 0.0f;
        if (p.splits == 1) p.result[own_head * WIDTH + i] = narrow(value);
        else to[i] = value;
    }
    if (p.splits > 1) join_splits<WIDTH>(p, own_head, split, total > 0.0f ? highest + logf(total) : NOTHING);
}

extern "C" __global__ void __launch_bounds__(LANES * GROUPS) step_attend_64(const Attend p) { attend<64>(p); }
extern "C" __global__ void __launch_bounds__(LANES * GROUPS) step_attend_128(const Attend p) { attend<128>(p); }

// The rows of a table [v, d] that the tokens name, as the residual stream; makes the products' signals zero.
extern "C" __global__ void __launch_bounds__(THREADS) step_embed(
    const u16 *table, const int *ids, float *residual, int d, u32 *ready, int signals
) {
    let_next_begin();
    const u16 *from = table + (size_t)ids[blockIdx.x] * d;
    for (int i = threadIdx.x; i < d; i += THREADS) residual[(size_t)blockIdx.x * d + i] = widen(from[i]);
    if (blockIdx.x == 0)
        for (int i = threadIdx.x; i < signals; i += THREADS) ready[i] = 0;
}

// The normalised residual stream in 16 bits, for more rows than are worth normalising in every block of a product.
extern "C" __global__ void __launch_bounds__(THREADS) step_normalise(
    const float *residual, const u16 *norm, float epsilon, int d, u16 *to
) {
    __shared__ float sums[WARPS];
    let_next_begin();
    wait_for_previous();
    const float4 *x = (const float4 *)(residual + (size_t)blockIdx.x * d);
    float sum = 0.0f;
    for (int i = threadIdx.x; i < d / 4; i += THREADS) {
        float4 v = x[i];
        sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    sum = sum_of_warp(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += sums[w];
    float factor = rsqrtf(sum / d + epsilon);
    for (int i = threadIdx.x; i < d / 4; i += THREADS)
        ((uint2 *)(to + (size_t)blockIdx.x * d))[i] = normalised(x[i], factor, __ldg((const uint2 *)norm + i));
}

// The first of the greatest logits of each row [n, v]; -1 if one of them is no number.
extern "C" __global__ void __launch_bounds__(THREADS) step_choose(const float *logits, int v, int *choices) {
    __shared__ float best_of[THREADS];
    __shared__ int place_of_best[THREADS];
    wait_for_previous();
    const float *row = logits + (size_t)blockIdx.x * v;
    float best = row[0];
    int place = 0;
    bool number = true;
    for (int i = threadIdx.x; i < v; i += THREADS) {
        float x = row[i];
        number = number && x == x;
        if (x > best || (x == best && i < place)) { best = x; place = i; }
    }
    best_of[threadIdx.x] = best;
    place_of_best[threadIdx.x] = number ? place : -1;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) {
            int mine = place_of_best[threadIdx.x], other = place_of_best[threadIdx.x + half];
            float a = best_of[threadIdx.x], b = best_of[threadIdx.x + half];
            bool takes = mine >= 0 && (other < 0 || b > a || (b == a && other < mine));
            if (takes) { best_of[threadIdx.x] = b; place_of_best[threadIdx.x] = other; }
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) choices[blockIdx.x] = place_of_best[0];
}
