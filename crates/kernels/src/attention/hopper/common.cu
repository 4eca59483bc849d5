// What the kernels of attention for Hopper share: tiles in shared memory, the copies that fill them, products of warpgroups, and the
// masks and sums that belong to a row.
//
// Compiled with BF16 (0 or 1) and ROOM_BYTES defined, for heads of 128 elements. See mod.rs for what is computed and how the work is shared out.
//
// A tile has rows of 128 elements of 16 bits. It lies as two halves of 64 columns, one after the other, each with rows of 128 bytes
// whose chunks of 16 bytes are permuted by the row modulo 8: what the copy engine calls a swizzle of 128 bytes, and what wgmma
// reads without bank conflicts, by rows and by columns.
//
// A block has three warpgroups. The first only starts copies; the other two have 64 rows of their own each, the own rows, by which
// tiles of the other side pass. Fragments, with g = lane / 4 and c = 2 (lane mod 4): of a sum of 64 x N, warp w of a warpgroup has
// rows 16 w + g and 16 w + g + 8; element [4 n + 2 half + j] is row g + 8 half, column 8 n + c + j.

#define WIDTH 128               // elements of a head
#define TILE 64                 // rows of a tile that has a code, and of a warpgroup
#define OWN (2 * TILE)          // own rows of a block
#define WORKERS 8               // warps that multiply
#define THREADS 384
#define FEW_REGISTERS 24        // of a thread that starts copies
#define MANY_REGISTERS 240      // of a thread that multiplies
#define EVERY_LANE 0xffffffffu

// Codes of pairs of tiles, as ranges.rs makes them, and what comes after the last pair.
#define SKIP 0
#define MASKED 1
#define FULL 2
#define END 3

// The document of a key that no query sees; one that no token is in; the log of a sum of nothing.
#define SEPARATE -2
#define NOBODY -3
#define NOTHING -1e30f

#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

// Rows that are written: element strides of batch, head and row.
struct Rows {
    u16 *data;
    long long batch, head, row;
};

// One launch: own rows are those of queries or of keys, and what passes by is of the other side.
struct Task {
    const int *own_documents, *own_positions;  // [b, own_tokens]
    const int *documents, *positions;          // [b, tokens], of what passes by
    const int *codes;                          // of pairs of tiles
    const int *ranges;                         // [b, own_tiles, 2], tiles that pass by each own tile
    int own_tokens, tokens;
    int own_tiles, tiles;                      // of TILE rows
    int own_stride, stride;                    // in codes, from one own tile to the next and from one passing tile to the next
    int heads, lines;                          // own heads, and those of all rows of the batch
    int members;                               // heads of queries that share a head of keys
    int together;                              // heads that are worked on at a time, so that what they read stays in the cache
    float scale;                               // of scores
};

// As arguments.rs asserts.
static_assert(sizeof(Rows) == 32 && sizeof(Task) == 96, "arguments have the host's sizes");

// Two tokens side by side: documents and positions.
struct alignas(16) TokenPair { int document_0, position_0, document_1, position_1; };

// ---- Copies

// All lanes of the warp are done with what a barrier guards.
__device__ __forceinline__ void release(Barrier &barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier.arrive();
}

// A place in a ring of stages, and how often it came round.
template <int STAGES> struct Turn {
    u32 stage = 0, phase = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};

// Starts the copy of TILE rows of a head from `row` on, to both halves of a tile of `rows` rows.
__device__ __forceinline__ void copy_tile(const TensorMap *from, int row, int head, int batch, char *to, int rows, Barrier *barrier) {
    copy_box(from, 0, row, head, batch, to, barrier);
    copy_box(from, WIDTH / 2, row, head, batch, to + rows * 128, barrier);
}

// The same of OWN rows.
__device__ __forceinline__ void copy_own(const TensorMap *from, int row, int head, int batch, char *to, Barrier *barrier) {
    copy_tile(from, row, head, batch, to, OWN, barrier);
    copy_tile(from, row + TILE, head, batch, to + TILE * 128, OWN, barrier);
}

// ---- Products

// How wgmma finds a tile of `rows` rows: how far eight rows are apart, and the halves, which only factors read by columns ask for. The
// address is hidden from the compiler, which else holds all descriptors of a loop in registers.
__device__ __forceinline__ u64 descriptor(const char *tile, int rows) {
    u32 address = (shared_address(tile) & 0x3ffff) / 16;
    forget(address);
    return 1ull << 62 | (u64)(8 * 128 / 16) << 32 | (u64)(rows * 128 / 16) << 16 | address;
}

