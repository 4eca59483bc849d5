// A libnvrtc that compiles a kernel's CUDA source for the host, with emu.h in place of CUDA's headers.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct P { char *source; char path[4096]; };

int nvrtcCreateProgram(struct P **p, const char *s, const char *n, int c, void *a, void *b) {
  *p = calloc(1, sizeof **p);
  (*p)->source = strdup(s);
  return 0;
}
int nvrtcDestroyProgram(struct P **p) { return 0; }
int nvrtcCompileProgram(struct P *p, int n, const char **o) {
  static int count = 0;
  char file[4096], command[16384];
  const char *out = getenv("EMU_OUT"), *here = getenv("EMU_HERE");
  snprintf(file, sizeof file, "%s/k%03d.cpp", out, count);
  snprintf(p->path, sizeof p->path, "%s/k%03d.so", out, count++);
  FILE *f = fopen(file, "w");
  fputs(p->source, f);
  fclose(f);
  int end = snprintf(command, sizeof command, "python3 %s/build.py %s %s", here, file, p->path);
  for (int i = 0; i < n; i++)
    if (!strncmp(o[i], "-D", 2)) end += snprintf(command + end, sizeof command - end, " %s", o[i]);
  return system(command) ? 6 : 0;
}
int nvrtcGetProgramLogSize(struct P *p, size_t *n) { *n = 5000; return 0; }
int nvrtcGetProgramLog(struct P *p, char *s) { snprintf(s, 5000, "see %s.log", p->path); return 0; }
int nvrtcGetPTXSize(struct P *p, size_t *n) { *n = strlen(p->path) + 1; return 0; }
int nvrtcGetPTX(struct P *p, char *s) { strcpy(s, p->path); return 0; }
const char *nvrtcGetErrorString(int e) { return "emulated"; }
