#pragma once
// What generated CUDA source needs to run on the CPU: a block's units are fibers of one thread, switched at barriers and
// warp operations; ldmatrix and mma are done element by element as the PTX manual defines their fragments. Shared memory
// begins as NaN. It finds wrong arithmetic, layouts and indices, deadlocks, and ldmatrix rows whose banks conflict;
// races it finds only if one of two orders of units shows them (EMU_REVERSE turns the order round). Asynchronous copies
// are made when the barrier's phase ends, as late as allowed, or at once with EMU_EAGER.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include "fiber.h"
#include <map>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>
#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
struct uint3 { unsigned x, y, z; };
struct dim3e { unsigned x, y, z; };
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
static uint3 threadIdx, blockIdx;
static dim3e blockDim, gridDim;
static const int warpSize = 32;
alignas(1024) unsigned char dynamic_shared_mem[1 << 18];
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
using std::abs; using std::max; using std::min; // abs of a float would be that of an int
inline unsigned max(unsigned a, int b) { return a > (unsigned)b ? a : b; }
inline unsigned min(int a, unsigned b) { return (unsigned)a < b ? a : b; }
inline unsigned min(unsigned a, int b) { return a < (unsigned)b ? a : b; }
inline float __expf(float x) { return expf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return (uint64_t)a * b >> 32; }
inline float __frcp_rn(float a) { return 1.0f / a; }
namespace emu {
struct Fiber { void *sp; int wait; bool done; uint3 id; };
static std::vector<Fiber> fibers;
static void *home;
static size_t current;
static void (*body)(void **);
static void **params;
static std::vector<char *> stacks;
inline void yield(int why) {
  size_t me = current; fibers[me].wait = why;
  emu_switch(&fibers[me].sp, home);
  threadIdx = fibers[me].id;
}
static void start() { body(params); fibers[current].done = true; fibers[current].wait = 0; emu_switch(&fibers[current].sp, home); }
inline void run_block(size_t n) {
  static const bool reverse = getenv("EMU_REVERSE") != nullptr;
  fibers.assign(n, Fiber());
  while (stacks.size() < n) stacks.push_back((char *)malloc(1 << 18));
  for (size_t i = 0; i < n; i++) {
    auto &f = fibers[i]; void **top = (void **)(stacks[i] + (1 << 18) - 72); top[0] = nullptr; top[-1] = (void *)start; for (int j = 2; j < 8; j++) top[-j] = nullptr; f.sp = top - 7;
    f.wait = 0; f.done = false;
    f.id = {(unsigned)(i % blockDim.x), (unsigned)(i / blockDim.x % blockDim.y), (unsigned)(i / blockDim.x / blockDim.y)};
  }
  for (;;) {
    bool moved = false, alive = false;
    for (size_t j = 0; j < n; j++) { size_t i = reverse ? n - 1 - j : j; if (fibers[i].done || fibers[i].wait) continue; current = i; threadIdx = fibers[i].id; emu_switch(&home, fibers[i].sp); moved = true; }
    bool all = true;
    for (size_t i = 0; i < n; i++) if (!fibers[i].done) { alive = true; if (fibers[i].wait != 2) all = false; }
    if (!alive) return;
    if (all) { for (auto &f : fibers) f.wait = 0; continue; }
    for (size_t w = 0; w < n; w += 32) {
      bool ready = true;
      for (size_t i = w; i < std::min(n, w + 32); i++) if (!fibers[i].done && fibers[i].wait != 1) ready = false;
      if (ready) for (size_t i = w; i < std::min(n, w + 32); i++) { if (fibers[i].wait == 1) moved = true; fibers[i].wait = 0; }
    }
    bool any = false; for (auto &f : fibers) if (!f.done && !f.wait) any = true;
    if (!any) { fprintf(stderr, "DEADLOCK in emulated block\n"); abort(); }
  }
}
inline unsigned lane() { return current % 32; }
inline size_t warp() { return current / 32; }
static uint64_t slots[32][32][16];
#define SLOT emu::slots[emu::warp()]
template <class T> T shuffle(T x, unsigned from) {
  memcpy(&SLOT[lane()][0], &x, sizeof x); yield(1); T y; memcpy(&y, &SLOT[from % 32][0], sizeof y); yield(1); return y;
}
template <bool TRANS> void ldm(uint32_t &r0, uint32_t &r1, uint32_t &r2, uint32_t &r3, const void *p) {
  if ((uintptr_t)p % 16) { fprintf(stderr, "ldmatrix misaligned\n"); abort(); }
  SLOT[lane()][0] = (uint64_t)p; yield(1);
  uint32_t r[4];
  for (int m = 0; m < 4; m++) {
    if (!TRANS) memcpy(&r[m], (char *)SLOT[m * 8 + lane() / 4][0] + 4 * (lane() % 4), 4);
    else { uint16_t a, b; memcpy(&a, (char *)SLOT[m * 8 + lane() % 4 * 2][0] + 2 * (lane() / 4), 2); memcpy(&b, (char *)SLOT[m * 8 + lane() % 4 * 2 + 1][0] + 2 * (lane() / 4), 2); r[m] = a | (uint32_t)b << 16; }
  }
  // Bank conflicts: eight rows of a matrix have to lie in eight different 16-byte columns of 128 bytes.
  if (lane() == 0) for (int m = 0; m < 4; m++) { unsigned seen = 0; for (int i = 0; i < 8; i++) seen |= 1u << (SLOT[m * 8 + i][0] / 16 % 8); if (seen != 255) { static int once; if (!once++) fprintf(stderr, "BANK CONFLICT in ldmatrix\n"); } }
  yield(1); r0 = r[0]; r1 = r[1]; r2 = r[2]; r3 = r[3];
}
template <class H> float half_of(uint64_t reg, int i) { uint16_t u = (uint32_t)reg >> (16 * i); H h; memcpy(&h, &u, 2); return float(h); }
template <class H, int K> void mma(const uint32_t *a, const uint32_t *b, const float *c, float *d) {
  auto &s = SLOT[lane()];
  for (int i = 0; i < K / 4; i++) s[i] = a[i];
  for (int i = 0; i < K / 8; i++) s[8 + i] = b[i];
  yield(1);
  float out[4];
  for (int e = 0; e < 4; e++) {
    int r = lane() / 4 + e / 2 * 8, n = lane() % 4 * 2 + e % 2; float sum = c[e];
    for (int k = 0; k < K; k++) {
      float x = half_of<H>(SLOT[r % 8 * 4 + k % 8 / 2][r / 8 + 2 * (k / 8)], k % 2);
      float y = half_of<H>(SLOT[n * 4 + k % 8 / 2][8 + k / 8], k % 2);
      sum += x * y;
    }
    out[e] = sum;
  }
  yield(1);
  for (int e = 0; e < 4; e++) d[e] = out[e];
}
template <class H> void mma16(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3, float &d0, float &d1, float &d2, float &d3) {
  uint32_t a[] = {a0, a1, a2, a3}, b[] = {b0, b1}; float c[] = {c0, c1, c2, c3}, d[4]; mma<H, 16>(a, b, c, d); d0 = d[0]; d1 = d[1]; d2 = d[2]; d3 = d[3];
}
template <class H> void mma8(uint32_t a0, uint32_t a1, uint32_t b0, float c0, float c1, float c2, float c3, float &d0, float &d1, float &d2, float &d3) {
  uint32_t a[] = {a0, a1}, b[] = {b0}; float c[] = {c0, c1, c2, c3}, d[4]; mma<H, 8>(a, b, c, d); d0 = d[0]; d1 = d[1]; d2 = d[2]; d3 = d[3];
}
struct Copy { void *to; const void *from; size_t size; };
struct Phase { unsigned count, pending; uint64_t number; std::vector<Copy> copies; };
static std::map<const void *, Phase> phases;
static std::map<size_t, std::vector<Copy>> begun;
inline void begin_copy(const void *from, void *to, size_t size) {
  static const bool eager = getenv("EMU_EAGER") != nullptr;
  if ((uintptr_t)from % size || (uintptr_t)to % size) { fprintf(stderr, "cp.async misaligned\n"); abort(); }
  if (eager) memcpy(to, from, size); else begun[current].push_back({to, from, size});
}
inline void commit(const void *barrier) {
  auto &mine = begun[current]; auto &all = phases.at(barrier).copies;
  all.insert(all.end(), mine.begin(), mine.end()); mine.clear();
}
inline void arrive_and_wait(const void *barrier) {
  auto &phase = phases.at(barrier); uint64_t now = phase.number;
  if (--phase.pending == 0) {
    for (auto &c : phase.copies) memcpy(c.to, c.from, c.size);
    phase.copies.clear(); phase.pending = phase.count; phase.number++;
  }
  while (phase.number == now) yield(0);
}
template <class... A, size_t... I> void apply(void (*f)(A...), void **p, std::index_sequence<I...>) { f(*(std::remove_cv_t<std::remove_reference_t<A>> *)p[I]...); }
template <class... A> void call(void (*f)(A...), void **p) { apply(f, p, std::index_sequence_for<A...>()); }
inline void launch(void (*b)(void **), void **p, unsigned *g, unsigned *d) {
  body = b; params = p; gridDim = {g[0], g[1], g[2]}; blockDim = {d[0], d[1], d[2]};
  for (unsigned z = 0; z < g[2]; z++) for (unsigned y = 0; y < g[1]; y++) for (unsigned x = 0; x < g[0]; x++) {
    blockIdx = {x, y, z};
    uint32_t nan = 0x7fffffff; for (size_t i = 0; i < sizeof dynamic_shared_mem; i += 4) memcpy(dynamic_shared_mem + i, &nan, 4);
    phases.clear(); begun.clear();
    run_block((size_t)d[0] * d[1] * d[2]);
  }
}
} // namespace emu
namespace cuda {
enum thread_scope { thread_scope_block };
template <thread_scope> struct barrier {
  struct arrival_token {};
  uint64_t state;
  void arrive_and_wait() { emu::arrive_and_wait(this); }
};
} // namespace cuda
namespace cooperative_groups {
struct thread_block {};
inline thread_block this_thread_block() { return {}; }
} // namespace cooperative_groups
inline void init(cuda::barrier<cuda::thread_scope_block> *b, unsigned n) { emu::phases[b] = {n, n, 0, {}}; }
inline void __cp_async_arrive(cuda::barrier<cuda::thread_scope_block> &b) { emu::commit(&b); }
template <size_t N> void __cp_async_shared_global(const void *from, void *to) { emu::begin_copy(from, to, N); }
inline void __syncthreads() { emu::yield(2); }
inline void __syncwarp() { emu::yield(1); }
inline void __threadfence() {}
template <class T> T __shfl_xor_sync(unsigned, T x, unsigned m) { return emu::shuffle(x, emu::lane() ^ m); }
template <class T> T __shfl_sync(unsigned, T x, unsigned m) { return emu::shuffle(x, m); }
inline bool __any_sync(unsigned, bool x) { bool any = false; for (unsigned i = 1; i < 32; i *= 2) any = (x = __shfl_xor_sync(0u, x, i) || x); return any; }
#define __ldmatrix_m8n8___nv_bfloat16_4x(...) emu::ldm<false>(__VA_ARGS__)
#define __ldmatrix_m8n8___nv_bfloat16_4x_trans(...) emu::ldm<true>(__VA_ARGS__)
#define __ldmatrix_m8n8___half_4x(...) emu::ldm<false>(__VA_ARGS__)
#define __ldmatrix_m8n8___half_4x_trans(...) emu::ldm<true>(__VA_ARGS__)
#define __mma_m16n8k16___nv_bfloat16___nv_bfloat16_float(...) emu::mma16<__nv_bfloat16>(__VA_ARGS__)
#define __mma_m16n8k16___half___half_float(...) emu::mma16<__half>(__VA_ARGS__)
#define __mma_m16n8k8___half___half_float(...) emu::mma8<__half>(__VA_ARGS__)
struct __nv_bfloat16 {
  uint16_t u;
  __nv_bfloat16() = default;
  template <class T, class = std::enable_if_t<std::is_arithmetic<T>::value>> __nv_bfloat16(T v) {
    float f = (float)v; uint32_t x; memcpy(&x, &f, 4);
    if (f != f) u = 0x7fff; else u = (x + 0x7fff + (x >> 16 & 1)) >> 16;
  }
  operator float() const { uint32_t x = (uint32_t)u << 16; float f; memcpy(&f, &x, 4); return f; }
};
struct __half {
  uint16_t u;
  __half() = default;
  template <class T, class = std::enable_if_t<std::is_arithmetic<T>::value>> __half(T v) { _Float16 h = (_Float16)(float)v; memcpy(&u, &h, 2); }
  operator float() const { _Float16 h; memcpy(&h, &u, 2); return (float)h; }
};
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
struct __half2 { __half x, y; };
struct float2 { float x, y; };
inline float __half2float(__half h) { return h; }
