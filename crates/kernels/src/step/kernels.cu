// One token for each of n sequences, at most 8 * TILES of them: products that read four-bit weights where they lie, with
// their low-rank corrections in the same pass; attention over pages; the choice of the likeliest token.
//
// Compiled when it is first used, with TILES (1, 2 or 4) and BF16 (0 or 1) defined. See mod.rs for what is computed and
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

#define THREADS (TILES < 4 ? 256 : 512)
#define WARPS (THREADS / 32)
#define TOKENS (8 * TILES)
#define MOST_PARTS 3
#ifdef EMULATED
#define SHARED static
#else
#define SHARED __shared__
#endif

// Where a product's input comes from.
#define FROM_RESIDUAL 0   // the residual stream, normalised
#define FROM_ATTENTION 1  // what the splits of attention found, weighed together
#define FROM_ACTIVATED 2  // the MLP's activations
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
    const u16 *a;            // [rank, inner], or null
    const u16 *b;            // [rows, rank]
    float lora_scale;
    int rows, rank;
    int first_row, first_rank;  // among those of all parts
};

struct Product {
    Part parts[MOST_PARTS];
    int part_count, n, inner;
    int rows, ranks;         // of all parts
    int tiles, a_tiles;
    int splits, chunk;       // blocks that share out the columns of a tile, and how many columns each of them has at most
    int a_chunks;            // pieces of a chunk for the factors A
    int source, target;
    const float *residual;   // [n, inner]
    const u16 *norm;
    float epsilon;
    const float *attended;   // [n, heads, attention_splits, width]
    const float *log_sums;   // [n, heads, attention_splits]
    int attention_splits, width;
    const u16 *activated;    // [n, inner]
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
    float *attended, *log_sums;
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
#elif defined(EMULATED)
__device__ __forceinline__ float widen(u32 x) { return emu::half_of<__half>(x, 0); }
__device__ __forceinline__ u16 narrow(float x) { return __half(x).u; }
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
#if defined(EMULATED)
#if BF16
    emu::mma16<__nv_bfloat16>(a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3], c[0], c[1], c[2], c[3]);
#else
    emu::mma16<__half>(a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3], c[0], c[1], c[2], c[3]);
#endif
#elif BF16
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

