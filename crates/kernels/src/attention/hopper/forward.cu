// o = softmax(q k^T scale) v and the log of the softmax's sums. Own rows are queries; 128 keys pass by at a time.
//
// While a warpgroup takes the softmax of one tile, its product with the values of the tile before and the other warpgroup's products
// keep the tensor cores busy: scores of the next tile and values of the present one are always submitted together, and the two
// warpgroups take turns at that.

#define KEYS_AT_ONCE 128
#define FORWARD_STAGES 2
// How far scores may exceed the shift of the softmax, in powers of two, before sums are rescaled.
#define SLACK 8.0f

struct ForwardRoom {
    char queries[OWN * 256];
    char keys[FORWARD_STAGES][KEYS_AT_ONCE * 256];
    char values[FORWARD_STAGES][KEYS_AT_ONCE * 256];
    char out[WORKERS][16 * 256];
    int2 own_tokens[WORKERS][16];
    TokenPair tokens[FORWARD_STAGES][KEYS_AT_ONCE / 2];
    int codes[FORWARD_STAGES][2];   // of a stage's keys, for each warpgroup
    int item;                       // whose queries are there; -1 after the last
    Barrier queries_full, queries_empty;
    Barrier keys_full[FORWARD_STAGES], keys_empty[FORWARD_STAGES];
    Barrier values_full[FORWARD_STAGES], values_empty[FORWARD_STAGES];

    __device__ __forceinline__ void init() {
        queries_full.init(1);
        queries_empty.init(WORKERS);
        for (int i = 0; i < FORWARD_STAGES; i++) {
            keys_full[i].init(1 + 32);
            keys_empty[i].init(WORKERS);
            values_full[i].init(1);
            values_empty[i].init(WORKERS);
        }
    }
};

// Copies what the workers need, by one warp.
struct ForwardFeeder {
    const Task &task;
    const TensorMap *k, *v;
    ForwardRoom &room;
    bool first_lane;
    Turn<FORWARD_STAGES> keys_turn, values_turn;

    __device__ __forceinline__ void pass(const Item &item, int tile, int code_0, int code_1) {
        u32 stage = keys_turn.stage;
        int first = tile * KEYS_AT_ONCE, head = item.head / task.members;
        room.keys_empty[stage].wait(keys_turn.phase ^ 1);
        if (first_lane) {
            room.codes[stage][0] = code_0;
            room.codes[stage][1] = code_1;
            room.keys_full[stage].expect(KEYS_AT_ONCE * 256);
            copy_own(k, first, head, item.batch, room.keys[stage], &room.keys_full[stage]);
        }
        if (code_0 != FULL || code_1 != FULL) store_tokens(task, item.batch, first, KEYS_AT_ONCE, room.tokens[stage]);
        room.keys_full[stage].arrive();
        keys_turn.advance();
        stage = values_turn.stage;
        room.values_empty[stage].wait(values_turn.phase ^ 1);
        if (first_lane) {
            room.values_full[stage].expect(KEYS_AT_ONCE * 256);
            copy_own(v, first, head, item.batch, room.values[stage], &room.values_full[stage]);
        }
        values_turn.advance();
    }

    __device__ __forceinline__ void end() {
        u32 stage = keys_turn.stage;
        room.keys_empty[stage].wait(keys_turn.phase ^ 1);
        if (first_lane) {
            room.codes[stage][0] = room.codes[stage][1] = END;
            room.keys_full[stage].arrive();
        }
        room.keys_full[stage].arrive();
        keys_turn.advance();
    }
};

