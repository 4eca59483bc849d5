#!/bin/bash
# CUDA kernels without a GPU.
#
#   run.sh emulate ARCH BINARY [FILTER]    runs a test binary; its kernels run on the CPU (x86-64 Linux, g++)
#   run.sh compile ARCH BINARY [FILTER]    compiles its kernels with NVRTC for ARCH, and with ptxas, which prints
#                                          registers and spills; results of the tests mean nothing
#
# ARCH is 75 (T4), 80 or 90. For `compile`, CUDA_ROOT holds nvidia/{cuda_nvrtc,cuda_nvcc,cuda_runtime,cuda_cccl}, the
# unpacked wheels of these names (12.6 was used: NVRTC 12.9 crashed where this was written).
set -eu
mode=$1 arch=$2 binary=$3 filter=${4:-}
export EMU_HERE=$(cd "$(dirname "$0")" && pwd) EMU_OUT=${EMU_OUT:-$(mktemp -d)} STUB_ARCH=$arch
mkdir -p "$EMU_OUT/lib" "$EMU_OUT/cuda/include"
cc -shared -fPIC -w -o "$EMU_OUT/lib/libcuda.so" "$EMU_HERE/cuda.c" -ldl
if [ "$mode" = emulate ]; then
  cc -shared -fPIC -w -o "$EMU_OUT/lib/libnvrtc.so" "$EMU_HERE/nvrtc.c"
  CUDA_PATH=$EMU_OUT/cuda EMU_RUN=1 LD_LIBRARY_PATH=$EMU_OUT/lib "$binary" $filter --nocapture
  exit
fi
nvidia=$CUDA_ROOT/nvidia
for package in cuda_runtime cuda_cccl cuda_nvcc; do cp -rn "$nvidia/$package/include/." "$EMU_OUT/cuda/include/"; done
ln -sf "$nvidia"/cuda_nvrtc/lib/libnvrtc.so.12 "$EMU_OUT/lib/libnvrtc.so"
CUDA_PATH=$EMU_OUT/cuda LD_LIBRARY_PATH=$EMU_OUT/lib:$nvidia/cuda_nvrtc/lib "$binary" $filter --nocapture \
  > "$EMU_OUT/log" 2>&1 || true
if grep -m1 -A6 "Compilation Error" "$EMU_OUT/log"; then exit 1; fi
for ptx in "$EMU_OUT"/*.ptx; do
  target=$(grep -m1 -o "target sm_[0-9a]*" "$ptx" | cut -d" " -f2)
  echo "$(grep -m1 -o "entry [A-Za-z0-9_]*" "$ptx") $target"
  "$nvidia/cuda_nvcc/bin/ptxas" -v -arch="$target" "$ptx" -o /dev/null 2>&1 | grep -E "error|spill|Used"
done
