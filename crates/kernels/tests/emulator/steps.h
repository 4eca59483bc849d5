#pragma once
// What the kernel of steps (src/step/kernels.cu) needs to run on the CPU: all threads of all its blocks are fibers of one thread, because
// blocks wait for each other. Fibers are switched at barriers, warp operations, and where one waits for what another block does.
// Shared memory begins as NaN, asynchronous copies are made when they are waited for, as late as allowed. It finds wrong arithmetic, layouts and
// indices, addresses outside shared memory, missing waits for copies, and deadlocks; races it finds only if one of two orders of threads
// shows them. bf16 only. steps.py puts it before the kernel's source, whose inline PTX it replaces.
#include <sys/mman.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#include "fiber.h"
#define __global__
#define __device__
#define __forceinline__ inline
#define __constant__ static
#define __launch_bounds__(...)
#define __CUDA_ARCH__ 0
using std::max;
using std::min;
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline unsigned min(unsigned a, int b) { return std::min(a, (unsigned)b); }
struct Index { unsigned x; };
static Index threadIdx, blockIdx, gridDim;
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(unsigned u) { float x; memcpy(&x, &u, 4); return x; }
template <class T> T __ldg(const T *p) { return *p; }
template <class T> T __ldcg(const T *p) { return *p; }
template <class T> void __stcg(T *p, T v) { *p = v; }
inline void __threadfence() {}
inline int atomicAdd(int *p, int v) { int old = *p; *p += v; return old; }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selectors) {
  uint64_t bytes = (uint64_t)y << 32 | x;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) r |= (unsigned)(bytes >> 8 * (selectors >> 4 * i & 7) & 0xff) << 8 * i;
  return r;
}