__device__ __forceinline__ void feed_forward(const Task &task, const TensorMap *q, const TensorMap *k, const TensorMap *v, ForwardRoom &room) {
    ForwardFeeder feeder = {task, k, v, room, threadIdx.x % 32 == 0};
    for (u32 phase = 1;; phase ^= 1) {
        int number = next_item(task);
        room.queries_empty.wait(phase);
        if (feeder.first_lane) room.item = number;
        if (number < 0) break;
        Item item(task, number, true);
        if (feeder.first_lane) {
            room.queries_full.expect(OWN * 256);
            copy_own(q, item.tile * OWN, item.head, item.batch, room.queries, &room.queries_full);
        }
        int2 range = range_of(task, item);
        // A tile of 128 keys is two that have codes. A warpgroup that sees none of it hides all of it.
        auto code = [&](int half, int tile) {
            int first = code_of(task, item.batch, 2 * item.tile + half, 2 * tile);
            int second = code_of(task, item.batch, 2 * item.tile + half, 2 * tile + 1);
            return first == second ? first : MASKED;
        };
        walk(range.x / 2, (range.y + 1) / 2, code, [&](int tile, int first, int second) { feeder.pass(item, tile, first, second); });
        feeder.end();
    }
    if (feeder.first_lane) room.queries_full.arrive();
}

// The softmax of a thread's two rows so far: what scores are measured from, and the sum of this thread's weights.
struct Softmax {
    float peaks[2], totals[2], shrink[2];

    __device__ __forceinline__ Softmax() : peaks{-infinity(), -infinity()}, totals{0, 0}, shrink{1, 1} {}

    // Takes the peaks of new scores; true, in all lanes of a warp, where sums have to be multiplied by `shrink`.
    __device__ __forceinline__ bool raise(const float (&scores)[64], float rate) {
        float tops[2];
        bool grew = false;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float top = peaks[half];
#pragma unroll
            for (int n = 0; n < 16; n++) top = fmaxf(top, fmaxf(scores[4 * n + 2 * half], scores[4 * n + 2 * half + 1]));
            top = fmaxf(top, __shfl_xor_sync(EVERY_LANE, top, 1));
            tops[half] = fmaxf(top, __shfl_xor_sync(EVERY_LANE, top, 2));
            grew = grew || tops[half] * rate > peaks[half] * rate + SLACK;
        }
        grew = __any_sync(EVERY_LANE, grew);
        if (grew) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                // Where nothing has been seen before there is nothing to shrink.
                shrink[half] = peaks[half] == -infinity() ? 0.0f : exp_2((peaks[half] - tops[half]) * rate);
                peaks[half] = tops[half];
                totals[half] *= shrink[half];
            }
        }
        return grew;
    }

    // Scores become weights.
    __device__ __forceinline__ void soften(float (&scores)[64], float rate) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // Where nothing has been seen yet all scores are minus infinity, and so their weights 0.
            float shift = peaks[half] == -infinity() ? 0.0f : peaks[half] * rate;
#pragma unroll
            for (int n = 0; n < 16; n++) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float &score = scores[4 * n + 2 * half + j];
                    score = exp_2(fmaf(score, rate, -shift));
                    totals[half] += score;
                }
            }
        }
    }

    __device__ __forceinline__ void rescale(float (&sums)[64]) const {
#pragma unroll
        for (int i = 0; i < 64; i++) sums[i] *= shrink[i / 2 % 2];
    }

    // The log of a row's sum, and in `factor` what its sums are to be multiplied by.
    __device__ __forceinline__ float finish(int half, float rate, float &factor) const {
        float total = totals[half] + __shfl_xor_sync(EVERY_LANE, totals[half], 1);
        total += __shfl_xor_sync(EVERY_LANE, total, 2);
        factor = total == 0 ? 0.0f : 1 / total;
        return total == 0 ? NOTHING : (peaks[half] * rate + __log2f(total)) * LN_2;
    }
};

// The warpgroups take turns: each submits products when the other has submitted its own.
__device__ __forceinline__ void await_turn(int group) { meet(1 + group, 2 * 128); }
__device__ __forceinline__ void give_turn(int group) { pass(2 - group, 2 * 128); }

struct ForwardWorker {
    const Task &task;
    ForwardRoom &room;
    int group;
    float rate;
    Turn<FORWARD_STAGES> keys_turn, values_turn;