__device__ __forceinline__ float sum_of_warp(float x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

// What the products of a block share.
struct Shared {
    u32 *pairs;      // [256, 32]
    float *dynamic;  // [256]
    float *sums;     // [WARPS, 16, TOKENS]
    float *low_rank; // [ranks, TOKENS], times the corrections' scales
    u16 *x;          // [n, chunk + 8]
    u32 *flag;
};

__device__ __forceinline__ Shared lay_out(const Product &p, unsigned char *memory) {
    Shared s;
    s.pairs = (u32 *)memory;
    s.dynamic = (float *)(s.pairs + 256 * 32);
    s.sums = s.dynamic + 256;
    s.flag = (u32 *)(s.sums + WARPS * 16 * TOKENS);
    s.low_rank = (float *)(s.flag + 4);
    s.x = (u16 *)(s.low_rank + p.ranks * TOKENS);
    return s;
}

// The value of the input of attention's output layer: the splits of one head, weighed by what they summed.
__device__ __forceinline__ float attended(const Product &p, int row, int column) {
    int heads = p.inner / p.width;
    int head = row * heads + column / p.width;
    const float *log_sums = p.log_sums + head * p.attention_splits;
    float most = log_sums[0];
    for (int s = 1; s < p.attention_splits; s++) most = fmaxf(most, log_sums[s]);
    float sum = 0.0f, value = 0.0f;
    for (int s = 0; s < p.attention_splits; s++) {
        float weight = __expf(log_sums[s] - most);
        sum += weight;
        value += weight * p.attended[(head * p.attention_splits + s) * p.width + column % p.width];
    }
    return value / sum;
}

// Brings columns first .. first + count of the inputs into shared memory, in 16 bits.
__device__ __forceinline__ void fetch_inputs(const Product &p, const Shared &s, int first, int count) {
    int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, pitch = p.chunk + 8;
    if (p.source == FROM_RESIDUAL) {
        for (int row = 0; row < p.n; row++) {
            const float4 *x = (const float4 *)(p.residual + (size_t)row * p.inner);
            float sum = 0.0f;
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
            for (int w = 0; w < WARPS; w++) sum += s.sums[row * WARPS + w];
            float factor = rsqrtf(sum / p.inner + p.epsilon);
            const float4 *x = (const float4 *)(p.residual + (size_t)row * p.inner + first);
            const uint2 *norm = (const uint2 *)(p.norm + first);
            for (int i = tid; i < count / 4; i += THREADS) {
                float4 v = x[i];
                uint2 w = norm[i], y;
                y.x = narrow(v.x * factor * widen(w.x & 0xffff)) | (u32)narrow(v.y * factor * widen(w.x >> 16)) << 16;
                y.y = narrow(v.z * factor * widen(w.y & 0xffff)) | (u32)narrow(v.w * factor * widen(w.y >> 16)) << 16;
                *(uint2 *)(s.x + row * pitch + 4 * i) = y;
            }
        }
    } else if (p.source == FROM_ATTENTION) {
        for (int row = 0; row < p.n; row++)
            for (int i = tid; i < count; i += THREADS) s.x[row * pitch + i] = narrow(attended(p, row, first + i));
    } else {
        for (int row = 0; row < p.n; row++) {
            const uint4 *x = (const uint4 *)(p.activated + (size_t)row * p.inner + first);
            for (int i = tid; i < count / 8; i += THREADS) *(uint4 *)(s.x + row * pitch + 8 * i) = x[i];
        }
    }
}

// Two rows of a tile, those that one lane has.
struct Rows {
    const Part *part[2];
    int row[2];
};

// The inputs of 16 columns of one token, in pairs; nothing past the last token.
__device__ __forceinline__ void inputs_of(const Product &p, const Shared &s, int tile, int column, u32 *b) {
    int lane = threadIdx.x % 32, token = 8 * tile + lane / 4;
    uint4 first = make_uint4(0, 0, 0, 0), second = first;
    if (token < p.n) {
        const uint4 *x = (const uint4 *)(s.x + token * (p.chunk + 8) + column + 16 * (lane % 4));
        first = x[0];
        second = x[1];
    }
    b[0] = first.x; b[1] = first.y; b[2] = first.z; b[3] = first.w;
    b[4] = second.x; b[5] = second.y; b[6] = second.z; b[7] = second.w;
}

// The codes of 256 columns of two rows, and their four scales as they are stored.
struct Codes {
    uint2 words[2][4];
    uint4 scales[2];
};

__device__ __forceinline__ void fetch_codes(const Product &p, const Rows &rows, int group, Codes &to) {
    int t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const Part &part = *rows.part[half];
        const uint2 *words = (const uint2 *)(part.codes + (size_t)rows.row[half] * (p.inner / 8)) + group * 16 + t;
#pragma unroll
        for (int block = 0; block < 4; block++) to.words[half][block] = __ldg(words + 4 * block);
        u32 place = (u32)rows.row[half] * (u32)(p.inner / 256) + group;
        if (part.scale_codes) {
            to.scales[half].x = __ldg(part.scale_codes + place);
            to.scales[half].y = bits(__ldg(part.scales + place / 64));
        } else {
            to.scales[half] = __ldg((const uint4 *)part.scales + place);
        }
    }
}

__device__ __forceinline__ float scale_of(const Part &part, const Shared &s, const uint4 &stored, int block, float offset) {
    if (part.scale_codes) return s.dynamic[stored.x >> (8 * block) & 0xff] * __uint_as_float(stored.y) + offset;
    u32 word = block == 0 ? stored.x : block == 1 ? stored.y : block == 2 ? stored.z : stored.w;
    return __uint_as_float(word);
}