namespace emu {
enum Wait { RUNS, WARP, BLOCK };
const size_t THREADS_OF_BLOCK = 512, STACK = 1 << 16, SHARED = 232448 + 1024, RESERVED = 1024;
struct Copy { unsigned to; const void *from; int size; };
struct Fiber {
  void *sp;
  Wait wait;
  bool done;
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

static std::vector<Fiber> fibers;
static void *home;
static size_t current;
static char *stacks;
static unsigned char *memory_of_blocks;
static uint64_t (*slots)[32][6];   // of each warp: what its lanes show each other
#define SLOT emu::slots[emu::current / 32]

inline unsigned lane() { return current % 32; }
inline unsigned char *shared() { return memory_of_blocks + current / THREADS_OF_BLOCK * SHARED; }

inline void become(size_t fiber) {
  current = fiber;
  threadIdx.x = fiber % THREADS_OF_BLOCK;
  blockIdx.x = fiber / THREADS_OF_BLOCK;
}

inline void yield(Wait wait) {
  size_t me = current;
  fibers[me].wait = wait;
  emu_switch(&fibers[me].sp, home);
  become(me);
}

template <class T> T shuffle(T x, unsigned from) {
  memcpy(&SLOT[lane()][0], &x, sizeof x);
  yield(WARP);
  T y;
  memcpy(&y, &SLOT[from % 32][0], sizeof y);
  yield(WARP);
  return y;
}

inline float half_of(uint64_t pair, int i) { return __uint_as_float(((uint32_t)pair >> 16 * i & 0xffff) << 16); }

// mma.m16n8k16, element by element as the PTX manual defines its fragments.
inline void mma(float *c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  unsigned own[] = {a0, a1, a2, a3, b0, b1};
  for (int i = 0; i < 6; i++) SLOT[lane()][i] = own[i];
  yield(WARP);
  float sums[4];
  for (int e = 0; e < 4; e++) {
    int row = lane() / 4 + e / 2 * 8, column = lane() % 4 * 2 + e % 2;
    sums[e] = c[e];
    for (int k = 0; k < 16; k++)
      sums[e] += half_of(SLOT[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)], k % 2) * half_of(SLOT[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
  }
  yield(WARP);
  for (int e = 0; e < 4; e++) c[e] = sums[e];
}

inline void check(unsigned at, int size) {
  if (at >= RESERVED && at + size <= SHARED && at % size == 0) return;
  printf("%d bytes at %u of shared memory\n", size, at);
  abort();
}

template <class T> T load(unsigned at) {
  check(at, sizeof(T));
  T v;
  memcpy(&v, shared() + at, sizeof v);
  return v;
}

inline void begin_copy(unsigned to, const void *from, int size) {
  check(to, size);
  if ((uintptr_t)from % size) {
    printf("%d bytes copied from %p\n", size, from);
    abort();
  }
  fibers[current].open.push_back({to, from, size});
}

inline void end_group() {
  auto &fiber = fibers[current];
  fiber.groups.push_back(fiber.open);
  fiber.open.clear();
}

inline void wait_for_groups(size_t left) {
  auto &groups = fibers[current].groups;
  for (; groups.size() > left; groups.erase(groups.begin()))
    for (auto &c : groups[0]) memcpy(shared() + c.to, c.from, c.size);
}

// Lets fibers from `first` on that all wait for the same go on; whether they did.
inline bool release(size_t first, size_t count, Wait wait) {
  for (size_t i = first; i < first + count; i++)
    if (fibers[i].done || fibers[i].wait != wait) return false;
  for (size_t i = first; i < first + count; i++) fibers[i].wait = RUNS;
  return true;
}

// Runs `body` in all threads of so many blocks; whether they came to an end.
inline bool run(void (*body)(), unsigned blocks, bool backwards) {
  size_t n = blocks * THREADS_OF_BLOCK;
  gridDim.x = blocks;
  stacks = (char *)mmap(nullptr, n * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  std::vector<unsigned char> memory(blocks * SHARED, 0xff);
  std::vector<uint64_t> shown(n * 6);
  memory_of_blocks = memory.data();
  slots = (uint64_t (*)[32][6])shown.data();
  fibers.assign(n, Fiber());
  for (size_t i = 0; i < n; i++) {
    void **top = (void **)(stacks + (i + 1) * STACK - 72);
    top[-1] = (void *)body;
    fibers[i].sp = top - 7;
  }
  size_t done = 0;
  // Fibers that wait for other blocks run again and again.
  for (int idle = 0; done < n && idle < 1000; idle++) {
    size_t before = done;
    bool moved = false;
    for (size_t j = 0; j < n; j++) {
      size_t i = backwards ? n - 1 - j : j;
      if (fibers[i].done || fibers[i].wait != RUNS) continue;
      become(i);
      emu_switch(&home, fibers[i].sp);
      moved = moved || fibers[i].wait != RUNS;
      done += fibers[i].done;
    }
    for (size_t i = 0; i < n; i += THREADS_OF_BLOCK) moved = release(i, THREADS_OF_BLOCK, BLOCK) || moved;
    for (size_t i = 0; i < n; i += 32) moved = release(i, 32, WARP) || moved;
    if (moved || done > before) idle = 0;
  }
  munmap(stacks, n * STACK);
  return done == n;
}

// The end of a fiber's body.
inline void finish() {
  fibers[current].done = true;
  fibers[current].wait = RUNS;
  emu_switch(&fibers[current].sp, home);
}
} // namespace emu

template <class T> unsigned __cvta_generic_to_shared(T *p) { return (unsigned)((unsigned char *)p - emu::shared()); }
inline void __syncthreads() { emu::yield(emu::BLOCK); }
inline void __syncwarp() { emu::yield(emu::WARP); }
template <class T> T __shfl_xor_sync(unsigned, T x, unsigned mask) { return emu::shuffle(x, emu::lane() ^ mask); }
template <class T> T __shfl_sync(unsigned, T x, unsigned from, unsigned width = 32) {
  return emu::shuffle(x, emu::lane() / width * width + from % width);
}
