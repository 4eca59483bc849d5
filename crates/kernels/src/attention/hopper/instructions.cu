// begin of instructions
// What CUDA C++ has no names for: barriers in shared memory, the copy engine, products of warpgroups, registers of warpgroups.
// `tests/emulator/hopper.h` has functions that do the same on the host, in place of all of this file.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#if BF16
#define DTYPE "bf16"
#else
#define DTYPE "f16"
#endif

// ---- Barriers and copies

// Where the driver says how a tensor [b, heads, t, width] lies; a box has 64 rows of 64 elements.
struct alignas(64) TensorMap { u64 opaque[16]; };

__device__ __forceinline__ u32 shared_address(const void *x) {
    u64 address;
    asm("cvta.to.shared.u64 %0, %1;" : "=l"(address) : "l"(x));
    return (u32)address;
}

struct Barrier {
    u64 word;

    __device__ __forceinline__ void init(u32 arrivals) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory");
    }
    __device__ __forceinline__ void arrive() {
        asm volatile("{.reg .b64 s; mbarrier.arrive.shared::cta.b64 s, [%0];}" ::"r"(shared_address(this)) : "memory");
    }
    // Arrives, and makes the barrier wait for so many bytes of copies.
    __device__ __forceinline__ void expect(u32 bytes) {
        asm volatile("{.reg .b64 s; mbarrier.arrive.expect_tx.shared::cta.b64 s, [%0], %1;}" ::"r"(shared_address(this)), "r"(bytes)
                     : "memory");
    }
    __device__ __forceinline__ void wait(u32 phase) {
        u32 done;
        do {
            asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                         : "=r"(done)
                         : "r"(shared_address(this)), "r"(phase)
                         : "memory");
        } while (!done);
    }
};

// Barriers that were initialised by this thread are there for the copy engine.
__device__ __forceinline__ void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Starts the copy of a box from a column and a row of a head on; rows past the end become 0.
__device__ __forceinline__ void copy_box(const TensorMap *from, int column, int row, int head, int batch, char *to, Barrier *barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(shared_address(barrier))
                 : "memory");
}

// Starts the copy of so many bytes, a multiple of 16.
__device__ __forceinline__ void copy_bytes(const void *from, void *to, u32 bytes, Barrier *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// Waits until `threads` threads have come to a barrier of the block, or only says that this one has.
__device__ __forceinline__ void meet(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void pass(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- Products of a warpgroup

// Registers of sums in inline assembly.
#define NAMES_32 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, " \
    "%27, %28, %29, %30, %31}"
#define NAMES_64 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, " \
    "%27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
    "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define REGISTERS_8(x, i) \
    "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), "+f"(x[i + 7])
#define REGISTERS_32(x, i) REGISTERS_8(x, i), REGISTERS_8(x, i + 8), REGISTERS_8(x, i + 16), REGISTERS_8(x, i + 24)

// sum (+)= a b^T for 16 columns of a and b.
__device__ __forceinline__ void multiply(float (&sum)[32], u64 a, u64 b, bool adds) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." DTYPE "." DTYPE " " NAMES_32
                 ", %32, %33, p, 1, 1, 0, 0;}"
                 : REGISTERS_32(sum, 0)
                 : "l"(a), "l"(b), "r"((int)adds));
}
__device__ __forceinline__ void multiply(float (&sum)[64], u64 a, u64 b, bool adds) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." DTYPE "." DTYPE " " NAMES_64
                 ", %64, %65, p, 1, 1, 0, 0;}"
                 : REGISTERS_32(sum, 0), REGISTERS_32(sum, 32)
                 : "l"(a), "l"(b), "r"((int)adds));
}
// The same with a in registers.
__device__ __forceinline__ void multiply(float (&sum)[32], const u32 *a, u64 b, bool adds) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." DTYPE "." DTYPE " " NAMES_32
                 ", {%32, %33, %34, %35}, %36, p, 1, 1, 0;}"
                 : REGISTERS_32(sum, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)adds));
}
// sum += a b for 16 columns of a, in registers, and 16 rows of b.
__device__ __forceinline__ void gather_step(float (&sum)[64], const u32 *a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." DTYPE "." DTYPE " " NAMES_64 ", {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : REGISTERS_32(sum, 0), REGISTERS_32(sum, 32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// Products that are submitted next read registers as they are here.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most so many groups of products are not done. Before that nobody may touch their registers.
template <int PENDING> __device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// The compiler must not move what reads or writes these registers across this.
template <int N> __device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N> __device__ __forceinline__ void pin(u32 (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(x[i])::"memory");
}

// Keeps the compiler from holding what follows from a number in registers.
template <class T> __device__ __forceinline__ void forget(T &number) { asm volatile("" : "+r"(number)); }

// Four fragments of 8 x 8, of which each lane names a row of 16 bytes.
__device__ __forceinline__ void read_fragments(const char *row, u32 *to) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Registers of a thread of this warpgroup from now on.
template <int COUNT> __device__ __forceinline__ void take_fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void take_more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- Numbers

// Two numbers in 16 bits, the first in the lower half.
__device__ __forceinline__ u32 narrow_2(float first, float second) {
    u32 both;
    asm("cvt.rn." DTYPE "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

__device__ __forceinline__ float exp_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float widen(u32 x) {
    float y;
#if BF16
    y = __uint_as_float(x << 16);
#else
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"((u16)x));
#endif
    return y;
}
// end of instructions