__device__ __forceinline__ u32 pair_of(const Shared &s, u32 word, int byte) {
    u32 offset = byte == 0 ? (word & 0xff) << 5 : byte == 3 ? word >> 24 << 5 : (word >> (8 * byte - 5)) & 0x1fe0;
    return s.pairs[offset | threadIdx.x % 32];
}

__device__ __forceinline__ void add_codes(
    const Product &p, const Shared &s, const Rows &rows, const Codes &codes, int column, const float *offsets,
    float (*sums)[4]
) {
#pragma unroll
    for (int block = 0; block < 4; block++) {
        u32 a[2][8];
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int byte = 0; byte < 4; byte++) {
                a[half][byte] = pair_of(s, codes.words[half][block].x, byte);
                a[half][4 + byte] = pair_of(s, codes.words[half][block].y, byte);
            }
        }
        float low = scale_of(*rows.part[0], s, codes.scales[0], block, offsets[0]);
        float high = scale_of(*rows.part[1], s, codes.scales[1], block, offsets[1]);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            u32 b[8];
            inputs_of(p, s, tile, column + 64 * block, b);
            float unscaled[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int j = 0; j < 8; j += 2)
                multiply(unscaled, a[0][j], a[1][j], a[0][j + 1], a[1][j + 1], b[j], b[j + 1]);
            sums[tile][0] += low * unscaled[0];
            sums[tile][1] += low * unscaled[1];
            sums[tile][2] += high * unscaled[2];
            sums[tile][3] += high * unscaled[3];
        }
    }
}

// This warp's share of columns first .. first + count of the product of a packed tile.
__device__ __forceinline__ void multiply_packed(
    const Product &p, const Shared &s, const Rows &rows, int first, int count, float (*sums)[4]
) {
    int warp = threadIdx.x / 32, groups = count / 256;
    int group = groups * warp / WARPS, end = groups * (warp + 1) / WARPS;
    float offsets[2] = {0.0f, 0.0f};
    for (int half = 0; half < 2; half++)
        if (rows.part[half]->scale_codes) offsets[half] = __ldg(rows.part[half]->offset);
    if (group >= end) return;
    Codes now, next;
    fetch_codes(p, rows, first / 256 + group, now);
    for (; group < end; group++) {
        if (group + 1 < end) fetch_codes(p, rows, first / 256 + group + 1, next);
        add_codes(p, s, rows, now, 256 * group, offsets, sums);
        now = next;
    }
}

__device__ __forceinline__ void fetch_dense(const u16 *const *rows, int column, uint4 (*to)[2]) {
    int t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint4 *row = (const uint4 *)(rows[half] + column + 16 * t);
        to[half][0] = __ldg(row);
        to[half][1] = __ldg(row + 1);
    }
}

// The same of rows in 16 bits: columns `from` .. `from + count` of those that are in shared memory, which begin at `first`.
__device__ __forceinline__ void multiply_dense(
    const Product &p, const Shared &s, const u16 *const *rows, int first, int from, int count, float (*sums)[4]
) {
    int warp = threadIdx.x / 32, blocks = count / 64;
    int block = blocks * warp / WARPS, end = blocks * (warp + 1) / WARPS;
    if (block >= end) return;
    uint4 now[2][2], next[2][2];
    fetch_dense(rows, first + from + 64 * block, now);
    for (; block < end; block++) {
        if (block + 1 < end) fetch_dense(rows, first + from + 64 * (block + 1), next);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            u32 b[8];
            inputs_of(p, s, tile, from + 64 * block, b);
            multiply(sums[tile], now[0][0].x, now[1][0].x, now[0][0].y, now[1][0].y, b[0], b[1]);
            multiply(sums[tile], now[0][0].z, now[1][0].z, now[0][0].w, now[1][0].w, b[2], b[3]);
            multiply(sums[tile], now[0][1].x, now[1][1].x, now[0][1].y, now[1][1].y, b[4], b[5]);
            multiply(sums[tile], now[0][1].z, now[1][1].z, now[0][1].w, now[1][1].w, b[6], b[7]);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            now[half][0] = next[half][0];
            now[half][1] = next[half][1];
        }
    }
}

