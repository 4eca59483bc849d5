// The gradients of attention, from the log sums that the forward pass kept:
//
//     P = exp(scale q k^T - lse)   dS = P * (g v^T - D)   D = rowsum(o * g)
//     dq = scale dS k    dk = scale dS^T q    dv = P^T g
//
// One kernel whose own rows are either queries, with k and v passing by, or keys, with q and g passing by. Scores are recomputed in
// both, transposed where keys are the own rows, so that P and dS are left factors that stay in registers and each sum belongs to one
// warpgroup: nothing is added atomically.

#define GRADIENT_STAGES 3

// Statistics of queries [lines, padded tokens]: lse in powers of two, and D. Rows past the end have 0.
struct Statistics {
    float *log_sums, *means;
    int padded;
};

static_assert(sizeof(Statistics) == 24, "arguments have the host's sizes");

struct GradientRoom {
    char own[2][OWN * 256];                        // q and g, or k and v
    char passing[GRADIENT_STAGES][2][TILE * 256];  // k and v, or q and g
    char out[WORKERS][16 * 256];
    float log_sums[GRADIENT_STAGES][TILE], means[GRADIENT_STAGES][TILE];
    int2 own_tokens[WORKERS][16];
    TokenPair tokens[GRADIENT_STAGES][TILE / 2];
    int codes[GRADIENT_STAGES][2];
    int item;
    Barrier own_full, own_empty;
    Barrier full[GRADIENT_STAGES], empty[GRADIENT_STAGES];

    __device__ __forceinline__ void init() {
        own_full.init(1);
        own_empty.init(WORKERS);
        for (int i = 0; i < GRADIENT_STAGES; i++) {
            full[i].init(1 + 32);
            empty[i].init(WORKERS);
        }
    }
};

// The two factors on each side, as they multiply to scores and to their gradient.
struct GradientMaps { TensorMap own[2], passing[2]; };

template <bool KEYS> struct GradientFeeder {
    const Task &task;
    const GradientMaps &maps;
    const Statistics &statistics;
    GradientRoom &room;
    bool first_lane;
    Turn<GRADIENT_STAGES> turn;

    __device__ __forceinline__ void pass(const Item &item, int head, int tile, int code_0, int code_1) {
        u32 stage = turn.stage;
        int first = tile * TILE;
        Barrier &full = room.full[stage];
        room.empty[stage].wait(turn.phase ^ 1);
        if (first_lane) {
            room.codes[stage][0] = code_0;
            room.codes[stage][1] = code_1;
            full.expect(2 * TILE * 256 + (KEYS ? 2 * TILE * 4 : 0));
            for (int i = 0; i < 2; i++) copy_tile(&maps.passing[i], first, head, item.batch, room.passing[stage][i], TILE, &full);
            if (KEYS) {
                long long at = (long long)(item.batch * task.heads * task.members + head) * statistics.padded + first;
                copy_bytes(statistics.log_sums + at, room.log_sums[stage], TILE * 4, &full);
                copy_bytes(statistics.means + at, room.means[stage], TILE * 4, &full);
            }
        }
        if (code_0 != FULL || code_1 != FULL) store_tokens(task, item.batch, first, TILE, room.tokens[stage]);
        full.arrive();
        turn.advance();
    }

    __device__ __forceinline__ void end() {
        u32 stage = turn.stage;
        room.empty[stage].wait(turn.phase ^ 1);
        if (first_lane) {
            room.codes[stage][0] = room.codes[stage][1] = END;
            room.full[stage].arrive();
        }
        room.full[stage].arrive();
        turn.advance();
    }

    __device__ __forceinline__ void run() {
        for (u32 phase = 1;; phase ^= 1) {
            int number = next_item(task);
            room.own_empty.wait(phase);
            if (first_lane) room.item = number;
            if (number < 0) break;
            Item item(task, number, !KEYS);
            if (first_lane) {
                room.own_full.expect(2 * OWN * 256);
                for (int i = 0; i < 2; i++) copy_own(&maps.own[i], item.tile * OWN, item.head, item.batch, room.own[i], &room.own_full);
            }
            int2 range = range_of(task, item);
            auto code = [&](int half, int tile) { return code_of(task, item.batch, 2 * item.tile + half, tile); };
            // Heads that pass by: of keys the one that these queries share, of queries all that share these keys.
            int first = KEYS ? item.head * task.members : item.head / task.members, count = KEYS ? task.members : 1;
            for (int head = first; head < first + count; head++)
                walk(range.x, range.y, code, [&](int tile, int code_0, int code_1) { pass(item, head, tile, code_0, code_1); });
            end();
        }
        if (first_lane) room.own_full.arrive();
    }
};

