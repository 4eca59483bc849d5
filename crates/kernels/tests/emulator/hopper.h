#pragma once
// What `attention/hopper/instructions.cu` has, on the host. Products are made as late as allowed, when their warpgroup waits for them, or at once with
// EMU_EAGER, and copies as early as allowed, when they are begun: so what is given back or overwritten too soon is found.
#include "emu.h"
#include <deque>
#define __forceinline__ inline
#define EMULATED_WARPGROUP 128
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct int2 { int x, y; };
struct uint4 { unsigned x, y, z, w; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int __ffs(unsigned x) { return __builtin_ffs(x); }
inline float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
inline float emulated_log2(float x) { return log2f(x); }
#define __log2f emulated_log2
inline unsigned atomicInc(unsigned *to, unsigned most) { unsigned old = *to; *to = old >= most ? 0 : old + 1; return old; }
inline unsigned __ballot_sync(unsigned, bool x) { unsigned all = (unsigned)x << emu::lane(); for (unsigned i = 1; i < 32; i *= 2) all |= __shfl_xor_sync(0u, all, i); return all; }
#if BF16
typedef __nv_bfloat16 Narrow;
#else
typedef __half Narrow;
#endif
inline float widen(u32 x) { return emu::half_of<Narrow>(x, 0); }
inline u32 narrow_2(float first, float second) { Narrow both[] = {first, second}; u32 x; memcpy(&x, both, 4); return x; }
inline float exp_2(float x) { return exp2f(x); }

namespace emu {
// Steps of all threads since something happened that others may wait for.
static size_t waited;
template <class Done> void wait_until(Done done) {
  while (!done()) { if (++waited > 50000000) { fprintf(stderr, "DEADLOCK in emulated block\n"); abort(); } yield(0); }
  waited = 0;
}
struct Gathering { unsigned count = 0; uint64_t number = 0; };
inline u32 offset(const void *x) { return (const unsigned char *)x - dynamic_shared_mem; }
// The permutation of chunks of 16 bytes that a swizzle of 128 bytes is.
inline unsigned char *swizzled(u32 at) { return dynamic_shared_mem + (at ^ (at >> 7 & 7) << 4); }
inline float element(u32 at) { u16 x; memcpy(&x, swizzled(at), 2); return widen(x); }
inline u32 field(u64 descriptor, int shift) { return (descriptor >> shift & 0x3fff) * 16; }
inline float by_rows(u64 d, int row, int k) { return element(field(d, 0) + row / 8 * field(d, 32) + row % 8 * 128 + 2 * k); }
inline float by_columns(u64 d, int column, int k) { return element(field(d, 0) + column / 64 * field(d, 16) + column % 64 * 2 + k / 8 * field(d, 32) + k % 8 * 128); }
struct Submitted { float *sums; const u32 *left; };
struct Product { int columns; u64 a, b; bool adds, transposed; Submitted threads[EMULATED_WARPGROUP]; };
inline void make(const Product &p) {
  static float x[64][16], y[128][16];
  for (int row = 0; row < 64; row++) for (int k = 0; k < 16; k++) {
    const u32 *left = p.threads[row / 16 * 32 + row % 8 * 4 + k % 8 / 2].left;
    x[row][k] = left ? half_of<Narrow>(left[row % 16 / 8 + k / 8 * 2], k % 2) : by_rows(p.a, row, k);
  }
  for (int column = 0; column < p.columns; column++) for (int k = 0; k < 16; k++) y[column][k] = p.transposed ? by_columns(p.b, column, k) : by_rows(p.b, column, k);
  for (int thread = 0; thread < EMULATED_WARPGROUP; thread++) for (int i = 0; i < p.columns / 2; i++) {
    int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
    float &sum = p.threads[thread].sums[i];
    if (!p.adds) sum = 0;
    for (int k = 0; k < 16; k++) sum += x[row][k] * y[column][k];
  }
}
// Products of a warpgroup that are not made yet, from number `made` on, and the ends of their groups.
struct Warpgroup {
  std::deque<Product> queue; size_t made = 0; std::vector<size_t> ends;
  size_t submitted[EMULATED_WARPGROUP] = {}, committed[EMULATED_WARPGROUP] = {};
  Gathering waiting;
};
static Warpgroup warpgroups[8];
inline Warpgroup &own_warpgroup() { return warpgroups[current / EMULATED_WARPGROUP]; }
inline void submit(int columns, float *sums, const u32 *left, u64 a, u64 b, bool adds, bool transposed) {
  Warpgroup &own = own_warpgroup(); size_t thread = current % EMULATED_WARPGROUP, number = own.submitted[thread]++ - own.made;
  if (number == own.queue.size()) own.queue.push_back({columns, a, b, adds, transposed});
  own.queue[number].threads[thread] = {sums, left};
}
inline void commit() {
  Warpgroup &own = own_warpgroup(); size_t thread = current % EMULATED_WARPGROUP, number = own.committed[thread]++;
  if (number == own.ends.size()) own.ends.push_back(own.submitted[thread]);
}
inline void wait_for_all_but(size_t pending) {
  static const bool eager = getenv("EMU_EAGER") != nullptr;
  Warpgroup &own = own_warpgroup(); size_t committed = own.committed[current % EMULATED_WARPGROUP]; uint64_t now = own.waiting.number;
  if (++own.waiting.count < EMULATED_WARPGROUP) return wait_until([&] { return own.waiting.number != now; });
  if (eager) pending = 0;
  for (size_t end = committed > pending ? own.ends[committed - pending - 1] : 0; own.made < end; own.made++) { make(own.queue.front()); own.queue.pop_front(); }
  own.waiting.count = 0; own.waiting.number++;
}
// A tensor's address, sizes and strides in bytes, as the emulated driver writes them into a map; see cuda.c.
struct Map { u64 address, size[4], stride[3]; };
} // namespace emu

struct alignas(64) TensorMap { u64 opaque[16]; };
inline u32 shared_address(const void *x) { return emu::offset(x); }
struct Barrier {
  short arrivals, pending; unsigned bytes_and_phase;
  unsigned phase() const { return bytes_and_phase & 1; }
  void init(u32 count) { arrivals = pending = count; bytes_and_phase = 0; }
  void settle() { if (!pending && bytes_and_phase < 2) { pending = arrivals; bytes_and_phase ^= 1; } }
  void add(int bytes) { bytes_and_phase += 2 * bytes; settle(); }
  void arrive() { if (--pending < 0) { fprintf(stderr, "too many arrivals\n"); abort(); } settle(); }
  void expect(u32 bytes) { bytes_and_phase += 2 * bytes; arrive(); }
  void wait(u32 parity) { emu::wait_until([&] { return phase() != parity; }); }
};
inline void show_barriers() {}
inline void copy_box(const TensorMap *from, int column, int row, int head, int batch, char *to, Barrier *barrier) {
  emu::Map map; memcpy(&map, from, sizeof map);
  if (emu::offset(to) % 1024) { fprintf(stderr, "a tile begins at %u\n", emu::offset(to)); abort(); }
  for (u64 i = 0; i < 64; i++) for (u64 j = 0; j < 64; j++) {
    bool there = row + i < map.size[1] && (u64)head < map.size[2] && (u64)batch < map.size[3];
    u16 x = 0;
    if (there) memcpy(&x, (char *)map.address + 2 * (column + j) + map.stride[0] * (row + i) + map.stride[1] * head + map.stride[2] * batch, 2);
    memcpy(emu::swizzled(emu::offset(to) + i * 128 + 2 * j), &x, 2);
  }
  barrier->add(-64 * 128);
}
inline void copy_bytes(const void *from, void *to, u32 bytes, Barrier *barrier) {
  if ((uintptr_t)from % 16 || emu::offset(to) % 16 || bytes % 16) { fprintf(stderr, "bulk copy misaligned\n"); abort(); }
  memcpy(to, from, bytes); barrier->add(-(int)bytes);
}
static emu::Gathering meetings[16];
inline uint64_t come(int barrier, unsigned threads) { auto &own = meetings[barrier]; uint64_t now = own.number; if (++own.count == threads) { own.count = 0; own.number++; } return now; }
inline void pass(int barrier, int threads) { come(barrier, threads); }
inline void meet(int barrier, int threads) { uint64_t now = come(barrier, threads); emu::wait_until([&] { return meetings[barrier].number != now; }); }
inline void multiply(float (&sum)[32], u64 a, u64 b, bool adds) { emu::submit(64, sum, nullptr, a, b, adds, false); }
inline void multiply(float (&sum)[64], u64 a, u64 b, bool adds) { emu::submit(128, sum, nullptr, a, b, adds, false); }
inline void multiply(float (&sum)[32], const u32 *a, u64 b, bool adds) { emu::submit(64, sum, a, 0, b, adds, false); }
inline void gather_step(float (&sum)[64], const u32 *a, u64 b) { emu::submit(128, sum, a, 0, b, true, true); }
inline void begin_products() {}
inline void commit() { emu::commit(); }
template <int PENDING> void wait_products() { emu::wait_for_all_but(PENDING); }
template <class T> void pin(T &) {}
template <class T> void forget(T &) {}
inline void read_fragments(const char *row, u32 *to) { emu::ldm<false>(to[0], to[1], to[2], to[3], row); }
template <int> void take_fewer_registers() {}
template <int> void take_more_registers() {}