// Leaves what each warp has summed in shared memory.
__device__ __forceinline__ void leave_sums(const Shared &s, float (*sums)[4]) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float *own = s.sums + warp * 16 * TOKENS;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        int column = 8 * tile + 2 * (lane % 4), row = lane / 4;
        own[row * TOKENS + column] = sums[tile][0];
        own[row * TOKENS + column + 1] = sums[tile][1];
        own[(row + 8) * TOKENS + column] = sums[tile][2];
        own[(row + 8) * TOKENS + column + 1] = sums[tile][3];
    }
    __syncthreads();
}

__device__ __forceinline__ float sum_of_warps(const Shared &s, int place) {
    float sum = 0.0f;
    for (int warp = 0; warp < WARPS; warp++) sum += s.sums[warp * 16 * TOKENS + place];
    return sum;
}

// 16 rows of the factors A by a piece of this block's columns.
__device__ __forceinline__ void low_rank_piece(const Product &p, const Shared &s, int unit, int split, int first, int count) {
    int tile = unit / p.a_chunks, piece = unit % p.a_chunks;
    const Part *part = p.parts;
    for (int before = 0;; part++) {
        int own = (part->rank + 15) / 16;
        if (tile < before + own) { tile -= before; break; }
        before += own;
    }
    int lane = threadIdx.x % 32, start = 16 * tile, blocks = count / 64;
    const u16 *rows[2];
    for (int half = 0; half < 2; half++)
        rows[half] = part->a + (size_t)min(start + lane / 4 + 8 * half, part->rank - 1) * p.inner;
    int from = blocks * piece / p.a_chunks * 64, end = blocks * (piece + 1) / p.a_chunks * 64;
    float sums[TILES][4] = {};
    multiply_dense(p, s, rows, first, from, end - from, sums);
    leave_sums(s, sums);
    float *to = p.low_rank + (size_t)(split * p.a_chunks + piece) * p.n * p.ranks + part->first_rank + start;
    for (int place = threadIdx.x; place < 16 * TOKENS; place += THREADS) {
        int row = place / TOKENS, token = place % TOKENS;
        if (token < p.n && start + row < part->rank) to[(size_t)token * p.ranks + row] = sum_of_warps(s, place);
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(p.ready, 1u);
}

// Waits for all pieces and adds them up, times the corrections' scales. Blocks with lower numbers, which run already, never
// wait before they have written theirs.
__device__ __forceinline__ void gather_low_rank(const Product &p, const Shared &s) {
    if (threadIdx.x == 0) {
        u32 all = (u32)(p.a_tiles * p.a_chunks * p.splits);
        while (*(volatile u32 *)p.ready < all) {
        }
        __threadfence();
    }
    __syncthreads();
    for (int place = threadIdx.x; place < p.ranks * TOKENS; place += THREADS) {
        int rank = place / TOKENS, token = place % TOKENS;
        float sum = 0.0f;
        if (token < p.n) {
            const float *from = p.low_rank + (size_t)token * p.ranks + rank;
            for (int piece = 0; piece < p.splits * p.a_chunks; piece++) sum += __ldcg(from + (size_t)piece * p.n * p.ranks);
            int part = 0;
            while (part + 1 < p.part_count && rank >= p.parts[part + 1].first_rank) part++;
            sum *= p.parts[part].lora_scale;
        }
        s.low_rank[place] = sum;
    }
    __syncthreads();
}

__device__ __forceinline__ float correction(const Shared &s, const Part &part, int row, int token) {
    const u16 *b = part.b + (size_t)row * part.rank;
    const float *u = s.low_rank + part.first_rank * TOKENS + token;
    float sum = 0.0f;
    if (part.rank % 8 == 0) {
        for (int r = 0; r < part.rank; r += 8) {
            uint4 v = __ldg((const uint4 *)(b + r));
            u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                sum += widen(words[i] & 0xffff) * u[(r + 2 * i) * TOKENS];
                sum += widen(words[i] >> 16) * u[(r + 2 * i + 1) * TOKENS];
            }
        }
    } else {
        for (int r = 0; r < part.rank; r++) sum += widen(b[r]) * u[r * TOKENS];
    }
    return sum;
}