// sums = own tile^T: TILE own rows from shared memory, from row `first` of OWN on, and 2 N rows of what passes by.
template <int N> __device__ __forceinline__ void scores(float (&sums)[N], const char *own, int first, const char *tile) {
    u64 a = descriptor(own + first * 128, OWN), b = descriptor(tile, 2 * N);
#pragma unroll
    for (int step = 0; step < WIDTH / 16; step++) {
        int half = step / 4, column = step % 4 * 2;
        multiply(sums, a + half * OWN * 8 + column, b + half * 2 * N * 8 + column, step > 0);
    }
}
// The same of own rows in registers.
__device__ __forceinline__ void scores(float (&sums)[32], const u32 (&own)[32], const char *tile) {
    u64 b = descriptor(tile, TILE);
#pragma unroll
    for (int step = 0; step < WIDTH / 16; step++) multiply(sums, own + 4 * step, b + step / 4 * TILE * 8 + step % 4 * 2, step > 0);
}

// sums += weights tile: weights of TILE own rows and 4 N rows of what passes by.
template <int N> __device__ __forceinline__ void gather(float (&sums)[64], const u32 (&weights)[N], const char *tile) {
    u64 b = descriptor(tile, 4 * N);
#pragma unroll
    for (int step = 0; step < N / 4; step++) gather_step(sums, weights + 4 * step, b + step * 16 * 8);
}

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// The left factor that sums are after rounding: of two accumulators side by side, a fragment of 16 columns.
template <int N> __device__ __forceinline__ void pack(const float (&sums)[2 * N], u32 (&factor)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) factor[i] = narrow_2(sums[2 * i], sums[2 * i + 1]);
}

template <int N> __device__ __forceinline__ void clear(float (&sums)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) sums[i] = 0;
}

// ---- The work of a block

// A block's shared memory, its barriers ready.
extern __shared__ __align__(1024) unsigned char dynamic_shared_mem[];
template <class Room> __device__ __forceinline__ Room &enter() {
    static_assert(sizeof(Room) <= ROOM_BYTES, "launches ask for so much");
    Room &room = *(Room *)dynamic_shared_mem;
    if (threadIdx.x == 0) {
        room.init();
        show_barriers();
    }
    __syncthreads();
    return room;
}

// Own rows of a head that a block works on at a time.
struct Item {
    int tile, head, batch, line;

    // Heads that share a part of the cache follow each other, of those the tiles with the most to do first: the last of queries, the first
    // of keys.
    __device__ __forceinline__ Item(const Task &task, int number, bool last_first) {
        int tiles = (task.own_tiles + 1) / 2;
        int set = number / (tiles * task.together), within = number % (tiles * task.together);
        int size = min(task.together, task.lines - set * task.together);
        tile = within / size;
        if (last_first) tile = tiles - 1 - tile;
        line = set * task.together + within % size;
        head = line % task.heads;
        batch = line / task.heads;
    }
};

// Items that blocks have asked for; 0 between launches, of which there is one at a time.
__device__ u32 items_asked;

__device__ __forceinline__ int items_of(const Task &task) { return (task.own_tiles + 1) / 2 * task.lines; }

// The next item for this block, the same in all lanes, or -1. Each block asks until there is none, so the counter ends where it began.
__device__ __forceinline__ int next_item(const Task &task) {
    int items = items_of(task), number = 0;
    if (threadIdx.x % 32 == 0) number = atomicInc(&items_asked, items + gridDim.x - 1);
    number = __shfl_sync(EVERY_LANE, number, 0);
    return number < items ? number : -1;
}

// The code of a pair of tiles; SKIP past the ends.
__device__ __forceinline__ int code_of(const Task &task, int batch, int own, int passing) {
    if (own >= task.own_tiles || passing >= task.tiles) return SKIP;
    return task.codes[batch * task.own_tiles * task.tiles + own * task.own_stride + passing * task.stride];
}

// The half-open range of tiles that pass by either half of an item's rows.
__device__ __forceinline__ int2 range_of(const Task &task, const Item &item) {
    const int *first = task.ranges + 2 * (item.batch * task.own_tiles + 2 * item.tile);
    const int *last = 2 * item.tile + 1 < task.own_tiles ? first + 2 : first;
    return make_int2(min(first[0], last[0]), max(first[1], last[1]));
}