    // The code of the next keys, which are there then.
    __device__ __forceinline__ int take_keys() {
        room.keys_full[keys_turn.stage].wait(keys_turn.phase);
        return room.codes[keys_turn.stage][group];
    }
    __device__ __forceinline__ void release_keys() {
        release(room.keys_empty[keys_turn.stage]);
        keys_turn.advance();
    }
    __device__ __forceinline__ void release_values() {
        release(room.values_empty[values_turn.stage]);
        values_turn.advance();
    }
    __device__ __forceinline__ void submit_scores(float (&scored)[64]) {
        pin(scored);
        begin_products();
        scores(scored, room.queries, group * TILE, room.keys[keys_turn.stage]);
        commit();
    }
    __device__ __forceinline__ void submit_values(float (&sums)[64], u32 (&weights)[32]) {
        room.values_full[values_turn.stage].wait(values_turn.phase);
        pin(sums);
        pin(weights);
        begin_products();
        gather(sums, weights, room.values[values_turn.stage]);
        commit();
    }
    // Scores that are there: hidden where need be. The keys are not needed any more.
    __device__ __forceinline__ void receive_scores(float (&scored)[64], int code, const int2 *own) {
        pin(scored);
        if (code != FULL) hide<false>(scored, own, room.tokens[keys_turn.stage]);
        release_keys();
    }

    // Sums of all keys that the own rows see, not yet divided.
    __device__ __forceinline__ void attend(float (&sums)[64], Softmax &softmax, const int2 *own) {
        float scored[64];
        u32 weights[32];
        int code = take_keys();
        bool some = code != END;
        if (some) {
            submit_scores(scored);
            wait_products<0>();
            receive_scores(scored, code, own);
            softmax.raise(scored, rate);
            softmax.soften(scored, rate);
            pack(scored, weights);
            while ((code = take_keys()) != END) {
                await_turn(group);
                submit_scores(scored);
                submit_values(sums, weights);
                give_turn(group);
                wait_products<1>();
                receive_scores(scored, code, own);
                bool grew = softmax.raise(scored, rate);
                softmax.soften(scored, rate);
                wait_products<0>();
                pin(sums);
                release_values();
                if (grew) softmax.rescale(sums);
                pack(scored, weights);
            }
        }
        release_keys();
        release(room.queries_empty);
        if (some) {
            submit_values(sums, weights);
            wait_products<0>();
            pin(sums);
            release_values();
        }
    }

    __device__ __forceinline__ void run(const Rows &o, float *log_sums) {
        int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        if (group == 1) give_turn(group);
        for (u32 phase = 0;; phase ^= 1) {
            room.queries_full.wait(phase);
            int number = room.item;
            if (number < 0) break;
            Item item(task, number, true);
            int first = item.tile * OWN + group * TILE + warp * 16, row = first + lane / 4;
            int2 *own = room.own_tokens[group * 4 + warp];
            store_own_tokens(task, item.batch, first, own);
            float sums[64];
            clear(sums);
            Softmax softmax;
            attend(sums, softmax, own);
            float factors[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float log_sum = softmax.finish(half, rate, factors[half]);
                if (lane % 4 == 0 && row + 8 * half < task.own_tokens)
                    log_sums[(long long)item.line * task.own_tokens + row + 8 * half] = log_sum;
            }
            u16 *to = o.data + item.batch * o.batch + item.head * o.head;
            write_rows(sums, factors[0], factors[1], room.out[group * 4 + warp], to, o.row, first, task.own_tokens);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    hopper_forward(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
                   const __grid_constant__ Task task, const __grid_constant__ Rows o, float *log_sums) {
    ForwardRoom &room = enter<ForwardRoom>();
    int group = threadIdx.x / 128;
    if (group == 0) {
        take_fewer_registers<FEW_REGISTERS>();
        if (threadIdx.x < 32) feed_forward(task, &q, &k, &v, room);
    } else {
        take_more_registers<MANY_REGISTERS>();
        ForwardWorker worker = {task, room, group - 1, task.scale * LOG2_E};
        worker.run(o, log_sums);
    }
}
