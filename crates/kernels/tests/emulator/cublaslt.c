// A libcublasLt that multiplies nothing, so that products take the way that they take on a card.
#include <stddef.h>
#include <string.h>

typedef int R;
// cublasLtMatmulHeuristicResult_t: 64 bytes of algorithm, workspace, status 0 (success), waves, reserved.
typedef struct { char bytes[96]; } Found;
static R make(void **p) { *p = (void *)16; return 0; }

R cublasLtCreate(void **h) { return make(h); }
R cublasLtDestroy(void *h) { return 0; }
R cublasLtMatrixLayoutCreate(void **l, int type, unsigned long long rows, unsigned long long columns, long long ld) { return make(l); }
R cublasLtMatrixLayoutSetAttribute(void *l, int a, const void *v, size_t n) { return 0; }
R cublasLtMatrixLayoutDestroy(void *l) { return 0; }
R cublasLtMatmulDescCreate(void **d, int compute, int scale) { return make(d); }
R cublasLtMatmulDescSetAttribute(void *d, int a, const void *v, size_t n) { return 0; }
R cublasLtMatmulDescDestroy(void *d) { return 0; }
R cublasLtMatmulPreferenceCreate(void **p) { return make(p); }
R cublasLtMatmulPreferenceSetAttribute(void *p, int a, const void *v, size_t n) { return 0; }
R cublasLtMatmulPreferenceDestroy(void *p) { return 0; }
R cublasLtMatmulAlgoGetHeuristic(void *h, void *d, void *a, void *b, void *c, void *to, void *p, int asked,
                                 Found *found, int *count) {
  memset(found, 0, sizeof *found);
  *count = 1;
  return 0;
}
R cublasLtMatmul(void *h, void *d, const void *alpha, const void *a, void *la, const void *b, void *lb,
                 const void *beta, const void *c, void *lc, void *to, void *lto, const void *algorithm,
                 void *workspace, size_t bytes, void *stream) { return 0; }