// The rows of a tile: eight of the first part and eight of the second where their products are activated together, else
// sixteen that follow each other.
__device__ __forceinline__ void place_of(const Product &p, int tile, int row, int half, const Part *&part, int &own) {
    if (p.target == TO_ACTIVATED) {
        part = p.parts + half;
        own = 8 * tile + row;
        return;
    }
    part = p.parts;
    for (int left = p.part_count - 1; left > 0 && 16 * tile >= part[1].first_row; left--) part++;
    own = 16 * tile - part->first_row + row + 8 * half;
}

// Whether this block is the last of those that share out a tile's columns; then all their sums are there.
__device__ __forceinline__ bool is_last(const Product &p, const Shared &s, int tile, int split) {
    float *own = p.partials + ((size_t)tile * p.splits + split) * 16 * TOKENS;
    for (int place = threadIdx.x; place < 16 * TOKENS; place += THREADS) own[place] = sum_of_warps(s, place);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *s.flag = atomicAdd(p.arrived + tile, 1u);
    __syncthreads();
    bool last = *s.flag == (u32)(p.splits - 1);
    if (last) __threadfence();
    return last;
}

__device__ __forceinline__ float sum_of_splits(const Product &p, int tile, int place) {
    const float *from = p.partials + (size_t)tile * p.splits * 16 * TOKENS + place;
    float sum = 0.0f;
    for (int split = 0; split < p.splits; split++) sum += __ldcg(from + (size_t)split * 16 * TOKENS);
    return sum;
}

__device__ __forceinline__ void write_tile(const Product &p, const Shared &s, int tile) {
    for (int place = threadIdx.x; place < 8 * TOKENS; place += THREADS) {
        int row = place / TOKENS, token = place % TOKENS;
        if (token >= p.n) continue;
        float values[2];
        int rows[2];
        bool inside[2];
        for (int half = 0; half < 2; half++) {
            const Part *part;
            int own, at = place + half * 8 * TOKENS;
            place_of(p, tile, row, half, part, own);
            inside[half] = own < part->rows;
            rows[half] = part->first_row + own;
            values[half] = p.splits > 1 ? sum_of_splits(p, tile, at) : sum_of_warps(s, at);
            if (part->a && inside[half]) values[half] += correction(s, *part, own, token);
        }
        if (p.target == TO_ACTIVATED) {
            float gate = values[0];
            if (inside[0]) p.to_activated[(size_t)token * p.parts[0].rows + rows[0]] =
                narrow(gate / (1.0f + __expf(-gate)) * values[1]);
            continue;
        }
        for (int half = 0; half < 2; half++) {
            if (!inside[half]) continue;
            float *to = p.to + (size_t)token * p.rows + rows[half];
            *to = p.target == TO_RESIDUAL ? *to + values[half] : values[half];
        }
    }
    if (p.splits > 1 && threadIdx.x == 0) p.arrived[tile] = 0;
    __syncthreads();
}

__device__ __forceinline__ void weight_tile(const Product &p, const Shared &s, int tile, int first, int count) {
    int lane = threadIdx.x % 32;
    Rows rows;
    for (int half = 0; half < 2; half++) {
        int own;
        place_of(p, tile, lane / 4, half, rows.part[half], own);
        rows.row[half] = min(own, rows.part[half]->rows - 1);
    }
    float sums[TILES][4] = {};
    if (rows.part[0]->codes) {
        multiply_packed(p, s, rows, first, count, sums);
    } else {
        const u16 *dense[2];
        for (int half = 0; half < 2; half++) dense[half] = rows.part[half]->dense + (size_t)rows.row[half] * p.inner;
        multiply_dense(p, s, dense, first, 0, count, sums);
    }
    leave_sums(s, sums);
}

