// A CUDA driver without a device, so that CubeCL compiles its kernels and, with nvrtc.c, runs them on the CPU.
// It is a test tool for one process: memory is the host's, streams and events do nothing, no error is reported.
// STUB_ARCH is the compute capability (75, 80, 90), EMU_OUT a folder for what is compiled; see run.sh.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int R;
static int arch(void) { const char *a = getenv("STUB_ARCH"); return a ? atoi(a) : 75; }
R cuInit(unsigned f) { return 0; }
R cuDriverGetVersion(int *v) { *v = 12080; return 0; }
R cuDeviceGetCount(int *n) { *n = 1; return 0; }
R cuDeviceGet(int *d, int i) { *d = 0; return 0; }
R cuDeviceGetName(char *s, int n, int d) { strncpy(s, "stub", n); return 0; }
R cuDeviceTotalMem_v2(size_t *n, int d) { *n = (size_t)16 << 30; return 0; }
R cuDeviceGetUuid_v2(void *u, int d) { memset(u, 7, 16); return 0; }
R cuDeviceGetAttribute(int *v, int a, int d) {
  switch (a) {
  case 1: *v = 1024; break;                                  // threads in a block
  case 2: case 3: *v = 1024; break;                          // block x, y
  case 4: *v = 64; break;                                    // block z
  case 5: *v = 2147483647; break;                            // grid x
  case 6: case 7: *v = 65535; break;                         // grid y, z
  case 8: *v = 49152; break;                                 // shared memory of a block
  case 10: *v = 32; break;                                   // warp
  case 16: *v = 40; break;                                   // multiprocessors
  case 75: *v = arch() / 10; break;
  case 76: *v = arch() % 10; break;
  case 97: *v = arch() == 75 ? 65536 : arch() == 80 ? 166912 : 232448; break; // opt-in shared memory
  case 111: *v = arch() == 75 ? 0 : 1024; break;             // shared memory before a block's
  case 115: *v = 1; break;                                   // memory pools
  default: *v = 1;
  }
  return 0;
}
R cuDevicePrimaryCtxRetain(void **c, int d) { *c = (void *)1; return 0; }
R cuDevicePrimaryCtxRelease_v2(int d) { return 0; }
R cuDevicePrimaryCtxRelease(int d) { return 0; }
R cuCtxSetCurrent(void *c) { return 0; }
R cuCtxGetCurrent(void **c) { *c = (void *)1; return 0; }
R cuCtxSynchronize(void) { return 0; }
R cuStreamCreate(void **s, unsigned f) { static size_t n = 16; *s = (void *)n++; return 0; }
R cuStreamDestroy_v2(void *s) { return 0; }
R cuStreamSynchronize(void *s) { return 0; }
R cuStreamWaitEvent(void *s, void *e, unsigned f) { return 0; }
R cuStreamQuery(void *s) { return 0; }
R cuEventCreate(void **e, unsigned f) { static size_t n = 16; *e = (void *)n++; return 0; }
R cuEventRecord(void *e, void *s) { return 0; }
R cuEventSynchronize(void *e) { return 0; }
R cuEventQuery(void *e) { return 0; }
R cuEventElapsedTime(float *t, void *a, void *b) { *t = 1; return 0; }
R cuEventElapsedTime_v2(float *t, void *a, void *b) { *t = 1; return 0; }
R cuEventDestroy_v2(void *e) { return 0; }
R cuMemAlloc_v2(void **p, size_t n) { *p = calloc(n + 512, 1); return 0; }
R cuMemAllocAsync(void **p, size_t n, void *s) { return cuMemAlloc_v2(p, n); }
R cuMemFree_v2(void *p) { return 0; }
R cuMemFreeAsync(void *p, void *s) { return 0; }
R cuMemAllocHost_v2(void **p, size_t n) { return cuMemAlloc_v2(p, n); }
R cuMemHostAlloc(void **p, size_t n, unsigned f) { return cuMemAlloc_v2(p, n); }
R cuMemFreeHost(void *p) { return 0; }
R cuMemHostGetDevicePointer_v2(void **d, void *h, unsigned f) { *d = h; return 0; }
R cuMemGetInfo_v2(size_t *f, size_t *t) { *f = *t = (size_t)16 << 30; return 0; }
R cuMemcpyHtoDAsync_v2(void *d, const void *h, size_t n, void *s) { memcpy(d, h, n); return 0; }
R cuMemcpyDtoHAsync_v2(void *h, const void *d, size_t n, void *s) { memcpy(h, d, n); return 0; }
R cuMemcpyDtoDAsync_v2(void *h, const void *d, size_t n, void *s) { memmove(h, d, n); return 0; }
R cuMemcpy2DAsync_v2(const void *p, void *s);
R cuMemsetD8Async(void *p, unsigned char c, size_t n, void *s) { memset(p, c, n); return 0; }
R cuGetErrorName(R r, const char **s) { *s = "stub"; return 0; }
R cuGetErrorString(R r, const char **s) { *s = "stub"; return 0; }