// Calls `visit(i, codes of both halves)` for each of the tiles from `start` to `end` with `code(half, i)` other than SKIP for one of
// the halves, on all lanes.
template <class Code, class Visit> __device__ __forceinline__ void walk(int start, int end, Code code, Visit visit) {
    for (int base = start; base < end; base += 32) {
        int own = base + threadIdx.x % 32;
        int first = own < end ? code(0, own) : SKIP, second = own < end ? code(1, own) : SKIP;
        u32 some = __ballot_sync(EVERY_LANE, first != SKIP || second != SKIP);
        while (some) {
            int lane = __ffs(some) - 1;
            some &= some - 1;
            visit(base + lane, __shfl_sync(EVERY_LANE, first, lane), __shfl_sync(EVERY_LANE, second, lane));
        }
    }
}

// Documents and positions of `count` tokens from `first` on, those past the end in the document that nobody is in. By a warp.
__device__ __forceinline__ void store_tokens(const Task &task, int batch, int first, int count, TokenPair *to) {
    int2 *tokens = (int2 *)to;
    for (int i = threadIdx.x % 32; i < count; i += 32) {
        int at = batch * task.tokens + first + i;
        tokens[i] = first + i < task.tokens ? make_int2(task.documents[at], task.positions[at]) : make_int2(SEPARATE, 0);
    }
}

// Documents and positions of a warp's own rows, to shared memory, as registers are scarce. Own rows in the document that nobody is in, and
// those past the end, get one that no token is in.
__device__ __forceinline__ void store_own_tokens(const Task &task, int batch, int first, int2 *to) {
    int i = threadIdx.x % 32, row = first + i;
    if (i < 16) {
        int2 token = make_int2(NOBODY, 0);
        int at = batch * task.own_tokens + row;
        if (row < task.own_tokens) token = make_int2(task.own_documents[at], task.own_positions[at]);
        if (token.x == SEPARATE) token.x = NOBODY;
        to[i] = token;
    }
    __syncwarp();
}

// Scores of pairs that do not see each other become minus infinity. `own` are the tokens of a warp's rows, `tokens` those that pass.
template <bool KEYS, int N> __device__ __forceinline__ void hide(float (&scores)[N], const int2 *own, const TokenPair *tokens) {
    const TokenPair *from = tokens + threadIdx.x % 4;
    int2 rows[2] = {own[threadIdx.x % 32 / 4], own[threadIdx.x % 32 / 4 + 8]};
#pragma unroll
    for (int n = 0; n < N / 4; n++) {
        TokenPair pair = from[4 * n];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int position = rows[half].y;
            bool order_0 = KEYS ? position <= pair.position_0 : position >= pair.position_0;
            bool order_1 = KEYS ? position <= pair.position_1 : position >= pair.position_1;
            bool seen_0 = rows[half].x == pair.document_0 && order_0;
            bool seen_1 = rows[half].x == pair.document_1 && order_1;
            float *both = scores + 4 * n + 2 * half;
            both[0] = seen_0 ? both[0] : -infinity();
            both[1] = seen_1 ? both[1] : -infinity();
        }
    }
}

// Writes the 16 rows of this warp, times a factor for each of a thread's rows, through 4 KiB of shared memory of its own; the first is
// row `first` of `total`.
__device__ __forceinline__ void write_rows(const float (&sums)[64], float factor_0, float factor_1, char *room, u16 *to,
                                           long long stride, int first, int total) {
    int lane = threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = lane / 4 + 8 * half;
        float factor = half ? factor_1 : factor_0;
#pragma unroll
        for (int n = 0; n < WIDTH / 8; n++) {
            u32 both = narrow_2(sums[4 * n + 2 * half] * factor, sums[4 * n + 2 * half + 1] * factor);
            *(u32 *)(room + row * 256 + (n ^ row % 8) * 16 + lane % 4 * 4) = both;
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int row = 2 * i + lane / 16, chunk = lane % 16;
        if (first + row < total)
            *(uint4 *)(to + (first + row) * stride + chunk * 8) = *(const uint4 *)(room + row * 256 + (chunk ^ row % 8) * 16);
    }
}