extern "C" __global__ void __launch_bounds__(THREADS, TILES < 4 ? 2 : 1) step_product(const Product p) {
#ifdef EMULATED
    unsigned char *memory = dynamic_shared_mem;
#else
    extern __shared__ __align__(16) unsigned char memory[];
#endif
    Shared s = lay_out(p, memory);
    int split = blockIdx.x % p.splits, groups = p.inner / 256;
    int first = groups * split / p.splits * 256, count = groups * (split + 1) / p.splits * 256 - first;
    int blocks = gridDim.x / p.splits, block = blockIdx.x / p.splits, pieces = p.a_tiles * p.a_chunks;
    for (int i = threadIdx.x; i < 256 * 32; i += THREADS) s.pairs[i] = __ldg(p.pairs + i / 32);
    for (int i = threadIdx.x; i < 256; i += THREADS) s.dynamic[i] = __ldg(p.dynamic + i);
    fetch_inputs(p, s, first, count);
    __syncthreads();
    for (int unit = block; unit < pieces; unit += blocks) low_rank_piece(p, s, unit, split, first, count);
    bool gathered = pieces == 0;
    // Those that had a piece of the factors come last to the tiles.
    int start = (block - pieces % blocks + blocks) % blocks;
    for (int tile = start; tile < p.tiles; tile += blocks) {
        weight_tile(p, s, tile, first, count);
        bool mine = p.splits == 1 || is_last(p, s, tile, split);
        if (mine && !gathered) {
            gather_low_rank(p, s);
            gathered = true;
        }
        if (mine) write_tile(p, s, tile);
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
#define NOTHING -1e30f

// A block has a head, a sequence and a share of its places. Groups of 8 lanes go over the places, each with a softmax of
// its own, which are joined in the end.
template <int WIDTH> __device__ __forceinline__ void attend(const Attend &p) {
    constexpr int OWN = WIDTH / LANES;
    SHARED float q[WIDTH], o[GROUPS][WIDTH], most[GROUPS], sum[GROUPS];
    SHARED __align__(16) u16 new_key[WIDTH];
    SHARED __align__(16) u16 new_value[WIDTH];
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
    size_t place = ((size_t)row * p.heads + head) * p.splits + split;
    for (int i = tid; i < WIDTH; i += LANES * GROUPS) {
        float value = 0.0f;
        for (int g = 0; g < GROUPS; g++) value += o[g][i] * __expf(most[g] - highest);
        p.attended[place * WIDTH + i] = total > 0.0f ? value / total : 0.0f;
    }
    if (tid == 0) p.log_sums[place] = total > 0.0f ? highest + logf(total) : NOTHING;
}

extern "C" __global__ void __launch_bounds__(LANES * GROUPS) step_attend_64(const Attend p) { attend<64>(p); }
extern "C" __global__ void __launch_bounds__(LANES * GROUPS) step_attend_128(const Attend p) { attend<128>(p); }

// The rows of a table [v, d] that the tokens name, as the residual stream; makes the products' signals zero.
extern "C" __global__ void __launch_bounds__(THREADS) step_embed(
    const u16 *table, const int *ids, float *residual, int d, u32 *ready, int signals
) {
    const u16 *from = table + (size_t)ids[blockIdx.x] * d;
    for (int i = threadIdx.x; i < d; i += THREADS) residual[(size_t)blockIdx.x * d + i] = widen(from[i]);
    if (blockIdx.x == 0)
        for (int i = threadIdx.x; i < signals; i += THREADS) ready[i] = 0;
}

// The first of the greatest logits of each row [n, v]; -1 if one of them is no number.
extern "C" __global__ void __launch_bounds__(THREADS) step_choose(const float *logits, int v, int *choices) {
    SHARED float best_of[THREADS];
    SHARED int place_of_best[THREADS];
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