// Events of a context: nothing is submitted, so there is nothing to order.
R cuCtxRecordEvent(void *c, void *e) { return 0; }
R cuCtxWaitEvent(void *c, void *e) { return 0; }
// Steps of answers are compiled, and never run.
R cuLaunchCooperativeKernel(void *f, unsigned a, unsigned b, unsigned c, unsigned x, unsigned y, unsigned z, unsigned n, void *s, void **p) { return 0; }
R cuModuleGetGlobal_v2(void **p, size_t *n, void *m, const char *name) { static char step[4096]; *p = step; return 0; }
R cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, void *f, int units, size_t shared) { *n = 1; return 0; }

typedef void Entry(void **, unsigned *, unsigned *);
// The image is the path of an emulated kernel, or PTX, which is kept for ptxas and never run.
R cuModuleLoadData(void **m, const char *image) {
  if (image[0] == '/' && image[1] != '/') {
    *m = dlopen(image, RTLD_NOW | RTLD_LOCAL);
    if (!*m) fprintf(stderr, "%s\n", dlerror());
    return *m ? 0 : 1;
  }
  static int count = 0;
  char path[4096];
  snprintf(path, sizeof path, "%s/k%03d.ptx", getenv("EMU_OUT"), count++);
  FILE *file = fopen(path, "w");
  if (file) { fputs(image, file); fclose(file); }
  *m = NULL;
  return 0;
}
R cuModuleUnload(void *m) { return 0; }
R cuModuleGetFunction(void **f, void *m, const char *name) {
  static char nothing;
  char entry[4096];
  snprintf(entry, sizeof entry, "emu_entry_%s", name);
  *f = m ? dlsym(m, entry) : &nothing;
  return *f ? 0 : 1;
}
R cuFuncSetAttribute(void *f, int a, int v) { return 0; }
// `Map` in hopper.h, of four dimensions.
R cuTensorMapEncodeTiled(uint64_t *map, int type, unsigned rank, void *at, const uint64_t *sizes, const uint64_t *strides,
                         const unsigned *box, const unsigned *steps, int interleave, int swizzle, int promotion, int fill) {
  map[0] = (uint64_t)at;
  memcpy(map + 1, sizes, 4 * sizeof *sizes);
  memcpy(map + 5, strides, 3 * sizeof *strides);
  return 0;
}

R cuLaunchKernel(void *f, unsigned a, unsigned b, unsigned c, unsigned x, unsigned y,
                 unsigned z, unsigned n, void *s, void **p, void **e) {
  unsigned g[] = {a, b, c}, d[] = {x, y, z};
  if (getenv("EMU_RUN")) ((Entry *)f)(p, g, d);
  return 0;
}
typedef struct { size_t sx, sy; int st; const char *sh; char *sd; void *sa; size_t sp; size_t dx, dy; int dt; char *dh; char *dd; void *da; size_t dp; size_t w, h; } Copy;

R cuMemcpy2DAsync_v2(const void *p, void *s) {
  const Copy *c = p;
  const char *from = c->st == 1 ? c->sh : c->sd; char *to = c->dt == 1 ? c->dh : c->dd;
  for (size_t i = 0; i < c->h; i++) memcpy(to + (c->dy + i) * c->dp + c->dx, from + (c->sy + i) * c->sp + c->sx, c->w);
  return 0;
}