// The left factors of a warpgroup's own queries, from shared memory.
__device__ __forceinline__ void read_own(const char *own, int group, u32 (&factor)[32]) {
    int lane = threadIdx.x % 32, row = group * TILE + threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
    for (int step = 0; step < WIDTH / 16; step++) {
        int chunk = step % 4 * 2 + lane / 16;
        read_fragments(own + step / 4 * OWN * 128 + row * 128 + (chunk ^ row % 8) * 16, factor + 4 * step);
    }
}

// What stays with a thread's own rows: queries are in registers, keys have sums for their values.
template <bool KEYS> struct Own;
template <> struct Own<true> { float value_sums[64]; };
template <> struct Own<false> { u32 queries[32], gradients[32]; float log_sums[2], means[2]; };

template <bool KEYS> struct GradientWorker {
    const Task &task;
    GradientRoom &room;
    int group;
    float rate;
    Turn<GRADIENT_STAGES> turn;

    __device__ __forceinline__ int code_here() {
        room.full[turn.stage].wait(turn.phase);
        return room.codes[turn.stage][group];
    }

    // The code of the next tile, which is there then; END behind the last. A tile that this warpgroup's rows see nothing of is passed over,
    // but only one: the place of the tile before, whose products are not submitted yet, is what the copies wait for after that.
    __device__ __forceinline__ int take() {
        static_assert(GRADIENT_STAGES >= 3, "one for the tile before, one to pass over, one to take");
        int code = code_here();
        if (code != SKIP) return code;
        release(room.empty[turn.stage]);
        turn.advance();
        return code_here();
    }

    __device__ __forceinline__ void submit_scores(float (&scored)[32], const Own<KEYS> &own, int factor) {
        const char *tile = room.passing[turn.stage][factor];
        if constexpr (KEYS) scores(scored, room.own[factor], group * TILE, tile);
        else scores(scored, factor ? own.gradients : own.queries, tile);
        commit();
    }

    // Scores become P.
    __device__ __forceinline__ void soften(float (&scored)[32], const Own<KEYS> &own, int stage) {
        const float *log_sums = room.log_sums[stage] + threadIdx.x % 4 * 2;
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
            float2 columns = make_float2(0, 0);
            if constexpr (KEYS) columns = *(const float2 *)(log_sums + 8 * n);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float log_sum;
                if constexpr (KEYS) log_sum = i % 2 ? columns.y : columns.x;
                else log_sum = own.log_sums[i / 2];
                scored[4 * n + i] = exp_2(fmaf(scored[4 * n + i], rate, -log_sum));
            }
        }
    }

    // The gradient of P becomes dS.
    __device__ __forceinline__ void slopes_of(const float (&weights)[32], float (&slopes)[32], const Own<KEYS> &own, int stage) {
        const float *means = room.means[stage] + threadIdx.x % 4 * 2;
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
            float2 columns = make_float2(0, 0);
            if constexpr (KEYS) columns = *(const float2 *)(means + 8 * n);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float mean;
                if constexpr (KEYS) mean = i % 2 ? columns.y : columns.x;
                else mean = own.means[i / 2];
                slopes[4 * n + i] = weights[4 * n + i] * (slopes[4 * n + i] - mean);
            }
        }
    }

    // The products of the next tile's scores, and before that of a tile's sums, go in front of what hides behind them: weights are
    // computed while the sums of the tile before are, and dS while the sums of values are.
    __device__ __forceinline__ void slopes_of_stage(float (&scored)[32], float (&slopes)[32], float (&sums)[64], u32 (&factor)[16],
                                                    Own<KEYS> &own, const int2 *own_tokens, int code) {
        int stage = turn.stage;
        if (code != FULL) hide<KEYS>(scored, own_tokens, room.tokens[stage]);
        soften(scored, own, stage);
        wait_products<0>();
        pin(sums);
        if constexpr (KEYS) {
            pack(scored, factor);
            pin(factor);
            pin(slopes);
            pin(own.value_sums);
            begin_products();
            submit_scores(slopes, own, 1);
            gather(own.value_sums, factor, room.passing[stage][1]);
            commit();
            wait_products<1>();
        }
        pin(slopes);
        slopes_of(scored, slopes, own, stage);
        if constexpr (KEYS) {
            wait_products<0>();
            pin(own.value_sums);
        }
        pin(slopes);
        pack(slopes, factor);
    }

    __device__ __forceinline__ void sum_up(float (&sums)[64], Own<KEYS> &own, const int2 *own_tokens) {
        float scored[32], slopes[32];
        u32 factor[16];
        int code = take();
        if (code == END) return;
        pin(scored);
        pin(slopes);
        begin_products();
        submit_scores(scored, own, 0);
        if constexpr (!KEYS) submit_scores(slopes, own, 1);
        wait_products<KEYS ? 0 : 1>();
        pin(scored);
        slopes_of_stage(scored, slopes, sums, factor, own, own_tokens, code);
        int before = turn.stage;
        turn.advance();
        while ((code = take()) != END) {
            pin(factor);
            pin(sums);
            pin(scored);
            pin(slopes);
            begin_products();
            submit_scores(scored, own, 0);
            gather(sums, factor, room.passing[before][0]);
            commit();
            if constexpr (!KEYS) submit_scores(slopes, own, 1);
            wait_products<KEYS ? 1 : 2>();
            pin(scored);
            slopes_of_stage(scored, slopes, sums, factor, own, own_tokens, code);
            release(room.empty[before]);
            before = turn.stage;
            turn.advance();
        }
        pin(factor);
        pin(sums);
        begin_products();
        gather(sums, factor, room.passing[before][0]);
        commit();
        wait_products<0>();
        pin(sums);
        release(room.empty[before]);
    }

    // The tokens of an item's own rows; queries and their statistics, which stay in registers: the place they were copied to is free then.
    __device__ __forceinline__ void prepare(Own<KEYS> &own, const Statistics &statistics, int number) {
        Item item(task, number, !KEYS);
        int warp = threadIdx.x / 32 - 4, first = item.tile * OWN + warp * 16;
        store_own_tokens(task, item.batch, first, room.own_tokens[warp]);
        if constexpr (KEYS) clear(own.value_sums);
        else {
            read_own(room.own[0], group, own.queries);
            read_own(room.own[1], group, own.gradients);
            release(room.own_empty);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                long long at = (long long)item.line * statistics.padded + first + threadIdx.x % 32 / 4 + 8 * half;
                own.log_sums[half] = statistics.log_sums[at];
                own.means[half] = statistics.means[at];
            }
        }
    }

    // Writes sums of this warp's rows of an item.
    __device__ __forceinline__ void write(const float (&sums)[64], float factor, const Rows &rows, int number) {
        Item item(task, number, !KEYS);
        int warp = threadIdx.x / 32 - 4;
        u16 *to = rows.data + item.batch * rows.batch + item.head * rows.head;
        write_rows(sums, factor, factor, room.out[warp], to, rows.row, item.tile * OWN + warp * 16, task.own_tokens);
    }

    // `first` gets the gradient of queries or keys, `second` that of values.
    __device__ __forceinline__ void run(const Statistics &statistics, const Rows &first, const Rows &second) {
        int warp = threadIdx.x / 32 - 4;
        for (u32 phase = 0;; phase ^= 1) {
            room.own_full.wait(phase);
            int number = room.item;
            if (number < 0) break;
            Own<KEYS> own;
            prepare(own, statistics, number);
            float sums[64];
            clear(sums);
            sum_up(sums, own, room.own_tokens[warp]);
            if (KEYS) release(room.own_empty);
            // The stage behind the last tile.
            release(room.empty[turn.stage]);
            turn.advance();
            // What is made of the number is not held in registers through the sums.
            forget(number);
            write(sums, task.scale, first, number);
            if constexpr (KEYS) write(own.value_sums, 1, second, number);
        }
    }
};

template <bool KEYS>
__device__ __forceinline__ void gradient(const GradientMaps &maps, const Task &task, const Statistics &statistics, const Rows &first,
                                         const Rows &second) {
    GradientRoom &room = enter<GradientRoom>();
    int group = threadIdx.x / 128;
    if (group == 0) {
        take_fewer_registers<FEW_REGISTERS>();
        if (threadIdx.x < 32) {
            GradientFeeder<KEYS> feeder = {task, maps, statistics, room, threadIdx.x == 0};
            feeder.run();
        }
    } else {
        take_more_registers<MANY_REGISTERS>();
        GradientWorker<KEYS> worker = {task, room, group - 1, task.scale * LOG2_E};
        worker.run(statistics, first, second);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    hopper_query_gradient(const __grid_constant__ GradientMaps maps, const __grid_constant__ Task task,
                          const __grid_constant__ Statistics statistics, const __grid_constant__ Rows queries) {
    gradient<false>(maps, task, statistics, queries, queries);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    hopper_key_gradient(const __grid_constant__ GradientMaps maps, const __grid_constant__ Task task,
                        const __grid_constant__ Statistics statistics, const __grid_constant__ Rows keys,
                        const __grid_constant__ Rows values) {
    gradient<true>(maps, task, statistics, keys, values);
}

// Statistics of queries from lse [lines, tokens], by half a warp a row. `o` and `g` are only read.
extern "C" __global__ void __launch_bounds__(256)
    hopper_statistics(const __grid_constant__ Rows o, const __grid_constant__ Rows g, const float *log_sums,
                      const __grid_constant__ Statistics statistics, const __grid_constant__ Task queries) {
    int line = blockIdx.y, batch = line / queries.heads, head = line % queries.heads, tokens = queries.own_tokens;
    int row = blockIdx.x * 16 + threadIdx.x / 16, chunk = threadIdx.x % 16;
    float sum = 0;
    if (row < tokens) {
        uint4 a = *(const uint4 *)(o.data + batch * o.batch + head * o.head + row * o.row + chunk * 8);
        uint4 b = *(const uint4 *)(g.data + batch * g.batch + head * g.head + row * g.row + chunk * 8);
        const u32 *x = (const u32 *)&a, *y = (const u32 *)&b;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sum = fmaf(widen(x[i] & 0xffff), widen(y[i] & 0xffff), sum);
            sum = fmaf(widen(x[i] >> 16), widen(y[i] >> 16), sum);
        }
    }
#pragma unroll
    for (int step = 1; step < 16; step *= 2) sum += __shfl_xor_sync(EVERY_LANE, sum, step);
    if (chunk == 0) {
        long long at = (long long)line * statistics.padded + row;
        statistics.means[at] = sum;
        statistics.log_sums[at] = row < tokens ? log_sums[(long long)line * tokens + row] * LOG2_E : 0;
    }
}
